"""GPT and BERT against transformers with the same weights, and what must hold of any of them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, GPT2Config, GPT2LMHeadModel

from configs.load import ConfigError
from configs.model_sizes import GPT_SIZES
from configs.schema import FimConfig, ModelConfig
from data_pipeline import bert_rows, chance, fim, pack
from pretrain.kernels.linear_cross_entropy import IGNORE_INDEX
from pretrain.models import build_model, gpt, hf
from pretrain.models.bert import Bert
from pretrain.models.gpt import GPT
from pretrain.models.hf_config import shape_from_hf
from pretrain.objective import count_targets, global_mean

GPT_CASES = [dict(n_layer=2, n_embd=48, n_head=3, vocab_size=97), dict(n_layer=3, n_embd=32, n_head=1, n_inner=40)]
BERT_CASES = [
    dict(num_hidden_layers=2, hidden_size=48, num_attention_heads=3, intermediate_size=64, vocab_size=97),
    dict(num_hidden_layers=1, hidden_size=32, num_attention_heads=4, intermediate_size=128, vocab_size=1001),
]


def ids(vocab_size: int, *shape: int) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


def with_weights_of(theirs: torch.nn.Module) -> GPT | Bert:
    """Our model with the weights of one of transformers."""
    shape = shape_from_hf(theirs.config.to_dict())
    ours = GPT(shape) if theirs.config.model_type == "gpt2" else Bert(shape)
    names = [name for name, _ in ours.named_parameters()]
    ours.load_state_dict(hf.from_hf(shape, names, theirs.state_dict()))
    return ours.eval()


def our_gradients(model: GPT | Bert) -> dict[str, torch.Tensor]:
    """Gradients under transformers' names."""
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients.update(hf.to_hf(model.shape, name, parameter.grad))
    return gradients


@pytest.mark.parametrize("sizes", GPT_CASES)
def test_gpt_has_the_logits_loss_and_gradients_of_transformers(sizes):
    torch.manual_seed(1)
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=40, **sizes)).eval()
    ours = with_weights_of(theirs)
    tokens = ids(ours.shape.vocab_size, 3, 33)
    labels = torch.cat([tokens[:, 1:], torch.full((3, 1), IGNORE_INDEX)], 1)
    expected = theirs(tokens, labels=tokens)
    torch.testing.assert_close(ours(tokens), expected.logits, atol=1e-5, rtol=1e-5)
    loss = ours(tokens, labels=labels)["clm"] / (3 * 32)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.loss.backward()
    gradients = our_gradients(ours)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("sizes", BERT_CASES)
def test_bert_has_the_logits_loss_and_gradients_of_transformers(sizes):
    torch.manual_seed(1)
    theirs = BertForPreTraining(BertConfig(max_position_embeddings=40, **sizes)).eval()
    ours = with_weights_of(theirs)
    tokens, types = ids(97, 3, 33), ids(2, 3, 33)
    padding = (torch.arange(33) < torch.tensor([[33], [20], [7]])).int()
    labels = torch.where((ids(5, 3, 33) == 0) & padding.bool(), tokens, IGNORE_INDEX)
    is_random = torch.tensor([0, 1, 1])
    expected = theirs(
        tokens, attention_mask=padding, token_type_ids=types, labels=labels, next_sentence_label=is_random
    )
    words, sentences = ours(tokens, segment_ids=padding, token_type_ids=types)
    real = padding.bool()
    torch.testing.assert_close(words[real], expected.prediction_logits[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sentences, expected.seq_relationship_logits, atol=1e-5, rtol=1e-5)
    sums = ours(tokens, padding, token_type_ids=types, labels=labels, next_sentence_label=is_random)
    loss = sums["mlm"] / (labels != IGNORE_INDEX).sum() + sums["nsp"] / 3
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.loss.backward()
    gradients = our_gradients(ours)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: n + m)


def test_masked_words_alone_have_the_loss_and_gradients_of_transformers():
    torch.manual_seed(1)
    whole = BertForPreTraining(BertConfig(max_position_embeddings=40, **BERT_CASES[0])).eval()
    theirs = BertForMaskedLM(whole.config).eval()
    missing, unexpected = theirs.load_state_dict(whole.state_dict(), strict=False)
    assert not missing and all("pooler" in name or "seq_relationship" in name for name in unexpected)
    ours = with_weights_of(whole)
    tokens = ids(97, 3, 33)
    labels = torch.where(ids(5, 3, 33) == 0, tokens, IGNORE_INDEX)
    batch = {"input_ids": tokens, "token_type_ids": torch.zeros_like(tokens), "labels": labels}
    loss = global_mean(ours(**batch), count_targets([batch]))
    expected = theirs(tokens, labels=labels)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.loss.backward()
    gradients = {}
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            gradients.update(hf.to_hf(ours.shape, name, parameter.grad))
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: n + m)
    assert not any("pooler" in name or "seq_relationship" in name for name in gradients)


def test_rows_filled_in_the_middle_have_the_loss_of_transformers_document_by_document():
    """A row of three documents; the second and third, rearranged by hand, are what transformers sees one by one."""
    torch.manual_seed(1)
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=40, **GPT_CASES[0])).eval()
    prefix_id, middle_id, suffix_id, end = sentinels = fim.FimIds(1, 2, 3, 0)
    tokens = np.arange(10, 51)[None]
    tokens[0, [3, 22]] = end  # documents of 4 tokens, too short to be rearranged, of 19, and of 18 that go on
    made = fim.fill_in_rows(
        pack.gpt_rows(tokens, np.zeros(2, int), np.array([4, 23])), chance.row_keys(3, np.array([5])),
        FimConfig(probability=1.0, spm_share=0.0), sentinels,
    )  # fmt: skip
    row = [*made["input_ids"][0].tolist(), int(made["labels"][0, -1])]
    loss = with_weights_of(theirs)(**{name: torch.from_numpy(array) for name, array in made.items()})["clm"]
    expected = torch.zeros(())
    for start, stop, kept in ((0, 4, None), (4, 23, 15), (23, 41, 15)):
        document = tokens[0, start:stop].tolist()
        if kept is not None:
            text, ended = document[:kept], [end] if document[-1] == end else []
            first = row[start:stop].index(suffix_id) - 1
            second = first + stop - start - len(ended) - 1 - row[start:stop].index(middle_id)
            parts = [prefix_id, *text[:first], suffix_id, *text[second:], middle_id, *text[first:second], *ended]
            assert row[start:stop] == parts
            document = parts
        ids_of_one = torch.tensor([document])
        expected = expected + theirs(ids_of_one, labels=ids_of_one).loss * (len(document) - 1)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)


def test_golden_gpt2_of_transformers_gives_its_recorded_logits_loss_and_gradients(shared_data):
    config = json.loads((shared_data / "goldens/hf_gpt2_tiny_config.json").read_text())
    weights = load_file(shared_data / "goldens/hf_gpt2_tiny.safetensors")
    golden = load_file(shared_data / "goldens/hf_gpt2_tiny_io.safetensors")
    if not any(name.startswith("transformer.") for name in weights):
        weights = {f"transformer.{name}": tensor for name, tensor in weights.items()}
    ours = GPT(shape_from_hf(config))
    ours.load_state_dict(hf.from_hf(ours.shape, [name for name, _ in ours.named_parameters()], weights))
    tokens = golden["input_ids"].long()
    logits = ours(tokens)
    torch.testing.assert_close(logits, golden["logits"].float(), atol=1e-5, rtol=1e-5)
    labels = torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), IGNORE_INDEX)], 1)
    loss = ours(tokens, labels=labels)["clm"] / (labels != IGNORE_INDEX).sum()
    torch.testing.assert_close(loss, golden["loss"][0], atol=1e-5, rtol=1e-5)
    loss.backward()
    gradients = our_gradients(ours)
    for recorded, name in (("grad_wte", "wte.weight"), ("grad_h0_c_attn", "h.0.attn.c_attn.weight")):
        torch.testing.assert_close(gradients[f"transformer.{name}"], golden[recorded], atol=1e-5, rtol=1e-5)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    torch.testing.assert_close(norm, golden["grad_norm"][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt", "bert"])
def test_names_round_trip_through_transformers(architecture):
    torch.manual_seed(0)
    config = ModelConfig(architecture=architecture, num_layers=2, hidden_size=32, num_heads=2)
    model = build_model(config, 61, 16)
    ours = dict(model.named_parameters())
    theirs = dict(pair for name, tensor in ours.items() for pair in hf.to_hf(model.shape, name, tensor))
    back = hf.from_hf(model.shape, list(ours), theirs)
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize("architecture", ["gpt", "bert"])
def test_loss_at_initialisation_is_ln_v_and_half_the_variance_of_the_logits(architecture):
    torch.manual_seed(0)
    model = build_model(ModelConfig(architecture=architecture), 8192, 64)
    tokens, labels = ids(8192, 8, 64), ids(8192, 8, 64).flip(0)
    (loss,) = model(tokens, labels=labels).values()
    std = model.shape.init_std if architecture == "bert" else gpt.INIT_STD
    variance = model.shape.hidden_size * std**2  # of a logit: normalised states times rows of the embedding
    assert loss.item() / labels.numel() == pytest.approx(math.log(8192) + variance / 2, rel=0.01)


def test_changing_a_future_token_moves_no_past_logit():
    torch.manual_seed(0)
    model = build_model(ModelConfig(), 61, 16)
    tokens = ids(61, 2, 16)
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 61
    assert torch.equal(model(tokens)[:, :9], model(changed)[:, :9])
    assert not torch.equal(model(tokens)[:, 9:], model(changed)[:, 9:])


def test_packed_row_has_the_loss_and_gradients_of_one_document_a_row():
    torch.manual_seed(0)
    model = build_model(ModelConfig(num_layers=2, hidden_size=32, num_heads=2), 61, 24)
    documents = [ids(61, n) for n in (5, 12, 7)]
    labels = [torch.cat([d[1:], torch.tensor([IGNORE_INDEX])]) for d in documents]
    apart = sum(model(d[None], labels=y[None])["clm"] for d, y in zip(documents, labels, strict=True))
    apart.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    segments = torch.cat([torch.full_like(d, i + 1) for i, d in enumerate(documents)])[None].int()
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    packed = model(torch.cat(documents)[None], segments, positions, torch.cat(labels)[None])["clm"]
    packed.backward()
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_batch_without_padding_has_the_loss_and_gradients_of_the_padded_one(recompute):
    torch.manual_seed(0)
    config = ModelConfig(
        architecture="bert", num_layers=2, hidden_size=32, num_heads=2, activation_checkpointing=recompute
    )
    model = build_model(config, 61, 24).train()
    lengths = torch.tensor([[5], [24], [17], [24], [2]])
    real = torch.arange(24) < lengths
    tokens, types = ids(60, 5, 24) + 1, (torch.arange(24) >= lengths // 2).long()
    labels = torch.where((ids(3, 5, 24) == 0) & real, tokens, IGNORE_INDEX)
    padded = {
        "input_ids": torch.where(real, tokens, 0),
        "segment_ids": real.int(),
        "position_ids": torch.arange(24).expand(5, 24),
        "token_type_ids": torch.where(real, types, 0),
        "labels": labels,
        "next_sentence_label": torch.tensor([0, 1, IGNORE_INDEX, 1, 0]),
    }
    flat = bert_rows.unpad({name: tensor.numpy() for name, tensor in padded.items()})
    unpadded = {name: torch.from_numpy(array) for name, array in flat.items()}
    assert unpadded["input_ids"].shape == (1, int(lengths.sum()))
    assert count_targets([unpadded]) == count_targets([padded])
    grads = []
    for batch in (padded, unpadded):
        model.zero_grad()
        sums = model(**batch)
        (sums["mlm"] + sums["nsp"]).backward()
        grads.append((sums, {name: p.grad.clone() for name, p in model.named_parameters()}))
    for name, loss in grads[0][0].items():
        torch.testing.assert_close(grads[1][0][name], loss, atol=1e-5, rtol=1e-5)
    for name, gradient in grads[0][1].items():
        torch.testing.assert_close(grads[1][1][name], gradient, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: n + m)


def test_bert_of_a_long_row_gives_each_sample_its_own_logits():
    torch.manual_seed(0)
    model = build_model(ModelConfig(architecture="bert"), 61, 16).eval()
    samples = [ids(61, n)[None] for n in (16, 9, 3)]
    ends = torch.tensor([0, 16, 25, 28]).int()
    positions = torch.cat([torch.arange(n) for n in (16, 9, 3)])[None]
    words, sentences = model(torch.cat(samples, 1), position_ids=positions, cu_seqlens=ends)
    for number, sample in enumerate(samples):
        expected_words, expected_sentence = model(sample)
        start, stop = ends[number : number + 2].tolist()
        torch.testing.assert_close(words[:, start:stop], expected_words, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sentences[number], expected_sentence[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt", "bert"])
def test_activation_checkpointing_gives_the_same_gradients(architecture):
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        config = ModelConfig(architecture=architecture, dropout=0.1, activation_checkpointing=recompute)
        model = build_model(config, 61, 16).train()
        torch.manual_seed(1)
        model(ids(61, 2, 16), labels=ids(61, 2, 16)).popitem()[1].backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_one_batch_is_overfitted():
    torch.manual_seed(0)
    model = build_model(ModelConfig(num_layers=2, hidden_size=64, num_heads=2), 61, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = ids(61, 4, 17)
    for _ in range(150):
        loss = model(tokens[:, :-1], labels=tokens[:, 1:])["clm"] / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_residual_outputs_start_smaller_by_the_square_root_of_twice_the_layers():
    torch.manual_seed(0)
    model = build_model(ModelConfig(num_layers=8), 61, 16)
    for block in model.blocks:
        assert block.mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.mlp.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
        assert block.attention.output.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


@pytest.mark.parametrize(("preset", "millions"), [("gpt2", 124.4), ("gpt2-medium", 354.8), ("gpt2-xl", 1557.6)])
def test_published_sizes_have_the_published_parameter_counts(preset, millions):
    with torch.device("meta"):
        model = GPT(GPT_SIZES[preset])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_gpt3_175b_has_175_billion_parameters():
    with torch.device("meta"):
        model = GPT(GPT_SIZES["gpt3-175b"])
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(175, abs=0.5)


def test_unknown_preset_names_the_valid_ones():
    with pytest.raises(ConfigError, match=r"model.preset=gpt5.*nano, gpt2"):
        build_model(ModelConfig(preset="gpt5"), 61, 16)


def test_too_long_sequence_says_what_to_set():
    with pytest.raises(ConfigError, match=r"set model\.max_seq_len=4096"):
        build_model(ModelConfig(), 61, 4096)
