"""Copies of checkpoints at real servers on this machine: s3 (moto's) and http, interrupted, slow, failing and gone."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from configs.incidents import read_incidents
from configs.load import ConfigError
from configs.phases import no_mark
from configs.schema import CheckpointConfig
from data_pipeline import remote_sources
from pretrain import checkpoint, upload
from pretrain.checkpoint import Fragment
from pretrain.saver import open_saver
from pretrain.state import TrainState
from tests.pretrain.test_train import config, lines, pretrain, words  # noqa: F401
from tests.ranks import finish, start_ranks


class Alone:
    """A group of one, without a process group."""

    rank, world_size, is_first = 0, 1, True
    mark = staticmethod(no_mark)

    def gather(self, value):
        return [value]

    def any(self, *flags):
        return list(flags)

    def barrier(self):
        pass


class Server(ThreadingHTTPServer):
    """Keeps what is PUT in a folder and lists its folders; fails as often as `failures` says, waits for `gate`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url, self.folder = f"http://127.0.0.1:{self.server_port}", folder
        self.failures, self.puts = 0, list[str]()
        self.gate = threading.Event()
        self.gate.set()


class Handler(SimpleHTTPRequestHandler):
    def do_PUT(self) -> None:
        self.server.gate.wait(30)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
            return
        path = Path(self.translate_path(self.path))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        self.server.puts.append(self.path)
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    (tmp_path / "server").mkdir()
    with Server(tmp_path / "server") as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.gate.set()
        running.shutdown()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket on moto's server, found as users' are: by the environment, which the ranks of a test inherit."""
    import boto3
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(port=0)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="runs")
        yield "s3://runs"
    running.stop()


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(upload, "WAITS_SECONDS", (0.01, 0.01, 0.01))
    monkeypatch.setattr(remote_sources, "WAITS_SECONDS", (0.01, 0.01))


@pytest.fixture(params=["s3", "http", "folder"])
def address(request, tmp_path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    return f"{request.getfixturevalue('server').url}/run" if request.param == "http" else f"file://{tmp_path}/far/run"


def save(run_dir: Path, address: str, *steps: int, **more) -> None:
    with open_saver(run_dir, CheckpointConfig(upload=address, **more), Alone()) as saver:
        for step in steps:
            saver.save(TrainState(step, step), [Fragment("w", (5,), 0, {"master": torch.full((5,), float(step))})], {})


def fetch(address: str, run_dir: Path, said: list[str] | None = None) -> checkpoint.Checkpoint | None:
    return upload.fetch_newest(address, run_dir, (said if said is not None else []).append, Alone())


def kinds(run_dir: Path) -> list[str]:
    return [incident["kind"] for incident in read_incidents(run_dir)]


def test_every_finished_checkpoint_arrives_and_the_newest_comes_back(tmp_path, address):
    save(tmp_path / "run", address, 1, 2, 3)
    assert upload.list_steps(address, Alone()) == ["step-00000001", "step-00000002", "step-00000003"]
    found = fetch(address, tmp_path / "other")
    assert found.step == 3 and found.path == tmp_path / "other/checkpoints/step-00000003"
    assert checkpoint.weights(found)("w").tolist() == [3.0] * 5
    assert [p.name for p in (tmp_path / "other/checkpoints").iterdir()] == ["step-00000003"]
    assert kinds(tmp_path / "run") == []


def test_address_with_nothing_has_no_checkpoint(tmp_path, address):
    assert fetch(address, tmp_path / "run") is None


def test_manifest_is_sent_last(tmp_path, server):
    save(tmp_path / "run", server.url, 1)
    assert server.puts == ["/step-00000001/rank-00000.safetensors", "/step-00000001/manifest.json"]


@pytest.mark.parametrize("damage", ["no manifest", "no file", "alter", "cut", "manifest", "escape"])
def test_what_is_unfinished_or_damaged_there_is_named_and_the_one_before_comes_back(tmp_path, server, damage):
    save(tmp_path / "run", server.url, 1, 2)
    newest = server.folder / "step-00000002"
    file, manifest = newest / "rank-00000.safetensors", newest / "manifest.json"
    content = bytearray(file.read_bytes())
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "no file":
        file.unlink()
    elif damage == "alter":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "manifest":
        manifest.write_bytes(manifest.read_bytes().replace(b'"step": 2', b'"step": 3'))
    else:
        text = manifest.read_bytes().replace(b"rank-00000.safetensors", b"../../../rank-00000")
        text = text[: text.rfind(b",")]
        manifest.write_bytes(text + checkpoint._last_line(text))
    said: list[str] = []
    assert fetch(server.url, tmp_path / "other", said).step == 1
    assert f"getting {server.url}/step-00000001" in said
    assert f"{server.url}/step-00000002" in "".join(said) and "going back to an earlier checkpoint" in "".join(said)
    assert checkpoint.newest_valid(tmp_path / "other").step == 1


def test_failure_that_passes_is_tried_again(tmp_path, server):
    server.failures = 2
    save(tmp_path / "run", server.url, 1)
    assert fetch(server.url, tmp_path / "other").step == 1
    assert kinds(tmp_path / "run") == []


def test_failure_that_stays_is_told_and_stops_nothing(tmp_path, server, capsys):
    server.failures = 100
    save(tmp_path / "run", server.url, 1)
    assert checkpoint.newest_valid(tmp_path / "run").step == 1
    assert kinds(tmp_path / "run") == ["upload_failed"]
    assert "was not copied to http" in capsys.readouterr().err
    assert fetch(server.url, tmp_path / "other") is None


def test_what_did_not_arrive_is_copied_at_the_next_start(tmp_path, server):
    server.failures = 100
    save(tmp_path / "run", server.url, 1)
    server.failures = 0
    save(tmp_path / "run", server.url)
    assert fetch(server.url, tmp_path / "other").step == 1
    sent = len(server.puts)
    save(tmp_path / "run", server.url)
    assert len(server.puts) == sent


def test_checkpoint_on_its_way_is_kept_until_it_has_arrived_and_what_was_removed_is_told(tmp_path, server):
    server.gate.clear()
    with open_saver(tmp_path / "run", CheckpointConfig(upload=server.url, keep_last=1), Alone()) as saver:
        for step in (1, 2, 3):
            saver.save(TrainState(step), [Fragment("w", (5,), 0, {"master": torch.zeros(5)})], {})
            saver.finish()
            while saver.uploader.current is None:
                time.sleep(0.01)
        names = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
        assert names == ["step-00000001", "step-00000003"]
        server.gate.set()
    assert upload.list_steps(server.url, Alone()) == ["step-00000001", "step-00000003"]
    assert kinds(tmp_path / "run") == ["upload_skipped"]
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000003"]


def test_end_of_a_run_waits_no_longer_than_it_says(tmp_path, server, monkeypatch):
    server.gate.clear()
    uploader = upload.Uploader(tmp_path / "run", server.url)
    with open_saver(tmp_path / "run", CheckpointConfig(), Alone()) as saver:
        saver.save(TrainState(1), [Fragment("w", (5,), 0, {"master": torch.zeros(5)})], {})
    uploader.add(tmp_path / "run/checkpoints/step-00000001")
    began = time.monotonic()
    upload.wait_at_end(uploader, 1, Alone(), limit_seconds=1)
    assert 1 <= time.monotonic() - began < 5
    assert kinds(tmp_path / "run") == ["upload_unfinished"]


def test_address_that_does_not_answer_is_no_reason_to_start_anew(tmp_path):
    with pytest.raises(ConfigError, match=r"http://127.0.0.1:9.*cannot be brought .*start the same command again"):
        fetch("http://127.0.0.1:9/run", tmp_path)


def test_bucket_that_does_not_exist_is_named(tmp_path, bucket):
    with pytest.raises(ConfigError, match=r"s3://no-such-bucket/run.*bucket does not exist"):
        fetch("s3://no-such-bucket/run", tmp_path)
    with pytest.raises(ConfigError, match=r"checkpoint\.upload=nothing://run: Protocol not known"):
        fetch("nothing://run", tmp_path)


@pytest.mark.distributed
@pytest.mark.parametrize("config", ["gpt"], indirect=True)
def test_run_whose_directory_was_lost_goes_on_from_the_address_with_the_same_numbers(config, bucket):  # noqa: F811
    address = f"checkpoint.upload={bucket}/lost"
    whole = pretrain(config, "whole", 2, address)
    for name in os.listdir(whole / "checkpoints"):
        shutil.rmtree(whole / "checkpoints" / name)
    import boto3

    boto3.client("s3").delete_object(Bucket="runs", Key="lost/step-00000008/manifest.json")
    run_dir = pretrain(config, "found", 2, address)
    log = (config.parent / "found-logs/rank-0.log").read_text()
    assert "s3://runs/lost/step-00000008: is unfinished (has no manifest.json); going back" in log
    assert f"going on from {run_dir}/checkpoints/step-00000006" in log
    assert lines(run_dir) == [line for line in lines(whole) if line["step"] > 6]

    never = words(config, config.parent / "never", address, "train.resume=never")
    assert finish(start_ranks(2, never, config.parent / "never-logs")) == [2, 2]
    assert "s3://runs/lost has step-00000008; choose another" in (config.parent / "never-logs/rank-1.log").read_text()
