"""ONNX exports against the training model, through onnxruntime."""

from __future__ import annotations

import json

import pytest
import torch

from configs.load import ConfigError
from pretrain import export
from pretrain.formats import hugging_face, onnx_model
from tests.pretrain.travelling import SEQ_LEN, ids, make_run

for package in onnx_model.NEEDED:
    pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.fixture(scope="module", params=["gpt", "bert", "llama"])
def exported(request, tmp_path_factory):
    """(export directory, trained model)"""
    folder = tmp_path_factory.mktemp(request.param) / "mine"
    architecture = "bert" if request.param == "bert" else "gpt"
    trained = make_run(folder, architecture, **({"style": "llama"} if request.param == "llama" else {}))
    assert export.run([str(folder), "format=onnx", "int8=true"]) == 0
    return folder / "export-onnx", trained


def test_onnxruntime_has_the_logits_at_any_batch_and_length(exported):
    directory, trained = exported
    for size in ((2, SEQ_LEN), (1, 1), (5, 3)):
        tokens = ids(trained.shape.vocab_size, *size)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if trained.architecture == "bert":
            inputs["token_type_ids"] = torch.zeros_like(tokens)
        found = list(onnx_model.run(directory / "model.onnx", inputs).values())
        for a, b in zip(hugging_face.our_logits(trained, tokens), found, strict=False):
            assert torch.allclose(a, b, atol=1e-5)


def test_padding_on_either_side_changes_nothing(exported):
    directory, trained = exported
    tokens, padding = ids(trained.shape.vocab_size, 1, 9), torch.zeros(1, 4, dtype=torch.int64)
    alone = hugging_face.our_logits(trained, tokens)[0]
    sides = [(torch.cat([tokens, padding], 1), slice(0, 9), torch.tensor([[1] * 9 + [0] * 4]))]
    if trained.architecture == "gpt":  # whose positions count from the first token
        sides.append((torch.cat([padding, tokens], 1), slice(4, 13), torch.tensor([[0] * 4 + [1] * 9])))
    for padded, kept, mask in sides:
        inputs = {"input_ids": padded, "attention_mask": mask}
        if trained.architecture == "bert":
            inputs["token_type_ids"] = torch.zeros_like(padded)
        found = next(iter(onnx_model.run(directory / "model.onnx", inputs).values()))
        assert torch.allclose(found[:, kept], alone, atol=1e-5)


def test_int8_is_smaller_and_what_it_changes_is_said(exported):
    directory, _ = exported
    sizes = [(directory / file).stat().st_size for file in (onnx_model.INT8_FILE, onnx_model.FILE)]
    parity = json.loads((directory / "parity.json").read_text())
    assert sizes[0] < 0.7 * sizes[1]
    assert parity["max_abs_logit_difference"] <= parity["tolerance"] < parity["int8"]["max_abs_logit_difference"]
    assert 0.8 < parity["int8"]["same_most_likely_token"] <= 1 and parity["read_back_by"] == "onnxruntime"


def test_no_paths_of_this_machine_are_in_the_graph(exported):
    assert b".py" not in (exported[0] / "model.onnx").read_bytes()
    assert (exported[0] / "tokenizer.json").is_file() and (exported[0] / "README.md").is_file()


def test_another_dtype_is_refused(exported, tmp_path):
    with pytest.raises(ConfigError, match="format=onnx is in fp32, found dtype=bf16"):
        export.run([str(exported[0].parent), "format=onnx", "dtype=bf16", f"output={tmp_path / 'x'}"])
