"""The loss is the mean over the global batch's targets, however that is divided; what can be added to it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from configs.schema import ModelConfig
from data_pipeline.shards import write_manifest, write_shard
from pretrain.kernels.linear_cross_entropy import IGNORE_INDEX
from pretrain.models import build_model
from pretrain.objective import count_targets, global_mean, mean_losses
from tests.ranks import finish, kill_when, run_ranks, start_ranks


def batch(targets: list[int], **more) -> dict[str, torch.Tensor]:
    labels = torch.full((len(targets), 8), IGNORE_INDEX)
    for row, number in enumerate(targets):
        labels[row, :number] = 1
    return {"labels": labels, **more}


def test_targets_are_counted_over_all_micro_batches():
    assert count_targets([batch([3, 0]), batch([8, 1])]) == {"clm": 12}


def test_bert_counts_words_and_sentences_and_ignored_sentences_do_not_count():
    more = {"token_type_ids": torch.zeros(2, 8), "next_sentence_label": torch.tensor([1, IGNORE_INDEX])}
    assert count_targets([batch([2, 3], **more)]) == {"mlm": 5, "nsp": 1}


def test_shares_of_unequal_micro_batches_sum_to_the_mean_over_targets():
    losses = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])]
    counts = {"clm": 4}
    total = sum(global_mean({"clm": part.sum()}, counts) for part in losses)
    assert total == torch.cat(losses).mean() != torch.stack([part.mean() for part in losses]).mean()


def test_objective_without_targets_gives_zero_not_nan():
    assert global_mean({"mlm": torch.tensor(0.0), "nsp": torch.tensor(2.0)}, {"mlm": 0, "nsp": 4}) == 0.5


def test_what_is_minimised_has_the_gradient_and_the_plain_loss_is_what_is_reported():
    sums = {"mlm": 6.0, "mlm_minimised": 9.0, "mlm_smoothed": 7.5, "mlm_z": 30.0, "nsp": 2.0}
    counts = {"mlm": 3, "nsp": 4}
    assert global_mean({name: torch.tensor(value) for name, value in sums.items()}, counts) == 3.5
    assert mean_losses(sums, counts) == {
        "loss": 2.5, "loss_mlm": 2.0, "loss_nsp": 0.5, "loss_smoothed": 2.5, "z_loss": 10.0
    }  # fmt: skip


def test_one_objective_is_reported_as_loss_alone():
    assert mean_losses({"clm": 6.0}, {"clm": 3}) == {"loss": 2.0}
    assert mean_losses({"clm": 0.0, "clm_minimised": 0.0, "clm_z": 0.0}, {"clm": 0}) == {"loss": 0.0, "z_loss": 0.0}


@pytest.mark.parametrize("architecture", ["gpt", "bert"])
def test_model_with_both_terms_has_the_losses_and_gradients_of_its_logits_in_torch(architecture):
    """Tied weights, without a bias (gpt) and with one (bert); next-sentence prediction has neither term."""
    torch.manual_seed(0)
    config = ModelConfig(architecture=architecture, num_layers=2, hidden_size=32, num_heads=2)
    model = build_model(config, 61, 16)
    for parameter in model.parameters():  # biases are made as zeros
        torch.nn.init.normal_(parameter, std=0.3)
    tokens, labels = torch.randint(61, (2, 3, 16))
    labels[:, ::3] = IGNORE_INDEX
    batch = {"input_ids": tokens, "labels": labels}
    if architecture == "bert":
        batch |= {"token_type_ids": torch.zeros_like(tokens), "next_sentence_label": torch.tensor([0, 1, 1])}
    counts = count_targets([batch])
    terms = {"label_smoothing": 0.15, "z_loss": 0.02}
    sums = model(**batch, **terms)
    global_mean(sums, counts).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    logits = model(tokens)
    if architecture == "bert":
        logits, pair_logits = logits
    flat, targets = logits.flatten(0, 1), labels.flatten()
    smoothed = F.cross_entropy(flat, targets, label_smoothing=0.15)
    z = (flat[targets != IGNORE_INDEX].logsumexp(1) ** 2).mean()
    expected = {"loss": F.cross_entropy(flat, targets).item(), "loss_smoothed": smoothed.item(), "z_loss": z.item()}
    minimised = smoothed + 0.02 * z
    if architecture == "bert":
        pairs = F.cross_entropy(pair_logits, batch["next_sentence_label"])
        minimised = minimised + pairs
        expected["loss_nsp"] = pairs.item()
        expected["loss_mlm"] = expected["loss"]
        expected["loss"] += pairs.item()
    minimised.backward()
    assert mean_losses({name: value.item() for name, value in sums.items()}, counts) == pytest.approx(
        expected, rel=1e-5
    )
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m
            )


def write_random_tokens(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split, documents in (("train", 200), ("validation", 40)):
        (folder / split).mkdir(parents=True)
        lengths = rng.integers(1, 60, documents)
        tokens = np.minimum(rng.geometric(0.05, lengths.sum()), 96)
        entry = write_shard(folder / split / "shard-00000.tokens", [(tokens, lengths)], 97)
        write_manifest(folder / split, [entry], 97, "none", "test")


def small_run(tmp_path: Path, data: dict, train: dict, zero: dict) -> Path:
    config = {
        "run_dir": "unused",
        "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 2},
        "data": data,
        "train": {"num_steps": 6, "seq_len": 32, "global_batch_size": 8, "micro_batch_size": 2} | train,
        "eval": {"num_samples": 8},
        "zero": zero,
        "log": {"tensorboard": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "config.yaml"


def words(config: Path, run_dir: Path, *overrides: str) -> list[str]:
    return ["-m", "pretrain.train", "--config", str(config), f"run_dir={run_dir}", *overrides]


def metrics(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what is measured with a clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    clock = ("tokens_per_second", "step_seconds", "save_wait_seconds")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, 3])
def test_label_smoothing_and_z_loss_on_two_ranks_are_those_of_one_process(tmp_path, stage):
    write_random_tokens(tmp_path / "data")
    terms = {"precision": "fp32", "label_smoothing": 0.1, "z_loss": 0.01, "optimizer": {"lr": 0.01}}
    config = small_run(tmp_path, {"dir": str(tmp_path / "data")}, terms, {"stage": stage})
    runs = []
    for num_ranks, micro in ((1, 8), (2, 2)):
        run_dir = tmp_path / f"run-{num_ranks}"
        command = words(config, run_dir, f"train.micro_batch_size={micro}")
        run_ranks(num_ranks, command, tmp_path / f"logs-{num_ranks}")
        runs.append(metrics(run_dir))
    steps = [[line for line in run if "loss" in line] for run in runs]
    for name in ("loss", "loss_smoothed", "z_loss", "grad_norm"):
        np.testing.assert_allclose([line[name] for line in steps[1]], [line[name] for line in steps[0]], rtol=2e-5)
    assert all(line["loss"] != line["loss_smoothed"] for line in steps[0])
    for run in runs:  # the evaluation at the end
        assert not {"eval_loss_smoothed", "eval_z_loss"} & set(run[-1]) and "eval_loss" in run[-1]


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_run_that_fills_in_the_middle_resumes_with_bitwise_the_same_metrics(tmp_path):
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(rng.choice(["sun", "river", "a", "stones"], 30))}) for _ in range(200)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    build = {
        "sources": [str(tmp_path / "text.jsonl")], "validation_fraction": 0.1, "num_workers": 1,
        "tokenizer": {"type": "byte_bpe", "vocab_size": 280, "fim_tokens": True},
    }  # fmt: skip
    data = {"dir": str(tmp_path / "data"), "build": build, "fim": {"probability": 0.9}}
    config = small_run(tmp_path, data, {"num_steps": 12}, {})
    run_ranks(1, ["-m", "data_pipeline.build", str(config)], tmp_path / "build-logs")
    more = ("checkpoint.every_steps=2", "train.z_loss=0.001")
    run_ranks(2, words(config, tmp_path / "whole", *more), tmp_path / "whole-logs")
    run_ranks(2, words(config, tmp_path / "plain", "data.fim.probability=0", "train.num_steps=1"), tmp_path / "plain")
    whole, plain = metrics(tmp_path / "whole"), metrics(tmp_path / "plain")
    assert whole[0] == plain[0]  # what is evaluated is text as it is
    assert whole[1]["loss"] != plain[1]["loss"]

    run_dir = tmp_path / "killed"
    processes = start_ranks(2, words(config, run_dir, *more), tmp_path / "killed-logs")
    kill_when(processes, lambda: any(run_dir.glob("checkpoints/step-*/manifest.json")), signal.SIGKILL)
    codes = finish(start_ranks(2, words(config, run_dir, *more, "data.fim.spm_share=0"), tmp_path / "changed-logs"))
    assert codes == [2, 2]
    assert "was written with fim={'probability': 0.9" in (tmp_path / "changed-logs/rank-0.log").read_text()
    run_ranks(2, words(config, run_dir, *more), tmp_path / "killed-logs")
    assert metrics(run_dir) == whole
