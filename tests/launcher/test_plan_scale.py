"""Ways to split a model on large clusters: what each sends, and where each wins, as its paper says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.hardware import GPUS, NETWORKS
from configs.schema import PretrainConfig
from launcher.plan_job import Cluster, Job, make_cluster, make_job
from launcher.plan_scale import STRATEGIES, all_to_all_seconds, group_size, scaled


def job_of(preset: str = "gpt3-13b", accumulation: int = 1, num_gpus: int = 64) -> Job:
    model = {"preset": preset, "activation_checkpointing": True}
    train = {"seq_len": 2048, "micro_batch_size": 1, "global_batch_size": accumulation * num_gpus}
    config = PretrainConfig.model_validate({"run_dir": "x", "model": model, "train": train})
    return make_job(config, None, num_gpus)


def cluster_of(num_gpus: int = 64, network: str = "ib-8x200") -> Cluster:
    return make_cluster(num_gpus, None, GPUS["h100-80g"], NETWORKS[network])


def test_each_part_of_zero_plus_plus_helps_and_the_three_together_help_most():
    """Wang et al. 2023: a quarter of ZeRO-3's bytes between nodes."""
    seconds = {name: scaled(job_of(), cluster_of(), name).seconds for name in STRATEGIES}
    for name in ("hpz", "qwz", "qgz"):
        assert seconds["zero++"] < seconds[name] < seconds["zero3"]


def test_on_one_node_a_second_copy_of_the_weights_changes_nothing_but_memory():
    job, cluster = job_of(num_gpus=8), cluster_of(8)
    assert scaled(job, cluster, "hpz").seconds == scaled(job, cluster, "zero3").seconds


def test_a_second_copy_in_each_node_does_not_fit_where_zero3_barely_does():
    job, cluster = job_of("gpt3-175b", num_gpus=64), cluster_of(64)
    assert scaled(job, cluster, "zero3").fits and not scaled(job, cluster, "hpz").fits


def test_mics_wins_over_zero3_where_many_micro_batches_share_one_sum_of_gradients():
    """Zhang et al. 2022, section 3.3: the gradients of groups are summed at the last micro batch only."""
    cluster = cluster_of(network="eth-100")
    once, often = job_of(), job_of(accumulation=8)
    gain = [scaled(job, cluster, "zero3").seconds / scaled(job, cluster, "mics").seconds for job in (once, often)]
    assert gain[1] > 2 and gain[1] > gain[0]


def test_mics_takes_the_fewest_nodes_that_hold_the_model():
    assert group_size(job_of("gpt3-1.3b"), cluster_of()) == 8
    assert group_size(job_of("gpt3-175b", num_gpus=512), cluster_of(512)) == 64


def test_on_a_fast_network_all_are_alike_and_on_a_slow_one_far_apart():
    def spread(network: str) -> float:
        seconds = [scaled(job_of(accumulation=8), cluster_of(network=network), name).seconds for name in STRATEGIES[1:]]
        return max(seconds) / min(seconds)

    assert spread("eth-100") > 4 > 1.3 > spread("ib-8x400")


def test_ulysses_sends_four_n_h_over_p_forward_and_again_backward():
    """Jacobs et al. 2023, section 3.2: within a node, 4 N h / P elements a layer and GPU, of which it keeps 1 / P."""
    job, cluster = replace(job_of("gpt3-1.3b"), seq_len=16_384), cluster_of(8)
    sent = 2 * 4 * 24 * 16_384 * 2048 * 2 * 7 / 8
    messages = 2 * 4 * 24 * 6 * 3e-6
    assert all_to_all_seconds(job, cluster, 8) == pytest.approx(sent / (450e9 * 0.75) + messages)
    assert all_to_all_seconds(job, cluster, 1) == 0.0


def test_ulysses_uses_more_gpus_than_there_are_samples_and_keeps_their_speed():
    job = replace(job_of("gpt3-1.3b"), seq_len=131_072, global_batch_size=32)
    plain = scaled(job, cluster_of(32, "ib-8x400"), "zero3")
    spread = scaled(job, cluster_of(256, "ib-8x400"), "zero3", ulysses=8)
    assert spread.fits
    assert 0.8 * plain.tokens_per_second < spread.tokens_per_second <= 1.05 * plain.tokens_per_second
