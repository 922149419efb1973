"""Finding files, what is refused, and files that change while they are read."""

from __future__ import annotations

import gzip
import json
import os
import stat
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard
from fsspec.registry import _registry

from configs.schema import BuildConfig
from data_pipeline import sources
from data_pipeline.errors import DataError
from data_pipeline.sources import find_files, read_piece, read_pieces, scan

SETTINGS = BuildConfig()
LINE = b'{"text": "x"}\n'


def error_of(*named: str | Path) -> str:
    with pytest.raises(DataError) as caught:
        find_files([str(source) for source in named])
    return str(caught.value)


def names(*named: str | Path, below: Path) -> list[str]:
    return [str(Path(file).relative_to(below)) for file in find_files([str(source) for source in named])]


def make(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(LINE)
    return folder


def test_all_formats_give_the_same_texts(tmp_path):
    texts = ["first text", "zweiter Text, größer", "三番目\nwith a second line"]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    parquet.write_table(pa.table({"text": texts}), tmp_path / "d.parquet")
    for number, text in enumerate(texts):
        (tmp_path / f"e{number}.txt").write_text(text, encoding="utf-8")
    pieces = [piece for file in find_files([str(tmp_path)]) for piece in scan(file, SETTINGS, 10)]
    assert [document.text for _, document in read_pieces(pieces, SETTINGS)] == texts * 5


def test_folders_and_globs_are_sorted_and_sources_keep_their_order(tmp_path):
    make(tmp_path, "b.txt", "a.txt", "in/z.jsonl", "in/c.parquet", "in/notes.md", "other/d.txt")
    assert names(tmp_path, below=tmp_path) == ["a.txt", "b.txt", "in/c.parquet", "in/z.jsonl", "other/d.txt"]
    assert names(f"{tmp_path}/*.txt", below=tmp_path) == ["a.txt", "b.txt"]
    assert names(f"{tmp_path}/**/*.txt", below=tmp_path) == ["a.txt", "b.txt", "other/d.txt"]
    assert names(tmp_path / "other", tmp_path / "b.txt", tmp_path / "in", below=tmp_path) == [
        "other/d.txt", "b.txt", "in/c.parquet", "in/z.jsonl",
    ]  # fmt: skip


def test_glob_over_folders_expands_them(tmp_path):
    make(tmp_path, "a/x.txt", "b/y.txt", "b/deeper/z.txt")
    assert names(f"{tmp_path}/*", below=tmp_path) == ["a/x.txt", "b/deeper/z.txt", "b/y.txt"]


def test_hidden_files_in_folders_are_left_out(tmp_path):
    make(tmp_path, "a.jsonl", "._a.jsonl", ".cache/b.jsonl", ".cache/deeper/c.jsonl")
    assert names(tmp_path, below=tmp_path) == ["a.jsonl"]


def test_file_whose_name_looks_like_a_glob_is_meant_as_itself(tmp_path):
    make(tmp_path, "a[1].txt", "a1.txt")
    assert names(tmp_path / "a[1].txt", below=tmp_path) == ["a[1].txt"]


def test_linked_folder_is_entered_and_a_circle_of_links_ends(tmp_path):
    make(tmp_path, "far/a.txt", "corpus/b.txt")
    (tmp_path / "corpus/link").symlink_to(tmp_path / "far")
    (tmp_path / "far/back").symlink_to(tmp_path / "corpus")
    assert names(tmp_path / "corpus", below=tmp_path) == ["corpus/b.txt", "corpus/link/a.txt"]


def test_datasets_on_disk_are_one_source_each(tmp_path):
    make(tmp_path, "a/dataset_info.json", "a/data-00000-of-00001.arrow", "b/dataset_dict.json", "c/x.txt")
    assert names(tmp_path / "a", below=tmp_path) == ["a"]
    assert names(tmp_path, below=tmp_path) == ["a", "b", "c/x.txt"]


def test_folder_named_like_a_file_is_a_folder(tmp_path):
    make(tmp_path, "a.jsonl/b.txt")
    assert names(tmp_path / "a.jsonl", below=tmp_path) == names(tmp_path, below=tmp_path) == ["a.jsonl/b.txt"]


def test_docstrings_need_no_file():
    assert find_files(["docstrings:"]) == ["docstrings:"]


def test_sources_that_do_not_exist_or_are_of_an_unknown_kind_are_named(tmp_path):
    assert "none*.txt: no such file or folder, and as a glob it matches nothing" in error_of(tmp_path / "none*.txt")
    make(tmp_path, "a.docx", "empty/readme.md")
    assert "a.docx: unknown kind of file; known: .txt, .jsonl" in error_of(tmp_path / "a.docx")
    assert "empty: holds no file of a known kind (.txt, .jsonl" in error_of(tmp_path / "empty")
    assert "data.build.sources is empty" in error_of()
    assert "gs://bucket/a.txt: unknown kind of address; known: http://, https://, s3://" in error_of(
        "gs://bucket/a.txt"
    )
    with pytest.raises(DataError, match="unknown kind of file"):
        scan(str(tmp_path / "a.docx"), SETTINGS, 100)
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    assert "broken.txt: is not there" in error_of(tmp_path / "broken.txt")


@pytest.mark.parametrize("again", ["a.txt", "in/../a.txt", "*.txt", ".", "linked.txt", "hard.txt"])
def test_file_found_twice_is_refused(tmp_path, again):
    make(tmp_path, "a.txt", "in/b.txt")
    if again == "linked.txt":
        (tmp_path / again).symlink_to(tmp_path / "a.txt")
    if again == "hard.txt":
        (tmp_path / again).hardlink_to(tmp_path / "a.txt")
    message = error_of(tmp_path / "a.txt", tmp_path / again)
    assert str(tmp_path / "a.txt") in message and "data.mixture" in message
    assert "named twice" in message or "the same file as" in message


def test_same_file_in_two_lists_can_be_refused(tmp_path):
    make(tmp_path, "a.txt", "b.txt")
    sources.refuse_repeated([f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"])
    with pytest.raises(DataError, match=r"a\.txt: is the same file as .*/\./a\.txt"):
        sources.refuse_repeated([f"{tmp_path}/./a.txt", f"{tmp_path}/b.txt", f"{tmp_path}/a.txt"])
    with pytest.raises(DataError, match="docstrings:: is named twice"):
        find_files(["docstrings:", "docstrings:"])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_file_beside_its_compressed_copy_is_refused(tmp_path, suffix):
    make(tmp_path, "a.jsonl", f"a.jsonl{suffix}", "b.jsonl")
    for source in (tmp_path, f"{tmp_path}/*"):
        assert f"holds both {tmp_path}/a.jsonl and {tmp_path}/a.jsonl{suffix}; remove one" in error_of(source)
    named = [f"{tmp_path}/a.jsonl", f"{tmp_path}/a.jsonl{suffix}"]
    assert find_files(named) == named  # who names them means them


def test_pipes_sockets_and_devices_are_refused(tmp_path):
    make(tmp_path, "in/a.txt")
    os.mkfifo(tmp_path / "in/pipe.jsonl")
    for source in (tmp_path / "in/pipe.jsonl", tmp_path / "in"):
        assert "pipe.jsonl: is a pipe, socket or device" in error_of(source)


def test_file_without_permission_is_named(tmp_path, monkeypatch):
    file = make(tmp_path, "a.jsonl", "b.jsonl") / "a.jsonl"
    file.chmod(0)
    if os.access(file, os.R_OK):  # root may read everything: then the system's answer is made up
        real = open

        def refusing(name, *args, **kwargs):
            if name == str(file):
                raise PermissionError(13, "Permission denied", name)
            return real(name, *args, **kwargs)

        monkeypatch.setattr("builtins.open", refusing)
    with pytest.raises(DataError, match=f"{file}: cannot be read \\(Permission denied\\)"):
        scan(str(file), SETTINGS, 100)
    assert stat.S_IMODE(file.stat().st_mode) == 0


@pytest.mark.parametrize(("source", "package"), [("s3://bucket/a.jsonl", "s3fs"), ("a.warc", "fastwarc.warc")])
def test_package_that_is_missing_is_named(tmp_path, monkeypatch, source, package):
    monkeypatch.chdir(tmp_path)
    Path("a.warc").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    monkeypatch.delitem(_registry, "s3", raising=False)  # which another test may have imported
    with pytest.raises(DataError, match=f"{source}: a package to read it is missing .*{package}"):
        [scan(file, SETTINGS, 100) for file in find_files([source])]


def scanned(tmp_path: Path, name: str = "a.jsonl") -> tuple[Path, list[sources.Piece]]:
    file = tmp_path / name
    content = b"".join(b'{"text": "%d"}\n' % number for number in range(100_000))
    file.write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    return file, scan(str(file), SETTINGS, 100_000)


def grow(file: Path) -> None:
    with open(file, "ab") as opened:
        opened.write(LINE)


def rewrite(file: Path) -> None:
    status = file.stat()
    file.write_bytes(file.read_bytes()[::-1])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # the least difference there is


def cut(file: Path) -> None:
    os.truncate(file, 50)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("change", [Path.unlink, grow, rewrite, cut])
def test_file_changed_between_scan_and_reading_is_refused_before_any_document(tmp_path, name, change):
    file, pieces = scanned(tmp_path, name)
    change(file)
    expected = "is not there \\(any more\\)" if change is Path.unlink else "was changed during the build \\(.* bytes, "
    for piece in (pieces[0], pieces[-1]):
        with pytest.raises(DataError, match=f"{file}: {expected}"):
            next(read_piece(piece, SETTINGS, lambda *_: None))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("change", [Path.unlink, grow, rewrite, cut])
def test_file_changed_while_it_is_read_is_refused_at_its_end(tmp_path, name, change):
    """Even where broken records are skipped: half a file is not a broken record."""
    file, pieces = scanned(tmp_path, name)
    found = read_pieces(pieces, SETTINGS, lambda *_: None)
    assert next(found)[1].text == "0"
    change(file)
    with pytest.raises(DataError, match=f"{file}: (is not there|was changed during the build)"):
        list(found)


def test_file_cut_off_below_a_piece_says_where_it_ends(tmp_path):
    """Where a file system keeps the time, the reader still notices."""
    file, pieces = scanned(tmp_path)
    piece = sources.Piece(str(file), pieces[-1].start, pieces[-1].stop + 1, 1)  # without a stamp
    with pytest.raises(DataError, match=f"{file}: ends at byte {pieces[-1].stop} of its content, before"):
        list(read_piece(piece, SETTINGS))


def test_size_of_is_that_of_the_file_as_it_lies_there(tmp_path):
    file, _ = scanned(tmp_path, "a.jsonl.gz")
    assert sources.size_of(str(file)) == file.stat().st_size
    assert sources.size_of("docstrings:") > 0
    with pytest.raises(DataError, match=r"none\.txt: is not there"):
        sources.size_of(str(tmp_path / "none.txt"))


def test_real_corpora_give_the_documents_that_zstandard_and_json_give(shared_data):
    for name in ("novels.valid.jsonl.zst", "udhr.jsonl.zst"):
        file = shared_data / "pretrain" / name
        with zstandard.open(file, "rt", encoding="utf-8", newline="\n") as lines:
            texts = [json.loads(line)["text"] for line in lines]
        pieces = scan(str(file), SETTINGS, 1 << 19)
        assert len(pieces) > 2
        assert [document.text for _, document in read_pieces(pieces, SETTINGS)] == [
            text for text in texts if text.strip()
        ]
