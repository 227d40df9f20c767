"""A text of two sentences travels as one member, divided by a character that texts do not have."""

BETWEEN_SENTENCES = b"\x1f"
"""ASCII's unit separator."""
