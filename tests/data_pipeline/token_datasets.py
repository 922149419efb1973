"""Datasets for the tests of what reads them, written directly: known tokens, documents of known lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import PretrainConfig, TokenizerConfig
from data_pipeline.shards import Dataset, open_dataset, write_manifest, write_shard
from data_pipeline.tokenizer import fingerprint, make_tokenizer, save_tokenizer

VOCAB_SIZE = 60_000
WORDS = ["sun", "moonlight", "river", "stones", "a", "king", "running", "sings", "slowly", "."]


def write_dataset(
    folder: Path, shards: list[list[int]], first: int = 0, tokenizer: str = "none", end_id: int | None = None
) -> Dataset:
    """Shards with documents of the given lengths; token k of the whole is (first + k) % VOCAB_SIZE.

    With an `end_id`, which should not occur otherwise, that is the last token of every document.
    """
    folder.mkdir(parents=True)
    entries = []
    for number, lengths in enumerate(shards):
        tokens = np.arange(first, first + sum(lengths)) % VOCAB_SIZE
        if end_id is not None:
            tokens[np.cumsum(lengths) - 1] = end_id
        pieces = [(tokens, np.array(lengths))]
        entries.append(write_shard(folder / f"shard-{number:05d}.tokens", pieces, VOCAB_SIZE))
        first += len(tokens)
    write_manifest(folder, entries, VOCAB_SIZE, tokenizer, "test")
    return open_dataset(folder)


def lengths(seed: int, documents: int, longest: int = 60) -> list[int]:
    return np.random.default_rng(seed).integers(1, longest, documents).tolist()


def gpt_config(folder: Path, data: dict[str, Any] | None = None, train: dict[str, Any] | None = None) -> PretrainConfig:
    """A GPT run on `folder`: rows of 16 tokens, batches of 24, micro batches of 1."""
    sizes = {"seq_len": 16, "global_batch_size": 24, "micro_batch_size": 1}
    return PretrainConfig.model_validate(
        {
            "run_dir": "unused",
            "data": {"dir": str(folder), "cache": {"dir": str(folder / "cache")}} | (data or {}),
            "train": sizes | (train or {}),
        }
    )


def fim_config(folder: Path, data: dict[str, Any] | None = None, train: dict[str, Any] | None = None) -> PretrainConfig:
    """A GPT run like `gpt_config` that fills in the middle of half of the documents; writes its dataset: numbers."""
    for split, documents in (("train", 100), ("validation", 40)):
        if not (folder / split).exists():
            (folder / split).mkdir(parents=True)
            tokenizer = make_tokenizer(TokenizerConfig(type="characters", fim_tokens=True), ["0123456789 "], folder)
            save_tokenizer(tokenizer, folder / split, 512)
            rng = np.random.default_rng(documents)
            sizes = rng.integers(1, 30, documents)
            tokens = rng.integers(2, 13, sizes.sum())
            tokens[np.cumsum(sizes) - 1] = tokenizer.token_to_id("<|endoftext|>")
            size = tokenizer.get_vocab_size()
            entry = write_shard(folder / split / "shard-00000.tokens", [(tokens, sizes)], size)
            write_manifest(folder / split, [entry], size, fingerprint(tokenizer), "test")
    return gpt_config(folder, {"fim": {"probability": 0.5}} | (data or {}), train)


def bert_config(
    folder: Path, data: dict[str, Any] | None = None, train: dict[str, Any] | None = None
) -> PretrainConfig:
    """A BERT run like `gpt_config`, with rows of 32 tokens; writes its dataset unless it is there: random sentences."""
    for split, documents in (("train", 300), ("validation", 40)):
        if not (folder / split).exists():
            (folder / split).mkdir(parents=True)
            tokenizer = make_tokenizer(TokenizerConfig(type="wordpiece", vocab_size=200), [" ".join(WORDS)] * 9, folder)
            save_tokenizer(tokenizer, folder / split, 512)
            rng = np.random.default_rng(documents)
            texts = [" ".join(rng.choice(WORDS, rng.integers(5, 60))) for _ in range(documents)]
            pieces = [np.array(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
            sizes = np.array([len(ids) for ids in pieces])
            size = tokenizer.get_vocab_size()
            entry = write_shard(folder / split / "shard-00000.tokens", [(np.concatenate(pieces), sizes)], size)
            write_manifest(folder / split, [entry], size, fingerprint(tokenizer), "test")
    config = gpt_config(folder, data, {"seq_len": 32} | (train or {}))
    return config.model_copy(update={"model": config.model.model_copy(update={"architecture": "bert"})})
