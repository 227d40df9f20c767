"""Offline tools around tar shards: index, check, count, look at, build, convert."""
