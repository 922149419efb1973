"""Made the fixtures beside it with the systems themselves: `python make.py FOLDER`, in an environment of its own with
megatron-core 0.16.1, mosaicml-streaming 0.13.0, torch 2.13.0 and numpy 2.4.6, on Python 3.11.

Each dataset is written by its system and read back by it; what that gave is kept in megatron.json and mds.json.
"""

# ruff: noqa: E402

from __future__ import annotations

import json
import shutil
import sys
import types
from itertools import chain, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")  # for images; needs torchvision

import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from streaming import LocalDataset, MDSWriter
from streaming.base.compression import decompress
from streaming.base.util import merge_index

END = 0  # ends the documents of some of the datasets
WORDS = ["sun", "moon", "river", "stone", "Köln", "東京", "🌙", "king"]


def documents(seed: int, count: int, largest: int, longest: int = 30) -> list[list[int]]:
    """Token ids from 1 to `largest`, the largest one among them."""
    rng = np.random.default_rng(seed)
    made = [rng.integers(1, largest + 1, rng.integers(1, longest)).tolist() for _ in range(count)]
    made[count // 2][0] = largest
    return made


def write_megatron(prefix: Path, dtype: Any, docs: list[list[list[int]]], multimodal: bool = False) -> list[list[int]]:
    """Documents of sequences; returns the documents as Megatron reads them."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype, multimodal)
    for number, document in enumerate(docs):
        if number % 2 and not multimodal:  # the two ways its own tools use
            builder.add_document(torch.tensor(list(chain(*document))), [len(sequence) for sequence in document])
        else:
            for sequence in document:
                builder.add_item(torch.tensor(sequence, dtype=torch.int64), 1)
            builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return read_megatron(prefix, multimodal)


def read_megatron(prefix: Path, multimodal: bool = False) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix), multimodal)
    bounds = dataset.document_indices.tolist()
    sequences = [dataset[number] for number in range(len(dataset))]
    tokens = [(sequence[0] if multimodal else sequence).tolist() for sequence in sequences]
    return [list(chain(*tokens[first:stop])) for first, stop in pairwise(bounds)]


def write_mds(folder: Path, columns: dict[str, str], samples: list[dict[str, Any]], **settings: Any) -> list[Any]:
    """Samples; returns the column `tokens` (or `text`) as mosaicml-streaming reads it."""
    with MDSWriter(out=str(folder), columns=columns, **settings) as writer:
        for sample in samples:
            writer.write(sample)
    return read_mds(folder)


def read_mds(folder: Path) -> list[Any]:
    with TemporaryDirectory() as copy:  # it leaves decompressed files beside what it reads
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        dataset = LocalDataset(copy)
        for shard in dataset.shards:  # LocalDataset itself reads no compressed ones
            for raw, packed in shard.file_pairs:
                if packed:
                    content = decompress(shard.compression, Path(copy, packed.basename).read_bytes())
                    Path(copy, raw.basename).write_bytes(content)
        samples = [dataset[number] for number in range(dataset.num_samples)]
    return [plain(sample["tokens"] if "tokens" in sample else sample["text"]) for sample in samples]


def plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return np.frombuffer(value, np.uint16).tolist()
    return value.reshape(-1).tolist() if isinstance(value, np.ndarray) else value


def make_megatron(out: Path) -> dict[str, Any]:
    out.mkdir()
    found = {}
    for name, dtype, largest in [
        ("uint8", np.uint8, 255),
        ("uint16", np.uint16, 65_499),
        ("int32", np.int32, 99_999),
        ("int64", np.int64, 99_999),
    ]:
        docs = [[document] for document in documents(1, 12, largest)]
        found[name] = write_megatron(out / name, dtype, docs)
    ended = [[[*document, END]] for document in documents(2, 12, 999)]
    found["ended"] = write_megatron(out / "ended", np.uint16, ended)
    parts = documents(3, 30, 999)
    several = [parts[0:1], parts[1:4], [], parts[4:10], [], parts[10:11], parts[11:30]]  # two have no sequence
    found["sequences"] = write_megatron(out / "sequences", np.int32, several)
    found["modes"] = write_megatron(out / "modes", np.int32, [parts[0:3], parts[3:5], parts[5:9]], multimodal=True)
    joined = IndexedDatasetBuilder(str(out / "joined.bin"), np.int32)
    joined.add_index(str(out / "sequences"))
    joined.add_index(str(out / "int32"))
    joined.finalize(str(out / "joined.idx"))
    found["joined"] = read_megatron(out / "joined")
    return found


def make_mds(out: Path) -> dict[str, Any]:
    out.mkdir()
    found = {}
    docs = documents(4, 24, 999)
    for name, encoding, dtype in [
        ("ndarray", "ndarray", None),
        ("ndarray-int32", "ndarray:int32", np.int32),
        ("ndarray-uint16-shape", "ndarray:uint16:4,2", np.uint16),
    ]:
        dtypes = [np.uint16, np.int16, np.int32, np.int64, np.uint32, np.uint64]
        arrays = [np.array(document, dtype or dtypes[k % 6]) for k, document in enumerate(docs)]
        if name.endswith("shape"):
            arrays = [np.resize(array, (4, 2)) for array in arrays]
        elif dtype is None:
            arrays[3] = np.resize(arrays[3], (3, 300))  # two dimensions, sizes of two bytes
        samples = [{"tokens": array} for array in arrays]
        found[name] = write_mds(out / name, {"tokens": encoding}, samples, size_limit=1000)
    columns = {"tokens": "bytes", "id": "int", "source": "str", "score": "float32"}  # ones before it and after it
    for name, settings in [
        ("bytes", {"size_limit": 1200, "hashes": ["sha1", "xxh3_64"]}),
        ("zstd", {"size_limit": 1200, "compression": "zstd:7", "hashes": ["xxh128"]}),
        ("gz", {"compression": "gz"}),
        ("bz2", {"compression": "bz2:9"}),
        ("br", {"compression": "br:5"}),
    ]:
        samples = [
            {"tokens": np.array(d, np.uint16).tobytes(), "id": k, "source": "wiki" * (k % 3), "score": np.float32(k)}
            for k, d in enumerate(docs)
        ]
        found[name] = write_mds(out / name, columns, samples, **settings)
    texts = [" ".join(WORDS[k % 8] for k in document) for document in docs]
    found["str"] = write_mds(out / "str", {"text": "str"}, [{"text": text} for text in texts], size_limit=1000)
    rows = np.array(list(chain(*([*document, END] for document in docs))), np.int32)
    rows = rows[: len(rows) // 16 * 16].reshape(-1, 16)  # concatenated and cut, as for LLM training
    found["rows"] = write_mds(out / "rows", {"tokens": "ndarray:int32:16"}, [{"tokens": row} for row in rows])
    for number in range(2):  # as several processes write, and join afterwards
        part = out / "parts" / str(number)
        samples = [{"tokens": np.array(d, np.int32)} for d in docs[number * 12 :][:12]]
        with MDSWriter(out=str(part), columns={"tokens": "ndarray:int32"}, size_limit=1000) as writer:
            for sample in samples:
                writer.write(sample)
    merge_index(str(out / "parts"))
    found["parts"] = read_mds(out / "parts")
    return found


def main() -> None:
    out = Path(sys.argv[1])
    for name, make in (("megatron", make_megatron), ("mds", make_mds)):
        expected = make(out / name)
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in expected.items())
        (out / f"{name}.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
