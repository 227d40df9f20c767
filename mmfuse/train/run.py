"""The run: everything that is decided before the first step, as one frozen value."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mmfuse.config import (
    PluginSettings,
    Settings,
    apply_overrides,
    flatten,
    load_yaml,
    plugin_settings,
    suggest,
    validate,
)
from mmfuse.data.mixture import DataConfig
from mmfuse.data.remote.urls import show_url
from mmfuse.errors import ConfigError
from mmfuse.evaluate.retrieval import EvaluationConfig
from mmfuse.model.model import ModelConfig
from mmfuse.objectives.base import ObjectiveConfig
from mmfuse.train.engines.base import Precision
from mmfuse.train.optim import OptimizerConfig
from mmfuse.train.profiling import ProfileConfig
from mmfuse.train.spikes import RollBackConfig

SHIPPED_RUNS = Path(__file__).parents[1] / "runs"
_MAY_CHANGE = (
    "output_dir",
    "train.",
    "optimizer.",
    "evaluation.",
    "profile.",
    "data.train",  # the plan's identity tells one source from another, and their weights may change
    "data.cache",
    "data.quarantine",
    "data.num_workers",
    "data.prefetch",
    "data.validation",
)
_MAY_NOT_CHANGE = ("train.global_batch", "train.accumulation")


def _objectives(value: Any) -> Any:
    return plugin_settings("mmfuse.objectives", value)


def _checkpoint_url(url: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^?#\s]+", url) or re.search(r"://[^/]*:[^/]*@", url):
        raise ValueError(
            f"{show_url(url)}: expected a URL such as s3://bucket/run, without password or query: credentials belong "
            "in the environment or in the provider's own files"
        )
    return url.rstrip("/")


class TrainConfig(Settings):
    """The loop."""

    steps: PositiveInt
    """Optimizer steps of the whole run."""
    global_batch: PositiveInt
    """Samples of one optimizer step, over all ranks and micro-steps."""
    accumulation: PositiveInt = 1
    """Micro-steps of one optimizer step, for batches that do not fit. `contrastive` and `leave_one_out` see all of
    them, at the price of one forward more; other objectives are normalised by each one's counts, `next_sentence` draws
    within each, and the step takes their mean."""
    precision: Precision = "fp32"
    """bf16 and fp16 keep weights of the optimizer in fp32; fp16, with loss scaling, on GPUs only."""
    activation_checkpointing: bool = False
    """Keep each block's inputs alone and compute the rest again in backward: far less memory, a third more time."""
    compile_blocks: bool = False
    """Let `torch.compile` make one kernel of many in each block; the first steps take minutes."""
    log_every: PositiveInt = 10
    """Steps between two lines of metrics."""
    checkpoint_every: PositiveInt = 100
    """Steps between two checkpoints; the last step always makes one."""
    checkpoint_in_background: bool = True
    """Let the step wait only until the state is copied to the host's memory; false: until it is written."""
    checkpoint_url: Annotated[str, AfterValidator(_checkpoint_url)] | None = None
    """Where checkpoints go instead, for nodes that share no file system: `s3://bucket/run`, `gs://...`, `file:///...`,
    or any other protocol that fsspec can write to. Each node keeps its part, and at the start a copy of the newest one,
    in its own `output_dir` for a while. Null: in the run's folder, which all nodes share."""
    keep_checkpoints: PositiveInt = 2
    """The newest so many."""
    keep_every: PositiveInt | None = None
    """Keep also every checkpoint whose step is a multiple of this, for good."""
    evaluate_every: NonNegativeInt = 0
    """Steps between two evaluations; 0: only before the first step and after the last."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep a moving average of the weights, of which this much remains in each step, such as 0.999; evaluation and all
    who load a checkpoint take it instead of the last weights. Null: no average."""
    record_samples: bool = False
    """Write the keys of every batch to `samples.rankN.jsonl`, for audits."""
    max_skipped_steps: NonNegativeInt = 10
    """A step whose gradient is NaN or infinite changes nothing; more than so many of them in a row, or half of all
    steps, end the run."""
    roll_back: RollBackConfig | None = None
    """What to do when the loss spikes and stays high: end with exit code 75; the next start goes on from the checkpoint
    before the spike, and leaves out the data since; newer checkpoints are removed, those of `keep_every` too. Null: go
    on."""
    hang_seconds: PositiveFloat = 1800
    """Longest time without progress, such as one step, one evaluation batch, or one checkpoint; then the run ends with
    exit code 75 and names the rank that the others wait for."""

    @model_validator(mode="after")
    def _check_roll_back(self) -> "TrainConfig":
        if self.roll_back is None:
            return self
        found_after = self.roll_back.losses_in_a_row * self.log_every
        kept = (self.keep_checkpoints - 1) * self.checkpoint_every
        if found_after > kept:
            raise ValueError(
                f"train.roll_back finds a spike after {found_after} steps (losses_in_a_row x log_every), and the kept "
                f"checkpoints may reach back {kept} only: raise train.keep_checkpoints or train.checkpoint_every"
            )
        if self.checkpoint_url:
            raise ValueError("train.roll_back cannot remove checkpoints at train.checkpoint_url: unset one of them")
        return self


class RunConfig(Settings):
    """One run. `mmfuse train RUN` reads it from YAML and writes it, resolved, into the run's folder."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    output_dir: Path | None = None
    """The run's folder; null: `runs/NAME`."""
    seed: NonNegativeInt = 0
    """Of the weights, the order of the data, and all noise."""
    model: ModelConfig
    objectives: Annotated[PluginSettings, BeforeValidator(_objectives)] = Field(min_length=1)
    """By the name of a file in `mmfuse/objectives`."""
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    profile: ProfileConfig = ProfileConfig()

    @property
    def folder(self) -> Path:
        """Where everything of this run is kept."""
        return self.output_dir or Path("runs") / self.name

    @property
    def objective_configs(self) -> dict[str, ObjectiveConfig]:
        """`objectives` with the type that their files promise."""
        return {name: config for name, config in self.objectives.items() if isinstance(config, ObjectiveConfig)}

    @model_validator(mode="after")
    def _check_contradictions(self) -> "RunConfig":
        problems = []
        uses_fusion = [name for name, config in self.objective_configs.items() if config.uses_fusion]
        if self.model.fusion and not uses_fusion:
            problems.append(
                "model.fusion is set, but no objective trains it: add matching, masked_language or leave_one_out, "
                "or set model.fusion to null"
            )
        if not self.model.fusion and uses_fusion:
            problems.append(f"model.fusion is null, but objectives.{uses_fusion[0]} needs it")
        shaping = [self.objective_configs.get(name) for name in ("contrastive", "leave_one_out")]
        if "feature_prediction" in self.objectives and not any(config and config.weight for config in shaping):
            problems.append(
                "objectives.feature_prediction alone is solved by embeddings that are all the same: add contrastive or "
                "leave_one_out"
            )
        if self.train.accumulation > 1 and "matching" in self.objectives:
            problems.append(
                f"train.accumulation = {self.train.accumulation} with objectives.matching: its negatives, whose tokens "
                "it needs, would come from one micro-batch only, which is another objective; set it to 1, or take "
                "matching out"
            )
        rows = self.train.global_batch // self.train.accumulation
        if "next_sentence" in self.objectives and rows < 2:
            problems.append(f"objectives.next_sentence draws from a micro-batch, and one of {rows} row has no others")
        if self.train.global_batch % self.train.accumulation:
            problems.append(
                f"train.global_batch = {self.train.global_batch} is not a multiple of "
                f"train.accumulation = {self.train.accumulation}"
            )
        if self.data.lanes and self.train.global_batch % self.data.lanes:
            problems.append(
                f"train.global_batch = {self.train.global_batch} is not a multiple of data.lanes = {self.data.lanes}"
            )
        if self.optimizer.warmup_steps >= self.train.steps:
            problems.append(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps} is not below train.steps = {self.train.steps}"
            )
        if problems:
            raise ValueError("the run contradicts itself: " + "; ".join(problems))
        return self

    def check_world_size(self, world_size: int) -> None:
        """Refuses a world in which a rank would have no row.

        Raises:
            ConfigError: more ranks than rows of a micro-batch.
        """
        rows = self.train.global_batch // self.train.accumulation
        if world_size > rows:
            raise ConfigError(
                f"{world_size} ranks, but a micro-batch has only {rows} rows "
                "(train.global_batch / train.accumulation): start fewer processes or raise train.global_batch"
            )


def load_run(name: str, *, overrides: Iterable[str] = ()) -> RunConfig:
    """The run in a YAML file, or one that ships with mmfuse, with `a.b=value` overrides.

    Raises:
        ConfigError: no such run, or wrong settings; all problems at once.
    """
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_path else SHIPPED_RUNS / f"{name}.yaml"
    if not is_path and not path.is_file():
        known = [run.stem for run in SHIPPED_RUNS.glob("*.yaml")]
        raise ConfigError(f"no run {suggest(name, known)} (a path must end in .yaml)")
    return validate(RunConfig, apply_overrides(load_yaml(path), overrides), source=str(path))


def changed_settings(old: RunConfig, new: RunConfig) -> list[str]:
    """What differs between two runs that must not differ between a checkpoint and the run that resumes it."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    changed = []
    for name in sorted(before.keys() | after.keys()):
        free = name.startswith(_MAY_CHANGE) and not name.startswith(_MAY_NOT_CHANGE)
        if not free and before.get(name) != after.get(name):
            changed.append(f"{name}: {before.get(name)!r} then, {after.get(name)!r} now")
    return changed
