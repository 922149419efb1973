"""What the `millstream data` commands take: a place, which holds one dataset or two splits, and key=value words."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from configs.load import ConfigError
from configs.schema import CacheConfig
from data_pipeline import remote_sources
from data_pipeline.errors import DataError
from data_pipeline.parts import SPLITS
from data_pipeline.shards import Dataset, open_dataset


def find_splits(place: str) -> dict[str, str]:
    """Name of each split -> its folder or address; {"": place} where `place` itself is one. Raises DataError."""
    place = place.rstrip("/") or "/"
    if _has_manifest(place):
        return {"": place}
    found = {name: f"{place}/{name}" for name in SPLITS if _has_manifest(f"{place}/{name}")}
    if not found:
        raise DataError(
            f"{place}: holds no finished dataset (looked for manifest.json there, in train and in validation); make "
            f"one with `millstream data build CONFIG`"
        )
    return found


def open_splits(place: str, cache: CacheConfig | None = None) -> dict[str, Dataset]:
    """As `find_splits`, opened: folder or address of each split -> its dataset."""
    return {split: open_dataset(split, cache) for split in find_splits(place).values()}


def options(words: list[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """`key=value` words over defaults of the same types. Raises ConfigError."""
    chosen = dict(defaults)
    for word in words:
        key, sign, value = word.partition("=")
        if key not in defaults or not sign:
            near = difflib.get_close_matches(key, defaults, n=1)
            known = f"did you mean {near[0]}=?" if near else f"known here are {'=, '.join(defaults)}="
            raise ConfigError(f"{word}: {known}" if defaults else f"{word}: takes no options")
        kind = type(defaults[key])
        try:
            chosen[key] = kind(value)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{word}: expected {expected}") from None
        if kind is int and chosen[key] < 0:
            raise ConfigError(f"{word}: expected a whole number, 0 or more")
    return chosen


def _has_manifest(place: str) -> bool:
    if remote_sources.is_remote(place):
        return remote_sources.exists(f"{place}/manifest.json")
    return (Path(place) / "manifest.json").is_file()
