"""Best-fit packing: rows as plain best-fit decreasing makes them, every token once, a plan that is whole or absent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import packing
from data_pipeline.packing import Plan, best_fit, open_plan, packing_report, pieces_of
from data_pipeline.shards import DataError, Dataset, open_dataset, write_manifest, write_shard
from tests.conftest import ROOT


def plain_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """Free places of the rows, item by item."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [place for place, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda place: rooms[place])] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


def make_dataset(folder: Path, shards: list[list[int]]) -> Dataset:
    """A dataset whose shards have documents of the given lengths; token k of the whole is k % 65,521."""
    folder.mkdir(parents=True)
    entries, first = [], 0
    for number, lengths in enumerate(shards):
        tokens = np.arange(first, first + sum(lengths)) % 65_521
        entries.append(write_shard(folder / f"shard-{number:05d}.tokens", [(tokens, np.array(lengths))], 65_521))
        first += len(tokens)
    write_manifest(folder, entries, 65_521, "none", "test")
    return open_dataset(folder)


def check(plan: Plan, shards: list[list[int]]) -> None:
    """Every token once, rows not too full, no document of at most seq_len cut."""
    seq_len = plan.seq_len
    ends = np.cumsum([length for lengths in shards for length in lengths])
    inputs = np.minimum(plan.lengths, seq_len)
    tokens = np.concatenate([np.arange(a, a + n) for a, n in zip(plan.starts, inputs, strict=True)])
    assert np.array_equal(np.sort(tokens), np.arange(ends[-1]))
    for row in range(plan.num_rows):
        mine = slice(plan.first_pieces[row], plan.first_pieces[row + 1])
        assert 0 < inputs[mine].sum() <= seq_len
    starts = np.concatenate([[0], ends[:-1]])
    document = np.searchsorted(starts, plan.starts, side="right") - 1
    is_whole = (plan.starts == starts[document]) & (plan.lengths == (ends - starts)[document])
    is_long = (ends - starts)[document] > seq_len
    assert (is_whole | is_long).all()
    # a piece is a stretch of seq_len of a long document, or what is left of it; one more token where it goes on
    assert ((plan.starts - starts[document])[is_long] % seq_len == 0).all()
    left = ends[document] - plan.starts
    assert np.array_equal(plan.lengths[is_long], np.minimum(left, seq_len + 1)[is_long])


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 40).flatmap(lambda most: st.tuples(st.just(most), st.lists(st.integers(1, most), max_size=80))))
def test_rows_are_those_of_plain_best_fit_decreasing(given_case):
    capacity, lengths = given_case
    rows, num_rows = best_fit(np.array(lengths, dtype=np.int64), capacity)
    rooms = capacity - np.bincount(rows, weights=lengths, minlength=num_rows) if lengths else np.empty(0)
    assert sorted(rooms) == plain_best_fit_decreasing(lengths, capacity)


def test_rows_are_those_of_plain_best_fit_decreasing_for_real_lengths():
    lengths = np.minimum(np.random.default_rng(0).lognormal(5.5, 1.0, 4000).astype(np.int64) + 1, 1024)
    rows, num_rows = best_fit(lengths, 1024)
    rooms = 1024 - np.bincount(rows, weights=lengths, minlength=num_rows)
    assert sorted(rooms) == plain_best_fit_decreasing(lengths.tolist(), 1024)


def test_work_does_not_grow_with_the_number_of_documents():
    histogram = np.random.default_rng(0).integers(0, 30, 513)
    histogram[0] = 0
    few, many = packing._fill_rows(histogram, 512), packing._fill_rows(histogram * 1_000_000, 512)
    assert many[1] > 900_000 * few[1] and len(many[0]) < 4 * len(few[0])


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 20))
def test_pieces_hold_every_token_once_and_cut_only_long_documents(lengths, seq_len):
    starts = np.cumsum([0, *lengths[:-1]])
    sizes, piece_starts, piece_lengths = pieces_of(starts, np.array(lengths), seq_len)
    first = np.concatenate([[0], np.cumsum(sizes)])
    check(Plan(seq_len, first, piece_starts, piece_lengths, np.array([0, len(sizes)])), [lengths])


@pytest.mark.parametrize("chunk_tokens", [64, 1 << 23])
def test_plan_on_disk_holds_every_token_once(tmp_path, monkeypatch, chunk_tokens):
    monkeypatch.setattr(packing, "CHUNK_TOKENS", chunk_tokens)
    monkeypatch.setattr(packing, "CHUNK_ROWS", 2)
    rng = np.random.default_rng(1)
    shards = [rng.integers(1, 70, rng.integers(1, 90)).tolist() for _ in range(6)] + [[1000], [1]]
    dataset = make_dataset(tmp_path / "data", shards)
    plan = open_plan(dataset, 32, tmp_path / "plans")
    check(plan, shards)
    assert plan.block_starts[0] == 0 and plan.block_starts[-1] == plan.num_rows
    # the rows of a block are of a run of shards that no other block touches
    shard = np.searchsorted(dataset.shard_starts, plan.starts, side="right") - 1
    block = np.searchsorted(plan.block_starts, np.repeat(np.arange(plan.num_rows), np.diff(plan.first_pieces)), "right")
    assert all(len(np.unique(block[shard == number])) == 1 for number in range(len(shards)))
    assert len(plan.block_starts) - 1 == (1 if chunk_tokens > 1000 else len(np.unique(block)))


def test_second_opening_reads_the_same_plan_and_writes_nothing(tmp_path):
    dataset = make_dataset(tmp_path / "data", [[5, 9, 3, 30]])
    made = open_plan(dataset, 8, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    (tmp_path / f"{dataset.fingerprint}-8.lock").unlink()
    again = open_plan(dataset, 8, tmp_path)
    assert not list(tmp_path.glob("*.lock"))  # so the folder may be read-only
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == before
    assert np.array_equal(made.starts, again.starts) and isinstance(again.starts, np.memmap)


def test_any_changed_byte_of_a_plan_is_noticed(tmp_path):
    dataset = make_dataset(tmp_path / "data", [[5, 9, 3, 30]])
    open_plan(dataset, 8, tmp_path)
    files = list((tmp_path / f"{dataset.fingerprint}-8").iterdir())
    assert len(files) == 4
    rng = np.random.default_rng(0)
    for file in files:
        intact = file.read_bytes()
        for place in rng.integers(0, len(intact), 40).tolist():
            damaged = bytearray(intact)
            damaged[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            with pytest.raises(DataError, match=r"best-fit packing is damaged .*; remove it, it is made anew"):
                open_plan(dataset, 8, tmp_path)
        file.write_bytes(intact)
    open_plan(dataset, 8, tmp_path)


def test_processes_that_start_at_once_make_one_plan(tmp_path):
    rng = np.random.default_rng(0)
    dataset = make_dataset(tmp_path / "data", [rng.integers(1, 400, 20_000).tolist()])
    with multiprocessing.get_context("fork").Pool(4) as pool:
        rows = pool.starmap(rows_of_plan, [(dataset.path, tmp_path / "plans")] * 4)
    assert len(set(rows)) == 1
    assert [path.suffix for path in (tmp_path / "plans").iterdir() if path.is_dir()] == [""]


def rows_of_plan(data_dir: Path, folder: Path) -> tuple[int, int]:
    dataset = open_dataset(data_dir)
    plan = open_plan(dataset, 128, folder)
    return plan.num_rows, (folder / f"{dataset.fingerprint}-128" / "plan.json").stat().st_ino


def test_killed_maker_leaves_no_plan_and_the_next_one_makes_it(tmp_path):
    dataset = make_dataset(tmp_path / "data", [[3] * 50_000] * 4)
    program = (
        "import sys, time; from pathlib import Path; from data_pipeline import packing, shards\n"
        "real = packing.pieces_of\n"
        "packing.CHUNK_TOKENS = packing.CHUNK_ROWS = 1024\n"
        "packing.pieces_of = lambda *given: (time.sleep(0.05), real(*given))[1]\n"
        "packing.open_plan(shards.open_dataset(sys.argv[1]), 16, Path(sys.argv[2]))\n"
    )
    plans = tmp_path / "plans"
    process = subprocess.Popen([sys.executable, "-c", program, str(dataset.path), str(plans)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list(plans.glob(".writing-*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(plans.glob(".writing-*")) and not list(plans.glob("[0-9a-f]*/plan.json"))
    check(open_plan(dataset, 16, plans), [[3] * 50_000] * 4)
    assert not list(plans.glob(".writing-*"))


def test_folder_that_cannot_be_written_is_named_with_the_setting(tmp_path):
    dataset = make_dataset(tmp_path / "data", [[5, 9]])
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/packing: .* cannot be written .* set data.cache.dir"):
        open_plan(dataset, 8, tmp_path / "file" / "packing")


def test_report_agrees_with_the_slow_obvious_way(tmp_path):
    lengths = np.random.default_rng(2).integers(1, 60, 300).tolist()
    report = packing_report(make_dataset(tmp_path / "data", [lengths[:100], lengths[100:]]), 32)
    ends = np.cumsum(lengths)
    cut = sum(
        len({token // 32 for token in range(end - length, end)}) > 1 for length, end in zip(lengths, ends, strict=True)
    )
    rows = sum(length // 32 for length in lengths)
    rows += len(plain_best_fit_decreasing([length % 32 for length in lengths if length % 32], 32))
    assert report["documents"] == 300 and report["tokens"] == ends[-1]
    assert report["concatenate"] == {"rows": (ends[-1] - 1) // 32, "truncated": cut / 300, "padding": 0.0}
    assert report["best_fit"]["rows"] == rows
    assert report["best_fit"]["truncated"] == sum(length > 32 for length in lengths) / 300
    assert report["best_fit"]["padding"] == pytest.approx(1 - ends[-1] / (rows * 32))


class Simulated:
    """So many documents of three tokens, without their tokens; as much of a Dataset as packing needs."""

    def __init__(self, num_documents: int) -> None:
        self.num_documents, self.num_tokens, self.fingerprint = num_documents, 3 * num_documents, "simulated"
        self.shard_starts = [0, self.num_tokens]

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        return np.arange(-(-start // 3) * 3, stop, 3)


def test_memory_stays_below_one_gib_for_fifty_million_tiny_documents(tmp_path):
    program = (
        "import re, sys; from pathlib import Path; from data_pipeline.packing import open_plan\n"
        "from tests.data_pipeline.test_packing import Simulated\n"
        "plan = open_plan(Simulated(50_000_000), 1024, Path(sys.argv[1]))\n"
        # not getrusage: its peak is that of the process that started this one, until it is exceeded
        "print(plan.num_rows, re.search(r'VmHWM:\\s*(\\d+) kB', Path('/proc/self/status').read_text())[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    num_rows, kib = map(int, done.stdout.split())
    assert num_rows >= 50_000_000 / 341 and kib < 1 << 20
