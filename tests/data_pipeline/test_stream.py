"""Batches of any step on any rank: the same global batch however it is divided; what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from configs.load import ConfigError, load_pretrain
from configs.schema import PretrainConfig
from data_pipeline import build
from data_pipeline.shards import DataError
from data_pipeline.stream import Stream, open_stream

BERT_KINDS = {
    "bert-no-nsp": "data.masking.pairs=none",
    "bert-sop": "data.masking.pairs=sop",
    "bert-whole-words": "data.masking.unit=word",
    "bert-spans": "data.masking.unit=span",
}
KINDS = ["gpt", "bert", *BERT_KINDS]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = np.array(["sun", "moonlight", "river", "stones", "a", "king", "running", "sings", "slowly"])
    lines = []
    for _ in range(200):
        sentences = [" ".join(rng.choice(words, 7)) + "." for _ in range(rng.integers(2, 9))]
        lines.append(json.dumps({"text": " ".join(sentences)}))
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    return folder


def settings(corpus: Path, kind: str, *overrides: str) -> PretrainConfig:
    architecture = kind.split("-")[0]
    config = corpus / f"{architecture}.yaml"
    config.write_text(
        f"run_dir: unused\nmodel: {{architecture: {architecture}}}\n"
        f"data:\n  dir: {corpus}/{architecture}\n  build:\n    sources: [{corpus}/corpus.jsonl]\n"
        f"    validation_fraction: 0.1\n    num_workers: 1\n"
        f"    tokenizer: {{type: {'wordpiece' if architecture == 'bert' else 'byte_bpe'}, vocab_size: 300}}\n"
        "train: {seq_len: 32, global_batch_size: 8, micro_batch_size: 2}\n"
    )
    return load_pretrain(config, [*([BERT_KINDS[kind]] if kind in BERT_KINDS else []), *overrides])


@pytest.fixture(params=KINDS)
def stream(request, corpus) -> Stream:
    config = settings(corpus, request.param)
    build.build(config, Console(quiet=True))
    return open_stream(config, "train")


def rows(stream: Stream, step: int, world_size: int) -> dict[str, torch.Tensor]:
    """The global batch of a step, put together from all ranks' micro batches."""
    batches = [batch for rank in range(world_size) for batch in stream._make(step, rank, world_size)]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


@pytest.mark.parametrize("world_size", [2, 4])
def test_global_batch_is_the_same_on_any_number_of_ranks(stream, world_size):
    for step in (0, 1, 17):
        alone, shared = rows(stream, step, 1), rows(stream, step, world_size)
        assert all(torch.equal(alone[name], shared[name]) for name in alone)


def test_prefetch_changes_nothing_and_steps_can_be_asked_in_any_order(stream):
    for step in (0, 1, 2, 9, 3, 3):
        fetched, made = stream.micro_batches(step, 1, 2), stream._make(step, 1, 2)
        for a, b in zip(fetched, made, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_eval_batches_are_the_same_every_time_and_cover_each_sample_once(stream):
    passes = []
    for world_size in (1, 1, 2):
        count = 0
        for rank in range(world_size):
            count += sum(int((b["labels"] != -100).sum()) for b in stream.eval_batches(21, rank, world_size))
        passes.append(count)
    assert passes[0] == passes[1] == passes[2] > 0
    lengths = {len(list(stream.eval_batches(21, rank, 2))) for rank in range(2)}
    assert len(lengths) == 1  # ranks that had different numbers of batches would wait for each other for ever


def test_rows_are_well_formed(stream):
    batch = rows(stream, 0, 1)
    ids, labels = batch["input_ids"], batch["labels"]
    assert ids.shape == labels.shape == (8, 32)
    assert int(ids.min()) >= 0 and int(ids.max()) < stream.vocab_size
    if stream.is_bert:
        assert (ids[:, 0] == stream.vocabulary.cls_id).all()
        real = batch["segment_ids"] == 1
        assert (labels[~real] == -100).all()
        assert ((ids == stream.vocabulary.mask_id) <= (labels != -100)).all()
    else:
        same_document = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
        assert torch.equal(labels[:, :-1][same_document], ids[:, 1:][same_document])
        assert (labels[:, :-1][~same_document] == -100).all()


def test_masking_differs_between_epochs_and_repeats_for_the_same_step(corpus):
    stream = open_stream(settings(corpus, "bert"), "train")
    sample = 3
    draws = (5, 5, 5 + stream.num_samples)
    first, again, later = (stream._rows(np.array([sample]), "train", np.array([draw])) for draw in draws)
    assert np.array_equal(first["input_ids"], again["input_ids"])
    assert not np.array_equal(first["labels"], later["labels"])


def test_fewer_samples_than_one_global_batch_is_an_error(corpus):
    config = settings(corpus, "gpt", "train.global_batch_size=100000")
    with pytest.raises(ConfigError, match=r"fewer than one global batch of 100000; add text, or lower"):
        open_stream(config, "train")


def test_sample_longer_than_the_held_out_text_is_an_error(corpus):
    config = settings(corpus, "gpt", "train.seq_len=200000", "train.global_batch_size=1", "train.micro_batch_size=1")
    with pytest.raises(ConfigError, match=r"fewer than one sample of 200000; raise data.build.validation_fraction"):
        open_stream(config, "validation")


def test_batch_that_does_not_divide_over_the_ranks_is_an_error(corpus):
    stream = open_stream(settings(corpus, "gpt"), "train")
    with pytest.raises(ConfigError, match=r"a global batch of 8 samples does not divide .* on 3 ranks"):
        stream.micro_batches(0, 0, 3)


def test_tokenizer_that_is_not_the_datasets_is_an_error_and_stays_on_disk(corpus):
    config = settings(corpus, "gpt")
    file = Path(config.data.dir) / "train/tokenizer.json"
    original = file.read_text()
    try:
        file.write_text(original.replace('"<|endoftext|>"', '"<|stop|>"'))
        with pytest.raises(DataError, match=r"tokenizer.json: has .* it is truncated or was changed; copy it again"):
            open_stream(config, "train")
    finally:
        file.write_text(original)
    open_stream(config, "train")


def test_bert_on_a_dataset_without_its_special_tokens_is_an_error(corpus):
    config = settings(corpus, "gpt", "model.architecture=bert")
    with pytest.raises(ConfigError, match=r"data.build.tokenizer.type=wordpiece"):
        open_stream(config, "train")
