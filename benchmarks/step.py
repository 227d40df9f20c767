"""Time of a training step on samples that lack modalities, beside the two usual ways to deal with them.

    python -m benchmarks.step [--rounds 7] [--batch 64] [--json FILE]

Widths are tiny, token counts are those of the preset base: 197 of a picture, 512 patches of a sound that become 64
tokens, 8 to 32 of a caption. In every round all systems take one step of forward, backward and AdamW on the same
samples with the same weights, in one process, in turns; then each fuses alone, forward and backward, on tokens of
its own. Without the time of our fusion, our step is what a fusion for free would take: no fusion makes it shorter.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Summary, current_commit, describe_machine, summarise, write_section
from mmfuse.data.collate import collate_samples
from mmfuse.model.fusion import Attention, Fusion, pool_modalities
from mmfuse.model.model import FusionModel, ModelConfig
from mmfuse.types import Batch, Features, Sample, TokenBatch

SIZES = {"hidden_size": 64, "num_layers": 4, "num_heads": 4}
MODEL = {
    "width": 64,
    "embedding_dim": 64,
    "modalities": {
        "text": {"tokenizer": "tiny", "vocab_size": 6368, "max_tokens": 77, **SIZES},
        "image": {"architecture": "vit_tiny_patch16_224", "image_size": 224, **SIZES},
        "audio": {
            **{"clip_seconds": 10.24, "num_mel_bins": 128, "patch_size": 16, "frequency_stride": 16, "time_stride": 16},
            **SIZES,
        },
    },
    "fusion": {"num_layers": 2, "num_heads": 4},
}
MIXTURE = {"ti": 0.45, "ta": 0.25, "tia": 0.12, "ia": 0.08, "t": 0.10}
"""Shares of the samples that hold exactly these modalities."""
Fuse = Callable[[TokenBatch], tuple[dict[str, Tensor], Tensor]]


class System(NamedTuple):
    """One way to train on samples with missing modalities."""

    fills: bool
    """Whether missing members become zeros, which the encoders then read."""
    dense: bool
    """Whether all tokens of all samples are padded to one length."""


SYSTEMS = {
    "mmfuse: present rows, packed fusion": System(fills=False, dense=False),
    "present rows, concatenated and masked": System(fills=False, dense=True),
    "zero-filled rows, concatenated": System(fills=True, dense=True),
}
OURS, MASKED, _ = SYSTEMS
GOAL = 1.8
"""How many times as long the step of `MASKED` should take."""


def make_features(modality: str, number: int, *, is_empty: bool = False) -> Features:
    """Random members as the processors give them; an empty one is what zero-filling makes of a missing one."""
    generator = torch.Generator().manual_seed(number)
    if modality == "text":
        length = 0 if is_empty else int(torch.randint(6, 31, (), generator=generator))
        words = torch.randint(5, 6368, (length,), generator=generator)
        return {
            "input_ids": torch.cat([torch.tensor([2]), words, torch.tensor([3])]),
            "second": torch.tensor(length + 2),
        }
    if modality == "image":
        pixels = torch.randint(256, (3, 224, 224), generator=generator, dtype=torch.uint8)
        return {"pixels": pixels * (not is_empty)}
    return {"fbank": torch.randn(1024, 128, generator=generator) * (not is_empty)}


def make_batch(config: ModelConfig, presence: list[str], *, fills: bool) -> Batch:
    """A batch of samples that hold the modalities with these initials."""
    processors = {name: modality.build_processor() for name, modality in config.modality_configs.items()}
    samples = []
    for number, pattern in enumerate(presence):
        held = {name: name[0] in pattern for name in config.modalities}
        features = {n: make_features(n, number, is_empty=not has) for n, has in held.items() if has or fills}
        samples.append(Sample(number, number, str(number), features))
    return collate_samples(samples, processors, step=0, global_rows=len(samples))


def fuse_densely(fusion: Fusion, batch: TokenBatch) -> tuple[dict[str, Tensor], Tensor]:
    """What `Fusion` of the variant cross computes, on `(B, L, D)` of all modalities side by side."""
    tokens, masks, kinds = [], [], []
    for number, name in enumerate(fusion.modalities):
        own, mask = batch.tokens[name] + fusion.modality_embedding[number], batch.masks[name]
        tokens.append(own.new_zeros(batch.num_rows, *own.shape[1:]).index_copy(0, batch.rows[name], own))
        masks.append(mask.new_zeros(batch.num_rows, mask.shape[1]).index_copy(0, batch.rows[name], mask))
        kinds.append(torch.full((own.shape[1],), number))
    x_BLD, mask_BL, kind_L = torch.cat(tokens, 1), torch.cat(masks, 1), torch.cat(kinds)
    same_LL = kind_L[:, None] == kind_L
    visible = {"within": same_LL & mask_BL[:, None], "across": ~same_LL & mask_BL[:, None]}
    for block in fusion.blocks:
        for view, attention in block.attentions.items():
            x_BLD = x_BLD + _attend_densely(attention, block.norms[view](x_BLD), visible[view])
        x_BLD = x_BLD + block.mlp(block.mlp_norm(x_BLD))
    parts = fusion.norm(x_BLD).split([part.shape[1] for part in tokens], dim=1)
    fused = {name: part[batch.rows[name]] for name, part in zip(fusion.modalities, parts, strict=True)}
    return fused, pool_modalities(fused, batch)


def _attend_densely(attention: Attention, x_BLD: Tensor, visible_BLL: Tensor) -> Tensor:
    heads, size = attention.num_heads, len(x_BLD)
    q, k, v = (f(x_BLD).unflatten(-1, (heads, -1)) for f in (attention.query, attention.key, attention.value))
    nulls = (null.view(1, 1, heads, -1).expand(size, -1, -1, -1) for null in (attention.null_key, attention.null_value))
    k, v = (torch.cat([null, x], dim=1).transpose(1, 2) for null, x in zip(nulls, (k, v), strict=True))
    visible = F.pad(visible_BLL, (1, 0), value=True)[:, None]
    return attention.output(F.scaled_dot_product_attention(q.transpose(1, 2), k, v, visible).transpose(1, 2).flatten(2))


def take_step(model: FusionModel, optimizer: torch.optim.Optimizer, batch: Batch, fuse: Fuse) -> float:
    """CPU seconds of forward, backward and update; the loss is the same for all systems."""
    begin = time.process_time()
    encoded = model.encode(batch)
    fused = model.fused_head(fuse(encoded.token_batch)[1])
    loss = torch.stack(list(encoded.embeddings.values())).sum(0).square().mean() + fused.square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - begin


def fuse_alone(fuse: Fuse, batch: TokenBatch, optimizer: torch.optim.Optimizer) -> float:
    """CPU seconds of the fusion's forward and backward, on tokens that want a gradient as they do in a step."""
    leaves = {name: part.detach().requires_grad_() for name, part in batch.tokens.items()}
    begin = time.process_time()
    fuse(batch._replace(tokens=leaves))[1].square().mean().backward()
    seconds = time.process_time() - begin
    optimizer.zero_grad()
    return seconds


def draw_presence(rows: int) -> list[str]:
    """The mixture's patterns in the order of a shuffled batch."""
    patterns = [pattern for pattern, share in MIXTURE.items() for _ in range(round(share * rows))]
    return [patterns[i] for i in torch.randperm(len(patterns), generator=torch.Generator().manual_seed(0)).tolist()]


def measure(rows: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each round by system: of its step, and as `alone(system)` of its fusion.

    And of a step on complete samples with all of the sounds and with half of them.
    """
    torch.set_num_threads(1)
    config = ModelConfig.model_validate(MODEL)
    torch.manual_seed(0)
    model = FusionModel(config)
    assert isinstance(model.fusion, Fusion)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    packed, dense = model.fusion, partial(fuse_densely, model.fusion)
    fuses: dict[str, Fuse] = {name: dense if system.dense else packed for name, system in SYSTEMS.items()}
    presence = draw_presence(rows)
    batches = {name: make_batch(config, presence, fills=system.fills) for name, system in SYSTEMS.items()}
    with torch.no_grad():
        tokens = {name: model.encode(batch).token_batch for name, batch in batches.items()}
        torch.testing.assert_close(packed(tokens[OURS])[1], dense(tokens[OURS])[1], rtol=0, atol=1e-5)
    half = ["tia" if number % 2 else "ti" for number in range(rows)]
    complete, halved = (make_batch(config, patterns, fills=False) for patterns in (["tia"] * rows, half))
    jobs: dict[str, Callable[[], float]] = {
        **{name: partial(take_step, model, optimizer, batches[name], fuse) for name, fuse in fuses.items()},
        **{alone(name): partial(fuse_alone, fuse, tokens[name], optimizer) for name, fuse in fuses.items()},
        "complete samples": partial(take_step, model, optimizer, complete, packed),
        "half of them without sound": partial(take_step, model, optimizer, halved, packed),
    }
    for job in jobs.values():
        job()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds):
        for name, job in jobs.items():
            times[name].append(job())
        print(f"round {number + 1} of {rounds} is done", flush=True)
    return times


def alone(system: str) -> str:
    """The name of the system's fusion among the times."""
    return f"{system}: the fusion alone"


def ratio(times: dict[str, list[float]], name: str, to: str) -> Summary:
    """Over the rounds, one time over another of the same round."""
    return summarise([one / other for one, other in zip(times[name], times[to], strict=True)])


def bound(times: dict[str, list[float]]) -> Summary:
    """Over the rounds, the step of `MASKED` over ours without the time of our fusion."""
    rounds = zip(times[MASKED], times[OURS], times[alone(OURS)], strict=True)
    return summarise([masked / (step - fusion) for masked, step, fusion in rounds])


def report(times: dict[str, list[float]], *, rows: int, rounds: int) -> str:
    """The section of RESULTS.md."""
    shares = ", ".join(f"{share:.0%} {pattern.upper()}" for pattern, share in MIXTURE.items())
    lines = [
        "## A step on samples that lack modalities",
        "",
        f"`python -m benchmarks.step --rounds {rounds} --batch {rows}` at commit {current_commit()}: "
        f"{describe_machine(('torch', 'timm', 'transformers'))}.",
        "",
        "CPU seconds of a step of forward, backward and AdamW, and of the fusion's forward and backward alone, median "
        f"of {rounds} rounds in turns (lowest to highest); {rows} samples: {shares}. Widths of 64, token counts of "
        "the preset base. All give the same fused vectors but the last, which fuses zeros too.",
        "",
        "| system | a step | over ours | the fusion alone | over ours |",
        "|---|---|---|---|---|",
    ]
    for name in SYSTEMS:
        pairs = ((name, OURS), (alone(name), alone(OURS)))
        cells = [f"{_show(summarise(times[one]))} | {_show(ratio(times, one, ours))} x" for one, ours in pairs]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    step, free = ratio(times, MASKED, OURS), bound(times)
    reached = "reached" if step.median >= GOAL else "**not reached**"
    lines += [
        "",
        f"- {MASKED}: at least {GOAL} x our step: {step.median:.2f} x ({reached})",
        f"- over our step less our fusion, which is what a fusion for free would give: {_show(free)} x",
    ]
    full, half, over = (
        summarise(times["complete samples"]),
        summarise(times["half of them without sound"]),
        ratio(times, "half of them without sound", "complete samples"),
    )
    lines += ["", f"Complete samples: {_show(full)} s; half of them without sound: {_show(half)} s, {_show(over)} x."]
    return "\n".join(lines)


def _show(summary: Summary) -> str:
    return f"{summary.median:.2f} ({summary.low:.2f} to {summary.high:.2f})"


def main() -> None:
    """Measures and writes the section of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path, help="where the figures of every round go")
    arguments = parser.parse_args()
    times = measure(arguments.batch, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(times, indent=1))
    text = report(times, rows=arguments.batch, rounds=arguments.rounds)
    print(text)
    write_section("step", text)


if __name__ == "__main__":
    main()
