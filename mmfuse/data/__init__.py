"""From tar shards to batches. Never imports a model."""
