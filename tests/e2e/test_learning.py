"""Whether the whole of encoders and contrastive loss learns: triplets of one latent, tested on latents never seen."""

import pytest
import torch
from batches import CLS, FIRST_WORD, SEP, objective_configs
from helpers import TINY_MODALITIES

from mmfuse.data.collate import collate_samples
from mmfuse.evaluate.retrieval import EvaluationConfig, embed_set, evaluate_retrieval
from mmfuse.model.model import ModelConfig
from mmfuse.task import Task
from mmfuse.types import Features, Sample

SLOTS, VALUES, HELD_OUT = 3, 8, 64
WIDE = {"text": 64, "image": 96, "audio": 64}


def make_sample(latent: int, presence: str, generator: torch.Generator) -> Sample:
    """The latent has three slots of eight values: each a word, stripes in a colour, a band at a time; and noise."""
    slots = [latent // VALUES**slot % VALUES for slot in range(SLOTS)]
    pixels, fbank = torch.randint(64, (3, 32, 32), generator=generator), 0.3 * torch.randn(32, 16, generator=generator)
    words = [FIRST_WORD + VALUES * slot + value for slot, value in enumerate(slots)]
    for slot, value in enumerate(slots):
        pixels[slot].unflatten(1, (2, 16))[:, :, 2 * value : 2 * value + 2] += 160
        fbank[10 * slot : 10 * slot + 10, 2 * value : 2 * value + 2] += 2
    features: dict[str, Features] = {
        "text": {"input_ids": torch.tensor([CLS, *words, SEP]), "second": torch.tensor(len(words) + 2)},
        "image": {"pixels": pixels.to(torch.uint8)},
        "audio": {"fbank": fbank},
    }
    return Sample(latent, latent, str(latent), {name: x for name, x in features.items() if name[0] in presence})


def learn(presence: tuple[str, ...], pairs: dict[str, float] | None) -> dict[str, dict[str, float]]:
    """Scores of held-out latents after training on samples that hold what `presence` says, in turns at random."""
    modalities = {
        name: {**config, "hidden_size": WIDE[name], "num_layers": 2, "num_heads": 4 if name != "image" else 3}
        for name, config in TINY_MODALITIES.items()
    }
    config = ModelConfig.model_validate({"modalities": modalities, "width": 64, "embedding_dim": 32, "fusion": None})
    processors = {name: modality.build_processor() for name, modality in config.modality_configs.items()}
    task = Task(config, objective_configs(("contrastive",), contrastive={"pairs": pairs}), seed=0)
    optimizer, generator = torch.optim.AdamW(task.parameters(), 2e-3), torch.Generator().manual_seed(0)
    latents = torch.randperm(VALUES**SLOTS, generator=generator)
    held_out, trained = latents[:HELD_OUT].tolist(), latents[HELD_OUT:]
    for step in range(80):
        chosen = trained[torch.randint(len(trained), (64,), generator=generator)].tolist()
        kinds = torch.randint(len(presence), (64,), generator=generator).tolist()
        samples = [make_sample(latent, presence[kind], generator) for latent, kind in zip(chosen, kinds, strict=True)]
        loss = task(collate_samples(samples, processors, step=step, global_rows=64)).loss
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 20)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
    samples = [make_sample(latent, "tia", generator) for latent in held_out]
    batch = collate_samples(samples, processors, step=0, global_rows=HELD_OUT)
    embedded = embed_set(task, [batch], num_samples=HELD_OUT, device=torch.device("cpu"), name="held out")
    return evaluate_retrieval(embedded, EvaluationConfig(recall_at=(1,)))


@pytest.mark.parametrize(
    ("presence", "pairs"),
    [
        (("tia", "ti", "ta", "ia"), None),
        # Text and sound are never together and no loss joins them: they meet through pictures (ImageBind).
        (("ti", "ia"), {"text-image": 1.0, "image-audio": 1.0}),
    ],
    ids=["every pair", "emergent text-audio"],
)
def test_all_six_directions_find_latents_that_were_never_seen(
    presence: tuple[str, ...], pairs: dict[str, float] | None
) -> None:
    scores = learn(presence, pairs)
    assert len(scores) == 6
    for direction, score in scores.items():
        assert score["chance R@1"] <= 0.02 and score["R@1"] >= 0.8, (direction, score["R@1"])
