"""A user's own DeepSpeed JSON, and one that contradicts the run."""

import json
from pathlib import Path

import pytest
from distributed.launches import TOLERANCE, finish, needs_compiler, read_losses, start, write_run, write_sparse_shards

from mmfuse.errors import ConfigError

pytestmark = [pytest.mark.slow, needs_compiler]
STEPS = 6
ZERO = {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 100_000}
AUTO = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"), "auto")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    return write_run(folder / "run.yaml", write_sparse_shards(folder / "shards"), steps=STEPS)


def test_it_trains_as_one_process_does(run: Path) -> None:
    own = run.with_name("own.json")
    own.write_text(json.dumps({"zero_optimization": ZERO, "bf16": {"enabled": "auto"}, **AUTO}))
    for strategy, output in (("cpu", run.with_name("alone")), (str(own), run.with_name("together"))):
        finish(start(strategy, run, output), output)
    assert json.loads((run.parent / "together/environment.json").read_text())["strategy"] == "zero2"
    assert read_losses(run.parent / "together") == pytest.approx(read_losses(run.parent / "alone"), rel=TOLERANCE)


def test_one_that_contradicts_the_run_is_refused_with_the_exit_code_of_wrong_settings(run: Path) -> None:
    own, output = run.with_name("contrary.json"), run.with_name("contrary")
    own.write_text(json.dumps({"zero_optimization": ZERO, "gradient_clipping": 5.0, "bf16": {"enabled": True}}))
    assert start(str(own), run, output).wait(timeout=200) == ConfigError.exit_code
    log = Path(f"{output}.log").read_text()
    assert (
        "gradient_clipping: 5.0, but optimizer.clip_norm = 1.0; bf16.enabled: True, but train.precision = fp32" in log
    )
    assert not output.exists()
