"""Readers of tagged sentences: what they read, and that every damage is answered with a place."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from data_pipeline.shards import DataError
from finetune.conll import Sentence, read_sentences

CONLL = "-DOCSTART- -X- O\n\nU.N. NNP B-org\nofficial NN O\n\nEkeus NNP B-per\n\n\n-DOCSTART- -X- O\n\nheads VBZ O\n"
CONLLU = """\
# newdoc id = a
# text = It's a dog
1-2\tIt's\t_\t_\t_\t_\t_\t_\t_\t_
1\tIt\tit\tPRON\tPRP\t_\t4\tnsubj\t_\t_
2\t's\tbe\tAUX\tVBZ\t_\t4\tcop\t_\t_
2.1\tgone\tgo\tVERB\tVBN\t_\t_\t_\t_\t_
3\ta b\ta\tDET\tDT\t_\t4\tdet\t_\t_

# newdoc id = b
1\tdog\tdog\tNOUN\tNN\t_\t0\troot\t_\t_
"""


def test_columns_come_by_spaces_with_the_last_as_the_tag_and_documents_counted(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text(CONLL)
    assert read_sentences(path, None) == [
        Sentence(["U.N.", "official"], ["B-org", "O"], 1),
        Sentence(["Ekeus"], ["B-per"], 1),
        Sentence(["heads"], ["O"], 2),
    ]
    assert read_sentences(path, 1)[0].tags == ["NNP", "NN"]


def test_a_word_with_a_space_stays_one_word_between_tabs_and_windows_line_ends_go(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes("New York\tB-loc\r\n\u2009\tO\r\n".encode())
    assert read_sentences(path, None) == [Sentence(["New York", "\u2009"], ["B-loc", "O"], 0)]


def test_conllu_gives_syntactic_words_with_upos_compressed_too(tmp_path):
    path = tmp_path / "a.conllu.gz"
    path.write_bytes(gzip.compress(CONLLU.encode()))
    assert read_sentences(path, None) == [
        Sentence(["It", "'s", "a b"], ["PRON", "AUX", "DET"], 1),
        Sentence(["dog"], ["NOUN"], 2),
    ]
    assert read_sentences(path, 4)[0].tags == ["PRP", "VBZ", "DT"]


@pytest.mark.parametrize(
    ("name", "text", "column", "message"),
    [
        ("a.conll", "word\n", None, "a.conll:1: has 1 columns"),
        ("a.conll", "word O\n", 0, "a.conll:1: has 2 columns and the tag should be in number 0"),
        ("a.conll", "a O\nb c O\nd\n", 2, "a.conll:1: has 2 columns"),
        ("a.conll", "a\t\n", None, "a.conll:1: the tag is empty"),
        ("a.conllu", "1\tIt\tit\tPRON\n", None, "a.conllu:1: has 4 columns between tabs"),
        ("a.conll", "\n\n", None, "holds no sentences"),
    ],
)
def test_a_broken_line_is_named(tmp_path, name, text, column, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_sentences(path, column)
    assert message in str(caught.value)


@pytest.mark.parametrize(("name", "text"), [("a.conll", CONLL), ("a.conllu", CONLLU)])
def test_damaged_files_are_read_or_refused_by_name_but_never_crash(tmp_path, name, text):
    rng, path, refused = np.random.default_rng(5), tmp_path / name, 0
    for _ in range(300):
        content = bytearray(text.encode())
        for _ in range(rng.integers(1, 6)):
            place, what = int(rng.integers(len(content))), int(rng.integers(3))
            if what == 0:
                content[place] = int(rng.choice([0, 9, 10, 32, 35, 45, 200, 255]))
            elif what == 1:
                del content[place : place + int(rng.integers(1, 20))]
            else:
                content[place:place] = content[place : place + 9]
        path.write_bytes(content)
        try:
            sentences = read_sentences(path, None)
        except DataError as error:
            refused += 1
            assert str(path) in str(error)
        else:
            assert all(len(one.words) == len(one.tags) > 0 for one in sentences)
    assert 0 < refused < 300


def test_a_missing_file_is_an_error_and_one_that_is_not_utf_8(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_sentences(tmp_path / "a.conll", None)
    (tmp_path / "a.conll").write_bytes(b"caf\xe9 O\n")
    with pytest.raises(DataError, match=r"not UTF-8 \(byte 3\)"):
        read_sentences(tmp_path / "a.conll", None)


def test_the_real_files_are_read_whole(shared_data):
    wnut = read_sentences(shared_data / "tasks/wnut17/train.conll", None)
    assert len(wnut) == 3394
    ud = read_sentences(shared_data / "tasks/ud_ewt/dev.conllu.zst", None)
    assert len(ud) == 2001 and {"NOUN", "VERB", "PUNCT"} <= {tag for one in ud for tag in one.tags}
    assert len({one.document for one in ud}) > 100
