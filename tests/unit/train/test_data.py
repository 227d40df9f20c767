"""The record of what a run trained on has every step once, also when the world shrinks."""

import json
from pathlib import Path

from distributed.launches import read_samples
from unit.train.tiny_runs import killed_after_step_2, read_lines, train_tiny

RECORD = "train.record_samples=true"
RANKS = 4


def deal_record_to_ranks(folder: Path) -> None:
    """Makes one rank's record that of four, each with a row of every batch."""
    lines = read_lines(folder / "samples.rank0.jsonl")
    for rank in range(RANKS):
        own = [json.dumps({"step": line["step"], "keys": [line["keys"][rank]]}) for line in lines]
        (folder / f"samples.rank{rank}.jsonl").write_text("\n".join(own) + "\n")


def test_one_rank_that_resumes_cuts_the_records_of_the_four_that_were_before(tiny_run: Path, tmp_path: Path) -> None:
    whole = train_tiny(tiny_run, tmp_path / "whole", RECORD)
    killed = killed_after_step_2(whole, tmp_path / "killed")
    deal_record_to_ranks(killed)
    assert read_samples(killed) == read_samples(whole)
    train_tiny(tiny_run, killed, RECORD)
    steps = [[line["step"] for line in read_lines(killed / f"samples.rank{rank}.jsonl")] for rank in range(RANKS)]
    assert steps == [[1, 2, 3, 4], [1, 2], [1, 2], [1, 2]]
    assert read_samples(killed) == read_samples(whole)
