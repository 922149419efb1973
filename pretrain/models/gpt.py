"""Decoders: GPT-2 and GPT-3 (Radford et al. 2019; Brown et al. 2020), and the other styles of `GPT_STYLES`.

In every style a block is x + attention(norm(x)), then x + mlp(norm(x)), and its two output layers start smaller by
sqrt(2 x num_layers). With muP all four matrices start smaller by sqrt(width_ratio), and attention is divided by
head_dim / the square root of the base model's, in place of sqrt(head_dim).
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from configs.model_sizes import GPTShape
from pretrain.models.layers import Block, Embedding, Linear, attention_mask, make_norm, rotations
from pretrain.objective import token_losses

INIT_STD = 0.02


class GPT(nn.Module):
    architecture = "gpt"

    def __init__(
        self,
        shape: GPTShape,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.activation_checkpointing = activation_checkpointing
        self.word_embeddings = Embedding(shape.vocab_size, shape.hidden_size, INIT_STD)
        if shape.style.rope_theta is None:
            self.position_embeddings = Embedding(shape.max_seq_len, shape.hidden_size, INIT_STD)
        self.dropout = nn.Dropout(dropout)
        std = INIT_STD / math.sqrt(shape.width_ratio)
        stds = (std, std / math.sqrt(2 * shape.num_layers))
        self.blocks = nn.ModuleList(
            Block(shape, layer, dropout, attention_dropout, *stds, query_scale(shape))
            for layer in range(shape.num_layers)
        )
        self.final_norm = make_norm(shape.hidden_size, shape.style)
        if not shape.style.has_tied_output:
            self.word_output = Linear(shape.hidden_size, shape.vocab_size, INIT_STD, bias=False)

    @property
    def output_weight(self) -> torch.Tensor:
        """(vocab, hidden), of the output layer: the embedding's, where they are tied."""
        return self.word_embeddings.weight if self.shape.style.has_tied_output else self.word_output.weight

    def external_parameters(self) -> list[tuple[nn.Module, torch.Tensor]]:
        """(module, parameter) where a module uses a parameter of another one: the loss has the output layer in it."""
        return [(self, self.output_weight)]

    def forward(
        self,
        input_ids: torch.Tensor,
        segment_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """All inputs are (batch, seq), int64 (segment_ids: int32).

        Without labels: logits, (batch, seq, vocab). With labels (already shifted; -100 is no target): {"clm": sum of
        the cross entropies over the targets, fp32 scalar}, and with label_smoothing or z_loss what `objective` lists.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        mask = attention_mask(segment_ids, causal=True)
        x = self.word_embeddings(input_ids)
        if self.shape.style.rope_theta is None:
            x = x + self.position_embeddings(position_ids)
        x = self.dropout(x)
        rotation = rotations(self.shape, position_ids)
        for layer, block in enumerate(self.blocks):
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, mask, rotation[layer], use_reentrant=False)
            else:
                x = block(x, mask, rotation[layer])
        x = self.final_norm(x)
        if self.shape.width_ratio != 1:
            x = x / self.shape.width_ratio
        if labels is None:
            return x @ self.output_weight.t()
        return token_losses("clm", x.flatten(0, 1), self.output_weight, None, labels.flatten(), label_smoothing, z_loss)


def query_scale(shape: GPTShape) -> float:
    """Factor of the queries: with it attention's usual 1 / sqrt(head_dim) becomes muP's, which goes as 1 / head_dim."""
    return shape.head_dim_ratio**-0.5


def without_mup(shape: GPTShape, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The weight with which a usual GPT-2 does what this model does with its parameter: muP's factors are in it."""
    if name.startswith("final_norm.") and shape.width_ratio != 1:
        return tensor / shape.width_ratio
    if ".attention.qkv." in name and shape.head_dim_ratio != 1:
        query, *others = tensor.chunk(3)
        return torch.cat([query * query_scale(shape), *others])
    return tensor
