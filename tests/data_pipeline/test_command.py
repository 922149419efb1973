"""Places and options of the `millstream data` commands."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from configs.load import ConfigError
from configs.schema import CacheConfig
from data_pipeline.command import find_splits, open_splits, options
from data_pipeline.shards import DataError
from tests.data_pipeline.token_datasets import write_dataset

DEFAULTS = {"documents": 2, "fraction": 0.5, "picture": ""}


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *given) -> None:
        pass


@pytest.fixture
def url(tmp_path) -> Iterator[str]:
    """Address of tmp_path."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def write_both(folder: Path) -> None:
    write_dataset(folder / "train", [[3, 4]])
    write_dataset(folder / "validation", [[5]])


def test_folder_of_a_dataset_is_both_of_its_splits(tmp_path):
    write_both(tmp_path)
    expected = {"train": f"{tmp_path}/train", "validation": f"{tmp_path}/validation"}
    assert find_splits(str(tmp_path)) == find_splits(f"{tmp_path}/") == expected


def test_dataset_without_validation_is_one_split(tmp_path):
    write_dataset(tmp_path / "train", [[3, 4]])
    assert find_splits(str(tmp_path)) == {"train": f"{tmp_path}/train"}


def test_split_is_itself(tmp_path):
    write_both(tmp_path)
    assert find_splits(f"{tmp_path}/validation") == {"": f"{tmp_path}/validation"}


@pytest.mark.parametrize("name", [".", "nothing"])
def test_place_without_a_dataset_is_named(tmp_path, name):
    with pytest.raises(DataError, match=f"{tmp_path}/{name}.*holds no finished dataset.*millstream data build"):
        find_splits(f"{tmp_path}/{name}")


def test_addresses_are_places_too(tmp_path, url):
    write_both(tmp_path / "data")
    assert find_splits(f"{url}/data/") == {"train": f"{url}/data/train", "validation": f"{url}/data/validation"}
    assert find_splits(f"{url}/data/train") == {"": f"{url}/data/train"}
    opened = open_splits(f"{url}/data", CacheConfig(dir=str(tmp_path / "cache")))
    assert [dataset.num_tokens for dataset in opened.values()] == [7, 5]
    with pytest.raises(DataError, match=f"{url}/nothing: holds no finished dataset"):
        find_splits(f"{url}/nothing")


def test_options_have_the_types_of_their_defaults():
    words = ["documents=7", "fraction=1e-3", "picture=a=b.png"]
    assert options(words, DEFAULTS) == {"documents": 7, "fraction": 0.001, "picture": "a=b.png"}
    assert options([], DEFAULTS) == DEFAULTS


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("document=3", "document=3: did you mean documents="),
        ("zzz=3", "known here are documents=, fraction=, picture="),
        ("documents", "did you mean documents="),
        ("documents=x", "documents=x: expected a whole number"),
        ("documents=-1", "documents=-1: expected a whole number, 0 or more"),
        ("fraction=much", "fraction=much: expected a number"),
    ],
)
def test_options_that_cannot_be_are_named(word, expected):
    with pytest.raises(ConfigError) as caught:
        options([word], DEFAULTS)
    assert expected in str(caught.value)
