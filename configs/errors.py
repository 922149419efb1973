"""The error of everything that reads a configuration; apart from `load`, which takes a tenth of a second to import."""

from __future__ import annotations


class ConfigError(ValueError):
    """The configuration cannot be used; the message lists every fault with its place and its cure."""
