"""Where the emoji sets come from: pinned npm packages, and the concepts that they name and draw."""

import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Package:
    """One npm package, pinned: a published version never changes."""

    name: str
    version: str
    members: tuple[str, ...] = ("icons.json", "chars.json")
    """The files that the build reads."""

    @property
    def folder(self) -> str:
        """Name that `npm pack` gives the archive, without its `.tgz`."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}"


@dataclass(frozen=True)
class Vendor:
    """One set of drawings."""

    name: str
    package: Package
    licence: str


NAMES_PACKAGE = Package("emojibase-data", "17.0.0", members=("en/data.json",))
VENDORS = {
    vendor.name: vendor
    for vendor in (
        Vendor("fluent", Package("@iconify-json/fluent-emoji-flat", "1.2.6"), "MIT"),
        Vendor("noto", Package("@iconify-json/noto", "1.2.9"), "Apache-2.0"),
        Vendor("twemoji", Package("@iconify-json/twemoji", "1.2.5"), "CC-BY-4.0"),
        Vendor("openmoji", Package("@iconify-json/openmoji", "1.2.29"), "CC-BY-SA-4.0"),
    )
}

DEBIAN_PACKAGES = {"rsvg-convert": "librsvg2-bin", "espeak-ng": "espeak-ng", "npm": "npm"}

COMPONENT_GROUP = 2  # emojibase: skin tones and hair on their own, not pictures of anything

VARIATION_SELECTOR = "fe0f"


class SourceError(RuntimeError):
    """A program or a package that the build needs is not there."""


@dataclass(frozen=True)
class Concept:
    """One emoji without its skin-tone variants: what it is called and how each vendor draws it."""

    hexcode: str
    """Code points in lower case joined by dashes, as emojibase writes them."""
    name: str
    keywords: tuple[str, ...]
    group: int
    drawings: Mapping[str, str] = field(repr=False)
    """Vendor name to a complete SVG document."""


def require_programs(programs: Iterable[str]) -> None:
    """Check that every program is on PATH.

    Raises:
        SourceError: naming all that are missing and the Debian packages that hold them.
    """
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        packages = " ".join(DEBIAN_PACKAGES[program] for program in missing)
        raise SourceError(f"not on PATH: {', '.join(missing)}; on Debian or Ubuntu: apt-get install {packages}")


def fetch_packages(packages: Iterable[Package], *, cache: Path) -> None:
    """Download and unpack every package that `cache` does not hold yet."""
    missing = [package for package in packages if not (cache / package.folder).is_dir()]
    if not missing:
        return
    require_programs(["npm"])
    cache.mkdir(parents=True, exist_ok=True)
    for package in missing:
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
            wanted = f"{package.name}@{package.version}"
            command = ["npm", "pack", wanted, "--silent", "--pack-destination", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SourceError(f"npm pack {wanted} failed: {done.stderr.strip() or done.stdout.strip()}")
            unpacked = Path(folder) / "package"
            with tarfile.open(Path(folder) / f"{package.folder}.tgz") as archive:
                for member in package.members:
                    content = archive.extractfile(f"package/{member}")
                    if content is None:
                        raise SourceError(f"{wanted}: {member} is not a file")
                    (unpacked / member).parent.mkdir(parents=True, exist_ok=True)
                    (unpacked / member).write_bytes(content.read())
            unpacked.rename(cache / package.folder)  # last, so that a folder of this name is always complete


def read_json(sources: Path, package: Package, member: str) -> Any:
    """Parsed `member` of an unpacked package."""
    path = sources / package.folder / member
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(
            f"{path} is missing; --sources must hold {package.name} {package.version} unpacked as {package.folder}/"
        ) from error


def strip_selectors(hexcode: str) -> str:
    """`hexcode` in lower case without variation selectors: vendors disagree on where these belong."""
    return "-".join(part for part in hexcode.lower().split("-") if part != VARIATION_SELECTOR)


def read_drawings(sources: Path, vendor: Vendor) -> dict[str, str]:
    """SVG document of every emoji that `vendor` draws, by code points without variation selectors."""
    icon_set = read_json(sources, vendor.package, "icons.json")
    icon_of_char: dict[str, str] = read_json(sources, vendor.package, "chars.json")
    drawings = {}
    for hexcode, icon_name in icon_of_char.items():
        icon = icon_set["icons"].get(icon_name)
        if icon is None:  # an alias, mirrored or of a removed icon: none stands for a code point in the pinned versions
            continue
        width = icon.get("width", icon_set["width"])
        height = icon.get("height", icon_set["height"])
        drawings[strip_selectors(hexcode)] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{width}" height="{height}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
    return drawings


def read_concepts(sources: Path, vendors: Iterable[Vendor]) -> list[Concept]:
    """Every named emoji without skin-tone variants, in emojibase's order, with the drawings `vendors` have of it."""
    drawings = {vendor.name: read_drawings(sources, vendor) for vendor in vendors}
    concepts = []
    for entry in read_json(sources, NAMES_PACKAGE, "en/data.json"):
        # regional indicators have no group; skin tones hang below their entry in "skins"
        if entry.get("group", COMPONENT_GROUP) == COMPONENT_GROUP:
            continue
        hexcode = entry["hexcode"].lower()
        char = strip_selectors(hexcode)
        concepts.append(
            Concept(
                hexcode=hexcode,
                name=entry["label"],
                keywords=tuple(entry.get("tags", ())),
                group=entry["group"],
                drawings={name: svgs[char] for name, svgs in drawings.items() if char in svgs},
            )
        )
    return concepts
