"""What `millstream export` writes: dtypes, shards, heads, refusals, the model card."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForPreTraining

from configs.load import ConfigError
from pretrain import checkpoint, export
from pretrain.formats import google_bert, hugging_face
from tests.pretrain.travelling import ids, make_run


@pytest.fixture(scope="module", params=["gpt", "bert"])
def run(request, tmp_path_factory):
    """(run directory, trained model)"""
    folder = tmp_path_factory.mktemp(request.param) / "mine"
    return folder, make_run(folder, request.param)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_are_rounded_to_the_dtype_and_nothing_else_changes(run, dtype, tmp_path):
    folder, trained = run
    assert export.run([str(folder), f"dtype={dtype}", f"output={tmp_path / 'export'}"]) == 0
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {tensor.dtype for tensor in load_file(tmp_path / "export/model.safetensors").values()} == {torch_dtype}
    read = hugging_face.read(tmp_path / "export")
    assert all(torch.equal(read.weight(n), p.to(torch_dtype).float()) for n, p in trained.named_parameters())
    assert AutoModel.from_pretrained(tmp_path / "export").dtype == torch_dtype  # as config.json says
    parity = json.loads((tmp_path / "export/parity.json").read_text())
    assert parity["max_abs_logit_difference"] <= parity["tolerance"] < parity["max_abs_logit_change_by_rounding"]


def test_shards_stay_below_the_size_and_hold_everything_once(run, tmp_path):
    folder, trained = run
    assert export.run([str(folder), "shard_size=40KB", f"output={tmp_path / 'export'}"]) == 0
    shards = sorted((tmp_path / "export").glob("model-*.safetensors"))
    assert len(shards) > 2 and shards[-1].name == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    sizes = [sum(t.numel() * 4 for t in load_file(shard).values()) for shard in shards]
    assert max(sizes) <= 40_000 and sum(sizes) >= sum(p.numel() * 4 for p in trained.parameters())
    read = hugging_face.read(tmp_path / "export")
    assert all(torch.equal(read.weight(n), p) for n, p in trained.named_parameters())


def test_all_heads_are_in_the_export(run, tmp_path):
    folder, trained = run
    assert export.run([str(folder), f"output={tmp_path / 'export'}"]) == 0
    auto = AutoModelForCausalLM if trained.architecture == "gpt" else AutoModelForPreTraining
    _, info = auto.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = ids(trained.shape.vocab_size)
    found = hugging_face.our_logits(trained, tokens)
    theirs = hugging_face.logits(tmp_path / "export", tokens)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, theirs, strict=True))


def test_weight_too_large_for_fp16_is_named(tmp_path):
    folder = tmp_path / "mine"
    make_run(folder, "gpt")
    found = checkpoint.newest_valid(folder)
    weight = checkpoint.weights(found)
    large = export.Weights(None, lambda name: weight(name) * 1e6)
    with pytest.raises(ConfigError, match=r"final_norm.weight: has .* more than torch.float16 can hold; choose dtype"):
        large.rounded(torch.float16).weight("final_norm.weight")
    assert torch.isfinite(large.rounded(torch.bfloat16).weight("final_norm.weight")).all()


def test_export_that_does_not_compute_the_same_is_not_left_and_the_old_one_stays(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    make_run(folder, "gpt")
    assert export.run([str(folder)]) == 0
    before = (folder / "export/model.safetensors").read_bytes()
    right = hugging_face.hf_config
    monkeypatch.setattr(hugging_face, "hf_config", lambda *a: right(*a) | {"activation_function": "relu"})
    with pytest.raises(ConfigError, match=r"export: not written: .* logits differ by .* \(allowed "):
        export.run([str(folder)])
    assert (folder / "export/model.safetensors").read_bytes() == before
    assert [file.name for file in folder.glob(".writing*")] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dtype=int4"], "dtype=int4: expected fp32 or bf16 or fp16"),
        (["format=pickle"], "format=pickle: expected hf or tensorflow"),
        (["shard_size=5"], "shard_size=5: expected a number with KB, MB or GB"),
        (["color=red"], "unknown option"),
    ],
)
def test_wrong_options_are_named(run, words, said):
    with pytest.raises(ConfigError, match=said):
        export.run([str(run[0]), *words])


def test_tensorflow_is_for_bert(run, tmp_path):
    folder, trained = run
    if trained.architecture == "gpt":
        with pytest.raises(ConfigError, match="format=tensorflow is Google's BERT in fp32, found style gpt2"):
            export.run([str(folder), "format=tensorflow", f"output={tmp_path / 'export'}"])


def test_card_says_what_is_known_and_what_is_not(tmp_path):
    folder = tmp_path / "mine"
    make_run(folder, "gpt")
    line = {
        "step": 1,
        "loss": 5.0,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens": 24,
        "tokens_per_second": 10.0,
        "step_seconds": 90.0,
    }
    evaluated = {"step": 1, "eval_loss": 4.25, "eval_perplexity": 70.1}
    (folder / "metrics.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(evaluated)}\n")
    (folder / "launch.json").write_text(json.dumps({"kind": "local", "command": [], "num_ranks": 4}))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["build"] |= {"sources": ["/secret/novels.jsonl"], "licences": {"/secret/novels.jsonl": "CC0"}}
    config["data"]["dir"] = str(tmp_path / "data")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "data/train").mkdir(parents=True)
    (tmp_path / "data/train/manifest.json").write_text(json.dumps({"fingerprint": "none"}))  # as the checkpoint says
    (tmp_path / "data/train/card.html").write_text("the data")
    assert export.run([str(folder)]) == 0
    card = (folder / "export/README.md").read_text()
    for said in (
        "license: other", "| steps | 1 of 1 |", "| held-out loss | 4.2500 |", "90 s, on 4 ranks",
        "energy | not measured", "`novels.jsonl`: CC0", "(training_curve.svg)", "[Its card](data_card.html)",
    ):  # fmt: skip
        assert said in card, said
    assert (folder / "export/data_card.html").read_text() == "the data"
    assert "/secret" not in card and (folder / "export/training_curve.svg").read_bytes().startswith(b"<?xml")


def test_a_model_directory_is_written_in_another_form(tmp_path):
    trained = make_run(tmp_path / "mine", "bert")
    assert export.run([str(tmp_path / "mine")]) == 0
    model = tmp_path / "mine/export"
    with pytest.raises(ConfigError, match="is no run but a model; give output=DIR"):
        export.run([str(model), "format=tensorflow"])
    assert export.run([str(model), "format=tensorflow", f"output={tmp_path / 'google'}"]) == 0
    back = google_bert.read(tmp_path / "google/bert_model.ckpt")
    assert all(torch.equal(back.weight(name), p) for name, p in trained.named_parameters())
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="other: exists and is no export"):
        export.run([str(model), f"output={tmp_path / 'other'}"])
