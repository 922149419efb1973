"""Sources at http and s3 addresses: real servers on this machine, with and without ranges, that fail now and then."""

from __future__ import annotations

import gzip
import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard

from configs.schema import BuildConfig
from data_pipeline import remote_sources
from data_pipeline.errors import DataError
from data_pipeline.sources import find_files, read_pieces, scan, size_of, stamp

SETTINGS = BuildConfig()
LINES = b"".join(b'{"text": "number %d and some more"}\n' % number for number in range(10_000))
TEXTS = [f"number {number} and some more" for number in range(10_000)]
NAMES = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"]


def write_corpus(folder: Path) -> Path:
    """One corpus in all formats; 0.4 MB as lines, so that it is got in several ranges."""
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(LINES, 1))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(LINES))
    table = pa.table({"text": TEXTS, "other": [os.urandom(50).hex() for _ in TEXTS]})
    parquet.write_table(table, folder / "a.parquet", row_group_size=1250, use_dictionary=False)
    (folder / "b.txt").write_text("a text", encoding="utf-8")
    return folder


class Handler(SimpleHTTPRequestHandler):
    """Python's own file server, which knows no ranges; counts what it serves, and fails on demand."""

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests.append(self.headers.get("Range"))
        fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, int):
            self.send_error(fault)
        elif fault == "reset":
            self.close_connection = True
        elif fault == "cut":
            body = self.body()
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            body = self.body()
            self.wfile.write(body)
            self.server.bytes_sent += len(body)

    def do_HEAD(self) -> None:
        if self.server.faults and self.server.faults[0] == "head":
            self.server.faults.pop(0)
            self.send_error(503)
        else:
            super().do_HEAD()

    def body(self) -> bytes:
        """Send the head, return what is to follow."""
        source = self.send_head()
        if source is None:
            return b""
        with source:
            return source.read()


class RangeHandler(Handler):
    """The same with ranges."""

    def body(self) -> bytes:
        if "Range" not in self.headers:
            return super().body()
        whole = Path(self.translate_path(self.path)).read_bytes()
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = whole[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(whole)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        return part


class LabellingHandler(Handler):
    """Calls a .gz an encoding of its content, as some servers do."""

    def end_headers(self) -> None:
        if self.path.endswith(".gz"):
            self.send_header("Content-Encoding", "gzip")
        super().end_headers()


class Server(ThreadingHTTPServer):
    def __init__(self, folder: Path, handler: type[Handler]) -> None:
        super().__init__(("127.0.0.1", 0), partial(handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[str | None] = []  # the range of each GET
        self.faults: list[int | str] = []  # of the GETs to come
        self.bytes_sent = 0


@contextmanager
def serving(folder: Path, handler: type[Handler]) -> Iterator[Server]:
    with Server(folder, handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def short_waits_and_small_ranges(monkeypatch):
    monkeypatch.setattr(remote_sources, "WAITS_SECONDS", (0.01, 0.01, 0.01))
    monkeypatch.setattr(remote_sources, "SMALLEST_RANGE", 1 << 14)


@pytest.fixture(params=[Handler, RangeHandler], ids=["stream", "ranges"])
def server(request, corpus) -> Iterator[Server]:
    with serving(corpus, request.param) as running:
        yield running


@pytest.fixture
def ranges(corpus) -> Iterator[Server]:
    with serving(corpus, RangeHandler) as running:
        yield running


def texts(url: str, piece_bytes: int = 1 << 62) -> list[str]:
    return [document.text for _, document in read_pieces(scan(url, SETTINGS, piece_bytes), SETTINGS)]


@pytest.mark.parametrize("name", NAMES)
def test_http_gives_the_documents_of_the_file(server, name):
    url = f"{server.url}/{name}"
    assert find_files([url]) == [url]
    pieces = scan(url, SETTINGS, 75_000)
    assert len(pieces) > 3
    assert [document.text for _, document in read_pieces(pieces, SETTINGS)] == TEXTS
    alone = [document.text for piece in reversed(pieces) for _, document in read_pieces([piece], SETTINGS)]
    assert sorted(alone) == sorted(TEXTS)


def test_text_file_over_http(server):
    assert texts(f"{server.url}/b.txt") == ["a text"]


def test_web_archive_over_http(server, corpus):
    warc = pytest.importorskip("tests.data_pipeline.test_warc_reader")
    archive = warc.Archive(corpus / "c.warc.gz")
    for number in range(10):
        archive.page(f"<p>{number}</p>".encode())
    archive.save()
    assert texts(f"{server.url}/c.warc.gz", 100) == [f"<p>{number}</p>" for number in range(10)]


def test_compressed_file_that_the_server_calls_an_encoding_comes_as_it_is(corpus):
    with serving(corpus, LabellingHandler) as running:
        assert texts(f"{running.url}/a.jsonl.gz") == TEXTS


def test_query_of_an_address_does_not_hide_the_kind_of_file(ranges):
    url = f"{ranges.url}/a.jsonl.zst?token=a/b.txt"
    assert find_files([url]) == [url]
    assert texts(url) == TEXTS


def test_only_the_bytes_of_a_piece_are_fetched(ranges):
    pieces = scan(f"{ranges.url}/a.jsonl", SETTINGS, 75_000)
    assert ranges.bytes_sent <= (len(pieces) + 2) * remote_sources.SMALLEST_RANGE  # the scan touches only the cuts
    ranges.bytes_sent = 0
    assert len(list(read_pieces(pieces[-1:], SETTINGS))) < 2_500
    assert ranges.bytes_sent < 75_000 + 3 * remote_sources.SMALLEST_RANGE < len(LINES)


def test_of_parquet_only_the_footer_and_the_rows_of_the_column_are_fetched(ranges, corpus):
    pieces = scan(f"{ranges.url}/a.parquet", SETTINGS, 75_000)
    ranges.bytes_sent = 0
    assert 2_000 < len(list(read_pieces(pieces[:1], SETTINGS))) < 4_000
    assert ranges.bytes_sent < (corpus / "a.parquet").stat().st_size / 2


@pytest.mark.parametrize("fault", [500, 503, 429, "reset", "cut"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst"])
def test_failure_of_a_moment_is_tried_again(server, name, fault):
    url = f"{server.url}/{name}"
    pieces = scan(url, SETTINGS, 75_000)
    server.faults += [fault, fault]
    assert [document.text for _, document in read_pieces(pieces, SETTINGS)] == TEXTS
    assert not server.faults


def test_failures_while_looking_for_the_file_are_tried_again(ranges):
    ranges.faults += ["head", 503]
    assert size_of(f"{ranges.url}/a.jsonl") == len(LINES)


@pytest.mark.parametrize("fault", [503, "reset", "cut"])
def test_server_that_keeps_failing_is_named_with_the_address(server, fault):
    url = f"{server.url}/a.jsonl"
    pieces = scan(url, SETTINGS, 75_000)
    server.faults += [fault] * 100
    with pytest.raises(DataError, match=rf"{url}: cannot be read after 4 attempts \(.*\); try later"):
        list(read_pieces(pieces, SETTINGS))


def test_server_that_is_gone_is_named_with_the_address(corpus):
    with serving(corpus, RangeHandler) as running:
        url = f"{running.url}/a.jsonl"
        pieces = scan(url, SETTINGS, 75_000)
    with pytest.raises(DataError, match=rf"{url}: cannot be read after 4 attempts \(.*\); try later"):
        list(read_pieces(pieces, SETTINGS))


@pytest.mark.parametrize("status", [401, 403])
def test_refusal_is_not_tried_again(ranges, status):
    url = f"{ranges.url}/a.jsonl"
    pieces = scan(url, SETTINGS, 75_000)
    ranges.requests.clear()
    ranges.faults += [status] * 100
    with pytest.raises(DataError, match=rf"{url}: cannot be read \(.*{status}.*\); check the address and your access"):
        list(read_pieces(pieces, SETTINGS))
    assert len(ranges.requests) == 1


def test_address_of_nothing_and_of_an_unknown_kind_is_named(ranges):
    with pytest.raises(DataError, match=f"{ranges.url}/none.jsonl: there is nothing at this address"):
        find_files([f"{ranges.url}/none.jsonl"])
    assert len(ranges.requests) <= 1
    with pytest.raises(DataError, match=f"{ranges.url}/: unknown kind of file"):
        find_files([f"{ranges.url}/"])
    with pytest.raises(DataError, match="is named twice"):
        find_files([f"{ranges.url}/a.jsonl", f"{ranges.url}/a.jsonl"])


@pytest.mark.parametrize("handler", [Handler, RangeHandler])
@pytest.mark.parametrize("change", ["unlink", "rewrite", "cut"])
def test_file_that_changes_on_the_server_is_refused(tmp_path, handler, change):
    file = write_corpus(tmp_path) / "a.jsonl"
    with serving(tmp_path, handler) as running:
        url = f"{running.url}/a.jsonl"
        pieces = scan(url, SETTINGS, 75_000)
        found = read_pieces(pieces, SETTINGS, lambda *_: None)
        next(found)
        if change == "unlink":
            file.unlink()
        elif change == "rewrite":
            file.write_bytes(LINES[::-1])
            os.utime(file, (1, 1))  # http tells times in seconds
        else:
            os.truncate(file, 75_000)
        expected = f"{url}: (is not there|was changed during the build)"
        with pytest.raises(DataError, match=expected):
            list(found)
        with pytest.raises(DataError, match=expected):
            list(read_pieces(pieces[-1:], SETTINGS))


# ---- s3


@pytest.fixture(scope="module")
def bucket(corpus) -> Iterator[str]:
    """A bucket on moto's server, found as users' are: by the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="corpora")
        for file in [*NAMES, "b.txt"]:
            client.upload_file(str(corpus / file), "corpora", f"web/{file}")
        client.put_object(Bucket="corpora", Key="web/deeper/c.jsonl", Body=b'{"text": "deeper"}\n')
        client.put_object(Bucket="corpora", Key="web/readme.md", Body=b"")
        yield "s3://corpora"
    server.stop()


def put(key: str, body: bytes) -> None:
    import boto3

    boto3.client("s3").put_object(Bucket="corpora", Key=key, Body=body)


@pytest.mark.parametrize("name", NAMES)
def test_s3_gives_the_documents_of_the_file(bucket, name):
    pieces = scan(f"{bucket}/web/{name}", SETTINGS, 75_000)
    assert len(pieces) > 3
    assert [document.text for _, document in read_pieces(pieces, SETTINGS)] == TEXTS
    assert next(read_pieces(pieces[2:3], SETTINGS))[1].text in TEXTS


def test_s3_globs_and_folders(bucket):
    assert find_files([f"{bucket}/web/*.parquet"]) == [f"{bucket}/web/a.parquet"]
    assert find_files([f"{bucket}/web/**/*.jsonl"]) == [f"{bucket}/web/a.jsonl", f"{bucket}/web/deeper/c.jsonl"]
    assert find_files([f"{bucket}/web/deeper", f"{bucket}/web/b.txt"]) == [
        f"{bucket}/web/deeper/c.jsonl", f"{bucket}/web/b.txt",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"holds both s3://corpora/web/a\.jsonl and s3://corpora/web/a\.jsonl\.gz"):
        find_files([f"{bucket}/web"])


def test_s3_addresses_of_nothing_are_named(bucket):
    for source in ("web/none.jsonl", "web/none/", "web/*.warc"):
        with pytest.raises(DataError, match=f"{bucket}/web/[a-z*.]*/?: (there is no such object|matches nothing)"):
            find_files([f"{bucket}/{source}"])
    with pytest.raises(DataError, match=r"s3://no-such-bucket/a\.jsonl: cannot be read \(.*bucket does not exist"):
        find_files(["s3://no-such-bucket/a.jsonl"])


def test_s3_object_that_changes_is_refused(bucket):
    url = f"{bucket}/change/a.jsonl"
    put("change/a.jsonl", LINES)
    before, pieces = stamp(url), scan(url, SETTINGS, 75_000)
    found = read_pieces(pieces, SETTINGS, lambda *_: None)
    next(found)
    put("change/a.jsonl", LINES.replace(b"some", b"SOME"))  # of the same size
    assert stamp(url) != before
    with pytest.raises(DataError, match=f"{url}: was changed during the build"):
        list(found)
    with pytest.raises(DataError, match=f"{url}: was changed during the build"):
        list(read_pieces(pieces[-1:], SETTINGS))


def test_s3_server_that_is_gone_is_named_with_the_address(bucket, monkeypatch):
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=f"{bucket}/web/a.jsonl: cannot be read after 4 attempts"):
        find_files([f"{bucket}/web/a.jsonl"])
    s3fs.S3FileSystem.clear_instance_cache()


def count_texts(url: str) -> int:
    return len(texts(url))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_process_reads_an_address_that_its_parent_has_read(bucket, method):
    url = f"{bucket}/web/a.jsonl.zst"
    assert count_texts(url) == len(TEXTS)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply_async(count_texts, [url]).get(60) == len(TEXTS)
