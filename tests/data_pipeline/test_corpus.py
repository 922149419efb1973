"""What cannot be built is refused before any work, with a cure; nothing that is not a build's is ever removed."""

from __future__ import annotations

import json
import os
import subprocess
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.load import ConfigError, load_pretrain
from data_pipeline import build_steps, corpus
from data_pipeline.corpus import Corpus, find_corpus, scan_groups
from data_pipeline.shards import DataError, open_dataset
from tests.data_pipeline.test_build import QUIET, content


@pytest.fixture
def config(tmp_path) -> Path:
    lines = [json.dumps({"text": f"number {number} is no other number"}) for number in range(60)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    settings = {
        "sources": [str(tmp_path / "corpus.jsonl")],
        "validation_fraction": 0.3,
        "tokenizer": {"vocab_size": 300},
    }
    data = {"dir": str(tmp_path / "data"), "build": settings | {"num_workers": 1}}
    (tmp_path / "config.json").write_text(json.dumps({"run_dir": "unused", "data": data}))
    return tmp_path / "config.json"


def make(config: Path, *words: str) -> Path:
    settings = load_pretrain(config, list(words))
    build_steps.build(settings, QUIET)
    return Path(settings.data.dir)


def error_of(config: Path, *words: str) -> str:
    with pytest.raises((ConfigError, DataError)) as caught:
        make(config, *words)
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data.build.sources=[]"], "data.build.sources is empty"),
        (["data.build.sources=[/nowhere.jsonl]"], "/nowhere.jsonl: no such file or folder"),
        (["data.build.tokenizer.type=pretrained"], "data.build.tokenizer.path is missing"),
        (
            ["data.build.tokenizer.type=pretrained", "data.build.tokenizer.path=/nowhere"],
            "/nowhere: holds no tokenizer",
        ),
        (["model.architecture=bert"], "data.build.tokenizer.type=byte_bpe: for model.architecture=bert set wordpiece"),
        (["data.build.clean.decontaminate=[/nowhere.jsonl]"], "/nowhere.jsonl: no such file; correct data.build.clean"),
        (["data.build.clean.languages=[en,klingon]"], "data.build.clean.languages: klingon: cannot be identified"),
        (["data.dir=s3://bucket/corpus"], "data.dir=s3://bucket/corpus: is an address; build into a folder"),
        (["data.build.engine=datatrove", "data.build.slurm={partitio: a}"], "data.build.slurm: "),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_work(config, words, expected):
    assert expected in error_of(config, *words)
    left = config.parent / ".building-data"
    assert not left.exists() or not list(left.glob("*/*.*"))
    assert not (config.parent / "data").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model", "vocab.json"])
def test_broken_tokenizer_is_named(config, tmp_path, name):
    write(tmp_path / "mine" / "merges.txt", "a b")
    write(tmp_path / "mine" / name, "{nonsense")
    words = ["data.build.tokenizer.type=pretrained", f"data.build.tokenizer.path={tmp_path}/mine"]
    assert f"{tmp_path}/mine: holds a broken tokenizer" in error_of(config, *words)


def test_tokenizer_without_berts_special_tokens_is_refused(config, tmp_path):
    write(tmp_path / "mine" / "vocab.txt", "a\nb\n")
    words = ["data.build.tokenizer.type=pretrained", f"data.build.tokenizer.path={tmp_path}/mine"]
    message = error_of(config, *words, "model.architecture=bert")
    assert f"{tmp_path}/mine: model.architecture=bert needs a tokenizer with [PAD] [UNK]" in message


def test_test_set_that_is_broken_is_named_before_the_sources_are_read(config, tmp_path):
    tests = write(tmp_path / "tests.jsonl", "{broken")
    assert f"{tests}:1: is not valid JSON" in error_of(config, f"data.build.clean.decontaminate=[{tests}]")
    assert not list((tmp_path / ".building-data" / "scan").iterdir())


@pytest.mark.parametrize(
    "place", ["data", "data/", "./data", "a b/[c] *ü/data", "deep/deeper/data", "link", "dangling"]
)
def test_dataset_goes_wherever_data_dir_points(config, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "dangling").symlink_to("not there yet")
    make(config, f"data.dir={place}")
    assert open_dataset(tmp_path / place / "train").num_documents > 20
    before = content(tmp_path / place)
    make(config, f"data.dir={place}")
    assert content(tmp_path / place) == before
    left = [path for path in (tmp_path / place).resolve().parent.iterdir() if path.name.startswith(".")]
    assert left == []


def test_file_loop_of_links_and_other_format_in_place_of_the_dataset_are_kept_and_named(config, tmp_path):
    place = write(tmp_path / "data", "a letter")
    assert f"{place}: is a file; choose another data.dir" in error_of(config)
    assert place.read_text() == "a letter"
    place.unlink()
    place.symlink_to("data")
    assert "cannot be reached" in error_of(config) and place.is_symlink()
    place.unlink()
    for split in ("train", "validation"):
        write(place / split / "manifest.json", '{"format": 1}')
    message = error_of(config)
    assert "is of format 1" in message and "choose another data.dir, or remove it first" in message
    assert (place / "train" / "manifest.json").read_text() == '{"format": 1}'


@pytest.mark.parametrize("in_place", ["folder", "file", "link"])
def test_what_no_build_left_is_kept_and_named(config, tmp_path, in_place):
    mine = write(tmp_path / "mine" / "thesis.doc", "years of work")
    work = tmp_path / ".building-data"
    if in_place == "link":
        work.symlink_to(mine.parent)
    elif in_place == "folder":
        mine = mine.parent.rename(work) / mine.name
    else:
        mine = mine.rename(work)
    assert f"{work}: is where the build works" in error_of(config)
    assert mine.read_text() == "years of work"
    assert not (tmp_path / "data").exists()


def test_work_of_another_version_is_begun_anew(config, tmp_path):
    work = tmp_path / ".building-data"
    write(work / "begun", "of another version")
    write(work / "plan.json", "{not what is expected")
    write(work / "tokens" / "part-00000.tokens", "nor this")
    assert open_dataset(make(config) / "train").num_documents > 20
    assert not work.exists()


@pytest.mark.parametrize("moment", ["old removed", "renamed", "half cleared"])
def test_build_killed_while_it_finishes_goes_on(config, tmp_path, monkeypatch, moment):
    whole = content(make(config, f"data.dir={tmp_path}/whole"))
    write(tmp_path / "data" / "train" / "old.tokens", "of an unfinished dataset")
    with monkeypatch.context() as patched:

        def killed(*args) -> None:
            if moment == "half cleared":
                (tmp_path / ".building-data" / "plan.json").unlink()
            raise KeyboardInterrupt

        if moment == "old removed":
            patched.setattr(Path, "rename", lambda path, to: killed() if to.name == "data" else os.rename(path, to))
        else:
            patched.setattr(build_steps, "clear", killed)
        with pytest.raises(KeyboardInterrupt):
            make(config)
    assert (tmp_path / "data").exists() == (moment != "old removed")
    assert content(make(config)) == whole
    assert not (tmp_path / ".building-data").exists()


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A small file system of its own; skips the test where there can be none."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip(f"cannot mount a file system here: {made.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_mount_point_cannot_be_the_dataset_but_hold_it(config, tmp_path):
    with mounted(tmp_path / "disk"):
        assert (
            f"is a mount point, which cannot be renamed to; choose a folder in it: {tmp_path}/disk/corpus"
            in error_of(config, f"data.dir={tmp_path}/disk")
        )
        make(config, f"data.dir={tmp_path}/disk/corpus")


def test_file_system_that_cannot_be_written_is_named(config, tmp_path):
    with mounted(tmp_path / "disk", "-o", "ro"):
        message = error_of(config, f"data.dir={tmp_path}/disk/data")
    assert f"{tmp_path}/disk/data: cannot be written" in message and "choose another data.dir" in message


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.data())
def test_groups_of_files_hold_every_file_once_and_end_at_size_number_and_held_out_files(sizes, data):
    num_own = data.draw(st.integers(1, len(sizes)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "SCANNED_FILES", 7)
        groups = scan_groups(Corpus([""] * len(sizes), num_own, sizes, [], ""), 100)  # type: ignore[arg-type]
    assert [number for first, after in groups for number in range(first, after)] == list(range(len(sizes)))
    for first, after in groups:
        assert 0 < after - first <= 7 and sum(sizes[first : after - 1]) < 100
        assert first >= num_own or after <= num_own


@pytest.mark.parametrize(
    ("files", "size", "expected"),
    [
        (["a.jsonl", "b.jsonl"], 60 << 20, True),
        (["a.jsonl", "b.jsonl"], 70 << 20, False),
        (["a.jsonl.zst", "b.jsonl.zst"], 60 << 20, False),
        (["a.jsonl", "https://server/b.jsonl"], 1, False),
        ([f"{n}.jsonl" for n in range(1001)], 1, False),
    ],
    ids=["little text", "much text", "much text when it is decompressed", "on a server", "many files"],
)
def test_little_text_is_scanned_without_workers(files, size, expected):
    sizes = array("Q", [size] * len(files))
    assert corpus.is_small(Corpus(files, len(files), sizes, array("Q"), "")) == expected


def test_state_of_the_files_decides_what_a_build_is_of(config, tmp_path):
    settings = load_pretrain(config)
    before = find_corpus(settings)
    assert find_corpus(settings).built_from == before.built_from
    before.refuse_changed()
    os.utime(tmp_path / "corpus.jsonl", (1, 1))
    assert find_corpus(settings).built_from != before.built_from
    with pytest.raises(DataError, match=r"corpus\.jsonl: was changed while it was read; run the same command again"):
        before.refuse_changed()
