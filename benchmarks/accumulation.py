"""What it costs to see a whole batch through micro-batches: peak memory and CPU time of a step, against their number.

    python -m benchmarks.accumulation [--rounds 3] [--batch 256] [--json FILE]

The preset tiny with contrastive and leave_one_out on random complete samples, forward, backward and AdamW, in a fresh
process for each count and round. The loss must be that of one micro-batch.
"""

import argparse
import json
import os
import resource
import sys
from pathlib import Path

import torch

from benchmarks.measure import current_commit, describe_machine, read_clock, run_child, summarise, write_section
from mmfuse.config import find_plugin
from mmfuse.data.collate import collate_samples
from mmfuse.model.model import ModelConfig
from mmfuse.task import Task
from mmfuse.train.accumulation import micro_steps
from mmfuse.train.engines.base import Engine
from mmfuse.train.engines.start import start_engine
from mmfuse.train.engines.strategy import Asked
from mmfuse.train.optim import OptimizerConfig, build_optimizer
from mmfuse.train.run import load_run
from mmfuse.types import Batch, Features, Sample

COUNTS = (1, 4, 16)
OBJECTIVES = ("contrastive", "leave_one_out")
TOLERANCE = 1e-5


def make_features(number: int) -> dict[str, Features]:
    """A caption of 12 tokens, a picture of 96 pixels and 2 s of sound, all random."""
    generator = torch.Generator().manual_seed(number)
    words = torch.randint(5, 6000, (10,), generator=generator)
    return {
        "text": {"input_ids": torch.cat([torch.tensor([2]), words, torch.tensor([3])]), "second": torch.tensor(12)},
        "image": {"pixels": torch.randint(256, (3, 96, 96), generator=generator, dtype=torch.uint8)},
        "audio": {"fbank": torch.randn(200, 64, generator=generator)},
    }


def make_batches(config: ModelConfig, *, batch: int, count: int) -> list[Batch]:
    """The same samples in so many parts."""
    processors = {name: modality.build_processor() for name, modality in config.modality_configs.items()}
    samples = [Sample(number, number, str(number), make_features(number)) for number in range(batch)]
    size = batch // count
    parts = [samples[start : start + size] for start in range(0, batch, size)]
    return [collate_samples(part, processors, step=0, global_rows=size) for part in parts]


def measure(count: int, batch: int) -> dict[str, float]:
    """Of the first step its loss and the peak of memory above what there was before; of the second its CPU seconds."""
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    task = Task(load_run("emoji").model, {n: find_plugin("mmfuse.objectives", n).Config() for n in OBJECTIVES}, seed=0)
    engine = start_engine(Asked("fp32", count, 1.0, timeout_seconds=600))
    engine.wrap(task.train(), build_optimizer(task, OptimizerConfig()), clip_norm=1.0, rank_rows=batch // count)
    batches = make_batches(load_run("emoji").model, batch=batch, count=count)
    before = _peak_megabytes()
    loss = run_step(engine, task, batches)
    megabytes, clock = _peak_megabytes() - before, read_clock()
    run_step(engine, task, batches)
    return {"loss": loss, "megabytes": megabytes, "cpu": read_clock().since(clock).cpu_seconds}


def run_step(engine: Engine, task: Task, batches: list[Batch]) -> float:
    """One optimizer step of the training loop."""
    losses = []
    steps = micro_steps(engine, task.comparisons, iter(batches), count=len(batches), seed=0)
    for number, (batch, seen) in enumerate(steps, start=1):
        with engine.accumulate(last=number == len(batches)):
            output = engine.forward(batch, seen)
            engine.backward(output.loss)
        losses.append(output.loss.item())
    engine.step()
    return sum(losses) / len(losses)


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def report(results: dict[int, list[dict[str, float]]], arguments: argparse.Namespace) -> str:
    """The section of RESULTS.md."""
    lines = []
    for count, rounds in results.items():
        memory, seconds = (summarise([r[name] for r in rounds]) for name in ("megabytes", "cpu"))
        ratios = [r["cpu"] / whole["cpu"] for r, whole in zip(rounds, results[1], strict=True)]
        lines.append(
            f"| {count} of {arguments.batch // count} "
            f"| {memory.median:,.0f} MB ({memory.low:,.0f} to {memory.high:,.0f}) "
            f"| {seconds.median:.2f} s ({seconds.low:.2f} to {seconds.high:.2f}) | {summarise(ratios).median:.2f} x |"
        )
    return "\n".join(
        [
            "## A whole batch through micro-batches",
            "",
            f"`python -m benchmarks.accumulation --rounds {arguments.rounds} --batch {arguments.batch}` at commit "
            f"{current_commit()}: {describe_machine(['torch', 'accelerate'])}.",
            "",
            f"A step of {arguments.batch} complete samples, preset tiny, contrastive and leave-one-out: peak of memory "
            f"above the model and its inputs, and CPU time; medians of {arguments.rounds} fresh processes (lowest to "
            "highest). The loss is the same in all.",
            "",
            "| micro-batches | memory | a step | of one micro-batch |",
            "|---|---|---|---|",
            *lines,
        ]
    )


def main() -> None:
    """Every count in a process of its own, or, with `--child`, one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--json", type=Path, help="where the figures of every round go")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.batch)))
        return
    results: dict[int, list[dict[str, float]]] = {count: [] for count in COUNTS}
    for _ in range(arguments.rounds):
        for count, rounds in results.items():
            child = ("--child", str(count), "--batch", str(arguments.batch))
            rounds.append(run_child(sys.executable, "benchmarks.accumulation", *child))
    losses = [round_["loss"] for rounds in results.values() for round_ in rounds]
    if max(losses) - min(losses) > TOLERANCE * losses[0]:
        sys.exit(f"the losses differ: {losses}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    text = report(results, arguments)
    print(text)
    write_section("accumulation", text)


if __name__ == "__main__":
    main()
