"""How a run was started last stands in its directory."""

from __future__ import annotations

import json
import socket

from configs.launches import Launch, read_launch, write_launch


def test_a_launch_is_read_back_with_its_host_and_time(tmp_path):
    written = write_launch(tmp_path / "run", Launch("slurm", ["millstream", "submit"], job="12", num_ranks=4))
    assert read_launch(tmp_path / "run") == written
    assert written.host == socket.gethostname() and written.started.endswith("+00:00")
    values = json.loads((tmp_path / "run/launch.json").read_text())
    assert (values["kind"], values["job"], values["pid"], values["num_ranks"]) == ("slurm", "12", None, 4)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["launch.json"]


def test_the_last_launch_counts_and_what_is_none_reads_as_none(tmp_path):
    assert read_launch(tmp_path) is None
    write_launch(tmp_path, Launch("local", ["a"], pid=1))
    write_launch(tmp_path, Launch("slurm", ["b"], job="2"))
    assert getattr(read_launch(tmp_path), "job", None) == "2"
    (tmp_path / "launch.json").write_text('{"kind": "local"')
    assert read_launch(tmp_path) is None
    (tmp_path / "launch.json").write_text('{"kind": "local"}')
    assert read_launch(tmp_path) is None
