"""Datasets at an address, on real local servers: transferred once, kept in bounds, and never wrong."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from configs.schema import CacheConfig
from data_pipeline import remote_sources, store
from data_pipeline.shards import DataError, open_dataset, write_manifest, write_shard
from tests.conftest import ROOT, stays_in_shared_memory

NUM_SHARDS, SHARD_TOKENS = 5, 20_000
SHARDS = [f"shard-{number:05d}.tokens" for number in range(NUM_SHARDS)]


def write(directory: Path, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True)
    (directory / "tokenizer.json").write_text('{"model": {}}')
    entries = []
    for name in SHARDS:
        lengths = np.full(SHARD_TOKENS // 100, 100)
        entries.append(write_shard(directory / name, [(rng.integers(0, 5000, SHARD_TOKENS), lengths)], 5000))
    write_manifest(directory, entries, 5000, "tokenizer", "built from")
    return directory


class Server:
    """Serves a folder by http; notes what is asked for and does what `faults` say to the next answers for a file."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []  # names of files
        self.faults: dict[str, list[str]] = {}  # name -> for each of the next requests: "500", "cut", "damage" or ""
        self.num_active = self.most_active = 0  # answers being given: now, and at most
        self.drip_seconds = 0.0  # between two pieces of a shard, of ten
        handler = functools.partial(Handler, self, directory=str(folder))
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def count(self, name: str) -> int:
        return self.requests.count(name)


class Handler(SimpleHTTPRequestHandler):
    def __init__(self, owner: Server, *given, **options) -> None:
        self.owner = owner
        super().__init__(*given, **options)

    def log_message(self, *given) -> None:
        pass

    def do_GET(self) -> None:
        self.owner.num_active += 1
        self.owner.most_active = max(self.owner.most_active, self.owner.num_active)
        try:
            self.answer()
        finally:
            self.owner.num_active -= 1

    def answer(self) -> None:
        name = self.path.rpartition("/")[2]
        self.owner.requests.append(name)
        faults = self.owner.faults.get(name)
        self.fault = faults.pop(0) if faults else ""
        if self.fault.isdigit():
            self.send_error(int(self.fault))
        else:
            super().do_GET()

    def copyfile(self, source, outputfile) -> None:
        content = bytearray(source.read())
        if self.fault == "damage":
            content[len(content) // 2] ^= 4
        size = len(content) // 10 + 1
        for start in range(0, len(content) // 2 if self.fault == "cut" else len(content), size):
            try:
                outputfile.write(content[start : start + size])
            except ConnectionError:  # the reader was killed
                return
            if self.path.endswith(".tokens"):
                time.sleep(self.owner.drip_seconds)
        if self.fault == "cut":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module", autouse=True)
def shared_memory_is_left_as_it_was() -> Iterator[None]:
    before = set(os.listdir("/dev/shm"))
    yield
    assert not stays_in_shared_memory(before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("corpus") / "train")


@pytest.fixture
def server(corpus) -> Iterator[Server]:
    server = Server(corpus.parent)
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """What would be waited between attempts."""
    waited: list[float] = []
    monkeypatch.setattr(remote_sources, "time", SimpleNamespace(sleep=waited.append))
    return waited


@pytest.fixture(scope="module")
def s3(corpus) -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    settings = {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    import boto3
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # file systems of earlier tests know another endpoint
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for file in corpus.iterdir():
        client.upload_file(str(file), "bucket", f"corpus/train/{file.name}")
    yield "s3://bucket/corpus/train"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def config(folder: Path, **settings) -> CacheConfig:
    return CacheConfig(**{"dir": str(folder / "cache"), "retries": 3, **settings})


def cached(folder: Path) -> list[str]:
    """Names of the files in the folders of the cache."""
    return sorted(path.name for path in (folder / "cache").glob("*/*"))


def is_under_way(folder: Path, name: str) -> bool:
    """Whether there is a begun transfer of a file."""
    return any(found.startswith(store.PARTIAL) and found.endswith(name) for found in cached(folder))


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def read_elsewhere(url: str, folder: Path, tokens: str = "0, 10") -> subprocess.Popen:
    """Another process that reads tokens of the dataset through the same cache."""
    code = (
        "from configs.schema import CacheConfig; from data_pipeline.shards import open_dataset\n"
        f"data = open_dataset({url!r}, CacheConfig(dir={str(folder / 'cache')!r}))\n"
        f"print(data.tokens({tokens}).sum())"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_dataset_at_an_address_is_the_local_one(corpus, server, s3, tmp_path, kind):
    local = open_dataset(corpus)
    remote = open_dataset(s3 if kind == "s3" else f"{server.url}/train/", config(tmp_path))
    assert cached(tmp_path) == ["manifest.json", "tokenizer.json"]  # shards come when they are used
    assert np.array_equal(remote.gather(np.array([30_000]), 100), local.gather(np.array([30_000]), 100))
    assert cached(tmp_path) == ["manifest.json", SHARDS[1], "tokenizer.json"]
    assert np.array_equal(remote.tokens(0, remote.num_tokens), local.tokens(0, local.num_tokens))
    assert np.array_equal(remote.document_starts(0, 50_000), local.document_starts(0, 50_000))
    assert remote.fingerprint == local.fingerprint
    assert (remote.path / "tokenizer.json").read_bytes() == (corpus / "tokenizer.json").read_bytes()


def test_second_run_transfers_the_manifest_only(server, tmp_path):
    for _ in range(2):
        data = open_dataset(f"{server.url}/train", config(tmp_path))
        data.tokens(0, data.num_tokens)
    assert [server.count(name) for name in (*SHARDS, "tokenizer.json", "manifest.json")] == [1] * 6 + [2]


def test_processes_that_need_a_shard_at_once_transfer_it_once(corpus, server, tmp_path):
    server.drip_seconds = 0.3  # three seconds for a shard: all are there before it is complete
    others = [read_elsewhere(f"{server.url}/train", tmp_path) for _ in range(3)]
    expected = str(open_dataset(corpus).tokens(0, 10).sum())
    assert [other.communicate(timeout=60)[0].strip() for other in others] == [expected] * 3
    assert server.count(SHARDS[0]) == 1
    assert server.count("manifest.json") == 3


def test_transfer_of_a_killed_process_is_begun_again_and_nothing_of_it_stays(corpus, server, tmp_path):
    server.drip_seconds = 1
    other = read_elsewhere(f"{server.url}/train", tmp_path)
    wait_until(lambda: is_under_way(tmp_path, SHARDS[0]))
    other.kill()
    other.wait()
    assert is_under_way(tmp_path, SHARDS[0])  # what it left
    server.drip_seconds = 0
    data = open_dataset(f"{server.url}/train", config(tmp_path))
    assert cached(tmp_path) == ["manifest.json", "tokenizer.json"]
    assert np.array_equal(data.tokens(0, 10), open_dataset(corpus).tokens(0, 10))
    assert cached(tmp_path) == ["manifest.json", SHARDS[0], "tokenizer.json"]


def test_running_transfer_of_another_process_is_left_alone(server, tmp_path):
    server.drip_seconds = 0.2
    other = read_elsewhere(f"{server.url}/train", tmp_path)
    wait_until(lambda: is_under_way(tmp_path, SHARDS[0]))
    open_dataset(f"{server.url}/train", config(tmp_path))
    assert is_under_way(tmp_path, SHARDS[0])
    assert other.communicate(timeout=60)[0] and other.returncode == 0
    assert server.count(SHARDS[0]) == 1


def test_process_that_ends_during_a_prefetch_ends_soon_and_cleans_up(server, tmp_path):
    server.drip_seconds = 1  # the transfer would take ten seconds
    code = (
        "from configs.schema import CacheConfig; from data_pipeline.shards import open_dataset\n"
        f"data = open_dataset('{server.url}/train', CacheConfig(dir={str(tmp_path / 'cache')!r}))\n"
        "data.prefetch([0])\n"
        "import time; time.sleep(1.5)"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
    assert server.count(SHARDS[0]) == 1
    assert time.monotonic() - started < 8
    assert cached(tmp_path) == ["manifest.json", "tokenizer.json"]


@pytest.mark.parametrize("fault", ["500", "503", "cut", "damage"])
def test_failed_transfer_is_tried_again_after_growing_waits(corpus, server, tmp_path, waits, fault):
    data = open_dataset(f"{server.url}/train", config(tmp_path))
    server.faults[SHARDS[0]] = [fault, fault, fault]
    assert np.array_equal(data.tokens(0, 10), open_dataset(corpus).tokens(0, 10))
    assert server.count(SHARDS[0]) == 4
    assert waits == [0.5, 1, 2]
    assert cached(tmp_path) == ["manifest.json", SHARDS[0], "tokenizer.json"]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [("500", "500"), ("cut", "ClientPayloadError"), ("damage", "arrived, the manifest says 41624 with")],
)
def test_transfer_that_fails_for_good_names_shard_address_and_last_error(server, tmp_path, waits, fault, expected):
    data = open_dataset(f"{server.url}/train", config(tmp_path, retries=2))
    server.faults[SHARDS[1]] = [fault] * 10
    with pytest.raises(DataError) as caught:
        data.gather(np.array([20_000]), 10)
    message = str(caught.value)
    assert f"{server.url}/train/{SHARDS[1]}: cannot be read after 3 attempts" in message and expected in message
    assert server.count(SHARDS[1]) == 3
    assert cached(tmp_path) == ["manifest.json", "tokenizer.json"]


@pytest.mark.parametrize("status", ["403", "404"])
def test_answer_that_will_not_change_is_not_asked_for_again(server, tmp_path, waits, status):
    data = open_dataset(f"{server.url}/train", config(tmp_path))
    server.faults[SHARDS[0]] = [status] * 10
    with pytest.raises(DataError, match=f"{SHARDS[0]}: cannot be read .* check the address and your access"):
        data.tokens(0, 10)
    assert server.count(SHARDS[0]) == 1 and not waits


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_address_without_a_dataset_is_named(server, s3, tmp_path, waits, kind):
    url = "s3://bucket/nothing" if kind == "s3" else f"{server.url}/nothing"
    with pytest.raises(DataError, match=f"{url}/manifest.json: cannot be read .* check the address"):
        open_dataset(url, config(tmp_path))


def test_unknown_kind_of_address_is_named():
    with pytest.raises(DataError, match=r"ftp://host/corpus: .* address that starts with .*'s3://'"):
        open_dataset("ftp://host/corpus")


def test_shard_damaged_at_the_address_during_the_run_is_never_used(tmp_path, waits):
    folder = write(tmp_path / "corpus/train")
    server = Server(folder.parent)
    data = open_dataset(f"{server.url}/train", config(tmp_path))
    content = bytearray((folder / SHARDS[0]).read_bytes())
    content[1000] ^= 1
    (folder / SHARDS[0]).write_bytes(content)
    with pytest.raises(DataError, match="damaged on the way, or replaced since it was opened"):
        data.tokens(0, 10)


def test_changed_dataset_never_mixes_with_shards_of_the_old_one(tmp_path):
    write(tmp_path / "corpus/train")
    server = Server(tmp_path / "corpus")
    old = open_dataset(f"{server.url}/train", config(tmp_path))
    old_tokens = old.tokens(0, 30_000)
    (tmp_path / "corpus/train").rename(tmp_path / "corpus/old")
    write(tmp_path / "corpus/train", seed=1)
    new = open_dataset(f"{server.url}/train", config(tmp_path))
    expected = open_dataset(tmp_path / "corpus/train")
    assert np.array_equal(new.tokens(0, new.num_tokens), expected.tokens(0, expected.num_tokens))
    assert np.array_equal(old.tokens(0, 30_000), old_tokens)
    assert old.path != new.path


def test_damaged_manifest_at_an_address_is_named(tmp_path):
    folder = write(tmp_path / "corpus/train")
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"vocab_size": 5000', '"vocab_size": 5001'))
    server = Server(folder.parent)
    with pytest.raises(DataError, match=f"{server.url}/train/manifest.json: was changed after the build"):
        open_dataset(f"{server.url}/train", config(tmp_path))


def test_shard_damaged_in_the_cache_says_to_remove_it(server, tmp_path):
    data = open_dataset(f"{server.url}/train", config(tmp_path))
    data.prefetch([0])
    file = data.path / SHARDS[0]
    wait_until(file.exists)
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"{file}: is damaged between bytes 0 and 16383; remove it, then it is .*http"):
        data.tokens(0, 10)
    file.unlink()
    assert len(open_dataset(f"{server.url}/train", config(tmp_path)).tokens(0, 10)) == 10


def shard_bytes(corpus: Path) -> int:
    return json.loads((corpus / "manifest.json").read_text())["shards"][0]["bytes"]


def test_cache_stays_within_its_bound_and_drops_what_was_used_longest_ago(corpus, server, tmp_path):
    limit = 3 * shard_bytes(corpus) + 10_000  # three shards, and the other files
    data = open_dataset(f"{server.url}/train", config(tmp_path, max_bytes=limit))
    expected = open_dataset(corpus)
    for number in (0, 1, 2, 0, 3, 0, 4, 0):  # shard 0 is in use all the time
        start = number * SHARD_TOKENS + 5
        assert np.array_equal(data.gather(np.array([start]), 50), expected.gather(np.array([start]), 50))
        files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= limit
        time.sleep(0.02)  # the clock of file times ticks every few milliseconds
    assert [name for name in cached(tmp_path) if name in SHARDS] == [SHARDS[0], SHARDS[3], SHARDS[4]]
    assert server.count(SHARDS[0]) == 1


def test_transfers_at_the_same_time_stay_within_the_bound(corpus, server, tmp_path):
    server.drip_seconds = 0.05
    limit = shard_bytes(corpus) + 10_000
    data = open_dataset(f"{server.url}/train", config(tmp_path, max_bytes=limit))
    data.prefetch([0, 1])
    sizes = []
    while not all(server.count(name) for name in SHARDS[:2]) or any(is_under_way(tmp_path, name) for name in SHARDS):
        files = [path for path in (tmp_path / "cache").glob("*/*") if not path.name.startswith(store.LOCK)]
        with contextlib.suppress(FileNotFoundError):  # a transfer that got its name meanwhile
            sizes.append(sum(path.stat().st_size for path in files))
        time.sleep(0.01)
    assert shard_bytes(corpus) < max(sizes) <= limit


def test_removed_shard_is_unmapped_so_that_its_bytes_are_free(corpus, server, tmp_path):
    data = open_dataset(f"{server.url}/train", config(tmp_path, max_bytes=shard_bytes(corpus) + 10_000))
    for number in range(NUM_SHARDS):
        data.gather(np.array([number * SHARD_TOKENS]), 50)
    removed = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(data.path) in line]
    assert sum("(deleted)" in line for line in removed) <= 1  # it goes when the next shard is opened


def test_rows_of_a_removed_shard_can_still_be_read_and_later_come_back(corpus, server, tmp_path):
    data = open_dataset(f"{server.url}/train", config(tmp_path))
    first = data.tokens(0, 50)
    (data.path / SHARDS[0]).unlink()
    assert np.array_equal(data.tokens(0, 50), first)  # the mapping holds it
    data.tokens(SHARD_TOKENS, SHARD_TOKENS + 50)
    assert np.array_equal(data.tokens(0, 50), first)
    assert server.count(SHARDS[0]) == 2


def test_cache_smaller_than_a_shard_says_what_to_raise(server, tmp_path):
    data = open_dataset(f"{server.url}/train", config(tmp_path, max_bytes=30_000))
    with pytest.raises(DataError, match=r"data.cache.max_bytes=30000: a file of 41624 bytes .* raise it"):
        data.tokens(0, 10)


def test_prefetch_transfers_ahead_as_many_as_allowed(corpus, server, tmp_path):
    server.drip_seconds = 0.3
    data = open_dataset(f"{server.url}/train", config(tmp_path, prefetch_shards=2))
    started = time.monotonic()
    data.prefetch(range(1, NUM_SHARDS))
    assert time.monotonic() - started < 1.5  # it does not wait for the transfers, which take three seconds
    wait_until(lambda: server.count(SHARDS[2]))
    data.prefetch(range(1, NUM_SHARDS))
    time.sleep(0.2)
    assert [server.count(name) for name in SHARDS] == [0, 1, 1, 0, 0]
    start = 2 * SHARD_TOKENS
    assert np.array_equal(data.tokens(start, start + 9), open_dataset(corpus).tokens(start, start + 9))
    wait_until(lambda: SHARDS[1] in cached(tmp_path))
    data.prefetch(range(1, NUM_SHARDS))
    wait_until(lambda: server.count(SHARDS[4]))
    assert [server.count(name) for name in SHARDS] == [0, 1, 1, 1, 1]


def test_shards_of_one_batch_are_transferred_side_by_side(corpus, server, tmp_path):
    server.drip_seconds = 0.05
    data = open_dataset(f"{server.url}/train", config(tmp_path, prefetch_shards=3))
    starts = np.arange(NUM_SHARDS) * SHARD_TOKENS
    assert np.array_equal(data.gather(starts, 50), open_dataset(corpus).gather(starts, 50))
    assert server.most_active in (3, 4)  # those ahead, and one that is needed now
    assert [server.count(name) for name in SHARDS] == [1] * NUM_SHARDS


def test_failed_prefetch_is_told_when_the_shard_is_used(server, tmp_path, waits):
    data = open_dataset(f"{server.url}/train", config(tmp_path))
    server.faults[SHARDS[0]] = ["404"] * 10
    data.prefetch([0])
    with pytest.raises(DataError, match=f"{SHARDS[0]}: cannot be read"):
        data.tokens(0, 10)


def test_process_forked_during_a_transfer_goes_on_by_itself(corpus, server, tmp_path):
    data = open_dataset(f"{server.url}/train", config(tmp_path, prefetch_shards=1))
    server.drip_seconds = 0.1
    data.prefetch([0])
    wait_until(lambda: server.count(SHARDS[0]))
    child = os.fork()
    if child == 0:  # it has neither the threads nor the locks of its parent
        num_tokens = len(data.tokens(0, 10))
        data.prefetch([1])
        wait_until(lambda: SHARDS[1] in cached(tmp_path))
        os._exit(0 if num_tokens == 10 else 1)
    status: list[int] = []
    wait_until(lambda: (ended := os.waitpid(child, os.WNOHANG))[0] == child and not status.append(ended[1]))
    assert status == [0]
    assert [server.count(name) for name in SHARDS[:2]] == [1, 1]


def test_lock_of_a_killed_process_does_not_live_on_in_its_children(server, tmp_path):
    server.drip_seconds = 1
    code = (
        "import os, time; from configs.schema import CacheConfig; from data_pipeline.shards import open_dataset\n"
        f"data = open_dataset('{server.url}/train', CacheConfig(dir={str(tmp_path / 'cache')!r}))\n"
        "data.prefetch([0])\n"
        "time.sleep(0.5)\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True)\n"
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    try:
        assert is_under_way(tmp_path, SHARDS[0])
        server.drip_seconds = 0
        other = read_elsewhere(f"{server.url}/train", tmp_path)
        assert other.communicate(timeout=30)[0]
    finally:
        os.kill(child, signal.SIGKILL)


def test_cache_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"data.cache.dir=.*/cache: cannot be used .*set it to a folder"):
        open_dataset(f"{server.url}/train", config(tmp_path))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize(
    ("options", "expected"), [("ro", "Read-only file system"), ("size=60k", "No space left on device")]
)
def test_cache_on_a_read_only_or_full_disk_is_named(server, tmp_path, waits, options, expected):
    folder = tmp_path / "cache"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(DataError, match=rf"data.cache.dir=.*/cache: cannot be used .*{expected}"):
            data = open_dataset(f"{server.url}/train", config(tmp_path))
            data.tokens(0, data.num_tokens)
        assert not waits  # another attempt would not help
        assert not [name for name in cached(tmp_path) if name.startswith(".")]
    finally:
        # lazy: the shards that were read are still mapped
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_lock_that_was_waited_for_keeps_out_who_comes_later(tmp_path):
    """The first holder removes the file of the lock; the second, who waited for that file, must not hold a ghost."""
    path, is_held, may_end = tmp_path / "lock", threading.Event(), threading.Event()

    def second() -> None:
        with store.locked(path):
            is_held.set()
            may_end.wait(20)

    with store.locked(path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        assert not is_held.is_set()
    assert is_held.wait(20)
    with pytest.raises(BlockingIOError), store.locked(path, wait=False):
        pass
    may_end.set()
    thread.join()
    assert not list(tmp_path.iterdir())


def test_file_appears_complete_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), store.writing(tmp_path / "file") as file:
        file.write(b"half")
        raise KeyError
    assert not list(tmp_path.iterdir())
    with store.writing(tmp_path / "file") as file:
        file.write(b"whole")
        assert not (tmp_path / "file").exists()
    assert (tmp_path / "file").read_bytes() == b"whole"
