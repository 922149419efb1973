"""GGUF exports, read back by gguf's own reader and, where llama-cpp-python is installed, by llama.cpp."""

from __future__ import annotations

import json

import pytest
import torch

from configs.load import ConfigError
from data_pipeline.tokenizer import load_tokenizer
from pretrain import export
from pretrain.formats import gguf_file, hugging_face
from tests.pretrain.travelling import TEXTS, ids, make_run

pytest.importorskip("gguf", reason="gguf is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run directory, trained model)"""
    folder = tmp_path_factory.mktemp("gguf") / "mine"
    return folder, make_run(folder, "gpt")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_weights_come_back_rounded_to_the_dtype(run, dtype, tmp_path):
    folder, trained = run
    output = tmp_path / "export"
    assert export.run([str(folder), "format=gguf", f"dtype={dtype}", f"output={output}"]) == 0
    assert {file.name for file in output.iterdir()} == {"model.gguf", "README.md", "parity.json"}
    back = gguf_file.read(output / "model.gguf", trained.shape)
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for name, parameter in trained.named_parameters():
        assert torch.equal(back.weight(name), parameter.detach().to(torch_dtype).float()), name
    assert json.loads((output / "parity.json").read_text())["max_abs_logit_difference"] == 0


def test_file_says_what_llama_needs(run):
    import gguf

    folder, trained = run
    assert export.run([str(folder), "format=gguf"]) == 0
    reader = gguf.GGUFReader(folder / "export-gguf/model.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert said["general.architecture"] == "gpt2" and said["tokenizer.ggml.model"] == "gpt2"
    assert said["gpt2.block_count"] == 2 and said["gpt2.attention.head_count"] == 2
    assert said["gpt2.context_length"] == trained.shape.max_seq_len and said["gpt2.feed_forward_length"] == 128
    assert said["tokenizer.ggml.tokens"] == [tokenizer.id_to_token(i) for i in range(trained.shape.vocab_size)]
    assert said["tokenizer.ggml.eos_token_id"] == tokenizer.token_to_id("<|endoftext|>")


def test_llama_has_the_logits_and_the_tokens(run):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    folder, trained = run
    assert export.run([str(folder), "format=gguf"]) == 0
    parity = json.loads((folder / "export-gguf/parity.json").read_text())
    assert parity["read_back_by"] == "gguf and llama.cpp"
    tokens = ids(trained.shape.vocab_size, 2, 20)
    ours = hugging_face.our_logits(trained, tokens)[0]
    theirs = gguf_file.llama_logits(folder / "export-gguf/model.gguf", tokens)
    assert (ours - theirs).abs().max() < 5e-3 * ours.abs().max()
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.95
    model = llama_cpp.Llama(str(folder / "export-gguf/model.gguf"), vocab_only=True, verbose=False)
    text = TEXTS[0] + " It's 1234  x\n\n"
    expected = load_tokenizer(folder / "tokenizer").encode(text).ids
    assert model.tokenize(text.encode(), add_bos=False, special=False) == expected
    model.close()


def test_what_llama_cannot_compute_is_refused(tmp_path):
    make_run(tmp_path / "bert", "bert")
    make_run(tmp_path / "erf", "gpt", gelu="erf")
    with pytest.raises(ConfigError, match="format=gguf is for style gpt2 with gelu=tanh, found style bert"):
        export.run([str(tmp_path / "bert"), "format=gguf"])
    with pytest.raises(ConfigError, match="found style gpt2 with gelu"):
        export.run([str(tmp_path / "erf"), "format=gguf"])
