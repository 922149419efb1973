"""`millstream plan`: counts against the real models, memory and FLOPs against the papers, choices, and the command."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from configs.errors import ConfigError
from configs.hardware import GPUS, NETWORKS, gpu, network
from configs.load import load_pretrain
from configs.model_sizes import BERT_SIZES, GPT_SIZES
from configs.model_styles import GPT_STYLES
from configs.schema import ModelConfig, PretrainConfig
from launcher.plan import choices, fit, make_plan, smallest_cluster
from launcher.plan_command import plan, words_of
from launcher.plan_job import Cluster, Job, count_parameters, make_cluster, make_job
from launcher.plan_memory import activation_bytes, held, memory
from launcher.plan_time import (
    LINK_SHARE,
    gather_seconds,
    hardware_flops_per_token,
    model_flops_per_token,
    step_time,
)
from pretrain.models import build_model
from pretrain.models.layers import attention_mask, rotations
from tests.conftest import ROOT

CONFIG = ROOT / "configs/gpt/gpt2-124m.yaml"
LLAMAS = [replace(GPT_STYLES["llama"], has_tied_output=is_tied) for is_tied in (True, False)]


def job_of(preset: str = "gpt2", architecture: str = "gpt", num_gpus: int = 8, **values) -> Job:
    """A bf16 job of that size with a global batch of 64 and a micro batch of 1; values: fields of Job."""
    model = {"preset": preset, "architecture": architecture}
    train = {"seq_len": 256, "global_batch_size": 64, "micro_batch_size": 1}
    config = PretrainConfig.model_validate({"run_dir": "x", "model": model, "train": train})
    return replace(make_job(config, None, num_gpus), **values)


@pytest.mark.parametrize(
    ("architecture", "preset"),
    [*(("gpt", name) for name in GPT_SIZES if name != "gpt3-175b"), *(("bert", name) for name in BERT_SIZES)],
)
def test_parameters_are_those_of_the_real_model(architecture, preset):
    job = job_of(preset, architecture, seq_len=128)
    config = ModelConfig(architecture=architecture, preset=preset)
    with torch.device("meta"):
        model = build_model(config, job.shape.vocab_size, 128)
    assert count_parameters(job) == sum(parameter.numel() for parameter in model.parameters())


def test_parameters_follow_an_intermediate_size_and_a_vocabulary():
    job = job_of("nano")
    job = replace(job, shape=replace(job.shape, intermediate_size=100, vocab_size=1234))
    with torch.device("meta"):
        model = build_model(ModelConfig(preset="nano", intermediate_size=100), 1234, 256)
    assert count_parameters(job) == sum(parameter.numel() for parameter in model.parameters())


def test_the_states_of_7_5_billion_parameters_shrink_with_the_stage_as_in_figure_1_of_zero():
    """Rajbhandari et al. 2020: 16 bytes a parameter. Here gradients are fp32, so 18; at stage 1 they are whole."""
    job = job_of("gpt3-6.7b", num_gpus=64)
    p = count_parameters(job)

    def states(stage: int, num_gpus: int) -> float:
        parts = held(replace(job, stage=stage, num_gpus=num_gpus), on_cpu=False)
        return parts["weights"] + parts["optimizer"] + parts["gradients"]

    assert states(3, 1) == pytest.approx(18 * p)
    assert states(1, 64) == pytest.approx((2 + 4 + 12 / 64) * p)
    assert states(2, 64) == pytest.approx((2 + 16 / 64) * p)
    assert states(3, 64) == pytest.approx(18 / 64 * p)


def test_activations_of_a_layer_are_those_of_korthikanti_without_what_is_fused_away():
    """Korthikanti et al. 2022, equation 1: s b h (34 + 5 a s / h). Without dropout's masks 32; fused: no 5 a s / h."""
    job = job_of("gpt3-175b", seq_len=2048, micro_batch_size=1)
    s, b, h, a = 2048, 1, 12288, 96
    rest = 4 * a * s * b + 2 * s * s * b  # sums of the softmax, and the mask of documents
    assert activation_bytes(job) - rest == pytest.approx(32 * s * b * h)
    masks = activation_bytes(replace(job, dropout=0.1)) - activation_bytes(job)
    assert masks == pytest.approx(2 * s * b * h)  # two masks of a byte


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("preset", ["nano", "llama-nano", "qwen3-nano", "gpt-neo-nano", "modernbert-nano"])
def test_activations_of_a_layer_are_what_autograd_keeps_of_it(preset, precision):
    """On a CPU, of a row of two documents; in bytes of all tensors but weights that backward will read."""
    is_gpt = preset in GPT_SIZES
    model = {"architecture": "gpt" if is_gpt else "bert", "preset": preset, "num_layers": 2, "max_seq_len": 512}
    model |= {"local_window": 64} if preset in ("gpt-neo-nano", "modernbert-nano") else {}
    train = {"seq_len": 512, "micro_batch_size": 2, "global_batch_size": 2, "precision": precision}
    config = PretrainConfig.model_validate({"run_dir": "x", "model": model, "train": train})
    block = build_model(config.model, 100, 512).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    segments = torch.ones(2, 512, dtype=torch.int32)
    segments[:, 300:] = 2
    mask, rotation = attention_mask(segments, is_gpt), rotations(block.shape, torch.arange(512))
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: list[torch.Tensor] = []
    x = torch.randn(2, 512, 128, dtype=next(block.parameters()).dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        block.blocks[1](x, mask, rotation[1])  # a local one, where the style has them
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    found = sum(size for place, size in storages.items() if place not in weights)
    assert activation_bytes(make_job(config, 100, 1), on_cpu=True, layer=1) == pytest.approx(found, rel=0.12)


def test_local_layers_have_the_flops_of_their_window_and_looked_up_embeddings_none():
    neo = job_of("gpt-neo-125m", seq_len=2048)
    whole = replace(neo, shape=replace(neo.shape, style=replace(neo.shape.style, local_window=2048)))
    assert model_flops_per_token(whole) - model_flops_per_token(neo) == 12 * 768 * 6 * (2048 - 256)
    tied, untied = (job_of("llama-nano", shape=replace(GPT_SIZES["llama-nano"], style=style)) for style in LLAMAS)
    assert count_parameters(untied) - count_parameters(tied) == 50_257 * 128
    assert model_flops_per_token(untied) == model_flops_per_token(tied)


def test_checkpointing_keeps_two_bytes_per_hidden_element_of_each_layer():
    """Korthikanti et al. 2022, section 5: 2 s b h a layer with full recomputation."""
    kept = [
        memory(job_of("gpt2", shape=replace(GPT_SIZES["gpt2"], num_layers=n), checkpointing=True)).parts["activations"]
        for n in (10, 11)
    ]
    assert kept[1] - kept[0] == 2 * 256 * 768


def test_training_gpt3_takes_the_3_14e23_flops_of_its_paper():
    """Brown et al. 2020, table D.1, counts 6 N per token without attention's scores, which are 3 % more."""
    job = job_of("gpt3-175b", seq_len=2048)
    assert 300e9 * model_flops_per_token(job) == pytest.approx(3.14e23, rel=0.05)


def test_checkpointing_adds_a_third_to_the_layers_work_and_nothing_to_the_mfu():
    job = job_of("gpt3-13b", seq_len=2048)
    again = replace(job, checkpointing=True)
    assert model_flops_per_token(again) == model_flops_per_token(job)
    assert hardware_flops_per_token(again) / hardware_flops_per_token(job) == pytest.approx(4 / 3, rel=0.02)


def test_a_gather_within_a_node_takes_its_bytes_through_one_link_and_its_messages():
    cluster = make_cluster(8, 1, GPUS["h100-80g"], NETWORKS["ib-8x400"])
    assert gather_seconds(8e9, 8, 1, cluster) == pytest.approx(7e9 / (450e9 * LINK_SHARE) + 6 * 3e-6)
    assert gather_seconds(8e9, 1, 1, cluster) == 0.0


def test_a_gather_between_nodes_is_bound_by_the_slower_of_links_and_network():
    cluster = make_cluster(16, 2, GPUS["h100-80g"], NETWORKS["eth-100"])
    seconds = gather_seconds(16e9, 8, 2, cluster)
    assert seconds == pytest.approx(8e9 / (12.5e9 * LINK_SHARE), rel=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_memory_falls_with_the_stage_and_with_the_gpus_and_grows_with_the_batch(on_cpu, checkpointing):
    base = job_of("gpt3-2.7b", num_gpus=16, checkpointing=checkpointing)
    stages = [memory(replace(base, stage=stage), on_cpu).total for stage in (1, 2, 3)]
    assert stages[0] > stages[1] > stages[2]
    ranks = [memory(replace(base, stage=3, num_gpus=n), on_cpu).total for n in (4, 16, 64)]
    assert ranks == sorted(ranks, reverse=True)
    batches = [memory(replace(base, micro_batch_size=m), on_cpu).total for m in (1, 4, 16)]
    assert batches == sorted(batches) and batches[0] < batches[-1]


def test_a_slower_network_and_more_nodes_never_make_a_step_shorter():
    job = job_of("gpt3-13b", num_gpus=64, stage=3)
    totals = [
        step_time(job, Cluster(64, nodes, GPUS["h100-80g"], NETWORKS[name])).total
        for nodes, name in ((1, "ib-8x400"), (8, "ib-8x400"), (8, "ib-400"), (8, "eth-25"))
    ]
    assert totals == sorted(totals)


def test_tokens_of_a_run_follow_its_phases_and_its_growing_batch():
    train = {
        "num_steps": 30, "seq_len": 32, "phases": [{"from_step": 20, "seq_len": 64}], "global_batch_size": 8,
        "micro_batch_size": 1, "batch_ramp": {"start_size": 4, "increment": 4, "num_samples": 40},
    }  # fmt: skip
    config = PretrainConfig.model_validate({"run_dir": "x", "train": train})
    assert make_job(config, 300, 1).num_tokens == (10 * 4 + 10 * 8) * 32 + 10 * 8 * 64


def test_a_budget_of_wall_clock_time_ends_the_run_and_what_it_costs(capsys):
    words = [str(CONFIG), "--gpus", "8", "train.budget=10m"]
    assert plan(words) == 0
    shown = capsys.readouterr().out
    assert "takes       10.0 minutes" in shown and "until train.budget ends it" in shown


def test_what_fit_chooses_fits_and_no_faster_choice_does():
    job = job_of("gpt3-6.7b", num_gpus=8, global_batch_size=256, seq_len=2048)
    cluster = make_cluster(8, 1, GPUS["a100-80g"], NETWORKS["ib-8x200"])
    chosen = fit(job, cluster)
    assert chosen.fits
    assert chosen.job.accumulation * chosen.job.micro_batch_size * 8 == 256
    others = [made for choice in choices(job) if (made := make_plan(choice, cluster)).fits]
    assert chosen.time.total <= 1.02 * min(other.time.total for other in others)


def test_fit_of_a_model_that_fits_nowhere_says_what_it_would_need():
    job = job_of("gpt3-175b", num_gpus=8, seq_len=2048)
    with pytest.raises(ConfigError, match=r"nothing fits: at ZeRO stage 3 with checkpointing .* take more GPUs"):
        fit(job, make_cluster(8, 1, GPUS["h100-80g"], NETWORKS["ib-8x400"]))


def test_bigger_models_need_no_fewer_gpus_and_more_memory_no_more():
    counts = [smallest_cluster(name, GPUS["a100-80g"]).cluster.num_gpus for name in ("gpt2", "gpt3-6.7b", "gpt3-175b")]
    assert counts == sorted(counts) and counts[0] == 1
    bigger = [smallest_cluster(name, GPUS["h200"]).cluster.num_gpus for name in ("gpt2", "gpt3-6.7b", "gpt3-175b")]
    assert all(b <= a for a, b in zip(counts, bigger, strict=True))


def test_unknown_gpu_and_network_name_the_nearest_ones():
    with pytest.raises(ConfigError, match="did you mean h100-80g"):
        gpu("h100")
    with pytest.raises(ConfigError, match="did you mean ib-8x400"):
        network("ib-8x40")


def test_gpus_that_do_not_divide_over_the_nodes_name_a_number_that_does():
    with pytest.raises(ConfigError, match=r"10 GPUs do not divide over 4 nodes.*--nodes 2"):
        make_cluster(10, 4, GPUS["h100-80g"], NETWORKS["ib-8x400"])


def test_batch_that_does_not_divide_names_one_that_does():
    with pytest.raises(ConfigError, match="does not divide into micro batches of 16 on 48 ranks"):
        plan([str(CONFIG), "--gpus", "48"])
    with pytest.raises(ConfigError, match=r"512 / \(1 x 48\) is not a whole number; choose a .* multiple of 48"):
        plan([str(CONFIG), "--gpus", "48", "--fit"])


def test_unknown_flag_and_a_number_that_is_none_are_named():
    with pytest.raises(ConfigError, match="unknown flag --gpuz; millstream plan knows --gpus"):
        plan([str(CONFIG), "--gpuz", "8"])
    with pytest.raises(ConfigError, match="--gpus eight: expected a positive whole number"):
        plan([str(CONFIG), "--gpus", "eight"])


def test_words_that_fit_prints_can_be_pasted_behind_pretrain(capsys):
    assert plan([str(CONFIG), "--gpus", "8", "--fit", "model.preset=gpt2-xl"]) == 0
    words = capsys.readouterr().out.strip().splitlines()[-1].split()
    config = load_pretrain(CONFIG, ["model.preset=gpt2-xl", *words])
    assert words_of(make_job(config, None, 8)) == " ".join(words)


def test_a_run_that_does_not_fit_says_so_and_ends_with_1(capsys):
    assert plan([str(CONFIG), "--gpus", "1", "--gpu", "rtx4090", "model.preset=gpt3-13b"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_plan_shows_every_part_and_answers_within_half_a_second():
    command = [sys.executable, "-m", "launcher.cli", "plan", str(CONFIG), "--gpus", "64", "--gpu", "h100-80g"]
    began = time.perf_counter()
    shown = subprocess.run([*command, "--nodes", "8", "--fit"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.perf_counter() - began < 0.5 * 3  # three times: other tests may be running
    for word in (
        "weights", "gradients", "optimizer", "activations", "with checkpointing", "output layer", "ZeRO buffers",
        "fragmentation", "communication", "tokens/s", "MFU", "kWh", "US dollars", "checkpoint", "data",
    ):  # fmt: skip
        assert word in shown.stdout
    assert re.search(r"train.micro_batch_size=\d+ zero.stage=\d model.activation_checkpointing=", shown.stdout)


def test_table_has_a_line_for_each_size(capsys):
    assert plan(["table", "--gpu", "h100-80g"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == [
        "gpt2", "gpt2-medium", "gpt2-xl", "gpt3-2.7b", "gpt3-6.7b", "gpt3-13b", "gpt3-175b"
    ]  # fmt: skip
