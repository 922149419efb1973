"""Directories of others: what is imported has their logits, a run begins with it, and nothing in them is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from configs.load import ConfigError, load_pretrain
from configs.model_sizes import model_shape
from pretrain import checkpoint, import_model, load
from pretrain.formats import hugging_face
from pretrain.formats.weights import FormatError, model_section
from tests.fuzz import broken_bytes, broken_values
from tests.launcher.small_run import make_config
from tests.pretrain.travelling import SEQ_LEN, bert, gpt2, ids, make_run, make_tokenizer_directory, shake
from tests.ranks import run_ranks


def write_and_load(model: torch.nn.Module, folder: Path, auto: type = AutoModelForPreTraining) -> torch.nn.Module:
    assert import_model.run([str(folder), str(folder.parent / "imported")]) == 0
    return auto.from_pretrained(folder.parent / "imported").eval()


@pytest.mark.parametrize("settings", [{}, {"activation_function": "gelu"}, {"n_inner": 40}])
def test_imported_gpt2_has_the_logits_of_the_source(tmp_path, settings):
    source = gpt2(tmp_path / "source", **settings)
    tokens = ids(source.config.vocab_size)
    imported = write_and_load(source, tmp_path / "source", AutoModelForCausalLM)
    assert torch.equal(imported(tokens).logits, source(tokens).logits)
    ours = hugging_face.read(tmp_path / "imported").model()
    assert torch.allclose(ours(tokens), source(tokens).logits, atol=1e-5)


STYLES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}),
    "modernbert": (ModernBertConfig, ModernBertForMaskedLM, {"local_attention": 8, "global_attn_every_n_layers": 3}),
}


@pytest.mark.parametrize("name", STYLES)
def test_imported_model_of_another_style_has_the_logits_of_the_source(tmp_path, name):
    make, auto, settings = STYLES[name]
    vocab_size = make_tokenizer_directory("bert" if name == "modernbert" else "gpt", tmp_path / "source")
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    special = {key: None for key in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")}
    settings = sizes | {"max_position_embeddings": SEQ_LEN, "vocab_size": vocab_size} | special | settings
    source = shake(auto(make(**settings)))
    source.save_pretrained(tmp_path / "source")
    imported = write_and_load(source, tmp_path / "source", auto)
    tokens = ids(vocab_size)
    assert torch.allclose(imported(tokens).logits, source(tokens).logits, atol=1e-5)
    config = load_pretrain(tmp_path / "imported/pretrain.yaml")
    shape = model_shape(config.model, vocab_size, 1)
    read = hugging_face.read(tmp_path / "imported").shape
    assert model_section(shape) == model_section(read) and shape.style == read.style


@pytest.mark.parametrize("settings", [{}, {"hidden_act": "gelu_new"}])
def test_imported_bert_has_the_logits_of_both_heads(tmp_path, settings):
    source = bert(tmp_path / "source", **settings)
    imported = write_and_load(source, tmp_path / "source")
    tokens = ids(source.config.vocab_size)
    for name in ("prediction_logits", "seq_relationship_logits"):
        assert torch.equal(imported(tokens)[name], source(tokens)[name])


def test_heads_that_a_directory_lacks_are_drawn_anew_and_said(tmp_path, capsys):
    source = bert(tmp_path / "masked", BertForMaskedLM)
    imported = write_and_load(source, tmp_path / "masked")
    tokens = ids(source.config.vocab_size)
    assert torch.equal(imported(tokens).prediction_logits, source(tokens).logits)
    assert "drawn anew" in (said := capsys.readouterr().out) and "nsp_output.weight" in said
    body = bert(tmp_path / "body", BertModel)
    imported = write_and_load(body, tmp_path / "body")
    assert torch.equal(imported.bert(tokens).last_hidden_state, body(tokens).last_hidden_state)


def test_weights_in_shards_in_pickles_and_under_names_of_2018_are_read(tmp_path):
    source = bert(tmp_path / "source")
    tensors = load_file(tmp_path / "source/model.safetensors")
    source.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    old = tmp_path / "old"
    shutil.copytree(tmp_path / "source", old, ignore=shutil.ignore_patterns("*.safetensors"))
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    torch.save(renamed, old / "pytorch_model.bin")
    whole = hugging_face.read(tmp_path / "source")
    for folder in (tmp_path / "sharded", old):
        read = hugging_face.read(folder)
        assert all(torch.equal(read.weight(name), whole.weight(name)) for name in whole.names())


def test_a_gpt2_without_the_prefix_of_its_names_is_read(tmp_path):
    source = gpt2(tmp_path)
    weights = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(weights | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, tmp_path / "model.safetensors")  # as OpenAI's has
    read = hugging_face.read(tmp_path)
    assert torch.equal(read.weight("word_embeddings.weight"), source.transformer.wte.weight) and not read.notes


class Dangerous:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def test_no_code_of_a_pickle_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bert(tmp_path / "source")
    (tmp_path / "source/model.safetensors").unlink()
    torch.save({"bert.pooler.dense.bias": Dangerous()}, tmp_path / "source/pytorch_model.bin")
    with pytest.raises(
        FormatError, match=r"bin: cannot be read without running code: it names \w+\.mkdir; save its tensors"
    ):
        hugging_face.read(tmp_path / "source")
    (tmp_path / "source/pytorch_model.bin").write_bytes(pickle.dumps(Dangerous(), 2))
    with pytest.raises(FormatError, match=r"pytorch_model\.bin"):
        hugging_face.read(tmp_path / "source")
    assert not (tmp_path / "ran").exists()


def test_no_module_of_a_model_directory_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gpt2(tmp_path / "source")
    file = tmp_path / "source/config.json"
    settings = json.loads(file.read_text()) | {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    file.write_text(json.dumps(settings))
    (tmp_path / "source/modeling.py").write_text("import os; os.mkdir('ran')")
    assert import_model.run([str(tmp_path / "source"), str(tmp_path / "imported")]) == 0
    assert not (tmp_path / "ran").exists() and not (tmp_path / "imported/modeling.py").exists()


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "part/model.safetensors", 3, ".."])
def test_an_index_cannot_name_files_elsewhere(tmp_path, name):
    source = gpt2(tmp_path / "source")
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "source/model.safetensors").unlink()
    index = {"weight_map": {key: name for key in source.state_dict()}}
    (tmp_path / "source/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"index.json: lists the file .* expected a plain name in its own directory"):
        hugging_face.read(tmp_path / "source")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06: expected 1e-05"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True: expected False"),
        ({"activation_function": "relu"}, "activation_function=relu: expected gelu_new or"),
    ],
)
def test_a_model_that_computes_something_else_is_refused(tmp_path, settings, said):
    gpt2(tmp_path, **settings)
    with pytest.raises(FormatError, match=said):
        hugging_face.read(tmp_path)


def test_damaged_and_incomplete_directories_are_named(tmp_path):
    bert(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, file)
    with pytest.raises(FormatError, match=r"lacks the tensor bert.encoder.layer.1.output.dense.weight and 0 more"):
        hugging_face.read(tmp_path)
    save_file(tensors | {"bert.encoder.layer.1.output.dense.weight": torch.zeros(3, 3)}, file)
    with pytest.raises(FormatError, match=r"has the shape \(3, 3\), the configuration beside it says \(32, 48\)"):
        hugging_face.read(tmp_path).model()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(FormatError, match=r"model.safetensors: is damaged"):
        hugging_face.read(tmp_path)
    file.unlink()
    with pytest.raises(FormatError, match="has no weights"):
        hugging_face.read(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(FormatError, match=r"config\.json: holds list, expected a JSON object"):
        hugging_face.read(tmp_path)


def test_whatever_a_config_or_an_index_says_nothing_but_a_format_error_is_raised(tmp_path):
    """Bytes and values of the JSON files replaced: the model reads, or a FormatError names the directory."""
    refused = 0
    for make in (gpt2, bert):
        folder = tmp_path / make.__name__
        make(folder).save_pretrained(folder, max_shard_size="40KB")
        (folder / "model.safetensors").unlink()
        for file in (folder / "config.json", folder / "model.safetensors.index.json"):
            sound = file.read_bytes()
            variants = [json.dumps(value).encode() for value in broken_values(json.loads(sound), 60)]
            for content in [*variants, *broken_bytes(sound, 60)]:
                file.write_bytes(content)
                try:
                    hugging_face.read(folder)
                except FormatError as error:
                    refused += str(folder) in str(error)
            file.write_bytes(sound)
    assert refused > 200


def test_an_output_layer_of_its_own_is_not_lost_silently(tmp_path):
    gpt2(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"lm_head\.weight is not transformer"):
        hugging_face.read(tmp_path)


def test_an_export_of_ours_comes_back_as_it_was(tmp_path):
    from pretrain import export

    for architecture in ("gpt", "bert"):
        trained = make_run(tmp_path / architecture, architecture)
        assert export.run([str(tmp_path / architecture)]) == 0
        back = hugging_face.read(tmp_path / architecture / "export")
        assert all(torch.equal(back.weight(name), p) for name, p in trained.named_parameters())


def test_the_written_configuration_builds_the_imported_model(tmp_path):
    gpt2(tmp_path / "source", activation_function="gelu")
    import_model.run([str(tmp_path / "source"), str(tmp_path / "imported")])
    config = load_pretrain(tmp_path / "imported/pretrain.yaml")
    source = hugging_face.read(tmp_path / "imported")
    assert model_section(model_shape(config.model, source.shape.vocab_size, 1)) == model_section(source.shape)
    assert config.model.init_from == config.data.build.tokenizer.path == str(tmp_path / "imported")


def test_a_directory_that_is_no_imported_model_is_not_replaced(tmp_path):
    gpt2(tmp_path / "source")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="mine: exists and is no imported model"):
        import_model.run([str(tmp_path / "source"), str(tmp_path / "mine")])


@pytest.mark.distributed
def test_a_run_on_two_ranks_begins_with_the_weights_of_the_imported_model(tmp_path):
    config = make_config(tmp_path)
    gpt2(tmp_path / "source", vocab_size=310, activation_function="gelu", n_positions=40)
    shutil.copy(tmp_path / "data/train/tokenizer.json", tmp_path / "source")  # 10 rows have no token
    import_model.run([str(tmp_path / "source"), str(tmp_path / "imported")])
    section = yaml.safe_load((tmp_path / "imported/pretrain.yaml").read_text())["model"]
    words = [f"model.{key}={value}" for key, value in section.items()]
    words += ["train.num_steps=1", "train.precision=fp32", "train.optimizer={lr: 1.0e-30, ema_decay: 0.9}"]
    words += [f"run_dir={tmp_path / 'run'}", "zero.stage=3"]
    run_ranks(2, ["-m", "pretrain.train", "--config", str(config), *words], tmp_path / "logs")
    begun = checkpoint.newest_valid(tmp_path / "run")
    read = hugging_face.read(tmp_path / "imported")
    for key in ("master", "ema"):
        weight = checkpoint.weights(begun, key)
        for name in begun.shapes:  # a rate of 1e-30 changes nothing
            assert torch.equal(weight(name), read.weight(name)[: begun.shapes[name][0]])
    assert begun.shapes["word_embeddings.weight"][0] < read.shape.vocab_size == 310


def test_a_run_of_another_model_or_other_tokens_does_not_begin(tmp_path):
    gpt2(tmp_path / "source")
    shape = hugging_face.read(tmp_path / "source").shape
    with pytest.raises(ConfigError, match=r"another model than model.num_layers=3 \(there: 2\); set model.arch.*=gpt "):
        load.check_shape(tmp_path / "source", replace(shape, num_layers=3), shape)
    with pytest.raises(ConfigError, match=r"another model than model.gelu=erf \(there: tanh\)"):
        exact = replace(shape, style=replace(shape.style, activation="gelu"))
        load.check_shape(tmp_path / "source", exact, shape)
    with pytest.raises(ConfigError, match=r"has 300 tokens, the dataset 301; build the dataset with"):
        load.check_shape(tmp_path / "source", replace(shape, vocab_size=301), shape)
    make_tokenizer_directory("bert", tmp_path / "other")
    with pytest.raises(ConfigError, match=r"300 tokens are others in the dataset's tokenizer .*other"):
        load.check_tokens(tmp_path / "source", SimpleNamespace(tokenizer_dir=tmp_path / "other"))
    load.check_tokens(tmp_path / "source", SimpleNamespace(tokenizer_dir=tmp_path / "source"))
