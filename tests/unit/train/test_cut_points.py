"""Ranks that write a checkpoint are killed between any two things that they do to files."""

import copy
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from batches import tiny_task
from helpers import write_data_set, write_tiny_run
from torch.distributed import HashStore  # type: ignore[reportPrivateImportUsage]

from mmfuse.train.average import WeightAverage
from mmfuse.train.checkpoint import (
    CHECKPOINTS,
    checkpoint_folders,
    complete_checkpoints,
    read_facts,
    verify_checkpoint,
)
from mmfuse.train.data import TrainingData
from mmfuse.train.engines.base import MODEL, MOMENTS
from mmfuse.train.engines.start import start_engine
from mmfuse.train.engines.strategy import Asked
from mmfuse.train.optim import OptimizerConfig, build_optimizer
from mmfuse.train.resume import write_model_files
from mmfuse.train.run import load_run
from mmfuse.train.saver import CheckpointSaver
from mmfuse.train.state_files import StoredState

CUTS = 200
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "shutil.copytree"}


class Ranks:
    """The checkpoints of ranks that live in threads of one process."""

    def __init__(self, folder: Path, number: int) -> None:
        self.number = number
        path = write_tiny_run(folder, write_data_set(folder / "set", modalities=("text", "image")))
        self.run = load_run(str(path), overrides=[f"output_dir={folder / 'out'}", "train.keep_checkpoints=1"])
        self.root = self.run.folder / CHECKPOINTS
        self.plan = TrainingData(self.run).plan
        write_model_files(self.run.folder, self.run.model)
        self.engine = start_engine(Asked("fp32", 1, None, timeout_seconds=60))
        task = tiny_task(("contrastive",)).float()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in task.state_dict().items()}
        self.engine.wrap(task, build_optimizer(task, OptimizerConfig()), clip_norm=None, rank_rows=1)
        self.average = WeightAverage(self.engine, None)

    @torch.no_grad()
    def save(self, step: int) -> None:
        """A checkpoint whose every number is its step."""
        store, savers = HashStore(), []
        for rank in range(self.number):
            engine = copy.copy(self.engine)
            engine.rank, engine.world_size = rank, self.number
            savers.append(CheckpointSaver(self.run, engine, self.shapes, store))
        for master, moments in zip(self.engine.masters(), self.engine.moments(), strict=True):
            for tensor in (master, *moments.values()):
                tensor.fill_(step)
        for saver in savers:
            saver.save(self.plan, self.average, step=step)
        for saver in savers:
            saver.finish()

    def save_and_die(self, at: int, step: int) -> int:
        """In a fork that kills itself before the change number `at` to the run's files; how often it lived to tell."""
        process = os.fork()
        if process == 0:
            changes = 0

            def count(event: str, arguments: tuple[object, ...]) -> None:
                nonlocal changes
                within_rmtree = event in {"os.remove", "os.rmdir"} and arguments[1] != -1  # to an open folder
                if within_rmtree or (event in CHANGES and str(arguments[0]).startswith(str(self.root))):
                    changes += 1
                    if changes == at:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            self.save(step)
            os._exit(0)
        return os.waitpid(process, 0)[1]

    def check_newest(self) -> int:
        """Its step, when all of it is what was saved then, and nothing else has the name of a checkpoint."""
        newest = complete_checkpoints(self.root)[-1]
        assert checkpoint_folders(self.root) == complete_checkpoints(self.root)
        verify_checkpoint(newest, contents=True)
        step, stored = int(read_facts(newest)["step"]), StoredState(newest)
        for kind in (MODEL, *MOMENTS):
            whole = stored.whole(kind)
            assert {name for name in whole if name in dict(self.engine.task.named_parameters())}
            for name, parameter in self.engine.task.named_parameters():
                assert torch.equal(whole[name], torch.full_like(parameter, step)), (kind, name)
        return step


@pytest.mark.slow
def test_a_kill_between_any_two_changes_to_files_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    cuts, reached = 0, set()
    for number in (1, 2, 4, 7):
        ranks, lived = Ranks(tmp_path / str(number), number), False
        ranks.save(1)
        first = ranks.root.with_name("first")
        shutil.copytree(ranks.root, first)
        at = 0
        while not lived:
            shutil.rmtree(ranks.root)
            shutil.copytree(first, ranks.root)
            at += 1
            lived = ranks.save_and_die(at, step=2) == 0
            reached.add(ranks.check_newest())
        cuts += at - 1
    assert cuts >= CUTS
    assert reached == {1, 2}
