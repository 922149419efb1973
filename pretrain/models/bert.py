"""Encoders: BERT (Devlin et al. 2019), post-norm, with three embeddings and heads for masked words and next sentence;
ModernBERT (Warner et al. 2024), pre-norm, with rotary positions, local blocks and the head for masked words alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from configs.model_sizes import BertShape
from pretrain.kernels.activation import activated
from pretrain.kernels.attention import sequence_blocks
from pretrain.kernels.embeddings import bert_embeddings
from pretrain.kernels.linear_cross_entropy import IGNORE_INDEX
from pretrain.models.layers import (
    Bias,
    Block,
    Embedding,
    LayerNorm,
    Linear,
    Visible,
    attention_mask,
    make_norm,
    rotations,
)
from pretrain.objective import token_losses

PADDING_ID = 0  # of [PAD], in the published vocabularies and in those trained here


class Bert(nn.Module):
    architecture = "bert"

    def __init__(
        self,
        shape: BertShape,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.activation_checkpointing = activation_checkpointing
        hidden_size, std, style = shape.hidden_size, shape.init_std, shape.style
        self.word_embeddings = Embedding(shape.vocab_size, hidden_size, std, PADDING_ID)
        if style.rope_theta is None:
            self.position_embeddings = Embedding(shape.max_seq_len, hidden_size, std)
        if style.has_pairs:
            self.token_type_embeddings = Embedding(2, hidden_size, std)
        self.embedding_norm = make_norm(hidden_size, style)
        self.dropout = nn.Dropout(dropout)
        stds = (std, std / math.sqrt(2 * shape.num_layers) if style.norm_first else std)
        self.blocks = nn.ModuleList(
            Block(shape, layer, dropout, attention_dropout, *stds) for layer in range(shape.num_layers)
        )
        if style.norm_first:
            self.final_norm = make_norm(hidden_size, style)
        if style.has_pairs:
            self.pooler = Linear(hidden_size, hidden_size, std)
        self.mlm_transform = Linear(hidden_size, hidden_size, std, style.has_bias)
        self.mlm_norm = make_norm(hidden_size, style)
        self.mlm_output = Bias(shape.vocab_size)
        if style.has_pairs:
            self.nsp_output = Linear(hidden_size, 2, std)

    def external_parameters(self) -> list[tuple[nn.Module, torch.Tensor]]:
        """(module, parameter) where a module uses a parameter of another one: the MLM output is the embedding, and
        BERT's embeddings are one operation."""
        used = [self.word_embeddings.weight, self.mlm_output.bias]
        if self.shape.style.has_pairs:
            used += [self.position_embeddings.weight, self.token_type_embeddings.weight]
            used += self.embedding_norm.parameters()
        return [(self, parameter) for parameter in used]

    def forward(
        self,
        input_ids: torch.Tensor,
        segment_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        next_sentence_label: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | dict[str, torch.Tensor]:
        """Inputs are (batch, seq), int64 (segment_ids: int32); next_sentence_label is (batch,), 0 is "next".

        Without labels: MLM logits (batch, seq, vocab) and NSP logits (batch, 2). With labels (-100 is no target):
        {"mlm": sum of cross entropies over the targets, "nsp": the same over next_sentence_label}, fp32 scalars, and
        with label_smoothing or z_loss, which are of the tokens, what `objective` lists. Only the masked positions,
        about 15 %, go through the MLM head. A style without pairs has the MLM logits alone, and no use for
        token_type_ids.

        With cu_seqlens (batch + 1,) int32 the inputs are (1, total), samples of any lengths one after the other: sample
        i is [cu_seqlens[i], cu_seqlens[i + 1]), sees only itself, and position_ids restart with it.
        """
        x = self.encode(input_ids, segment_ids, position_ids, token_type_ids, cu_seqlens)
        has_pairs = self.shape.style.has_pairs
        if labels is None:
            words = self.mlm_hidden(x) @ self.word_embeddings.weight.t() + self.mlm_output.bias
            return (words, self.pair_logits(x, cu_seqlens)) if has_pairs else words
        targets = labels.flatten() != IGNORE_INDEX
        hidden = self.mlm_hidden(x.flatten(0, 1)[targets])
        weight, bias = self.word_embeddings.weight, self.mlm_output.bias
        losses = token_losses("mlm", hidden, weight, bias, labels.flatten()[targets], label_smoothing, z_loss)
        if next_sentence_label is not None:
            logits = self.pair_logits(x, cu_seqlens).float()
            losses["nsp"] = F.cross_entropy(logits, next_sentence_label, reduction="sum", ignore_index=IGNORE_INDEX)
        return losses

    def encode(
        self,
        input_ids: torch.Tensor,
        segment_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states of the last block, (batch, seq, hidden)."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        mask: Visible
        if cu_seqlens is None:
            mask = attention_mask(segment_ids, causal=False)
        else:
            mask = sequence_blocks(cu_seqlens, self.shape.num_heads)
        if self.shape.style.has_pairs:
            x = self.embed(input_ids, position_ids, token_type_ids)
        else:
            x = self.dropout(self.embedding_norm(self.word_embeddings(input_ids)))
        rotation = rotations(self.shape, position_ids)
        for layer, block in enumerate(self.blocks):
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, mask, rotation[layer], use_reentrant=False)
            else:
                x = block(x, mask, rotation[layer])
        return self.final_norm(x) if self.shape.style.norm_first else x

    def embed(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, token_type_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """What BERT's first block gets: (batch, seq, hidden)."""
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        tables = (self.word_embeddings.weight, self.position_embeddings.weight, self.token_type_embeddings.weight)
        norm, dropout = self.embedding_norm, self.dropout.p if self.training else 0.0
        assert isinstance(norm, LayerNorm)
        ids = (input_ids, position_ids, types)
        return bert_embeddings(*ids, *tables, norm.weight, norm.bias, norm.eps, PADDING_ID, dropout)

    def pair_logits(self, x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        """(batch, 2), of the hidden states of each sample's [CLS]."""
        first = x[:, 0] if cu_seqlens is None else x[0, cu_seqlens[:-1]]  # (batch, hidden)
        return self.nsp_output(torch.tanh(self.pooler(first)))

    def mlm_hidden(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlm_norm(activated(self.mlm_transform(x), self.shape.style.activation))
