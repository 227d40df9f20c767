"""One sample as HTML: its picture, its sound to be played, its text, and what a model sees of them."""

import io
import json
from collections.abc import Mapping
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import soundfile
from PIL import Image

from mmfuse.data.recipe import MemberRule, Shard
from mmfuse.files import format_bytes
from mmfuse.pages import data_uri, make_thumbnail, mime_of
from mmfuse.shards.findings import describe_error
from mmfuse.shards.hostile_pool import NOTHING, Mark
from mmfuse.shards.member_reader import Member, MemberReader

if TYPE_CHECKING:  # only the processes that decode wait for torch
    from mmfuse.modalities.base import ModalityConfig
    from mmfuse.shards.view_features import FeatureViews

_KEPT_PICTURE_BYTES, _PICTURE_PIXELS = 150_000, 640
_KEPT_SOUND_BYTES, _SOUND_SECONDS = 1_000_000, 20
_MAX_TEXT, _MAX_JSON = 3000, 20_000
_MAX_MEMBER_BYTES = 1 << 28
_PLAYABLE = {
    ("WAV", "PCM_U8"), ("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "PCM_32"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"), ("FLAC", "PCM_S8"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"),
}  # fmt: skip
"""Format and coding of what today's browsers play as it is."""
_PLAYED_RATES, _USUAL_RATE = range(8_000, 96_001), 16_000
_CHANNELS = {1: "mono", 2: "stereo"}
_NO_ROOM = '<p class="fact">left out, the page is full</p>'


class _Shown(NamedTuple):
    """A member as HTML."""

    html: str
    is_good: bool = True
    """False where it cannot be shown."""
    has_media: bool = False


_LOST = _Shown(
    '<p class="bad">not shown: a process died, or took too long, over it; mmfuse shards check says more</p>',
    is_good=False,
)


class Wanted(NamedTuple):
    """A sample that a page is to show."""

    shard: Shard
    number: int
    note: str = ""
    """Why it is shown, such as what is wrong with it."""


class Card(NamedTuple):
    """A sample as HTML."""

    head: str
    body: str
    """With media."""
    plain_body: str
    """Without, for a page that is full."""


class CardWork:
    """Makes cards. Items are, member by member, the member itself and what a model sees of it."""

    def __init__(
        self, rules: Mapping[str, MemberRule], configs: "Mapping[str, ModalityConfig]", *, augmentations: int
    ) -> None:
        self.rules, self.configs, self.augmentations = dict(rules), dict(configs), augmentations

    @cached_property
    def _views(self) -> "FeatureViews":
        from mmfuse.shards.view_features import FeatureViews

        return FeatureViews(self.rules, self.configs)

    def __call__(self, wanted: Wanted, skip: frozenset[int], mark: Mark) -> Card:
        with MemberReader(wanted.shard) as reader:
            key, members = reader.sample(wanted.number)
            read = {member.extension: _read(reader, member) for member in members}
        items = {member.extension: 2 * place for place, member in enumerate(members)}
        shown: dict[str, _Shown] = {}
        for extension, data in read.items():
            mark(items[extension])
            shown[extension] = _LOST if items[extension] in skip else _show_member(extension, data)
        seen = {}
        for modality, rule in self.rules.items():
            extension = next((extension for extension in rule.extensions if extension in read), None)
            data = None if extension is None else read[extension]
            if extension is None or data is None or not shown[extension].is_good:
                continue
            mark(items[extension] + 1)
            lost, place = items[extension] + 1 in skip, f"{wanted.shard.shown}/{key}"
            seen[modality] = (
                _LOST.html if lost else self._views.show(modality, data, key=place, augmentations=self.augmentations)
            )
        mark(NOTHING)
        full = {extension: entry.html for extension, entry in shown.items()}
        plain = {extension: _NO_ROOM if entry.has_media else entry.html for extension, entry in shown.items()}
        return Card(_show_head(wanted, key, members), self._show_body(full, seen), self._show_body(plain, {}))

    def _show_body(self, shown: Mapping[str, str], seen: Mapping[str, str]) -> str:
        """A cell for each modality, also where it is missing, with what a model sees of it; then all other members."""
        cells, listed = [], set[str]()
        for modality in sorted(self.rules, key=self._place):
            extensions = [extension for extension in self.rules[modality].extensions if extension in shown]
            listed.update(extensions)
            content = "".join(shown[extension] for extension in extensions) or "<p>missing</p>"
            if modality in seen:
                content += f'<h4>what a model sees</h4><div class="seen">{seen[modality]}</div>'
            kind = "cell" if extensions else "cell missing"
            cells.append(f'<div class="{kind}"><h4>{escape(modality)}</h4>{content}</div>')
        others = "".join(html for extension, html in shown.items() if extension not in listed)
        return f'<div class="cells">{"".join(cells)}</div>{others}'

    def _place(self, modality: str) -> int:
        """Pictures first, then sounds, then the rest."""
        kinds = {mime_of(extension).partition("/")[0] for extension in self.rules[modality].extensions}
        return 0 if "image" in kinds else 1 if "audio" in kinds else 2


def _read(reader: MemberReader, member: Member) -> bytes | None:
    """None for what is too large to be shown."""
    return reader.read(member) if member.size <= _MAX_MEMBER_BYTES else None


def _show_head(wanted: Wanted, key: str, members: list[Member]) -> str:
    sizes = ", ".join(f".{member.extension} {format_bytes(member.size)}" for member in members)
    note = f'<p class="bad">{escape(wanted.note)}</p>' if wanted.note else ""
    place = f"{wanted.shard.shown} · sample {wanted.number:,} · {sizes}"
    return f'<h3>{escape(key)}</h3><p class="place">{escape(place)}</p>{note}'


def _show_member(extension: str, data: bytes | None) -> _Shown:
    """A member as people see or hear it; whatever is wrong with it, in words."""
    if data is None:
        return _Shown(f'<p class="bad">.{escape(extension)} is too large to be shown</p>', is_good=False)
    kind = mime_of(extension).partition("/")[0]
    try:
        if kind == "image":
            return _Shown(_show_picture(extension, data), has_media=True)
        if kind == "audio":
            return _Shown(_show_sound(data), has_media=True)
    except Exception as error:  # foreign bytes make decoders raise what they like
        reason = f".{extension} does not decode: {describe_error(error)}"
        return _Shown(f'<p class="bad">{escape(reason)}</p>', is_good=False)
    if kind == "text":
        return _Shown(f'<p class="text">{escape(_cut(data.decode("utf-8", "replace").strip(), _MAX_TEXT))}</p>')
    if extension.rpartition(".")[2] == "json":
        return _Shown(_show_json(extension, data))
    return _Shown(f'<p class="fact">.{escape(extension)}, {format_bytes(len(data))}</p>')


def _show_picture(extension: str, data: bytes) -> str:
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as picture:
        fact = f"{picture.width:,} x {picture.height:,} {picture.format} {picture.mode}"
        picture.draft("RGB", (_PICTURE_PIXELS, _PICTURE_PIXELS))
        picture.load()
    mime, small = make_thumbnail(mime_of(extension), data, pixels=_PICTURE_PIXELS, keep_bytes=_KEPT_PICTURE_BYTES)
    fact += ", shown smaller" if small is not data else ""
    return f'<img src="{data_uri(mime, small)}" alt=""><p class="fact">{escape(fact)}</p>'


def _show_sound(data: bytes) -> str:
    """A player with the original bytes where browsers play them and they are not too many, else with a WAV of them."""
    with soundfile.SoundFile(io.BytesIO(data)) as sound:
        seconds, channels = sound.frames / sound.samplerate, _CHANNELS.get(sound.channels, f"{sound.channels} channels")
        fact = f"{seconds:.2f} s, {sound.samplerate:,} Hz {channels} {sound.format} {sound.subtype}"
        played, mime = data, "audio/mpeg" if sound.format == "MP3" else f"audio/{sound.format.lower()}"
        playable = (sound.format, sound.subtype) in _PLAYABLE and sound.samplerate in _PLAYED_RATES
        if not playable or len(data) > _KEPT_SOUND_BYTES:
            played, mime = _convert_sound(sound), "audio/wav"
            fact += ", played as WAV" + (f", the first {_SOUND_SECONDS} s" if seconds > _SOUND_SECONDS else "")
    player = f'<audio controls preload="metadata" src="{data_uri(mime, played)}"></audio>'
    return f'{player}<p class="fact">{escape(fact)}</p>'


def _convert_sound(sound: soundfile.SoundFile) -> bytes:
    """The beginning of a sound as a mono WAV of 16 bits, at a rate that browsers play."""
    rate = sound.samplerate
    values = sound.read(_SOUND_SECONDS * rate, dtype="float32", always_2d=True).mean(1)
    values = np.clip(np.nan_to_num(values, posinf=0, neginf=0), -1, 1)
    if rate not in _PLAYED_RATES and len(values):
        places = np.arange(0, len(values), rate / _USUAL_RATE)
        values, rate = np.interp(places, np.arange(len(values)), values), _USUAL_RATE
    file = io.BytesIO()
    soundfile.write(file, values, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def _show_json(extension: str, data: bytes) -> str:
    try:
        text = json.dumps(json.loads(data), indent=1, ensure_ascii=False)
    except (ValueError, RecursionError):
        text = data.decode("utf-8", "replace")
    summary = f"<summary>.{escape(extension)}, {format_bytes(len(data))}</summary>"
    return f"<details>{summary}<pre>{escape(_cut(text, _MAX_JSON))}</pre></details>"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}… ({len(text):,} characters)"
