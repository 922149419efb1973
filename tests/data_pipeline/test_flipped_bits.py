"""No byte of a dataset directory can change unnoticed: bits are flipped one by one, in every file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs.schema import TokenizerConfig
from data_pipeline.shards import BLOCK_BYTES, DataError, open_dataset, verify_dataset, write_manifest, write_shard
from data_pipeline.tokenizer import fingerprint, make_tokenizer, save_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog"
NUM_DOCUMENTS, ROW = 4000, 257
SHARDS = ["shard-00000.tokens", "shard-00001.tokens"]
# Bits flipped in each part of the shards; all bytes of the other files, and all bits of the manifest
IN_TOKENS, IN_ENDS, IN_SUMS = 150, 100, 40


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Two shards with 6 bytes of padding each, a tokenizer and a report."""
    folder = tmp_path_factory.mktemp("data") / "train"
    folder.mkdir()
    rng = np.random.default_rng(0)
    tokenizer = make_tokenizer(TokenizerConfig(type="characters"), [TEXT], folder)
    save_tokenizer(tokenizer, folder, 128)
    (folder / "stages.json").write_text('{"quality": {"seen": 1000, "dropped": 7}}')
    entries = []
    for name in SHARDS:
        lengths = rng.integers(1, 40, NUM_DOCUMENTS)
        lengths[0] += (1 - lengths.sum()) % 4  # in tokens, of 2 bytes
        ids = rng.integers(0, tokenizer.get_vocab_size(), lengths.sum())
        entries.append(write_shard(folder / name, [(ids, lengths)], tokenizer.get_vocab_size()))
    write_manifest(folder, entries, tokenizer.get_vocab_size(), fingerprint(tokenizer), "built from")
    return folder


def read_all(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """All tokens and document starts, as training reads them: rows, gathered."""
    data = open_dataset(folder)
    starts = np.append(np.arange(0, data.num_tokens - ROW, ROW), data.num_tokens - ROW)
    rows, columns = data.document_starts_many(starts, ROW)
    return data.gather(starts, ROW), np.stack([rows, columns])


def parts_of(shard: Path) -> dict[str, range]:
    size = shard.stat().st_size
    num_blocks = -(-size // BLOCK_BYTES)
    sums_at = size - 8 * num_blocks
    ends_at = sums_at - 8 * NUM_DOCUMENTS
    return {
        "tokens": range(ends_at - 8),
        "padding": range(ends_at - 6, ends_at),
        "ends": range(ends_at, sums_at),
        "sums": range(sums_at, size),
    }


def flipped(file: Path, byte: int, bit: int, check: Callable[[], None]) -> None:
    """Do `check` while one bit of `file` is another."""
    with file.open("r+b") as opened:
        opened.seek(byte)
        original = opened.read(1)
        opened.seek(byte)
        opened.write(bytes([original[0] ^ 1 << bit]))
        opened.flush()
        try:
            check()
        finally:
            opened.seek(byte)
            opened.write(original)


def assert_unreadable(directory: Path, file: Path, byte: int | None = None) -> None:
    with pytest.raises(DataError) as caught:
        read_all(directory)
    assert f"{file}: " in str(caught.value)
    assert byte is None or holds(str(caught.value), byte)


def assert_named_by_verify(directory: Path, file: Path, byte: int | None = None) -> None:
    faults = verify_dataset(directory)
    assert len(faults) == 1 and f"{file}: " in faults[0]
    assert byte is None or holds(faults[0], byte)


def holds(message: str, byte: int) -> bool:
    """Whether the stretch of bytes that a message names is where the damage is."""
    first, last = message.partition("between bytes ")[2].partition(";")[0].split(" and ")
    return int(first) <= byte <= int(last) < int(first) + BLOCK_BYTES


def test_intact_directory_has_no_faults_and_every_byte_is_read(directory):
    seen: list[int] = []
    assert verify_dataset(directory, seen.append) == []
    sizes = {path.name: path.stat().st_size for path in directory.iterdir()}
    assert sum(seen) == sum(sizes.values()) - sizes["manifest.json"]
    assert set(sizes) == {*SHARDS, "manifest.json", "stages.json", "tokenizer.json", "tokenizer_config.json"}


def test_every_bit_of_the_manifest_counts(directory):
    file = directory / "manifest.json"
    for byte in range(file.stat().st_size):
        for bit in range(8):
            flipped(file, byte, bit, lambda: assert_unreadable(directory, file))
        flipped(file, byte, byte % 8, lambda: assert_named_by_verify(directory, file))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "stages.json"])
def test_every_byte_of_the_small_files_counts(directory, name):
    file = directory / name
    for byte in range(file.stat().st_size):
        flipped(file, byte, byte % 8, lambda: assert_unreadable(directory, file))
        flipped(file, byte, byte % 8, lambda: assert_named_by_verify(directory, file))


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize("part", ["tokens", "padding", "ends", "sums"])
def test_bits_of_shards_count(directory, name, part):
    file = directory / name
    places = parts_of(file)[part]
    rng = np.random.default_rng(list(part.encode()))
    count = {"tokens": IN_TOKENS, "ends": IN_ENDS}.get(part, IN_SUMS)
    chosen = {(int(rng.choice(places)), int(rng.integers(8))) for _ in range(count)} | {(places[0], 0), (places[-1], 7)}
    for byte, bit in chosen:
        flipped(file, byte, bit, lambda byte=byte: assert_unreadable(directory, file, byte))
        flipped(file, byte, bit, lambda byte=byte: assert_named_by_verify(directory, file, byte))


def test_what_is_read_beside_damage_is_what_was_written(directory):
    intact = open_dataset(directory)
    expected = intact.tokens(0, intact.num_tokens).copy()
    file = directory / SHARDS[0]

    def check() -> None:
        data, damaged = open_dataset(directory), 0
        for start in range(0, data.num_tokens - 100, 100):
            try:
                row = data.gather(np.array([start]), 100)[0]
            except DataError:
                damaged += 1
            else:
                assert np.array_equal(row, expected[start : start + 100])
        assert damaged == pytest.approx(BLOCK_BYTES / 2 / 100, abs=2)  # the rows that touch this block, no others

    flipped(file, BLOCK_BYTES + 77, 3, check)


def test_verify_names_all_faults_at_once(directory, tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    for path in directory.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = bytearray((folder / SHARDS[0]).read_bytes())
    for byte in (0, 2 * BLOCK_BYTES + 1, 3 * BLOCK_BYTES - 1, 3 * BLOCK_BYTES):
        content[byte] ^= 16
    (folder / SHARDS[0]).write_bytes(content)
    (folder / SHARDS[1]).write_bytes((folder / SHARDS[1]).read_bytes()[:-1])
    (folder / "tokenizer.json").unlink()
    (folder / "notes.txt").write_text("mine")
    (folder / "more").mkdir()
    faults = verify_dataset(folder)
    again = "copy it again or build the dataset again"
    assert faults[:2] == [
        f"{folder / SHARDS[0]}: is damaged between bytes {first} and {last}; {again}"
        for first, last in [(0, BLOCK_BYTES - 1), (2 * BLOCK_BYTES, 4 * BLOCK_BYTES - 1)]
    ]
    size = (directory / SHARDS[1]).stat().st_size
    assert f"{folder / SHARDS[1]}: has {size - 1} bytes, the manifest says {size}" in faults[2]
    assert f"{folder}/tokenizer.json: cannot be read (No such file or directory)" in faults[3]
    assert [fault.partition(": ")[0] for fault in faults[4:]] == [f"{folder}/more", f"{folder}/notes.txt"]
    assert all("is not in the manifest; remove it" in fault for fault in faults[4:])


def test_exchanged_shards_are_noticed(directory, tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    for path in directory.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    lengths, ids = np.array([500]), np.arange(500) % 20
    twins = [
        write_shard(folder / name, [(ids + shift, lengths)], 30) for name, shift in zip(SHARDS, (0, 1), strict=True)
    ]
    write_manifest(folder, twins, 30, "tokenizer", "built from")
    first, second = (folder / name for name in SHARDS)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert len(verify_dataset(folder)) == 2
    with pytest.raises(DataError, match=SHARDS[0]):
        open_dataset(folder).tokens(0, 10)
