"""The report's page: one HTML file that loads nothing, needs no JavaScript and shows what the numbers stand for."""

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from mmfuse.data.source import RawSample, Source
from mmfuse.errors import DataError
from mmfuse.pages import Plot, data_uri, make_thumbnail, mime_of, render_page, show_header, show_plots, show_tile

SetScores = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""What `evaluate_retrieval` gives, by set and direction."""

_STYLE = Path(__file__).with_name("report.css")
_MAX_MEMBER_BYTES = 300_000
_MAX_MEDIA_BYTES = 3_600_000
"""Of the whole page; base64 makes it 4.8 MB."""
_THUMBNAIL_BYTES, _THUMBNAIL_PIXELS = 16_000, 224
_MAX_CAPTION = 160


class Report(NamedTuple):
    """What the page shows."""

    name: str
    steps: int
    evaluated_step: int
    samples_seen: int | None
    date: str
    k: int
    final: SetScores
    baseline: SetScores
    """Of step 0; empty where that was not evaluated."""
    recall_curves: list[Plot]
    loss_curves: list[Plot]
    machine_curves: list[Plot]
    last_metrics: Mapping[str, Any]
    bad_members: Mapping[tuple[str, str], int]
    """By source and kind."""
    run_yaml: str
    environment: Mapping[str, Any]


def render_report(report: Report, *, sources: Mapping[str, Source]) -> str:
    """The whole page. Everything that comes from data is escaped."""
    cards = _Cards(sources)
    parts = [
        _header(report),
        _retrieval(report),
        _figures("Losses", report.loss_curves),
        _figures("Optimizer and throughput", report.machine_curves, note=_machine_note(report.last_metrics)),
        _bad_members(report.bad_members),
        *(_examples(name, directions, cards) for name, directions in report.final.items()),
        _details(report),
    ]
    return render_page(parts, title=report.name, style=_STYLE.read_text(encoding="utf-8"))


def _header(report: Report) -> str:
    facts = [f"{report.steps:,} steps"]
    if report.samples_seen is not None:
        facts.append(f"{report.samples_seen:,} samples seen")
    if report.final and report.evaluated_step != report.steps:
        facts.append(f"evaluated after step {report.evaluated_step:,}")
    tiles = []
    for name, directions in report.final.items():
        headline = [d for d in ("image->text", "text->image") if d in directions] or list(directions)[:2]
        tiles += [_tile(name, direction, directions[direction], report.k) for direction in headline]
    return show_header("mmfuse run", report.name, facts=(*facts, report.date), tiles=tiles)


def _tile(name: str, direction: str, scores: Mapping[str, Any], k: int) -> str:
    recall, chance = scores[f"R@{k}"], scores[f"chance R@{k}"]
    beside = f"{_ratio(recall, chance)} chance"
    return show_tile(f"{recall:.0%}", above=name, beside=beside, below=f"{direction.replace('->', ' → ')} R@{k}")


def _retrieval(report: Report) -> str:
    """One table for all sets, one row a direction, and the curves of R@k."""
    if not report.final:
        return '<section><h2>Retrieval</h2><p class="note">This run has not been evaluated.</p></section>'
    k, baseline = report.k, report.baseline
    scores = [scores for directions in report.final.values() for scores in directions.values()]
    others = sorted({int(n[2:]) for s in scores for n in s if n.startswith("R@")} - {k})
    head = ["", *(f"R@{n}" for n in others), f"R@{k}", f"chance R@{k}", "&times; chance"]
    head += [*([f"R@{k} at step 0"] if baseline else []), "median rank", "gallery"]
    rows = ["<thead><tr>" + "".join(f'<th scope="col">{column}</th>' for column in head) + "</tr></thead>"]
    for name, directions in report.final.items():
        rows.append(f'<tbody><tr><th class="set" scope="colgroup" colspan="{len(head)}">{escape(name)}</th></tr>')
        for direction, row in directions.items():
            recall, chance = row[f"R@{k}"], row[f"chance R@{k}"]
            start = baseline.get(name, {}).get(direction, {}).get(f"R@{k}")
            cells = [*(_percent(row.get(f"R@{n}")) for n in others), _bar(recall, chance, start)]
            cells += [_percent(chance), _ratio(recall, chance), *([_percent(start)] if baseline else [])]
            cells += [f"{row['median rank']:g}", f"{row['gallery']:,}"]
            rows.append(f'<tr><th scope="row">{_arrow(direction)}</th><td>{"</td><td>".join(cells)}</td></tr>')
        rows.append("</tbody>")
    legend = (
        f'<i class="key fill"></i> R@{k}: share of queries with a right answer among the first {k} '
        '<i class="key chance"></i> chance: what a random order gives'
    )
    if baseline:
        legend += ' <i class="key start"></i> step 0: the model before training'
    table = f'<div class="scroll"><table class="scores">{"".join(rows)}</table></div>'
    return f'<section><h2>Retrieval</h2><p class="note">{legend}</p>{table}{show_plots(report.recall_curves)}</section>'


def _bar(recall: float, chance: float, start: float | None) -> str:
    """R@k as a bar and a number, with marks for chance and for the model before training."""
    marks = f'<i class="fill" style="width:{recall:.1%}"></i><i class="chance" style="left:{chance:.1%}"></i>'
    if start is not None:
        marks += f'<i class="start" style="left:{start:.1%}"></i>'
    return f'<span class="recall"><span class="bar">{marks}</span><b>{recall:.1%}</b></span>'


def _percent(share: float | None) -> str:
    return "&ndash;" if share is None else f"{share:.1%}"


def _ratio(recall: float, chance: float) -> str:
    return f"{recall / chance:.1f}\N{MULTIPLICATION SIGN}" if chance else "\N{EN DASH}"


def _arrow(direction: str) -> str:
    return escape(direction).replace("-&gt;", " → ")


def _figures(title: str, plots: list[Plot], *, note: str = "") -> str:
    return f"<section><h2>{title}</h2>{note}{show_plots(plots)}</section>" if plots else ""


def _bad_members(counts: Mapping[tuple[str, str], int]) -> str:
    if not counts:
        return ""
    rows = "".join(
        f"<tr><td>{escape(source)}</td><td>{escape(kind)}</td><td>{count:,}</td></tr>"
        for (source, kind), count in sorted(counts.items())
    )
    return (
        "<section><h2>Bad members</h2><p class='note'>Each masked its modality; every one is named in "
        "quarantine.rankN.jsonl.</p><table><thead><tr><th>source</th><th>kind</th><th>times met</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></section>"
    )


def _machine_note(last: Mapping[str, Any]) -> str:
    facts = [f"peak memory {last['memory_gib']:.2f} GiB"] if "memory_gib" in last else []
    epochs = {name.removeprefix("epochs/"): value for name, value in last.items() if name.startswith("epochs/")}
    facts += [f"{value:.1f} epochs of {escape(name)}" for name, value in epochs.items()]
    return f'<p class="note">{" · ".join(facts)}</p>' if facts else ""


def _examples(name: str, directions: Mapping[str, Any], cards: "_Cards") -> str:
    """Queries with their best answers, direction by direction."""
    if name not in cards.sources or not any(scores.get("examples") for scores in directions.values()):
        return ""
    blocks = []
    for direction, scores in directions.items():
        rows = [_example(name, direction, e, cards, gallery=scores["gallery"]) for e in scores.get("examples", ())]
        blocks.append(f'<div class="direction"><h3>{_arrow(direction)}</h3>{"".join(rows)}</div>')
    return (
        f"<section><h2>Sample retrievals: {escape(name)}</h2>"
        '<p class="note">Each query with the rank of its right answer, then the five best answers: '
        '<i class="key right"></i> right. The small print under a sound is its caption.</p>'
        f'<div class="directions">{"".join(blocks)}</div></section>'
    )


def _example(name: str, direction: str, example: Mapping[str, Any], cards: "_Cards", *, gallery: int) -> str:
    """One query. An answer is right when it is of the query's group."""
    source, _, target = direction.partition("->")
    query, answers, rank = example["query"], example["answers"], example["rank"]
    right = cards.group(name, query)
    shown = [
        cards.card(name, number, target, kind="right" if cards.group(name, number) == right else "wrong")
        for number in answers
    ]
    return (
        f'<div class="example">{cards.card(name, query, source, kind="query")}'
        f'<p class="{"found" if rank <= len(answers) else "missed"}">rank <b>{rank:,}</b> of {gallery:,}</p>'
        f'<div class="answers">{"".join(shown)}</div></div>'
    )


class _Cards:
    """Samples as HTML, until the media that the page may hold are used up."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self.sources = sources
        self._samples: dict[tuple[str, int], RawSample] = {}
        self._bytes_left = _MAX_MEDIA_BYTES

    def group(self, name: str, number: int) -> str | int:
        """What a sample shares with those that are right answers to it; its own number where it has no group."""
        group = self.sample(name, number).group
        return number if group is None else group

    def sample(self, name: str, number: int) -> RawSample:
        """A sample of an evaluation set.

        Raises:
            DataError: the set has no such sample.
        """
        source = self.sources[name]
        if not 0 <= number < len(source):
            raise DataError(f"{name}: was evaluated with a sample {number}, but {source.name} has {len(source)}")
        if (name, number) not in self._samples:
            self._samples[name, number] = source.read(number)
        return self._samples[name, number]

    def card(self, name: str, number: int, side: str, *, kind: str) -> str:
        """One modality of a sample, or several joined by `+`; `kind` is query, right or wrong."""
        members = self.sample(name, number).members
        caption = next((_caption(data) for ext, data in members.values() if mime_of(ext) == "text/plain"), "")
        contents = [
            self._content(*members[modality], caption) if modality in members else "<em>absent</em>"
            for modality in side.split("+")
        ]
        return f'<div class="card {kind}">{"".join(contents)}</div>'

    def _content(self, extension: str, data: bytes, caption: str) -> str:
        mime = mime_of(extension)
        if mime == "text/plain":
            return f"<span>{escape(_caption(data))}</span>"
        if mime.startswith("image/"):
            mime, data = make_thumbnail(mime, data, pixels=_THUMBNAIL_PIXELS, keep_bytes=_THUMBNAIL_BYTES)
        if not mime:
            return f"<em>no preview of .{escape(extension)}</em>"
        if len(data) > _MAX_MEMBER_BYTES:
            return f"<em>{len(data) / 1000:,.0f} kB, too large to show</em>"
        if len(data) > self._bytes_left:
            return "<em>left out, the page is full</em>"
        self._bytes_left -= len(data)
        uri = data_uri(mime, data)
        if mime.startswith("image/"):
            return f'<img src="{uri}" alt="{escape(caption)}" title="{escape(caption)}">'
        player = f'<span class="play"><audio controls preload="none" src="{uri}"></audio></span>'
        return f"{player}<small>{escape(caption)}</small>"


def _caption(data: bytes) -> str:
    """The first caption of several."""
    lines = data.decode("utf-8", "replace").strip().splitlines() or [""]
    return lines[0] if len(lines[0]) <= _MAX_CAPTION else lines[0][:_MAX_CAPTION] + "…"


def _details(report: Report) -> str:
    rows = []
    for name, value in report.environment.items():
        shown = value if isinstance(value, str) else json.dumps(value)
        rows.append(f'<tr><th scope="row">{escape(name)}</th><td>{escape(shown)}</td></tr>')
    table = f'<div class="scroll"><table>{"".join(rows)}</table></div>'
    return (
        "<section><h2>Run and environment</h2>"
        f"<details><summary>Resolved run</summary><pre>{escape(report.run_yaml)}</pre></details>"
        f"{f'<details><summary>Environment</summary>{table}</details>' if rows else ''}</section>"
    )
