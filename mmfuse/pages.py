"""What every page of mmfuse is made of: one HTML file that loads nothing, runs nothing and opens from disk.

Functions named `show_` give HTML in which everything that may come from data is escaped.
"""

import base64
import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mmfuse.version import VERSION

_STYLE = Path(__file__).with_name("pages.css")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
"""No script can run, and nothing can be loaded or sent, even where an escape were forgotten."""
_MIME = {
    "jpg": "image/jpeg", "jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp", "gif": "image/gif",
    "wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg", "ogg": "audio/ogg", "opus": "audio/ogg",
    "txt": "text/plain",
}  # fmt: skip

COLORS = tuple(f"#0000{number:02x}" for number in range(1, 7))
MUTED, RULE = "#0000f0", "#0000f1"
"""Placeholders, put into a figure by matplotlib and turned into the page's CSS variables, so that dark mode works."""


class Plot(NamedTuple):
    """A figure with its caption."""

    title: str
    note: str
    legend: list[tuple[str, str]]
    """CSS variable of the color, label."""
    svg: str


def render_page(parts: Iterable[str], *, title: str, style: str = "") -> str:
    """The whole page.

    Args:
        parts: HTML of its sections; empty ones are passed over.
        style: CSS that only this kind of page needs.
    """
    footer = f"<footer>written by mmfuse {VERSION}</footer>"
    css = _STYLE.read_text(encoding="utf-8") + style
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · mmfuse</title>\n<style>\n{css}</style></head>\n"
        "<body><main>\n" + "\n".join(filter(None, (*parts, footer))) + "\n</main></body></html>\n"
    )


def show_header(kind: str, title: str, *, facts: Sequence[str], tiles: Sequence[str] = ()) -> str:
    """The head of a page; `tiles` is HTML of `show_tile`."""
    line = " · ".join(f"<span>{escape(fact)}</span>" for fact in facts)
    return (
        f'<header><p class="kicker">{escape(kind)}</p><h1>{escape(title)}</h1>'
        f'<p class="facts">{line}</p><div class="tiles">{"".join(tiles)}</div></header>'
    )


def show_tile(number: str, *, above: str, beside: str = "", below: str = "") -> str:
    """One large number with what it is."""
    return (
        f'<div class="tile"><span>{escape(above)}</span><p><b>{escape(number)}</b> {escape(beside)}</p>'
        f"<span>{escape(below)}</span></div>"
    )


def show_plots(plots: Iterable[Plot]) -> str:
    """A grid of figures."""
    figures = []
    for plot in plots:
        legend = "".join(
            f'<span><i style="background:var({color})"></i>{escape(label)}</span>' for color, label in plot.legend
        )
        caption = f"<b>{escape(plot.title)}</b><span>{escape(plot.note)}</span>"
        legend = f'<div class="legend">{legend}</div>' if legend else ""
        figures.append(f"<figure><figcaption>{caption}</figcaption>{plot.svg}{legend}</figure>")
    return f'<div class="figures">{"".join(figures)}</div>' if figures else ""


def style_axes(axes: Axes) -> None:
    """The look of all our plots: a base line, faint rules, small muted numbers."""
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.patch.set_visible(False)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.tick_params(bottom=False, left=False, labelsize=7.4, labelcolor=MUTED)


def to_svg(figure: Figure, name: str) -> str:
    """The figure's drawing alone, in the page's fonts and colors; ids are those of `name`, for many share the page."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = re.sub(r"<!--.*?-->", "", buffer.getvalue(), flags=re.DOTALL)
    box = re.search(r'viewBox="[\d. ]+"', svg)
    assert box is not None, "matplotlib writes a viewBox"
    inner = svg[svg.index(">", box.end()) + 1 : svg.rindex("</svg>")]
    inner = re.sub(r'<g id="[^"]*"', "<g", inner).replace("xlink:href", "href")
    inner = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", inner)
    inner = inner.replace(MUTED, "var(--muted)").replace(RULE, "var(--rule)")
    for number, color in enumerate(COLORS, start=1):
        inner = inner.replace(color, f"var(--c{number})")
    inner = re.sub(r"\s*\n\s*", " ", inner)
    return f'<svg {box.group()} aria-hidden="true">{inner}</svg>'


def count_things(count: int, thing: str) -> str:
    """`1 shard`, `2,000 shards`."""
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def mime_of(extension: str) -> str:
    """What a browser calls it; empty for what no page shows."""
    return _MIME.get(extension.rpartition(".")[2], "")


def data_uri(mime: str, data: bytes) -> str:
    """The bytes as an address that a browser needs no network for; a third longer than they are."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def make_thumbnail(mime: str, data: bytes, *, pixels: int, keep_bytes: int) -> tuple[str, bytes]:
    """A picture of more than `keep_bytes` made small, as its type and bytes; one that does not decode as it is."""
    if len(data) <= keep_bytes:
        return mime, data
    try:
        picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
        picture.draft("RGB", (pixels, pixels))  # a JPEG is decoded at a fraction of its size
        picture = picture.convert("RGB")
        picture.thumbnail((pixels, pixels))
        small = io.BytesIO()
        picture.save(small, "JPEG", quality=82)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return mime, data
    return "image/jpeg", small.getvalue()
