"""Stable integers from anything printable; without torch, so that light processes start fast."""

import hashlib


def hash_int(*parts: object) -> int:
    """A stable 63-bit integer from any printable parts; Python's own `hash` changes from process to process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
