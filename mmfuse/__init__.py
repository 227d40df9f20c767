"""mmfuse: text, image and audio in one model, from samples that have any subset of them."""

from typing import TYPE_CHECKING, Any

from mmfuse.version import VERSION as __version__

if TYPE_CHECKING:
    from mmfuse.embed.embedder import load

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """`mmfuse.load` is imported when it is asked for: light processes must not wait for torch."""
    if name == "load":
        from mmfuse.embed.embedder import load

        return load
    raise AttributeError(f"module 'mmfuse' has no attribute {name!r}")
