"""The corpus of the environment: what is found, and that the task gives nothing away."""

from __future__ import annotations

import ast
import json
import re
from inspect import cleandoc

import pytest

from data_pipeline import docstrings

SOURCE = '''#!/usr/bin/env python
# A comment first.

"""The module's docstring, which is long enough to be kept in the corpus."""

class A:  # a comment
    r"""A raw docstring with a \\backslash, which is long enough to be kept."""

    def short(self):
        """Too short."""

    async def method(
        self,
        value="a string that is no docstring, although it is long enough for one",
    ):
        # a comment before
        \'\'\'Single quotes of three, over two lines,
            indented as people do it, with an escaped \\' quotation mark.
        \'\'\'
        text = """A string that is no docstring, although it is long enough to be one."""
        return text
'''


def test_docstrings_of_a_file_are_those_that_the_parser_finds(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(SOURCE)
    expected = []
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.AsyncFunctionDef | ast.FunctionDef):
            expected.append(cleandoc(ast.get_docstring(node, clean=False)))
    expected = {text for text in expected if len(text) >= docstrings.SHORTEST}
    found = list(docstrings._docstrings_of(file))
    assert {text for _, text in found} == expected
    assert len(expected) == 3
    assert [line for line, _ in found] == [4, 7, 17]


def test_file_that_is_not_utf8_has_none(tmp_path):
    (tmp_path / "a.py").write_bytes(b'"""' + b"\xff" * 80 + b'"""')
    assert list(docstrings._docstrings_of(tmp_path / "a.py")) == []


def test_package_names_and_aliases_are_masked():
    mask = docstrings.name_mask(["numpy", "torch", "python"])
    assert mask("import numpy as np; np.array, torch.nn, PyTorch, python3, pandas.DataFrame") == (
        "import module as module; module.array, module.nn, module, python3, module.module"
    )


@pytest.mark.slow
def test_task_is_balanced_masked_and_apart_from_the_corpus(tmp_path):
    counts = docstrings.write_corpus_and_task(tmp_path)
    read = {name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open(encoding="utf-8")] for name in counts}
    train, dev, corpus = read["task.train"], read["task.dev"], {record["text"] for record in read["corpus"]}
    labels = sorted({record["label"] for record in train})
    assert len(corpus) > 20_000 and len(labels) == docstrings.NUM_LABELS
    for part in (train, dev):
        numbers = [sum(record["label"] == label for record in part) for label in labels]
        assert len(set(numbers)) == 1
    assert not {record["text"] for record in train} & {record["text"] for record in dev}
    assert not {record["text"] for record in train + dev} & corpus
    giveaway = re.compile(rf"(?i)(?<![a-z0-9])({'|'.join(labels)})(?![a-z0-9])")
    assert not [record for record in train + dev if giveaway.search(record["text"])]
