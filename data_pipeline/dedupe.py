"""Drop documents that say (nearly) the same as an earlier one, in a corpus that no memory holds.

Each part of the corpus has a file of `signatures` (data_pipeline/minhash.py). Documents are numbered part by part, row
by row. A document is dropped if any earlier one has the same words (exact), or else if any earlier one that is not an
exact duplicate itself shares a band with it and has an estimated similarity of at least `config.similarity` (near).
"Any earlier", not "any earlier one that was kept": so each pair decides for itself, in any order and any process, and
of documents that are linked by a chain of pairs at least the first one stays.

It is an external sort with two kinds of tasks, for the exact hashes and then for the bands of what is left:

    sort   a slice of some part: its keys in order, with their rows, to a file in work_dir/keys
    match  a bucket, which is a range of one band's keys, over all slices: documents with the same key are compared, and
           the pairs found written to work_dir/pairs

and, last, a mask for each part. Documents with the same key are compared with the first GROUP_COMPARED of them only, so
a key of a million documents (a page that every site has) costs no more than 32 million comparisons, not their square;
documents that are close meet in other bands too. A task needs less than 500 MB whatever the size of the corpus, and its
result is a file written aside and renamed, so a search that was killed goes on where it was. On disk the keys take 12
bytes a document and band, 204 a document at a similarity of 0.8.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from configs.schema import DedupeConfig
from data_pipeline.minhash import choose_bands, estimated_similarity, signature_dtype, signatures
from data_pipeline.shards import DataError

KEPT, EXACT, NEAR = 0, 1, 2  # what a mask says of a row; all but 0 are dropped
GROUP_COMPARED = 32
SLICE_ROWS = 1 << 18  # rows sorted at once
BUCKET_BYTES = 64 << 20  # of keys and document numbers that are matched at once
PAIRS_COMPARED = 1 << 16  # at once
MASK_ROWS = 1 << 24  # a task of the last step writes the masks of parts of this many rows together
NUM_EXAMPLES = 3
BYTES_MATCHED = 16  # of a document in a bucket: key and number

Kind = Literal["exact", "near"]
CODES: dict[Kind, int] = {"exact": EXACT, "near": NEAR}
Row = tuple[int, int]  # part, row within it
Run = Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]]  # as the builtin `map`


@dataclass(frozen=True)
class Duplicates:
    """What `find_duplicates` found. A mask is an .npy file, (rows of the part,) uint8 of KEPT, EXACT and NEAR."""

    masks: list[Path]
    exact: int  # documents dropped
    near: int
    examples: dict[str, list[tuple[Row, Row]]]  # of each kind the first ones: the dropped document, an earlier one


@dataclass(frozen=True)
class Slice:
    """Rows of a part that are sorted together."""

    part: int
    first_row: int
    num_rows: int
    number: int  # of the first row, counted over all parts


@dataclass(frozen=True)
class Plan:
    """What the tasks must know of the corpus, from work_dir/plan.json."""

    work_dir: Path
    config: DedupeConfig
    bucket_bytes: int
    files: list[str]
    offsets: list[int]  # of each file's first row, in bytes
    part_starts: list[int]  # number of each part's first document, and how many there are in all
    slices: list[Slice]

    def num_bands(self, kind: Kind) -> int:
        return 1 if kind == "exact" else choose_bands(self.config.similarity).num_bands

    def buckets_per_band(self) -> int:
        return max(1, -(-self.part_starts[-1] * BYTES_MATCHED // self.bucket_bytes))

    def mask_groups(self) -> list[tuple[int, int]]:
        """(first part, last + 1) of the parts whose masks are written together."""
        cuts = [0]
        for part in range(len(self.files)):
            if self.part_starts[part + 1] - self.part_starts[cuts[-1]] >= MASK_ROWS:
                cuts.append(part + 1)
        return list(pairwise([*cuts, len(self.files)] if cuts[-1] < len(self.files) else cuts))


def find_duplicates(
    files: list[Path], config: DedupeConfig, work_dir: Path, run: Run = map, bucket_bytes: int = BUCKET_BYTES
) -> Duplicates:
    """Find the duplicates among all documents of `files`, the saved `signatures` of each part, in order.

    run: applies a function to numbers, like the builtin `map`, in any processes that see the same files, in any order.
    The result depends neither on it nor on `bucket_bytes`. `work_dir` is this function's own: a search of the same
    files goes on there, whatever else it holds is removed. Raises DataError for a file that does not hold signatures
    made with this config.
    """
    plan = _make_plan(files, config, work_dir, bucket_bytes)
    finished = work_dir / "result.json"
    if not finished.is_file():
        for kind in _kinds(config):
            _finish(run(partial(_sort_slice, work_dir, kind), range(len(plan.slices))))
            num_buckets = plan.num_bands(kind) * plan.buckets_per_band()
            _finish(run(partial(_match_bucket, work_dir, kind), range(num_buckets)))
        _finish(run(partial(_write_masks, work_dir), range(len(plan.mask_groups()))))
        result = {"dropped": _count(plan), "examples": {kind: _first_pairs(plan, kind) for kind in _kinds(config)}}
        _write(finished, json.dumps(result).encode())
    for folder in ("keys", "pairs"):
        shutil.rmtree(work_dir / folder, ignore_errors=True)
    result = json.loads(finished.read_text(encoding="utf-8"))
    examples = {kind: [(tuple(a), tuple(b)) for a, b in pairs] for kind, pairs in result["examples"].items()}
    masks = [_mask_path(work_dir, part) for part in range(len(files))]
    return Duplicates(masks, result["dropped"]["exact"], result["dropped"]["near"], examples)


def mask_duplicates(texts: Iterable[str], config: DedupeConfig) -> np.ndarray:
    """The mask that `find_duplicates` would give, (texts,) uint8; in memory, 272 bytes a text and 8 more a band."""
    rows = signatures(texts, config)
    mask = np.full(len(rows), KEPT, dtype=np.uint8)
    for kind in _kinds(config):
        left = np.flatnonzero(mask == KEPT)
        same = partial(_same_in_memory, rows, kind, config)
        for keys in _keys(rows[left], kind, config):
            mask[match(keys, left, 0, same)[0][0]] = CODES[kind]
    return mask


def match(
    keys: np.ndarray, numbers: np.ndarray, num_known: int, same: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Compare each document with the first GROUP_COMPARED ones of its key.

    keys (n,) uint64; numbers (n,) int64 of the documents; the first num_known were compared before and are earlier than
    the others. same(later, earlier), both numbers (pairs,), says which pairs are duplicates, bool. Returns the pairs
    found, (2, found) int64, each document in one pair at most, with the first that it equals; and the indices of what
    must be known when more documents are compared.
    """
    order = np.argsort(keys)  # the fast sort is not stable: groups are put in order after it
    in_order = keys[order]
    repeated = np.flatnonzero(in_order[1:] == in_order[:-1]) + 1  # all but the first of each group
    grouped = np.zeros(len(keys), dtype=bool)
    grouped[repeated] = grouped[repeated - 1] = True
    members = np.flatnonzero(grouped)
    order[members] = order[members][np.lexsort([numbers[order[members]], in_order[members]])]
    group_starts = np.flatnonzero(np.diff(repeated, prepend=-1) != 1)  # neighbours are of one group
    sizes = np.diff(group_starts, append=len(repeated))
    firsts = np.repeat(repeated[group_starts] - 1, sizes)
    ranks = repeated - firsts
    known = np.delete(order, repeated[ranks >= GROUP_COMPARED])
    new = order[repeated] >= num_known
    later, firsts, ranks = numbers[order[repeated[new]]], firsts[new], ranks[new]
    pairs = [np.empty((2, 0), dtype=np.int64)]
    for place in range(GROUP_COMPARED):
        earlier = numbers[order[firsts + place]]
        equal = same(later, earlier)
        pairs.append(np.stack([later[equal], earlier[equal]]))
        rest = ~equal & (ranks > place + 1)
        later, firsts, ranks = later[rest], firsts[rest], ranks[rest]
    return np.concatenate(pairs, axis=1), known


def _kinds(config: DedupeConfig) -> list[Kind]:
    return ["exact", "near"] if config.near else ["exact"]  # what has equal words is near as well


def _keys(rows: np.ndarray, kind: Kind, config: DedupeConfig) -> np.ndarray:
    """What duplicates share, (bands, documents) uint64: of exact ones half of their hash, of near ones some band."""
    if kind == "exact":
        return np.ascontiguousarray(rows["exact"][:, 0])[None]
    return choose_bands(config.similarity).keys(rows["values"])


def _are_duplicates(rows: np.ndarray, others: np.ndarray, kind: Kind, config: DedupeConfig) -> np.ndarray:
    if kind == "exact":
        return (rows["exact"] == others["exact"]).all(axis=1)
    return estimated_similarity(rows["values"], others["values"]) >= config.similarity - 1e-9  # rounding


def _same_in_memory(
    rows: np.ndarray, kind: Kind, config: DedupeConfig, later: np.ndarray, earlier: np.ndarray
) -> np.ndarray:
    return _are_duplicates(rows[later], rows[earlier], kind, config)


def _same_in_files(plan: Plan, kind: Kind, later: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    equal = np.empty(len(later), dtype=bool)
    for start in range(0, len(later), PAIRS_COMPARED):
        block = slice(start, start + PAIRS_COMPARED)
        numbers, places = np.unique(np.stack([later[block], earlier[block]]), return_inverse=True)
        rows = _read_rows(plan, numbers)
        equal[block] = _are_duplicates(rows[places[0]], rows[places[1]], kind, plan.config)
    return equal


# The tasks: functions of work_dir and a number, so that any process can do any of them.


def _sort_slice(work_dir: Path, kind: Kind, index: int) -> None:
    """Write a slice's keys, (bands, documents) uint64, each band in order, and their rows in the slice, uint32."""
    plan = _read_plan(work_dir)
    key_path, row_path = _key_paths(work_dir, kind, index)
    if row_path.is_file():
        return
    piece = plan.slices[index]
    left = np.ones(piece.num_rows, dtype=bool)
    if kind == "near":
        for dropped in _dropped_between(plan, "exact", piece.number, piece.number + piece.num_rows):
            left[dropped - piece.number] = False
    rows = np.flatnonzero(left)
    keys = _keys(_open_slice(plan, piece)[rows], kind, plan.config)
    order = np.argsort(keys, axis=1)
    _write(key_path, np.take_along_axis(keys, order, axis=1))
    _write(row_path, rows.astype(np.uint32)[order])  # last: it says that both are there


def _match_bucket(work_dir: Path, kind: Kind, bucket: int) -> None:
    """Write the pairs found in one bucket, (2, pairs) int64, in order of the dropped documents."""
    plan = _read_plan(work_dir)
    path = _pairs_path(work_dir, kind, bucket)
    if path.is_file():
        return
    same = partial(_same_in_files, plan, kind)
    found = [np.empty((2, 0), dtype=np.int64)]
    keys, numbers = np.empty(0, np.uint64), np.empty(0, np.int64)
    for new_keys, new_numbers in _read_bucket(plan, kind, bucket):
        num_known = len(keys)
        keys, numbers = np.concatenate([keys, new_keys]), np.concatenate([numbers, new_numbers])
        pairs, known = match(keys, numbers, num_known, same)
        found.append(pairs)
        keys, numbers = keys[known], numbers[known]
    pairs = np.concatenate(found, axis=1)
    _write(path, pairs[:, np.argsort(pairs[0])])


def _write_masks(work_dir: Path, group: int) -> None:
    plan = _read_plan(work_dir)
    first, stop = plan.mask_groups()[group]
    if _mask_path(work_dir, stop - 1).is_file():
        return
    start, end = plan.part_starts[first], plan.part_starts[stop]
    mask = np.full(end - start, KEPT, dtype=np.uint8)
    for kind in _kinds(plan.config):
        for dropped in _dropped_between(plan, kind, start, end):
            mask[dropped - start] = CODES[kind]
    for part in range(first, stop):
        content = io.BytesIO()
        np.save(content, mask[plan.part_starts[part] - start : plan.part_starts[part + 1] - start])
        _write(_mask_path(work_dir, part), content.getbuffer())


# What lies in work_dir.


def _make_plan(files: list[Path], config: DedupeConfig, work_dir: Path, bucket_bytes: int) -> Plan:
    """Write work_dir/plan.json, and empty work_dir first unless it holds this very plan. Raises DataError."""
    dtype = signature_dtype(config)
    offsets, num_rows, versions = [], [], []
    for file in files:
        try:
            rows = np.load(file, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{file}: is no file of signatures ({error}); build this part again") from error
        if not isinstance(rows, np.memmap) or rows.ndim != 1 or rows.dtype != dtype:
            raise DataError(f"{file}: holds {rows.dtype}, expected signatures, {dtype}; build this part again")
        offsets.append(rows.offset)
        num_rows.append(len(rows))
        versions.append(file.stat().st_mtime_ns)
    content = {
        "config": config.model_dump(),
        "bucket_bytes": bucket_bytes,
        "files": [str(file.absolute()) for file in files],
        "offsets": offsets,
        "num_rows": num_rows,
        "versions": versions,
    }
    path = work_dir / "plan.json"
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8")) != content:
        shutil.rmtree(work_dir, ignore_errors=True)
        for folder in ("keys", "pairs", "masks"):
            (work_dir / folder).mkdir(parents=True)
        _write(path, json.dumps(content).encode())
    return _read_plan(work_dir)


def _read_plan(work_dir: Path) -> Plan:
    content = json.loads((work_dir / "plan.json").read_text(encoding="utf-8"))
    part_starts = [0, *accumulate(content["num_rows"])]
    slices = [
        Slice(part, row, min(SLICE_ROWS, num_rows - row), part_starts[part] + row)
        for part, num_rows in enumerate(content["num_rows"])
        for row in range(0, num_rows, SLICE_ROWS)
    ]
    config = DedupeConfig(**content["config"])
    return Plan(work_dir, config, content["bucket_bytes"], content["files"], content["offsets"], part_starts, slices)


def _open_slice(plan: Plan, piece: Slice) -> np.ndarray:
    """A slice's signatures, memory-mapped: what was touched counts as memory until the array is let go."""
    dtype = signature_dtype(plan.config)
    offset = plan.offsets[piece.part] + piece.first_row * dtype.itemsize
    return np.memmap(plan.files[piece.part], dtype=dtype, mode="r", offset=offset, shape=(piece.num_rows,))


def _read_rows(plan: Plan, numbers: np.ndarray) -> np.ndarray:
    """The signatures of documents by number, ascending."""
    rows = np.empty(len(numbers), dtype=signature_dtype(plan.config))
    starts = np.array([piece.number for piece in plan.slices])
    owners, places = np.unique(np.searchsorted(starts, numbers, side="right") - 1, return_index=True)
    for owner, start, stop in zip(owners, places, [*places[1:], len(numbers)], strict=True):
        piece = plan.slices[owner]
        rows[start:stop] = _open_slice(plan, piece)[numbers[start:stop] - piece.number]
    return rows


def _read_bucket(plan: Plan, kind: Kind, bucket: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(keys, document numbers) of a bucket; at once or, where one key is too frequent, in several pieces."""
    num_bands, per_band = plan.num_bands(kind), plan.buckets_per_band()
    band, place = divmod(bucket, per_band)
    bounds = np.array([place * 2**64 // per_band, min((place + 1) * 2**64 // per_band, 2**64 - 1)], dtype=np.uint64)
    keys: list[np.ndarray] = []
    numbers: list[np.ndarray] = []
    for index, piece in enumerate(plan.slices):
        key_path, row_path = _key_paths(plan.work_dir, kind, index)
        length = key_path.stat().st_size // 8 // num_bands
        if not length:
            continue
        of_band = np.memmap(key_path, dtype=np.uint64, mode="r", offset=band * length * 8, shape=(length,))
        start, stop = np.searchsorted(of_band, bounds).tolist()
        if place == per_band - 1:
            stop = length
        keys.append(np.array(of_band[start:stop]))
        rows = np.fromfile(row_path, dtype=np.uint32, count=stop - start, offset=(band * length + start) * 4)
        numbers.append(rows + np.int64(piece.number))
        if sum(map(len, keys)) * BYTES_MATCHED >= 2 * plan.bucket_bytes:
            yield np.concatenate(keys), np.concatenate(numbers)
            keys, numbers = [], []
    if keys:
        yield np.concatenate(keys), np.concatenate(numbers)


def _dropped_between(plan: Plan, kind: Kind, start: int, stop: int) -> Iterator[np.ndarray]:
    """The numbers in [start, stop) of documents that pairs of this kind drop, bucket by bucket."""
    for pairs in _read_pairs(plan, kind):
        low, high = np.searchsorted(pairs[0], [start, stop]).tolist()
        yield np.array(pairs[0, low:high])


def _read_pairs(plan: Plan, kind: Kind) -> Iterator[np.ndarray]:
    for bucket in range(plan.num_bands(kind) * plan.buckets_per_band()):
        path = _pairs_path(plan.work_dir, kind, bucket)
        if path.stat().st_size:
            yield np.memmap(path, dtype=np.int64, mode="r").reshape(2, -1)


def _first_pairs(plan: Plan, kind: Kind) -> list[tuple[Row, Row]]:
    """Of the first few documents dropped, with the earliest document that each was found to equal."""
    heads = [np.array(pairs[:, :NUM_EXAMPLES]) for pairs in _read_pairs(plan, kind)]
    if not heads:
        return []
    dropped, earlier = np.concatenate(heads, axis=1)
    order = np.lexsort([earlier, dropped])
    _, firsts = np.unique(dropped[order], return_index=True)
    chosen = order[firsts[:NUM_EXAMPLES]]
    return [(_row(plan, a), _row(plan, b)) for a, b in zip(dropped[chosen], earlier[chosen], strict=True)]


def _row(plan: Plan, number: int) -> Row:
    part = bisect_right(plan.part_starts, number) - 1
    return part, int(number - plan.part_starts[part])


def _count(plan: Plan) -> dict[str, int]:
    counts = np.zeros(3, dtype=np.int64)
    for part in range(len(plan.files)):
        counts += np.bincount(np.load(_mask_path(plan.work_dir, part)), minlength=3)
    return {"exact": int(counts[EXACT]), "near": int(counts[NEAR])}


def _key_paths(work_dir: Path, kind: Kind, index: int) -> tuple[Path, Path]:
    return work_dir / "keys" / f"{kind}-{index:06d}.keys", work_dir / "keys" / f"{kind}-{index:06d}.rows"


def _pairs_path(work_dir: Path, kind: Kind, bucket: int) -> Path:
    return work_dir / "pairs" / f"{kind}-{bucket:06d}.pairs"


def _mask_path(work_dir: Path, part: int) -> Path:
    return work_dir / "masks" / f"part-{part:06d}.npy"


def _write(path: Path, content: bytes | memoryview | np.ndarray) -> None:
    """A file that is there is complete: it is written aside, synced and renamed."""
    aside = path.with_name(f".writing-{path.name}")
    with aside.open("wb") as file:
        file.write(np.ascontiguousarray(content).data if isinstance(content, np.ndarray) else content)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def _finish(results: Iterable[Any]) -> None:
    """Wait for all tasks: `map` begins only when it is asked for results."""
    for _ in results:
        pass
