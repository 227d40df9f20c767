"""A batch holds rows for what is there and nothing for what is not."""

import torch

from mmfuse.data.collate import collate_samples
from mmfuse.types import Features, Sample


class Stacked:
    """The smallest processor."""

    def __call__(self, data: bytes, *, seed: int | None) -> Features:
        raise NotImplementedError

    def collate(self, features: list[Features]) -> Features:
        return {"x": torch.stack([item["x"] for item in features])}


def sample(number: int, *modalities: str) -> Sample:
    features = {m: {"x": torch.tensor([number, len(m)])} for m in modalities}
    return Sample(sample_id=number, group_id=number // 2, key=f"key {number}", features=features)


def test_rows_are_compact_and_say_where_they_belong() -> None:
    samples = [sample(10, "text"), sample(11), sample(12, "image", "text"), sample(13, "text")]
    processors = {"text": Stacked(), "image": Stacked(), "audio": Stacked()}
    batch = collate_samples(samples, processors, step=3, global_rows=8)

    assert batch.present.tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 0, 0]]
    assert set(batch.inputs) == {"text", "image"}
    assert batch.inputs["text"].rows.tolist() == [0, 2, 3]
    assert batch.inputs["text"].inputs["x"][:, 0].tolist() == [10, 12, 13]
    assert batch.inputs["image"].rows.tolist() == [2]
    assert batch.inputs["image"].inputs["x"].tolist() == [[12, 5]]
    assert batch.sample_id.tolist() == [10, 11, 12, 13]
    assert batch.group_id.tolist() == [5, 5, 6, 6]
    assert batch.keys == ("key 10", "key 11", "key 12", "key 13")
    assert (batch.step, batch.global_rows, batch.present.dtype) == (3, 8, torch.bool)
