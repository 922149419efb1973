"""Tagging: words to rows and back to tags, and a tiny real fine-tuning on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, pipeline

from configs.schema import TokenizerConfig
from configs.tuning import FinetuneConfig
from data_pipeline.shards import DataError
from data_pipeline.tokenizer import make_tokenizer, save_tokenizer
from finetune.conll import Sentence
from finetune.tasks import IGNORE_INDEX, tagging
from tests.ranks import run_ranks

PEOPLE, PLACES = ["anna", "bert", "carl", "dora"], ["rome", "oslo", "kiev"]
OTHERS = ["sees", "goes", "to", "and", "with", "by"]


def sentences(num: int, seed: int) -> list[Sentence]:
    """Names of one to three words among others; their tags follow from the words."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(num):
        words, tags = [], []
        for _ in range(rng.integers(2, 5)):
            kind, names = [("per", PEOPLE), ("loc", PLACES)][rng.integers(2)]
            length = rng.integers(1, 3)
            words += [*rng.choice(names, length), *rng.choice(OTHERS, 2)]
            tags += [f"B-{kind}", *[f"I-{kind}"] * (length - 1), "O", "O"]
        found.append(Sentence([str(word) for word in words], tags, 1 + number // 4))
    return found


def write(path: Path, found: list[Sentence]) -> None:
    lines, document = [], 0
    for one in found:
        if one.document != document:
            lines.append("-DOCSTART- O\n")
            document = one.document
        lines += [*(f"{word} {tag}" for word, tag in zip(one.words, one.tags, strict=True)), ""]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny BERT, a tiny byte-level tokenizer, and sentences."""
    folder = tmp_path_factory.mktemp("tagging")
    texts = [" ".join([*PEOPLE, *PLACES, *OTHERS])] * 5
    for name, kind in (("bert", "wordpiece"), ("bytes", "byte_bpe")):
        (folder / name).mkdir()
        tokenizer = make_tokenizer(TokenizerConfig(type=kind, vocab_size=300), texts, folder / name)
        save_tokenizer(tokenizer, folder / name, 64)
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=64, initializer_range=0.1,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder / name)
    write(folder / "train.conll", sentences(200, 1))
    write(folder / "dev.conll", sentences(61, 2))
    return folder


def config(folder: Path, **more) -> FinetuneConfig:
    tuning = {"max_seq_len": 24} | more.pop("tuning", {})
    usual = {
        "task": "tagging", "model": str(folder / "bert"), "train": str(folder / "train.conll"),
        "dev": str(folder / "dev.conll"), "run_dir": str(folder / "run"), "tuning": tuning,
    }  # fmt: skip
    return FinetuneConfig(**usual | more)


@pytest.mark.parametrize("model", ["bert", "bytes"])
@pytest.mark.parametrize("document_context", [False, True])
def test_every_word_has_one_label_at_its_first_piece_in_rows_that_fit(folder, model, document_context):
    settings = config(folder, tagging={"document_context": document_context}, tuning={"max_seq_len": 12})
    tokenizer = AutoTokenizer.from_pretrained(folder / model)
    split = tagging.load(settings).dev
    rows = tagging.encode(settings, tokenizer, split)
    assert max(len(row["input_ids"]) for row in rows) == 12
    assert len(rows) > len(split.sentences)  # some take several
    names, found = split.label_names, []
    for row in rows:
        assert {len(values) for name, values in row.items() if name != "example"} == {len(row["input_ids"])}
        found += [
            (row["input_ids"][at], names[label]) for at, label in enumerate(row["labels"]) if label != IGNORE_INDEX
        ]
    words = [
        ((" " if number else "") + word, tag)
        for one in split.sentences
        for number, (word, tag) in enumerate(zip(one.words, one.tags, strict=True))
    ]
    assert [tag for _, tag in found] == [tag for _, tag in words]
    assert [first for first, _ in found] == [
        tokenizer(word, add_special_tokens=False)["input_ids"][0] for word, _ in words
    ]


def test_context_is_of_the_same_document_on_both_sides(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    found = [
        Sentence([word], ["O"], document)
        for word, document in (("rome", 1), ("anna", 2), ("bert", 2), ("oslo", 2), ("kiev", 3))
    ]
    split = tagging.Split(found, ["O", "X"], None, False)
    plain, around = (
        [
            tokenizer.decode(row["input_ids"])
            for row in tagging.encode(config(folder, tagging={"document_context": on}), tokenizer, split)
        ]
        for on in (False, True)
    )
    assert plain[2] == "[CLS] bert [SEP]"
    assert around == ["[CLS] rome [SEP]", *["[CLS] anna bert oslo [SEP]"] * 3, "[CLS] kiev [SEP]"]


def test_a_word_without_any_piece_and_one_longer_than_a_row_keep_their_places(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    words = ["anna", "\u200b", "romeoslokiev" * 6, "bert"]
    split = tagging.Split([Sentence(words, ["A", "B", "A", "B"], 0)], ["A", "B"], None, False)
    rows = tagging.encode(config(folder), tokenizer, split)
    assert [label for row in rows for label in row["labels"] if label != IGNORE_INDEX] == [0, 1, 0, 1]
    assert max(len(row["input_ids"]) for row in rows) <= 24


def test_rows_become_sentences_again_and_a_tag_unknown_to_training_is_a_mistake():
    split = tagging.Split(
        [Sentence(["a", "b", "c"], ["B-x", "I-x", "O"], 0), Sentence(["d"], ["B-z"], 0)],
        ["B-x", "I-x", "O"], "BIO", True,
    )  # fmt: skip
    certain = np.log(np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [0.0001, 0.6, 0.3999]]))
    outputs = [certain[:2], certain[2:3], certain[3:]]
    rows = [{"example": 0}, {"example": 0}, {"example": 1}]
    assert tagging.decode(split, rows, outputs) == [["B-x", "I-x", "O"], ["O"]]  # I-x cannot begin a sentence
    scores = tagging.evaluate(config(Path()), split, rows, outputs)
    assert scores == {"f1": pytest.approx(2 / 3), "precision": 1.0, "recall": 0.5, "f1_x": 1.0, "f1_z": 0.0,
                      "accuracy": 0.75}  # fmt: skip


def test_the_scheme_of_training_is_chosen_and_plain_tags_have_none(folder, tmp_path):
    assert tagging.load(config(folder)).train.scheme == "BIO"
    examples = tagging.load(config(folder, tagging={"scheme": "BIOES"}))
    assert {"S-per", "E-loc"} <= set(examples.label_names)
    assert tagging.load(config(folder, tagging={"scheme": "IO"})).label_names == ["I-loc", "I-per", "O"]
    (tmp_path / "pos.conll").write_text("dogs NOUN\nbark VERB\n")
    plain = {"train": str(tmp_path / "pos.conll"), "dev": str(tmp_path / "pos.conll")}
    assert tagging.load(config(folder, **plain)).train.scheme is None
    with pytest.raises(DataError, match="are no spans"):
        tagging.load(config(folder, tagging={"scheme": "BIO"}, **plain))
    with pytest.raises(DataError, match="names no documents"):
        tagging.load(config(folder, tagging={"document_context": True}, **plain))


@pytest.mark.distributed
def test_it_learns_on_two_ranks_and_a_pipeline_loads_the_model(folder):
    run_dir = folder / "learns"
    tuning = {
        "num_epochs": 8, "batch_size": 16, "micro_batch_size": 4, "optimizer": {"lr": 3e-3}, "seeds": [1],
        "max_seq_len": 24, "dropout": 0.0,
    }  # fmt: skip
    plain = {"scheme": "BIOES", "constrained": False}  # the pipeline takes each word's best tag
    found = config(folder, run_dir=str(run_dir), tuning=tuning, tagging=plain, log={"tensorboard": False})
    (folder / "learns.yaml").write_text(found.model_dump_json())
    run_ranks(2, ["-m", "finetune.run", "--config", str(folder / "learns.yaml")], folder / "logs")
    results = json.loads((run_dir / "results.json").read_text())
    assert results["f1"]["mean"] > 0.7 and results["accuracy"]["mean"] > 0.8
    lines = [json.loads(line) for line in (run_dir / "predictions.jsonl").open()]
    assert [line["words"] for line in lines] == [one.words for one in sentences(61, 2)]
    tagger, same = pipeline("token-classification", str(run_dir / "model")), []
    for line in lines[:20]:
        answers = tagger(" ".join(line["words"]))  # without the words tagged O
        tags = [answer["entity"] for answer in answers if not answer["word"].startswith("##")]
        same.append(tags == [tag for tag in line["prediction"] if tag != "O"])
    assert sum(same) >= 18  # it computes in fp32, where training did in bf16
