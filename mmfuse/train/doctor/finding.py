"""What a check says."""

from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """One thing that was looked at."""

    status: Literal["ok", "warning", "problem"]
    """A problem stops runs; a warning stops some of them, or makes them slow."""
    subject: str
    found: str
    remedy: str = ""
    """What to do, unless all is well."""
