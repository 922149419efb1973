"""The plain training of `millstream prove loss`: its parts against the kernels and the rows of the loop."""

from __future__ import annotations

import pytest
import torch

from configs.schema import ModelConfig
from pretrain import objective
from pretrain.kernels import native
from pretrain.kernels.attention import attention
from pretrain.kernels.linear_cross_entropy import IGNORE_INDEX, linear_token_losses
from pretrain.models import build_model
from pretrain.reference import KERNELS, documents_alone, written_out, written_out_attention, written_out_losses

SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 3], [1, 1, 1, 1, 0, 0]], dtype=torch.int32)
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]])
LABELS = torch.tensor([[11, 12, -100, 21, -100, 31], [41, 42, 43, -100, -100, -100]])


def test_written_out_losses_are_those_of_the_fused_layer():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(6, 8), torch.randn(50, 8), torch.randn(50)
    arguments = (hidden, weight, bias, LABELS[0], 0.1, 0.01)
    for expected, found in zip(linear_token_losses(*arguments), written_out_losses(*arguments), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("causal", [True, False])
def test_written_out_attention_is_that_of_the_kernel(causal):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 6, 4)
    mask = (SEGMENTS[:, None, :, None] == SEGMENTS[:, None, None, :]).tril()
    torch.testing.assert_close(written_out_attention(q, k, v, None, causal), attention(q, k, v, None, causal))
    torch.testing.assert_close(written_out_attention(q, k, v, mask, True), attention(q, k, v, mask, True))


@pytest.mark.parametrize("causal", [True, False])
def test_written_out_windows_and_shared_keys_are_those_of_the_kernel(causal):
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 4, 6, 4), torch.randn(2, 2, 2, 6, 4)
    mask = SEGMENTS[:, None, :, None] == SEGMENTS[:, None, None, :]
    for given in (None, mask.tril() if causal else mask):
        arguments = (q, k, v, given, causal, 0.0, 3)
        torch.testing.assert_close(written_out_attention(*arguments), attention(*arguments))


def test_kernels_are_written_out_inside_of_the_context_only():
    kernel = objective.linear_token_losses
    with written_out(["loss"]):
        assert objective.linear_token_losses is written_out_losses
    assert objective.linear_token_losses is kernel


@pytest.mark.parametrize("chosen", [[], ["between"], ["loss"]])
def test_the_reference_uses_no_kernel_of_a_gpu_but_those_that_are_chosen(chosen, kernels, monkeypatch):
    used = set()
    launch = native.launch
    monkeypatch.setattr(native, "launch", lambda name, *a: (used.add(name), launch(name, *a)))
    model = build_model(ModelConfig(num_layers=1, hidden_size=16, num_heads=2), 50, 6)
    with written_out(set(KERNELS) - set(chosen)):
        model(LABELS.clamp(min=0), labels=LABELS)
    between = {"add_norm_forward", "bias_activation_forward"} if "between" in chosen else set()
    assert used == between | ({"softmax_gradient_in_place"} if "loss" in chosen else set())


def test_documents_become_rows_of_their_own_without_padding_and_longest_first():
    batch = {"input_ids": LABELS.clamp(min=0), "labels": LABELS, "segment_ids": SEGMENTS, "position_ids": POSITIONS}
    parts = list(documents_alone(batch, is_causal=True, max_tokens=8))
    assert [part["labels"].tolist() for part in parts] == [
        [[41, 42, 43, -100], [11, 12, -100, -100]],
        [[21, -100], [31, -100]],
    ]
    assert all(part.keys() == {"input_ids", "labels"} for part in parts)


def test_samples_of_other_lengths_do_not_share_a_batch_where_attention_looks_both_ways():
    batch = {
        "input_ids": torch.tensor([[1, 2, 0], [3, 4, 5], [6, 7, 0]]),
        "labels": torch.full((3, 3), IGNORE_INDEX),
        "segment_ids": torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.int32),
        "next_sentence_label": torch.tensor([0, 1, IGNORE_INDEX]),
    }
    parts = list(documents_alone(batch, is_causal=False, max_tokens=100))
    assert [part["input_ids"].tolist() for part in parts] == [[[3, 4, 5]], [[1, 2], [6, 7]]]
    assert [part["next_sentence_label"].tolist() for part in parts] == [[1], [0, IGNORE_INDEX]]


def test_documents_alone_have_the_losses_of_the_rows_that_hold_them():
    torch.manual_seed(0)
    model = build_model(ModelConfig(num_layers=2, hidden_size=16, num_heads=2), 50, 6)
    batch = {"input_ids": LABELS.clamp(min=0), "labels": LABELS, "segment_ids": SEGMENTS, "position_ids": POSITIONS}
    alone = sum(model(**part)["clm"] for part in documents_alone(batch, is_causal=True, max_tokens=8))
    torch.testing.assert_close(alone, model(**batch)["clm"])
    batch["segment_ids"] = (SEGMENTS > 0).int()  # documents that see each other
    assert abs(model(**batch)["clm"] - alone) > 1e-3
