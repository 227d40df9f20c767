"""A tiny model of three modalities that has been trained for a step."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ALL, write_data_set, write_tiny_run

from mmfuse.train.run import load_run
from mmfuse.train.trainer import train

SHARDS = (3, 1, 4)
LACKING = {1: ("audio",), 3: ("image", "text"), 6: ("text",)}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run over `set/recipe.yaml` beside it."""
    from accelerate.state import AcceleratorState

    folder = tmp_path_factory.mktemp("embed")
    recipe = write_data_set(folder / "set", shard_sizes=SHARDS, lacking=LACKING)
    run = write_tiny_run(folder, recipe, modalities=ALL)
    settings = ["train.steps=1", "optimizer.warmup_steps=0", f"output_dir={folder / 'run'}"]
    settings += ["model.fusion={num_layers: 1, num_heads: 2}", "objectives={contrastive: {}, leave_one_out: {}}"]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ACCELERATE_USE_CPU", "true")
        yield train(load_run(str(run), overrides=settings))
    AcceleratorState._reset_state(reset_partial_state=True)
