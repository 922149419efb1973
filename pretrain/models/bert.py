"""BERT (Devlin et al. 2019): post-norm encoder, three embeddings, heads for masked words and next sentence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from configs.model_sizes import BertShape
from pretrain.kernels.attention import sequence_blocks
from pretrain.kernels.linear_cross_entropy import IGNORE_INDEX
from pretrain.models.layers import MLP, Attention, Bias, Embedding, Linear, Visible, attention_mask
from pretrain.objective import token_losses

NORM_EPS = 1e-12
PADDING_ID = 0  # of [PAD], in the published vocabularies and in those trained here


class Block(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, shape: BertShape, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.attention = Attention(
            shape.hidden_size, shape.num_heads, attention_dropout, shape.init_std, shape.init_std, causal=False
        )
        self.attention_norm = nn.LayerNorm(shape.hidden_size, eps=NORM_EPS)
        intermediate_size = shape.intermediate_size or 4 * shape.hidden_size
        self.mlp = MLP(shape.hidden_size, intermediate_size, "none", shape.init_std, shape.init_std)
        self.mlp_norm = nn.LayerNorm(shape.hidden_size, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, mask: Visible) -> torch.Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


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
        self.word_embeddings = Embedding(shape.vocab_size, shape.hidden_size, shape.init_std, PADDING_ID)
        self.position_embeddings = Embedding(shape.max_seq_len, shape.hidden_size, shape.init_std)
        self.token_type_embeddings = Embedding(2, shape.hidden_size, shape.init_std)
        self.embedding_norm = nn.LayerNorm(shape.hidden_size, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(shape, dropout, attention_dropout) for _ in range(shape.num_layers))
        self.pooler = Linear(shape.hidden_size, shape.hidden_size, shape.init_std)
        self.mlm_transform = Linear(shape.hidden_size, shape.hidden_size, shape.init_std)
        self.mlm_norm = nn.LayerNorm(shape.hidden_size, eps=NORM_EPS)
        self.mlm_output = Bias(shape.vocab_size)
        self.nsp_output = Linear(shape.hidden_size, 2, shape.init_std)

    def external_parameters(self) -> list[tuple[nn.Module, torch.Tensor]]:
        """(module, parameter) where a module uses a parameter of another one: the MLM output is the embedding."""
        return [(self, self.word_embeddings.weight), (self, self.mlm_output.bias)]

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
    ) -> tuple[torch.Tensor, torch.Tensor] | dict[str, torch.Tensor]:
        """Inputs are (batch, seq), int64 (segment_ids: int32); next_sentence_label is (batch,), 0 is "next".

        Without labels: MLM logits (batch, seq, vocab) and NSP logits (batch, 2). With labels (-100 is no target):
        {"mlm": sum of cross entropies over the targets, "nsp": the same over next_sentence_label}, fp32 scalars, and
        with label_smoothing or z_loss, which are of the tokens, what `objective` lists. Only the masked positions,
        about 15 %, go through the MLM head.

        With cu_seqlens (batch + 1,) int32 the inputs are (1, total), samples of any lengths one after the other: sample
        i is [cu_seqlens[i], cu_seqlens[i + 1]), sees only itself, and position_ids restart with it.
        """
        x = self.encode(input_ids, segment_ids, position_ids, token_type_ids, cu_seqlens)
        first = x[:, 0] if cu_seqlens is None else x[0, cu_seqlens[:-1]]  # (batch, hidden), of each sample's [CLS]
        pooled = torch.tanh(self.pooler(first))
        if labels is None:
            hidden = self.mlm_hidden(x)
            return hidden @ self.word_embeddings.weight.t() + self.mlm_output.bias, self.nsp_output(pooled)
        targets = labels.flatten() != IGNORE_INDEX
        hidden = self.mlm_hidden(x.flatten(0, 1)[targets])
        weight, bias = self.word_embeddings.weight, self.mlm_output.bias
        losses = token_losses("mlm", hidden, weight, bias, labels.flatten()[targets], label_smoothing, z_loss)
        if next_sentence_label is not None:
            logits = self.nsp_output(pooled).float()
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
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        mask: Visible
        if cu_seqlens is None:
            mask = attention_mask(segment_ids, causal=False)
        else:
            mask = sequence_blocks(cu_seqlens, self.shape.num_heads)
        x = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
        x = self.dropout(self.embedding_norm(x + self.token_type_embeddings(token_type_ids)))
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        return x

    def mlm_hidden(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlm_norm(F.gelu(self.mlm_transform(x)))
