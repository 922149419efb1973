"""The global batch size of each step, against Megatron-LM's rule applied step after step."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.batch_sizes import all_sizes, batch_size, samples_before
from configs.load import ConfigError, load_pretrain
from configs.schema import TrainConfig


def ramped(start: int, increment: int, full: int, num_samples: int) -> TrainConfig:
    ramp = {"start_size": start, "increment": increment, "num_samples": num_samples}
    return TrainConfig.model_validate({"global_batch_size": full, "micro_batch_size": 1, "batch_ramp": ramp})


def megatron_size(start: int, increment: int, full: int, num_samples: int, consumed: int) -> int:
    """What `--rampup-batch-size START INCREMENT SAMPLES` gives when so many samples have been consumed."""
    if consumed > num_samples:
        return full
    samples_per_increment = Fraction(num_samples, (full - start) // increment)
    return start + int(consumed / samples_per_increment) * increment


ramps = st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(1, 30), st.integers(1, 3000)).map(
    lambda drawn: (drawn[0], drawn[1], drawn[0] + drawn[1] * drawn[2], drawn[3])
)


@given(ramps)
def test_sizes_are_those_of_megatron_and_samples_before_is_their_sum(ramp):
    train, consumed = ramped(*ramp), 0
    for step in range(120):
        assert samples_before(train, step) == consumed
        assert batch_size(train, step) == megatron_size(*ramp, consumed)
        consumed += batch_size(train, step)


def test_ramp_of_gpt3_reaches_the_full_size_after_its_samples():
    train = ramped(16, 16, 1536, 5_859_375)  # 12 billion tokens in rows of 2,048, as for the largest models
    first_full = next(step for step in range(100_000) if batch_size(train, step) == 1536)
    assert 5_859_375 <= samples_before(train, first_full) < 5_859_375 + 1536
    assert batch_size(train, 10**9) == 1536
    half = next(step for step in range(100_000) if samples_before(train, step) >= 5_859_375 / 2)
    assert batch_size(train, half) == pytest.approx((16 + 1536) / 2, abs=16)  # linear in the samples


def test_all_sizes_are_those_that_occur():
    train = ramped(4, 4, 16, 200)
    assert all_sizes(train) == [4, 8, 12, 16] == sorted({batch_size(train, step) for step in range(100)})
    assert all_sizes(TrainConfig(global_batch_size=24)) == [24]


def test_without_a_ramp_every_step_has_the_global_batch():
    train = TrainConfig(global_batch_size=24)
    assert (batch_size(train, 0), batch_size(train, 7), samples_before(train, 7)) == (24, 24, 168)


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        ("{start_size: 4, increment: 5, num_samples: 9}", "in increments of 5 there is no way to"),
        ("{start_size: 32, increment: 4, num_samples: 9}", "from start_size=32 in increments of 4 there is no way to"),
        ("{start_size: 2, increment: 2, num_samples: 9}", "the sizes 2, 6, 10, 14 are not multiples of"),
        ("{start_size: 4, increment: 4}", "num_samples` is missing"),
    ],
)
def test_ramp_that_does_not_fit_is_refused(tmp_path, ramp, expected):
    file = tmp_path / "config.yaml"
    file.write_text("run_dir: r\ntrain: {global_batch_size: 16, micro_batch_size: 4}\n")
    with pytest.raises(ConfigError) as error:
        load_pretrain(file, [f"train.batch_ramp={ramp}"])
    assert expected in str(error.value)
