"""Encoders joined by packed cross-attention. Never imports data."""
