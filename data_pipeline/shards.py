"""The dataset directory: flat token ids in shards, described by a manifest that is written last.

    manifest.json                 format, dtype, tokenizer fingerprint, the shards with their checksums, a fingerprint
    shard-00000.tokens            token ids of all its documents, one after the other (uint16, or uint32 for
                                  vocabularies over 65,536), padded to 8 bytes; then the documents' ends as uint64
    tokenizer.json, ...           the tokenizer's own files, in Hugging Face layout

Both parts of a shard are memory-mapped, so opening costs nothing and a batch touches only the pages it needs. Without a
manifest a directory is unfinished and is not read.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

FORMAT = 1
LARGEST_UINT16_VOCABULARY = 65_536


class DataError(ValueError):
    """Data that cannot be used; the message names the file, what was found, what was expected and what to do."""


@dataclass(frozen=True)
class Dataset:
    """A finished dataset directory; `tokens` and `document_starts` treat its shards as one long row of tokens."""

    path: Path
    num_tokens: int
    num_documents: int
    vocab_size: int
    fingerprint: str
    tokenizer_fingerprint: str
    shards: list[dict[str, Any]]
    shard_starts: list[int]  # index of each shard's first token, and num_tokens at the end
    token_arrays: list[np.ndarray]  # per shard: (tokens,) uint16 or uint32, memory-mapped
    end_arrays: list[np.ndarray]  # per shard: (documents,) uint64, memory-mapped

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the whole dataset, (stop - start,), in the shards' dtype; a view if possible."""
        parts = []
        for shard, low, high in self._pieces(start, stop):
            parts.append(self.token_arrays[shard][low:high])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Indices in [start, stop) at which a document starts, int64, ascending."""
        parts = []
        for shard, low, high in self._pieces(start, stop):
            ends, first = self.end_arrays[shard], self.shard_starts[shard]
            left, right = np.searchsorted(ends, np.array([low, high], dtype=np.uint64))
            found = ends[left:right].astype(np.int64)
            found = found[(found >= low) & (found < high)] + first
            if low == 0:  # a shard starts with a document
                found = np.concatenate([[first], found])
            parts.append(found)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _pieces(self, start: int, stop: int) -> Iterable[tuple[int, int, int]]:
        """(shard, first, last + 1 within the shard) of every shard that [start, stop) touches."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a dataset of {self.num_tokens}")
        shard = bisect_right(self.shard_starts, start) - 1
        while shard < len(self.shards) and self.shard_starts[shard] < stop:
            first, after = self.shard_starts[shard], self.shard_starts[shard + 1]
            yield shard, max(start, first) - first, min(stop, after) - first
            shard += 1


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id of the vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= LARGEST_UINT16_VOCABULARY else np.uint32)


def write_shard(path: Path, documents: list[np.ndarray], vocab_size: int) -> dict[str, Any]:
    """Write one shard and return its manifest entry. Raises DataError for an id outside of the vocabulary."""
    tokens = np.concatenate(documents)
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise DataError(f"{path}: token id {int(tokens.max())} does not fit the vocabulary of {vocab_size}")
    ends = np.cumsum([len(document) for document in documents], dtype=np.uint64)
    body = tokens.astype(token_dtype(vocab_size)).tobytes()
    content = body + b"\0" * (-len(body) % 8) + ends.tobytes()
    aside = path.with_name(f".writing-{path.name}")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    return {
        "file": path.name,
        "documents": len(documents),
        "tokens": len(tokens),
        "bytes": len(content),
        "xxh3_128": xxhash.xxh3_128_hexdigest(content),
    }


def write_manifest(
    directory: Path, shards: list[dict[str, Any]], vocab_size: int, tokenizer_fingerprint: str, built_from: str
) -> None:
    """Finish a dataset directory. `built_from` identifies the settings and sources, for a later build to compare."""
    content = {
        "format": FORMAT,
        "dtype": token_dtype(vocab_size).name,
        "vocab_size": vocab_size,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "built_from": built_from,
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "shards": shards,
    }
    content["fingerprint"] = _fingerprint(content)
    aside = directory / ".writing-manifest.json"
    aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    aside.rename(directory / "manifest.json")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, checked for its own fingerprint. Raises DataError."""
    path = directory / "manifest.json"
    if not directory.is_dir():
        raise DataError(f"{directory}: no such dataset directory; make it with `millstream data build CONFIG`")
    if not path.is_file():
        raise DataError(f"{directory}: has no manifest.json, so it is unfinished; run `millstream data build` again")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        intact = manifest["fingerprint"] == _fingerprint(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is damaged ({error}); build the dataset again") from error
    if manifest["format"] != FORMAT:
        raise DataError(f"{path}: format {manifest['format']}, this version reads {FORMAT}")
    if not intact:
        raise DataError(f"{path}: was changed after the build (its fingerprint does not fit); build the dataset again")
    return manifest


def open_dataset(directory: Path, verify: bool = True) -> Dataset:
    """Memory-map a dataset directory. Sizes are always checked; with `verify` every shard is read and its checksum too.

    Raises DataError naming the shard and what is wrong with it.
    """
    manifest = read_manifest(directory)
    dtype = np.dtype(manifest["dtype"])
    token_arrays, end_arrays, starts = [], [], [0]
    for shard in manifest["shards"]:
        path = directory / shard["file"]
        if path.parent != directory:
            raise DataError(f"{directory}: the manifest names {shard['file']}, which is outside of the directory")
        if not path.is_file():
            raise DataError(f"{path}: is missing; copy it again or build the dataset again")
        if path.stat().st_size != shard["bytes"]:
            raise DataError(
                f"{path}: has {path.stat().st_size} bytes, the manifest says {shard['bytes']}: it is truncated or was "
                f"changed; copy it again or build the dataset again"
            )
        if verify:
            _verify(path, shard["xxh3_128"])
        content = np.memmap(path, dtype=np.uint8, mode="r")
        length = shard["tokens"] * dtype.itemsize
        token_arrays.append(content[:length].view(dtype))
        end_arrays.append(content[length + -length % 8 :].view(np.uint64))
        starts.append(starts[-1] + shard["tokens"])
    return Dataset(
        directory,
        manifest["tokens"],
        manifest["documents"],
        manifest["vocab_size"],
        manifest["fingerprint"],
        manifest["tokenizer_fingerprint"],
        manifest["shards"],
        starts,
        token_arrays,
        end_arrays,
    )


def _verify(path: Path, expected: str) -> None:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise DataError(
            f"{path}: is damaged (xxh3 {digest.hexdigest()}, the manifest says {expected}); copy it again or build the "
            f"dataset again"
        )


def _fingerprint(manifest: dict[str, Any]) -> str:
    """Of everything in the manifest but itself and `built_from`, which names paths."""
    content = {key: value for key, value in manifest.items() if key not in ("fingerprint", "built_from")}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
