"""Datasets of Megatron and MDS, written by these systems themselves: what they read back, and damage that is named.

data/foreign/make.py says how the files were made.
"""

from __future__ import annotations

import bz2
import gzip
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import foreign, pieces
from data_pipeline.foreign import open_mds, read_mds, read_megatron
from data_pipeline.shards import DataError

FOLDER = Path(__file__).parent / "data" / "foreign"
MEGATRON = json.loads((FOLDER / "megatron.json").read_text())
MDS = json.loads((FOLDER / "mds.json").read_text())
VOCAB_SIZE = 100_000  # the fixtures' largest id is 99,999
UINT16 = np.dtype(np.uint16)


def documents(found: pieces.Pieces) -> list[list[int]]:
    """The documents of pieces, each of which has to be what it should be."""
    result = []
    for tokens, lengths in found:
        assert tokens.dtype == np.uint32 and lengths.dtype == np.int64
        assert lengths.min() > 0 and lengths.sum() == len(tokens)
        result += [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    return result


def megatron(prefix: Path, vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    return documents(read_megatron(prefix, vocab_size, lambda num_bytes: None))


def mds(folder: Path, column: str = "tokens", dtype: np.dtype | None = UINT16) -> list[list[int]]:
    return documents(read_mds(open_mds(folder), VOCAB_SIZE, column, dtype, spell, lambda num_bytes: None))


def spell(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """A stand-in for a tokenizer: the characters' numbers."""
    ids = [np.array([min(ord(sign), 50_000) for sign in text], np.uint32) for text in texts]
    return np.concatenate(ids), np.array([len(text) for text in ids])


@pytest.mark.parametrize("name", MEGATRON)
def test_megatron_documents_are_those_that_megatron_reads(name):
    assert megatron(FOLDER / "megatron" / name) == [document for document in MEGATRON[name] if document]


@pytest.mark.parametrize("name", [name for name in MDS if name not in ("br", "str")])
def test_mds_samples_are_those_that_streaming_reads(name):
    assert mds(FOLDER / "mds" / name) == MDS[name]


def test_mds_text_is_that_which_streaming_reads():
    assert mds(FOLDER / "mds" / "str", "text") == [spell([text])[0].tolist() for text in MDS["str"]]


def test_documents_do_not_depend_on_how_much_is_read_at_once(monkeypatch):
    monkeypatch.setattr(foreign, "PIECE_DOCUMENTS", 3)
    for size in (1, 20, 1000):
        monkeypatch.setattr(pieces, "PIECE_TOKENS", size)
        monkeypatch.setattr(foreign, "PIECE_TOKENS", size)
        assert megatron(FOLDER / "megatron" / "joined") == [document for document in MEGATRON["joined"] if document]
        assert mds(FOLDER / "mds" / "zstd") == MDS["zstd"]


def test_pieces_have_about_the_size_they_should_have(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_TOKENS", 40)
    sizes = [len(tokens) for tokens, _ in read_megatron(FOLDER / "megatron" / "joined", VOCAB_SIZE, lambda _: None)]
    longest = max(map(len, MEGATRON["joined"]))
    assert len(sizes) > 5 and max(sizes) == longest  # a document is never divided
    assert sum(sizes) == sum(map(len, MEGATRON["joined"]))


@pytest.mark.parametrize("name", ["int64", "zstd", "bytes", "parts"])
def test_bytes_that_were_read_are_reported(name):
    reported: list[int] = []
    if name in MEGATRON:
        list(read_megatron(FOLDER / "megatron" / name, VOCAB_SIZE, reported.append))
        expected = (FOLDER / "megatron" / f"{name}.bin").stat().st_size
    else:
        shards = open_mds(FOLDER / "mds" / name)
        list(read_mds(shards, VOCAB_SIZE, "tokens", UINT16, spell, reported.append))
        expected = sum(shard.file.stat().st_size for shard in shards)
    assert sum(reported) == expected and min(reported) > 0


@pytest.mark.parametrize("name", ["uint16.bin", "uint16.idx"])
def test_either_of_megatrons_two_files_may_be_named(name):
    assert megatron(FOLDER / "megatron" / name) == MEGATRON["uint16"]


def test_decompressed_file_beside_a_compressed_one_is_read(tmp_path):
    folder = copy_of("mds/br", tmp_path)
    content = gzip.decompress((FOLDER / "mds" / "gz" / "shard.00000.mds.gz").read_bytes())
    columns = (b'"br:5"', b'"gz"')  # a shard repeats what index.json says of it
    raw = content.replace(columns[1], columns[0])
    shift = len(raw) - len(content)
    (count,) = struct.unpack_from("<I", raw)
    places = np.frombuffer(raw, "<u4", count + 1, 4) + shift
    (folder / "shard.00000.mds").write_bytes(raw[:4] + places.astype("<u4").tobytes() + raw[4 * (count + 2) :])
    assert mds(folder) == MDS["br"] == MDS["gz"]


# What is wrong is named


def copy_of(name: str, tmp_path: Path) -> Path:
    """A copy of a fixture: its folder, or of Megatron's two files the prefix."""
    if name.startswith("megatron"):
        for suffix in (".idx", ".bin"):
            shutil.copy(FOLDER / f"{name}{suffix}", tmp_path)
        return tmp_path / Path(name).name
    return shutil.copytree(FOLDER / name, tmp_path / Path(name).name)


def error_of(read: Callable[..., Any], *given: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(*given)
    return str(caught.value)


def edit(file: Path, change: Callable[[bytearray], object]) -> None:
    content = bytearray(file.read_bytes())
    change(content)
    file.write_bytes(content)


MEGATRON_DAMAGE = {  # suffix, change, what the error says
    "no index": (".idx", lambda content: content.clear(), "is not the index"),
    "another file": (".idx", lambda content: content.__setitem__(slice(0, 6), b"TNTIDX"), "is not the index"),
    "header cut": (".idx", lambda content: content.__delitem__(slice(30, None)), "is not the index"),
    "version": (".idx", lambda content: content.__setitem__(9, 2), "is of version 2"),
    "floats": (".idx", lambda content: content.__setitem__(17, 7), "tokens of type 7"),
    "unknown type": (".idx", lambda content: content.__setitem__(17, 99), "tokens of type 99"),
    "index cut": (".idx", lambda content: content.__delitem__(slice(-1, None)), "by its own numbers"),
    "index longer": (".idx", lambda content: content.extend(b"123"), "by its own numbers"),
    "many sequences": (".idx", lambda content: struct.pack_into("<Q", content, 18, 2**63), "by its own numbers"),
    "negative length": (".idx", lambda content: struct.pack_into("<i", content, 34, -5), "has a sequence of -5"),
    "another length": (".idx", lambda content: struct.pack_into("<i", content, 34, 999), "int32.bin: has 744 bytes"),
    "moved sequence": (".idx", lambda content: struct.pack_into("<q", content, 34 + 48 + 8, 1), "do not follow"),
    "first document": (".idx", lambda content: struct.pack_into("<q", content, -104, 1), "do not hold all"),
    "last document": (".idx", lambda content: struct.pack_into("<q", content, -8, 11), "do not hold all"),
    "documents back": (".idx", lambda content: struct.pack_into("<q", content, -24, 2), "do not follow"),
    "document far": (".idx", lambda content: struct.pack_into("<q", content, -24, 2**40), "do not follow"),
    "tokens cut": (".bin", lambda content: content.__delitem__(slice(-1, None)), "its index says"),
    "tokens missing": (".bin", lambda content: content.clear(), "its index says"),
}


@pytest.mark.parametrize("damage", MEGATRON_DAMAGE)
def test_damage_of_a_megatron_dataset_is_named(damage, tmp_path):
    suffix, change, expected = MEGATRON_DAMAGE[damage]
    prefix = copy_of("megatron/int32", tmp_path)
    edit(prefix.with_suffix(suffix), change)
    message = error_of(megatron, prefix)
    assert expected in message and str(prefix) in message


def test_missing_file_of_a_megatron_dataset_is_named(tmp_path):
    prefix = copy_of("megatron/int32", tmp_path)
    prefix.with_suffix(".bin").unlink()
    assert "int32.bin: there is no such file" in error_of(megatron, prefix)


def test_dataset_without_documents_gives_none(tmp_path):
    index = struct.pack("<9sQBQQq", foreign.MEGATRON_HEADER, 1, 4, 0, 1, 0)
    (tmp_path / "empty.idx").write_bytes(index)
    (tmp_path / "empty.bin").write_bytes(b"")
    assert megatron(tmp_path / "empty") == []


@pytest.mark.parametrize("vocab_size", [65_499, 100])
def test_id_outside_of_the_vocabulary_is_named_with_its_file(vocab_size):
    message = error_of(megatron, FOLDER / "megatron" / "uint16", vocab_size)
    assert "uint16.bin: holds the token id 65499" in message and f"vocabulary has {vocab_size}" in message


def test_negative_id_is_refused(tmp_path):
    prefix = copy_of("megatron/uint8", tmp_path)
    edit(prefix.with_suffix(".idx"), lambda content: content.__setitem__(17, 2))  # int8
    assert "uint8.bin: holds the token id -" in error_of(megatron, prefix)


def edit_index(folder: Path, change: Callable[[Any], object]) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def in_shard(**values: Any) -> Callable[[Any], object]:
    return lambda index: index["shards"][0].update(values)


MDS_INDEX_DAMAGE = {  # change, what the error says
    "no shards": (lambda index: index.pop("shards"), "index.json: shards: Field required"),
    "version": (lambda index: index.update(version=3), "index.json: version"),
    "format": (in_shard(format="csv"), "shards.0.format"),
    "samples": (in_shard(samples="many"), "shards.0.samples"),
    "more samples": (in_shard(samples=25), "has 16 samples, index.json says 25"),
    "too many samples": (in_shard(samples=2**40), "which cannot be"),
    "raw file": (in_shard(raw_data=None), "shards.0.raw_data"),
    "outside": (lambda i: i["shards"][0]["raw_data"].update(basename="../../etc/passwd"), "outside of the folder"),
    "absolute": (lambda i: i["shards"][0]["raw_data"].update(basename="/etc/passwd"), "outside of the folder"),
    "nul": (lambda i: i["shards"][0]["raw_data"].update(basename="a\0b"), "is missing"),
    "long name": (lambda i: i["shards"][0]["raw_data"].update(basename="a" * 300), "is missing"),
    "folder": (lambda i: i["shards"][0]["raw_data"].update(basename="."), "is missing"),
    "missing file": (lambda i: i["shards"][0]["raw_data"].update(basename="shard.7.mds"), "shard.7.mds: is missing"),
    "size": (lambda i: i["shards"][0]["raw_data"].update(bytes=2025), "index.json says 2025"),
    "hash": (lambda i: i["shards"][0]["raw_data"]["hashes"].update(sha1="00"), "its sha1 is"),
    "fewer columns": (in_shard(column_sizes=[]), "does not give each column"),
    "other sizes": (in_shard(column_sizes=[8, None, 4, 2]), "sample 0, column tokens: its columns have"),
    "pickle": (in_shard(column_encodings=["int", "float32", "str", "pkl"]), "column tokens holds pkl"),
    "floats": (in_shard(column_encodings=["int", "float32", "str", "ndarray:float32"]), "arrays of float32"),
    "no type": (in_shard(column_encodings=["int", "float32", "str", "ndarray:"]), "arrays of  hold no ids"),
    "shape": (in_shard(column_encodings=["int", "float32", "str", "ndarray:uint16:x"]), "invalid literal"),
}


@pytest.mark.parametrize("damage", MDS_INDEX_DAMAGE)
def test_damage_of_an_mds_index_is_named(damage, tmp_path):
    change, expected = MDS_INDEX_DAMAGE[damage]
    folder = copy_of("mds/bytes", tmp_path)
    edit_index(folder, change)
    message = error_of(mds, folder)
    assert expected in message and str(folder) in message


def test_compressed_file_outside_of_the_folder_is_refused(tmp_path):
    folder = copy_of("mds/zstd", tmp_path)
    edit_index(folder, lambda index: index["shards"][0]["zip_data"].update(basename="a/../../b"))
    assert "names a/../../b, which is outside of the folder" in error_of(mds, folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"[" * 100_000, b'{"version": 2, "shards": 3}'])
def test_index_that_is_none_is_named(tmp_path, content):
    (tmp_path / "index.json").write_bytes(content)
    assert f"{tmp_path}/index.json: " in error_of(mds, tmp_path)


def test_folder_without_index_is_named(tmp_path):
    assert "has no index.json" in error_of(mds, tmp_path)


def test_missing_column_is_named_with_those_that_are_there():
    message = error_of(mds, FOLDER / "mds" / "bytes", "text")
    assert "shard.00000.mds: has no column text but id, score, source, tokens" in message


def test_bytes_without_a_type_are_refused():
    assert "dtype=uint16" in error_of(mds, FOLDER / "mds" / "bytes", "tokens", None)


def test_bytes_that_are_no_numbers_of_the_type_are_refused():
    message = error_of(mds, FOLDER / "mds" / "bytes", "tokens", np.dtype(np.int64))
    assert "shard.00000.mds: sample 0, column tokens: buffer size must be a multiple" in message


@pytest.mark.parametrize("shape", [[0, 0], [3], [2, 2]])
def test_array_of_another_shape_than_it_says_is_refused(shape):
    value = bytes([len(shape) << 2, *shape]) + np.arange(2, dtype=np.int32).tobytes()
    with pytest.raises(ValueError, match="cannot reshape array of size 2"):
        foreign._decode("ndarray:int32", None, value)


def test_text_that_is_not_utf8_is_named_with_its_sample(tmp_path):
    folder = copy_of("mds/str", tmp_path)
    edit(folder / "shard.00001.mds", lambda content: content.__setitem__(-1, 0xFF))
    message = error_of(mds, folder, "text")
    assert "shard.00001.mds: sample " in message and "codec can't decode" in message


def test_unknown_compression_is_named_with_its_cure():
    message = error_of(mds, FOLDER / "mds" / "br")
    assert "br:5" in message and "decompressed file beside it, as shard.00000.mds" in message


REPACK = {"zstd": zstandard.ZstdCompressor().compress, "gz": gzip.compress, "bz2": bz2.compress}
UNPACK = {
    "zstd": lambda data: zstandard.ZstdDecompressor().decompress(data),
    "gz": gzip.decompress,
    "bz2": bz2.decompress,
}
RAW_DAMAGE = {
    "cut": lambda raw: raw[:-3],
    "longer": lambda raw: raw + b"x",
    "nothing": lambda raw: b"",
    "another count": lambda raw: b"\x05" + raw[1:],
    "endless": lambda raw: raw + bytes(20_000_000),  # a few kB when compressed
}


@pytest.mark.parametrize("damage", RAW_DAMAGE)
@pytest.mark.parametrize("name", ["zstd", "gz", "bz2"])
def test_damage_inside_of_a_compressed_shard_is_named(name, damage, tmp_path):
    folder = copy_of(f"mds/{name}", tmp_path)
    file = next(folder.glob(f"shard.00000.mds.{name}"))
    packed = REPACK[name](RAW_DAMAGE[damage](UNPACK[name](file.read_bytes())))
    file.write_bytes(packed)
    edit_index(folder, lambda index: index["shards"][0]["zip_data"].update(bytes=len(packed), hashes={}))
    assert f"{file}: " in error_of(mds, folder)


@pytest.mark.parametrize("name", ["zstd", "gz", "bz2"])
def test_compressed_shard_that_is_cut_off_is_named(name, tmp_path):
    folder = copy_of(f"mds/{name}", tmp_path)
    file = next(folder.glob(f"shard.00000.mds.{name}"))
    packed = file.read_bytes()[:-20]
    file.write_bytes(packed)
    edit_index(folder, lambda index: index["shards"][0]["zip_data"].update(bytes=len(packed), hashes={}))
    assert f"{file}: is damaged" in error_of(mds, folder)


# Any damage: an error, or other ids, and never anything else


def test_any_flipped_bit_of_a_megatron_index_is_an_error_or_moves_documents(tmp_path):
    prefix = copy_of("megatron/sequences", tmp_path)
    file = prefix.with_suffix(".idx")
    whole = file.read_bytes()
    tokens = [token for document in MEGATRON["sequences"] for token in document]
    errors = 0
    for place in range(len(whole)):
        edit(file, lambda content, place=place: content.__setitem__(place, content[place] ^ (1 << place % 8)))
        try:
            found = megatron(prefix)
            assert [token for document in found for token in document] == tokens, place
        except DataError as error:
            assert str(prefix) in str(error)
            errors += 1
        file.write_bytes(whole)
    assert errors > len(whole) * 0.8


@pytest.mark.parametrize("name", ["mds/ndarray-int32", "mds/bytes", "mds/zstd"])
def test_any_changed_byte_of_an_mds_index_is_an_error_or_harmless(name, tmp_path):
    folder = copy_of(name, tmp_path)
    file, expected = folder / "index.json", MDS[Path(name).name]
    whole = file.read_bytes()
    errors = 0
    for place in range(0, len(whole), 5):
        for value in b'9"[\xff':
            edit(file, lambda content, place=place, value=value: content.__setitem__(place, value))
            try:
                assert mds(folder) == expected, (place, value)
            except DataError as error:
                assert str(folder) in str(error)
                errors += 1
    assert errors > len(whole) / 2


@pytest.mark.parametrize("name", ["mds/ndarray", "mds/str", "mds/gz", "mds/bz2"])
def test_any_flipped_bit_of_an_mds_shard_is_an_error_or_other_ids(name, tmp_path):
    folder = copy_of(name, tmp_path)
    file = sorted(folder.glob("shard.00000.mds*"))[0]
    whole = file.read_bytes()
    outcomes = {"error": 0, "ids": 0}
    for place in range(0, len(whole), 3):
        edit(file, lambda content, place=place: content.__setitem__(place, content[place] ^ (1 << place % 8)))
        try:
            mds(folder, "text" if name == "mds/str" else "tokens")
            outcomes["ids"] += 1
        except DataError as error:
            assert str(folder) in str(error)
            outcomes["error"] += 1
        file.write_bytes(whole)
    assert outcomes["error"] > len(whole) / 30, outcomes


@pytest.mark.parametrize("name", ["mds/bytes", "mds/zstd"])
def test_any_flipped_bit_of_an_mds_shard_with_checksums_is_an_error(name, tmp_path):
    folder = copy_of(name, tmp_path)
    file = sorted(folder.glob("shard.00001.mds*"))[0]
    whole = file.read_bytes()
    for place in range(0, len(whole), 3):
        edit(file, lambda content, place=place: content.__setitem__(place, content[place] ^ (1 << place % 8)))
        assert "is damaged: its" in error_of(mds, folder)
        file.write_bytes(whole)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.binary(max_size=64))
def test_files_of_any_bytes_are_read_or_refused(tmp_path_factory, index, tokens):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    (folder / "a.idx").write_bytes(foreign.MEGATRON_HEADER + index)
    (folder / "a.bin").write_bytes(tokens)
    (folder / "shard.mds").write_bytes(index)
    sizes = {"column_names": ["tokens"], "column_encodings": ["ndarray"], "column_sizes": [None]}
    shard = {"version": 2, "format": "mds", "samples": index[0] if index else 0, **sizes}
    shard["raw_data"] = {"basename": "shard.mds", "bytes": len(index)}
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": [shard]}))
    for read in (lambda: megatron(folder / "a"), lambda: mds(folder)):
        try:
            read()
        except DataError as error:
            assert str(folder) in str(error)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40), st.sampled_from(["ndarray", "ndarray:int32", "ndarray:uint16:3,2", "bytes", "str"]))
def test_values_of_any_bytes_are_read_or_refused(value, encoding):
    try:
        found = foreign._decode(encoding, UINT16, value)
    except (ValueError, IndexError, OverflowError):
        return
    assert isinstance(found, str) if encoding == "str" else found.ndim == 1 and found.dtype.kind in "iu"
