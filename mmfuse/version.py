"""The version, where packaging reads it."""

VERSION = "0.1.0"
