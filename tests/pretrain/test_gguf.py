"""GGUF exports, read back by gguf's own reader and, where llama-cpp-python is installed, by llama.cpp."""

from __future__ import annotations

import json

import pytest
import torch

from configs.load import ConfigError
from data_pipeline.shards import DataError
from data_pipeline.tokenizer import load_tokenizer
from pretrain import export, import_model
from pretrain.formats import gguf_file, hugging_face
from pretrain.formats.weights import FormatError, model_section
from tests.fuzz import broken_bytes
from tests.pretrain.travelling import TEXTS, ids, make_run

pytest.importorskip("gguf", reason="gguf is not installed")


STYLES = {"gpt2": {}, "llama": {"style": "llama", "num_kv_heads": 1}, "qwen3": {"style": "qwen3", "num_kv_heads": 1}}


@pytest.fixture(scope="module", params=STYLES)
def run(request, tmp_path_factory):
    """(run directory, trained model)"""
    folder = tmp_path_factory.mktemp(request.param) / "mine"
    return folder, make_run(folder, "gpt", **STYLES[request.param])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_weights_come_back_rounded_to_the_dtype(run, dtype, tmp_path):
    folder, trained = run
    output = tmp_path / "export"
    assert export.run([str(folder), "format=gguf", f"dtype={dtype}", f"output={output}"]) == 0
    assert {file.name for file in output.iterdir()} == {"model.gguf", "README.md", "parity.json"}
    back = gguf_file.read(output / "model.gguf")
    torch_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
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
    kind = trained.shape.style.model_type
    assert said["general.architecture"] == kind and said["tokenizer.ggml.model"] == "gpt2"
    assert said[f"{kind}.block_count"] == 2 and said[f"{kind}.attention.head_count"] == 2
    assert said[f"{kind}.context_length"] == trained.shape.max_seq_len
    assert said[f"{kind}.feed_forward_length"] == trained.shape.mlp_size
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
    with pytest.raises(
        ConfigError, match="format=gguf is for styles gpt2, llama, qwen3, gpt2 with gelu=tanh, found bert"
    ):
        export.run([str(tmp_path / "bert"), "format=gguf"])
    with pytest.raises(ConfigError, match="found gpt2 with gelu;"):
        export.run([str(tmp_path / "erf"), "format=gguf"])
    assert not list((tmp_path / "bert").rglob("*export*"))


def test_a_gguf_file_is_imported_with_its_tokenizer(run, tmp_path):
    folder, trained = run
    assert export.run([str(folder), "format=gguf", f"output={tmp_path / 'gguf'}"]) == 0
    assert import_model.run([str(tmp_path / "gguf/model.gguf"), str(tmp_path / "imported")]) == 0
    back = hugging_face.read(tmp_path / "imported")
    assert all(torch.equal(back.weight(name), parameter) for name, parameter in trained.named_parameters())
    assert model_section(back.shape) == model_section(trained.shape) and back.shape.style == trained.shape.style
    text = TEXTS[0] + " It's 1234  x"
    ours, theirs = (load_tokenizer(place).encode(text).ids for place in (folder / "tokenizer", tmp_path / "imported"))
    assert ours == theirs
    tokens = ids(trained.shape.vocab_size)
    logits = hugging_face.logits(tmp_path / "imported", tokens)[0]
    assert torch.allclose(logits, hugging_face.our_logits(trained, tokens)[0], atol=1e-4)


@pytest.mark.parametrize("run", ["gpt2"], indirect=True)
def test_damaged_files_are_named(run, tmp_path):
    folder, _ = run
    assert export.run([str(folder), "format=gguf", f"output={tmp_path / 'gguf'}"]) == 0
    content, file = (tmp_path / "gguf/model.gguf").read_bytes(), tmp_path / "damaged.gguf"
    refused = 0
    for head in broken_bytes(content[:4000], 60):  # numbers of tensors have no checksums
        file.write_bytes(head + content[4000:])
        try:
            gguf_file.read(file).model()
            gguf_file.read_tokenizer(file)
        except (FormatError, DataError) as error:
            refused += "damaged.gguf" in str(error) or "tokenizer" in str(error)
    assert refused > 30
