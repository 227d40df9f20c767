"""A loss that spikes and stays high: back to the last good checkpoint, and past the data that came since.

PaLM's authors did so by hand some 20 times (Chowdhery et al. 2022, section 5.1).
"""

import json
import logging
import math
from pathlib import Path
from typing import Any

from mmfuse.data.blend import WeightSegment
from mmfuse.data.left_out import LeftOut
from mmfuse.data.plan import DataPlan
from mmfuse.distributed import first_rank_decides, rank
from mmfuse.errors import CheckpointError, Stopped, TrainingError, on_all_ranks
from mmfuse.files import write_text
from mmfuse.train.checkpoint import (
    CHECKPOINTS,
    checkpoint_folders,
    complete_checkpoints,
    remove_set_aside,
    set_aside,
    step_of,
    verify_checkpoint,
)
from mmfuse.train.saver import CheckpointSaver
from mmfuse.train.spikes import RollBackConfig, SpikeDetector

logger = logging.getLogger(__name__)

ROLL_BACKS = "roll_backs.json"
"""In a run's folder: what is left out, the weights of the sources until then, and each roll-back with its reason."""


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
            TrainingError: the same, but there is no checkpoint from before, it was so too often, or the run's folder
                cannot be written.
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
        """Makes the last good checkpoint from before the spike the newest; returns its step."""
        root, earlier = self._folder / CHECKPOINTS, read_roll_backs(self._folder)
        goal = choose_checkpoint(root, before=begin, used=[record["to_step"] for record in earlier])
        if goal is None:
            raise TrainingError(f"{found}, and no checkpoint from before it is kept: raise train.keep_checkpoints")
        if len(earlier) >= config.at_most:
            raise TrainingError(
                f"{found}, after {len(earlier)} roll-backs (train.roll_back.at_most): lower the learning rate"
            )
        roll_backs = [*earlier, {"step": step, "to_step": goal, "why": found}]
        windows = leave_out(plan, since=goal, until=step)
        record = {"left_out": windows, "weights": plan.segments, "roll_backs": roll_backs}
        try:
            newer = [folder for folder in checkpoint_folders(root) if (step_of(folder.name) or 0) > goal]
            set_aside(newer)  # before the record: without it, they would go on with other data
            write_text(self._folder / ROLL_BACKS, json.dumps(record, indent=1))
        except OSError as error:
            raise TrainingError(
                f"{found}, and {self._folder} cannot be written: {error}. Remove its checkpoints after step {goal}, or "
                "the next start goes on from within the spike"
            ) from error
        remove_set_aside(root)
        return goal


def choose_checkpoint(root: Path, *, before: int, used: list[int]) -> int | None:
    """The newest that is undamaged and older than the spike: that of its very beginning may have what made it. Where
    the loss spiked again after a roll-back, that checkpoint is not `used` again while there is an older one."""
    steps = []
    for folder in complete_checkpoints(root):
        if (step := step_of(folder.name) or 0) < before:
            try:
                verify_checkpoint(folder, contents=True)
                steps.append(step)
            except CheckpointError as error:
                logger.warning("not used: %s", error)
    return max([step for step in steps if step not in used] or steps, default=None)


def leave_out(plan: DataPlan, *, since: int, until: int) -> list[LeftOut]:
    """What the plan leaves out, and what the steps `[since, until)` had too."""
    batches = int(plan.planned_steps.of(until) - plan.planned_steps.of(since))
    windows = {window.before_step: window.batches for window in plan.left_out if window.before_step <= since}
    windows[since] = windows.get(since, 0) + batches
    # After an older checkpoint had to do: these come earlier now.
    later = [w._replace(before_step=w.before_step - until + since) for w in plan.left_out if w.before_step > until]
    return [*(LeftOut(*window) for window in windows.items()), *later]


def forget_roll_backs(folder: Path) -> None:
    """A run begins anew; all ranks may call."""
    if rank() == 0 and (path := folder / ROLL_BACKS).is_file():
        path.unlink()


def left_out_since(folder: Path, facts: dict[str, Any]) -> tuple[list[LeftOut], list[WeightSegment]]:
    """What a run leaves out, and the weights of its sources so far.

    Args:
        folder: the run's. Where it has no word of a roll-back, the checkpoint was taken elsewhere or there was none.
        facts: of the checkpoint that it goes on from.
    """
    record = _read_record(folder)
    weights = facts["weights"]
    if record and record["roll_backs"][-1]["to_step"] == facts["step"]:
        weights = record["weights"]  # those of the steps since, whose batches are left out
    left_out = record["left_out"] if record else facts.get("left_out", [])
    return [LeftOut(*window) for window in left_out], [WeightSegment(start, tuple(w)) for start, w in weights]


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
