"""The error of everything that reads or writes data."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used; the message names the file, what was found, what was expected and what to do."""
