"""What the headers of members say: sizes of pictures, lengths of sounds; and how long captions are."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from typing import NamedTuple

import numpy as np
import soundfile
from PIL import ExifTags, Image

from mmfuse.data.captions import choose_caption
from mmfuse.data.recipe import MemberRule, Shard
from mmfuse.errors import SampleError
from mmfuse.shards.hostile_pool import NOTHING, Mark
from mmfuse.shards.member_reader import MemberReader
from mmfuse.shards.sketch import Common, Distinct, Sketch

_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that change width and height."""
_MAX_TEXT_BYTES = 1 << 20
_SHOWN_CAPTION = 200
SHAPE_STEPS = 6
"""Cells of `PictureTotals.shapes` for every doubling."""
SHAPE_DOUBLINGS = 14
_CHANNELS = {1: "mono", 2: "stereo"}


@dataclass
class PictureTotals:
    """Pictures, by what their headers say."""

    width: Sketch = field(default_factory=Sketch)
    height: Sketch = field(default_factory=Sketch)
    megapixels: Sketch = field(default_factory=Sketch)
    aspect: Sketch = field(default_factory=Sketch)
    """Width / height."""
    kinds: Common = field(default_factory=Common)
    """Format and mode, such as "JPEG RGB"."""
    shapes: np.ndarray = field(
        default_factory=lambda: np.zeros((SHAPE_STEPS * SHAPE_DOUBLINGS, SHAPE_STEPS * SHAPE_DOUBLINGS), np.int64)
    )
    """`(width, height)`: pictures by the logarithms of both, from 1 pixel on."""


@dataclass
class SoundTotals:
    """Sounds, by what their headers say."""

    seconds: Sketch = field(default_factory=Sketch)
    kinds: Common = field(default_factory=Common)
    """Rate, channels and format, such as "16,000 Hz mono OGG"."""


@dataclass
class CaptionTotals:
    """Captions."""

    characters: Sketch = field(default_factory=Sketch)
    words: Sketch = field(default_factory=Sketch)
    """Separated by blanks, so few in languages that have none."""
    empty: int = 0
    """Texts without any caption."""
    distinct: Distinct = field(default_factory=Distinct)
    common: Common = field(default_factory=Common)

    @property
    def repeated(self) -> float:
        """Share of captions that another one is equal to already; about 1% off beyond 65,536 different ones."""
        return max(0.0, 1 - self.distinct.count / max(1, self.words.count))


@dataclass
class ProbeTotals:
    """What was read of some samples."""

    samples: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)
    """Members that are not what their extension says, by extension."""
    pictures: PictureTotals = field(default_factory=PictureTotals)
    sounds: SoundTotals = field(default_factory=SoundTotals)
    captions: CaptionTotals = field(default_factory=CaptionTotals)

    def merge(self, other: "ProbeTotals") -> None:
        """Counts what another has counted."""
        self.samples += other.samples
        self.unreadable.update(other.unreadable)
        ours, theirs = self.pictures, other.pictures
        for sketch, added in zip(_sketches(self), _sketches(other), strict=True):
            sketch.merge(added)
        ours.kinds.merge(theirs.kinds)
        ours.shapes += theirs.shapes
        self.sounds.kinds.merge(other.sounds.kinds)
        self.captions.empty += other.captions.empty
        self.captions.distinct.merge(other.captions.distinct)
        self.captions.common.merge(other.captions.common)


def _sketches(totals: ProbeTotals) -> tuple[Sketch, ...]:
    pictures, captions = totals.pictures, totals.captions
    return (
        *(pictures.width, pictures.height, pictures.megapixels, pictures.aspect),
        *(totals.sounds.seconds, captions.characters, captions.words),
    )


class Chosen(NamedTuple):
    """Samples of a shard: what a process probes at a time."""

    shard: Shard
    numbers: np.ndarray


class ProbeWork:
    """Probes the members of some samples. Items are their members, numbered through."""

    def __init__(self, rules: Mapping[str, MemberRule]) -> None:
        self.rules = {extension: (m, rule) for m, rule in rules.items() for extension in rule.extensions}

    def __call__(self, job: Chosen, skip: frozenset[int], mark: Mark) -> ProbeTotals:
        pile = _Pile()
        item = -1
        with MemberReader(job.shard) as reader:
            for number in job.numbers.tolist():
                for member in reader.sample(number)[1]:
                    item += 1
                    modality, rule = self.rules.get(member.extension, ("", None))
                    if rule is None or modality not in _PROBES:
                        continue
                    mark(item)
                    try:
                        if item in skip:
                            raise SampleError("a process died over it")
                        with reader.open(member) as file:
                            _PROBES[modality](pile, file, rule)
                    except Exception:  # foreign bytes make decoders raise what they like; `check` says what is wrong
                        pile.unreadable[member.extension] += 1
                    mark(NOTHING)
        return pile.count(samples=len(job.numbers))


@dataclass
class _Pile:
    """What was read of the members of one job, before it is counted."""

    sizes: list[tuple[int, int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    picture_kinds: Counter[str] = field(default_factory=Counter)
    sound_kinds: Counter[str] = field(default_factory=Counter)
    unreadable: Counter[str] = field(default_factory=Counter)
    empty: int = 0

    def count(self, *, samples: int) -> ProbeTotals:
        """The totals of this pile."""
        totals = ProbeTotals(samples=samples, unreadable=self.unreadable)
        width, height = np.array(self.sizes, np.float64).reshape(-1, 2).T
        pictures = totals.pictures
        pictures.width.add(width)
        pictures.height.add(height)
        pictures.megapixels.add(width * height / 1e6)
        pictures.aspect.add(width / height)
        pictures.kinds.add(self.picture_kinds)
        cells = np.clip(SHAPE_STEPS * np.log2([width, height]), 0, len(pictures.shapes) - 1).astype(np.int64)
        np.add.at(pictures.shapes, tuple(cells), 1)
        totals.sounds.seconds.add(np.array(self.seconds))
        totals.sounds.kinds.add(self.sound_kinds)
        captions = totals.captions
        captions.empty = self.empty
        captions.characters.add(np.array([len(caption) for caption in self.captions]))
        captions.words.add(np.array([len(caption.split()) for caption in self.captions]))
        captions.distinct.add([caption.encode("utf-8", "surrogatepass") for caption in self.captions])
        captions.common.add(Counter(caption[:_SHOWN_CAPTION] for caption in self.captions))
        return totals


@contextmanager
def _any_number_of_pixels() -> Iterator[None]:
    """Pillow refuses to open what is too large to decode, and nothing is decoded here."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _probe_picture(pile: _Pile, file: BufferedReader, rule: MemberRule) -> None:
    with _any_number_of_pixels():
        picture = Image.open(file, formats=("JPEG", "PNG", "WEBP"))
    # Of a PNG without EXIF data, Pillow would decode all pixels to look for some behind them.
    sideways = "exif" in picture.info and picture.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
    pile.sizes.append((picture.height, picture.width) if sideways else (picture.width, picture.height))
    pile.picture_kinds[f"{picture.format} {picture.mode}"] += 1


def _probe_sound(pile: _Pile, file: BufferedReader, rule: MemberRule) -> None:
    with soundfile.SoundFile(file) as sound:
        pile.seconds.append(sound.frames / sound.samplerate)
        channels = _CHANNELS.get(sound.channels, f"{sound.channels} channels")
        pile.sound_kinds[f"{sound.samplerate:,} Hz {channels} {sound.format}"] += 1


_BY_LINE = ("lines", "sentences")


def _probe_text(pile: _Pile, file: BufferedReader, rule: MemberRule) -> None:
    """Every line is a caption, or a sentence, where the recipe says so; in JSON the one that evaluation takes."""
    data = file.read(_MAX_TEXT_BYTES)
    if not isinstance(rule.captions, str):
        data = choose_caption(data, rule, seed=None)
    text = data.decode("utf-8")
    captions = [caption.strip() for caption in (text.splitlines() if rule.captions in _BY_LINE else [text])]
    found = [caption for caption in captions if caption]
    pile.captions += found
    pile.empty += not found


_PROBES: dict[str, Callable[[_Pile, BufferedReader, MemberRule], None]] = {
    "image": _probe_picture,
    "audio": _probe_sound,
    "text": _probe_text,
}
"""By modality; those of others are counted and not read."""
