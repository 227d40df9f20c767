"""The quick start, as `make quickstart` runs it, learns what the README says."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_quick_start_learns_every_direction_and_ends_with_its_table_and_report(tmp_path):
    output = tmp_path / "quickstart"
    environment = {**os.environ, "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"}
    index = ["mmfuse", "shards", "index", "data_shards/samples/emoji"]
    subprocess.run(index, cwd=ROOT, env=environment, check=True)
    strategy = subprocess.check_output(["launch/quickstart_strategy.sh"], cwd=ROOT, env=environment, text=True).strip()
    command = ["launch/train.sh", strategy, "quickstart", "--set", f"output_dir={output}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2400, check=False)
    assert done.returncode == 0, done.stderr[-4000:]

    last = sorted((output / "evaluations").glob("step_*.json"))[-1]
    scores = json.loads(last.read_text())["sets"]["new_drawings"]
    assert len(scores) == 6 + 3  # from each modality to another, and from two to the third
    for direction, score in scores.items():
        assert score["gallery"] >= 100
        assert score["chance R@10"] == pytest.approx(10 / score["gallery"])
        least = 3 if "audio" in direction else 5
        assert score["R@10"] >= least * score["chance R@10"], (direction, score["R@10"])

    end = done.stderr.split("retrieval:")[-1]
    assert "new_drawings" in end and "image->text" in end
    page = re.search(r"report: (\S+)", end)
    assert page and Path(page[1]).read_text().startswith("<!doctype html>")
