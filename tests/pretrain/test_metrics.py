"""metrics.jsonl, TensorBoard and the terminal; what a resume drops and keeps."""

from __future__ import annotations

import json
import math

import pytest

from configs.schema import LogConfig
from pretrain.metrics import describe, drop_after, open_metrics, read_metrics


def line(step: int, **more: float) -> dict[str, float]:
    return {"step": step, "loss": 3.0 / step, "lr": 1e-3, "tokens_per_second": 1000.0, **more}


def write(run_dir, steps, first=0, **log):
    with open_metrics(run_dir, first, 10, LogConfig(**{"tensorboard": False} | log), True) as metrics:
        for step in steps:
            metrics.log(line(step))


def test_numbers_are_read_back_exactly(tmp_path):
    write(tmp_path, [1, 2, 3])
    assert read_metrics(tmp_path) == [line(1), line(2), line(3)]


def test_resume_drops_the_lines_it_will_write_again(tmp_path):
    write(tmp_path, [1, 2, 3, 4, 5])
    write(tmp_path, [4, 5, 6], first=3)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_new_start_drops_all_lines(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1])
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1]


def test_run_that_goes_back_moves_the_lines_after_it_and_goes_on_in_both_places(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_metrics(tmp_path, 0, 10, LogConfig(), True) as metrics:
        for step in (1, 2, 3, 4):
            metrics.log(line(step))
        metrics.go_back(2)
        metrics.log(line(3, grad_norm=7.0))
    assert read_metrics(tmp_path) == [line(1), line(2), line(3, grad_norm=7.0)]
    gone = [json.loads(text) for text in (tmp_path / "rolled_back.jsonl").read_text().splitlines()]
    assert gone == [line(3), line(4)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]


def test_line_that_a_crash_cut_off_is_left_out_but_a_broken_one_inside_is_an_error(tmp_path):
    write(tmp_path, [1, 2])
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 3, "lo')
    drop_after(tmp_path, 2)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2]
    file.write_text("garbage\n" + file.read_text())
    with pytest.raises(ValueError, match=r"metrics.jsonl:1: is not JSON: 'garbage'"):
        read_metrics(tmp_path)


def test_not_a_number_is_never_hidden(tmp_path):
    with open_metrics(tmp_path, 0, 10, LogConfig(tensorboard=False), True) as metrics:
        metrics.log(line(1) | {"loss": math.nan})
    assert math.isnan(json.loads((tmp_path / "metrics.jsonl").read_text())["loss"])
    assert "NOT FINITE" in describe(line(1) | {"loss": math.inf})


def test_only_the_first_rank_writes(tmp_path):
    with open_metrics(tmp_path, 0, 10, LogConfig(), False) as metrics:
        metrics.log(line(1))
    assert not list(tmp_path.iterdir())


def test_terminal_gets_plain_lines_where_there_is_none(tmp_path, capsys):
    write(tmp_path, range(1, 11), every_steps=5)
    printed = capsys.readouterr().out.splitlines()
    assert [text.split()[1] for text in printed] == ["5/10", "10/10"]
    assert "loss 0.6000  lr 1.00e-03  1,000 tokens/s" in printed[0]


def test_tensorboard_holds_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, [1, 2], tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 3.0), (2, 1.5)]
