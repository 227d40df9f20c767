"""Statistics of shards as a page: what the data set is made of, and which shards stand out."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from mmfuse.files import format_bytes
from mmfuse.pages import Plot, count_things, render_page, show_header, show_plots, show_tile
from mmfuse.shards.balance import find_outliers
from mmfuse.shards.probe import ProbeTotals
from mmfuse.shards.sketch import Common
from mmfuse.shards.stats import ShardRow, ShardStats
from mmfuse.shards.stats_plots import draw_histogram, draw_shapes, draw_shards

_STYLE = Path(__file__).with_name("stats_page.css")
_MOST_LISTED_SHARDS = 500
_MOST_SUBSETS = 24
_COLORS = {"image": 1, "audio": 3, "text": 4}
"""Of the modalities that have plots, numbered as the page does; others have the fifth."""


def render_stats(stats: ShardStats, *, title: str) -> str:
    """The whole page. Everything that comes from data is escaped."""
    probe = stats.probe
    parts = [_header(stats, title), _mix(stats), *(_probed(probe) if probe else []), _members(stats), _shards(stats)]
    return render_page(parts, title=title, style=_STYLE.read_text(encoding="utf-8"))


def _header(stats: ShardStats, title: str) -> str:
    facts = [count_things(len(stats.rows), "shard"), count_things(stats.samples, "sample"), format_bytes(stats.bytes)]
    tiles = [show_tile(_round(stats.samples), above="samples", below=f"in {count_things(len(stats.rows), 'shard')}")]
    full = sum(count for subset, count in stats.subsets.items() if len(subset) == len(stats.modalities))
    complete = full / max(1, stats.samples)
    tiles.append(show_tile(f"{complete:.0%}", above="complete", below="have " + ", ".join(stats.modalities)))
    if stats.probe:
        tiles += _probe_tiles(stats, stats.probe)
        facts.append(f"headers of {stats.probe.samples:,} samples read")
    return show_header("mmfuse data set", title, facts=facts, tiles=tiles)


def _probe_tiles(stats: ShardStats, probe: ProbeTotals) -> list[str]:
    tiles, scale = [], stats.samples / max(1, probe.samples)
    about = "" if scale == 1 else "about "
    pictures, seconds, words = probe.pictures, probe.sounds.seconds, probe.captions.words
    if pictures.width.count:
        size = f"{pictures.width.quantile(0.5):.0f} x {pictures.height.quantile(0.5):.0f}"
        tiles.append(show_tile(size, above="pictures", below="median width and height"))
    if seconds.count:
        hours, minutes = seconds.total * scale / 3600, seconds.total * scale / 60
        length = f"{_round(hours)} h" if hours >= 1 else f"{minutes:.0f} min"
        tiles.append(show_tile(length, above="sound", below=f"{about}in all, median {seconds.quantile(0.5):.3g} s"))
    if words.count:
        below = f"median words, {probe.captions.repeated:.0%} repeat another"
        tiles.append(show_tile(f"{words.quantile(0.5):.0f}", above="captions", below=below))
    bad = probe.unreadable.total()
    return [*tiles, show_tile(f"{bad:,}", above="unreadable", below="members, of those that were read")]


def _mix(stats: ShardStats) -> str:
    """Bars of the subsets, with a dot for each modality that is there."""
    head = "".join(f'<th scope="col">{escape(modality)}</th>' for modality in stats.modalities)
    rows, total = [], max(1, stats.samples)
    largest = max(stats.subsets.values(), default=1)
    for subset, count in stats.subsets.most_common(_MOST_SUBSETS):
        cells = "".join(
            f'<td class="dot m{_COLORS.get(modality, 5)}">{"&#9679;" if modality in subset else ""}</td>'
            for modality in stats.modalities
        )
        bar = f'<span class="bar"><i style="width:{count / largest:.2%}"></i></span>'
        numbers = f"<td class=number>{count:,}</td><td class=number>{count / total:.1%}</td>"
        rows.append(f"<tr>{cells}<td>{bar}</td>{numbers}</tr>")
    counts = {m: sum(n for subset, n in stats.subsets.items() if m in subset) for m in stats.modalities}
    with_each = [f"{count / total:.1%} have {modality}" for modality, count in counts.items()]
    return (
        f'<section><h2>Modalities</h2><p class="note">{escape(" · ".join(with_each))}</p>'
        f'<div class="scroll"><table class="mix"><thead><tr>{head}<th scope="col" colspan="3">samples</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _probed(probe: ProbeTotals) -> list[str]:
    pictures, sounds, captions = probe.pictures, probe.sounds, probe.captions
    picture_plots = [
        *draw_shapes("Width and height", pictures.shapes),
        *draw_histogram("Megapixels", pictures.megapixels, show=lambda v: f"{v:.3g}"),
        *draw_histogram("Width / height", pictures.aspect, show=lambda v: f"{v:.2g}"),
    ]
    caption_plots = [
        *draw_histogram("Words", captions.words, show=lambda v: f"{v:,.0f}", color=3),
        *draw_histogram("Characters", captions.characters, show=lambda v: f"{v:,.0f}", color=3),
    ]
    note = f"{captions.empty:,} texts hold no caption · {captions.repeated:.1%} of captions repeat another"
    repeated = [(caption, count) for caption, count in captions.common.most_common(12) if count > 1]
    common = _list("Most repeated captions", repeated)
    return [
        _section("Pictures", picture_plots, note=_kinds(pictures.kinds)),
        _section(
            "Sounds",
            draw_histogram("Seconds", sounds.seconds, show=lambda v: f"{v:.3g}", color=2),
            note=_kinds(sounds.kinds),
        ),
        _section("Captions", caption_plots, note=note, below=common),
    ]


def _section(title: str, plots: Sequence[Plot], *, note: str, below: str = "") -> str:
    if not plots:
        return ""
    return f'<section><h2>{title}</h2><p class="note">{escape(note)}</p>{show_plots(plots)}{below}</section>'


def _kinds(kinds: Common) -> str:
    total = max(1, sum(kinds.counts.values()))
    return " · ".join(f"{count / total:.1%} {kind}" for kind, count in kinds.most_common(6))


def _list(title: str, entries: Iterable[tuple[str, int]]) -> str:
    rows = [f"<tr><td class=number>{count:,}</td><td>{escape(text)}</td></tr>" for text, count in entries]
    if not rows:
        return ""
    table = f'<div class="scroll"><table class="texts"><tbody>{"".join(rows)}</tbody></table></div>'
    return f"<details><summary>{title}</summary>{table}</details>"


def _members(stats: ShardStats) -> str:
    """Sizes by extension: a table, and a histogram of those that take the most room."""
    order = sorted(stats.member_bytes.items(), key=lambda item: -item[1].total)
    head = ("member", "count", "mean", "median", "p99", "largest", "all")
    rows = []
    for extension, sketch in order[:_MOST_SUBSETS]:
        sizes = (sketch.mean, sketch.quantile(0.5), sketch.quantile(0.99), sketch.largest, sketch.total)
        rows.append((f".{extension}", f"{sketch.count:,}", *map(format_bytes, sizes)))
    plots = [
        plot
        for extension, sketch in order[:3]
        for plot in draw_histogram(f".{extension}", sketch, show=format_bytes, color=4)
    ]
    return f"<section><h2>Members</h2>{_numbers(head, rows)}{show_plots(plots)}</section>"


def _shards(stats: ShardStats) -> str:
    """Balance over the shards, what stands out, and all of them."""
    rows = stats.rows
    plots = [
        *draw_shards("Samples", [row.samples for row in rows], show=lambda v: f"{v:,.0f}"),
        *draw_shards("Size", [row.bytes for row in rows], show=format_bytes),
    ]
    outliers = [(o.shard, o.what, o.value, o.typical) for o in find_outliers(rows)]
    table = _numbers(("shard", "in", "has", "typical"), outliers, num_left=2) if outliers else ""
    note = "These are far from the median of all shards." if outliers else "No shard is far from the median of all."
    listed = [
        (row.name, f"{row.samples:,}", format_bytes(row.bytes), *_shares(row, stats.modalities))
        for row in rows[:_MOST_LISTED_SHARDS]
    ]
    everything = _numbers(("shard", "samples", "size", *(f"with {m}" for m in stats.modalities)), listed)
    first = f"The first {len(listed):,} shards" if len(listed) < len(rows) else f"All {len(rows):,} shards"
    return (
        f'<section><h2>Shards</h2>{show_plots(plots)}<h3>Standing out</h3><p class="note">{note}</p>{table}'
        f"<details><summary>{first}</summary>{everything}</details></section>"
    )


def _shares(row: ShardRow, modalities: Sequence[str]) -> list[str]:
    return [f"{row.modalities[modality] / max(1, row.samples):.0%}" for modality in modalities]


def _numbers(head: Sequence[str], rows: Sequence[Sequence[str]], *, num_left: int = 1) -> str:
    """A table whose columns after the first ones are numbers."""
    kind = [""] * num_left + [" class=number"] * (len(head) - num_left)
    titles = "".join(f'<th scope="col"{k}>{escape(cell)}</th>' for cell, k in zip(head, kind, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{escape(cell)}</td>" for cell, k in zip(row, kind, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def _round(count: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if count >= size:
            return f"{count / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{count:,.0f}" if count >= 100 else f"{count:.3g}"
