"""The corpus that every environment carries: the docstrings of Python's library and of the installed packages.

Real English, tens of megabytes of it, without a download, so the demo runs anywhere. The sources are read, never
imported. Two things come out of it: text to pretrain on (with the documentation topics of `pydoc_data`), and a task,
"which package does this docstring document?", whose examples are kept out of the pretraining text: a docstring belongs
to the task if a hash of its text says so.

Docstrings are found by a pattern: parsing 218 MB of sources takes a minute, the pattern takes six seconds, and on 1,500
files it found 7,980 of the 7,989 docstrings that the parser finds, and 6 other texts.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from inspect import cleandoc
from pathlib import Path

import xxhash

from configs.schema import DedupeConfig
from data_pipeline.dedupe import KEPT, mask_duplicates
from data_pipeline.sources import Document

NUM_LABELS = 10  # the packages with the most docstrings; Python's own library is one
EXAMPLES_PER_LABEL = 500  # of training, at most; and a fifth as many held out
TASK_SHARE = 0.25  # of the docstrings are kept out of the pretraining text, for the task
SHORTEST = 60  # characters
LIBRARY = "python"
SKIPPED_PACKAGES = {"pip", "setuptools", "pkg_resources", "wheel"}  # they carry copies of others
SKIPPED_FOLDERS = {"tests", "test", "testing", "site-packages", "__pycache__", "idlelib", "lib2to3"}
# A string between triple quotes that opens a file, or follows a line that ends with a colon.
FILE_START = r"\A(?:[ \t]*(?:\#[^\n]*)?\n)*"
AFTER_COLON = r":[ \t]*(?:\#[^\n]*)?\n(?:[ \t]*(?:\#[^\n]*)?\n)*[ \t]*"
STRING = r"""([rRuU]?(?P<quotes>\"{3}|'{3})(?:[^\\]|\\.)*?(?P=quotes))"""
DOCSTRING = re.compile(f"(?:{FILE_START}|{AFTER_COLON}){STRING}", re.DOTALL)
# What gives a package away besides its own name.
ALIASES = {
    "numpy": ["np", "ndarray"],
    "pandas": ["pd", "DataFrame", "dataframe", "Series"],
    "torch": ["pytorch"],
    "networkx": ["nx"],
    "sklearn": ["scikit-learn", "scikit"],
    "matplotlib": ["plt", "mpl"],
    "transformers": ["huggingface", "hf"],
    "pyarrow": ["pa", "arrow"],
    "datasets": ["huggingface"],
}


def read_docstrings() -> Iterator[tuple[str, str]]:
    """(text, place) of the docstrings that are not kept for the task, and of pydoc's topics, near-duplicates too."""
    for text, place, _ in _all_docstrings():
        if not _is_for_task(text):
            yield text, place
    for topic, text in sorted(_pydoc_topics().items()):
        yield text, f"pydoc_data:{topic}"


def write_corpus_and_task(directory: Path) -> dict[str, int]:
    """Write corpus.jsonl, task.train.jsonl and task.dev.jsonl ({"text", "label"}); returns the number of lines of each.

    Near-duplicates are removed over everything at once, so none of them stands on both sides of a split. The task has
    equally many examples of each label, and the names of all packages are masked in it.
    """
    documents = [Document(text, label) for text, _, label in _all_docstrings()]
    mask = mask_duplicates((document.text for document in documents), DedupeConfig(exact=True, near=True))
    kept = [document for document, code in zip(documents, mask, strict=True) if code == KEPT]
    task = [document for document in kept if _is_for_task(document.text)]
    corpus = [document.text for document in kept if not _is_for_task(document.text)] + list(_pydoc_topics().values())
    labels = [label for label, _ in Counter(document.place for document in task).most_common(NUM_LABELS)]
    mask = name_mask(labels)
    examples: dict[str, list[dict[str, str]]] = defaultdict(list)
    for document in sorted(task, key=lambda document: _hash(document.text, "order")):
        if document.place in labels:
            examples[document.place].append({"text": mask(document.text), "label": document.place})
    per_label = min(EXAMPLES_PER_LABEL, *(len(found) * 5 // 6 for found in examples.values()))
    dev = [example for found in examples.values() for example in found[: per_label // 5]]
    train = [example for found in examples.values() for example in found[per_label // 5 : per_label // 5 + per_label]]
    directory.mkdir(parents=True, exist_ok=True)
    contents = {"corpus": [{"text": text} for text in corpus], "task.train": train, "task.dev": dev}
    for name, records in contents.items():
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8", errors="replace")
    return {name: len(records) for name, records in contents.items()}


def name_mask(labels: Iterable[str]):
    """A function that replaces the names of the packages, and of their aliases, by "module"."""
    names = {*labels, *ALIASES, *(alias for aliases in ALIASES.values() for alias in aliases)}
    longest_first = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    pattern = re.compile(rf"(?i)(?<![a-z0-9])({longest_first})(?![a-z0-9])")
    return lambda text: pattern.sub("module", text)


def _all_docstrings() -> Iterator[tuple[str, str, str]]:
    """(text, place, package) in the order of packages, files and lines."""
    for package, file in _source_files():
        for line, text in _docstrings_of(file):
            yield text, f"{package}:{file.name}:{line}", package


def _source_files() -> Iterator[tuple[str, Path]]:
    """(package, file): Python's library, then each installed package."""
    roots = [(LIBRARY, Path(sysconfig.get_path("stdlib")))]
    installed = Path(sysconfig.get_path("purelib"))
    packages = sorted(path for path in installed.iterdir() if (path / "__init__.py").exists())
    roots += [(path.name, path) for path in packages if path.name not in SKIPPED_PACKAGES]
    for label, root in roots:
        for file in sorted(root.rglob("*.py")):
            if not SKIPPED_FOLDERS & set(file.relative_to(root).parts[:-1]):
                yield label, file


def _docstrings_of(file: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of the docstrings in one file; a file that is not UTF-8 has none."""
    try:
        source = file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return
    for found in DOCSTRING.finditer(source):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of backslashes that are no escape
                text = cleandoc(ast.literal_eval(found[1]))
        except (SyntaxError, ValueError):  # not Python of this version
            continue
        if len(text) >= SHORTEST:
            yield source.count("\n", 0, found.start(1)) + 1, text


def _pydoc_topics() -> dict[str, str]:
    """The language reference's texts that `help()` shows."""
    from pydoc_data.topics import topics

    return dict(topics)


def _is_for_task(text: str) -> bool:
    return _hash(text, "task") < TASK_SHARE * 2**64


def _hash(text: str, purpose: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{purpose}\0{text}".encode("utf-8", "replace"))


if __name__ == "__main__":
    for name, number in write_corpus_and_task(Path(sys.argv[1])).items():
        print(f"{Path(sys.argv[1]) / name}.jsonl: {number:,} lines")
