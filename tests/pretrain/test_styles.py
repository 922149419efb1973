"""Styles of blocks: Llama, Qwen3, GPT-Neo and ModernBERT against transformers, and what must hold of any of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from configs.errors import ConfigError
from configs.load import load_pretrain
from configs.model_sizes import BERT_SIZES, GPT_SIZES, model_shape
from configs.schema import CheckpointConfig, ModelConfig, OptimizerConfig, PretrainConfig
from data_pipeline import bert_rows
from pretrain import checkpoint
from pretrain.checkpoint import CheckpointError, Fragment
from pretrain.kernels.linear_cross_entropy import IGNORE_INDEX
from pretrain.load import facts
from pretrain.models import build_model, hf
from pretrain.models.bert import Bert
from pretrain.models.gpt import GPT
from pretrain.models.hf_config import hf_config, shape_from_hf
from pretrain.optim import make_optimizer
from pretrain.optimizers.muon import direction, orthogonalize
from pretrain.optimizers.slices import Slice
from pretrain.saver import open_saver
from pretrain.state import TrainState
from tests.pretrain.test_saver import Alone

SIZES = dict(vocab_size=97, max_position_embeddings=64)
LLAMA = dict(num_hidden_layers=2, hidden_size=48, intermediate_size=56, **SIZES)
CAUSAL = {
    "llama, a key for each query": (LlamaForCausalLM, LlamaConfig(num_attention_heads=3, **LLAMA)),
    "llama, two queries a key": (
        LlamaForCausalLM, LlamaConfig(num_attention_heads=4, num_key_value_heads=2, rope_theta=5e5, **LLAMA)
    ),
    "llama, one key for all, tied": (
        LlamaForCausalLM,
        LlamaConfig(num_attention_heads=6, num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-5, **LLAMA),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(num_attention_heads=4, num_key_value_heads=2, head_dim=12, **LLAMA)),
    "gpt-neo": (
        GPTNeoForCausalLM,
        GPTNeoConfig(num_layers=4, hidden_size=32, num_heads=2, attention_types=[[["global", "local"], 2]],
                     window_size=7, **SIZES),
    ),
}  # fmt: skip
MODERNBERT = [
    dict(num_hidden_layers=4, hidden_size=48, num_attention_heads=3, intermediate_size=40, local_attention=8),
    dict(num_hidden_layers=5, hidden_size=32, num_attention_heads=1, intermediate_size=33, local_attention=14),
]
STYLES = {  # small models of every style that is not GPT-2's or BERT's
    "llama": ModelConfig(preset="llama-nano", num_layers=2, hidden_size=32),
    "qwen3": ModelConfig(preset="qwen3-nano", num_layers=2, hidden_size=32),
    "gpt-neo": ModelConfig(preset="gpt-neo-nano", num_layers=2, hidden_size=32, local_window=5),
    "modernbert": ModelConfig(
        architecture="bert", preset="modernbert-nano", num_layers=4, hidden_size=32, local_window=8
    ),
}


def ids(vocab_size: int, *shape: int) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


def with_noise(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter off its start, norms and biases too: what is one or zero hides faults."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def with_weights_of(theirs: torch.nn.Module) -> GPT | Bert:
    shape = shape_from_hf(theirs.config.to_dict())
    ours = GPT(shape) if shape.style.is_causal else Bert(shape)
    names = [name for name, _ in ours.named_parameters()]
    ours.load_state_dict(hf.from_hf(shape, names, theirs.state_dict()))
    return ours.eval()


def assert_same_gradients(ours: GPT | Bert, theirs: torch.nn.Module) -> None:
    """Our gradients, each in the names and scale of transformers: of a query that is divided, it is multiplied."""
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        for hf_name, found in hf.to_hf(ours.shape, name, parameter.grad):
            if ours.shape.style.model_type == "gpt_neo" and "q_proj" in hf_name:
                found = found * ours.shape.head_dim
            torch.testing.assert_close(found, expected.pop(hf_name), atol=1e-5, rtol=1e-4, msg=lambda m, n=name: n + m)
    assert not expected


@pytest.mark.parametrize(("kind", "config"), CAUSAL.values(), ids=CAUSAL)
def test_decoder_has_the_logits_loss_and_gradients_of_transformers(kind, config):
    torch.manual_seed(1)
    theirs = with_noise(kind(config))
    ours = with_weights_of(theirs)
    tokens = ids(97, 3, 33)
    labels = torch.cat([tokens[:, 1:], torch.full((3, 1), IGNORE_INDEX)], 1)
    expected = theirs(tokens, labels=tokens)
    torch.testing.assert_close(ours(tokens), expected.logits, atol=1e-5, rtol=1e-5)
    loss = ours(tokens, labels=labels)["clm"] / (3 * 32)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.loss.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("sizes", MODERNBERT)
@pytest.mark.parametrize("unpad", [False, True])
def test_modernbert_has_the_logits_loss_and_gradients_of_transformers(sizes, unpad):
    torch.manual_seed(1)
    config = ModernBertConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
                              attn_implementation="eager", **SIZES, **sizes)  # fmt: skip
    theirs = with_noise(ModernBertForMaskedLM(config))
    ours = with_weights_of(theirs)
    real = torch.arange(33) < torch.tensor([[33], [20], [7]])
    tokens = torch.where(real, ids(96, 3, 33) + 1, 0)
    labels = torch.where((ids(5, 3, 33) == 0) & real, tokens, IGNORE_INDEX)
    expected = theirs(tokens, attention_mask=real.int(), labels=labels)
    batch = {"input_ids": tokens, "segment_ids": real.int(), "position_ids": torch.arange(33).expand(3, 33)}
    if unpad:
        flat = bert_rows.unpad({name: tensor.numpy() for name, tensor in (batch | {"labels": labels}).items()})
        batch = {name: torch.from_numpy(array) for name, array in flat.items()}
        labels = batch.pop("labels")
    logits = ours(**batch)
    torch.testing.assert_close(logits[0] if unpad else logits[real], expected.logits[real], atol=1e-5, rtol=1e-5)
    loss = ours(**batch, labels=labels)["mlm"] / (labels != IGNORE_INDEX).sum()
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.loss.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("name", STYLES)
def test_names_round_trip_through_transformers_and_so_does_the_shape(name):
    model = with_noise(build_model(STYLES[name], 61, 32))
    ours = dict(model.named_parameters())
    theirs = dict(pair for key, tensor in ours.items() for pair in hf.to_hf(model.shape, key, tensor))
    back = hf.from_hf(model.shape, list(ours), theirs)
    for key, tensor in ours.items():
        torch.testing.assert_close(back[key], tensor)
    shape = shape_from_hf(hf_config(model.shape, {}))
    assert (shape.style, shape.mlp_size, shape.kv_heads) == (
        model.shape.style,
        model.shape.mlp_size,
        model.shape.kv_heads,
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-neo"])
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_row_has_the_loss_and_gradients_of_one_document_a_row(name, recompute):
    torch.manual_seed(0)
    config = STYLES[name].model_copy(update={"activation_checkpointing": recompute})
    model = with_noise(build_model(config, 61, 32)).train()
    documents = [ids(61, n) for n in (5, 14, 9)]
    labels = [torch.cat([d[1:], torch.tensor([IGNORE_INDEX])]) for d in documents]
    apart = sum(model(d[None], labels=y[None])["clm"] for d, y in zip(documents, labels, strict=True))
    apart.backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    segments = torch.cat([torch.full_like(d, i + 1) for i, d in enumerate(documents)])[None].int()
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    packed = model(torch.cat(documents)[None], segments, positions, torch.cat(labels)[None])["clm"]
    packed.backward()
    torch.testing.assert_close(packed, apart, atol=1e-4, rtol=1e-5)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], atol=1e-4, rtol=1e-4)


def test_norms_and_biases_of_every_style_do_not_decay_and_all_else_does():
    for config in STYLES.values():
        model = build_model(config, 61, 32)
        groups = make_optimizer(model, OptimizerConfig()).param_groups
        kept = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
        for name, parameter in model.named_parameters():
            assert (id(parameter) in kept) == (parameter.dim() == 1), name


def test_muon_makes_each_matrix_of_a_fused_one_orthogonal():
    torch.manual_seed(0)
    matrix = torch.randn(48 + 2 * 16, 48)  # grouped queries: 48 rows, and 16 of keys and of values
    made = direction(matrix, Slice("blocks.0.attention.qkv.weight", (80, 48), 0, (3840,)))
    parts = [orthogonalize(part) * 0.2 * 48**0.5 for part in matrix.split([48, 16, 16])]
    torch.testing.assert_close(made, torch.cat(parts))
    gate_up = torch.randn(128, 48)
    made = direction(gate_up, Slice("blocks.0.mlp.gate_up.weight", (128, 48), 0, (6144,)))
    torch.testing.assert_close(made, torch.cat([orthogonalize(part) * 0.2 * 64**0.5 for part in gate_up.chunk(2)]))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"rope_theta": 500.0}),
        ("llama", {"num_heads": 2, "num_kv_heads": 1}),
        ("gpt-neo", {"local_window": 6}),
    ],
)
def test_what_the_shapes_of_weights_do_not_tell_may_not_change_within_a_run(name, change, tmp_path):
    def facts_of(model: ModelConfig) -> dict:
        return facts(PretrainConfig(run_dir="r", model=model), SimpleNamespace(facts=lambda batch: {"seed": 1}), 0)

    changed = STYLES[name].model_copy(update=change)
    shapes = [{n: p.shape for n, p in build_model(c, 61, 32).named_parameters()} for c in (STYLES[name], changed)]
    assert shapes[0] == shapes[1]
    with open_saver(tmp_path, CheckpointConfig(), Alone()) as saver:
        fragment = Fragment("w", (2,), 0, {"master": torch.zeros(2)})
        saver.save(TrainState(1), [fragment], facts_of(STYLES[name]))
    found = checkpoint.newest_valid(tmp_path)
    checkpoint.check_facts(found, facts_of(STYLES[name]))
    with pytest.raises(CheckpointError, match="the same weights would be another model"):
        checkpoint.check_facts(found, facts_of(changed))


def test_pairs_of_sentences_are_refused_where_the_style_has_no_head_for_them(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("run_dir: r\nmodel: {architecture: bert, preset: modernbert-nano}\n")
    with pytest.raises(ConfigError, match=r"set data\.masking\.pairs=none"):
        load_pretrain(file)
    assert load_pretrain(file, ["data.masking.pairs=none"]).model.preset == "modernbert-nano"


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("smollm-135m", 134_515_008),
        ("tinyllama-1.1b", 1_100_048_384),
        ("llama2-7b", 6_738_415_616),
        ("llama3-8b", 8_030_261_248),
        ("modernbert-base", 149_655_232),
    ],
)
def test_presets_have_the_parameters_that_were_published(preset, expected):
    architecture = "gpt" if preset in GPT_SIZES else "bert"
    with torch.device("meta"):
        model = build_model(ModelConfig(architecture=architecture, preset=preset), None, 128)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"style": "lama"}, "architecture gpt has gpt2, gpt-neo, llama, qwen3"),
        (
            {"style": "llama", "num_heads": 4, "num_kv_heads": 3},
            "num_heads=4 is not a multiple of model.num_kv_heads=3",
        ),
        ({"num_kv_heads": 1}, "style gpt2 has as many heads of keys as of queries"),
        ({"local_window": 8}, "style gpt2 has no local blocks; model.style=gpt-neo has"),
        ({"rope_theta": 1e4}, "style gpt2 has learned positions"),
        ({"tied_output": False}, "style gpt2 is always the embedding"),
        ({"style": "llama", "hidden_size": 30, "num_heads": 2}, "= 15 is odd"),
        ({"style": "llama", "mup": {"base_hidden_size": 64}}, "model.mup is defined for model.style=gpt2, found llama"),
    ],
)
def test_what_a_style_does_not_have_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        model_shape(ModelConfig.model_validate(given), 61, 32)


def test_any_size_can_be_had_in_any_style():
    shape = model_shape(ModelConfig(preset="gpt2", style="llama"), None, 128)
    assert (shape.num_layers, shape.hidden_size, shape.mlp_size, shape.kv_heads) == (12, 768, 2048, 12)
    back = model_shape(ModelConfig(preset="llama3-8b", style="gpt2"), None, 128)
    assert (back.mlp_size, back.kv_heads, back.style) == (4 * 4096, 32, GPT_SIZES["gpt2"].style)
    assert model_shape(ModelConfig(preset="llama3-8b", style="llama"), None, 128) == GPT_SIZES["llama3-8b"]
    assert not BERT_SIZES["modernbert-base"].style.has_pairs
