"""Memory and time of the contrastive loss on one rank of a simulated 64, against the global batch.

    python -m benchmarks.loss [--rounds 5] [--largest 65536] [--json FILE]

Every size is measured in a fresh process: forward and backward of one pair with embeddings of 512 numbers in fp32; the
other ranks' embeddings stand there as if they had been gathered. open_clip's `ClipLoss` gets the same tensors.
"""

import argparse
import json
import resource
import sys
from pathlib import Path
from unittest import mock

import torch

from benchmarks.measure import current_commit, describe_machine, read_clock, run_child, summarise, write_section

WORLD_SIZE, EMBEDDING = 64, 512
SYSTEMS = {
    "mmfuse, blocks of 8,192": 8192,
    "mmfuse, blocks of 1,024": 1024,
    "mmfuse, at once": 1 << 30,
    "open_clip, local loss": None,
}


def measure(system: str, global_rows: int) -> dict[str, float]:
    """Peak of memory above what there was before, and CPU seconds, of one forward and backward pass."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    everyone = torch.nn.functional.normalize(torch.randn(2, global_rows, EMBEDDING, generator=generator), dim=-1)
    own = everyone[:, : global_rows // WORLD_SIZE].clone().requires_grad_()
    step = _open_clip if SYSTEMS[system] is None else _mmfuse
    step(own[:, :8], everyone[:, :512], block_rows=64)  # imports and first uses
    peak, before = _peak_bytes(), read_clock()
    step(own, everyone, block_rows=SYSTEMS[system] or 0)
    return {"bytes": _peak_bytes() - peak, "cpu": read_clock().since(before).cpu_seconds}


def _peak_bytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _mmfuse(own: torch.Tensor, everyone: torch.Tensor, *, block_rows: int) -> None:
    from mmfuse.objectives.pairs import candidates, contrast
    from mmfuse.types import Batch

    rows, total = own.shape[1], everyone.shape[1]

    def gather(column: torch.Tensor, *, global_rows: int) -> torch.Tensor:
        """This rank's rows, with their gradient, before those of the others."""
        if column.is_floating_point():
            return torch.cat([column, everyone[:, rows:].transpose(0, 1)])
        if column.dtype == torch.bool:
            return torch.cat([column, column.new_ones(total - rows, column.shape[1])])
        return torch.arange(total)

    numbers = torch.arange(rows)
    present = torch.ones(rows, 2, dtype=torch.bool)
    batch = Batch(("a", "b"), present, numbers, numbers, (), {}, step=0, global_rows=total)
    sides = {name: candidates.Side(x, present[:, 0]) for name, x in zip("ab", own, strict=True)}
    pair = contrast.Pair("a", "b", torch.tensor(14.3, requires_grad=True))
    with (
        mock.patch.object(candidates, "gather_rows", gather),
        mock.patch.object(candidates, "world_size", lambda: WORLD_SIZE),
        mock.patch.object(candidates, "rank", lambda: 0),
    ):
        (term,) = contrast.contrast(sides, [pair], batch, candidates.CandidateConfig(block_rows=block_rows))
        term.loss.backward()


def _open_clip(own: torch.Tensor, everyone: torch.Tensor, *, block_rows: int) -> None:
    from open_clip import loss

    def gather(first: torch.Tensor, second: torch.Tensor, **_: object) -> tuple[torch.Tensor, ...]:
        parts = zip((first, second), everyone, strict=True)
        return tuple(torch.cat([x, others[len(x) :]]) for x, others in parts)

    with mock.patch.object(loss, "gather_features", gather):
        clip = loss.ClipLoss(local_loss=True, gather_with_grad=True, world_size=WORLD_SIZE)
        clip(own[0], own[1], torch.tensor(14.3, requires_grad=True)).backward()


def report(results: dict[str, dict[int, list[dict[str, float]]]], sizes: list[int], *, rounds: int) -> str:
    """The section of RESULTS.md."""
    lines = [
        "## Contrastive loss on one rank of 64",
        "",
        f"`python -m benchmarks.loss --rounds {rounds}` at commit {current_commit()}: "
        f"{describe_machine(('torch', 'open-clip-torch'))}.",
        "",
        f"Peak of memory (MB) and CPU seconds of forward and backward, one pair, embeddings of {EMBEDDING}; medians of "
        f"{rounds} fresh processes. Linear is 64 times the memory from the first column to the last.",
        "",
        "| global batch | " + " | ".join(f"{size:,}" for size in sizes) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    for system, by_size in results.items():
        cells = [
            f"{summarise([r['bytes'] for r in by_size[size]]).median / 1e6:,.0f} MB, "
            f"{summarise([r['cpu'] for r in by_size[size]]).median:.2f} s"
            for size in sizes
        ]
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures every system at every size, and writes the section of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--largest", type=int, default=65_536)
    parser.add_argument("--json", type=Path, help="where the figures of every round go")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child[0], int(arguments.child[1]))))
        return
    sizes = [size for size in (1024, 4096, 16_384, 65_536) if size <= arguments.largest]
    results: dict[str, dict[int, list[dict[str, float]]]] = {name: {size: [] for size in sizes} for name in SYSTEMS}
    for number in range(arguments.rounds):
        for system in SYSTEMS:
            for size in sizes:
                child = run_child(sys.executable, "benchmarks.loss", "--child", system, str(size))
                results[system][size].append(child)
        print(f"round {number + 1} of {arguments.rounds} is done", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    text = report(results, sizes, rounds=arguments.rounds)
    print(text)
    write_section("loss", text)


if __name__ == "__main__":
    main()
