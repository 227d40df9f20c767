"""Pages as a browser's parser reads them."""

from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Tags with their attributes, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def classes(self, tag: str) -> list[str]:
        """Of every such tag, in order; empty where it has none."""
        return [attributes.get("class") or "" for name, attributes in self.tags if name == tag]

    def count(self, tag: str) -> int:
        """How many such tags there are."""
        return sum(name == tag for name, _ in self.tags)

    def assert_harmless(self) -> None:
        """Nothing can run, nothing is loaded, and the browser is told so."""
        assert not self.count("script")
        assert not [attributes for _, attributes in self.tags if any(name.startswith("on") for name in attributes)]
        places = [
            a[name] for _, a in self.tags for name in ("src", "href", "xlink:href", "data", "srcset") if name in a
        ]
        assert all(str(place).startswith(("data:", "#")) for place in places)
        policies = [a["content"] for tag, a in self.tags if tag == "meta" and "http-equiv" in a]
        assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"]


def read_page(path: Path) -> Page:
    """A page from its file."""
    return Page(path.read_text(encoding="utf-8"))
