"""Checks of the environment that a run will meet."""
