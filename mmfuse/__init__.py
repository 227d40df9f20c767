"""mmfuse: text, image and audio in one model, from samples that have any subset of them."""

__version__ = "0.1.0"
