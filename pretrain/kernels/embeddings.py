"""BERT's embeddings in one operation: dropout(LayerNorm(word[id] + position[p] + type[t])) (Devlin et al. 2019).

torch's operators write and read three gathered tensors and two sums before the norm's result; here forward gathers
three rows and writes one. Backward gathers them again, so none of them is kept. What comes out of the norm's backward
pass goes to three tables: ids are sorted, and rows with equal ids are summed up in the order of their places, in fp32,
without atomics. The same bits every time.

CUDA C++ (csrc/embeddings.cu): the norm's code is that of add_norm. It was never run on a GPU so far (docs/kernels.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pretrain.kernels import native
from pretrain.kernels.add_norm import WIDEST

CHUNK = 32  # entries that a block adds up; as in csrc/embeddings.cu
Tensors = tuple[torch.Tensor, ...]


def bert_embeddings(
    ids: torch.Tensor,
    position_ids: torch.Tensor,
    token_type_ids: torch.Tensor,
    word: torch.Tensor,
    position: torch.Tensor,
    token_type: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    padding_id: int,
    dropout: float = 0.0,
) -> torch.Tensor:
    """(batch, seq, hidden): ids and token_type_ids (batch, seq) int64, position_ids the same or (seq,).

    word (vocab, hidden), position, token_type: the tables; weight, bias (hidden,) of the norm. The row `padding_id` of
    `word` has no gradient. With the kernel an id that a table does not have gives a row of NaN.
    """
    tables = (word, position, token_type)
    if not (native.runs_on(*tables, weight, bias) and _is_aligned(word)):
        x = F.embedding(ids, word, padding_id) + F.embedding(position_ids, position)
        normed = F.layer_norm(x + F.embedding(token_type_ids, token_type), weight.shape, weight, bias, eps)
        return F.dropout(normed, dropout)
    seed = native.dropout_seed(word.device) if native.dropout_threshold(dropout) else None
    given = [t.expand(ids.shape).contiguous() for t in (ids, position_ids, token_type_ids)]
    return _embeddings(*given, *tables, weight, bias, seed, eps, padding_id, dropout)[0]


def _is_aligned(table: torch.Tensor) -> bool:
    """Whether a row is a multiple of 16 bytes and not too wide."""
    return table.shape[1] * table.element_size() % 16 == 0 and table.shape[1] <= WIDEST


@torch.library.custom_op("millstream::embeddings", mutates_args=())
def _embeddings(
    ids: torch.Tensor,
    position_ids: torch.Tensor,
    token_type_ids: torch.Tensor,
    word: torch.Tensor,
    position: torch.Tensor,
    token_type: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    seed: torch.Tensor | None,
    eps: float,
    padding_id: int,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, mean and 1 / standard deviation."""
    y, mean, rstd = outputs = _outputs(ids, word)
    tables = (word, position, token_type)
    native.launch(
        "embeddings_forward", word, *tables, ids, position_ids, token_type_ids, *(len(t) for t in tables), weight, bias,
        y, mean, rstd, ids.numel(), word.shape[1], float(eps), seed, native.dropout_threshold(dropout),
    )  # fmt: skip
    return outputs


@_embeddings.register_fake
def _fake_embeddings(ids, position_ids, token_type_ids, word, position, token_type, weight, bias, seed, *_):
    return _outputs(ids, word)


def _outputs(ids: torch.Tensor, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    statistics = [word.new_empty(ids.shape, dtype=torch.float32) for _ in range(2)]
    return word.new_empty((*ids.shape, word.shape[1])), statistics[0], statistics[1]


@torch.library.custom_op("millstream::embeddings_backward", mutates_args=())
def _embeddings_backward(
    grad_y: torch.Tensor,
    ids: torch.Tensor,
    position_ids: torch.Tensor,
    token_type_ids: torch.Tensor,
    word: torch.Tensor,
    position: torch.Tensor,
    token_type: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    seed: torch.Tensor | None,
    padding_id: int,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the three tables, weight and bias."""
    grad_y = grad_y.contiguous()
    tables = (word, position, token_type)
    rows, columns = ids.numel(), word.shape[1]
    grad_rows = torch.empty_like(grad_y)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    blocks = max(1, min(native.num_processors(word.device), rows))
    partial = weight.new_empty((2, blocks, columns), dtype=torch.float32)
    native.launch(
        "embeddings_backward", word, grad_y, *tables, ids, position_ids, token_type_ids, *(len(t) for t in tables),
        weight, mean, rstd, grad_rows, grad_weight, grad_bias, partial, blocks, rows, columns, seed,
        native.dropout_threshold(dropout),
    )  # fmt: skip
    by_table = ((ids, word, padding_id), (position_ids, position, -1), (token_type_ids, token_type, -1))
    of_word, of_position, of_type = (_sum_by_id(grad_rows, *table) for table in by_table)
    return of_word, of_position, of_type, grad_weight, grad_bias


@_embeddings_backward.register_fake
def _fake_embeddings_backward(grad_y, ids, position_ids, token_type_ids, word, position, token_type, weight, bias, *_):
    return tuple(torch.empty_like(t) for t in (word, position, token_type, weight, bias))


def _sum_by_id(rows: torch.Tensor, ids: torch.Tensor, table: torch.Tensor, skipped: int) -> torch.Tensor:
    """The gradient of `table`: for each id the sum of its rows, but for the id `skipped` (-1: none)."""
    in_order, order = torch.sort(ids.flatten(), stable=True)
    out = torch.zeros_like(table)
    partial = rows.new_empty((-(-ids.numel() // CHUNK), 2, table.shape[1]), dtype=torch.float32)
    native.launch(
        "sum_rows_by_id", rows, rows, in_order, order, out, partial, ids.numel(), table.shape[1], skipped
    )  # fmt: skip
    return out


def _keep(ctx, inputs, output) -> None:
    *given, seed, _, ctx.padding_id, ctx.dropout = inputs
    _, mean, rstd = output
    ctx.save_for_backward(*given, mean, rstd, seed)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, *_):
    gradients = torch.ops.millstream.embeddings_backward(grad_y, *ctx.saved_tensors, ctx.padding_id, ctx.dropout)
    return None, None, None, *gradients, None, None, None, None


_embeddings.register_autograd(_backward, setup_context=_keep)
