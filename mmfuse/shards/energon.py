"""What Megatron-Energon knows of a folder of tars: splits, counts, fields, and where each sample starts.

Format: `energon prepare` of megatron-energon 7.4.1 (`flavors/webdataset/`). Its rule for keys is ours, but for three
things: it keeps the case of extensions, it skips members below a top folder called __NAME__, and a key that returns
after other keys is a second sample, where we refuse the shard.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from braceexpand import braceexpand

from mmfuse.data.recipe import JsonCaptions, MemberRule
from mmfuse.data.shard_index import ShardIndex
from mmfuse.data.tar import BLOCK
from mmfuse.errors import DataError, ShardError
from mmfuse.shards.tables import Extensions

META = ".nv-meta"
_SKIPPED = re.compile(r"__[^/]*__/")
_FIELD = re.compile(r"(?P<extension>[^\[\]]+)(\[(?P<field>[^\[\]]+)\])?")
_RECORDS = (b"x", b"g", b"L", b"K")


class EnergonData(NamedTuple):
    """The metadata of a prepared folder."""

    splits: dict[str, tuple[Path, ...]]
    """Shards of each split that has any, in its order."""
    counts: dict[Path, int]
    """Samples of each shard when it was prepared."""
    members: dict[str, MemberRule]
    """By modality, from `field_map`; empty where it says nothing that we read."""
    notes: tuple[str, ...]
    """What is not carried over, in sentences."""


def read_energon(folder: Path, *, known: Extensions) -> EnergonData:
    """The metadata in `folder/.nv-meta`.

    Args:
        known: by modality, the extensions that it reads.
    Raises:
        DataError: it is not whole, or not of the known format.
    """
    meta = folder / META
    try:
        counts = {folder / name: int(count) for name, count in _load(meta, ".info")["shard_counts"].items()}
        split = _load(meta, "split")
        excluded = {name for pattern in split.get("exclude") or () for name in braceexpand(pattern)}
        splits = {}
        for name, patterns in split["split_parts"].items():
            shards = [shard for pattern in patterns for shard in braceexpand(pattern) if shard not in excluded]
            if shards:
                splits[name] = tuple(folder / shard for shard in shards)
        fields = _load(meta, "dataset").get("field_map") if (meta / "dataset.yaml").exists() else None
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{meta}: not as `energon prepare` writes it ({error!r}); prepare it again") from error
    notes = []
    if single := sorted(name for name in excluded if folder / name not in counts):
        notes.append(
            f"split.yaml excludes {len(single)} single samples, such as {single[0]}; a recipe cannot, so they are read"
        )
    members, unread = _read_fields(fields or {}, known=known)
    return EnergonData(splits, counts, members, (*notes, *unread))


def _load(meta: Path, name: str) -> dict[str, Any]:
    """The mapping in NAME.json or NAME.yaml."""
    for path in (meta / f"{name}.json", meta / f"{name}.yaml"):
        try:
            text = path.read_text(encoding="utf-8")
            return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise DataError(f"{path}: not readable: {error}") from error
    raise DataError(f"{meta}: has neither {name}.json nor {name}.yaml; run `energon prepare` to its end")


def _read_fields(fields: dict[str, str], *, known: Extensions) -> tuple[dict[str, MemberRule], list[str]]:
    """Rules by modality from `{image: "jpg,png", caption: "json[caption]"}`, and what is not read."""
    modality_of = {extension: modality for modality, extensions in known.items() for extension in extensions}
    rules: dict[str, MemberRule] = {}
    notes = []
    for field, description in fields.items():
        for option in str(description).lower().split(","):
            found = _FIELD.fullmatch(option.strip())
            extension = found["extension"] if found else ""
            in_json = found is not None and found["field"] and extension.rpartition(".")[2] == "json"
            modality = "text" if in_json else modality_of.get(extension.rpartition(".")[2])
            if found is None or modality is None or bool(found["field"]) != bool(in_json):
                notes.append(f"the field {field!r} ({option.strip()}) is of no modality and is not read")
            elif modality in rules and (in_json or isinstance(rules[modality].captions, JsonCaptions)):
                notes.append(f"the field {field!r} ({option.strip()}) is not read: {modality} has a member already")
            elif in_json:
                captions = JsonCaptions(keys={found["field"]: 1.0})
                rules[modality] = MemberRule(extensions=(extension,), captions=captions)
            else:
                before = tuple(rules[modality].extensions) if modality in rules else ()
                rules[modality] = MemberRule(extensions=tuple(dict.fromkeys((*before, extension))))
    return rules, notes


def import_energon_offsets(tar: Path) -> np.ndarray | None:
    """uint64 `(samples + 1,)`: where the first header of each sample starts, and where the last sample ends.

    None where there is no `NAME.tar.idx`.

    Raises:
        ShardError: the file is no such list.
    """
    path = tar.with_suffix(".tar.idx")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not data or len(data) % 8:
        raise ShardError(f"{path}: has {len(data)} bytes, which is no list of offsets; run `energon prepare` again")
    offsets = np.frombuffer(data, "<u8")
    if (offsets[1:] < offsets[:-1]).any():
        raise ShardError(f"{path}: its offsets do not grow; run `energon prepare` again")
    return offsets


def check_energon_offsets(tar: Path, index: ShardIndex) -> str | None:
    """None where Energon's offsets and the index find the same samples, or there are none; else a sentence.

    They differ where the shard has changed since it was prepared, or holds what the two rules take differently.
    """
    offsets = import_energon_offsets(tar)
    if offsets is None:
        return None
    payloads = index.member_offset[index.first_member.astype(np.int64)]
    if len(payloads) != len(offsets) - 1:
        kept = [not _SKIPPED.match(index.sample(number).key) for number in range(len(index))]
        payloads = payloads[np.array(kept, bool)]
    if len(payloads) != len(offsets) - 1:
        return f"{tar}: has {len(payloads)} samples, Energon prepared {len(offsets) - 1}: it has changed since"
    headers = payloads - np.uint64(BLOCK)
    differing = np.flatnonzero(headers != offsets[:-1])  # also where a long name has headers of its own
    with open(tar, "rb") as file:
        for place in differing:
            if _skip_records(file.fileno(), int(offsets[place])) != headers[place]:
                return (
                    f"{tar}: sample {place} of Energon's list starts at byte {offsets[place]}, where none does: "
                    "the shard has changed since it was prepared"
                )
    ends = index.member_offset + (index.member_size + np.uint64(BLOCK - 1)) // np.uint64(BLOCK) * np.uint64(BLOCK)
    if len(ends) and ends[-1] != offsets[-1] and not index.header["other_members"]:
        return (
            f"{tar}: its last sample ends at byte {ends[-1]}, Energon's list says {offsets[-1]}: it has changed since"
        )
    return None


def _skip_records(descriptor: int, position: int) -> int:
    """Where the member's own header is, after the extended headers that may begin at `position`; -1 where none is."""
    for _ in range(8):
        header = os.pread(descriptor, BLOCK, position)
        if header[156:157] not in _RECORDS:
            return position
        try:
            size = int(header[124:136].split(b"\0", 1)[0].strip() or b"0", 8)
        except ValueError:
            return -1
        position += BLOCK + -(-size // BLOCK) * BLOCK
    return -1


def check_energon(data: EnergonData, indexes: dict[Path, ShardIndex]) -> Iterator[str]:
    """A sentence for each shard that is not as it was when it was prepared.

    Args:
        indexes: of the shards of all splits.
    """
    for shard, index in indexes.items():
        counted = data.counts.get(shard)
        try:
            differs = check_energon_offsets(shard, index)
        except DataError as error:  # of the list: nothing is wrong with the tar
            differs = str(error)
        if differs is None and counted != len(index):
            differs = (
                f"{shard}: has {len(index)} samples, Energon's .info says {counted}: it has changed since, or has "
                "members below a folder called __NAME__, which Energon skips"
            )
        if differs:
            yield differs
