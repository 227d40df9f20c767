"""Tensors in parts: however many ranks wrote them, they come back whole, by any slice, or not at all."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from unit.train.parts import write_in_parts

from mmfuse.errors import CheckpointError
from mmfuse.train.engines.base import Part
from mmfuse.train.state_files import StoredState, write_parts, write_whole

WEIGHTS = {
    "matrix": torch.arange(12.0).reshape(3, 4),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "counts": torch.tensor([7, 2**40]),
}


def assert_equal(found: dict[str, Tensor]) -> None:
    assert found.keys() == WEIGHTS.keys()
    for name, tensor in found.items():
        assert tensor.dtype == WEIGHTS[name].dtype and torch.equal(tensor, WEIGHTS[name]), name


@pytest.mark.parametrize("ranks", [0, 1, 2, 5, 30])
def test_what_any_number_of_ranks_wrote_comes_back_whole_and_by_any_slice(tmp_path: Path, ranks: int) -> None:
    if ranks:
        write_in_parts(tmp_path, "model", WEIGHTS, ranks=ranks)
    else:
        write_whole(tmp_path / "model.safetensors", WEIGHTS)  # for everyone
    stored = StoredState(tmp_path)
    assert_equal(stored.whole("model"))
    assert stored.shapes("model") == {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}
    for name, tensor in WEIGHTS.items():
        for start in range(tensor.numel() + 1):
            for end in range(start, tensor.numel() + 1):
                part = stored.read("model", name, start, end - start)
                assert torch.equal(part, tensor.reshape(-1)[start:end]), (name, start, end)


def test_kinds_are_kept_apart(tmp_path: Path) -> None:
    write_in_parts(tmp_path, "model", WEIGHTS, ranks=2)
    parts = [Part("matrix", 0, torch.ones(12))]
    write_parts(tmp_path, "exp_avg", parts, rank=0, shapes={"matrix": (3, 4)})
    stored = StoredState(tmp_path)
    assert sorted(stored.kinds) == ["exp_avg", "model"]
    assert_equal(stored.whole("model"))
    assert torch.equal(stored.whole("exp_avg")["matrix"], torch.ones(3, 4)) and len(stored.shapes("exp_avg")) == 1
    assert stored.whole("exp_avg_sq") == {}


@pytest.mark.parametrize(("starts", "reached"), [((4, 8), 0), ((0, 8), 4), ((0, 4), 8), ((0, 8, 4, 4), 8)])
def test_a_weight_with_a_part_missing_or_twice_is_named_with_the_place(
    tmp_path: Path, starts: tuple[int, ...], reached: int
) -> None:
    for rank, start in enumerate(starts):
        part = Part("matrix", start, WEIGHTS["matrix"].reshape(-1)[start : start + 4])
        write_parts(tmp_path, "model", [part], rank=rank, shapes={"matrix": (3, 4)})
    with pytest.raises(CheckpointError, match=rf"values of matrix \(model\) are missing from {reached} on"):
        StoredState(tmp_path)


def test_a_file_that_is_no_longer_what_was_written_is_named(tmp_path: Path) -> None:
    path = write_in_parts(tmp_path, "model", WEIGHTS, ranks=2)[1]
    whole = path.read_bytes()
    for damaged in (
        whole[:-1],
        whole[:100],
        b"",
        b"\xff" * len(whole),
        whole.replace(b'{\\"matrix\\":', b'{\\"matrix\\" '),
    ):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model-00001\.safetensors is not readable"):
            StoredState(tmp_path)
