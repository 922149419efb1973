"""Duplicate removal: what is found and what stays, the same result for any division of the work, flat memory."""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import re
import signal
import subprocess
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from configs.schema import DedupeConfig
from data_pipeline import dedupe
from data_pipeline.dedupe import EXACT, KEPT, NEAR, find_duplicates, mask_duplicates, match
from data_pipeline.minhash import choose_bands, estimated_similarity, signature_dtype, signatures
from data_pipeline.shards import DataError
from tests.conftest import ROOT

CONFIG = DedupeConfig(exact=True, near=True)
WORDS = np.array([f"word{i}" for i in range(2000)])


def text(rng: np.random.Generator, length: int = 200) -> list[str]:
    return rng.choice(WORDS, length).tolist()


def kept(texts: list[str], config: DedupeConfig = CONFIG) -> list[str]:
    return [content for content, code in zip(texts, mask_duplicates(texts, config), strict=True) if code == KEPT]


def save_parts(directory: Path, parts: list[list[str]], config: DedupeConfig = CONFIG) -> list[Path]:
    files = [directory / f"part-{number}.npy" for number in range(len(parts))]
    for file, texts in zip(files, parts, strict=True):
        np.save(file, signatures(texts, config))
    return files


def mask_of(found: dedupe.Duplicates) -> list[int]:
    return np.concatenate([np.load(mask) for mask in found.masks]).tolist()


def true_similarity(texts: list[str]) -> tuple[sparse.coo_array, np.ndarray]:
    """(Jaccard similarity of the sets of word 5-grams of every later with every earlier text that shares one; whether
    each text has the words of an earlier one)."""
    ids: dict[tuple[str, ...], int] = {}
    indices: list[int] = []
    ends = [0]
    seen: set[tuple[str, ...]] = set()
    exact = []
    for content in texts:
        words = tuple(re.findall(r"\w+", content.lower()))
        exact.append(words in seen)
        seen.add(words)
        indices += {ids.setdefault(words[i : i + 5], len(ids)) for i in range(max(1, len(words) - 4))}
        ends.append(len(indices))
    sets = sparse.csr_array((np.ones(len(indices), np.int32), indices, ends), shape=(len(texts), len(ids)))
    both = sparse.tril(sets @ sets.T, -1).tocoo()
    sizes = np.diff(ends)
    either = sizes[both.row] + sizes[both.col] - both.data
    return sparse.coo_array((both.data / either, (both.row, both.col)), shape=both.shape), np.array(exact)


def closest_earlier(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of each text the largest similarity to an earlier one that has other words than all before it; whether it has
    the words of an earlier one."""
    pairs, exact = true_similarity(texts)
    counted = ~exact[pairs.col]
    closest = np.zeros(len(texts))
    np.maximum.at(closest, pairs.row[counted], pairs.data[counted])
    return closest, exact


def test_exact_duplicates_go_whatever_their_case_and_spacing_and_the_first_stays():
    assert kept(["A b c.", "a  b\nC", "a b d"]) == ["A b c.", "a b d"]


def test_without_near_only_equal_words_are_dropped():
    words = text(np.random.default_rng(0))
    texts = [" ".join(words), " ".join([*words[:-1], "other"]), " ".join(words).upper()]
    assert kept(texts, DedupeConfig(exact=True)) == texts[:2]
    assert kept(texts) == texts[:1]


def test_different_texts_all_stay():
    rng = np.random.default_rng(0)
    texts = [" ".join(text(rng)) for _ in range(500)]
    assert kept(texts) == texts


def test_nearly_all_documents_with_one_changed_word_are_found():
    rng = np.random.default_rng(1)
    originals = [text(rng) for _ in range(300)]
    changed = [[*words] for words in originals]
    for words in changed:  # one word of 200 is in 5 of 196 shingles: similarity 191 / 201 = 0.95
        words[rng.integers(200)] = "other"
    left = kept([" ".join(words) for words in originals + changed])
    assert len(left) == 300


def test_short_texts_of_fewer_words_than_a_shingle_are_compared_whole():
    assert kept(["one two", "one two three", "one two"]) == ["one two", "one two three"]


def test_a_document_is_dropped_for_an_earlier_one_even_if_that_is_dropped_itself():
    words = text(np.random.default_rng(2), 400)
    second = words[:40] + text(np.random.default_rng(3), 20) + words[60:]  # similarity to the first 0.89
    third = second[:340] + text(np.random.default_rng(4), 20) + second[360:]  # to the second 0.89, the first 0.79
    texts = [" ".join(each) for each in (words, second, third)]
    config = DedupeConfig(exact=True, near=True, similarity=0.85)
    assert kept(texts, config) == texts[:1]
    assert kept([texts[0], texts[2]], config) == [texts[0], texts[2]]


# (key, number) of documents, and how they come in pieces
GROUPED = st.lists(st.integers(0, 3), max_size=60)


@given(GROUPED, st.lists(st.integers(1, 20), min_size=1), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_match_compares_each_document_with_the_first_of_its_key_in_pieces_too(keys, sizes, salt):
    def same(later: np.ndarray, earlier: np.ndarray) -> np.ndarray:
        return np.array(
            [hash((int(a), int(b), salt)) % 3 == 0 for a, b in zip(later, earlier, strict=True)], dtype=bool
        )

    limit = 4
    groups: dict[int, list[int]] = defaultdict(list)
    expected = []
    for number, key in enumerate(keys):
        equal = [earlier for earlier in groups[key][:limit] if same(np.array([number]), np.array([earlier]))[0]]
        expected += [(number, equal[0])] if equal else []
        groups[key].append(number)
    found: list[tuple[int, ...]] = []
    known_keys, known_numbers, start = np.empty(0, np.uint64), np.empty(0, np.int64), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedupe, "GROUP_COMPARED", limit)
        while start < len(keys):
            stop = start + sizes[start % len(sizes)]
            num_known = len(known_keys)
            all_keys = np.concatenate([known_keys, np.array(keys[start:stop], dtype=np.uint64)])
            numbers = np.concatenate([known_numbers, np.arange(start, min(stop, len(keys)))])
            pairs, known = match(all_keys, numbers, num_known, same)
            found += [tuple(pair) for pair in pairs.T.tolist()]
            known_keys, known_numbers, start = all_keys[known], numbers[known], stop
            assert len(known) <= limit * len(set(keys[:stop]))
    assert sorted(found) == expected


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """600 texts: a third edited copies of earlier ones, some exact copies, one of them very often."""
    rng = np.random.default_rng(5)
    texts = [" ".join(text(rng, int(rng.integers(3, 120)))) for _ in range(300)]
    while len(texts) < 600:
        words = texts[rng.integers(len(texts))].split()
        if rng.random() < 0.6:
            words[rng.integers(len(words))] = "edited"
        texts.append(" ".join(words) if rng.random() < 0.7 else texts[7])
    return texts


def divided(texts: list[str], cuts: list[int]) -> list[list[str]]:
    return [texts[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(texts)], strict=True)]


def backwards(function, numbers):
    return [function(number) for number in reversed(numbers)]


def in_processes(function, numbers):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        return pool.map(function, numbers)


@pytest.mark.parametrize("bucket_bytes", [dedupe.BUCKET_BYTES, 400])
@pytest.mark.parametrize("cuts", [[], [0, 1, 300, 300, 600]])
@pytest.mark.parametrize("run", [map, backwards, in_processes])
def test_any_parts_buckets_and_processes_drop_the_same(corpus, tmp_path, monkeypatch, bucket_bytes, cuts, run):
    monkeypatch.setattr(dedupe, "SLICE_ROWS", 170)
    monkeypatch.setattr(dedupe, "MASK_ROWS", 200)
    monkeypatch.setattr(dedupe, "PAIRS_COMPARED", 13)
    parts = divided(corpus, cuts)
    found = find_duplicates(save_parts(tmp_path, parts), CONFIG, tmp_path / "work", run, bucket_bytes)
    assert [len(np.load(mask)) for mask in found.masks] == [len(part) for part in parts]
    mask = mask_of(found)
    assert mask == mask_duplicates(corpus, CONFIG).tolist()
    assert (found.exact, found.near) == (mask.count(EXACT), mask.count(NEAR))
    assert min(found.exact, found.near) > 50
    assert not list((tmp_path / "work").glob("keys/*"))


def earlier_duplicates(texts: list[str], number: int, kind: str) -> list[int]:
    """The earlier documents for which a document is dropped."""
    rows = signatures(texts[: number + 1], CONFIG)
    _, firsts = np.unique(rows["exact"], axis=0, return_index=True)
    before = np.setdiff1d(np.sort(firsts), [number])
    if kind == "exact":
        return before[(rows["exact"][before] == rows["exact"][number]).all(1)].tolist()
    mine = np.repeat(rows["values"][number][None], len(before), axis=0)
    keys = choose_bands(CONFIG.similarity).keys(rows["values"])
    near = estimated_similarity(rows["values"][before], mine) >= CONFIG.similarity
    return before[near & (keys[:, before] == keys[:, number][:, None]).any(0)].tolist()


def test_examples_are_the_first_dropped_documents_by_part_and_row_with_an_earlier_one(corpus, tmp_path):
    parts = divided(corpus, [100, 350])
    files = save_parts(tmp_path, parts)
    found = find_duplicates(files, CONFIG, tmp_path / "work")
    again = find_duplicates(files, CONFIG, tmp_path / "other", backwards, 600)
    assert found.examples == again.examples
    masks = [np.load(mask) for mask in found.masks]
    for kind, code in (("exact", EXACT), ("near", NEAR)):
        dropped = [(part, int(row)) for part, mask in enumerate(masks) for row in np.flatnonzero(mask == code)]
        assert [row for row, _ in found.examples[kind]] == dropped[: dedupe.NUM_EXAMPLES]
        for later, earlier in found.examples[kind]:
            number, expected = (sum(map(len, parts[:part])) + row for part, row in (later, earlier))
            same = earlier_duplicates(corpus, number, kind)
            assert expected == same[0]


def test_an_example_names_the_earliest_document_found_in_any_band(tmp_path):
    rows = np.zeros(3, dtype=signature_dtype(CONFIG))
    rows["exact"][:, 0] = range(3)
    rows["values"] = np.random.default_rng(0).integers(0, 256, 256)
    rows["values"][1:, :8] += 1  # the second and third agree in the first band, all three in others
    rows["values"][2:, 8:16] += 1
    np.save(tmp_path / "part.npy", rows)
    found = find_duplicates([tmp_path / "part.npy"], CONFIG, tmp_path / "work")
    assert found.examples["near"] == [((0, 1), (0, 0)), ((0, 2), (0, 0))]


def test_a_key_of_very_many_different_documents_is_passed_in_bounded_pieces(tmp_path):
    rng = np.random.default_rng(6)
    rows = np.zeros(3000, dtype=signature_dtype(CONFIG))
    rows["exact"] = rng.integers(0, 2**63, rows["exact"].shape)
    rows["values"] = rng.integers(0, 256, rows["values"].shape)
    rows["values"][:, :8] = 1  # all share a band
    rows[2500]["values"] = rows[2400]["values"]
    np.save(tmp_path / "part.npy", rows)
    found = find_duplicates([tmp_path / "part.npy"], CONFIG, tmp_path / "work", bucket_bytes=1600)
    assert np.flatnonzero(mask_of(found)).tolist() == [2500]  # through another band


def test_exact_hashes_that_agree_in_their_first_half_only_are_not_the_same(tmp_path):
    last = 2**64 - 1  # the end of the last bucket
    rows = np.zeros(6, dtype=signature_dtype(DedupeConfig(exact=True)))
    rows["exact"] = [(5, 1), (5, 2), (5, 2), (last, 1), (last, 2), (last, 1)]
    np.save(tmp_path / "part.npy", rows)
    found = find_duplicates([tmp_path / "part.npy"], DedupeConfig(exact=True), tmp_path / "work")
    assert mask_of(found) == [KEPT, KEPT, EXACT, KEPT, KEPT, EXACT]


def test_nothing_at_all_has_no_duplicates(tmp_path):
    assert find_duplicates([], CONFIG, tmp_path / "work").masks == []
    found = find_duplicates(save_parts(tmp_path, [[], []]), CONFIG, tmp_path / "work")
    assert [np.load(mask).tolist() for mask in found.masks] == [[], []]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from configs.schema import DedupeConfig
    from data_pipeline import dedupe

    moment, fsync, synced = int(sys.argv[1]), os.fsync, []
    def kill(descriptor):
        synced.append(descriptor)
        if len(synced) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)
    os.fsync = kill
    files = sorted(Path(sys.argv[2]).glob("*.npy"))
    dedupe.find_duplicates(files, DedupeConfig(exact=True, near=True), Path(sys.argv[2]) / "work", bucket_bytes=6000)
"""


@pytest.mark.parametrize("moment", [1, 4, 11, 30, 50])
def test_a_killed_search_goes_on_and_ends_as_if_it_had_not_been(corpus, tmp_path, moment, monkeypatch):
    files = save_parts(tmp_path, divided(corpus, [200, 400]))
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(moment), str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    written: list[Path] = []
    write = dedupe._write
    monkeypatch.setattr(dedupe, "_write", lambda path, content: (written.append(path), write(path, content)))
    work = tmp_path / "work"
    done = {path for path in work.rglob("*") if path.is_file() and not path.name.startswith(".writing-")}
    found = find_duplicates(files, CONFIG, work, bucket_bytes=6000)
    redone = {path for path in done & set(written) if path.suffix != ".keys"}  # keys without their rows are unfinished
    assert not redone
    assert len(done) >= moment - 1
    undisturbed = find_duplicates(files, CONFIG, tmp_path / "other")
    assert mask_of(found) == mask_of(undisturbed)
    assert found.examples == undisturbed.examples


def test_a_finished_search_is_not_done_again_but_one_of_changed_files_is(corpus, tmp_path):
    def refuse(function, numbers):
        raise AssertionError("nothing is left to do")

    files = save_parts(tmp_path, divided(corpus, [200, 400]))
    first = find_duplicates(files, CONFIG, tmp_path / "work")
    assert find_duplicates(files, CONFIG, tmp_path / "work", refuse) == first
    save_parts(tmp_path, [["new", "new"], *divided(corpus, [200, 400])[1:]])
    changed = find_duplicates(files, CONFIG, tmp_path / "work")
    assert mask_of(changed) == mask_of(find_duplicates(files, CONFIG, tmp_path / "other"))
    assert mask_of(changed)[:2] == [KEPT, EXACT]
    with pytest.raises(AssertionError, match="nothing"):
        find_duplicates(files, DedupeConfig(exact=True, near=True, similarity=0.9), tmp_path / "work", refuse)


@pytest.mark.parametrize("cut", [None, 3, 100, 500])
def test_a_file_that_holds_no_signatures_of_this_config_is_named(tmp_path, cut):
    (file,) = save_parts(tmp_path, [["one", "two", "three"]], DedupeConfig(exact=cut is None, near=cut is not None))
    if cut is not None:
        file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"part-0\.npy: .*; build this part again"):
        find_duplicates([file], CONFIG, tmp_path / "work")


# Recall and precision against the true similarity.


def edit(words: list[str], share: float, rng: np.random.Generator) -> list[str]:
    return [str(rng.choice(WORDS)) if rng.random() < share else word for word in words]


def reorder(words: list[str], rng: np.random.Generator) -> list[str]:
    sentences = [words[start : start + 25] for start in range(0, len(words), 25)]
    return [word for number in rng.permutation(len(sentences)) for word in sentences[number]]


def frame(words: list[str], rng: np.random.Generator) -> list[str]:
    size = int(rng.integers(2, 30))
    return [f"header{i}" for i in range(size)] + words + [f"footer{i}" for i in range(size)]


CHANGES = {
    **{f"{share:.1%} edited": functools.partial(edit, share=share) for share in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)},
    "reordered": reorder,
    "framed": frame,
}


@pytest.mark.parametrize("asked", [0.6, 0.8])
@pytest.mark.parametrize("across", [False, True], ids=["within a source", "across sources"])
def test_planted_near_duplicates_are_found_by_their_true_similarity(tmp_path, asked, across):
    rng = np.random.default_rng(7)
    config = DedupeConfig(exact=True, near=True, similarity=asked)
    originals = [text(rng, int(rng.integers(100, 400))) for _ in range(150)]
    changed = [change(words, rng=rng) for change in CHANGES.values() for words in originals]
    texts = [" ".join(words) for words in originals + changed]
    cuts = [150, 800] if across else []
    if not across:
        order = rng.permutation(len(texts))
        texts = [texts[number] for number in order]
    found = find_duplicates(save_parts(tmp_path, divided(texts, cuts), config), config, tmp_path / "work")
    dropped = np.array(mask_of(found)) > 0
    closest, _ = closest_earlier(texts)
    # the estimate's standard error is 0.025 to 0.03: beyond two of them nearly all pairs are decided rightly
    assert dropped[closest >= asked + 0.06].mean() >= 0.99
    assert dropped[closest >= asked].mean() >= 0.9
    assert (closest[dropped] >= asked - 0.06).mean() >= 0.99
    assert (closest[dropped] >= asked).mean() >= 0.9
    assert not dropped[closest < asked - 0.12].any()
    assert min((closest >= asked).sum(), (closest < asked - 0.12).sum()) > 200  # there was something to decide


def test_of_real_reviews_just_the_true_near_duplicates_are_dropped(shared_data, tmp_path):
    with (shared_data / "pretrain" / "reviews.jsonl.zst").open("rb") as file:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8")
        reviews = [json.loads(line)["text"] for line in lines]
    first: dict[str, int] = {}
    chosen = set(range(7000))
    for number, review in enumerate(reviews):
        words = " ".join(re.findall(r"\w+", review.lower()))
        if words in first:
            chosen |= {number, first[words]}
        first.setdefault(words, number)
    # and those that begin or end as another one: most of its near-duplicates
    for end in (slice(0, 80), slice(-80, None)):
        begins: dict[str, int] = {}
        for number, review in enumerate(reviews):
            chosen |= {number, begins[review[end]]} if review[end] in begins else set()
            begins.setdefault(review[end], number)
    texts = [reviews[number] for number in sorted(chosen)]
    files = save_parts(tmp_path, divided(texts, [len(texts) // 3, len(texts) // 2]))
    mask = np.array(mask_of(find_duplicates(files, CONFIG, tmp_path / "work")))
    closest, exact = closest_earlier(texts)
    np.testing.assert_array_equal(mask == EXACT, exact)
    assert exact.sum() >= 400
    near = (closest >= CONFIG.similarity) & ~exact
    assert near.sum() >= 15
    assert (mask[near] == NEAR).mean() >= 0.95
    assert (closest[mask > 0] >= CONFIG.similarity).mean() >= 0.99
    assert not mask[closest < CONFIG.similarity - 0.1].any()


MEASURED = """
    import sys
    from pathlib import Path
    from configs.schema import DedupeConfig
    from data_pipeline.dedupe import find_duplicates

    files = sorted(Path(sys.argv[1]).glob("*.npy"))[: int(sys.argv[2])]
    config = DedupeConfig(exact=True, near=True)
    found = find_duplicates(files, config, Path(sys.argv[1]) / "work", bucket_bytes=int(sys.argv[3]))
    # not ru_maxrss: that of the process that started this one is carried over
    (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    print(found.exact, found.near, int(peak.split()[1]) // 1024)
"""


def peak_mb(directory: Path, num_files: int, bucket_bytes: int) -> tuple[int, int, int]:
    """(exact, near, peak MB) of a search of the first files of `directory`, in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(MEASURED), str(directory), str(num_files), str(bucket_bytes)]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    exact, near, megabytes = map(int, output.split())
    return exact, near, megabytes


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_documents(tmp_path):
    rng = np.random.default_rng(8)
    num_files, rows_each = 12, 250_000
    previous = None
    for number in range(num_files):  # 3 million documents, 816 MB
        rows = np.frombuffer(rng.bytes(rows_each * 272), dtype=signature_dtype(CONFIG)).copy()
        rows[3000:5000] = rows[:2000]
        if previous is not None:  # a tenth are near-duplicates of the part before
            rows["values"][10_000:35_000] = previous[10_000:35_000]
            rows["values"][10_000:35_000, ::20] += 1
        previous = rows["values"]
        np.save(tmp_path / f"{number:02d}.npy", rows)
    small, large = peak_mb(tmp_path, 4, 8 << 20), peak_mb(tmp_path, num_files, 8 << 20)
    assert (small[0], large[0]) == (4 * 2000, num_files * 2000)
    assert large[1] > 0.9 * (num_files - 1) * 25_000
    assert large[2] < 350
    assert large[2] < small[2] + 30
    assert peak_mb(tmp_path, num_files, dedupe.BUCKET_BYTES)[2] < 500  # one bucket a band, three quarters full
    for file in tmp_path.glob("*.npy"):
        file.unlink()  # pytest would keep them for three runs


def test_bands_of_the_usual_similarity_take_the_disk_that_is_documented():
    assert choose_bands(0.8).num_bands * 12 == 204
