"""How fast BERT's rows are made, and what leaving out the padding gains: `python -m benchmarks.bert_batches DIR`.

DIR is a dataset directory built for BERT (`millstream data build`, its `train`). The first table has rows per second on
one thread, beside transformers' collator, which only masks rows that are already there. The second times forward and
backward of the same samples padded and unpadded, in turns, because the speed of a shared machine drifts: medians over
the rounds, and the range of the ratio within a round. A tenth of the samples is cut short, as in Devlin et al. 2019.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from configs.schema import MaskingConfig, ModelConfig
from data_pipeline import bert_rows, chance
from data_pipeline.shards import Dataset, open_dataset
from data_pipeline.tokenizer import load_tokenizer
from pretrain.models import build_model

SHAPES = [(32, 128), (8, 512)]  # micro batch, seq_len
MODELS = {
    "nano": ModelConfig(architecture="bert"),
    "2 layers of base": ModelConfig(architecture="bert", preset="base", num_layers=2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    dataset = open_dataset(arguments.dir)
    vocabulary = bert_rows.read_vocabulary(load_tokenizer(dataset.path))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {arguments.rounds} rounds\n")
    print_making(dataset, vocabulary, arguments.rounds)
    print_padding(dataset, vocabulary, arguments.rounds)


def print_making(dataset: Dataset, vocabulary: bert_rows.Vocabulary, rounds: int) -> None:
    print("| unit | pairs | batch | rows/s (range) | transformers' masking alone |\n|---|---|---|---|---|")
    settings = [dict(unit=unit, pairs="nsp") for unit in ("token", "word", "span")]
    for setting in [*settings, dict(unit="token", pairs="sop"), dict(unit="token", pairs="none")]:
        masking = MaskingConfig.model_validate(setting | {"short_probability": 0.1})
        for size, seq_len in SHAPES:
            make = maker(dataset, vocabulary, masking, size, seq_len)
            collate = collator(dataset, make(0)) if masking.unit == "token" else None
            ours, theirs = [], []
            for _ in range(rounds):
                ours.append(20 * size / seconds(repeated, make, 20))
                if collate is not None:
                    theirs.append(5 * size / seconds(repeated, collate, 5))
            peer = f"{statistics.median(theirs):,.0f}" if theirs else ""
            print(f"| {masking.unit} | {masking.pairs} | {size} x {seq_len} | {spread(ours)} | {peer} |", flush=True)


def print_padding(dataset: Dataset, vocabulary: bert_rows.Vocabulary, rounds: int) -> None:
    print("\n| model | pairs | batch | real tokens | padded, ms | unpadded, ms | ratio (range) |\n" + "|---" * 7 + "|")
    for name, config in MODELS.items():
        model = build_model(config, dataset.vocab_size, 512).to(torch.bfloat16).train()
        for pairs in ("nsp", "none"):
            masking = MaskingConfig.model_validate({"pairs": pairs, "short_probability": 0.1})
            for size, seq_len in SHAPES:
                make = maker(dataset, vocabulary, masking, size, seq_len)
                times, real = [], []
                for step in range(rounds + 1):
                    rows = make(step)
                    real.append(float(rows["segment_ids"].mean()))
                    times.append([seconds(train, model, batch) for batch in (rows, bert_rows.unpad(rows))])
                padded, unpadded = np.array(times[1:]).T  # the first round warms up
                shown = f"{np.median(padded) * 1e3:.0f} | {np.median(unpadded) * 1e3:.0f} | {ratio(padded / unpadded)}"
                print(f"| {name} | {pairs} | {size} x {seq_len} | {np.mean(real):.0%} | {shown} |", flush=True)


def maker(dataset: Dataset, vocabulary: bert_rows.Vocabulary, masking: MaskingConfig, size: int, seq_len: int):
    """A function from a step to its rows, of samples that lie anywhere in the dataset."""
    num_samples = dataset.num_tokens // bert_rows.row_stride(masking, seq_len)

    def make(step: int) -> dict[str, np.ndarray]:
        samples = np.random.default_rng(step).integers(0, num_samples, size)
        keys = chance.row_keys(0, np.arange(step * size, (step + 1) * size))
        return bert_rows.make_rows(dataset, samples, keys, vocabulary, masking, seq_len)

    return make


def collator(dataset: Dataset, rows: dict[str, np.ndarray]) -> Callable[[int], object]:
    """A function that masks these rows anew with transformers."""
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(dataset.path / "tokenizer.json"), **names)
    collate = DataCollatorForLanguageModeling(tokenizer)
    special = tokenizer.all_special_ids
    examples = [{"input_ids": ids, "special_tokens_mask": np.isin(ids, special)} for ids in rows["input_ids"]]
    return lambda step: collate([dict(example) for example in examples])


def train(model: torch.nn.Module, rows: dict[str, np.ndarray]) -> None:
    model.zero_grad()
    sums = model(**{name: torch.from_numpy(array) for name, array in rows.items()})
    torch.stack(list(sums.values())).sum().backward()


def repeated(make: Callable[[int], object], count: int) -> None:
    for step in range(count):
        make(step)


def seconds(run: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - started


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})"


def ratio(values: np.ndarray) -> str:
    return f"{np.median(values):.2f} ({values.min():.2f}-{values.max():.2f})"


if __name__ == "__main__":
    main()
