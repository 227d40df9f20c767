"""Statistics of shards as text for a terminal."""

from collections.abc import Sequence

from mmfuse.files import format_bytes
from mmfuse.pages import count_things
from mmfuse.shards.balance import find_outliers
from mmfuse.shards.findings import escape_controls
from mmfuse.shards.sketch import Sketch
from mmfuse.shards.stats import ShardStats

_MOST_SUBSETS, _MOST_EXTENSIONS = 20, 20


def to_table(stats: ShardStats) -> str:
    """What a person wants to know first, in a hundred columns."""
    counts = [count_things(len(stats.rows), "shard"), count_things(stats.samples, "sample")]
    parts = [
        ", ".join([*counts, format_bytes(stats.bytes)]),
        _table(["modalities of a sample", "samples", "share"], _subset_rows(stats)),
        _table(["member", "count", "mean", "median", "p99", "largest", "all"], _member_rows(stats)),
    ]
    if stats.probe is not None:
        parts += [_table([f"of {stats.probe.samples:,} samples", *_COLUMNS], _probe_rows(stats)), *_notes(stats)]
    outliers = [[o.shard.rpartition("/")[2], o.what, o.value, o.typical] for o in find_outliers(stats.rows)]
    if outliers:
        parts.append(_table(["shard that stands out", "in", "has", "typical"], outliers, num_left=2))
    return "\n\n".join(part for part in parts if part)


_COLUMNS = ("count", "p1", "p25", "median", "p75", "p99", "largest")


def _subset_rows(stats: ShardStats) -> list[list[str]]:
    total = max(1, stats.samples)
    return [
        [" + ".join(subset) or "none", f"{count:,}", f"{count / total:.1%}"]
        for subset, count in stats.subsets.most_common(_MOST_SUBSETS)
    ]


def _member_rows(stats: ShardStats) -> list[list[str]]:
    largest = sorted(stats.member_bytes.items(), key=lambda item: -item[1].total)[:_MOST_EXTENSIONS]
    return [
        [f".{extension}", f"{sketch.count:,}"]
        + [format_bytes(v) for v in (sketch.mean, sketch.quantile(0.5), sketch.quantile(0.99), sketch.largest)]
        + [format_bytes(sketch.total)]
        for extension, sketch in largest
    ]


def _probe_rows(stats: ShardStats) -> list[list[str]]:
    probe = stats.probe
    assert probe is not None
    sketches = {
        "picture width": probe.pictures.width,
        "picture height": probe.pictures.height,
        "width / height": probe.pictures.aspect,
        "sound, seconds": probe.sounds.seconds,
        "caption, characters": probe.captions.characters,
        "caption, words": probe.captions.words,
    }
    return [[name, *_quantiles(sketch)] for name, sketch in sketches.items() if sketch.count]


def _quantiles(sketch: Sketch) -> list[str]:
    values = [*(sketch.quantile(q) for q in (0.01, 0.25, 0.5, 0.75, 0.99)), sketch.largest]
    return [f"{sketch.count:,}", *(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values)]


def _notes(stats: ShardStats) -> list[str]:
    probe = stats.probe
    assert probe is not None
    notes = [f"{count:,} x {kind}" for kind, count in probe.pictures.kinds.most_common(4)]
    notes += [f"{count:,} x {kind}" for kind, count in probe.sounds.kinds.most_common(4)]
    lines = ["; ".join(notes)] if notes else []
    texts = probe.captions
    if texts.words.count or texts.empty:
        lines.append(f"captions: {texts.empty:,} texts without any, {texts.repeated:.1%} repeat another")
    if probe.unreadable:
        bad = ", ".join(
            f"{count:,} .{escape_controls(extension)}" for extension, count in probe.unreadable.most_common()
        )
        lines.append(f"unreadable members: {bad}; mmfuse shards check says which")
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, num_left: int = 1) -> str:
    """Columns as wide as they must be, the first ones to the left."""
    if not rows:
        return ""
    shown = [[escape_controls(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[place]) for row in shown) for place in range(len(head))]
    lines = []
    for row in shown:
        cells = [
            cell.ljust(w) if i < num_left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
