"""A run's folder as one page and one JSON file: what was learned, how, and on what."""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, PercentFormatter

from mmfuse.config import flatten, load_yaml
from mmfuse.data.source import Source
from mmfuse.errors import DataError
from mmfuse.evaluate.report_page import Report, SetScores, render_report
from mmfuse.files import write_text
from mmfuse.pages import COLORS, MUTED, Plot, style_axes, to_svg
from mmfuse.version import VERSION

logger = logging.getLogger(__name__)

_HAS_ITS_PLACE = {"step", "loss", "learning_rate", "grad_norm", "samples_per_second", "memory_gib"}
_HAS_ITS_PLACE |= {"step_seconds", "data_wait_seconds"}
_MAX_POINTS = 400
_ROUND = (1, 2, 2.5, 5, 10)
_LOCAL_PATH = re.compile(r"""(^|[\s=,'"])(/|~/|[A-Za-z]:\\)\S""")


def write_report(folder: Path, *, sources: Mapping[str, Source], k: int = 10) -> Path:
    """Writes `report.json` and `report.html` into a run's folder and returns the page.

    Args:
        sources: the evaluation sets by name; a set that is not among them is shown without sample retrievals.
        k: the recall of headline, bars and curve; where the run did not measure R@k, the largest that it did.

    Raises:
        ConfigError: the folder has no readable `run.yaml`.
        DataError: an evaluation is not readable, or is not of these sources.
    """
    report = _read_report(folder, k=k)
    summary = json.dumps(_summarize(report), indent=1, allow_nan=False)
    html = render_report(report, sources=sources)
    write_text(folder / "report.json", summary + "\n")
    write_text(folder / "report.html", html)
    return folder / "report.html"


def _read_report(folder: Path, *, k: int) -> Report:
    run = load_yaml(folder / "run.yaml")
    metrics = _read_metrics(folder / "metrics.jsonl")
    evaluations = _read_evaluations(folder / "evaluations")
    evaluated_step = max(evaluations, default=0)
    final = evaluations.get(evaluated_step, {})
    steps = max(evaluated_step, metrics[-1]["step"] if metrics else 0)
    global_batch = flatten(run).get("train.global_batch")
    measured = [
        {int(name[2:]) for name in scores if re.fullmatch(r"R@\d+", name)}
        for directions in final.values()
        for scores in directions.values()
    ]
    common = set[int]().union(*measured).intersection(*measured)
    k = k if k in common else max(common, default=k)
    names = dict.fromkeys(name for line in metrics for name in line)
    terms = [name for name in names if name.partition("/")[0] in run.get("objectives", {})]
    newest = max((folder / "run.yaml", *(folder / "evaluations").glob("*.json")), key=lambda path: path.stat().st_mtime)
    return Report(
        name=str(run.get("name", folder.name)),
        steps=steps,
        evaluated_step=evaluated_step,
        samples_seen=steps * global_batch if isinstance(global_batch, int) else None,
        date=datetime.fromtimestamp(newest.stat().st_mtime, UTC).date().isoformat(),
        k=k,
        final=final,
        baseline=evaluations.get(0, {}) if evaluated_step else {},
        recall_curves=_draw_recall(evaluations, k=k) if len(evaluations) > 2 else [],
        loss_curves=[curve for name in ("loss", *terms) for curve in _draw(name, [_series(metrics, name)])],
        machine_curves=_draw_machine(metrics, others=[n for n in names if n not in terms]),
        last_metrics=metrics[-1] if metrics else {},
        bad_members=_count_bad_members(folder),
        run_yaml=(folder / "run.yaml").read_text(encoding="utf-8"),
        environment=_read_environment(folder / "environment.json"),
    )


def _count_bad_members(folder: Path) -> Counter[tuple[str, str]]:
    """Bad members that all ranks met, by source and kind."""
    counts: Counter[tuple[str, str]] = Counter()
    for path in folder.glob("quarantine.rank*.jsonl"):
        counts.update((str(fault["source"]), str(fault["kind"])) for fault in _read_metrics(path))
    return counts


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines; a run that was killed may leave a cut one."""
    metrics, bad = [], 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        try:
            numbers = json.loads(line)
            metrics.append({**numbers, "step": int(numbers["step"])})
        except (ValueError, KeyError, TypeError):
            bad += 1
    if bad:
        logger.warning("%s: %d lines are not whole; the report goes without them", path, bad)
    return metrics


def _read_evaluations(folder: Path) -> dict[int, SetScores]:
    """Every evaluation by its step, in order."""
    evaluations: dict[int, SetScores] = {}
    for path in folder.glob("step_*.json"):
        try:
            evaluation = json.loads(path.read_text(encoding="utf-8"))
            evaluations[int(evaluation["step"])] = evaluation["sets"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: is no evaluation ({error!r}); delete it, or evaluate that step again") from error
    return dict(sorted(evaluations.items()))


def _read_environment(path: Path) -> dict[str, Any]:
    """Flat, and without what names a place on somebody's machine: reports are passed on."""
    if not path.is_file():
        return {}
    try:
        facts = flatten(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise DataError(f"{path}: is not readable as JSON ({error}); delete it to go without") from error
    return {name: value for name, value in facts.items() if not _LOCAL_PATH.search(str(value))}


def _summarize(report: Report) -> dict[str, Any]:
    """`report.json`: numbers for a program, without samples or paths; what is not finite becomes null."""
    summary = {
        "name": report.name,
        "mmfuse": VERSION,
        "date": report.date,
        "steps": report.steps,
        "samples_seen": report.samples_seen,
        "evaluated_step": report.evaluated_step,
        "scores": _without_examples(report.final),
        "baseline": _without_examples(report.baseline) or None,
        "last_metrics": report.last_metrics or None,
        "environment": report.environment,
    }
    return _finite(summary)


def _without_examples(sets: SetScores) -> SetScores:
    return {
        name: {d: {key: value for key, value in s.items() if key != "examples"} for d, s in directions.items()}
        for name, directions in sets.items()
    }


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Series(NamedTuple):
    """One line of a plot."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    chance: float | None = None
    """Where a dashed line says what a random order gives."""


def _draw_recall(evaluations: Mapping[int, SetScores], *, k: int) -> list[Plot]:
    """R@k of every direction over the steps: for each set a plot of single modalities, and one of those joined."""
    curves = []
    for name, directions in evaluations[max(evaluations)].items():
        series: dict[str, list[_Series]] = {name: [], f"{name}, joined": []}
        for direction, final in directions.items():
            scores = {step: sets.get(name, {}).get(direction, {}).get(f"R@{k}") for step, sets in evaluations.items()}
            known = {step: score for step, score in scores.items() if score is not None}
            line = _Series(direction.replace("->", " → "), [*known], [*known.values()], final.get(f"chance R@{k}"))
            series[f"{name}, joined" if "+" in direction else name].append(line)
        for title, lines in series.items():
            curves += _draw(f"R@{k}, {title}", lines, percent=True, note="dashed: chance")
    return curves


def _draw_machine(metrics: list[dict[str, Any]], *, others: list[str]) -> list[Plot]:
    """How the optimizer was driven and how fast it went; then the numbers that this module has not heard of."""
    curves = [
        *_draw("learning rate", [_series(metrics, "learning_rate")], from_zero=True),
        *_draw("gradient norm", [_series(metrics, "grad_norm")], from_zero=True),
        *_draw("samples per second", [_series(metrics, "samples_per_second")], from_zero=True),
        *_draw(
            "seconds a step",
            [_series(metrics, "step_seconds", "whole step"), _series(metrics, "data_wait_seconds", "waiting for data")],
            from_zero=True,
        ),
    ]
    for name in others:
        if name not in _HAS_ITS_PLACE and not name.startswith("epochs/"):
            curves += _draw(name, [_series(metrics, name)])
    return curves


def _series(metrics: list[dict[str, Any]], name: str, label: str = "") -> _Series:
    """One number over time; beyond some hundred points each is the mean of its neighbours."""
    points = [(line["step"], line[name]) for line in metrics if isinstance(line.get(name), int | float)]
    finite = np.array([point for point in points if math.isfinite(point[1])], dtype=np.float64).reshape(-1, 2)
    if len(finite) > _MAX_POINTS:
        finite = np.array([part.mean(0) for part in np.array_split(finite, _MAX_POINTS)])
    return _Series(label or name, finite[:, 0].tolist(), finite[:, 1].tolist())


def _draw(
    title: str, series: list[_Series], *, percent: bool = False, from_zero: bool = False, note: str = ""
) -> list[Plot]:
    """One plot, or none where there is nothing to draw."""
    if not any(line.steps for line in series):
        return []
    size = (4.6, 2.5) if percent else (2.6, 1.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    for line, color in zip(series, COLORS * len(series), strict=False):
        marker = "o" if len(line.steps) <= 25 else None
        axes.plot(line.steps, line.values, color=color, linewidth=1.3, marker=marker, markersize=2.2)
    for chance in {line.chance for line in series if line.chance is not None}:
        axes.axhline(chance, color=MUTED, linewidth=0.7, dashes=(3, 3), zorder=1)
    if percent:
        axes.set_ylim(0, 1.02)
    elif from_zero:
        axes.set_ylim(0, 1.12 * max(max(line.values, default=0) for line in series) or 1)
    _style(axes, percent=percent)
    legend = [(f"--c{i % len(COLORS) + 1}", line.label) for i, line in enumerate(series)] if len(series) > 1 else []
    last = note or (f"{series[0].values[-1]:.4g}" if len(series) == 1 else "")
    return [Plot(title, last, legend, to_svg(figure, title))]


def _style(axes: Axes, *, percent: bool) -> None:
    style_axes(axes)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=_ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.yaxis.set_major_locator(MultipleLocator(0.25) if percent else MaxNLocator(4, steps=_ROUND))
    axes.yaxis.set_major_formatter(
        PercentFormatter(1, decimals=0) if percent else FuncFormatter(lambda y, _: f"{y:.3g}")
    )
