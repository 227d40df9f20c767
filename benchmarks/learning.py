"""What is learned from the same real samples: this repository beside its peers, and with sound beside without.

    pip install sentence-transformers    # beside what `make` installs
    python -m benchmarks.learning [--steps 300] [--seeds 3] [--jobs 2] [--recipe emoji] [--json FILE]

Every run sees the same global batches of the full emoji set (data_shards/README.md says how to build it), decoded and
augmented by the same loader, with encoders of the same width and depth, AdamW and one schedule. open_clip's CLIP and
ClipLoss, and transformers' CLIP with the MultipleNegativesRankingLoss of sentence-transformers as it comes, take the
rows that hold both a picture and a text; their text encoders read from left to right, as CLIP's does. Scores are those
of held-out sets in `mmfuse.evaluate`, for all. Where a fusion learns too, by leave-one-out, a text or a picture also
asks together with its sound.
"""

import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.learning_peers import Peer, Scores, open_clip_parts, sentence_transformers_parts
from benchmarks.measure import current_commit, describe_machine, run_child, summarise, write_section
from mmfuse.train.run import RunConfig, load_run
from mmfuse.train.trainer import train

OPEN_CLIP, SENTENCE_TRANSFORMERS = "open_clip, image and text", "sentence-transformers, image and text"
PEERS = {OPEN_CLIP: open_clip_parts, SENTENCE_TRANSFORMERS: sentence_transformers_parts}
_QUARTER = "objectives.contrastive.pairs={text-image: 1, text-audio: 0.25, image-audio: 0.25}"
_WITHOUT_FUSION = ["model.fusion=null", "objectives.leave_one_out=null"]
_WITHOUT_SOUND = ["model.modalities.audio=null", *_WITHOUT_FUSION]
SYSTEMS = {
    OPEN_CLIP: _WITHOUT_SOUND,
    SENTENCE_TRANSFORMERS: _WITHOUT_SOUND,
    "mmfuse, image and text": _WITHOUT_SOUND,
    "mmfuse, image, text and sound": [],
    "mmfuse, sound at a quarter of the weight": [_QUARTER],
    "mmfuse, sound at a quarter and no fusion": [_QUARTER, *_WITHOUT_FUSION],
}
"""With what each changes in the run."""
DIRECTIONS = ("image->text", "text->image")
QUERIES = ("text->image", "audio->image", "text+audio->image", "image->text", "audio->text", "image+audio->text")
"""Of the table that shows what a sound adds to a query."""


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


def run_system(system: str, arguments: argparse.Namespace) -> Scores:
    """Trains one system with one seed in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(system, arguments, folder=folder)
        if system not in PEERS:
            return train_ours(run)
        peer = Peer(run, PEERS[system](run))
        peer.train()
        return peer.score()


class Row(NamedTuple):
    """A row of a table."""

    labels: tuple[str, ...]
    runs: list[Scores]
    """One for each seed."""
    directions: tuple[str, ...]
    """Whose recall is averaged."""


def table(head: tuple[str, ...], rows: list[Row]) -> list[str]:
    """Markdown: mean recall over seeds and directions, with the range over seeds; chance comes last."""
    scores, one = rows[0].runs[0], rows[0].directions[0]
    columns = [(name, k) for name in scores for k in ("R@1", "R@10")]
    lines = [[*head, *(f"{name}, {k}" for name, k in columns)]]
    for labels, runs, directions in rows:
        cells = []
        for name, k in columns:
            values = [sum(run[name][d][k] for d in directions) / len(directions) * 100 for run in runs]
            low, high = summarise(values)[1:]
            cells.append(f"{sum(values) / len(values):.1f}% ({low:.1f} to {high:.1f})")
        lines.append([*labels, *cells])
    lines.append(
        ["chance", *[""] * (len(head) - 1), *(f"{scores[name][one][f'chance {k}']:.2%}" for name, k in columns)]
    )
    first, *rest = [f"| {' | '.join(line)} |" for line in lines]
    return [first, "|" + "---|" * len(lines[0]), *rest]


def rows_by_query(results: dict[str, list[Scores]]) -> list[Row]:
    """What is asked with, beside each system that can be asked with it."""
    return [
        Row((query, system), runs, (query,))
        for query in QUERIES
        for system, runs in results.items()
        if all(query in directions for directions in runs[0].values())
    ]


def report(results: dict[str, list[Scores]], arguments: argparse.Namespace) -> str:
    """The section of RESULTS.md."""
    machine = describe_machine(["torch", "timm", "transformers", "open-clip-torch", "sentence-transformers"])
    return "\n".join(
        [
            "## Learning beside its peers",
            "",
            f"`python -m benchmarks.learning --steps {arguments.steps} --seeds {arguments.seeds}` at commit "
            f"{current_commit()}: {machine}.",
            "",
            f"Recall between pictures and texts of held-out emoji after {arguments.steps} steps of 64 samples, mean of "
            f"both directions and of {arguments.seeds} seeds (lowest to highest seed).",
            "",
            *table(("system",), [Row((system,), runs, DIRECTIONS) for system, runs in results.items()]),
            "",
            "What a query gains from a sound, by direction. What is spoken is the written name, so `audio->text` and "
            "`image+audio->text` ask for the words that were said.",
            "",
            *table(("query", "system"), rows_by_query(results)),
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
