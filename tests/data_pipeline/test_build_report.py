"""What a build says about its dataset: sources by name or by folder, licences, counts that add up."""

from __future__ import annotations

import json
from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from data_pipeline import build_report
from data_pipeline.build_report import Sources, add_counts, print_result
from data_pipeline.tally import Tally
from tests.data_pipeline.token_datasets import write_dataset

names = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("/".join), unique=True, max_size=30)


def shorten(file: str, depth: int) -> str:
    parts = file.split("/")
    return file if len(parts) <= depth else "/".join(parts[:depth]) + "/" if depth else "all files"


@given(names, st.integers(1, 6))
def test_sources_are_files_or_the_deepest_folders_that_are_few_enough(files, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_report, "MOST_SOURCES", most)
        sources = Sources({})
        for number, file in enumerate(files):
            sources.add(file, 1, number)
            sources.add(file, 2, 10)  # of the next part
    depth = max(takewhile(lambda depth: len({shorten(file, depth) for file in files}) <= most, range(6)))
    expected: dict[str, list[int]] = {}
    for number, file in enumerate(files):
        counts = expected.setdefault(shorten(file, depth), [0, 0, 0])
        counts[:] = [counts[0] + 1, counts[1] + 3, counts[2] + number + 10]
    found = {name: [of["files"], of["documents"], of["characters"]] for name, of in sources.to_json().items()}
    assert found == expected and list(found) == list(expected)


def test_folder_has_the_licences_of_all_its_files(monkeypatch):
    monkeypatch.setattr(build_report, "MOST_SOURCES", 1)
    sources = Sources({"web": "ODC-BY", "web/books": "CC0-1.0"})
    for file in ("data/web/a", "data/web/books/a", "data/own/a"):
        sources.add(file, 1, 1)
    assert sources.to_json()["data/"]["licence"] == "CC0-1.0, ODC-BY, not given"


def test_licence_is_that_of_the_longest_name_that_fits():
    sources = Sources({"web": "ODC-BY", "web/books": "CC0-1.0"})
    sources.add("data/web/books/a", 1, 1)
    assert sources.to_json()["data/web/books/a"]["licence"] == "CC0-1.0"


def test_counts_of_parts_add_up():
    first = {"documents": 2, "tokens": 9, "longest": 8, "lengths": {"1": 1, "8": 1}}
    second = {"documents": 3, "tokens": 12, "longest": 9, "lengths": {"1": 2, "16": 1}}
    expected = {"documents": 5, "tokens": 21, "longest": 9, "lengths": {1: 3, 8: 1, 16: 1}}
    assert add_counts(first, second) == expected


def test_result_names_the_most_frequent_reasons_and_counts_the_others(tmp_path, capsys):
    for split in ("train", "validation"):
        write_dataset(tmp_path / split, [[5, 3]])
    quality = Tally(100)
    for number, reason in enumerate(["a [red] one", "b", "c", "d", "e"]):
        for _ in range(10 - number):
            quality.drop(reason, "an example")
    content = {"stages": {"read": Tally(100).to_json(), "quality": quality.to_json()}, "duplicates": None}
    (tmp_path / "train" / "stages.json").write_text(json.dumps(content))
    print_result(tmp_path, 75, Console(width=40))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/train: 2 documents, 8 tokens"
    assert lines[2] == "dropped by quality: 40 (10 a [red] one; 9 b; 8 c; 13 for 2 other reasons)"
    assert lines[3] == f"built in 1 min 15 s; {tmp_path}/train/card.html describes it"
