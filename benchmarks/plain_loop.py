"""The best plain PyTorch training loop for a CPU that we could write: what millstream is compared with.

nanoGPT's model and loop (pre-norm blocks, one matrix for query, key and value, torch's fused attention, cross entropy
of all logits, tied embeddings, fused AdamW, clipping), in the ways to train in bf16 that plain PyTorch has:

    autocast     fp32 weights, torch.autocast around the forward pass
    bf16         bf16 weights and gradients, and fp32 copies of both that the optimizer works on
    compiled     as bf16, and the whole model with its loss through torch.compile
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

LR, BETAS, WEIGHT_DECAY, GRAD_CLIP = 6e-4, (0.9, 0.95), 0.1, 1.0


class Block(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.qkv, self.output = nn.Linear(hidden_size, 3 * hidden_size), nn.Linear(hidden_size, hidden_size)
        self.up, self.down = nn.Linear(hidden_size, 4 * hidden_size), nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, seq, hidden_size = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, seq, 3, self.num_heads, hidden_size // self.num_heads)
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)  # (batch, heads, seq, dim)
        x = x + self.output(mixed.transpose(1, 2).reshape(batch, seq, hidden_size))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """forward(input_ids, labels): the mean cross entropy, labels being already shifted; both are (batch, seq)."""

    def __init__(self, num_layers: int, hidden_size: int, num_heads: int, vocab_size: int, context: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, hidden_size), nn.Embedding(context, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def train(way: str, model: PlainGPT, batches: list[torch.Tensor]) -> list[float]:
    """Seconds of a step on each of `batches`, (batch, context + 1) ids; `way` is one of those above."""
    if way == "autocast":
        optimizer, weights = adamw(model), list(model.parameters())
    else:
        masters = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
        model.bfloat16()
        weights, optimizer = masters, adamw(masters)
    loss_of: Callable = torch.compile(model) if way == "compiled" else model
    seconds = []
    for ids in batches:
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            loss = loss_of(ids[:, :-1], ids[:, 1:])
        loss.backward()
        if way != "autocast":
            for master, parameter in zip(weights, model.parameters(), strict=True):
                master.grad = parameter.grad.float()
        nn.utils.clip_grad_norm_(weights, GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if way != "autocast":
            with torch.no_grad():
                torch._foreach_copy_(list(model.parameters()), weights)
            model.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - began)
    return seconds


def adamw(weights: nn.Module | list[torch.Tensor]) -> torch.optim.AdamW:
    listed = list(weights.parameters()) if isinstance(weights, nn.Module) else weights
    groups = [
        {"params": [weight for weight in listed if weight.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [weight for weight in listed if weight.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
