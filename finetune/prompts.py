"""What stands before a target: templates with columns in braces, sources cut to fit, and both encoded as one text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from transformers import PreTrainedTokenizerBase

COLUMN = re.compile(r"\{([^{}\n]+)\}")


def columns_of(template: str) -> list[str]:
    """The names in braces, in order."""
    return COLUMN.findall(template)


def fill(template: str, columns: Mapping[str, str]) -> str:
    """The template with each {name}, which has to be in `columns`, replaced; braces inside of the values are text."""
    return COLUMN.sub(lambda found: columns[found[1]], template)


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text: Llama's begin-of-text token, nothing for GPT-2."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[list[int]]:
    """Token ids of each prompt, behind the tokenizer's own prefix; nothing is put behind them."""
    prefix = prefix_ids(tokenizer)
    return [prefix + ids for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]] if prompts else []


def encode_continuations(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], continuations: list[str]
) -> list[list[int]]:
    """Token ids of each continuation as it stands behind its prompt in running text.

    Both are encoded as one text, of which the prompt's ids are the beginning. Where a token would reach over the border
    the continuation is encoded by itself, because in generation the prompt ends there.
    """
    if not prompts:
        return []
    pairs = zip(prompts, continuations, strict=True)
    wholes = tokenizer([prompt + text for prompt, text in pairs], add_special_tokens=False)["input_ids"]
    alone = tokenizer(continuations, add_special_tokens=False)["input_ids"]
    begins = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    return [
        whole[len(begin) :] if whole[: len(begin)] == begin else own
        for whole, begin, own in zip(wholes, begins, alone, strict=True)
    ]


def cut_to_fit(
    tokenizer: PreTrainedTokenizerBase, write: Callable[[str], str], source: str, room: int
) -> tuple[str, list[int]] | None:
    """The prompt `write(source)` and its ids, at most `room`, the source cut at its end; None if no cut is enough."""
    ids = encode_prompts(tokenizer, [write(source)])[0]
    if len(ids) <= room:
        return write(source), ids
    offsets = tokenizer(source, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    keep = len(offsets) - (len(ids) - room)
    while keep >= 0:  # the words around may join with those of the source, so the first try may be a token too long
        prompt = write(source[: offsets[keep][0]]) if keep < len(offsets) else write(source)
        ids = encode_prompts(tokenizer, [prompt])[0]
        if len(ids) <= room:
            return prompt, ids
        keep -= 1
    return None
