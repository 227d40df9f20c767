"""The loop, and what keeps it going."""
