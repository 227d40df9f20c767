"""Reads and decodes every member of indexed shards: what is bad is found here, not on 512 GPUs."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from mmfuse.data.recipe import MemberRule, Shard
from mmfuse.data.tar_samples import SamplePlaces, TarSamples
from mmfuse.errors import DataError, ShardError
from mmfuse.shards.findings import NOTES, Checked, Finding
from mmfuse.shards.hostile_pool import NOTHING, Mark, Outcome, run_jobs
from mmfuse.shards.member_reader import Member, MemberReader, local_parts
from mmfuse.shards.modality_rules import default_rules

if TYPE_CHECKING:  # only the processes that decode wait for torch
    from mmfuse.modalities.base import ModalityConfig
    from mmfuse.shards.member_decoder import MemberDecoder

_OTHER_EXTENSIONS = ("json", "npy")
_JOB_SAMPLES = 64
_HEADER_SECONDS = 3600.0
_MAX_MEMBER_BYTES = 1 << 29
_AGAIN = "if the change is meant, index it again"


def check_shards(
    shards: Sequence[Shard],
    *,
    rules: Mapping[str, MemberRule] | None = None,
    configs: "Mapping[str, ModalityConfig] | None" = None,
    num_workers: int = 1,
    member_seconds: float = 60.0,
) -> Iterator[Checked]:
    """Everything that is wrong with local indexed shards, always in the same order.

    First the headers of all shards, against their indexes; then the members of those that are whole, sample by sample.
    A member that crashes or hangs its decoder is named, and all others are still decoded.

    Args:
        rules: by modality, which members are its; without, what each modality's file reads.
        configs: settings of modalities with other limits than the defaults.
        member_seconds: longest time over one member.

    Raises:
        DataError: a shard is remote.
    """
    for shard in shards:
        local_parts(shard)
    rules = default_rules() if rules is None else rules
    known = frozenset(extension for rule in rules.values() for extension in rule.extensions) | {*_OTHER_EXTENSIONS}
    preload = ("mmfuse.shards.member_decoder", *(f"mmfuse.modalities.{modality}" for modality in rules))
    whole: list[tuple[Shard, int]] = []
    for outcome in run_jobs(
        shards, _HeaderWork(known), num_workers=num_workers, item_seconds=_HEADER_SECONDS, preload=preload
    ):
        num_samples, findings = outcome.result
        findings += tuple(Finding(outcome.job.shown, None, None, lost.kind, lost.message) for lost in outcome.lost)
        if all(finding.kind in NOTES for finding in findings):
            whole.append((outcome.job, num_samples))
        yield Checked(outcome.job.shown, samples=0, members=0, bytes=0, findings=findings)
    jobs = (
        _Stretch(shard, first, min(first + _JOB_SAMPLES, num_samples))
        for shard, num_samples in whole
        for first in range(0, num_samples, _JOB_SAMPLES)
    )
    work = _DecodeWork(dict(rules), dict(configs or {}), known)
    for outcome in run_jobs(jobs, work, num_workers=num_workers, item_seconds=member_seconds, preload=preload):
        yield _name_lost(outcome)


class _HeaderWork:
    """Walks the headers of one shard and compares them with its index: number of samples, findings."""

    def __init__(self, known: frozenset[str]) -> None:
        self.known = known

    def __call__(self, shard: Shard, skip: frozenset[int], mark: Mark) -> tuple[int, tuple[Finding, ...]]:
        if skip:  # it crashed twice over the only item that there is
            return 0, ()
        mark(0)
        try:
            with MemberReader(shard) as reader:
                if difference := _find_difference(reader):
                    return _refuse(shard, "index_differs", difference)
                return len(reader.index), tuple(self._note_unknown(reader))
        except ShardError as error:
            damage = _find_damage(shard)
            return _refuse(shard, *(("damaged_shard", damage) if damage else ("not_indexed", str(error))))
        except (DataError, OSError) as error:
            return _refuse(shard, "unreadable", str(error))

    def _note_unknown(self, reader: MemberReader) -> Iterator[Finding]:
        counts: Counter[str] = Counter()
        for extensions, count in zip(reader.index.signatures, reader.index.header["signature_counts"], strict=True):
            counts.update(dict.fromkeys(set(extensions) - self.known, count))
        for extension, count in sorted(counts.items()):
            what = f"{count:,} member{'s' if count > 1 else ''} that no modality reads"
            yield Finding(reader.shard.shown, None, extension, "unknown_extension", what)


def _refuse(shard: Shard, kind: str, message: str) -> tuple[int, tuple[Finding, ...]]:
    return 0, (Finding(shard.shown, None, None, kind, message),)


def _find_damage(shard: Shard) -> str | None:
    """What is wrong with the tars themselves."""
    try:
        for tar in local_parts(shard):
            for _ in TarSamples(tar):
                pass
    except (ShardError, OSError) as error:
        return str(error)
    return None


def _find_difference(reader: MemberReader) -> str | None:
    """The first difference between a shard and its index, in words.

    Raises:
        ShardError: the tar is damaged.
    """
    index = reader.index
    # Aligned tars are joined by key: the samples of all but the first stand in another order in the index.
    alone = len(reader.shard.parts) == 1
    numbers = None if alone else {index.sample(number).key: number for number in range(len(index))}
    members = 0
    for part, tar in enumerate(local_parts(reader.shard)):
        for place, sample in enumerate(TarSamples(tar)):
            number = place if numbers is None else numbers.get(sample.key, len(index))
            if number >= len(index) or not _is_indexed(reader, number, sample, part=part):
                return f"{tar}: sample {sample.key!r} is not what the index has; {_AGAIN}"
            members += len(sample.offsets)
    if members != len(index.member_offset):
        return f"the index has {len(index.member_offset)} members, and here are {members}; {_AGAIN}"
    return None


def _is_indexed(reader: MemberReader, number: int, sample: SamplePlaces, *, part: int) -> bool:
    key, members = reader.sample(number)
    here = [(member.extension, member.offset, member.size) for member in members if member.part == part]
    return key == sample.key and here == list(zip(sample.extensions, sample.offsets, sample.sizes, strict=True))


class _Stretch(NamedTuple):
    """Neighbouring samples of a shard: what a process decodes at a time."""

    shard: Shard
    first: int
    stop: int


class _Decoded(NamedTuple):
    """What a process found in a stretch."""

    checked: Checked
    skipped: dict[int, int]
    """Item -> place of its finding, whose kind and message the process does not know."""


class _DecodeWork:
    """Decodes the members of a stretch. Items are its members, numbered through."""

    def __init__(
        self, rules: dict[str, MemberRule], configs: "dict[str, ModalityConfig]", known: frozenset[str]
    ) -> None:
        self.rules, self.configs, self.known = rules, configs, known
        self._reader: MemberReader | None = None

    @cached_property
    def _decoder(self) -> "MemberDecoder":
        from mmfuse.shards.member_decoder import MemberDecoder

        return MemberDecoder(self.rules, self.configs)

    def __call__(self, job: _Stretch, skip: frozenset[int], mark: Mark) -> _Decoded:
        try:
            reader, decoder = self._open(job.shard), self._decoder
        except DataError as error:  # it has gone, or changed, since its headers were read
            finding = Finding(job.shard.shown, None, None, "unreadable", str(error))
            return _Decoded(Checked(job.shard.shown, 0, 0, 0, (finding,)), {})
        findings: list[Finding] = []
        skipped: dict[int, int] = {}
        item = num_bytes = 0
        for number in range(job.first, job.stop):
            key, members = reader.sample(number)
            for member in members:
                if item in skip:
                    skipped[item] = len(findings)
                    findings.append(Finding(job.shard.shown, key, member.extension, "", ""))
                elif member.extension in self.known:
                    mark(item)
                    finding = _judge(reader, decoder, key, member)
                    findings += [finding] if finding else []
                    num_bytes += member.size
                    mark(NOTHING)
                item += 1
        checked = Checked(job.shard.shown, job.stop - job.first, item, num_bytes, tuple(findings))
        return _Decoded(checked, skipped)

    def _open(self, shard: Shard) -> MemberReader:
        if self._reader is None or self._reader.shard != shard:
            if self._reader is not None:
                self._reader.close()
            self._reader = MemberReader(shard)
        return self._reader


def _judge(reader: MemberReader, decoder: "MemberDecoder", key: str, member: Member) -> Finding | None:
    shown, extension = reader.shard.shown, member.extension
    if member.size > _MAX_MEMBER_BYTES:
        return Finding(shown, key, extension, "too_large", f"{member.size:,} bytes, of {_MAX_MEMBER_BYTES:,} at most")
    try:
        data = reader.read(member)
    except (DataError, OSError) as error:
        return Finding(shown, key, extension, "unreadable", str(error))
    verdict = decoder.judge(extension, data)
    return Finding(shown, key, extension, verdict.kind, verdict.message) if verdict else None


def _name_lost(outcome: Outcome[_Stretch, _Decoded]) -> Checked:
    """What a process found, with the members that it was lost over."""
    findings = list(outcome.result.checked.findings)
    for lost in outcome.lost:
        place = outcome.result.skipped[lost.item]
        findings[place] = findings[place]._replace(kind=lost.kind, message=lost.message)
    return outcome.result.checked._replace(findings=tuple(findings))
