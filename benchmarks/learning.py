"""What is learned from the same real samples: this repository beside open_clip, and with sound beside without.

    python -m benchmarks.learning [--steps 300] [--seeds 3] [--jobs 2] [--recipe emoji] [--json FILE]

Every run sees the same global batches of the full emoji set (data_shards/README.md says how to build it), decoded and
augmented by the same loader, with encoders of the same width and depth, AdamW and one schedule. open_clip's CLIP and
ClipLoss take the rows that hold both a picture and a text; its text encoder reads from left to right, as CLIP's does.
Scores are those of held-out sets in `mmfuse.evaluate`, for both.
"""

import argparse
import json
import math
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import current_commit, describe_machine, run_child, summarise, write_section
from mmfuse.data.decode import SampleDecoder
from mmfuse.data.loader import evaluation_requests, load_batches, training_requests
from mmfuse.data.source import Source
from mmfuse.evaluate.retrieval import EmbeddedSet, evaluate_retrieval
from mmfuse.train.data import TrainingData
from mmfuse.train.evaluation import Evaluator
from mmfuse.train.optim import learning_rate_factor
from mmfuse.train.run import RunConfig, load_run
from mmfuse.train.trainer import train
from mmfuse.types import Batch

OPEN_CLIP = "open_clip, image and text"
_WITHOUT_SOUND = ["model.modalities.audio=null", "model.fusion=null", "objectives.leave_one_out=null"]
SYSTEMS = {
    OPEN_CLIP: _WITHOUT_SOUND,
    "mmfuse, image and text": _WITHOUT_SOUND,
    "mmfuse, image, text and sound": [],
}
"""With what each changes in the run."""
DIRECTIONS = ("image->text", "text->image")
SEP = 3
"""Id of the tiny vocabulary with which every text ends."""
Scores = dict[str, dict[str, dict[str, float]]]
"""By validation set and direction."""


def make_run(system: str, arguments: argparse.Namespace, *, folder: str) -> RunConfig:
    """The shipped run `emoji` with fewer and smaller steps; open_clip gets its data and schedule from it."""
    settings = [f"seed={arguments.seed}", f"output_dir={folder}", f"train.steps={arguments.steps}"]
    settings += ["train.global_batch=64", "train.evaluate_every=0", f"optimizer.warmup_steps={arguments.steps // 10}"]
    settings.append(f"data.train=[{{recipe: {arguments.recipe}, split: train}}]")
    for name in ("new_drawings", "new_emoji"):
        settings.append(f"data.validation.{name}={{recipe: {arguments.recipe}, split: {name}}}")
    return load_run("emoji", overrides=[*settings, *SYSTEMS[system]])


def train_ours(run: RunConfig) -> Scores:
    """`mmfuse train` in this process; the scores of its last step."""
    folder = train(run)
    return json.loads((folder / "evaluations" / f"step_{run.train.steps:08d}.json").read_text())["sets"]


def build_open_clip(run: RunConfig) -> nn.Module:
    """open_clip's own CLIP with the widths and depths of the preset."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    image, text = run.model.modalities["image"], run.model.modalities["text"]
    vision = CLIPVisionCfg(
        layers=image.num_layers,  # type: ignore[attr-defined]
        width=image.hidden_size,  # type: ignore[attr-defined]
        head_width=image.hidden_size // image.num_heads,  # type: ignore[attr-defined]
        patch_size=16,
        image_size=image.image_size,  # type: ignore[attr-defined]
    )
    language = CLIPTextCfg(
        context_length=text.max_tokens,  # type: ignore[attr-defined]
        vocab_size=text.vocab_size,  # type: ignore[attr-defined]
        width=text.hidden_size,  # type: ignore[attr-defined]
        heads=text.num_heads,  # type: ignore[attr-defined]
        layers=text.num_layers,  # type: ignore[attr-defined]
        pool_type="eos",
        eos_id=SEP,
    )
    torch.manual_seed(run.seed)
    return CLIP(run.model.embedding_dim, vision, language)


class OpenClip:
    """Batches of this repository's loader through open_clip's model."""

    def __init__(self, run: RunConfig) -> None:
        self.run, self.model = run, build_open_clip(run)
        self.processors = {name: config.build_processor() for name, config in run.model.modality_configs.items()}

    def encode(self, name: str, batch: Batch) -> Tensor:
        """L2-normalised rows of those that have the modality."""
        inputs = batch.inputs[name].inputs
        if name == "image":
            return self.model.encode_image((inputs["pixels"].float() / 255 - 0.5) / 0.5, normalize=True)  # type: ignore[operator]
        ids = inputs["input_ids"]
        missing = self.model.context_length - ids.shape[1]  # type: ignore[operator]
        return self.model.encode_text(nn.functional.pad(ids, (0, missing)), normalize=True)  # type: ignore[operator]

    def train(self) -> None:
        """As open_clip's training does: no decay of gains, biases and the scale, which is clamped after each step."""
        import open_clip

        run, data = self.run, TrainingData(self.run)
        named = list(self.model.named_parameters())
        still = [p for name, p in named if p.ndim < 2 or "bn" in name or "ln" in name or "logit_scale" in name]
        rest = [p for _, p in named if all(p is not other for other in still)]
        config = run.optimizer
        groups = [{"params": still, "weight_decay": 0.0}, {"params": rest, "weight_decay": config.weight_decay}]
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)
        loss_of = open_clip.ClipLoss()
        decoder = SampleDecoder(data.sources, self.processors, seed=run.seed)
        for batch in load_batches(decoder, lambda: self._requests(data), num_workers=0):
            for group in optimizer.param_groups:
                factor = learning_rate_factor(batch.step, config=config, total_steps=run.train.steps)
                group["lr"] = config.learning_rate * factor
            both = batch.present.all(1)
            sides = [self.encode(name, batch)[both[batch.inputs[name].rows]] for name in ("image", "text")]
            loss = loss_of(*sides, self.model.logit_scale.exp())  # type: ignore[operator]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm or torch.inf)
            optimizer.step()
            with torch.no_grad():
                self.model.logit_scale.clamp_(0, math.log(100))  # type: ignore[operator]

    def _requests(self, data: TrainingData):
        return training_requests(data.plan, start=0, stop=self.run.train.steps, rank=0, world_size=1)

    @torch.no_grad()
    def score(self) -> Scores:
        """Of the run's validation sets."""
        self.model.eval()
        return {
            name: evaluate_retrieval(self._embed(source), self.run.evaluation)
            for name, source in Evaluator(self.run, self.run.model).sources.items()
        }

    def _embed(self, source: Source) -> EmbeddedSet:
        decoder = SampleDecoder([source], self.processors, seed=None)
        size, total = self.run.evaluation.batch_size, len(source)
        embeddings: dict[str, list[Tensor]] = {name: [] for name in self.processors}
        present, groups = [], []
        for batch in load_batches(
            decoder, lambda: evaluation_requests(total, batch_size=size, rank=0, world_size=1), num_workers=0
        ):
            for name, parts in embeddings.items():
                rows = torch.zeros(len(batch.present), self.run.model.embedding_dim)
                parts.append(rows.index_copy(0, batch.inputs[name].rows, self.encode(name, batch)))
            present.append(batch.present)
            groups.append(batch.group_id)
        there = torch.cat(present)[:total]
        return EmbeddedSet(
            {name: torch.cat(parts)[:total] for name, parts in embeddings.items()},
            {name: there[:, number] for number, name in enumerate(self.processors)},
            torch.cat(groups)[:total],
        )


def run_system(system: str, arguments: argparse.Namespace) -> Scores:
    """Trains one system with one seed in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(system, arguments, folder=folder)
        if system != OPEN_CLIP:
            return train_ours(run)
        peer = OpenClip(run)
        peer.train()
        return peer.score()


def table(results: dict[str, list[Scores]]) -> list[str]:
    """Markdown: mean recall over seeds and directions image <-> text, with the range over seeds."""
    sets = list(next(iter(results.values()))[0])
    columns = [(name, k) for name in sets for k in ("R@1", "R@10")]
    lines = ["| | " + " | ".join(f"{name}, {k}" for name, k in columns) + " |", "|---|" + "---|" * len(columns)]
    for system, runs in results.items():
        cells = []
        for name, k in columns:
            values = [sum(run[name][d][k] for d in DIRECTIONS) / len(DIRECTIONS) * 100 for run in runs]
            low, high = summarise(values)[1:]
            cells.append(f"{sum(values) / len(values):.1f}% ({low:.1f} to {high:.1f})")
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    chances = [results[OPEN_CLIP][0][name][DIRECTIONS[0]][f"chance {k}"] * 100 for name, k in columns]
    return [*lines, "| chance | " + " | ".join(f"{chance:.2f}%" for chance in chances) + " |"]


def report(results: dict[str, list[Scores]], arguments: argparse.Namespace) -> str:
    """The section of RESULTS.md."""
    machine = describe_machine(["torch", "timm", "transformers", "open-clip-torch"])
    return "\n".join(
        [
            "## Learning beside open_clip",
            "",
            f"`python -m benchmarks.learning --steps {arguments.steps} --seeds {arguments.seeds}` at commit "
            f"{current_commit()}: {machine}.",
            "",
            f"Recall between pictures and texts of held-out emoji after {arguments.steps} steps of 64 samples, mean of "
            f"both directions and of {arguments.seeds} seeds (lowest to highest seed).",
            "",
            *table(results),
        ]
    )


def main() -> None:
    """All systems and seeds in processes of their own, or, with `--child`, one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--recipe", default="emoji", help="emoji_sample for a trial with the committed samples")
    parser.add_argument("--json", type=Path, help="where the scores of every run go")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run_system(arguments.child, arguments)))
        return

    def start(system: str, seed: int) -> Scores:
        same = ["--steps", str(arguments.steps), "--recipe", arguments.recipe]
        return run_child(sys.executable, "benchmarks.learning", "--child", system, "--seed", str(seed), *same)

    jobs: list[tuple[str, int]] = [(system, seed) for seed in range(arguments.seeds) for system in SYSTEMS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        scores = list(pool.map(lambda job: start(*job), jobs))
    results: dict[str, list[Any]] = {system: [] for system in SYSTEMS}
    for (system, _), score in zip(jobs, scores, strict=True):
        results[system].append(score)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    text = report(results, arguments)
    print(text)
    write_section("learning", text)


if __name__ == "__main__":
    main()
