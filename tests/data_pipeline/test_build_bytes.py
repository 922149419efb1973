"""A corpus of every kind of source, with faults in it: the same bytes for any number of workers; numbers that agree."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard

from configs.load import load_pretrain
from data_pipeline import build_steps, parts
from data_pipeline.shards import verify_dataset
from tests.conftest import ROOT
from tests.data_pipeline.test_build import QUIET, SMALL_PARTS, content
from tests.data_pipeline.test_remote_sources import RangeHandler, serving
from tests.data_pipeline.test_warc_reader import Archive

WORDS = [
    *("the", "a", "of", "and", "to", "in", "that", "it", "was", "with", "his", "her", "river", "stone", "bird", "king"),
    *(
        "house",
        "evening",
        "letter",
        "window",
        "garden",
        "water",
        "walked",
        "spoke",
        "found",
        "slowly",
        "again",
        "never",
    ),
    *("always", "between", "under", "after", "morning", "voice", "hand", "eyes", "road", "door", "light", "old", "two"),
]
FAULTS = ["{broken", '{"text": "   "}', '{"text": "half a \\ud800 pair"}', '{"txt": "another key"}', ""]

ALL_STAGES = {
    "clean": {
        "html": True,
        "mojibake": True,
        "unicode": "NFC",
        "languages": ["en", "de"],
        "quality": ["gopher", "gopher_repetition", "c4"],
        "pii": ["email", "phone", "ip", "card", "key"],
        "decontaminate": ["tests.jsonl"],
    },
    "deduplicate": {"exact": True, "near": True},
}
# Settings of data.build, and the kind of model.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "no stages": ({}, "gpt"),
    "all stages": (ALL_STAGES, "gpt"),
    "near, validation sources": ({"deduplicate": {"near": True}, "validation_sources": ["held out"]}, "gpt"),
    "tail": ({"split_by": "tail", "validation_fraction": 0.2, "deduplicate": {"exact": True}}, "gpt"),
    "wordpiece": ({"tokenizer": {"type": "wordpiece", "vocab_size": 500, "lowercase": True}}, "bert"),
    "unigram": ({"tokenizer": {"type": "unigram", "vocab_size": 150}}, "gpt"),
    "characters": ({"tokenizer": {"type": "characters"}, "clean": {"unicode": "NFKC"}}, "gpt"),
}


def sentences(rng: random.Random) -> str:
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(6, 14))).capitalize() + "." for _ in range(rng.randint(4, 14))]
    return " ".join(lines)


def lines_of(documents: list[str]) -> bytes:
    """jsonl with faults between the documents."""
    lines = []
    for number, document in enumerate(documents):
        lines += [FAULTS[number // 3 % len(FAULTS)]] * (number % 3 == 0) + [json.dumps({"text": document})]
    return "\n".join(lines).encode()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Iterator[tuple[Path, list[str]]]:
    """(folder, sources) of 540 documents in files of all kinds; copies and test sets among them."""
    folder = tmp_path_factory.mktemp("corpora [1] with ü")
    rng = random.Random(0)
    own = [sentences(rng) for _ in range(400)]
    own += own[:40] + [f"{document} One more." for document in own[40:80]]
    own += [f"{document} Write to jane{n}@example.org or 8.8.8.{n}." for n, document in enumerate(own[80:100])]
    own += [f"schÃ¶n, {document}" for document in own[100:120]] + ["12 34 56"] * 10 + ["Ein Satz. Und noch einer."] * 10
    rng.shuffle(own)
    inside, served = folder / "sources", folder / "served"
    for path in (inside / "small", served, folder / "held out"):
        path.mkdir(parents=True)
    (inside / "a.jsonl").write_bytes(lines_of(own[:120]))
    (inside / "b.jsonl.gz").write_bytes(gzip.compress(lines_of(own[120:200])))
    frames = [zstandard.compress(lines_of(own[start : start + 40]) + b"\n") for start in (200, 240)]
    (inside / "c.jsonl.zst").write_bytes(b"".join(frames))
    column = [None if number % 9 == 0 else document for number, document in enumerate(own[280:360])]
    parquet.write_table(pa.table({"text": column}), inside / "d.parquet", row_group_size=16)
    archive = Archive(inside / "e.warc.gz")
    for document in own[360:420]:
        archive.page(f"<html><body><p>{document}</p><script>x()</script></body></html>".encode())
    archive.save()
    for number, document in enumerate(own[420:480]):
        (inside / "small" / f"{number:02d} [x] ü.txt").write_text(document, encoding="utf-8")
    (inside / "small" / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (inside / "small" / "empty.txt").write_bytes(b"")
    (served / "f.jsonl.gz").write_bytes(gzip.compress(lines_of(own[480:])))
    (folder / "held out" / "g.jsonl").write_bytes(lines_of([sentences(rng) for _ in range(20)]))
    (folder / "tests.jsonl").write_text("\n".join(json.dumps({"question": document}) for document in own[:5]))
    with serving(served, RangeHandler) as server:
        yield folder, [str(inside), f"{server.url}/f.jsonl.gz"]


def config_of(corpus: tuple[Path, list[str]], settings: dict[str, Any], architecture: str, out: Path) -> Any:
    folder, sources = corpus
    settings = {"tokenizer": {"vocab_size": 400}, "validation_fraction": 0.1, "shard_tokens": 8000} | settings
    settings |= {"sources": sources, "on_error": "skip"}
    if "validation_sources" in settings:
        settings["validation_sources"] = [str(folder / name) for name in settings["validation_sources"]]
    if tests := settings.get("clean", {}).get("decontaminate"):
        settings["clean"] = settings["clean"] | {"decontaminate": [str(folder / name) for name in tests]}
    config = {
        "run_dir": "unused",
        "model": {"architecture": architecture},
        "data": {"dir": str(out), "build": settings},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


def numbers_agree(found: dict[str, Any]) -> None:
    """What a stage has not dropped is what the next one has seen, down to the documents of the splits."""
    stages = list(found["stages"].items())
    left = stages[0][1]["seen"]
    for name, tally in stages:
        if name == "tokenize" and found["duplicates"]:
            left -= found["duplicates"]["exact"] + found["duplicates"]["near"]
        assert tally["seen"] == left, name
        left -= sum(tally["dropped"].values())
        assert 0 <= tally["changed"] <= tally["seen"]
    left += found["stages"]["tokenize"]["found"].get("cut in two", 0)
    assert left == sum(split["documents"] for split in found["splits"].values())
    for split in found["splits"].values():
        assert sum(split["lengths"].values()) == split["documents"]
    read = found["stages"]["read"]
    good = read["seen"] - sum(read["dropped"].values())
    assert sum(source["documents"] for source in found["sources"].values()) == good


@pytest.mark.parametrize("case", CASES)
def test_bytes_do_not_depend_on_the_number_of_workers_and_numbers_agree(corpus, tmp_path, monkeypatch, case):
    monkeypatch.setattr(parts, "SMALLEST_PART_BYTES", 5000)
    results = []
    for num_workers in (1, 3):
        out = tmp_path / str(num_workers)
        config = config_of(corpus, *CASES[case], out)
        build_steps.build(load_pretrain(config, [f"data.build.num_workers={num_workers}"]), QUIET)
        assert [fault for split in parts.SPLITS for fault in verify_dataset(out / split)] == []
        results.append(content(out))
    assert results[0] == results[1]
    assert sum(name.endswith(".tokens") for name in results[0]) > 3
    found = json.loads((out / "train" / "stages.json").read_text())
    numbers_agree(found)
    dropped = found["stages"]["read"]["dropped"]
    assert dropped["broken record"] > 50 and dropped["no text"] > 10
    if case == "all stages":
        assert all(found["stages"][name]["dropped"] for name in ("language", "quality", "decontaminate"))
        assert all(found["stages"][name]["changed"] for name in ("html", "mojibake", "pii"))
        assert found["duplicates"]["exact"] > 20 and found["duplicates"]["near"] > 10
        assert all(found["duplicates"]["examples"][kind] for kind in ("exact", "near"))
    for tally in found["stages"].values():
        assert all(tally["examples"][reason] for reason in tally["dropped"])


def test_bytes_do_not_depend_on_where_the_dataset_is_built(corpus, tmp_path):
    results = []
    for name in ("here", "a longer name for the same"):
        config = config_of(corpus, *CASES["unigram"], tmp_path / name)
        build_steps.build(load_pretrain(config), QUIET)
        results.append(content(tmp_path / name))
    assert results[0] == results[1]


@pytest.fixture
def bucket(corpus) -> Iterator[tuple[str, dict[str, str]]]:
    """The corpus's own folder in a bucket on moto's server, and the environment in which it is found."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    environment = names | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="corpora")
        inside = corpus[0] / "sources"
        for file in sorted(path for path in inside.rglob("*") if path.is_file()):
            client.upload_file(str(file), "corpora", f"mine/{file.relative_to(inside)}")
    yield "s3://corpora/mine", environment
    server.stop()


def test_corpus_on_s3_gives_the_tokens_of_the_same_files_on_disk(corpus, bucket, tmp_path):
    address, environment = bucket
    folder, sources = corpus
    tokens = []
    for name, place in (("disk", sources[0]), ("s3", address)):
        config = config_of((folder, [place]), *CASES["no stages"], tmp_path / name)
        command = [sys.executable, "-c", SMALL_PARTS, str(config), "data.build.num_workers=2"]
        ran = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        found = content(tmp_path / name)
        tokens.append({file: found[file] for file in found if file.endswith(".tokens")})
    assert tokens[0] == tokens[1] and len(tokens[0]) > 5
