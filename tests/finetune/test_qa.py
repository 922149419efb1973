"""Question answering: windows, the best span, and a model that learns to answer on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering, BertModel

from configs.schema import TokenizerConfig
from configs.tuning import AnswersConfig, FinetuneConfig
from data_pipeline.tokenizer import make_tokenizer, save_tokenizer
from finetune.squad import Question, Squad, read_squad, squad_scores
from finetune.tasks import qa
from tests.ranks import run_ranks

COLOURS, ANIMALS = "red blue green white".split(), "cat dog horse sheep".split()  # noqa: SIM905
OTHERS = "the old man saw it near a river and then went home again".split()  # noqa: SIM905


def squad_json(num: int, seed: int, unanswerable: bool) -> dict:
    """Contexts with a colour and an animal among other words; a question asks for one of them, which may be missing."""
    rng = np.random.default_rng(seed)
    paragraphs = []
    for number in range(num):
        words = list(rng.choice(OTHERS, rng.integers(8, 30)))
        colour, animal = str(rng.choice(COLOURS)), str(rng.choice(ANIMALS))
        asked, answer = [("which colour", colour), ("which animal", animal)][rng.integers(2)]
        missing = unanswerable and rng.random() < 0.3
        for word in (colour, animal):
            if not (missing and word == answer):
                words.insert(rng.integers(len(words) + 1), word)
        context = " ".join(map(str, words))
        answers = [] if missing else [{"text": answer, "answer_start": f" {context} ".index(f" {answer} ")}]
        entry = {"id": f"{seed}-{number}", "question": asked, "answers": answers}
        paragraphs.append({"context": context, "qas": [entry | ({"is_impossible": missing} if unanswerable else {})]})
    return {"version": "v2.0" if unanswerable else "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny BERT with its tokenizer, and questions."""
    folder = tmp_path_factory.mktemp("qa")
    model = folder / "bert"
    model.mkdir()
    texts = [" ".join([*COLOURS, *ANIMALS, *OTHERS, "which colour animal"])] * 5
    tokenizer = make_tokenizer(TokenizerConfig(type="wordpiece", vocab_size=200), texts, model)
    save_tokenizer(tokenizer, model, 64)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(
        BertConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=64, initializer_range=0.1, **sizes)
    ).save_pretrained(model)
    for name, num in (("train", 600), ("dev", 101)):
        (folder / f"{name}.json").write_text(json.dumps(squad_json(num, num, unanswerable=True)))
    return folder


def settings(folder: Path, **more) -> FinetuneConfig:
    values = {
        "task": "qa",
        "model": str(folder / "bert"),
        "train": str(folder / "train.json"),
        "dev": str(folder / "dev.json"),
        "run_dir": str(folder / "run"),
        "log": {"tensorboard": False},
        "tuning": {"num_epochs": 8, "batch_size": 16, "micro_batch_size": 8, "dropout": 0.0, "max_seq_len": 24},
    }
    values["tuning"] |= {"optimizer": {"lr": 3e-3}, "window_overlap": 4} | more.pop("tuning", {})
    return FinetuneConfig.model_validate(values | more)


@pytest.fixture(scope="module")
def encoded(folder) -> tuple[Squad, list[dict]]:
    config = settings(folder)
    split = qa.load(config).dev
    return split, qa.encode(config, AutoTokenizer.from_pretrained(folder / "bert"), split)


def test_windows_cover_every_character_of_the_context_and_hold_the_answer(encoded):
    split, rows = encoded
    assert len(rows) > len(split.questions)  # some are longer than a row
    for number, question in enumerate(split.questions):
        windows = [row for row in rows if row["example"] == number]
        covered = {char for row in windows for a, b in row["offsets"] if a >= 0 for char in range(a, b)}
        assert covered >= {place for place, char in enumerate(question.context) if char != " "}
        found = [
            question.context[row["offsets"][first][0] : row["offsets"][last][1]]
            for row in windows
            for first, last in [row["labels"]]
            if first
        ]
        assert set(found) == {text for text, _ in question.answers}


def test_answer_that_a_window_cuts_is_no_answer_of_that_window():
    offsets = np.array([[-1, -1], [0, 3], [4, 7], [8, 11], [-1, -1]])
    assert qa.answer_tokens(offsets, (("bcd", 4),)) == (2, 2)
    assert qa.answer_tokens(offsets, (("bcd efg", 4),)) == (2, 3)
    assert qa.answer_tokens(offsets, (("efg hij", 8),)) == (0, 0)
    assert qa.answer_tokens(offsets, (("efg hij", 8), ("abc", 0))) == (1, 1)  # another one lies inside
    assert qa.answer_tokens(offsets, ()) == (0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_best_spans_are_those_of_all_pairs(seed):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(2, 12)).astype(np.float32)
    offsets = np.array([[-1, -1]] * 3 + [[4 * i, 4 * i + 3] for i in range(8)] + [[-1, -1]])
    pairs = [
        ((4 * i, 4 * j + 3), float(scores[0, i + 3] + scores[1, j + 3]))
        for i in range(8)
        for j in range(i, min(8, i + 3))
    ]
    expected = sorted(pairs, key=lambda pair: -pair[1])[:5]
    found = qa.best_spans(offsets, scores, longest=3, num=5)
    assert [span for span, _ in found] == [span for span, _ in expected]
    np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], rtol=1e-5)


def test_answer_is_the_best_over_the_windows_and_none_where_no_answer_scores_more():
    question = Question("q", "?", "abc def", ())
    rows = [
        {"example": 0, "offsets": np.array([[-1, -1], [0, 3], [-1, -1]])},
        {"example": 0, "offsets": np.array([[-1, -1], [4, 7], [-1, -1]])},
    ]
    outputs = [np.array([[2.0, 1, 0], [2.0, 1, 0]]), np.array([[1.5, 2, 0], [1.5, 2, 0]])]

    def answer(threshold: float, is_v2: bool = True) -> qa.Answer:
        settings = AnswersConfig(no_answer_threshold=threshold)
        return qa.answers_of(settings, Squad([question], is_v2), rows, outputs)["q"]

    assert answer(0).text == "def" and answer(0).margin == pytest.approx(3 - 4)  # the least sure window says no
    assert answer(-2).text == "" and answer(-2).best_text == "def"
    assert answer(-2, is_v2=False).text == "def"
    assert [(c["text"], c["start"]) for c in answer(0).candidates] == [("def", 4), ("abc", 0)]
    assert sum(c["probability"] for c in answer(0).candidates) == pytest.approx(1, abs=1e-5)


def test_long_question_is_cut_and_leaves_room_for_the_context(folder):
    context = "the old man saw a red cat"
    split = Squad([Question("q", " ".join(OTHERS * 9), context, (("red", 18),))], is_v2=False)
    (row,) = qa.encode(settings(folder), AutoTokenizer.from_pretrained(folder / "bert"), split)
    assert len(row["input_ids"]) <= 24 and row["labels"][0] > 0


@pytest.mark.distributed
def test_model_learns_to_answer_and_to_refuse_and_loads_in_transformers(folder):
    config = settings(folder)
    (folder / "qa.yaml").write_text(config.model_dump_json())
    run_ranks(2, ["-m", "finetune.run", "--config", str(folder / "qa.yaml")], folder / "logs")
    results = json.loads((folder / "run/results.json").read_text())
    assert results["f1"]["mean"] > 85 and results["no_answer_f1"]["mean"] > 60
    assert results["best_f1"]["mean"] >= results["f1"]["mean"]
    lines = [json.loads(line) for line in (folder / "run/predictions.jsonl").open()]
    predictions = {line["id"]: line["prediction"] for line in lines}
    again = squad_scores(read_squad(folder / "dev.json"), predictions)
    assert again["f1"] == pytest.approx(results["f1"]["mean"])
    _, info = BertForQuestionAnswering.from_pretrained(folder / "run/model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
