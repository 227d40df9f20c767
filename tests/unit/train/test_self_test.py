"""The odd rank is named."""

import pytest
from distributed.launches import start_script, write_run, write_sparse_shards

from mmfuse.train.self_test import find_odd_ranks

USUAL = {"version of torch": "2.11.0", "checkpoint": "step_00000004: 1f"}


def test_ranks_that_see_the_same_are_no_problem() -> None:
    assert find_odd_ranks([("a", USUAL), ("a", USUAL), ("b", dict(USUAL))]) == []


def test_the_odd_rank_is_named_with_its_host_and_what_it_has() -> None:
    odd = {**USUAL, "version of torch": "2.12.0"}
    (problem,) = find_odd_ranks([("a", USUAL), ("b", odd), ("c", USUAL), ("d", odd), ("e", USUAL)])
    assert problem == "version of torch: rank 1 on b and 1 more has 2.12.0, most have 2.11.0"


def test_long_values_are_told_by_their_hash() -> None:
    (problem,) = find_odd_ranks([("a", {"data": "x" * 500}), ("a", {"data": "x" * 500}), ("b", {"data": "y" * 500})])
    assert len(problem) < 200 and "one with hash" in problem


@pytest.mark.slow
def test_a_rank_with_other_settings_stops_all_before_the_first_step(tmp_path) -> None:
    run = write_run(tmp_path / "run.yaml", write_sparse_shards(tmp_path / "shards"), steps=6)
    arguments = ("settings:0", str(run), "--set", f"output_dir={tmp_path / 'out'}")
    process = start_script("ddp", "faulty_run.py", *arguments, log=tmp_path / "log", launch_folder=tmp_path)
    assert process.wait(timeout=200) != 0
    log = (tmp_path / "log").read_text()
    assert "error: ranks do not see the same: settings of the run: rank 1 on" in log
    assert (tmp_path / "outcome").read_text() == "5"
    assert not (tmp_path / "out").exists()
