"""Checkpoints written beside the training: what was there when it was asked for, or an error and the one before."""

import copy
import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmfuse.errors import CheckpointError
from mmfuse.task import Task
from mmfuse.train.average import WeightAverage
from mmfuse.train.checkpoint import CHECKPOINTS, MODALITIES, complete_checkpoints, read_facts, verify_checkpoint
from mmfuse.train.data import TrainingData
from mmfuse.train.engines.base import Engine
from mmfuse.train.engines.start import start_engine
from mmfuse.train.engines.strategy import Asked
from mmfuse.train.optim import build_optimizer
from mmfuse.train.resume import write_model_files
from mmfuse.train.run import load_run
from mmfuse.train.saver import CheckpointSaver
from mmfuse.train.side_channel import open_store
from mmfuse.train.state_files import StoredState, write_parts

State = dict[str, dict[str, Tensor]]


class Ranks:
    """The ranks of a run, all in this process: each has an engine that writes its part of the one task's state."""

    def __init__(self, tiny_run: Path, output: Path, *, count: int = 1, background: bool = True) -> None:
        settings = [f"output_dir={output}", f"train.checkpoint_in_background={background}", "train.keep_checkpoints=9"]
        settings += ["model.modalities.image.frozen_layers=all"]  # of which there are weights, but no moments
        run = load_run(str(tiny_run), overrides=settings)
        self.task = Task(run.model, run.objective_configs, seed=run.seed)
        self.engine = start_engine(Asked("fp32", 1, 1.0, timeout_seconds=60))
        self.engine.wrap(self.task, build_optimizer(self.task, run.optimizer), clip_norm=1.0, rank_rows=4)
        for number, moment in enumerate(self.engine.moments()):
            moment["exp_avg"].fill_(number)
            moment["exp_avg_sq"].fill_(number + 0.5)
        self.engine.adam_steps = 3
        write_model_files(run.folder, run.model)
        self.plan, self.root, store = TrainingData(run).plan, run.folder / CHECKPOINTS, open_store()
        shapes = {name: tuple(tensor.shape) for name, tensor in self.task.state_dict().items()}
        engines = [as_rank(self.engine, number, count) for number in range(count)]
        self.savers = [CheckpointSaver(run, engine, shapes, store) for engine in engines]
        self.averages = [WeightAverage(engine, 0.5) for engine in engines]
        for average in self.averages:
            torch._foreach_mul_(average.tensors, 0.5)

    def save(self, step: int) -> None:
        for saver, average in zip(self.savers, self.averages, strict=True):
            saver.save(self.plan, average, step=step)

    def finish(self) -> list[str]:
        """What went wrong, by rank."""
        errors = []
        for saver in self.savers:
            try:
                saver.finish()
            except CheckpointError as error:
                errors.append(str(error))
        return errors

    def state(self) -> State:
        """A copy of all that a checkpoint has to hold now."""
        names = [name for name, parameter in self.task.named_parameters() if parameter.requires_grad]
        moments = dict(zip(names, self.engine.moments(), strict=True))
        state = {kind: {name: moments[name][kind] for name in names} for kind in ("exp_avg", "exp_avg_sq")}
        state |= {"model": self.task.state_dict(), "ema": dict(zip(names, self.averages[0].tensors, strict=True))}
        return {kind: {name: x.detach().clone() for name, x in tensors.items()} for kind, tensors in state.items()}

    @torch.no_grad()
    def change_everything(self) -> None:
        """In place, as the next step does."""
        moments = [tensor for moment in self.engine.moments() for tensor in moment.values()]
        for tensor in (*self.task.state_dict().values(), *moments, *self.averages[0].tensors):
            tensor.add_(1)


def as_rank(engine: Engine, number: int, count: int) -> Engine:
    other = copy.copy(engine)
    other.rank, other.world_size = number, count
    return other


def assert_holds(folder: Path, expected: State) -> None:
    verify_checkpoint(folder, contents=True)
    stored = StoredState(folder)
    assert set(stored.kinds) == set(expected)
    for kind, tensors in expected.items():
        found = stored.whole(kind)
        assert found.keys() == tensors.keys()
        assert [name for name, tensor in found.items() if not torch.equal(tensor, tensors[name])] == [], kind


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("count", "background"), [(1, True), (1, False), (3, True)])
def test_beside_the_training_or_not_by_one_rank_or_several_the_whole_state_is_written(
    tiny_run: Path, tmp_path: Path, count: int, background: bool
) -> None:
    ranks = Ranks(tiny_run, tmp_path / "out", count=count, background=background)
    ranks.save(2)
    assert ranks.finish() == []
    (folder,) = complete_checkpoints(ranks.root)
    assert_holds(folder, ranks.state())
    assert len(list(folder.glob("*.safetensors"))) == 4 * count
    assert names_in(folder / MODALITIES) == ["image", "text"]
    assert read_facts(folder) | {"environment": None} == {
        "step": 2,
        "adam_steps": 3,
        "plan": ranks.plan.identity(),
        "weights": json.loads(json.dumps(ranks.plan.segments)),
        "left_out": [],
        "written_by": f"{'ddp' if count > 1 else 'one process'} on {count} ranks",
        "environment": None,
    }


def test_training_may_go_on_at_once_and_change_everything(tiny_run: Path, tmp_path: Path, monkeypatch) -> None:
    may_write = threading.Event()

    def write_later(*arguments, **settings) -> Path:
        assert may_write.wait(timeout=60)
        return write_parts(*arguments, **settings)

    monkeypatch.setattr("mmfuse.train.saver.write_parts", write_later)
    ranks = Ranks(tiny_run, tmp_path / "out")
    expected = ranks.state()
    ranks.save(2)
    ranks.change_everything()
    assert complete_checkpoints(ranks.root) == []
    may_write.set()
    assert ranks.finish() == []
    assert_holds(ranks.root / "step_00000002", expected)


def test_a_checkpoint_waits_for_the_one_before(tiny_run: Path, tmp_path: Path, monkeypatch) -> None:
    folders = []

    def write_slowly(folder: Path, *arguments, **settings) -> Path:
        folders.append(folder.name)
        time.sleep(0.05)
        return write_parts(folder, *arguments, **settings)

    monkeypatch.setattr("mmfuse.train.saver.write_parts", write_slowly)
    ranks = Ranks(tiny_run, tmp_path / "out")
    ranks.save(2)
    ranks.save(4)
    assert ranks.finish() == []
    assert folders == ["step_00000002.tmp"] * 4 + ["step_00000004.tmp"] * 4
    assert names_in(ranks.root) == ["step_00000002", "step_00000004"]


def block_file(root: Path, number: int) -> None:
    """A folder where a rank's file would be."""
    (root / f"step_00000004.tmp/exp_avg-{number:05d}.safetensors/x").mkdir(parents=True)


def block_folder(root: Path, _: int) -> None:
    """A file where the folder would be."""
    (root / "step_00000004.tmp").write_text("")


@pytest.mark.parametrize(("count", "blocked"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("block", [block_file, block_folder])
def test_one_that_cannot_be_written_by_any_rank_leaves_the_one_before_and_the_next_works(
    tiny_run: Path, tmp_path: Path, caplog, block: Callable[[Path, int], None], count: int, blocked: int
) -> None:
    ranks = Ranks(tiny_run, tmp_path / "out", count=count)
    ranks.save(2)
    assert ranks.finish() == []
    block(ranks.root, blocked)
    with caplog.at_level(logging.ERROR):
        ranks.save(4)
        errors = ranks.finish()
    assert errors == [record.message for record in caplog.records] * count  # all ranks raise what rank 0 logged
    assert "the checkpoint of step 4 was not written" in errors[0] and "The one before is still the newest" in errors[0]
    assert complete_checkpoints(ranks.root) == [ranks.root / "step_00000002"]
    assert not (ranks.root / "step_00000004.tmp").is_dir()
    ranks.save(6)
    assert ranks.finish() == []
    assert complete_checkpoints(ranks.root)[-1] == ranks.root / "step_00000006"
