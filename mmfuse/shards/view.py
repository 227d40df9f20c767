"""A page of samples: what a data set looks and sounds like."""

import json
import random
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from mmfuse.data.recipe import MemberRule, Shard, place_shards
from mmfuse.errors import DataError
from mmfuse.pages import count_things, render_page, show_header
from mmfuse.shards.hostile_pool import run_jobs
from mmfuse.shards.member_reader import local_parts, open_index
from mmfuse.shards.modality_rules import default_rules
from mmfuse.shards.view_card import CardWork, Wanted

if TYPE_CHECKING:  # only the processes that decode wait for torch
    from mmfuse.modalities.base import ModalityConfig

_STYLE = Path(__file__).with_name("view.css")
_MEMBER_SECONDS = 30.0
_SHOWN_MISSING = 5


def draw_samples(shards: Sequence[Shard], *, count: int, seed: int = 0) -> list[Wanted]:
    """So many different samples, drawn evenly from all, in the order of the shards; all where there are fewer.

    Raises:
        ShardError: a shard has no index.
    """
    ends = list(accumulate(_count(shard) for shard in shards))
    total = ends[-1] if ends else 0
    drawn = sorted(random.Random(seed).sample(range(total), min(count, total)))
    places = [bisect_right(ends, number) for number in drawn]
    return [
        Wanted(shards[place], number - (ends[place - 1] if place else 0))
        for place, number in zip(places, drawn, strict=True)
    ]


def find_keys(shards: Sequence[Shard], keys: Iterable[str]) -> list[Wanted]:
    """The samples of these keys, in the order of the shards; a key that two shards have gives both.

    Raises:
        DataError: no shard has one of the keys.
        ShardError: a shard has no index.
    """
    wanted = set(keys)
    found = [(key, Wanted(shard, number)) for shard in shards for number, key in _keys_of(shard) if key in wanted]
    missing = sorted(wanted.difference(key for key, _ in found))
    if missing:
        others = f" and {len(missing) - _SHOWN_MISSING} more" if len(missing) > _SHOWN_MISSING else ""
        names = ", ".join(map(repr, missing[:_SHOWN_MISSING]))
        raise DataError(f"none of {len(shards)} shards has a sample {names}{others}; keys are without their extensions")
    return [sample for _, sample in found]


def read_findings(path: Path, *, shards: Sequence[Shard] = (), limit: int = 100) -> list[Wanted]:
    """The samples that the lines of a check or of a run's quarantine name, each once, with what is said of it.

    Args:
        shards: where the index of a shard does not lie beside it, or it is made of several tars.
        limit: the first so many.

    Raises:
        DataError: the file cannot be read, holds something else, or names what is not there.
    """
    notes: dict[tuple[str, str], list[str]] = {}
    for number, line in enumerate(_read_lines(path), start=1):
        try:
            entry = json.loads(line)
            shard, key = entry["shard"], entry["key"]
            reason = entry["message"] if "message" in entry else entry["reason"]
            note = f".{entry['extension']}: {entry['kind']}: {reason}"
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: names no bad member ({error!r})") from error
        if key is not None and ((shard, key) in notes or len(notes) < limit):
            notes.setdefault((shard, key), []).append(note)
    known = {shard.shown: shard for shard in shards}
    return [sample for name in dict.fromkeys(name for name, _ in notes) for sample in _find_noted(name, known, notes)]


def _find_noted(name: str, known: Mapping[str, Shard], notes: Mapping[tuple[str, str], list[str]]) -> list[Wanted]:
    (shard,) = [known[name]] if name in known else place_shards([name], index_folder=None)
    said = {key: "; ".join(dict.fromkeys(text)) for (place, key), text in notes.items() if place == name}
    return [sample._replace(note=said[key]) for key, sample in _match(shard, said)]


def _match(shard: Shard, keys: Iterable[str]) -> list[tuple[str, Wanted]]:
    samples = find_keys([shard], keys)
    index = open_index(shard)
    return [(index.sample(sample.number).key, sample) for sample in samples]


def render_samples(
    wanted: Sequence[Wanted],
    *,
    title: str,
    rules: Mapping[str, MemberRule] | None = None,
    configs: "Mapping[str, ModalityConfig] | None" = None,
    augmentations: int = 0,
    max_bytes: int = 30_000_000,
    num_workers: int = 1,
) -> str:
    """The whole page. Everything that comes from data is escaped; a member that kills its decoder costs its picture.

    Args:
        rules: by modality, which members are its; without, what each modality's file reads.
        configs: settings of modalities as a run has them; others have their defaults.
        augmentations: how many draws of the training transforms to show beside evaluation's.
        max_bytes: samples that would make the page longer are shown without media.

    Raises:
        DataError: a shard is remote, or cannot be read.
    """
    for sample in wanted:
        local_parts(sample.shard)
    rules = default_rules() if rules is None else rules
    work = CardWork(rules, configs or {}, augmentations=augmentations)
    preload = ("mmfuse.shards.view_features", *(f"mmfuse.modalities.{modality}" for modality in rules))
    articles, size, full = [], 0, 0
    for outcome in run_jobs(wanted, work, num_workers=num_workers, item_seconds=_MEMBER_SECONDS, preload=preload):
        card = outcome.result
        has_room = size + len(card.body) <= max_bytes
        body = card.body if has_room else card.plain_body
        size, full = size + len(body), full + (not has_room)
        articles.append(f"<article>{card.head}{body}</article>")
    facts = [
        count_things(len(wanted), "sample"),
        count_things(len({sample.shard for sample in wanted}), "shard"),
    ]
    if full:
        facts.append(f"{full:,} without pictures and sounds, to keep the page below {max_bytes / 1e6:,.0f} MB")
    parts = [show_header("mmfuse samples", title, facts=facts), *articles]
    return render_page(parts, title=title, style=_STYLE.read_text(encoding="utf-8"))


def _count(shard: Shard) -> int:
    return len(open_index(shard))


def _keys_of(shard: Shard) -> Iterable[tuple[int, str]]:
    index = open_index(shard)
    return ((number, index.sample(number).key) for number in range(len(index)))


def _read_lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
