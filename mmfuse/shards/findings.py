"""What a check finds: one thing at a time, for a terminal, for programs, and in sum."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TextIO

from mmfuse.errors import ShardError

KINDS = {
    "damaged_shard": "the tar is cut off, damaged, or holds what is refused; none of it was decoded",
    "index_differs": "the tar is not the one that was indexed; none of it was decoded",
    "not_indexed": "the shard has no index that can be read; none of it was decoded",
    "unreadable": "the tar, or bytes of a member, cannot be read",
    "empty": "a member without bytes, or a text of blanks",
    "not_decodable": "not what its extension says, or cut off",
    "too_large": "beyond a limit of its modality, or of memory",
    "not_finite": "a sound or an array with NaN or infinite values",
    "unexpected": "the decoder raised an error that is not its own",
    "crashed": "the decoder took its process with it; in training, the run",
    "too_slow": "took longer than the time for one member",
    "unknown_extension": "members that nothing reads (a note, not a fault)",
}
_ADDRESS = re.compile(r"<_io\.BytesIO object at 0x\w+>")
NOTES = frozenset({"unknown_extension"})
"""Kinds that do not make a data set bad."""


class Finding(NamedTuple):
    """One thing that is wrong, or worth a note."""

    shard: str
    key: str | None
    """None where it is about the whole shard."""
    extension: str | None
    kind: str
    """One of `KINDS`, or what a modality calls it."""
    message: str

    def to_json(self) -> str:
        """One line of JSON, without its end."""
        return json.dumps(self._asdict())

    def to_line(self) -> str:
        """One sentence for a terminal; control characters in keys come escaped."""
        place = self.shard if self.key is None else f"{self.shard}: {self.key}"
        place += "" if self.extension is None else f".{self.extension}"
        return escape_controls(f"{place}: {self.kind}: {self.message}")


class Checked(NamedTuple):
    """A part of the work that is done: the headers of a shard (no samples yet), or some of its samples."""

    shard: str
    samples: int
    members: int
    bytes: int
    """Of the members that were decoded."""
    findings: tuple[Finding, ...]


@dataclass
class CheckSummary:
    """What a check has come to."""

    samples: int = 0
    members: int = 0
    bytes: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """Findings by kind."""

    def add(self, checked: Checked) -> None:
        """Counts one more part."""
        self.samples, self.members = self.samples + checked.samples, self.members + checked.members
        self.bytes += checked.bytes
        self.counts.update(finding.kind for finding in checked.findings)

    @property
    def exit_code(self) -> int:
        """0 where all is well, else that of a bad shard; notes are well."""
        return ShardError.exit_code if set(self.counts) - NOTES else 0

    def to_json(self) -> str:
        """One JSON object."""
        counts = {kind: self.counts[kind] for kind in self._kinds()}
        numbers = {"samples": self.samples, "members": self.members, "bytes": self.bytes}
        return json.dumps({**numbers, "good": self.exit_code == 0, "findings": counts})

    def to_table(self) -> str:
        """A line a kind, the totals first."""
        lines = [f"{self.samples:,} samples with {self.members:,} members checked, {self.bytes / 1e6:,.1f} MB decoded"]
        lines += [f"{self.counts[kind]:>9,}  {kind:<18} {KINDS.get(kind, '')}" for kind in self._kinds()]
        return "\n".join([*lines, *(["all good"] if self.exit_code == 0 else [])])

    def _kinds(self) -> list[str]:
        """Those that were found, gravest first."""
        return [*(kind for kind in KINDS if self.counts[kind]), *sorted(self.counts.keys() - KINDS.keys())]


def escape_controls(text: str) -> str:
    """Text that comes from data, harmless in a terminal and on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def describe_error(error: Exception) -> str:
    """What an error says, without what differs from process to process."""
    return _ADDRESS.sub("it", str(error))


def write_findings(parts: Iterable[Checked], file: TextIO) -> Iterator[Checked]:
    """Hands the parts on, and writes each finding as a line of JSON when it comes."""
    for checked in parts:
        for finding in checked.findings:
            file.write(finding.to_json() + "\n")
        if checked.findings:
            file.flush()
        yield checked
