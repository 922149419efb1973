"""nanoGPT's ckpt.pt against its model, written out here, and checkpoints that are refused."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pretrain import import_model
from pretrain.formats import hugging_face, nanogpt
from pretrain.formats.weights import FormatError
from tests.pretrain.travelling import ids, make_tokenizer_directory

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 24, "bias": True, "vocab_size": 320, "dropout": 0.0}


def make_state(bias: bool) -> dict[str, torch.Tensor]:
    """A state dict with nanoGPT's names: linear layers as torch has them, the output layer is the embedding."""
    generator = torch.Generator().manual_seed(0)
    width = SIZES["n_embd"]

    def draw(*size: int) -> torch.Tensor:
        return 0.2 * torch.randn(size, generator=generator)

    state = {"transformer.wte.weight": draw(SIZES["vocab_size"], width), "transformer.wpe.weight": draw(24, width)}
    norms, linears = ["transformer.ln_f"], {}
    for block in (f"transformer.h.{number}" for number in range(SIZES["n_layer"])):
        norms += [f"{block}.ln_1", f"{block}.ln_2"]
        linears |= {f"{block}.attn.c_attn": (3 * width, width), f"{block}.attn.c_proj": (width, width)}
        linears |= {f"{block}.mlp.c_fc": (4 * width, width), f"{block}.mlp.c_proj": (width, 4 * width)}
    state |= {f"{norm}.weight": 1 + draw(width) for norm in norms} | {
        f"{name}.weight": draw(*size) for name, size in linears.items()
    }
    if bias:
        state |= {f"{norm}.bias": draw(width) for norm in norms}
        state |= {f"{name}.bias": draw(size[0]) for name, size in linears.items()}
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def logits(state: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """What nanoGPT computes: pre-norm blocks, causal attention, exact GELU."""
    batch, seq = tokens.shape

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state.get(f"{name}.bias"), 1e-5)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    x = state["transformer.wte.weight"][tokens] + state["transformer.wpe.weight"][:seq]
    for block in (f"transformer.h.{number}" for number in range(SIZES["n_layer"])):
        q, k, v = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(SIZES["n_embd"], 2)
        q, k, v = (part.view(batch, seq, SIZES["n_head"], -1).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(seq, seq, dtype=torch.bool).triu(1), -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, seq, -1)
        x = x + linear(mixed, f"{block}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ state["lm_head.weight"].t()


def save(folder: Path, state: dict[str, torch.Tensor], **more: object) -> Path:
    folder.mkdir(exist_ok=True)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    content = {"model": state, "model_args": SIZES, "optimizer": optimizer.state_dict(), "iter_num": 7}
    torch.save(
        content | {"best_val_loss": torch.tensor(3.1), "config": {"dataset": "novels"}} | more, folder / "ckpt.pt"
    )
    return folder / "ckpt.pt"


@pytest.mark.parametrize("bias", [True, False])
def test_imported_model_has_the_logits_of_nanogpt(tmp_path, bias):
    state = make_state(bias)
    save(tmp_path / "out", {f"_orig_mod.{name}": tensor for name, tensor in state.items()})
    make_tokenizer_directory("gpt", tmp_path / "tokenizer")
    words = [str(tmp_path / "out"), str(tmp_path / "imported"), f"tokenizer={tmp_path / 'tokenizer'}"]
    assert import_model.run(words) == 0
    tokens = ids(SIZES["vocab_size"])
    found = hugging_face.logits(tmp_path / "imported", tokens)[0]
    expected = logits(state, tokens)
    assert torch.allclose(found, expected, atol=1e-4) and expected.abs().max() > 1
    tanh = hugging_face.our_logits(nanogpt.read(tmp_path / "out/ckpt.pt", "tanh").model(), tokens)[0]
    assert 1e-4 < (tanh - expected).abs().max() < 0.1  # the other formula is another model


def test_model_without_a_tokenizer_is_imported_and_that_is_said(tmp_path, capsys):
    file = save(tmp_path, make_state(True))
    assert import_model.run([str(file), str(tmp_path / "imported")]) == 0
    assert "give tokenizer=DIR" in capsys.readouterr().err
    assert not (tmp_path / "imported/tokenizer.json").exists()


class Dangerous:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def test_checkpoints_that_name_code_or_are_of_another_kind_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match=r"ckpt.pt: cannot be read without running code: it names \w+\.mkdir"):
        nanogpt.read(save(tmp_path, make_state(True), config=Dangerous()))
    assert not (tmp_path / "ran").exists()
    torch.save({"step": 3, "state": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(FormatError, match=r"ckpt.pt: holds state, step; expected nanoGPT's ckpt.pt"):
        nanogpt.read(tmp_path / "ckpt.pt")
    state = make_state(True)
    del state["transformer.h.1.mlp.c_fc.weight"]
    with pytest.raises(FormatError, match=r"lacks the tensor transformer.h.1.mlp.c_fc.weight and 0 more"):
        nanogpt.read(save(tmp_path, state))
    with pytest.raises(FormatError, match="5 heads, 5 of keys and values, do not divide width 32"):
        nanogpt.read(save(tmp_path, make_state(True), model_args=SIZES | {"n_head": 5}))
    file = save(tmp_path, make_state(True))
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(FormatError, match=r"ckpt.pt: is damaged or no file of torch.save"):
        nanogpt.read(file)


def test_checkpoints_of_deepspeed_are_refused_with_the_way_around(tmp_path):
    folder = tmp_path / "checkpoints/global_step10"
    folder.mkdir(parents=True)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({}, folder / name)
    for place in (tmp_path / "checkpoints", folder, folder / "mp_rank_00_model_states.pt"):
        with pytest.raises(FormatError, match=r"is a DeepSpeed checkpoint, .* zero_to_fp32.py . DIR --safe_serial"):
            import_model.run([str(place), str(tmp_path / "imported")])
