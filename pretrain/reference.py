"""Training as a page of plain PyTorch: what `millstream prove loss` compares the training loop with.

It has the samples, layers and update formulas of the loop, and nothing of what makes the loop fast or distributed:

    the loop                                      here
    many documents a row, kept apart by a mask    every document a row of its own, without a mask
    fused output layer and loss, fused attention  all logits and all scores, written out
    micro batches, ranks, ZeRO, DeepSpeed         one process, gradients summed up by `backward`, divided by one count
    bf16 or fp32                                  fp32; also fp64 and bf16, to see what rounding does to these numbers

`layout` and `written_out` bring single parts of the loop in, so that each can be compared by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from configs.schema import PretrainConfig
from data_pipeline.stream import open_stream
from pretrain import objective
from pretrain.kernels import activation, add_norm, embeddings, rotary
from pretrain.kernels import attention as attention_kernel
from pretrain.kernels.linear_cross_entropy import IGNORE_INDEX, TokenLosses
from pretrain.models import build_model, layers
from pretrain.optim import make_optimizer
from pretrain.runtime import to_device

Batch = dict[str, torch.Tensor]
KERNELS = ("loss", "attention", "between")  # between: elementwise, norms, embeddings
NO_KERNELS = SimpleNamespace(runs_on=lambda *_: False)  # in place of `native`
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def train_plainly(
    config: PretrainConfig,
    initial: Mapping[str, torch.Tensor],
    device: torch.device,
    precision: Literal["fp64", "fp32", "bf16"] = "fp32",
    layout: Literal["alone", "rows"] = "alone",
    kernels: Collection[str] = (),
) -> list[dict[str, float]]:
    """The loss and the gradient norm of each of the first `train.num_steps` steps: [{"loss", "grad_norm"}, ...].

    initial: the weights to start from, fp32, by name. precision: of weights and activations; bf16 has fp32 weights
    beside them, which gradients are summed up in and the optimizer updates, as in the loop. layout: every document
    alone, or the rows as the stream makes them. kernels: which of KERNELS are used; the others are written out.
    Without dropout and at the peak rate. Raises what the data raises.
    """
    data = open_stream(config, "train")
    weights = build_model(config.model, data.vocab_size, config.train.longest_seq_len)
    weights.load_state_dict(dict(initial))
    weights.to(device, torch.float64 if precision == "fp64" else torch.float32)
    model = copy.deepcopy(weights).to(DTYPES[precision]) if precision == "bf16" else weights
    optimizer = make_optimizer(weights, config.train.optimizer)
    curve = []
    try:
        with written_out(set(KERNELS) - set(kernels)):
            for step in range(config.train.num_steps):
                batches = [data.expand(to_device(batch, device)) for batch in data.micro_batches(step, 0, 1)]
                if layout == "alone":
                    longest = data.samples.phase_at(step).seq_len
                    is_causal = config.model.architecture == "gpt"
                    batches = [alone for batch in batches for alone in documents_alone(batch, is_causal, longest)]
                curve.append(plain_step(config, model, weights, optimizer, batches))
    finally:
        data.close()
    return curve


def plain_step(
    config: PretrainConfig, model: nn.Module, weights: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch]
) -> dict[str, float]:
    """One update of `weights`, and of `model`, the same in its own precision, out of a whole global batch."""
    train = config.train
    token_loss = "clm" if config.model.architecture == "gpt" else "mlm"
    counts = {token_loss: sum(int((batch["labels"] >= 0).sum()) for batch in batches)}
    if "next_sentence_label" in batches[0]:
        counts["nsp"] = sum(int((batch["next_sentence_label"] >= 0).sum()) for batch in batches)
    loss = 0.0
    optimizer.zero_grad()
    for batch in batches:
        sums = model(**batch, label_smoothing=train.label_smoothing, z_loss=train.z_loss)
        means = {name: sums.get(f"{name}_minimised", sums[name]) / max(1, count) for name, count in counts.items()}
        sum(means.values(), torch.zeros((), device=batch["labels"].device)).backward()
        loss += sum(float(sums[name].detach()) / max(1, count) for name, count in counts.items())
        if model is not weights:
            move_gradients(model, weights)
    grad_norm = nn.utils.clip_grad_norm_(weights.parameters(), train.optimizer.grad_clip or float("inf"))
    optimizer.step()
    if model is not weights:
        model.load_state_dict(weights.state_dict())
    return {"loss": loss, "grad_norm": float(grad_norm)}


def move_gradients(model: nn.Module, weights: nn.Module) -> None:
    """Add the gradients of `model` to those of `weights`, in fp32, and forget them there."""
    for low, high in zip(model.parameters(), weights.parameters(), strict=True):
        if low.grad is not None:
            high.grad = low.grad.float() if high.grad is None else high.grad + low.grad
        low.grad = None


def documents_alone(batch: Batch, is_causal: bool, max_tokens: int) -> Iterator[Batch]:
    """The documents of a batch of rows, (n, seq_len), each as a row of its own that begins with it; longest first.

    Nothing has to be hidden then: there are no segment_ids and no position_ids. Documents of equal length share a
    batch of at most `max_tokens` tokens; with `is_causal` also those of other lengths, where what is padded at the end
    is seen by nothing before it.
    """
    segments = batch["segment_ids"]
    rows, starts = (F.pad(segments, (1, 0), value=-1).diff() != 0).nonzero(as_tuple=True)
    row_end = segments.shape[1]
    stops = [*torch.where(rows[1:] == rows[:-1], starts[1:], row_end).tolist(), row_end]
    places = zip(rows.tolist(), starts.tolist(), stops, strict=True)
    documents = [(row, start, stop) for row, start, stop in places if segments[row, start] > 0]
    documents.sort(key=lambda place: place[1] - place[2])
    while documents:
        size = documents[0][2] - documents[0][1]
        fitting = documents[: max(1, max_tokens // size)]
        chosen = [place for place in fitting if is_causal or place[2] - place[1] == size]
        documents = documents[len(chosen) :]
        alone = {}
        for name in batch.keys() - {"segment_ids", "position_ids"}:
            if batch[name].dim() == 1:  # of the sample
                alone[name] = batch[name][[row for row, _, _ in chosen]]
                continue
            padding = IGNORE_INDEX if name == "labels" else 0
            cut = [batch[name][row, start:stop] for row, start, stop in chosen]
            alone[name] = torch.stack([F.pad(part, (0, size - len(part)), value=padding) for part in cut])
        yield alone


@contextmanager
def written_out(kernels: Collection[str]) -> Iterator[None]:
    """Inside, the models use what is written out below in place of these kernels (of KERNELS)."""
    places: list[tuple[Any, str, Any]] = []
    if "loss" in kernels:
        places.append((objective, "linear_token_losses", written_out_losses))
    if "between" in kernels:  # what they do without a GPU is written out in torch's operators
        places += [(module, "native", NO_KERNELS) for module in (add_norm, activation, embeddings, rotary)]
    if "attention" in kernels:
        places += [(module, "attention", written_out_attention) for module in (layers, attention_kernel)]
    kept = [getattr(module, name) for module, name, _ in places]
    try:
        for module, name, function in places:
            setattr(module, name, function)
        yield
    finally:
        for (module, name, _), function in zip(places, kept, strict=True):
            setattr(module, name, function)


def written_out_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> TokenLosses:
    """As `linear_token_losses`, with all logits at once."""
    kept = labels != IGNORE_INDEX
    logits = F.linear(hidden[kept], weight, bias)  # (targets, vocab)
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    log_z = logits.logsumexp(1)
    cross_entropy = (log_z - logits.gather(1, labels[kept, None])[:, 0]).sum()
    uniform = (log_z - logits.mean(1)).sum()
    smoothed = (1 - label_smoothing) * cross_entropy + label_smoothing * uniform
    squared_log_z = log_z.square().sum()
    minimised = smoothed + z_loss * squared_log_z
    return TokenLosses(minimised, cross_entropy.detach(), smoothed.detach(), squared_log_z.detach())


def written_out_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    window: int | None = None,
) -> torch.Tensor:
    """As `kernels.attention.attention`, with all scores at once and, for now, without dropout."""
    if dropout:
        raise ValueError(f"dropout={dropout}: written-out attention has none")
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (batch, heads, seq, seq)
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril()
    if window is not None:
        back, ahead = attention_kernel.reach(window, causal)
        visible = visible.triu(-back).tril(ahead)
    if causal or window is not None:
        mask = visible if mask is None else visible & mask | visible.new_ones(q.shape[-2]).diag()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, -1) @ v
