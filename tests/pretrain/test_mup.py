"""muP (Yang et al. 2022): the coordinate check, the factors of Table 8, and an export without them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.model_sizes import model_shape
from configs.schema import CheckpointConfig, ModelConfig, OptimizerConfig, PretrainConfig, TokenizerConfig
from data_pipeline.tokenizer import make_tokenizer, save_tokenizer
from pretrain import checkpoint
from pretrain.checkpoint import CheckpointError, Fragment
from pretrain.export import export
from pretrain.load import facts
from pretrain.models import build_model
from pretrain.optim import make_optimizer
from pretrain.saver import open_saver
from pretrain.state import TrainState
from tests.pretrain.test_saver import Alone

VOCAB_SIZE, SEQ_LEN, BASE = 97, 16, 32
WIDTHS = [32, 64, 128, 256]
WIDE_HEADS = {"base_hidden_size": BASE, "base_head_dim": 16}  # two heads at any width, so they widen


def model_config(width: int, mup: dict | None, num_heads: int = 2) -> ModelConfig:
    return ModelConfig.model_validate({"num_layers": 2, "hidden_size": width, "num_heads": num_heads, "mup": mup})


def built(width: int, mup: dict | None, num_heads: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(model_config(width, mup, num_heads), VOCAB_SIZE, SEQ_LEN)


def change_after_steps(width: int, mup: dict | None, num_heads: int) -> dict[str, float]:
    """Root mean square of what four updates change of the outputs of the last attention and of the model's logits."""
    model = built(width, mup, num_heads)
    optimizer = make_optimizer(model, OptimizerConfig(lr=1e-2, weight_decay=0.0))
    ids = torch.randint(0, VOCAB_SIZE, (8, SEQ_LEN + 1), generator=torch.Generator().manual_seed(1))
    seen: dict[str, torch.Tensor] = {}
    model.blocks[1].attention.register_forward_hook(lambda module, given, output: seen.update(attention=output))
    model.blocks[1].register_forward_hook(lambda module, given, output: seen.update(residual=output))

    def outputs() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {"logits": model(ids[:, :-1])} | {name: tensor.clone() for name, tensor in seen.items()}

    before = outputs()
    for _ in range(4):
        optimizer.zero_grad()
        (model(ids[:, :-1], labels=ids[:, 1:])["clm"] / ids[:, 1:].numel()).backward()
        optimizer.step()
    after = outputs()
    return {name: (after[name] - before[name]).square().mean().sqrt().item() for name in before}


@pytest.mark.parametrize("heads_widen", [True, False])
def test_coordinate_check_updates_change_activations_alike_at_every_width_and_without_mup_ever_more(heads_widen):
    """Section 5 and appendix D.1 of the paper: the size of the change over the width, after a few steps."""
    mup = WIDE_HEADS if heads_widen else {"base_hidden_size": BASE}
    heads = [2 if heads_widen else width // 16 for width in WIDTHS]
    changes = {
        name: [change_after_steps(width, given, num) for width, num in zip(WIDTHS, heads, strict=True)]
        for name, given in (("mup", mup), ("standard", None))
    }
    for activation in ("attention", "residual", "logits"):
        sizes = {name: [change[activation] for change in of_widths] for name, of_widths in changes.items()}
        assert max(sizes["mup"]) < 2 * min(sizes["mup"]), (activation, sizes)
        assert sizes["standard"] == sorted(sizes["standard"]), (activation, sizes)
        assert sizes["standard"][-1] > 5 * sizes["standard"][0], (activation, sizes)


def test_base_model_is_bitwise_the_usual_one():
    usual, base = built(BASE, None), built(BASE, WIDE_HEADS)
    optimizers = [make_optimizer(model, OptimizerConfig()) for model in (usual, base)]
    ids = torch.arange(SEQ_LEN)[None]
    for model, optimizer in zip((usual, base), optimizers, strict=True):
        model(ids, labels=ids)["clm"].backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(usual.parameters(), base.parameters(), strict=True))


def test_first_weights_rates_and_factors_are_those_of_table_8():
    """With tied embeddings, relative to a base model four times as narrow, whose heads have half of the width."""
    wide, ratio = built(4 * BASE, WIDE_HEADS), 4
    base = built(BASE, WIDE_HEADS)
    optimizer = make_optimizer(wide, OptimizerConfig(lr=0.5, weight_decay=0.2))
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    narrow = dict(base.named_parameters())
    for name, parameter in wide.named_parameters():
        is_hidden_matrix = name.startswith("blocks.") and parameter.dim() == 2
        group = groups[id(parameter)]
        assert group["lr"] == 0.5 * group["lr_scale"] == pytest.approx(0.5 / ratio if is_hidden_matrix else 0.5)
        assert group["lr"] * group["weight_decay"] == pytest.approx(0.1 if parameter.dim() == 2 else 0.0)
        if parameter.dim() == 2:  # variance 1 / fan_in inside, of a fixed size where it is the embedding
            factor = 1 / math.sqrt(ratio) if is_hidden_matrix else 1.0
            assert parameter.std().item() == pytest.approx(factor * narrow[name].std().item(), rel=0.1)
    x = torch.randn(1, SEQ_LEN, 4 * BASE, generator=torch.Generator().manual_seed(0))
    attention = wide.blocks[0].attention
    q, k, v = attention.qkv(x).view(SEQ_LEN, 3, 2, 64).unbind(1)  # (seq, heads, head_dim)
    scores = torch.einsum("qhd,khd->hqk", q, k) * math.sqrt(16) / 64  # sqrt of the base's head_dim over head_dim
    shares = scores.masked_fill(torch.ones(SEQ_LEN, SEQ_LEN).triu(1).bool(), -math.inf).softmax(-1)
    expected = attention.output(torch.einsum("hqk,khd->qhd", shares, v).reshape(1, SEQ_LEN, 4 * BASE))
    assert torch.allclose(attention(x, None), expected, atol=1e-6)
    logits = wide.final_norm(x) @ wide.word_embeddings.weight.t() / ratio
    wide.blocks = torch.nn.ModuleList()
    wide.position_embeddings.weight.data.zero_()
    wide.word_embeddings.register_forward_hook(lambda module, given, output: x)
    assert torch.allclose(wide(torch.zeros(1, SEQ_LEN, dtype=torch.int64)), logits, atol=1e-6)


def test_export_is_a_usual_gpt2_with_the_same_logits(tmp_path):
    tokenizer = make_tokenizer(TokenizerConfig(vocab_size=300), ["the sun and the moon"] * 5, tmp_path)
    (tmp_path / "tokenizer").mkdir()
    save_tokenizer(tokenizer, tmp_path / "tokenizer", SEQ_LEN)
    config = PretrainConfig(run_dir=str(tmp_path), model=model_config(128, WIDE_HEADS), train={"seq_len": SEQ_LEN})
    torch.manual_seed(0)
    model = build_model(config.model, tokenizer.get_vocab_size(), SEQ_LEN)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms and biases too
    named = list(model.named_parameters())
    fragments = [Fragment(n, tuple(p.shape), 0, {"master": p.detach().flatten()}) for n, p in named]
    with open_saver(tmp_path, CheckpointConfig(), Alone()) as saver:
        saver.save(TrainState(1), fragments, {"dataset": "none"})
    (tmp_path / "metrics.jsonl").write_text("")
    export(config, checkpoint.newest_valid(tmp_path), tmp_path, tmp_path / "export")
    ids = torch.randint(0, 260, (2, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "export")(ids).logits, model(ids)
    assert (theirs - ours).abs().max() < 1e-5 * ours.abs().max()


def test_another_mup_in_the_middle_of_a_run_is_refused(tmp_path):
    data = SimpleNamespace(facts=lambda batch: {"seed": 1})

    def facts_of(mup: dict | None) -> dict:
        return facts(PretrainConfig(run_dir="r", model=model_config(64, mup)), data, 0)

    with open_saver(tmp_path, CheckpointConfig(), Alone()) as saver:
        saver.save(TrainState(1), [Fragment("w", (2,), 0, {"master": torch.zeros(2)})], facts_of(WIDE_HEADS))
    found = checkpoint.newest_valid(tmp_path)
    checkpoint.check_facts(found, facts_of(WIDE_HEADS))
    for other in (None, {"base_hidden_size": 64}):
        with pytest.raises(CheckpointError, match="the same weights would be another model"):
            checkpoint.check_facts(found, facts_of(other))


def test_ratios_are_relative_to_the_base_model_and_bert_and_other_optimizers_are_refused():
    shape = model_shape(model_config(128, WIDE_HEADS), VOCAB_SIZE, SEQ_LEN)
    assert (shape.width_ratio, shape.head_dim_ratio) == (4.0, 4.0)
    for model, optimizer in (("bert", "adamw"), ("gpt", "muon")):
        given = {"run_dir": "r", "model": {"architecture": model, "mup": {"base_hidden_size": 8}}}
        with pytest.raises(ValueError, match=f"found {model} with {optimizer}; leave model.mup out"):
            PretrainConfig.model_validate(given | {"train": {"optimizer": {"type": optimizer}}})
