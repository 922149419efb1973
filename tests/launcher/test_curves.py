"""Curves of metrics.jsonl: exact while short, means and extremes when long, read as the file grows."""

from __future__ import annotations

import json
import time

import numpy as np

from launcher.curves import NUM_BUCKETS, Curves
from tests.launcher.run_directories import make_run


def write(path, steps, mode="w", **values):
    with path.open(mode) as file:
        for step in steps:
            file.write(json.dumps({"step": step, "loss": float(step)} | values) + "\n")


def test_short_curve_is_every_step_exactly(tmp_path):
    curves = Curves(make_run(tmp_path / "run") / "metrics.jsonl", ("loss", "eval_loss", "mfu"))
    assert curves.read(1)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    expected = [[line["step"], float(f"{line['loss']:.6g}")] for line in lines if "loss" in line]
    points = curves.points()
    assert points["loss"] == expected and len(points["eval_loss"]) == 5 and "mfu" not in points


def test_long_curve_has_means_and_keeps_the_spike_of_one_step(tmp_path):
    path, rng = tmp_path / "metrics.jsonl", np.random.default_rng(0)
    values = rng.normal(2.0, 0.1, 5000)
    values[3210] = 50.0
    path.write_text("".join(json.dumps({"step": s, "loss": v}) + "\n" for s, v in enumerate(values.tolist())))
    curves = Curves(path, ("loss",))
    assert curves.read(10)
    points, width = curves.points()["loss"], curves.width
    assert width == 8 and len(points) <= NUM_BUCKETS
    for first, mean, low, high in points:
        held = values[first : first + width]
        np.testing.assert_allclose([mean, low, high], [held.mean(), held.min(), held.max()], rtol=1e-5)
    assert max(point[3] for point in points) == 50.0


def test_growing_file_is_read_where_it_was_left_and_a_half_line_waits(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(5))
    curves = Curves(path, ("loss",))
    curves.read(1)
    version = curves.version
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    curves.read(1)
    assert len(curves.points()["loss"]) == 5
    with path.open("a") as file:
        file.write('ss": 5.0}\n')
    curves.read(1)
    assert curves.points()["loss"][-1] == [5, 5.0] and curves.version > version


def test_run_without_metrics_yet_has_nothing_left_to_read(tmp_path):
    curves = Curves(tmp_path / "metrics.jsonl", ("loss",))
    assert curves.read(1) and curves.share_read == 1.0 and curves.points() == {}
    write(tmp_path / "metrics.jsonl", range(3))
    assert curves.read(1) and len(curves.points()["loss"]) == 3


def test_file_that_a_resume_replaced_is_read_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(100))
    curves = Curves(path, ("loss",))
    curves.read(1)
    write(tmp_path / "aside", range(20))
    (tmp_path / "aside").replace(path)
    curves.read(1)
    assert len(curves.points()["loss"]) == 20


def test_numbers_that_are_not_finite_and_lines_that_are_none_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": NaN}\nnonsense\n[1]\n{"loss": 3}\n{"step": 3, "loss": 3}\n'
    )
    curves = Curves(path, ("loss",))
    assert curves.read(1) and curves.points()["loss"] == [[1, 1.0], [3, 3.0]]


def test_million_lines_are_read_in_seconds_and_in_small_helpings(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = '{"step": %d, "loss": 2.5, "lr": 0.001, "grad_norm": 1.0, "tokens": 4096, "tokens_per_second": 20000.0}\n'
    with path.open("w") as file:
        file.writelines(line % step for step in range(1_000_000))
    curves = Curves(path, ("loss", "eval_loss", "lr", "grad_norm", "tokens_per_second", "mfu"))
    began = time.process_time()
    first = curves.read(0.1)
    helping = time.process_time() - began
    while not curves.read(0.5):
        pass
    assert not first and helping < 0.5
    assert time.process_time() - began < 15
    assert sum(len(rows) for rows in curves.points().values()) <= 4 * NUM_BUCKETS
