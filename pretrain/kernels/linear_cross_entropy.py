"""The output layer and its cross entropy in one operation that never holds all logits.

    loss = sum_i log Z_i - (W h_i + b)[y_i]        log Z_i = logsumexp(W h_i + b)

Logits of (4096, 16384) take 268 MB in fp32, four times over in a plain implementation (logits, their fp32 copy, the
softmax, its gradient). Here a chunk of rows at a time goes through matmul, softmax and both gradient products, and only
the gradients stay: they do not depend on what comes after, except for one factor. The idea is that of Liger-Kernel's
fused linear cross entropy (Hsu et al. 2024) and of Wijmans et al. 2024; this is plain PyTorch, for any device.

Two terms can be added, each a line more in the softmax's gradient p - onehot(y):

    label smoothing s   the target is 1 - s at y plus s / V everywhere       p - (1 - s) onehot(y) - s / V
                        (Szegedy et al. 2016)
    z-loss c            c log^2 Z is added, which keeps logits from          + 2 c log Z p
                        drifting (PaLM, Chowdhery et al. 2022, section 5)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pretrain.kernels import native
from pretrain.kernels.softmax_gradient import softmax_gradient_

IGNORE_INDEX = -100
CHUNK_ELEMENTS, MOST_ELEMENTS = 1 << 23, 1 << 26  # logits in memory at once, see `rows_of_a_chunk`
# On a CPU the softmax goes through a chunk in blocks whose fp32 copy (1 MiB) stays in the cache: 2.7 times faster. One
# exponential an element: log_softmax and then an exponential of that took 1.8 times as long.
CACHED_ELEMENTS = 1 << 18


class TokenLosses(NamedTuple):
    """Sums over the same rows, fp32 scalars; only `minimised` has a gradient."""

    minimised: torch.Tensor  # smoothed + z_loss x squared_log_z
    cross_entropy: torch.Tensor  # without label smoothing
    smoothed: torch.Tensor  # (1 - s) cross_entropy + s x the mean of -log p over the vocabulary
    squared_log_z: torch.Tensor  # 0 where z_loss is 0: it is not computed then


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """Sum of cross entropies of `hidden @ weight.T + bias` over the rows whose label is not IGNORE_INDEX.

    hidden (num, hidden_size), weight (vocab, hidden_size), bias (vocab,) or None: fp32 or bf16, one dtype; labels
    (num,) int64. Returns an fp32 scalar; the softmax is computed in fp32. Raises ValueError for a label that is
    neither IGNORE_INDEX nor in [0, vocab).
    """
    return linear_token_losses(hidden, weight, bias, labels).minimised


def linear_token_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> TokenLosses:
    """As `linear_cross_entropy`, with a smoothed target, label_smoothing in [0, 1), and z_loss x log^2 Z added."""
    kept = labels != IGNORE_INDEX
    hidden, labels = hidden[kept], labels[kept]
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < weight.shape[0]:
        raise ValueError(
            f"labels from {int(labels.min())} to {int(labels.max())}, but the vocabulary has {weight.shape[0]} "
            f"entries: the dataset was made with another tokenizer than the model"
        )
    return TokenLosses(*_LinearTokenLosses.apply(hidden, weight, bias, labels, label_smoothing, z_loss))


class _LinearTokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        label_smoothing: float,
        z_loss: float,
    ) -> tuple[torch.Tensor, ...]:
        needs_grad = any(ctx.needs_input_grad)
        sums = torch.zeros(3, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_grad and bias is not None else None
        grad_weight = None
        chunk = rows_of_a_chunk(hidden.shape[0], hidden.shape[1], weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = hidden[rows] @ weight.t() if bias is None else torch.addmm(bias, hidden[rows], weight.t())
            sums += _softmax_gradient_(logits, labels[rows, None], label_smoothing, z_loss)
            if grad_hidden is None:
                continue
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=torch.float32)
            grad_hidden[rows] = logits @ weight
            grad_weight = _add(grad_weight, logits.t() @ hidden[rows])
        if needs_grad and grad_weight is None:  # there was no target
            grad_weight = torch.zeros_like(weight)
        ctx.grads = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        cross_entropy, uniform, squared_log_z = sums.unbind()
        smoothed = cross_entropy + label_smoothing * (uniform - cross_entropy) if label_smoothing else cross_entropy
        minimised = smoothed + z_loss * squared_log_z if z_loss else smoothed
        reported = cross_entropy.clone(), smoothed.clone(), squared_log_z.clone()
        ctx.mark_non_differentiable(*reported)
        return minimised.clone(), *reported

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor):
        scaled = [None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.grads]
        return *scaled, None, None, None


def rows_of_a_chunk(num_rows: int, hidden_size: int, vocab_size: int) -> int:
    """How many rows have their logits in memory at once; all chunks of `num_rows` rows are about equally long.

    About CHUNK_ELEMENTS logits: on a CPU smaller and larger chunks were slower. But each further chunk adds a whole
    (vocab, hidden_size) gradient to the others, which with few rows takes longer than their matrix products, so a chunk
    has 2 x hidden_size rows, if these are more and no more than MOST_ELEMENTS logits.
    """
    most = min(max(CHUNK_ELEMENTS // vocab_size, 2 * hidden_size), max(1, MOST_ELEMENTS // vocab_size))
    return max(1, -(-num_rows // max(1, -(-num_rows // most))))


def _add(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """`total` + `part` (rows, columns), in fp32 from the second part on; `total` is changed.

    fp32, because a chunk adds little to what the earlier ones have summed up, and bf16 would round it away. On a CPU
    torch makes an fp32 copy of what is added, which stays in the cache if it is some rows at a time.
    """
    if total is None:
        return part
    total = total.float()
    num_rows = max(1, CACHED_ELEMENTS // part.shape[1]) if part.device.type == "cpu" else len(part)
    for rows, more in zip(total.split(num_rows), part.split(num_rows), strict=True):
        rows += more
    return total


def _softmax_gradient_(
    logits: torch.Tensor, target: torch.Tensor, label_smoothing: float, z_loss: float
) -> torch.Tensor:
    """Return sums over `logits` (rows, vocab) and turn them into the gradient of what is minimised, in place.

    target (rows, 1) int64. The sums are (3,) fp32: of the cross entropies; of the means of -log p over the vocabulary,
    if label_smoothing; of log^2 Z, if z_loss. The gradient is computed in fp32 and rounded once.
    """
    if native.runs_on(logits):
        return softmax_gradient_(logits, target[:, 0], label_smoothing, z_loss)
    sums = torch.zeros(3, dtype=torch.float32, device=logits.device)
    num_rows = max(1, CACHED_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), num_rows):
        rows = slice(start, start + num_rows)
        block = logits[rows].float()
        gradient = torch.softmax(block, 1)
        # log Z = largest - log_p; the largest probability is at least 1 / vocab, so its logarithm is finite.
        largest, log_p = block.amax(1, keepdim=True), gradient.amax(1, keepdim=True).log_()  # each (rows, 1)
        sums[0] += (largest - block.gather(1, target[rows]) - log_p).sum()
        if label_smoothing:
            sums[1] += (largest - block.mean(1, keepdim=True) - log_p).sum()
        if z_loss:
            log_z = largest - log_p
            sums[2] += log_z.square().sum()
            gradient *= 1 + 2 * z_loss * log_z
        if label_smoothing:
            gradient -= label_smoothing / logits.shape[1]
        gradient.scatter_add_(1, target[rows], torch.full_like(log_p, label_smoothing - 1))
        logits[rows] = gradient
    return sums
