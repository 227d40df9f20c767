"""What timm's models say of their special tokens."""

from typing import Any


def has_class_token(vit: Any) -> bool:
    """Whether the first token stands for the whole; registers, which also come before the patches, do not."""
    return any(getattr(part, "cls_token", None) is not None for part in (vit, getattr(vit, "embeds", None)))
