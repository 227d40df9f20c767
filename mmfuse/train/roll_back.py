"""A loss that spikes and stays high: back to the last good checkpoint, and past the data that came since.

PaLM's authors did so by hand some 20 times (Chowdhery et al. 2022, section 5.1).
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from mmfuse.data.left_out import LeftOut
from mmfuse.data.plan import DataPlan
from mmfuse.distributed import first_rank_decides, rank
from mmfuse.errors import Stopped, TrainingError, on_all_ranks
from mmfuse.files import write_text
from mmfuse.train.checkpoint import CHECKPOINTS, checkpoint_folders, checkpoint_step, complete_checkpoints
from mmfuse.train.saver import CheckpointSaver
from mmfuse.train.spikes import RollBackConfig, SpikeDetector

ROLL_BACKS = "roll_backs.json"
"""In a run's folder: what is left out, and each roll-back with its reason."""


class SpikeGuard:
    """Ends a run whose loss spikes, so that its next start goes on before the spike and leaves its data out."""

    def __init__(self, config: RollBackConfig | None, folder: Path, *, start: int) -> None:
        """All ranks; those losses count that are in `metrics.jsonl` up to step `start`."""
        self._config, self._folder = config, folder
        losses = first_rank_decides(lambda: _read_losses(folder / "metrics.jsonl", start)) if config else []
        self._detector = SpikeDetector(config, losses) if config else None

    def check(self, loss: float, plan: DataPlan, saver: CheckpointSaver, *, step: int) -> None:
        """After `step` steps, of which the last ones have this mean loss; all ranks must call with the same.

        Raises:
            Stopped: the loss has spiked; newer checkpoints are removed, and the next start leaves out what was trained
                on since the one before the spike.
            TrainingError: the same, but there is no checkpoint from before, or it was so too often.
        """
        config, detector = self._config, self._detector
        begin = detector.add(loss, step=step) if detector else None
        if not (config and detector) or begin is None:
            return
        found = f"the loss is {loss:.4g} after step {step}, its median before step {begin} was {detector.median:.4g}"
        saver.wait()
        goal = first_rank_decides(lambda: self._go_back(config, plan, begin=begin, step=step, found=found))
        raise on_all_ranks(Stopped)(
            f"{found} (train.roll_back): back to the checkpoint of step {goal}; started again, the run goes on from "
            f"there and leaves out the {step - goal} global batches since"
        )

    def _go_back(self, config: RollBackConfig, plan: DataPlan, *, begin: int, step: int, found: str) -> int:
        """Makes the last checkpoint from before the spike the newest; returns its step."""
        root, earlier = self._folder / CHECKPOINTS, read_roll_backs(self._folder)
        steps = [checkpoint_step(folder) for folder in complete_checkpoints(root)]
        goal = max((number for number in steps if number <= begin), default=None)
        if goal is None:
            raise TrainingError(f"{found}, and no checkpoint from before it is kept: raise train.keep_checkpoints")
        if len(earlier) >= config.at_most:
            raise TrainingError(
                f"{found}, after {len(earlier)} roll-backs (train.roll_back.at_most): lower the learning rate"
            )
        for folder in checkpoint_folders(root):  # before the record: without it, they would go on with other data
            if checkpoint_step(folder) > goal:
                shutil.rmtree(folder)
        record = {"step": step, "to_step": goal, "why": found}
        windows = leave_out(plan, since=goal, until=step)
        write_text(
            self._folder / ROLL_BACKS, json.dumps({"left_out": windows, "roll_backs": [*earlier, record]}, indent=1)
        )
        return goal


def leave_out(plan: DataPlan, *, since: int, until: int) -> list[LeftOut]:
    """What the plan leaves out, and what the steps `[since, until)` had too."""
    batches = int(plan.planned_steps.of(until) - plan.planned_steps.of(since))
    earlier = {window.before_step: window.batches for window in plan.left_out if window.before_step <= since}
    return [LeftOut(*window) for window in (earlier | {since: earlier.get(since, 0) + batches}).items()]


def forget_roll_backs(folder: Path) -> None:
    """A run begins anew; all ranks may call."""
    if rank() == 0:
        (folder / ROLL_BACKS).unlink(missing_ok=True)


def read_left_out(folder: Path) -> list[LeftOut] | None:
    """What a run leaves out by its folder; None where that has no word of it."""
    record = _read_record(folder)
    return [LeftOut(*window) for window in record["left_out"]] if record else None


def read_roll_backs(folder: Path) -> list[dict[str, Any]]:
    """What led to each, oldest first."""
    record = _read_record(folder)
    return record["roll_backs"] if record else []


def _read_record(folder: Path) -> dict[str, Any] | None:
    path = folder / ROLL_BACKS
    return json.loads(path.read_text()) if path.is_file() else None


def _read_losses(path: Path, start: int) -> list[tuple[int, float]]:
    """Of a run's metrics up to a step; NaN where all steps were skipped."""
    lines = path.read_text().splitlines() if path.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may cut the last one
    losses = [(r["step"], math.nan if r["loss"] is None else r["loss"]) for r in records]
    return [(step, loss) for step, loss in losses if step <= start]
