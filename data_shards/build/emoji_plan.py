"""Which samples the emoji sets hold: splits by family of concepts, drawings, voices, captions, missing modalities."""

import hashlib
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from emoji_render import Picture, Speech, Voice
from emoji_sources import VARIATION_SELECTOR, VENDORS, Concept, SourceError

TRAIN, NEW_DRAWINGS, NEW_EMOJI = "train", "new_drawings", "new_emoji"

MODALITY_SHARES: Mapping[tuple[str, ...], float] = {
    ("image", "text", "audio"): 0.55,
    ("image", "text"): 0.14,
    ("text", "audio"): 0.09,
    ("image", "audio"): 0.09,
    ("image",): 0.05,
    ("text",): 0.04,
    ("audio",): 0.04,
}
"""Which modalities a training sample keeps, and how often; validation samples keep all three."""
COMPLETE = ("image", "text", "audio")

HELD_OUT_VENDOR = "twemoji"
"""Never in train: its drawings are the split `new_drawings`."""
NEW_EMOJI_VENDOR = "noto"
"""Draws the split `new_emoji`: a vendor that training knows, so that only the concept is new."""
SHARD_SEED = 20_240_117
MAX_KEYWORDS_ALONE = 6

NEW_EMOJI_SHARE = 0.09
"""Share of families that the full set keeps out of training."""

SAMPLE_GROUPS = frozenset({3, 4, 5, 7})  # emojibase: animals and nature, food and drink, travel and places, objects
SAMPLE_NAME = re.compile(r"[a-z]+( [a-z]+)?")
SAMPLE_NAME_LENGTH = 16
# the first few double another concept ("dog face", "mouse trap"), then names that do not say what is drawn, then
# subjects that do not suit a demo
SAMPLE_UNWANTED_WORDS = re.compile(
    r"\b(face|moon|clock|trap|arrival|car"
    r"|stop|oncoming|mate|seat|pick|label|construction|station|foggy|fog|beans|pouring"
    r"|cigarette|coffin|headstone|funeral|love|bomb|dagger|thong|briefs|bikini)\b"
)

JOINER, RIGHT_ARROW = "200d", "27a1"
SKIN_TONES = frozenset({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})
GENDER_SIGNS = frozenset({"2640", "2642"})
SAME_PEOPLE = {
    variant: base
    for base, variants in {
        "1f9d1": "1f468 1f469",  # adult: man, woman
        "1f9d2": "1f466 1f467",  # child: boy, girl
        "1f9d3": "1f474 1f475",  # older adult: old man, old woman
        "1f9d1-1f91d-1f9d1": "1f46b 1f46c 1f46d",  # two people holding hands
        "1f9d1-1f9d1-1f9d2": "1f46a",  # family
        "1f9d1-1f384": "1f385 1f936",  # Mx, Santa and Mrs Claus
        "1f478": "1f934",  # princess, prince
    }.items()
    for variant in variants.split()
}
"""Code points that differ in gender or age alone, often drawn the same."""


@dataclass(frozen=True)
class SetSpec:
    """What one set consists of, beside its concepts."""

    train_vendors: tuple[str, ...]
    pixels: int
    audio_extension: str
    voices: tuple[Voice, ...]
    voice_of_vendor: bool
    """Voice k speaks for training vendor k; otherwise a hash of vendor and concept draws one."""
    held_out_voice: Voice
    samples_per_shard: int


FULL = SetSpec(
    train_vendors=("fluent", "noto", "openmoji"),
    pixels=128,
    audio_extension="flac",
    voices=(
        Voice("en-us+m1", 160, 45),
        Voice("en-us+f2", 165, 55),
        Voice("en-gb+m3", 155, 40),
        Voice("en-gb+f4", 170, 50),
        Voice("en-us+m7", 175, 50),
        Voice("en-us+f1", 150, 60),
        Voice("en-gb-scotland+m4", 160, 50),
        Voice("en-gb-x-rp+f5", 165, 45),
    ),
    voice_of_vendor=False,
    held_out_voice=Voice("en-us+f3", 160, 50),
    samples_per_shard=600,
)
SAMPLE = SetSpec(
    train_vendors=("fluent", "noto"),  # OpenMoji is share-alike: not for a repository under another licence
    pixels=96,
    audio_extension="ogg",
    voices=(Voice("en-us+m3", 165, 45), Voice("en-us+f2", 165, 55)),
    voice_of_vendor=True,
    held_out_voice=Voice("en-us+m7", 165, 55),
    samples_per_shard=75,
)
SETS = {"full": FULL, "sample": SAMPLE}
SAMPLE_TRAIN_CONCEPTS = 150
SAMPLE_NEW_CONCEPTS = 100


@dataclass(frozen=True)
class EmojiSample:
    """One drawing of one concept with the voice that says its name, and the modalities that it keeps."""

    concept: Concept
    vendor: str
    voice: Voice
    modalities: tuple[str, ...]
    pixels: int
    audio_extension: str

    @property
    def key(self) -> str:
        """The name that its members share in a tar."""
        return f"{self.concept.hexcode}_{self.vendor}"

    @property
    def picture(self) -> Picture:
        """What its image shows."""
        return Picture(self.concept.drawings[self.vendor], self.pixels)

    @property
    def speech(self) -> Speech:
        """What its audio says."""
        return Speech(self.concept.name, self.voice, self.audio_extension)

    @property
    def renderings(self) -> list[Picture | Speech]:
        """The members that take a program to make."""
        wanted = {"image": self.picture, "audio": self.speech}
        return [rendering for modality, rendering in wanted.items() if modality in self.modalities]

    @property
    def facts(self) -> dict[str, str | None]:
        """Its JSON member: where it comes from and under which licence."""
        has_audio = "audio" in self.modalities
        return {
            "name": self.concept.name,
            "hexcode": self.concept.hexcode,
            "vendor": self.vendor,
            "voice": self.voice.label if has_audio else None,
            "licence": VENDORS[self.vendor].licence,
            "speech": "synthetic, espeak-ng" if has_audio else None,
        }


def unit_hash(*parts: str) -> float:
    """A number in [0, 1) that depends on `parts` alone: the same on every machine and in every version."""
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def family_of(hexcode: str) -> str:
    """Code points of `hexcode` that say what is drawn.

    "woman running facing right" and "man running" are both "1f3c3": near-duplicates share a family, and splits never
    cut through one. An emoji that is nothing but a gender sign is its own family.
    """
    parts = hexcode.lower().split("-")
    ignored = SKIN_TONES | GENDER_SIGNS | {VARIATION_SELECTOR, JOINER}
    kept = [part for i, part in enumerate(parts) if part not in ignored and not (i > 0 and part == RIGHT_ARROW)]
    return "-".join(SAME_PEOPLE.get(part, part) for part in kept or parts)


def is_new_emoji(concept: Concept) -> bool:
    """Whether the full set keeps this concept, and its near-duplicates, out of training."""
    return unit_hash("new_emoji", family_of(concept.hexcode)) < NEW_EMOJI_SHARE


def pick_sample_concepts(concepts: Iterable[Concept], vendors: Iterable[str]) -> list[Concept]:
    """Concepts with a short name that says what is drawn, in hashed order; no two with the same last word or family."""
    vendors = set(vendors)
    best: dict[str, Concept] = {}
    for concept in concepts:
        if (
            concept.group not in SAMPLE_GROUPS
            or not SAMPLE_NAME.fullmatch(concept.name)
            or len(concept.name) > SAMPLE_NAME_LENGTH
            or SAMPLE_UNWANTED_WORDS.search(concept.name)
            or not vendors <= concept.drawings.keys()
        ):
            continue
        # one of "dog", "guide dog" and "service dog"; one of "book" and "books"
        head = concept.name.split()[-1].removesuffix("s")
        rival = best.get(head)
        if rival is None or (len(concept.name), concept.hexcode) < (len(rival.name), rival.hexcode):
            best[head] = concept
    by_family = {family_of(concept.hexcode): concept for concept in best.values()}
    return sorted(by_family.values(), key=lambda concept: unit_hash("sample", concept.hexcode))


def write_captions(concept: Concept, *, key: str) -> list[str]:
    """The CLDR name, then the name with keywords and the keywords alone, drawn by a hash of `key`."""
    words = [word for word in dict.fromkeys(concept.keywords) if word.lower() != concept.name.lower()]
    words.sort(key=lambda word: unit_hash("caption", key, word))
    captions = [concept.name]
    for first in (0, 2):
        if pair := words[first : first + 2]:
            captions.append(", ".join([concept.name, *pair]))
    if words:
        captions.append(", ".join(words[:MAX_KEYWORDS_ALONE]))
    return list(dict.fromkeys(captions))


def pick_modalities(key: str) -> tuple[str, ...]:
    """Modalities that the training sample `key` keeps."""
    point = unit_hash("modalities", key)
    for modalities, share in MODALITY_SHARES.items():
        if point < share:
            return modalities
        point -= share
    return COMPLETE  # rounding left a sliver at the end


def pick_voice(spec: SetSpec, *, vendor: str, hexcode: str) -> Voice:
    """Voice of a drawing by one of the training vendors."""
    if spec.voice_of_vendor:
        return spec.voices[spec.train_vendors.index(vendor)]
    return spec.voices[int(unit_hash("voice", vendor, hexcode) * len(spec.voices))]


def split_concepts(name: str, concepts: list[Concept]) -> tuple[list[Concept], list[Concept]]:
    """Concepts to train on, and those of `new_emoji`, which share no family with them."""
    if name == "full":
        new = [concept for concept in concepts if is_new_emoji(concept)]
        return [concept for concept in concepts if not is_new_emoji(concept)], new
    picked = pick_sample_concepts(concepts, [*SAMPLE.train_vendors, HELD_OUT_VENDOR])
    end = SAMPLE_TRAIN_CONCEPTS + SAMPLE_NEW_CONCEPTS
    if len(picked) < end:
        raise SourceError(f"the sample takes {end} concepts, but the packages hold only {len(picked)} that suit it")
    return picked[:SAMPLE_TRAIN_CONCEPTS], picked[SAMPLE_TRAIN_CONCEPTS:end]


def plan_samples(name: str, concepts: list[Concept]) -> dict[str, list[EmojiSample]]:
    """The samples of every split, each shuffled with a fixed seed."""
    spec = SETS[name]
    known, new = split_concepts(name, concepts)

    def sample(concept: Concept, vendor: str, voice: Voice, modalities: tuple[str, ...]) -> EmojiSample:
        return EmojiSample(concept, vendor, voice, modalities, spec.pixels, spec.audio_extension)

    splits: dict[str, list[EmojiSample]] = {TRAIN: [], NEW_DRAWINGS: [], NEW_EMOJI: []}
    validated: set[str] = set()  # Twemoji draws all families of one size alike, and no retrieval could tell them apart
    for concept in known:
        vendors = [vendor for vendor in spec.train_vendors if vendor in concept.drawings]
        for vendor in vendors:
            voice = pick_voice(spec, vendor=vendor, hexcode=concept.hexcode)
            modalities = pick_modalities(f"{concept.hexcode}_{vendor}")
            splits[TRAIN].append(sample(concept, vendor, voice, modalities))
        drawing = concept.drawings.get(HELD_OUT_VENDOR)
        if len(vendors) >= 2 and drawing is not None and drawing not in validated:
            validated.add(drawing)
            splits[NEW_DRAWINGS].append(sample(concept, HELD_OUT_VENDOR, spec.held_out_voice, COMPLETE))
    for concept in new:
        if NEW_EMOJI_VENDOR in concept.drawings:
            voice = pick_voice(spec, vendor=NEW_EMOJI_VENDOR, hexcode=concept.hexcode)
            splits[NEW_EMOJI].append(sample(concept, NEW_EMOJI_VENDOR, voice, COMPLETE))
    for split, samples in splits.items():
        random.Random(f"{SHARD_SEED} {split}").shuffle(samples)
    return splits
