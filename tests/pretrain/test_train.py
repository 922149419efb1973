"""Real 2-process ZeRO-3 runs: exact resume, equal loss on any number of ranks, signals, export of what was trained."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.shards import read_manifest, write_manifest
from pretrain import checkpoint
from tests.ranks import ROOT, finish, kill_when, run_ranks, start_ranks

pytestmark = pytest.mark.distributed

ORIGIN = ["vocab_size", "tokenizer_fingerprint", "built_from"]
WORDS = ["the", "a", "sun", "moon", "river", "stone", "bird", "king", "runs", "sings", "under", "near", "slowly"]

CONFIG = """
run_dir: {run_dir}
model: {{architecture: {architecture}, preset: nano, num_layers: 2, hidden_size: 32, num_heads: 2, dropout: 0.1}}
data:
  dir: {data_dir}
  build:
    sources: [{text}]
    validation_fraction: 0.1
    tokenizer: {{type: {tokenizer}, vocab_size: 200}}
    num_workers: 1
train:
  num_steps: 8
  seq_len: 32
  global_batch_size: 8
  micro_batch_size: 2
  precision: bf16
  optimizer: {{lr: 1.0e-2}}
  schedule: {{warmup_steps: 2}}
eval: {{every_steps: 4, num_samples: 16}}
checkpoint: {{every_steps: 3}}
zero: {{persistence_threshold: 100}}
log: {{tensorboard: false}}
"""


@pytest.fixture(scope="module", params=["gpt", "bert"])
def config(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(300):
        sentences = [" ".join(rng.choice(WORDS, 7)) + "." for _ in range(rng.integers(2, 9))]
        lines.append(json.dumps({"text": " ".join(sentences)}))
    (folder / "text.jsonl").write_text("\n".join(lines))
    tokenizer = {"gpt": "byte_bpe", "bert": "wordpiece"}[request.param]
    file = folder / "config.yaml"
    file.write_text(
        CONFIG.format(
            run_dir=folder / "unused",
            architecture=request.param,
            data_dir=folder / "data",
            text=folder / "text.jsonl",
            tokenizer=tokenizer,
        )
    )
    run_ranks(1, ["-m", "data_pipeline.build", str(file)], folder / "logs")
    return file


@pytest.fixture(scope="module")
def undisturbed(config) -> Path:
    return pretrain(config, "undisturbed", 2)


def pretrain(config: Path, name: str, num_ranks: int, *overrides: str) -> Path:
    run_dir = config.parent / name
    run_ranks(num_ranks, words(config, run_dir, *overrides), config.parent / f"{name}-logs")
    return run_dir


def words(config: Path, run_dir: Path, *overrides: str) -> list[str]:
    return ["-m", "pretrain.train", "--config", str(config), f"run_dir={run_dir}", *overrides]


def lines(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what is measured with a clock."""
    clock = ("tokens_per_second", "step_seconds", "save_wait_seconds")
    parsed = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clock} for line in parsed]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in lines(run_dir) if "loss" in line]


def has_reached(run_dir: Path, step: int):
    file = run_dir / "metrics.jsonl"
    return lambda: file.exists() and f'"step": {step},' in file.read_text()


def test_killed_run_resumes_with_bitwise_the_same_metrics(config, undisturbed):
    run_dir = config.parent / "killed"
    processes = start_ranks(2, words(config, run_dir), config.parent / "killed-logs")
    kill_when(processes, has_reached(run_dir, 5), signal.SIGKILL)
    assert not (run_dir / "checkpoints" / "step-00000008").exists()
    pretrain(config, "killed", 2)
    assert lines(run_dir) == lines(undisturbed)
    weights = [(r / "checkpoints/step-00000008/rank-00001.safetensors").read_bytes() for r in (run_dir, undisturbed)]
    assert weights[0] == weights[1]


def test_mixture_with_phases_goes_on_the_same_after_a_kill_with_another_number_of_workers(config):
    source = config.parent / "data"
    varied = (
        f"data.mixture={{a: {{dir: {source}, weight: 2}}, b: {{dir: {source}, epochs: null, weight: 1}}}}",
        "data.mixture_schedule=[{from_step: 2, weights: {a: 1, b: 3}, ramp_steps: 2}]",
        "train.phases=[{from_step: 4, seq_len: 64}]",
    )
    whole = pretrain(config, "mixture-whole", 2, *varied)
    tokens = [line["tokens"] for line in lines(whole) if "tokens" in line]
    assert tokens == [8 * 32 * step for step in (1, 2, 3, 4)] + [8 * (32 * 4 + 64 * step) for step in (1, 2, 3, 4)]
    run_dir = config.parent / "mixture-killed"
    processes = start_ranks(2, words(config, run_dir, *varied, "data.num_workers=2"), config.parent / "mixture-logs")
    kill_when(processes, has_reached(run_dir, 5), signal.SIGKILL)
    pretrain(config, "mixture-killed", 2, *varied)
    assert lines(run_dir) == lines(whole)


def test_sigterm_saves_the_step_and_the_run_goes_on_from_it(config, undisturbed):
    run_dir = config.parent / "stopped"
    processes = start_ranks(2, words(config, run_dir), config.parent / "stopped-logs")
    codes = kill_when(processes, has_reached(run_dir, 1), signal.SIGTERM)
    assert codes == [128 + signal.SIGTERM] * 2
    saved = [p.name for p in (run_dir / "checkpoints").iterdir()]
    assert len(saved) == 1 and saved[0] < "step-00000008"
    assert "the same command goes on from it" in (config.parent / "stopped-logs/rank-0.log").read_text()
    pretrain(config, "stopped", 2)
    train_lines = [[line for line in lines(r) if "loss" in line] for r in (run_dir, undisturbed)]
    assert train_lines[0] == train_lines[1]


def test_loss_starts_near_ln_v_and_falls(config, undisturbed):
    run = lines(undisturbed)
    vocab_size = json.loads((config.parent / "data/train/manifest.json").read_text())["vocab_size"]
    names = {"eval_loss_nsp": 0.0} | run[0]
    assert names["eval_loss"] - names["eval_loss_nsp"] == pytest.approx(math.log(vocab_size), rel=0.02)
    assert run[-1]["eval_loss"] < run[0]["eval_loss"] - 0.5


@pytest.mark.parametrize(("num_ranks", "micro"), [(1, 8), (1, 2), (2, 4)])
def test_loss_does_not_depend_on_ranks_and_accumulation(config, num_ranks, micro):
    exact = ("train.precision=fp32", "model.dropout=0", "train.num_steps=6")
    reference = config.parent / "reference-fp32"
    if not reference.exists():
        pretrain(config, reference.name, 2, "train.micro_batch_size=1", *exact)
    run_dir = pretrain(config, f"fp32-{num_ranks}-{micro}", num_ranks, f"train.micro_batch_size={micro}", *exact)
    np.testing.assert_allclose(losses(run_dir), losses(reference), rtol=2e-5)
    norms = [[line["grad_norm"] for line in lines(r) if "loss" in line] for r in (run_dir, reference)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=2e-4)


def test_batches_of_tokens_alone_train_bitwise_as_batches_with_all_arrays(config):
    if "bert" in config.parent.name:
        pytest.skip("BERT's batches have all arrays")
    shutil.copytree(config.parent / "data", config.parent / "unknown-ends")
    for split in ("train", "validation"):
        directory = config.parent / "unknown-ends" / split
        known = read_manifest(directory)
        assert known["document_end_id"] is not None
        write_manifest(directory, known["shards"], *(known[name] for name in ORIGIN))
        unknown = read_manifest(directory)
        assert unknown["document_end_id"] is None and unknown["fingerprint"] == known["fingerprint"]
    fillers = "eval.num_samples=13"  # the last batch is filled up
    tokens = pretrain(config, "tokens-alone", 2, fillers)
    whole = pretrain(config, "all-arrays", 2, fillers, f"data.dir={config.parent / 'unknown-ends'}")
    assert lines(tokens) == lines(whole)


def test_bert_without_padding_has_on_one_rank_the_losses_of_padded_batches_on_two(config):
    if "gpt" in config.parent.name:
        pytest.skip("GPT's rows have no padding")
    exact = ("train.precision=fp32", "model.dropout=0", "train.num_steps=4", "data.masking.short_probability=0.5")
    runs = [pretrain(config, "padded", 2, *exact), pretrain(config, "unpadded", 1, "data.unpad=true", *exact)]
    for name in ("loss", "loss_mlm", "loss_nsp", "eval_loss", "tokens"):
        values = [[line[name] for line in lines(run) if name in line] for run in runs]
        np.testing.assert_allclose(values[1], values[0], rtol=2e-5)


def test_checkpoint_of_two_ranks_goes_on_with_one(config, undisturbed):
    run_dir = config.parent / "elastic"
    (run_dir / "checkpoints").mkdir(parents=True)
    os.symlink(undisturbed / "checkpoints/step-00000003", run_dir / "checkpoints/step-00000003")
    pretrain(config, "elastic", 1, "model.dropout=0", "train.precision=fp32")
    assert [line["step"] for line in lines(run_dir) if "loss" in line] == [4, 5, 6, 7, 8]
    np.testing.assert_allclose(losses(run_dir), losses(undisturbed)[3:], rtol=0.05)  # bf16 against fp32


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(config, undisturbed):
    run_dir = config.parent / "damaged"
    for step in ("step-00000003", "step-00000006"):
        target = run_dir / "checkpoints" / step
        target.mkdir(parents=True)
        for file in (undisturbed / "checkpoints" / step).iterdir():
            (target / file.name).write_bytes(file.read_bytes())
    file = run_dir / "checkpoints/step-00000006/rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    pretrain(config, "damaged", 2)
    log = (config.parent / "damaged-logs/rank-0.log").read_text()
    assert "step-00000006/rank-00001.safetensors: is damaged" in log
    assert "going on from" in log and "step-00000003" in log
    assert losses(run_dir) == losses(undisturbed)[3:]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disk_during_a_checkpoint_is_named_and_the_run_goes_on_from_the_earlier_one(config, undisturbed):
    if "bert" in config.parent.name:
        pytest.skip("the same code for both; shown on gpt")
    run_dir = config.parent / "full"
    run_dir.mkdir()
    size = sum(f.stat().st_size for f in (undisturbed / "checkpoints/step-00000003").iterdir())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size) + 60_000}", "tmpfs", str(run_dir)]
    mounted = subprocess.run(mount, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    try:
        codes = finish(start_ranks(2, words(config, run_dir), config.parent / "full-logs"))
        assert codes == [2, 2]
        log = (config.parent / "full-logs/rank-0.log").read_text()
        assert "could not write its part of the checkpoint" in log and "No space left on device" in log
        assert "Traceback" not in log
        assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step-00000003"]
        subprocess.run(["mount", "-o", "remount,size=100m", str(run_dir)], check=True)
        pretrain(config, "full", 2)
        assert lines(run_dir) == lines(undisturbed)
    finally:
        subprocess.run(["umount", str(run_dir)], check=True)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["run_dir={file}/below"], "cannot be written"),
        (
            ["train.global_batch_size=6", "train.micro_batch_size=2"],
            "does not divide into micro batches of 2 on 2 ranks",
        ),
        (["train.global_batch_size=80000"], "fewer than one global batch of 80000"),
        (["model.preset=huge"], "model.preset=huge: architecture"),
        (["train.seq_len=600"], "lower train.seq_len or set model.max_seq_len=600"),
        (["data.dir={file}-none"], "no such dataset directory; make it with `millstream data build CONFIG`"),
        (["deepspeed={{zero_optimization: {{stage: 2}}}}"], "`deepspeed.zero_optimization.stage` is 2"),
    ],
)
def test_mistake_ends_every_rank_with_its_message_and_no_traceback(config, tmp_path, overrides, expected):
    (tmp_path / "file").touch()
    given = [f"run_dir={tmp_path}/run", *(override.format(file=tmp_path / "file") for override in overrides)]
    command = ["-m", "pretrain.train", "--config", str(config), *given]
    codes = finish(start_ranks(2, command, tmp_path / "logs"))
    outputs = [(tmp_path / f"logs/rank-{rank}.log").read_text() for rank in (0, 1)]
    assert codes == [2, 2], outputs
    assert all(expected in output and "Traceback" not in output for output in outputs), outputs


def test_changed_order_of_samples_in_the_middle_of_a_run_is_refused(config, undisturbed):
    run_dir = config.parent / "changed"
    (run_dir / "checkpoints").mkdir(parents=True)
    os.symlink(undisturbed / "checkpoints/step-00000003", run_dir / "checkpoints/step-00000003")
    codes = finish(start_ranks(2, words(config, run_dir, "train.seed=5"), config.parent / "changed-logs"))
    assert codes == [2, 2]
    assert "was written with seed=1234, now it is 5" in (config.parent / "changed-logs/rank-0.log").read_text()
    assert (undisturbed / "checkpoints/step-00000003/manifest.json").exists()


def test_smaller_model_in_the_middle_of_a_run_is_refused(config, undisturbed):
    run_dir = config.parent / "smaller"
    (run_dir / "checkpoints").mkdir(parents=True)
    os.symlink(undisturbed / "checkpoints/step-00000003", run_dir / "checkpoints/step-00000003")
    codes = finish(start_ranks(2, words(config, run_dir, "model.hidden_size=16"), config.parent / "smaller-logs"))
    assert codes == [2, 2]
    log = (config.parent / "smaller-logs/rank-0.log").read_text()
    assert "the model section is not the one it was written with" in log and "Traceback" not in log


def test_deepspeeds_own_launcher_gives_the_same_run(config, undisturbed):
    run_dir = config.parent / "launched"
    launcher = str(Path(sys.executable).parent / "deepspeed")
    command = [launcher, "--num_accelerators", "2", "pretrain/train.py", "--config", str(config), f"run_dir={run_dir}"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert lines(run_dir) == lines(undisturbed)


def test_export_loads_in_transformers_with_the_trained_logits(config, undisturbed):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    run_ranks(1, ["-m", "pretrain.export", str(undisturbed)], config.parent / "export-logs")
    export = undisturbed / "export"
    parity = json.loads((export / "parity.json").read_text())
    assert parity["max_abs_logit_difference"] <= parity["tolerance"]
    assert len(AutoTokenizer.from_pretrained(export)) == json.loads((export / "config.json").read_text())["vocab_size"]
    if "gpt" in config.parent.name:
        _, info = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
        new_head = set()
    else:
        _, info = AutoModelForSequenceClassification.from_pretrained(export / "encoder", output_loading_info=True)
        new_head = {"classifier.weight", "classifier.bias"}
    card = (export / "README.md").read_text()
    assert "| steps | 8 of 8 |" in card and "perplexity" in card
    assert set(info["missing_keys"]) == new_head
    assert not info["unexpected_keys"]


def test_run_with_another_optimizer_and_an_average_goes_on_bitwise_and_exports_the_average(config):
    settings = ["train.optimizer={type: muon, lr: 1.0e-2, ema_decay: 0.5}", "train.num_steps=6"]
    whole = pretrain(config, "averaged", 2, *settings)
    resumed = config.parent / "averaged-resumed"
    shutil.copytree(whole / "checkpoints/step-00000003", resumed / "checkpoints/step-00000003")
    pretrain(config, resumed.name, 2, *settings)
    assert losses(resumed) == losses(whole)[3:]
    evaluated = [[line for line in lines(run) if "eval_loss" in line] for run in (whole, resumed)]
    assert evaluated[1] == evaluated[0][1:]  # the one before the first step has no average yet
    assert ["eval_ema_loss" in line for line in evaluated[0]] == [False, True, True]
    assert all(line["eval_ema_loss"] != line["eval_loss"] for line in evaluated[1])
    last = checkpoint.open_checkpoint(resumed / "checkpoints/step-00000006")
    run_ranks(1, ["-m", "pretrain.export", str(resumed), "weights=ema"], config.parent / "averaged-logs")
    exported = load_file(resumed / "export/model.safetensors")
    name, exported_name = (
        "position_embeddings.weight",
        next(key for key in exported if "wpe" in key or "position" in key),
    )
    assert torch.equal(exported[exported_name], checkpoint.weights(last, "ema")(name))
    assert not torch.equal(exported[exported_name], checkpoint.weights(last)(name))
