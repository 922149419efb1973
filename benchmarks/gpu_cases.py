"""What `benchmarks/gpu.py` compares: each operation on one shape, its inputs, its peers and the bytes it must move."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from pretrain.kernels import activation, add_norm, native
from pretrain.kernels.embeddings import bert_embeddings
from pretrain.kernels.linear_cross_entropy import linear_token_losses
from pretrain.kernels.rotary import rotary, rotation
from pretrain.kernels.softmax_gradient import softmax_gradient_

Tensors = tuple[torch.Tensor, ...]
Operation = Callable[..., Any]
EPS = 1e-5


@dataclass
class Case:
    """`contestants` take `inputs`; what they return has gradients where inputs have. `exact` is the same in float64."""

    operation: str
    shape: str
    inputs: list[torch.Tensor]
    contestants: dict[str, Operation]
    exact: Operation
    forward_bytes: int  # 0: it is not limited by bytes
    backward_bytes: int
    grads: list[torch.Tensor] = field(default_factory=list)  # of what is returned; empty: there is no backward pass


def cases(device: torch.device, dtype: torch.dtype, shapes: dict[str, list[tuple[int, int]]]) -> Iterator[Case]:
    """All operations; shapes: "norm", "embeddings" (rows, hidden_size), "rotary" (tokens, hidden_size), "mlp" (rows,
    mlp_size), "loss" (rows, vocab).
    """
    torch.manual_seed(0)
    for rows, columns in shapes["norm"]:
        yield add_layer_norm(rows, columns, device, dtype, 0.0)
        yield add_layer_norm(rows, columns, device, dtype, 0.1)
        yield add_rms_norm(rows, columns, device, dtype)
        yield layer_norm(rows, columns, device, dtype)
    for rows, columns in shapes["embeddings"]:
        yield embeddings(rows, columns, device, dtype)
    for tokens, width in shapes["rotary"]:
        yield rotary_positions(tokens, width, device, dtype)
    for rows, columns in shapes["mlp"]:
        for kind in activation.KINDS[:2]:
            yield bias_gelu(rows, columns, device, dtype, kind)
        yield swiglu(rows, columns, device, dtype)
    for rows, vocab in shapes["loss"]:
        yield softmax_gradient(rows, vocab, device, dtype)


def drawn(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def norm_inputs(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    return drawn(device, dtype, (rows, columns), (rows, columns), (columns,), (columns,))


def add_layer_norm(rows: int, columns: int, device: torch.device, dtype: torch.dtype, dropout: float) -> Case:
    def eager(x, residual, weight, bias):
        added = residual + F.dropout(x, dropout)
        return F.layer_norm(added, weight.shape, weight, bias, EPS), added

    contestants: dict[str, Operation] = {
        "ours": lambda *t: add_norm.add_layer_norm(*t, EPS, dropout),
        "eager": eager,
        "compile": compiled(eager),
    }
    if flash := imported("flash_attn.ops.triton.layer_norm", "layer_norm_fn"):
        contestants["flash-attn"] = lambda x, residual, weight, bias: flash(
            x, weight, bias, residual=residual, eps=EPS, dropout_p=dropout, prenorm=True
        )
    size = rows * columns * dtype.itemsize
    name = f"residual + dropout {dropout} + LayerNorm" if dropout else "residual + LayerNorm"
    # forward: x, residual in; s, y out. backward: dy, ds, s in; one gradient out, with dropout two.
    return Case(
        name, f"{rows} x {columns}", norm_inputs(rows, columns, device, dtype), contestants, eager, 4 * size,
        (5 if dropout else 4) * size, drawn(device, dtype, (rows, columns), (rows, columns)),
    )  # fmt: skip


def add_rms_norm(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Case:
    def eager(x, residual, weight):
        added = residual + x
        return F.rms_norm(added, weight.shape, weight, EPS), added

    contestants: dict[str, Operation] = {
        "ours": lambda *t: add_norm.add_rms_norm(*t, EPS),
        "eager": eager,
        "compile": compiled(eager),
    }
    if liger := imported("liger_kernel.transformers.functional", "liger_fused_add_rms_norm"):
        contestants["liger"] = lambda x, residual, weight: liger(x, residual, weight, EPS, in_place=False)
    size = rows * columns * dtype.itemsize
    return Case(
        "residual + RMSNorm", f"{rows} x {columns}", norm_inputs(rows, columns, device, dtype)[:3], contestants, eager,
        4 * size, 4 * size, drawn(device, dtype, (rows, columns), (rows, columns)),
    )  # fmt: skip


def layer_norm(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Case:
    def eager(x, weight, bias):
        return F.layer_norm(x, weight.shape, weight, bias, EPS)

    contestants: dict[str, Operation] = {
        "ours": lambda *t: add_norm.layer_norm(*t, EPS),
        "eager": eager,
        "compile": compiled(eager),
    }
    if liger := imported("liger_kernel.transformers.functional", "liger_layer_norm"):
        contestants["liger"] = lambda *t: liger(*t, EPS)
    if apex := imported("apex.normalization.fused_layer_norm", "fused_layer_norm_affine"):
        contestants["apex"] = lambda x, weight, bias: apex(x, weight, bias, weight.shape, EPS)
    x, _, weight, bias = norm_inputs(rows, columns, device, dtype)
    size = rows * columns * dtype.itemsize
    return Case(
        "LayerNorm", f"{rows} x {columns}", [x, weight, bias], contestants, eager, 2 * size, 3 * size,
        drawn(device, dtype, (rows, columns)),
    )  # fmt: skip


def embeddings(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Case:
    """BERT's, of samples of 128 tokens and its vocabulary; a fifth of the tokens are frequent ones."""
    seq, vocab = min(rows, 128), 30_522
    ids = torch.randint(vocab, (rows // seq, seq), device=device)
    ids = torch.where(torch.rand(ids.shape, device=device) < 0.2, ids % 10, ids)
    positions, types = (
        torch.arange(seq, device=device),
        (torch.arange(seq, device=device) > seq // 2).long().expand_as(ids),
    )

    def eager(word, position, token_type, weight, bias):
        summed = F.embedding(ids, word, 0) + F.embedding(positions, position) + F.embedding(types, token_type)
        return F.layer_norm(summed, weight.shape, weight, bias, EPS)

    contestants: dict[str, Operation] = {
        "ours": lambda *t: bert_embeddings(ids, positions, types, *t, EPS, 0),
        "eager": eager,
        "compile": compiled(eager),
    }
    inputs = drawn(device, dtype, (vocab, columns), (seq, columns), (2, columns), (columns,), (columns,))
    size, table = ids.numel() * columns * dtype.itemsize, vocab * columns * dtype.itemsize
    # Small tables stay in the cache. backward: dy and the word's row in, the rows' gradient out and in, the table out.
    return Case(
        "BERT embeddings", f"{ids.numel()} x {columns}", inputs, contestants, eager, 2 * size, 4 * size + table,
        drawn(device, dtype, (*ids.shape, columns)),
    )  # fmt: skip


def rotary_positions(tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Heads of 64, or of the whole width if that is less, and as many keys and values as queries."""
    head_dim = min(64, width)
    heads = 3 * width // head_dim
    angles = rotation(torch.arange(tokens, device=device), head_dim, 10_000.0)

    def eager(x):
        looking, v = x.split([2 * heads // 3, heads // 3], 2)
        first, second = looking.to(angles[0].dtype if x.dtype != torch.float64 else x.dtype).chunk(2, -1)
        cos, sin = angles
        return torch.cat([torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype), v], 2)

    contestants = {"ours": lambda x: rotary(x, angles, 2 * heads // 3), "eager": eager, "compile": compiled(eager)}
    shape = (1, tokens, heads, head_dim)
    size = tokens * heads * head_dim * dtype.itemsize
    return Case(
        "rotary positions", f"{tokens} x {heads} x {head_dim}", drawn(device, dtype, shape), contestants, eager,
        2 * size, 2 * size, drawn(device, dtype, shape),
    )  # fmt: skip


def bias_gelu(rows: int, columns: int, device: torch.device, dtype: torch.dtype, kind: activation.Kind) -> Case:
    def eager(x, bias):
        return activation.activated(x + bias, kind)

    contestants = {"ours": fused_activation(kind, False, eager), "eager": eager, "compile": compiled(eager)}
    size = rows * columns * dtype.itemsize
    return Case(
        f"bias + {kind}", f"{rows} x {columns}", drawn(device, dtype, (rows, columns), (columns,)), contestants, eager,
        2 * size, 3 * size, drawn(device, dtype, (rows, columns)),
    )  # fmt: skip


def swiglu(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Case:
    def eager(x):
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    contestants = {"ours": fused_activation("silu", True, eager), "eager": eager, "compile": compiled(eager)}
    if liger := imported("liger_kernel.transformers.functional", "liger_swiglu"):
        contestants["liger"] = lambda x: liger(*(part.contiguous() for part in x.chunk(2, -1)))
    size = rows * columns * dtype.itemsize
    return Case(
        "SwiGLU", f"{rows} x {columns}", drawn(device, dtype, (rows, 2 * columns)), contestants, eager, 3 * size,
        5 * size, drawn(device, dtype, (rows, columns)),
    )  # fmt: skip


def fused_activation(kind: activation.Kind, is_gated: bool, eager: Operation) -> Operation:
    """The operation without the matrix product before it."""

    def ours(x, bias=None):
        if not native.runs_on(x, bias):
            return eager(x) if bias is None else eager(x, bias)
        return torch.ops.millstream.bias_activation(x, bias, activation.KINDS.index(kind), is_gated)

    return ours


def softmax_gradient(rows: int, vocab: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Loss and gradient of logits; the logits of each contestant become the gradient, or it returns one."""
    targets = torch.randint(vocab, (rows,), device=device)

    def exact(logits):
        log_p = torch.log_softmax(logits.double(), 1)
        gradient = log_p.exp().scatter_add(1, targets[:, None], torch.full_like(log_p[:, :1], -1.0))
        return -log_p.gather(1, targets[:, None]).sum(), gradient

    def eager(logits):
        gradient = torch.softmax(logits.float(), 1)
        loss = -gradient.gather(1, targets[:, None]).log().sum()
        return loss, gradient.scatter_add_(1, targets[:, None], torch.full_like(gradient[:, :1], -1.0)).to(dtype)

    def ours(logits):
        if not native.runs_on(logits):
            return eager(logits)
        return softmax_gradient_(logits, targets, 0.0, 0.0)[0], logits

    contestants = {"ours": ours, "eager": eager, "compile": compiled(eager)}
    if liger := imported("liger_kernel.ops.cross_entropy", "cross_entropy_forward"):
        contestants["liger"] = lambda logits: liger(logits, targets, None, -100, 0.0, 0.0, "sum", None, False)[:1]
    logits = (3 * torch.randn(rows, vocab, device=device)).to(dtype)
    size = rows * vocab * dtype.itemsize
    return Case("loss and gradient", f"{rows} x {vocab}", [logits], contestants, exact, 2 * size, 0)


def whole_loss(rows: int, hidden_size: int, vocab: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Output layer and loss with all three gradients: limited by its three matrix products."""
    labels = torch.randint(vocab, (rows,), device=device)

    def eager(hidden, weight):
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")

    contestants: dict[str, Operation] = {
        "ours": lambda hidden, weight: linear_token_losses(hidden, weight, None, labels).minimised,
        "eager": eager,
        "compile": compiled(eager),
    }
    if liger := imported("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"):
        contestants["liger"] = lambda hidden, weight: liger(hidden, weight, labels, reduction="sum")
    inputs = drawn(device, dtype, (rows, hidden_size))
    inputs.append((0.02 * torch.randn(vocab, hidden_size, device=device)).to(dtype).requires_grad_())
    grads = [torch.ones((), device=device)]
    return Case("output layer and loss", f"{rows} x {hidden_size} x {vocab}", inputs, contestants, eager, 0, 0, grads)


def compiled(operation: Operation) -> Operation:
    """By torch.compile; on a CPU, where this file is only tried out, without a code generator."""
    backend = "inductor" if torch.cuda.is_available() else "eager"
    return torch.compile(operation, dynamic=False, backend=backend)


def imported(module: str, name: str) -> Any:
    """A function of a package that may not be installed, else None."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError):
        return None
