"""Stable integers from anything printable; without torch, so that light processes start fast."""

import xxhash


def hash_int(*parts: object) -> int:
    """A stable 63-bit integer from any printable parts; Python's own `hash` changes from process to process."""
    return xxhash.xxh3_64_intdigest("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")) >> 1
