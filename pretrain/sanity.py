"""What must hold before the first step, whatever the configuration: found out in a second instead of after days.

    data     the tokenizer beside the tokens is the one that they were made with; the labels are what the objective says
    model    a token changes nothing before it (GPT) and nothing in another document or sample
    loss     of the untrained model near that of a model that knows nothing, ln V

`check_start` costs four forward passes of two rows and one micro batch, at every start; the loss is that of the
evaluation at step 0, which is made anyway. Every rank takes part, because at ZeRO-3 every forward pass is a collective.
Whatever is found is a ConfigError on every rank: to start again would find it again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import torch
import xxhash

from configs.load import ConfigError
from configs.schema import PretrainConfig
from data_pipeline.shards import Dataset
from data_pipeline.stream import Stream
from data_pipeline.tokenizer import fingerprint, load_tokenizer
from pretrain import runtime
from pretrain.kernels.linear_cross_entropy import IGNORE_INDEX
from pretrain.models.gpt import INIT_STD
from pretrain.runtime import Runtime

PROBE_LOGITS = 1 << 26  # of a forward pass; with more, fewer tokens are looked at (268 MB in fp32)
ENOUGH_TARGETS = 100  # for a share to be more than chance


def check_start(
    config: PretrainConfig, model: Any, data: Stream, validation: Stream, step: int, ranks: Runtime
) -> None:
    """Tokenizers, labels of a batch of `step`, what the model can see. Raises ConfigError with all that is wrong."""
    datasets = [*data.samples.datasets.values(), *validation.samples.datasets.values()]
    problems = tokenizer_problems(datasets)
    ranks.mark("data", step)
    # a run that is finished may be started too: it has no further batch
    batch_step = min(step, config.train.num_steps - 1)
    made = next(iter(data.samples.micro_batches(batch_step, ranks.rank, ranks.world_size)))
    ranks.mark("start", step)
    batch = data.expand({name: torch.from_numpy(array) for name, array in made.items()})
    counts = {name: int(n) for name, n in _sum(label_counts(batch, config), ranks).items()}
    problems += label_problems(counts, config)
    problems += leaks(config, model, validation, ranks)
    all_problems = dict.fromkeys(str(p) for of_rank in ranks.gather(problems) for p in of_rank)  # type: ignore[attr-defined]
    if all_problems:
        raise ConfigError("\n".join(all_problems))


def check_first_loss(model: Any, line: Mapping[str, float]) -> None:
    """The evaluation at step 0, as in metrics.jsonl, against `expected_loss`. Raises ConfigError."""
    shape = model.module.shape
    output_std = getattr(shape, "init_std", INIT_STD) / getattr(shape, "width_ratio", 1.0)  # muP divides by its ratio
    if problems := first_loss_problems(line, shape.vocab_size, shape.hidden_size, output_std):
        raise ConfigError("\n".join(problems))


def tokenizer_problems(datasets: list[Dataset]) -> list[str]:
    """A tokenizer that is not the one its dataset was made with, or not the one of the first dataset.

    That the files are those of the manifest is known: opening a dataset compares their checksums.
    """
    problems, first = [], datasets[0]
    for dataset in datasets:
        if (dataset.tokenizer_fingerprint, dataset.vocab_size) != (first.tokenizer_fingerprint, first.vocab_size):
            problems.append(
                f"{dataset.path}: was built with another tokenizer (fingerprint {dataset.tokenizer_fingerprint}, "
                f"{dataset.vocab_size} tokens) than {first.path} ({first.tokenizer_fingerprint}, {first.vocab_size}); "
                f"build both with the same one"
            )
        has_one = any(entry["file"] == "tokenizer.json" for entry in dataset.manifest["files"])
        if has_one and (found := _fingerprint_that_differs(dataset)):
            problems.append(
                f"{dataset.path}/tokenizer.json: is not the tokenizer that the tokens were made with (fingerprint "
                f"{found}, the manifest has {dataset.tokenizer_fingerprint}); build the dataset again, or put the "
                f"tokenizer back with which it was built"
            )
    return list(dict.fromkeys(problems))


def _fingerprint_that_differs(dataset: Dataset) -> str | None:
    """That of the file as it is written, or else as this version of `tokenizers` would write it, see `fingerprint`."""
    written = orjson.dumps(orjson.loads((dataset.path / "tokenizer.json").read_bytes()))
    if xxhash.xxh3_128_hexdigest(written) == dataset.tokenizer_fingerprint:
        return None
    found = fingerprint(load_tokenizer(dataset.path))
    return None if found == dataset.tokenizer_fingerprint else found


def label_counts(batch: Mapping[str, torch.Tensor], config: PretrainConfig) -> dict[str, int]:
    """What `label_problems` needs of a micro batch, as `pack.gpt_rows` or `bert_rows.make_rows` make it, in numbers.

    tokens: not padding. targets. expected: targets that there should be. readable: targets that are their own input.
    not_next, outside (GPT): targets that are not the token after them, or where that is of another document or padding.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    is_target = labels != IGNORE_INDEX
    counts = {"targets": int(is_target.sum()), "readable": int((is_target & (labels == ids)).sum())}
    if config.model.architecture == "bert":
        masking = config.data.masking
        real = batch["segment_ids"] > 0 if "segment_ids" in batch else torch.ones_like(is_target)
        lengths = real.sum(1) if "cu_seqlens" not in batch else batch["cu_seqlens"].diff()
        num_special = 2 if masking.pairs == "none" else 3
        expected = (masking.probability * (lengths - num_special)).round().clamp(min=1 if masking.probability else 0)
        outside = int((is_target & ~real).sum())
        return counts | {"tokens": int(real.sum()), "expected": int(expected.sum()), "outside": outside, "not_next": 0}
    segments = batch["segment_ids"]
    goes_on = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)  # the next token is in the same document
    within = is_target[:, :-1]
    return (
        counts
        | {
            "tokens": int((segments > 0).sum()),
            "expected": int(goes_on.sum()) + int(is_target[:, -1].sum()),  # behind the last one nobody can look
            "outside": int((within & ~goes_on).sum()),
            "not_next": int((within & goes_on & (labels[:, :-1] != ids[:, 1:])).sum()),
        }
    )


def label_problems(counts: Mapping[str, int], config: PretrainConfig) -> list[str]:
    """What is wrong with labels of which `label_counts` are the sums over all ranks."""
    targets, tokens, expected = counts["targets"], counts["tokens"], counts["expected"]
    is_bert, masking = config.model.architecture == "bert", config.data.masking
    first = f"labels of the first batch: of {tokens} tokens {targets} are targets"
    if not targets:
        cure = "documents of a single token have none: look at them with `millstream data head`"
        if is_bert:
            cure = f"set data.masking.probability, which is {masking.probability}, to 0.15 or so"
        return [f"{first}, so there is nothing to learn; {cure}"]
    problems = []
    if counts["outside"]:
        problems.append(f"{first}, {counts['outside']} of them padding or at the end of a document")
    if not is_bert:
        if counts["not_next"]:
            problems.append(
                f"{first}, but {counts['not_next']} of them are not the next token ({counts['readable']} are the "
                f"token itself); labels must be shifted by one, as `data_pipeline/pack.py` makes them"
            )
        if targets < expected:
            problems.append(f"{first}, but {expected} are followed by a token of the same document")
        return problems
    enough = max(targets, expected) >= ENOUGH_TARGETS
    if enough and not expected / 2 <= targets <= 2 * expected:
        problems.append(
            f"{first}, data.masking.probability={masking.probability} makes {expected}; what is not masked must have "
            f"the label {IGNORE_INDEX}, as `data_pipeline/mask.py` makes it"
        )
    kept = max(0.0, 1 - masking.mask_share - masking.random_share)
    if enough and counts["readable"] / targets > kept + 0.25:
        problems.append(
            f"{first}, {counts['readable']} of which stand unmasked in the input, where they can be copied; with "
            f"data.masking.mask_share={masking.mask_share} and random_share={masking.random_share} that should be "
            f"{kept:.0%}"
        )
    return problems


@dataclass(frozen=True)
class Probe:
    """Two rows of tokens, changed in some places, and where that may have an effect; tensors are (2, tokens)."""

    what: str  # must not happen, in words
    inputs: dict[str, torch.Tensor]  # of the model, besides input_ids, in its own layout
    is_changed: torch.Tensor  # bool
    may_differ: torch.Tensor  # bool


def leaks(config: PretrainConfig, model: Any, validation: Stream, ranks: Runtime) -> list[str]:
    """What of a held-out stretch can be seen from where it should not be, in words; every rank calls it.

    Tokens are changed, and the logits where that must have no effect compared bit for bit: what is masked has the
    weight 0 exactly. Where a device does not repeat its own numbers, only what is beyond that counts.
    """
    batch = next(iter(validation.eval_batches(0, config.eval.num_samples, ranks.rank, ranks.world_size)))
    ids = validation.expand(runtime.to_device(batch, ranks.device))["input_ids"].flatten()
    shape, architecture = model.module.shape, config.model.architecture
    ids = ids[: min(config.train.seq_len, PROBE_LOGITS // (2 * shape.vocab_size))]
    if len(ids) < 4:  # too few for two documents and something behind them
        return []
    model.eval()
    problems = []
    for probe in probes(len(ids), architecture == "gpt", config.data.unpad, ranks.device):
        rows = ids.repeat(2, 1)
        changed = torch.where(probe.is_changed, (rows + 1) % shape.vocab_size, rows)
        before, after = (_logits(model, tokens, probe) for tokens in (rows, changed))
        hidden = ~probe.may_differ
        difference, noise = _largest(before[hidden] - after[hidden]), 0.0
        if ranks.any(difference != 0)[0]:
            noise = _largest(before[hidden] - _logits(model, rows, probe)[hidden])
        if not difference <= 4 * noise:  # also where it is not a number
            problems.append(
                f"model: {probe.what}: logits that must not differ do, by up to {difference:.3g} (rank {ranks.rank}); "
                f"look at the attention mask in pretrain/models/{architecture}.py and at what it is given"
            )
        elif torch.equal(before[probe.is_changed], after[probe.is_changed]):
            problems.append(f"model: logits do not depend on the token at their own place (rank {ranks.rank})")
    return problems


def probes(num_tokens: int, is_causal: bool, unpad: bool, device: torch.device) -> list[Probe]:
    """Changes of the last token and of the second half; then of one of two documents. A row is num_tokens long."""
    places = torch.arange(num_tokens, device=device)
    half = num_tokens // 2
    second, last = places >= half, places == num_tokens - 1
    segments = (1 + second.int()).repeat(2, 1)
    positions = (places - half * second).repeat(2, 1)
    apart: dict[str, torch.Tensor] = {"segment_ids": segments.int(), "position_ids": positions}
    if unpad:  # both rows one after the other, four samples
        ends = np.cumsum([0, half, num_tokens - half, half, num_tokens - half]).astype(np.int32)
        apart = {"cu_seqlens": torch.from_numpy(ends).to(device), "position_ids": positions.view(1, -1)}
    if not is_causal:
        one = torch.stack([~second, second])
        return [Probe("a sample is seen from another one or from padding", apart, one, one)]
    ends_changed = torch.stack([last, second])
    one = torch.stack([~second, last])
    return [
        Probe("a token is seen by the tokens before it", {}, ends_changed, ends_changed),
        Probe("a token is seen from another document or before it", apart, one, one),
    ]


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor, probe: Probe) -> torch.Tensor:
    """(2, tokens, vocab), in the model's dtype."""
    given = ids.view(1, -1) if "cu_seqlens" in probe.inputs else ids
    result = model(input_ids=given, **probe.inputs)
    logits = result[0] if isinstance(result, tuple) else result  # BERT: also those of the pair
    return logits.view(*ids.shape, -1)


def expected_loss(vocab_size: int, hidden_size: int, init_std: float) -> tuple[float, float]:
    """Mean cross entropy of an untrained model, and how far from it one may be.

    The last norm gives a vector of length sqrt(hidden_size), and each of its products with the rows of the output
    matrix, drawn with init_std, is a draw of a normal distribution with the variance s^2 = hidden_size x init_std^2.
    The mean of log sum exp of V of those is ln V + s^2 / 2, that of the target's logit 0. A text repeats its frequent
    tokens, whose logits then are one draw, of size s: the loss may be off by as much, and by 0.5 for all else.
    """
    variance = hidden_size * init_std**2
    return math.log(vocab_size) + variance / 2, 0.5 + math.sqrt(variance)


def first_loss_problems(line: Mapping[str, float], vocab_size: int, hidden_size: int, init_std: float) -> list[str]:
    """What is wrong with the evaluation at step 0; `line` as in metrics.jsonl. The pair's loss is near ln 2."""
    name = next(name for name in ("eval_loss_mlm", "eval_loss") if name in line)
    expected, tolerance = expected_loss(vocab_size, hidden_size, init_std)
    if not math.isfinite(line[name]):
        return [
            f"{name} of the untrained model is {line[name]}; try train.precision=fp32, and look at the first weights"
        ]
    problems = []
    if abs(line[name] - expected) > tolerance:
        low = line[name] < expected
        cause = "what it should predict can be read from the input" if low else "its first weights are too large"
        problems.append(
            f"{name} of the untrained model is {line[name]:.3f}, expected {expected:.2f} +- {tolerance:.2f} (ln of the "
            f"vocabulary of {vocab_size} + half of hidden_size x init_std^2): far {'below' if low else 'above'}, as if "
            f"{cause}; look at what was changed in pretrain/models/ and data_pipeline/"
        )
    pair = line.get("eval_loss_nsp", math.log(2))
    if not abs(pair - math.log(2)) <= 0.5:
        problems.append(f"eval_loss_nsp of the untrained model is {pair:.3f}, expected {math.log(2):.2f} +- 0.5 (ln 2)")
    return problems


def _largest(differences: torch.Tensor) -> float:
    return float(differences.abs().max()) if differences.numel() else 0.0


def _sum(counts: dict[str, int], ranks: Runtime) -> dict[str, float]:
    return dict(zip(counts, ranks.sum(torch.tensor(list(counts.values()))).tolist(), strict=True))
