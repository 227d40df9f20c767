"""What fusion is for: a label that no modality knows alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.model.concat import ConcatFusion
from mmfuse.model.fusion import Fusion, FusionConfig
from mmfuse.types import TokenBatch

WIDTH, LENGTH, NAMES = 16, 3, ("text", "image")


def draw(count: int, generator: torch.Generator) -> tuple[TokenBatch, Tensor]:
    """A bit for each modality, which the sign of one of its noisy tokens carries; the label is their exclusive or."""
    bits = torch.randint(2, (count, 2), generator=generator)
    tokens = {}
    for number, name in enumerate(NAMES):
        tokens[name] = torch.randn(count, LENGTH, WIDTH, generator=generator) * 0.3
        place = torch.randint(LENGTH, (count,), generator=generator)
        tokens[name][torch.arange(count), place, number] += 4.0 * bits[:, number] - 2.0
    masks = {name: torch.ones(count, LENGTH, dtype=torch.bool) for name in NAMES}
    return TokenBatch(tokens, masks, {name: torch.arange(count) for name in NAMES}, count), bits.sum(1) % 2


def without(batch: TokenBatch, absent: str) -> TokenBatch:
    """The same samples lacking a modality."""
    cut = [{n: part[:0] if n == absent else part for n, part in parts.items()} for parts in batch[:3]]
    return TokenBatch(*cut, batch.num_rows)


@pytest.mark.parametrize("variant", ["cross", "merged", "concat", pytest.param("bottleneck", marks=pytest.mark.slow)])
def test_fusion_learns_an_exclusive_or_that_no_modality_knows(variant: str) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    config = FusionConfig.model_validate({"variant": variant, "num_layers": 2, "num_heads": 4})
    fusion = (ConcatFusion if variant == "concat" else Fusion)(config, modalities=NAMES, width=WIDTH)
    model = nn.ModuleList([fusion, nn.Linear(WIDTH, 2)])
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    trial, trial_label = draw(1000, generator)
    for step in range(600):
        batch, label = draw(128, generator)
        if step % 4 == 3:  # what one modality tells alone is learned too
            batch = without(batch, NAMES[step // 4 % 2])
        loss = F.cross_entropy(model[1](fusion(batch)[1]), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 49 and score(model, trial, trial_label) >= 0.98:
            break
    test, test_label = draw(2000, generator)
    assert score(model, test, test_label) >= 0.95
    alone = {name: score(model, without(test, name), test_label) for name in NAMES}
    assert all(accuracy <= 0.6 for accuracy in alone.values()), alone


@torch.no_grad()
def score(model: nn.ModuleList, batch: TokenBatch, label: Tensor) -> float:
    return (model[1](model[0](batch)[1]).argmax(1) == label).double().mean().item()
