"""incidents.jsonl: one whole line an incident, whoever writes it."""

from __future__ import annotations

import json
import math
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta

from configs.incidents import append_incident, read_incidents


def test_incident_has_time_kind_step_rank_text_and_more_numbers(tmp_path):
    append_incident(tmp_path / "run", "spike", "the loss jumped", step=7, loss=math.nan)
    line = json.loads((tmp_path / "run/incidents.jsonl").read_text())
    assert list(line) == ["time", "kind", "step", "rank", "text", "loss"]
    assert datetime.now(UTC) - datetime.fromisoformat(line.pop("time")) < timedelta(minutes=1)
    assert math.isnan(line.pop("loss"))
    assert line == {"kind": "spike", "step": 7, "rank": None, "text": "the loss jumped"}


def test_lines_of_several_writers_never_mix(tmp_path):
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(_append_100, [tmp_path] * 4, range(4)))
    incidents = read_incidents(tmp_path)
    for rank in range(4):
        assert [i["step"] for i in incidents if i["rank"] == rank] == list(range(100))


def _append_100(run_dir, rank):
    for step in range(100):
        append_incident(run_dir, "test", "x" * 5000, step=step, rank=rank)


def test_run_without_incidents_has_none_and_a_cut_line_is_left_out(tmp_path):
    assert read_incidents(tmp_path) == []
    append_incident(tmp_path, "stall", "rank 1 is behind", rank=1)
    with (tmp_path / "incidents.jsonl").open("a") as file:
        file.write('{"time": "2026')
    assert [incident["rank"] for incident in read_incidents(tmp_path)] == [1]
