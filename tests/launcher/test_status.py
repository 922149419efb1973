"""What `millstream status` says of a run, from the files of its directory alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from configs.errors import ConfigError
from configs.incidents import append_incident
from configs.launches import Launch, write_launch
from launcher.cli import main
from launcher.run_state import duration, look
from launcher.status import describe
from tests.conftest import ROOT
from tests.launcher.run_directories import dead_pid, make_ring, make_run, step_line


def now_in(phase: str, step: int = 40, seconds_ago: float = 0.1) -> list[tuple[float, int, str]]:
    return [(time.time() - seconds_ago - 1, step, "data"), (time.time() - seconds_ago, step, phase)]


def test_run_that_runs_has_its_step_numbers_time_left_and_phases(tmp_path):
    make_run(tmp_path / "run")
    make_ring(tmp_path / "run", 0, 2, now_in("forward"))
    make_ring(tmp_path / "run", 1, 2, now_in("reduce"))
    run = look(tmp_path / "run")
    assert (run.state, run.step, run.num_steps, run.checkpoint) == ("running", 40, 100, 40)
    assert run.seconds_left == pytest.approx(60 * 0.2)
    text = describe(run)
    assert "40 of 100 (40 %), about 12 s of steps left" in text and "tokens/s, 0.2 s a step" in text
    assert "2 ranks: 1 in forward, 1 in reduce of step 41; last mark 0." in text
    assert f"held out    {run.evaluation['eval_loss']:.4f} at step 40" in text


def test_run_whose_launcher_still_imports_is_starting(tmp_path):
    write_launch(tmp_path, Launch("local", ["millstream"], pid=os.getpid(), num_ranks=2))
    assert look(tmp_path).state == "starting"


def test_run_that_came_to_its_last_step_is_finished(tmp_path):
    make_run(tmp_path / "run", steps=100)
    make_ring(tmp_path / "run", 0, 1, now_in("end", 100), pid=dead_pid())
    assert look(tmp_path / "run").state == "finished"


def test_run_that_was_asked_to_stop_is_stopped(tmp_path):
    make_run(tmp_path / "run")
    make_ring(tmp_path / "run", 0, 1, now_in("end"), pid=dead_pid())
    assert look(tmp_path / "run").state == "stopped"


def test_run_with_a_budget_has_the_time_left_by_it_and_is_finished_when_it_is_over(tmp_path):
    run_dir = make_run(tmp_path / "run")
    lines = [step_line(step) | {"time_share": 0.1 + 0.02 * step} for step in range(1, 41)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_ring(run_dir, 0, 1, now_in("forward"))
    assert look(run_dir).seconds_left == pytest.approx((1 - 0.9) / 0.02 * 0.2)
    make_ring(run_dir, 0, 1, now_in("end"), pid=dead_pid())
    (run_dir / "logs").mkdir()
    (run_dir / "logs/rank-0.log").write_text("step 40\n")
    assert look(run_dir).state == "finished"
    (run_dir / "logs/rank-0.log").write_text("stopped at step 40, which is saved\n")
    assert look(run_dir).state == "stopped"


def test_run_that_failed_says_which_rank_failed_first_and_its_exit_code(tmp_path, capsys):
    run_dir = make_run(tmp_path / "run")
    make_ring(run_dir, 0, 2, now_in("reduce"), pid=dead_pid())
    append_incident(run_dir, "rank_failed", "rank 1 failed first, killed by SIGKILL", step=40, rank=1, code=137)
    assert main(["status", str(run_dir)]) == 1
    said = capsys.readouterr().out
    assert "failed: rank 1 failed first, killed by SIGKILL; exit code 137" in said
    assert f"millstream logs {run_dir}" in said and "1, the only one" in said


def test_failure_of_an_earlier_start_is_not_that_of_the_newest(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=100)
    append_incident(run_dir, "rank_failed", "rank 1 failed first", step=40, rank=1, code=1)
    time.sleep(0.01)
    make_ring(run_dir, 0, 1, now_in("end", 100), pid=dead_pid())
    assert look(run_dir).state == "finished"


def test_run_whose_processes_are_gone_without_a_word_has_ended(tmp_path, capsys):
    run_dir = make_run(tmp_path / "run")
    make_ring(run_dir, 0, 1, now_in("forward"), pid=dead_pid())
    assert main(["status", str(run_dir)]) == 1
    assert "ended: its processes are gone and nothing says why" in capsys.readouterr().out


def test_run_that_ended_before_its_first_step_shows_its_last_line(tmp_path):
    write_launch(tmp_path, Launch("local", ["millstream"], pid=dead_pid()))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank-0.log").write_text("data.dir=nowhere: no manifest.json\n")
    run = look(tmp_path)
    assert run.state == "ended" and run.why.endswith("the last it said: data.dir=nowhere: no manifest.json")


def test_number_that_now_belongs_to_another_program_is_not_the_run(tmp_path):
    run_dir = make_run(tmp_path / "run")
    other = subprocess.Popen(["sleep", "60"])
    try:
        make_ring(run_dir, 0, 1, now_in("forward", seconds_ago=90), pid=other.pid, started=time.time() - 100)
        write_launch(run_dir, Launch("local", [], pid=other.pid, started="2026-01-01T00:00:00+00:00"))
        assert look(run_dir).state == "ended"
    finally:
        other.kill()
        other.wait()


def test_run_of_another_machine_is_judged_by_its_marks(tmp_path):
    run_dir = make_run(tmp_path / "run")
    make_ring(run_dir, 0, 1, now_in("forward"), host="node7")
    assert (look(run_dir).state, "on node7" in look(run_dir).why) == ("running", True)
    make_ring(run_dir, 0, 1, now_in("forward", seconds_ago=7200), host="node7", started=time.time() - 9000)
    assert look(run_dir).state == "silent" and "no mark for 2 h" in look(run_dir).why


def test_run_whose_launcher_is_here_and_whose_ranks_are_elsewhere_is_running(tmp_path):
    run_dir = make_run(tmp_path / "run")
    make_ring(run_dir, 0, 1, now_in("forward"), host="node7")
    write_launch(run_dir, Launch("hosts", ["millstream"], pid=os.getpid()))
    assert (look(run_dir).state, look(run_dir).why) == ("running", "")
    make_ring(run_dir, 0, 1, now_in("forward", seconds_ago=600), host="node7")
    assert look(run_dir).why == "but no rank has made a mark for 10 min"


def test_stopped_process_of_a_rank_is_named(tmp_path):
    run_dir = make_run(tmp_path / "run")
    process = subprocess.Popen([sys.executable, "-S", "-c", "import os; os.kill(os.getpid(), 19)"])
    try:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        make_ring(run_dir, 0, 1, now_in("forward"), pid=process.pid)
        assert "rank 0 is stopped (SIGSTOP)" in look(run_dir).why
    finally:
        process.kill()
        process.wait()


def test_several_runs_are_a_table(tmp_path, capsys):
    for name in ("first", "second"):
        make_run(tmp_path / name, steps=100)
        make_ring(tmp_path / name, 0, 1, now_in("end", 100), pid=dead_pid())
    assert main(["status", str(tmp_path / "first"), str(tmp_path / "second")]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["run", "state", "step"]
    assert [row.split()[1:3] for row in rows] == [["finished", "100/100"]] * 2


def test_fine_tuning_shows_the_seed_it_is_at_and_is_finished_with_its_results(tmp_path):
    make_run(tmp_path / "seed-2", steps=7)
    (tmp_path / "config.yaml").write_text("task: classification\n")
    make_ring(tmp_path, 0, 1, now_in("forward", 7), pid=dead_pid(), started=time.time() - 10)
    assert (look(tmp_path).state, look(tmp_path).step) == ("ended", 7)
    (tmp_path / "results.json").write_text("{}")
    assert look(tmp_path).state == "finished"


def test_directory_that_is_no_run_is_a_mistake_and_names_the_runs_in_it(tmp_path):
    make_run(tmp_path / "mine")
    with pytest.raises(ConfigError, match=r"not the directory of a run.*runs in it: .*mine"):
        look(tmp_path)
    with pytest.raises(ConfigError, match="no such directory"):
        look(tmp_path / "none")


def test_half_written_and_not_finite_lines_do_no_harm(tmp_path):
    run_dir = make_run(tmp_path / "run")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": NaN, "tokens_per_second": 1.0, "step_seconds": 0.2}\n{"step": 42, "lo')
    run = look(run_dir)
    assert run.step == 41 and "loss        nan" in describe(run)


def test_text_of_an_incident_cannot_steer_the_terminal(tmp_path):
    run_dir = make_run(tmp_path / "run")
    append_incident(run_dir, "spike", "a\x1b[2J\x07 spike\nof two lines")
    assert "\x1b" not in describe(look(run_dir)) and "\x07" not in describe(look(run_dir))


def test_answer_comes_at_once_however_long_the_run_and_without_heavy_imports(tmp_path):
    run_dir = make_run(tmp_path / "run")
    line = json.dumps({"step": 9, "loss": 1.0, "lr": 0.1, "tokens_per_second": 1.0, "step_seconds": 1.0}) + "\n"
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(line * 500_000)
    code = (
        "import sys; from launcher.cli import main; main(sys.argv[1:]);"
        "print('torch' in sys.modules, 'pydantic' in sys.modules)"
    )
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        said = subprocess.run(
            [sys.executable, "-c", code, "status", str(run_dir)], cwd=ROOT, capture_output=True, text=True
        )
        seconds.append(time.monotonic() - began)
        assert said.stdout.endswith("False False\n"), said.stderr
    assert min(seconds) < 0.3


def test_durations_are_for_people():
    assert [duration(s) for s in (0.04, 45, 700, 7200, 12000, 187200)] == [
        "0.0 s", "45 s", "12 min", "2 h", "3 h 20 min", "2 d 4 h"
    ]  # fmt: skip


def test_readers_path_is_a_path_not_a_flag():
    assert main(["status", "--all"]) == 2 and main(["status"]) == 2
