"""Language identification: accuracy on real texts, what is not language, and that nothing leaves the process."""

from __future__ import annotations

import io
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import zstandard

from data_pipeline import language
from data_pipeline.language import NO_LANGUAGE, identify, known_languages, score_together

# The Universal Declaration's file names -> codes, of the languages the model knows and in the script they are usually
# written in. Bosnian, Croatian and Serbian, and Indonesian and Malay, are mixed up and looked at apart.
DECLARATIONS = """
    afr:af amh:am arb:ar bel:be ben:bn bre:br bul:bg cat:ca ces:cs cmn_hans:zh cmn_hant:zh cym:cy dan:da deu:de
    ell_monotonic:el eng:en epo:eo est:et eus:eu fao:fo fin:fi fra:fr fri:fy gla:gd gle:ga glg:gl guj:gu
    hau_NG:ha heb:he hin:hi hun:hu hye:hy ibo:ig isl:is ita:it jav:jv jpn:ja kan:kn kat:ka kaz:kk khk:mn khm:km
    kin:rw kir:ky kor:ko lao:lo lat:la lav:lv lin:ln lit:lt ltz:lb lug:lg mal:ml mar:mr mkd:mk mlt:mt mya:my
    nep:ne nld:nl nno:nn nob:no pan:pa pes_1:fa pol:pl por_BR:pt por_PT:pt ron:ro rus:ru san:sa slk:sk slv:sl
    sna:sn som:so spa:es swe:sv swh:sw tam:ta tat:tt tgk:tg tgl:tl tha:th tuk_latn:tk tur:tr uig_arab:ug ukr:uk
    urd:ur uzn_latn:uz vie:vi xho:xh yor:yo zul:zu
"""
NEIGHBOURS = [{"bos_latn": "bs", "hrv": "hr", "srp_latn": "sr"}, {"ind": "id", "mly_latn": "ms"}]


@pytest.fixture(scope="module")
def declarations(shared_data) -> dict[str, str]:
    with open(shared_data / "pretrain/udhr.jsonl.zst", "rb") as file:
        rows = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8")
        return {row["id"]: " ".join(row["text"].split()) for row in map(json.loads, rows)}


def snippets(text: str, length: int, count: int = 5) -> list[str]:
    """`count` pieces, evenly spread, after the heading: some files have it in English."""
    return [text[int(start) :][:length] for start in np.linspace(300, max(300, len(text) - length), count)]


@pytest.mark.parametrize(("length", "accuracy"), [(50, 0.97), (200, 0.99), (1000, 0.99)])
def test_the_declaration_of_human_rights_is_identified(declarations, length, accuracy):
    expected = dict(pair.split(":") for pair in DECLARATIONS.split())
    right = [
        identify(piece)[0] == code for name, code in expected.items() for piece in snippets(declarations[name], length)
    ]
    assert len(expected) == 91
    assert np.mean(right) >= accuracy


@pytest.mark.parametrize("group", NEIGHBOURS, ids=lambda group: "-".join(group.values()))
def test_neighbours_are_mixed_up_only_with_each_other(declarations, group):
    for name in group:
        assert {identify(piece)[0] for piece in snippets(declarations[name], 200, 20)} <= set(group.values())


def test_scores_of_neighbours_add_up(declarations):
    pieces = [piece for name in NEIGHBOURS[0] for piece in snippets(declarations[name], 200, 20)]
    alone = [identify(piece)[1] for piece in pieces]
    together = [score_together(piece, {"bs", "hr", "sr"}) for piece in pieces]
    assert min(alone) < 0.5
    assert min(together) > 0.95


def texts_of(shared_data: Path) -> dict[str, list[str]]:
    """Texts of questions, paragraphs and captions, in seven languages."""
    tasks = shared_data / "tasks"
    found = {}
    for code in ("ar", "hi", "ru", "zh"):
        articles = json.loads((tasks / f"xquad/{code}.json").read_text())["data"]
        found[code] = [paragraph["context"] for article in articles for paragraph in article["paragraphs"]]
    for code in ("de", "en", "fr"):
        lines = (tasks / f"multi30k/val.{code}").read_text().splitlines()
        found[code] = [" ".join(lines[i : i + 4]) for i in range(0, len(lines), 4)]
    return found


def test_other_texts_are_identified_with_certainty(shared_data):
    for code, texts in texts_of(shared_data).items():
        together = {"zh", "wuu"} if code == "zh" else {code}  # foreign names make Chinese look like Wu
        assert np.mean([identify(text)[0] in together for text in texts]) >= 0.99, code
        assert np.mean([score_together(text, together) > 0.5 for text in texts]) >= 0.99, code


def test_text_in_capitals_is_identified(shared_data):
    texts = texts_of(shared_data)
    for code in ("de", "en", "fr", "ru"):
        shouted = [text.upper() + " ok" for text in texts[code][:100]]  # not all of it is in capitals
        assert np.mean([identify(text)[0] == code for text in shouted]) >= 0.98, code


@pytest.mark.parametrize("text", ["", " \n\t ", "\0\0", "12345 67890", "😀😀😀", "x" * 1000, "== -> {} ;; ()[]"])
def test_no_language_has_no_certain_language(text):
    code, score = identify(text)
    assert code == NO_LANGUAGE or score < 0.5


def test_a_notice_in_another_language_does_not_decide(shared_data):
    french = " ".join(texts_of(shared_data)["fr"])[:5000]
    english = "This page is part of the archive and may be used freely as long as its source is named in full."
    assert identify(f"{english} {english}\n{french}")[0] == "fr"


def test_only_a_sample_of_a_long_text_is_read():
    assert len(language._sample("x" * 10_000_000)) < 1000
    assert language._sample("short") == "short"


def test_scores_are_those_of_the_package(declarations):
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    theirs = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    for text in list(declarations.values())[::10]:
        piece = text[300:700]
        code, score = theirs.classify(piece)
        assert identify(piece) == (code, pytest.approx(score, abs=1e-5))


def test_nothing_is_downloaded_or_kept(monkeypatch, tmp_path):
    def refuse(*arguments):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    language._model.cache_clear()
    assert identify("This is a sentence in English, as everybody can see.")[0] == "en"
    assert not os.listdir(tmp_path)


def test_known_languages_are_codes():
    known = known_languages()
    assert len(known) == 139
    assert {"en", "de", "zh", "no", "nn"} <= set(known)
    assert NO_LANGUAGE not in known
