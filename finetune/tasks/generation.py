"""Texts from texts, by a causal model: summaries, translations, answers to instructions.

A row is the prompt, the target and the end-of-text token; only the last two are targets of the loss. What does not fit
is cut from the source, the last of the text columns, at its end; never from the target or from the prompt's own words.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from configs.load import ConfigError
from configs.tuning import FinetuneConfig
from data_pipeline.shards import DataError
from finetune.models import check_causal, load_model, load_tokenizer
from finetune.prompts import columns_of, cut_to_fit, encode_continuations, encode_prompts, fill
from finetune.tasks import IGNORE_INDEX, Row
from finetune.text_metrics import check_installed, generation_metrics
from finetune.texts import Texts, read_rows

LABEL = "target"


@dataclass(frozen=True)
class Split:
    texts: list[Texts]
    targets: list[str]
    places: list[str]  # file:line


@dataclass(frozen=True)
class Examples:
    train: Split
    dev: Split


def load(config: FinetuneConfig) -> Examples:
    """Read both files. Raises DataError naming file and line, ConfigError for a model or prompt that cannot serve."""
    check_installed(config.generation.metrics)
    positions = check_causal(config.model)
    if positions is not None and config.tuning.max_seq_len > positions:
        raise ConfigError(
            f"tuning.max_seq_len={config.tuning.max_seq_len} is more than the {positions} positions of {config.model}"
        )
    template = _template(config)
    if unknown := [name for name in columns_of(template) if name not in config.text_keys]:
        raise ConfigError(
            f"generation.prompt: {{{unknown[0]}}} is none of text_keys={config.text_keys}; name the columns there"
        )
    if unused := [name for name in config.text_keys if f"{{{name}}}" not in template]:
        raise ConfigError(f"generation.prompt: has no {{{unused[0]}}}, which text_keys={config.text_keys} names")
    return Examples(*(_split(Path(file), config) for file in (config.train, config.dev)))


def _split(path: Path, config: FinetuneConfig) -> Split:
    rows = read_rows(path, config.text_keys, config.label_key, config.columns)
    return Split([texts for texts, _, _ in rows], [target for _, target, _ in rows], [place for _, _, place in rows])


def _template(config: FinetuneConfig) -> str:
    return config.generation.prompt or "".join(f"{{{name}}}\n\n" for name in config.text_keys)


def encode(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase, split: Split) -> list[Row]:
    """One row for each example: `labels` are the target's ids and the end-of-text token's, at their own places.

    `prompt_length`: how many tokens stand before the target; `cut`: how many of the source were left out. A prompt has
    at most max_seq_len - max_new_tokens tokens. An example whose target does not fit behind it has no targets.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model={config.model}: its tokenizer has no end-of-text token (eos_token), as a target's end"
        )
    longest, room = config.tuning.max_seq_len, config.tuning.max_seq_len - config.generation.max_new_tokens
    prompts = [_prompt(config, texts, texts[-1]) for texts in split.texts]
    of_prompts, cut = encode_prompts(tokenizer, prompts), [0] * len(prompts)
    for i, ids in enumerate(of_prompts):
        if len(ids) > room:
            prompts[i], of_prompts[i] = _cut(config, tokenizer, split.texts[i], room, split.places[i])
            cut[i] = len(ids) - len(of_prompts[i])
        elif not ids:
            raise DataError(f"{split.places[i]}: its prompt is empty; a target needs something to follow")
    # as in running text: behind a space, unless the prompt ends a line
    targets = [("" if p[-1:].isspace() else " ") + text.strip() for p, text in zip(prompts, split.targets, strict=True)]
    rows = []
    for i, target in enumerate(encode_continuations(tokenizer, prompts, targets)):
        prompt, target = of_prompts[i], [*target, tokenizer.eos_token_id]
        if len(prompt) + len(target) > longest:
            target = []
        row: Row = {"input_ids": prompt + target, "attention_mask": [1] * (len(prompt) + len(target))}
        row |= {"labels": [IGNORE_INDEX] * len(prompt) + target, "prompt_length": len(prompt)}
        rows.append(row | {"example": i, "cut": cut[i]})
    return rows


def _prompt(config: FinetuneConfig, texts: Texts, source: str) -> str:
    """The text before the target, with `source` in place of the last column."""
    columns = dict(zip(config.text_keys, [*texts[:-1], source], strict=True))
    return fill(_template(config), columns).rstrip(" ")  # the space belongs to the word behind it


def _cut(
    config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase, texts: Texts, room: int, place: str
) -> tuple[str, list[int]]:
    found = cut_to_fit(tokenizer, lambda source: _prompt(config, texts, source), texts[-1], room)
    if found is None:
        raise DataError(
            f"{place}: its prompt without `{config.text_keys[-1]}` is longer than tuning.max_seq_len - "
            f"generation.max_new_tokens = {room} tokens; raise the former"
        )
    return found


def build_model(config: FinetuneConfig, examples: Examples, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    """The causal model; its `generation_config` says how it decodes, here and wherever the saved model is loaded."""
    model: Any = load_model(AutoModelForCausalLM, config, tokenizer)
    wanted = config.generation
    sampling = {"temperature": wanted.temperature, "top_k": wanted.top_k, "top_p": wanted.top_p}
    inner = model if config.tuning.lora is None else model.get_base_model()  # peft's model is around it
    inner.generation_config = GenerationConfig(
        max_new_tokens=wanted.max_new_tokens,
        num_beams=wanted.num_beams,
        **({"length_penalty": wanted.length_penalty} if wanted.num_beams > 1 else {}),
        no_repeat_ngram_size=wanted.no_repeat_ngram_size,
        do_sample=wanted.temperature > 0,
        **(sampling if wanted.temperature > 0 else {}),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the cross entropies of the targets' tokens, fp32 scalar; labels are (rows, tokens)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    is_target = batch["labels"][:, 1:] != IGNORE_INDEX  # a token's logits are of the next one
    wanted = batch["labels"][:, 1:][is_target]
    return F.cross_entropy(logits[is_target].float(), wanted, reduction="sum")


def predict(model: Any, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """For each row the ids of the generated text, without the end-of-text token, int64.

    Prompts are padded on the left, so that all texts begin at one place. Under ZeRO-3 each forward gathers weights from
    all ranks, so a rank whose texts have ended goes on until those of all ranks have.
    """
    module = getattr(model, "module", model)
    ends = module.generation_config.eos_token_id
    lengths = batch["prompt_length"].tolist()
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), module.generation_config.pad_token_id, device=batch["input_ids"].device)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = batch["input_ids"][row, :length]
        mask[row, longest - length :] = 1
    several = dist.is_initialized() and dist.get_world_size() > 1
    found = module.generate(input_ids=ids, attention_mask=mask, synced_gpus=several)[:, longest:].cpu().numpy()
    return [row[: np.argmax(row == ends)] if (row == ends).any() else row for row in found]


def evaluate(config: FinetuneConfig, split: Split, rows: list[Row], outputs: list[np.ndarray]) -> dict[str, float]:
    """The metrics that generation.metrics names, in percent."""
    settings = config.generation
    return generation_metrics(settings.metrics, split.targets, _texts(config, outputs), settings.bleu_tokenizer)


def records(
    config: FinetuneConfig, examples: Examples, split: Split, rows: list[Row], outputs: list[np.ndarray]
) -> list[dict[str, Any]]:
    return [
        {"text": texts[0] if len(texts) == 1 else list(texts), "target": target, "prediction": prediction}
        for texts, target, prediction in zip(split.texts, split.targets, _texts(config, outputs), strict=True)
    ]


def about(examples: Examples) -> dict[str, Any]:
    return {}


def read_input(config: FinetuneConfig, about: dict[str, Any], path: Path) -> Examples:
    """The sources of a file; targets in it are not looked at."""
    rows = read_rows(path, config.text_keys, None, config.columns)
    found = Split([texts for texts, _, _ in rows], [""] * len(rows), [place for _, _, place in rows])
    return Examples(Split([], [], []), found)


def fold_keys(split: Split) -> list[tuple[int, Texts]]:
    """Targets of the same source stay together."""
    return [(0, texts) for texts in split.texts]


def select(split: Split, numbers: np.ndarray) -> Split:
    return Split(*([values[number] for number in numbers] for values in (split.texts, split.targets, split.places)))


def _texts(config: FinetuneConfig, outputs: list[np.ndarray]) -> list[str]:
    tokenizer = load_tokenizer(config.model)
    return [str(tokenizer.decode(output, skip_special_tokens=True)).strip() for output in outputs]
