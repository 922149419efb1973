"""How likely a causal model finds texts: log-likelihoods of continuations, and of whole texts by sliding windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from configs.load import ConfigError
from finetune.models import check_causal


@dataclass(frozen=True)
class Request:
    """Score `continuation` behind `context`, both token ids; the context is not empty."""

    context: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class Score:
    log_likelihood: float  # natural, the sum over the tokens
    is_greedy: bool  # each token is the most probable one
    num_tokens: int


@dataclass(frozen=True)
class Scorer:
    """A causal model that is asked for likelihoods."""

    model: Any
    max_seq_len: int  # most tokens that it sees at once
    batch_tokens: int
    device: torch.device

    def __call__(self, requests: list[Request]) -> list[Score]:
        """A score for each request, in their order. Contexts that are too long lose their beginning."""
        order = sorted(range(len(requests)), key=lambda i: self._length(requests[i]))
        scores: dict[int, Score] = {}
        batch: list[int] = []
        for i in order:
            if batch and (len(batch) + 1) * self._length(requests[i]) > self.batch_tokens:
                scores.update(zip(batch, self._score([requests[j] for j in batch]), strict=True))
                batch = []
            batch.append(i)
        if batch:
            scores.update(zip(batch, self._score([requests[j] for j in batch]), strict=True))
        return [scores[i] for i in range(len(requests))]

    def _length(self, request: Request) -> int:
        return min(len(request.context) + len(request.continuation) - 1, self.max_seq_len)

    @torch.inference_mode()
    def _score(self, requests: list[Request]) -> list[Score]:
        rows = [[*one.context, *one.continuation][-(self.max_seq_len + 1) :] for one in requests]
        longest = max(map(len, rows)) - 1
        # Padding stands on the right, where nothing that a causal model scores can see it.
        ids = torch.tensor([row[:-1] + [0] * (longest + 1 - len(row)) for row in rows], device=self.device)
        first = min(len(row) - 1 - len(one.continuation) for row, one in zip(rows, requests, strict=True))
        logits = self.model(input_ids=ids, logits_to_keep=longest - first).logits  # (rows, positions, vocabulary)
        scores = []
        for row, one, mine in zip(rows, requests, logits, strict=True):
            num, end = len(one.continuation), len(row) - 1 - first
            log_probabilities = mine[end - num : end].float().log_softmax(-1)
            wanted = torch.tensor(one.continuation, device=self.device)
            total = log_probabilities.gather(1, wanted[:, None]).double().sum().item()
            scores.append(Score(total, bool((log_probabilities.argmax(1) == wanted).all()), num))
        return scores


def windows(ids: list[int], begin: int, max_seq_len: int, stride: int) -> Iterator[Request]:
    """Requests that score each of `ids` once, the text standing behind the token `begin`. Pure.

    The first one scores `max_seq_len` tokens, every other one the next `stride`, with all of the text before them that
    the model can see: the smaller the stride, the longer the contexts, and the dearer.
    """
    whole, scored = [begin, *ids], 0
    while scored < len(ids):
        end = min(scored + (stride if scored else max_seq_len), len(ids))
        start = max(0, end - max_seq_len)  # in `whole`, whose last token of a window is only scored
        yield Request(whole[start : scored + 1], whole[scored + 1 : end + 1])
        scored = end


def perplexities(log_likelihood: float, num_tokens: int, num_words: int, num_bytes: int) -> dict[str, float]:
    """Perplexity by token, word and byte, and bits per byte, of texts with this log-likelihood (natural)."""
    return {
        "perplexity": math.exp(-log_likelihood / num_tokens),
        "word_perplexity": math.exp(min(700.0, -log_likelihood / num_words)) if num_words else math.nan,
        "byte_perplexity": math.exp(-log_likelihood / num_bytes),
        "bits_per_byte": -log_likelihood / num_bytes / math.log(2),
        "num_tokens": num_tokens,
        "num_words": num_words,
        "num_bytes": num_bytes,
    }


def load_scorer(model: str, max_seq_len: int | None, batch_tokens: int, precision: str) -> Scorer:
    """The model of a directory on this machine's GPU, or CPU. Raises ConfigError for one that cannot serve."""
    positions = check_causal(model)
    if positions is None and max_seq_len is None:
        raise ConfigError(f"model={model}: does not say how many positions it has; give max_seq_len")
    if max_seq_len is not None and positions is not None and max_seq_len > positions:
        raise ConfigError(f"max_seq_len={max_seq_len} is more than the {positions} positions of {model}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model, use_safetensors=True, dtype=torch.bfloat16 if precision == "bf16" else torch.float32
    )
    return Scorer(loaded.eval().to(device), max_seq_len or positions or 0, batch_tokens, device)


def begin_of_text(tokenizer: PreTrainedTokenizerBase, model: str) -> int:
    """The token behind which a text stands that nothing precedes: begin-of-text, else the end of the one before."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ConfigError(f"model={model}: its tokenizer has neither bos_token nor eos_token, for texts to stand behind")
