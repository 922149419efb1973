"""Passes over parts: what is left does not depend on what was there, memory does not grow, nothing goes uncounted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from configs.load import load_pretrain
from configs.schema import BuildConfig, DedupeConfig
from data_pipeline import part_text, passes
from data_pipeline.minhash import signature_dtype, signatures
from data_pipeline.part_text import read_parts, split
from data_pipeline.part_tokens import read_documents, read_index
from data_pipeline.parts import Plan, save_plan
from data_pipeline.sources import scan
from data_pipeline.store import WRITING
from data_pipeline.tokenizer import encoder, end_of_text_id, load_tokenizer
from tests.conftest import ROOT


def plan_of(folder: Path, files: dict[str, list[str]], part_bytes: int, **build: object) -> Plan:
    """A plan for jsonl files in `folder`: name -> lines."""
    for name, lines in files.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    sources = [str(folder / name) for name in files]
    data = {"build": {"sources": sources, "tokenizer": {"type": "characters"}} | build}
    (folder / "config.json").write_text(json.dumps({"run_dir": "unused", "data": data}))
    config = load_pretrain(folder / "config.json")
    for name in ("clean", "tokens"):
        (folder / name).mkdir()
    pieces = [piece for file in sources for piece in scan(file, config.data.build, part_bytes)]
    return save_plan(folder, "of nothing", config, pieces, [], part_bytes)


def lines(*texts: str) -> list[str]:
    return [json.dumps({"text": text}) for text in texts]


def test_parts_are_read_as_they_were_cut_whichever_are_asked_for(tmp_path):
    texts = {name: [f"{name} document {n}" for n in range(60)] for name in ("a.jsonl", "b.jsonl", "c.jsonl")}
    plan = plan_of(tmp_path, {name: lines(*of_file) for name, of_file in texts.items()}, 500)
    assert plan.num_parts >= 10
    alone = [
        [document.text for document in documents]
        for number in range(plan.num_parts)
        for _, documents, _ in read_parts(plan, [number])
    ]
    assert [text for part in alone for text in part] == [text for of_file in texts.values() for text in of_file]
    for numbers in (range(plan.num_parts), [1, 2, 5, 6, plan.num_parts - 1]):
        found = {n: [document.text for document in documents] for n, documents, _ in read_parts(plan, numbers)}
        assert found == {number: alone[number] for number in numbers}


def test_part_that_is_left_in_the_middle_does_not_disturb_the_next(tmp_path):
    plan = plan_of(tmp_path, {"a.jsonl": lines(*(f"document {n}" for n in range(60)))}, 500)
    firsts = [next(documents).text for _, documents, _ in read_parts(plan, range(plan.num_parts))]
    assert firsts == [next(documents).text for n in range(plan.num_parts) for _, documents, _ in read_parts(plan, [n])]


def test_what_is_no_document_is_counted_in_the_part_where_it_is(tmp_path):
    content = [*lines("one", " "), "{broken", *lines("two"), "[]", *lines("\n")] * 10
    plan = plan_of(tmp_path, {"a.jsonl": content}, 100, on_error="skip")
    dropped: Counter[str] = Counter()
    for _, documents, report in read_parts(plan, range(plan.num_parts)):
        number = len(list(documents))
        tally = report.tallies["read"]
        assert tally.seen == number + sum(tally.dropped.values())
        assert sum(counts[0] for counts in report.sources.values()) == number
        dropped.update(tally.dropped, documents=number)
    assert plan.num_parts > 3
    assert dropped == {"broken record": 20, "no text": 20, "documents": 20}


def test_document_without_tokens_is_dropped_and_counted(tmp_path):
    # what NFKC and the tokenizer's own normalisation leave of the second one is nothing
    plan = plan_of(tmp_path, {"a.jsonl": lines("abc", "\u200b\u00ad", "cba")}, 500)
    plan = plan_with_wordpiece(plan)
    passes.token_parts(plan.work, [0])
    index = read_index(plan.tokens(0))
    assert index["tally"]["seen"] == 3 and index["tally"]["dropped"] == {"no tokens": 1}
    ((tokens, lengths),) = read_documents(plan.tokens(0), "train", 0, 9)
    assert len(lengths) == index["splits"]["train"]["documents"] == 2 and len(tokens) == lengths.sum()


def plan_with_wordpiece(plan: Plan) -> Plan:
    settings = plan.config.model_dump()
    settings["model"]["architecture"] = "bert"
    settings["data"]["build"]["tokenizer"] = {"type": "wordpiece", "vocab_size": 40}
    settings["data"]["build"]["validation_fraction"] = 0.0
    plan = Plan(**(vars(plan) | {"config": type(plan.config).model_validate(settings)}))
    plan.save()
    passes.make_tokenizer(plan.work)
    return plan


@pytest.mark.parametrize("kind", ["byte_bpe", "characters", "unigram"])
def test_workers_give_the_ids_of_the_tokenizer_they_are_told_of(tmp_path, kind):
    texts = [f"Document {n}: it's <|endoftext|> or naïve\n\n  {n * 7919}" for n in range(60)]
    plan = plan_of(tmp_path, {"a.jsonl": lines(*texts)}, 1 << 20, tokenizer={"type": kind, "vocab_size": 280})
    passes.make_tokenizer(plan.work)
    assert (json.loads(plan.encoder.read_bytes())["ranks"] is not None) == (kind == "byte_bpe")
    passes.token_parts(plan.work, [0])
    tokenizer = load_tokenizer(plan.tokenizer_dir)
    expected = [[*ids.tolist(), end_of_text_id(tokenizer)] for ids in encoder(tokenizer)(texts)]
    found = [
        tokens.tolist()
        for name in ("train", "validation")
        for flat, lengths in read_documents(plan.tokens(0), name, 0, len(texts))
        for tokens in np.split(flat, np.cumsum(lengths)[:-1])
    ]
    assert sorted(found) == sorted(expected)


def test_part_whose_report_cannot_be_written_fails_the_pass_and_is_not_there(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, {"a.jsonl": lines(*(f"document {n}" for n in range(60)))}, 500)
    passes.make_tokenizer(plan.work)
    real = part_text.Report.write

    def full(report: part_text.Report, path: Path) -> None:
        if path == plan.report(1):
            raise OSError("no space left")
        real(report, path)

    monkeypatch.setattr(part_text.Report, "write", full)
    with pytest.raises(OSError, match="no space left"):
        passes.token_parts(plan.work, list(range(plan.num_parts)))
    assert plan.tokens(0).exists() and not plan.tokens(1).exists()
    assert not [path for path in plan.tokens(0).parent.iterdir() if path.name.startswith(WRITING)]


def test_parts_that_are_there_are_not_made_again(tmp_path):
    plan = plan_of(tmp_path, {"a.jsonl": lines(*(f"document {n}" for n in range(60)))}, 500)
    passes.make_tokenizer(plan.work)
    passes.token_parts(plan.work, [0, 1, 2])
    before = [plan.tokens(number).stat().st_mtime_ns for number in range(3)]
    plan.tokens(1).unlink()
    passes.token_parts(plan.work, [0, 1, 2])
    after = [plan.tokens(number).stat().st_mtime_ns for number in range(3)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


@pytest.mark.parametrize("near", [False, True])
def test_signatures_saved_bit_by_bit_are_the_file_numpy_would_write(tmp_path, near):
    config = DedupeConfig(exact=True, near=near)
    rows = signatures([f"text number {n} of some words and more" for n in range(1234)], config)
    with passes._saving_rows(tmp_path / "mine.npy", signature_dtype(config)) as save:
        for start in range(0, len(rows), 100):
            save(rows[start : start + 100])
    np.save(tmp_path / "numpys.npy", rows)
    assert (tmp_path / "mine.npy").read_bytes() == (tmp_path / "numpys.npy").read_bytes()


@given(st.text(), st.floats(0, 1))
def test_split_is_decided_by_the_hash_of_the_text(text, fraction):
    settings = BuildConfig(validation_fraction=fraction)
    expected = "validation" if xxhash.xxh3_64_intdigest(text.encode()) / 2**64 < fraction else "train"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part_text, "HASHED_CHARACTERS", 3)
        assert split(text, settings, False) == [(expected, text)]


@given(st.text(min_size=1), st.floats(0, 1))
def test_tail_is_cut_off_without_empty_halves(text, fraction):
    halves = split(text, BuildConfig(validation_fraction=fraction, split_by="tail"), False)
    assert "".join(half for _, half in halves) == text and all(half for _, half in halves)
    assert [name for name, _ in halves] in (["train", "validation"], ["train"], ["validation"])


PEAK = (
    "import re, sys; from data_pipeline import build, parts; parts.SMALLEST_PART_BYTES = 1 << 28\n"
    # not getrusage: its peak begins with that of the process that started this one
    "assert build.main() == 0; print(int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) >> 10)"
)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"deduplicate": {"near": True}}, {"tokenizer": {"type": "characters"}}])
def test_part_of_any_size_takes_the_same_memory(tmp_path, settings):
    """A part of 4 and of 80 MB: signatures would take 170 MB more, tokens of a character each 150 MB.

    What the allocator keeps for the threads differs by 50 MB between runs of one and the same build.
    """
    peaks = []
    for num_bytes in (4_000_000, 80_000_000):
        words = np.random.default_rng(0).integers(10**7, 10**8, (num_bytes // 119, 12))
        texts = (" ".join(map(str, row)) for row in words.tolist())
        (tmp_path / "corpus.jsonl").write_text("".join(f'{{"text":"{text}"}}\n' for text in texts))
        build = {
            "sources": [str(tmp_path / "corpus.jsonl")],
            "tokenizer": {"vocab_size": 300, "sample_bytes": 1_000_000},
            "num_workers": 1,
            **settings,
        }
        config = {"run_dir": "unused", "data": {"dir": str(tmp_path / str(num_bytes)), "build": build}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        command = [sys.executable, "-c", PEAK, str(tmp_path / "config.json")]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(ran.stdout.splitlines()[-1]))
    assert peaks[1] < peaks[0] + 100, peaks
