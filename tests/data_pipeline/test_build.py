"""Text to a dataset directory: the same bytes whoever builds it and however often it is killed; none is overwritten."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from configs.load import load_pretrain
from data_pipeline import build_steps, parts
from data_pipeline.shards import DataError, open_dataset
from data_pipeline.tokenizer import end_of_text_id, load_tokenizer
from tests.conftest import ROOT

QUIET = Console(quiet=True)
# A build of its own process, with parts so small that there are dozens.
SMALL_PARTS = (
    "import sys; from data_pipeline import build, parts; parts.SMALLEST_PART_BYTES = 4000; sys.exit(build.main())"
)


@pytest.fixture
def corpus(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    words = np.array(["the", "a", "sun", "moon", "river", "stone", "bird", "king", "runs", "sings", "slowly", "."])
    records = [{"text": " ".join(rng.choice(words, rng.integers(5, 60)))} for _ in range(400)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "config.yaml").write_text(
        f"run_dir: unused\ndata:\n  dir: {tmp_path}/data\n  build:\n    sources: [{tmp_path}/corpus.jsonl]\n"
        "    validation_fraction: 0.1\n    tokenizer: {vocab_size: 300}\n    num_workers: 1\n"
    )
    return tmp_path / "config.yaml"


@pytest.fixture
def small_parts(monkeypatch) -> None:
    monkeypatch.setattr(parts, "SMALLEST_PART_BYTES", 4000)


def make(config: Path, *overrides: str) -> Path:
    settings = load_pretrain(config, list(overrides))
    build_steps.build(settings, QUIET)
    return Path(settings.data.dir)


def content(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def error_of(config: Path, *overrides: str) -> str:
    with pytest.raises(DataError) as caught:
        make(config, *overrides)
    return str(caught.value)


STAGES = ["data.build.clean.unicode=NFC", "data.build.deduplicate.near=true", "data.build.deduplicate.exact=true"]


@pytest.fixture
def mpirun() -> list[str]:
    if shutil.which("mpirun") is None:
        pytest.skip("no mpirun (Debian: openmpi-bin)")
    return ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "3", sys.executable, "-c", SMALL_PARTS]


@pytest.mark.parametrize("killed", [None, 0, 2], ids=["undisturbed", "first-rank-killed", "last-rank-killed"])
def test_result_is_byte_identical_under_mpirun(corpus, small_parts, mpirun, killed):
    words = ["data.build.shard_tokens=2000", *STAGES]
    alone = content(make(corpus, f"data.dir={corpus.parent}/alone", *words))
    command = [*mpirun, str(corpus), *words]
    if killed is not None:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(corpus.parent.glob(".building-data/clean/*"))) < 5:
            time.sleep(0.002)
        ranks = [pid for pid in descendants(process.pid) if "SMALLEST" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(sorted(ranks)[killed], signal.SIGKILL)
        assert process.wait(timeout=60) != 0
        assert not (corpus.parent / "data").exists()
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert content(corpus.parent / "data") == alone


def test_error_under_mpirun_is_said_once_and_ends_all_ranks(corpus, small_parts, mpirun):
    with (corpus.parent / "corpus.jsonl").open("a") as file:
        file.write("{broken\n")
    ran = subprocess.run([*mpirun, str(corpus)], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert ran.returncode != 0 and ran.stderr.count("corpus.jsonl:401: is not valid JSON") == 1
    assert "Traceback" not in ran.stderr


@pytest.mark.slow
def test_result_is_byte_identical_through_datatrove(corpus, small_parts):
    words = ["data.build.shard_tokens=2000", *STAGES]
    alone = content(make(corpus, f"data.dir={corpus.parent}/alone", *words))
    engine = ["data.build.engine=datatrove", "data.build.num_workers=2"]
    assert content(make(corpus, f"data.dir={corpus.parent}/datatrove", *words, *engine)) == alone


@pytest.mark.parametrize(
    ("overrides", "num_files"), [([], 57), (STAGES, 111)], ids=["plain", "with-stages"]
)  # so many files are there before a build finishes
@pytest.mark.slow
def test_build_killed_at_any_moment_goes_on_to_the_same_bytes(corpus, small_parts, overrides, num_files):
    words = ["data.build.shard_tokens=2000", "data.build.num_workers=2", *overrides]
    whole = content(make(corpus, f"data.dir={corpus.parent}/whole", *words))
    command = [sys.executable, "-c", SMALL_PARTS, str(corpus), *words]
    work = corpus.parent / ".building-data"
    kills = 0
    for moment in sorted(random.Random(0).sample(range(1, num_files), 8)):  # when that many files are there
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and sum(path.is_file() for path in work.rglob("*")) < moment:
            time.sleep(0.002)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 6
    make(corpus, *words)
    assert content(corpus.parent / "data") == whole
    assert not work.exists()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_ctrl_c_ends_the_build_with_a_word_and_keeps_what_is_finished(corpus, small_parts, num_workers):
    command = [sys.executable, "-c", SMALL_PARTS, str(corpus), f"data.build.num_workers={num_workers}", *STAGES]
    process = subprocess.Popen(
        command, cwd=ROOT, process_group=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    clean = corpus.parent / ".building-data" / "clean"
    while process.poll() is None and len(list(clean.glob("part-*.json"))) < 3:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "interrupted; finished parts are kept, the same command goes on from them"
    assert len(list(clean.glob("part-*.json"))) >= 3 and not (corpus.parent / "data").exists()


def test_finished_parts_are_not_done_again(corpus, small_parts, monkeypatch):
    def disturbed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(build_steps, "make_shards", disturbed)
        with pytest.raises(KeyboardInterrupt):
            make(corpus)
    kept = sorted((corpus.parent / ".building-data" / "tokens").iterdir())
    times = [path.stat().st_mtime_ns for path in kept]
    assert len(kept) > 10
    kept[3].unlink()

    def finished(plan, *args):
        after = sorted((plan.work / "tokens").iterdir())
        assert after == kept
        again = [path for path, before in zip(after, times, strict=True) if path.stat().st_mtime_ns != before]
        assert again == [kept[3]]
        raise KeyboardInterrupt

    monkeypatch.setattr(build_steps, "make_shards", finished)
    with pytest.raises(KeyboardInterrupt):
        make(corpus)


def test_finished_shards_are_not_done_again(corpus, small_parts, monkeypatch):
    real, calls = build_steps.passes.assemble_shard, []

    def assemble(work, split, number, *args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append((split, number))
        return real(work, split, number, *args)

    monkeypatch.setattr(build_steps.passes, "assemble_shard", assemble)
    with pytest.raises(KeyboardInterrupt):
        make(corpus, "data.build.shard_tokens=2000")
    first, calls[:] = list(calls), []
    monkeypatch.setattr(build_steps.passes, "assemble_shard", lambda *args: calls.append(args[1:3]) or real(*args))
    root = make(corpus, "data.build.shard_tokens=2000")
    shards = [(split, number) for split in parts.SPLITS for number in range(len(open_dataset(root / split).shards))]
    assert len(first) == 3 and first + calls == shards


def test_changed_sources_start_an_interrupted_build_over(corpus, small_parts, monkeypatch):
    def disturbed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(build_steps, "make_shards", disturbed)
        with pytest.raises(KeyboardInterrupt):
            make(corpus)
    (corpus.parent / "corpus.jsonl").write_text('{"text": "quite another corpus"}\n' * 100)
    root = make(corpus, "data.build.validation_fraction=0.5", "data.build.split_by=tail")
    assert sum(open_dataset(root / name).num_documents for name in ("train", "validation")) == 200


def test_source_that_changes_while_it_is_read_is_named(corpus, monkeypatch):
    real = build_steps.passes.make_tokenizer

    def meddled(*args):
        with (corpus.parent / "corpus.jsonl").open("a") as file:
            file.write('{"text": "one more"}\n')
        return real(*args)

    monkeypatch.setattr(build_steps.passes, "make_tokenizer", meddled)
    message = error_of(corpus)
    assert "corpus.jsonl: was changed" in message
    assert not (corpus.parent / "data").exists()


def test_second_build_at_the_same_time_is_refused(corpus):
    with (corpus.parent / ".lock-data").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 12 on host")
        lock.flush()
        message = error_of(corpus)
    assert "another build is writing it (process 12 on host); wait for it, or choose another data.dir" in message
    make(corpus)


def test_workers_of_a_killed_build_end_with_it(corpus, small_parts):
    words = ["data.build.num_workers=2", *STAGES]
    process = subprocess.Popen([sys.executable, "-c", SMALL_PARTS, str(corpus), *words], cwd=ROOT)
    children: list[int] = []
    deadline = time.monotonic() + 60
    while len(children) < 3 and process.poll() is None and time.monotonic() < deadline:  # tracker, server, workers
        children = descendants(process.pid)
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert children
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        found += children + [grandchild for child in children for grandchild in descendants(child)]
    return found


def test_every_document_is_in_exactly_one_split_with_its_end_token(corpus):
    root = make(corpus)
    texts = {json.loads(line)["text"] for line in (corpus.parent / "corpus.jsonl").open()}
    found = []
    for name in ("train", "validation"):
        data, tokenizer = open_dataset(root / name), build_steps.tokenizers.load_tokenizer(root / name)
        starts = [*data.document_starts(0, data.num_tokens).tolist(), data.num_tokens]
        for start, stop in itertools.pairwise(starts):
            ids = data.tokens(start, stop).tolist()
            assert ids[-1] == tokenizer.token_to_id("<|endoftext|>")
            found.append(tokenizer.decode(ids[:-1]))
    assert sorted(found) == sorted(texts)
    assert 0.04 < open_dataset(root / "validation").num_documents / len(texts) < 0.18


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.build.split_by=tail"],
        ["data.build.tokenizer.type=characters"],
        ["data.build.tokenizer.type=unigram", "data.build.tokenizer.vocab_size=60"],
        ["model.architecture=bert", "data.build.tokenizer.type=wordpiece"],
    ],
    ids=["bpe", "tail", "characters", "unigram", "bert"],
)
def test_built_dataset_knows_the_token_that_ends_documents_and_nothing_else(corpus, overrides):
    ends = [json.dumps({"text": f"a king said {end} and went"}) for end in ("<|endoftext|>", "</s>", "[SEP]")]
    with (corpus.parent / "corpus.jsonl").open("a") as file:
        file.write("\n".join(ends * 20))
    root = make(corpus, *overrides)
    end = end_of_text_id(load_tokenizer(root / "train"))
    for name in ("train", "validation"):
        is_for_bert = "model.architecture=bert" in overrides
        assert open_dataset(root / name).document_end_id == (None if is_for_bert else end)


def test_shards_end_with_the_document_that_fills_them(corpus, small_parts):
    root = make(corpus, "data.build.shard_tokens=1500")
    entries = json.loads((root / "train" / "manifest.json").read_text())["shards"]
    data = open_dataset(root / "train")
    assert len(entries) > 3
    first = 0
    for entry in entries[:-1]:
        starts = data.document_starts(first, first + entry["tokens"])
        assert entry["tokens"] >= 1500 > int(starts[-1]) - first
        first += entry["tokens"]


def test_tail_split_holds_out_the_end_of_each_document(tmp_path, corpus):
    (tmp_path / "long.txt").write_text("abcdefghij" * 100)
    root = make(
        corpus,
        f"data.build.sources=[{tmp_path}/long.txt]",
        "data.build.split_by=tail",
        "data.build.tokenizer.type=characters",
    )
    assert open_dataset(root / "train").num_tokens == 900 + 1
    assert open_dataset(root / "validation").num_tokens == 100 + 1


def test_own_validation_sources_are_the_validation_split(tmp_path, corpus):
    (tmp_path / "held.txt").write_text("held out text")
    root = make(corpus, f"data.build.validation_sources=[{tmp_path}/held.txt]")
    assert open_dataset(root / "validation").num_documents == 1
    assert open_dataset(root / "train").num_documents == 400


def test_stages_json_counts_what_each_stage_did(tmp_path, corpus, small_parts):
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write('{"text": "write to me@example.org, please"}\n{broken\n')
        file.write('{"text": "the same words twice"}\n{"text": "The same words twice"}\n')
    root = make(
        corpus,
        "data.build.on_error=skip",
        "data.build.clean.pii=[email]",
        "data.build.deduplicate.exact=true",
        f"data.build.licences={{{tmp_path}: CC0-1.0}}",
    )
    found = json.loads((root / "train" / "stages.json").read_text())
    assert found["stages"]["read"]["dropped"] == {"broken record": 1}
    assert "is not valid JSON" in found["stages"]["read"]["examples"]["broken record"][0]
    assert found["stages"]["pii"]["found"] == {"email": 1} and found["stages"]["pii"]["changed"] == 1
    assert found["duplicates"]["exact"] == 1
    (source,) = found["sources"].values()
    assert source["documents"] == 403 and source["licence"] == "CC0-1.0"
    for name in ("train", "validation"):
        data = open_dataset(root / name)
        assert (
            found["splits"][name]["documents"] == data.num_documents == sum(found["splits"][name]["lengths"].values())
        )
        assert found["splits"][name]["tokens"] == data.num_tokens


def test_second_build_of_the_same_does_nothing(corpus):
    root = make(corpus)
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    make(corpus)
    assert times == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert not (corpus.parent / ".building-data").exists()


def test_finished_dataset_of_other_settings_is_kept_and_named(corpus):
    root = make(corpus)
    before = content(root)
    message = error_of(corpus, "data.build.tokenizer.vocab_size=310")
    assert str(root) in message and "other sources or settings" in message
    assert content(root) == before


def test_foreign_folder_is_kept(corpus):
    root = corpus.parent / "data"
    root.mkdir()
    (root / "thesis.doc").write_text("years of work")
    assert "is not empty and not a dataset" in error_of(corpus)
    assert (root / "thesis.doc").read_text() == "years of work"


def test_unfinished_directory_is_built_again(corpus):
    root = make(corpus)
    whole = content(root)
    (root / "train/manifest.json").unlink()
    make(corpus)
    assert content(root) == whole


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", "the sources hold no text at all"), ('{"text": "  "}\n', "the sources hold no text at all")],
)
def test_empty_corpus_is_an_error(tmp_path, corpus, text, expected):
    (tmp_path / "corpus.jsonl").write_text(text)
    assert expected in error_of(corpus)
    assert not (tmp_path / "data").exists()


def test_corpus_too_small_to_be_split_says_what_to_set(tmp_path, corpus):
    (tmp_path / "corpus.jsonl").write_text('{"text": "only one document"}\n')
    message = error_of(corpus)
    assert "no document fell into the" in message and "data.build.split_by=tail" in message


def test_broken_record_stops_the_build_and_leaves_nothing_or_is_skipped(tmp_path, corpus):
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write("{broken\n")
    assert f"{tmp_path}/corpus.jsonl:401: is not valid JSON" in error_of(corpus)
    assert not (tmp_path / "data").exists()
    root = make(corpus, "data.build.on_error=skip")
    assert sum(open_dataset(root / name).num_documents for name in ("train", "validation")) == 400


def test_broken_record_found_by_a_worker_process_is_named(tmp_path, corpus, small_parts):
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write("{broken\n")
    words = ["data.build.num_workers=2", "data.build.clean.unicode=NFC"]
    assert f"{tmp_path}/corpus.jsonl:401: is not valid JSON" in error_of(corpus, *words)


def test_large_vocabulary_is_stored_as_uint32(tmp_path, corpus):
    letters = [chr(0x4E00 + i) for i in range(20_000)] + [chr(0xAC00 + i) for i in range(11_000)]
    letters += [chr(0x20000 + i) for i in range(40_000)]
    (tmp_path / "wide.txt").write_text("".join(letters), encoding="utf-8")
    (tmp_path / "held.txt").write_text("".join(letters[:9]), encoding="utf-8")
    root = make(
        corpus,
        f"data.build.sources=[{tmp_path}/wide.txt]",
        f"data.build.validation_sources=[{tmp_path}/held.txt]",
        "data.build.tokenizer.type=characters",
    )
    data = open_dataset(root / "train")
    assert data.vocab_size == len(letters) + 2
    tokenizer = build_steps.tokenizers.load_tokenizer(root / "train")
    assert tokenizer.decode(data.tokens(0, data.num_tokens - 1).tolist()) == "".join(letters)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disk_is_named_and_the_build_goes_on_when_there_is_room(tmp_path, corpus, small_parts):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    try:
        message = error_of(corpus, f"data.dir={small}/data")
        assert "No space left on device" in message and "make room; finished parts are kept" in message
        assert not (small / "data").exists()
        subprocess.run(["mount", "-o", "remount,size=64M", str(small)], check=True)
        root = make(corpus, f"data.dir={small}/data")
        assert content(root) == content(make(corpus))
    finally:
        subprocess.run(["umount", str(small)], check=True)
