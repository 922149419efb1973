"""Broken and hostile files: every reader refuses them with its own error, or reads them; nothing else comes out.

Thousands of variants of sound files (tests/fuzz.py). A reader that lets a KeyError or a RecursionError through would
show a traceback in place of the file's name; one that follows a path out of its directory would read somebody else's.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
import zstandard

from configs.errors import ConfigError
from configs.incidents import append_incident
from configs.launches import Launch, write_launch
from configs.load import load_finetune, load_pretrain
from configs.phases import marker, open_ring, ring_path
from configs.schema import BuildConfig
from data_pipeline.errors import DataError
from data_pipeline.shards import open_dataset, verify_dataset, write_manifest, write_shard
from data_pipeline.sources import read_pieces, scan
from finetune.conll import read_sentences
from finetune.squad import read_squad
from finetune.texts import read_rows
from launcher.run_state import look
from launcher.status import describe
from pretrain.checkpoint import CheckpointError, Fragment, commit, layout, open_checkpoint, weights
from pretrain.saver import write_safetensors
from pretrain.state import TrainState
from tests.conftest import ROOT
from tests.fuzz import broken_bytes, broken_values

CONLL = "-DOCSTART- O\n\nEU B-ORG\nrejects O\n\nGerman B-MISC\ncall O\n"
CONLLU = "# newdoc\n1\tDogs\tdog\tNOUN\tNNS\t_\t0\troot\t_\t_\n2-3\ta\t_\t_\t_\t_\t_\t_\t_\t_\n\n"
SQUAD = {
    "version": "v2.0",
    "data": [{"title": "t", "paragraphs": [{"context": "a b c", "qas": [
        {"id": "1", "question": "q?", "answers": [{"text": "b", "answer_start": 2}], "is_impossible": False},
        {"id": "2", "question": "r?", "answers": [], "is_impossible": True},
    ]}]}],
}  # fmt: skip
JSONL = '{"text": "one", "label": "a"}\n{"text": "two \\u00e9", "label": "b"}\n' * 3
CSV = "text,label\n" + '"one, ""quoted""",a\ntwo,b\n' * 3


def check(read: Callable[[Path], object], error: type[Exception], file: Path, contents: list[bytes]) -> None:
    """Each content is read, or refused by an `error` that names the file."""
    num_refused = 0
    for content in contents:
        file.write_bytes(content)
        try:
            read(file)
        except error as refused:
            num_refused += 1
            assert str(file.parent) in str(refused) or file.name in str(refused)
    assert num_refused > len(contents) // 20


@pytest.mark.parametrize("config", ["gpt/nano.yaml", "bert/base.yaml", "finetune/sst2.yaml"])
def test_configurations(tmp_path, config):
    read = load_finetune if config.startswith("finetune") else load_pretrain
    content = (ROOT / "configs" / config).read_bytes()
    check(read, ConfigError, tmp_path / "config.yaml", list(broken_bytes(content, 150)))


@pytest.mark.parametrize(("name", "content"), [("a.conll", CONLL), ("a.conllu", CONLLU), ("a.conll.gz", CONLL)])
def test_tagged_sentences(tmp_path, name, content):
    packed = gzip.compress(content.encode(), mtime=0) if name.endswith(".gz") else content.encode()
    check(lambda file: read_sentences(file, None), DataError, tmp_path / name, list(broken_bytes(packed, 400)))


def test_questions(tmp_path):
    contents = [*broken_bytes(json.dumps(SQUAD).encode(), 400)]
    contents += [json.dumps(value).encode() for value in broken_values(SQUAD, 400)]
    check(read_squad, DataError, tmp_path / "squad.json", contents)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.tsv", "a.csv"])
def test_tables_of_texts(tmp_path, name):
    content = (JSONL if "jsonl" in name else CSV).encode()
    content = content.replace(b",", b"\t") if name == "a.tsv" else content
    contents = list(broken_bytes(packed(name, content), 400))
    check(lambda file: read_rows(file, ["text"], "label"), DataError, tmp_path / name, contents)


def packed(name: str, content: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(content, mtime=0)
    return zstandard.compress(content) if name.endswith(".zst") else content


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt"])
def test_texts_of_a_build(tmp_path, name):
    def read(file: Path) -> None:
        settings = BuildConfig()
        list(read_pieces(scan(str(file), settings, 64), settings, None))

    check(read, DataError, tmp_path / name, list(broken_bytes(packed(name, JSONL.encode()), 400)))


@pytest.fixture
def dataset(tmp_path) -> Path:
    folder = tmp_path / "dataset"
    folder.mkdir()
    entry = write_shard(folder / "shard-00000.tokens", [(np.arange(60) % 97, np.array([20, 40]))], 97)
    write_manifest(folder, [entry], 97, "none", "test")
    return folder


def read_dataset(file: Path) -> None:
    dataset = open_dataset(file.parent)
    for start in range(0, dataset.num_tokens - 10, 10):
        dataset.tokens(start, start + 10)
    [dataset.document(number) for number in range(dataset.num_documents)]


@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.tokens"])
def test_damaged_datasets(dataset, name):
    file = dataset / name
    contents = [content for content in broken_bytes(file.read_bytes(), 400) if content != file.read_bytes()]
    check(read_dataset, DataError, file, contents)


def test_hostile_manifests_of_datasets_whose_checksum_fits(dataset):
    file = dataset / "manifest.json"
    manifest = json.loads(file.read_bytes())
    del manifest["checksum"]
    contents = [summed(value) for value in broken_values(manifest, 600)]
    check(read_dataset, DataError, file, contents)
    for content in contents:
        file.write_bytes(content)
        verify_dataset(dataset)


def summed(manifest: object) -> bytes:
    """As `write_manifest` writes it, with the checksum of what is before it."""
    text = json.dumps(manifest, indent=1).removesuffix("\n}").encode()
    return text + f',\n "checksum": "{xxhash.xxh3_128_hexdigest(text)}"\n}}\n'.encode()


@pytest.fixture
def saved(tmp_path) -> Path:
    """A checkpoint of two parameters, written by one rank."""
    tensors = {name: torch.arange(12.0) for name in ("master", "exp_avg", "exp_avg_sq")}
    pieces = [Fragment("a.weight", (3, 4), 0, tensors), Fragment("b.bias", (12,), 0, tensors)]
    aside, target = tmp_path / ".writing", tmp_path / "step-00000001"
    aside.mkdir()
    contents = {f"{key}/{piece.name}": tensor for piece in pieces for key, tensor in piece.tensors.items()}
    entry = write_safetensors(aside / "rank-00000.safetensors", contents)
    commit(aside, target, TrainState(), {"rank-00000.safetensors": (entry, layout(pieces))}, {"seq_len": 8})
    return target


def read_checkpoint(file: Path) -> None:
    weight = weights(open_checkpoint(file.parent))
    for name in ("a.weight", "b.bias"):
        weight(name)


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.safetensors"])
def test_damaged_checkpoints(saved, name):
    file = saved / name
    contents = [content for content in broken_bytes(file.read_bytes(), 400) if content != file.read_bytes()]
    check(read_checkpoint, CheckpointError, file, contents)


def test_hostile_manifests_of_checkpoints_whose_checksum_fits(saved):
    file = saved / "manifest.json"
    manifest = json.loads(file.read_bytes())
    del manifest["checksum"]
    check(read_checkpoint, CheckpointError, file, [summed_line(value) for value in broken_values(manifest, 600)])


def test_checkpoint_that_names_a_file_elsewhere_is_refused(saved):
    file = saved / "manifest.json"
    manifest = json.loads(file.read_bytes())
    del manifest["checksum"]
    (saved / "rank-00000.safetensors").rename(saved.parent / "elsewhere")
    for name in ("../elsewhere", str(saved.parent / "elsewhere")):
        text = json.dumps(manifest).replace("rank-00000.safetensors", name)
        file.write_bytes(summed_line(json.loads(text)))
        with pytest.raises(CheckpointError, match="outside of the directory"):
            open_checkpoint(saved)


def summed_line(manifest: object) -> bytes:
    """As `commit` writes a manifest."""
    text = json.dumps(manifest).removesuffix("}").encode()
    return text + f',\n"checksum": "{xxhash.xxh3_128_hexdigest(text)}"\n}}\n'.encode()


@pytest.mark.parametrize("name", ["incidents.jsonl", "launch.json", "metrics.jsonl", "ranks/rank-00000.phases"])
def test_a_broken_run_directory_is_still_shown(tmp_path, name):
    append_incident(tmp_path, "restart", "again", step=3, num_ranks=2, code=1)
    append_incident(tmp_path, "stall", "rank 1 is behind", rank=1)
    write_launch(tmp_path, Launch("local", ["millstream", "pretrain"], pid=1, num_ranks=2))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "step_seconds": 0.1}\n' * 3)
    (tmp_path / "ranks").mkdir()
    marker(open_ring(ring_path(tmp_path, 0), 0, 1))("forward", 3)
    file = tmp_path / name
    for content in broken_bytes(file.read_bytes(), 200):
        file.write_bytes(content)
        assert str(tmp_path) in describe(look(tmp_path))
