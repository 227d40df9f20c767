"""A text of two sentences travels as one member, divided by bytes that no UTF-8 text has."""

BETWEEN_SENTENCES = b"\xff\xfe\xff"
