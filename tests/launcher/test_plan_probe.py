"""What a probe's four measurements say of the whole model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.hardware import GPUS, NETWORKS
from configs.schema import PretrainConfig
from launcher.plan import make_plan
from launcher.plan_job import Job, make_cluster, make_job
from launcher.plan_measure import deepest, depths
from launcher.plan_memory import memory
from launcher.plan_probe import Depth, Probe, probe_job, probed_fragmentation

CONTEXT = 4e8


def job_of(num_layers: int = 12, accumulation: int = 3, num_gpus: int = 2) -> Job:
    model = {"preset": "gpt2", "num_layers": num_layers, "hidden_size": 256, "num_heads": 4}
    train = {"seq_len": 128, "micro_batch_size": 4, "global_batch_size": 4 * accumulation * num_gpus}
    return make_job(PretrainConfig.model_validate({"run_dir": "x", "model": model, "train": train}), 5000, num_gpus)


def probe_of(num_ranks: int = 2, peaks: tuple[float, float] = (6e8, 9e8)) -> Probe:
    """Of a machine where a micro batch takes 10 ms and 20 a layer, and once a step 5 ms and 2 a layer come on top."""

    def depth(layers: int, peak: float) -> Depth:
        micro, update = 0.010 + 0.020 * layers, 0.005 + 0.002 * layers
        return Depth(layers, micro + update, 2 * micro + update, peak)

    return Probe(num_ranks, True, CONTEXT, depth(2, peaks[0]), depth(8, peaks[1]))


def cluster_of(num_gpus: int = 2):
    return make_cluster(num_gpus, 1, GPUS["cpu"], NETWORKS["eth-10"])


def test_a_step_of_more_layers_and_micro_batches_follows_from_four_measurements():
    time = make_plan(job_of(), cluster_of(), probe_of()).time
    assert time.compute == pytest.approx(3 * (0.010 + 0.020 * 12))
    assert time.update == pytest.approx(0.005 + 0.002 * 12)
    assert time.total == pytest.approx(time.compute + time.update)


def test_on_more_ranks_than_were_probed_communication_is_added_and_the_update_is_shared():
    job = job_of(num_gpus=8, accumulation=1)
    time = make_plan(job, cluster_of(8), probe_of()).time
    assert time.communication > 0
    assert time.update == pytest.approx((0.005 + 0.002 * 12) * 2 / 8)


def test_what_the_allocator_keeps_is_what_explains_the_probes_own_peak():
    job = job_of()
    counted = memory(probe_job(job, probe_of(), 8), True, CONTEXT, 0.0, saves_before_end=False).total
    plan = make_plan(job, cluster_of(), probe_of(peaks=(counted, counted + 7e7)))
    assert plan.memory.fragmentation == pytest.approx(7e7)


def test_a_peak_below_what_the_model_counts_is_no_negative_share():
    assert probed_fragmentation(job_of(), probe_of(peaks=(CONTEXT, CONTEXT))) == 0.0


def test_the_probed_plan_begins_with_the_probed_process():
    plan = make_plan(job_of(), cluster_of(), replace(probe_of(), context_bytes=7e8))
    assert plan.memory.parts["context"] == 7e8


@pytest.mark.parametrize(("layers", "expected"), [(1, (1, 2)), (2, (1, 2)), (6, (1, 4)), (12, (2, 8)), (96, (16, 64))])
def test_a_probe_has_at_most_two_thirds_of_the_layers_where_there_are_enough(layers, expected):
    assert depths(layers) == expected


def test_the_deeper_probe_has_as_many_layers_as_the_time_allows_and_the_output_layer_is_counted_once():
    small = job_of()
    of_layers = replace(small, shape=replace(small.shape, vocab_size=1))
    of_output = replace(small, shape=replace(small.shape, vocab_size=1_000_000))
    assert [deepest(of_layers, 1, 8, times) for times in (0.5, 2.9, 4.1, 100.0)] == [2, 2, 4, 8]
    assert deepest(of_output, 1, 8, 1.2) == 8
