"""Duplicate search: what is found, and how fast: `python -m benchmarks.dedupe [TEXTS.jsonl[.zst]]`.

Found: edited copies of texts (words replaced, sentences in another order, put in a frame), by the true Jaccard
similarity of their 5-grams to the closest earlier text, computed without hashing.
Speed of signatures: ours against datasketch, rensa (installed for this run into a temporary folder; a peer that cannot
be installed is left out) and datatrove, on one thread, from texts to 256 MinHash values of 5-grams of words; of ours
an exact hash comes with them. datatrove gets the words from a regular expression, faster than its default, spaCy, and
hashes with SHA-1, its other choice (its default breaks with xxhash 4: text must be encoded). Contestants take turns,
because the speed of a shared machine drifts; a row is the median over the rounds with its range.
Speed of the search: documents a second on synthetic signatures, a tenth of them near-duplicates.
Without TEXTS the texts are random words.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import zstandard

from configs.schema import DedupeConfig
from data_pipeline.dedupe import KEPT, find_duplicates, mask_duplicates
from data_pipeline.minhash import NUM_VALUES, signature_dtype, signatures

CONFIG = DedupeConfig(exact=True, near=True)
WORD = re.compile(r"\w+")
PLANTED_ORIGINALS = 400
EDITED_SHARES = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
SEARCHED_DOCUMENTS = 400_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=2.0, help="of text that signatures are timed on")
    given = parser.parse_args()
    texts = list(read_texts(given.texts, int(given.megabytes * 1e6)))
    print(f"{len(texts):,} texts, {num_bytes(texts) / 1e6:.1f} MB, similarity {CONFIG.similarity}\n")
    print_found(texts[:PLANTED_ORIGINALS])
    with tempfile.TemporaryDirectory() as folder:
        print_signature_speed(texts, contestants(Path(folder) / "peers"), given.rounds)
        print_search_speed(Path(folder), given.rounds)


def read_texts(path: Path | None, wanted_bytes: int) -> Iterator[str]:
    if path is None:
        rng = np.random.default_rng(0)
        letters = np.array(list("etaoinshrdlu"))
        words = np.array(["".join(rng.choice(letters, length)) for length in rng.integers(1, 10, 30_000)])
        while wanted_bytes > 0:
            ranks = (rng.pareto(0.8, rng.integers(50, 400)) * 10).astype(int) % len(words)
            text = " ".join(words[ranks])
            yield text
            wanted_bytes -= len(text)
        return
    with path.open("rb") as file:
        content = zstandard.ZstdDecompressor().stream_reader(file) if path.suffix == ".zst" else file
        for line in io.TextIOWrapper(content, encoding="utf-8"):  # type: ignore[arg-type]
            text = json.loads(line)["text"]
            yield text
            wanted_bytes -= len(text.encode())
            if wanted_bytes <= 0:
                return


def num_bytes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def print_found(originals: list[str]) -> None:
    rng = np.random.default_rng(1)
    words = [text.split() for text in originals]
    vocabulary = sorted({word for text in words for word in text})
    copies = [
        " ".join(vocabulary[rng.integers(len(vocabulary))] if rng.random() < share else word for word in text)
        for share in EDITED_SHARES
        for text in words
    ]
    copies += [". ".join(rng.permutation(text.split(". "))) for text in originals]
    copies += [f"Home | News | Log in | Subscribe {text} Share this. All rights reserved." for text in originals]
    texts = originals + copies
    dropped = mask_duplicates(texts, CONFIG) != KEPT
    closest = closest_earlier(texts)
    bounds = [0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0 + 1e-9]
    print("| similarity to the closest earlier text | texts | dropped |\n|---|---|---|")
    for low, high in pairwise(bounds):
        inside = (closest >= low) & (closest < high)
        if inside.any():
            print(f"| {low:.2f} to {min(high, 1):.2f} | {inside.sum():,} | {dropped[inside].mean():.1%} |")
    true = closest >= CONFIG.similarity
    above, below = closest >= CONFIG.similarity + 0.05, closest < CONFIG.similarity - 0.05
    print(
        f"\nrecall {dropped[true].mean():.1%}, precision {true[dropped].mean():.1%}; dropped of the texts 0.05 or more "
        f"above the similarity asked for {dropped[above].mean():.1%}, 0.05 or more below {dropped[below].mean():.1%}\n",
        flush=True,
    )


def closest_earlier(texts: list[str]) -> np.ndarray:
    """The largest Jaccard similarity of each text's 5-grams to those of an earlier text."""
    sets = []
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    closest = np.zeros(len(texts))
    for number, text in enumerate(texts):
        words = WORD.findall(text.lower())
        mine = {tuple(words[start : start + 5]) for start in range(max(1, len(words) - 4))}
        shared: dict[int, int] = defaultdict(int)
        for shingle in mine:
            for holder in holders[shingle]:
                shared[holder] += 1
            holders[shingle].append(number)
        for holder, both in shared.items():
            closest[number] = max(closest[number], both / (len(mine) + len(sets[holder]) - both))
        sets.append(mine)
    return closest


def contestants(peers: Path) -> dict[str, Callable[[list[str]], object]]:
    """Name -> a function that makes all signatures of texts."""
    found: dict[str, Callable[[list[str]], object]] = {"millstream": lambda texts: signatures(texts, CONFIG)}
    # --no-deps: what they need is here
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(peers)]
    sys.path.append(str(peers))
    for make in (rensa, datasketch, datatrove):
        try:
            if make is not datatrove:
                subprocess.run([*command, make.__name__], check=True, capture_output=True, timeout=60)
            found[make.__name__] = make()
        except (ImportError, OSError, subprocess.SubprocessError) as error:
            print(f"{make.__name__} is left out: {error}\n")
    return found


def shingles(text: str) -> list[str]:
    words = WORD.findall(text.lower())
    return [" ".join(words[start : start + 5]) for start in range(max(1, len(words) - 4))]


def rensa() -> Callable[[list[str]], object]:
    from rensa import RMinHash

    return lambda texts: RMinHash.digest_matrix_from_token_sets([shingles(text) for text in texts], NUM_VALUES, 1)


def datasketch() -> Callable[[list[str]], object]:
    import xxhash
    from datasketch import MinHash

    def run(texts: list[str]) -> object:
        empty = MinHash(NUM_VALUES, hashfunc=xxhash.xxh32_intdigest)  # its default, SHA-1, is slower
        found = []
        for text in texts:
            minhash = empty.copy()
            minhash.update_batch([shingle.encode() for shingle in shingles(text)])
            found.append(minhash)
        return found

    return run


def datatrove() -> Callable[[list[str]], object]:
    from datatrove.pipeline.dedup import minhash
    from datatrove.utils.hashing import HashConfig

    class Words:
        def word_tokenize(self, text: str) -> list[str]:
            return WORD.findall(text)

    minhash.load_word_tokenizer = lambda language: Words()
    config = minhash.MinhashConfig(
        num_buckets=NUM_VALUES // 8, hashes_per_bucket=8, hash_config=HashConfig(hash_fc="sha1")
    )
    step = minhash.MinhashDedupSignature(tempfile.gettempdir(), config)

    def run(texts: list[str]) -> object:
        return [step.get_signature(found) for text in texts if (found := step.get_shingles(text)).size]

    return run


def print_signature_speed(texts: list[str], functions: dict[str, Callable[[list[str]], object]], rounds: int) -> None:
    size = num_bytes(texts) / 1e6
    speeds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function(texts[:20])  # imports, tables
    for _ in range(rounds):
        for name, function in functions.items():
            started = time.perf_counter()
            function(texts)
            speeds[name].append(size / (time.perf_counter() - started))
    print(f"| {NUM_VALUES} values a text | MB/s (range) | millstream is faster (range) |\n|---|---|---|")
    for name, values in speeds.items():
        ratios = [ours / other for ours, other in zip(speeds["millstream"], values, strict=True)]
        print(
            f"| {name} | {statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f}) | "
            f"{statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f}) |"
        )
    print(flush=True)


def print_search_speed(folder: Path, rounds: int) -> None:
    rng = np.random.default_rng(2)
    files = []
    for part in range(4):
        rows = np.frombuffer(rng.bytes(SEARCHED_DOCUMENTS // 4 * 272), dtype=signature_dtype(CONFIG)).copy()
        tenth = len(rows) // 10
        rows["values"][-tenth:] = rows["values"][:tenth]
        rows["values"][-tenth:, ::20] += 1  # similarity 0.95
        files.append(folder / f"{part}.npy")
        np.save(files[-1], rows)
    print("| search, documents | processes | documents/s (range) |\n|---|---|---|")
    for processes in (1, 2):
        speeds = []
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            pool.map(abs, range(processes))
            for number in range(rounds):
                work = folder / f"work-{processes}-{number}"
                started = time.perf_counter()
                found = find_duplicates(files, CONFIG, work, pool.map if processes > 1 else map, 4 << 20)
                speeds.append(SEARCHED_DOCUMENTS / (time.perf_counter() - started))
                assert found.near == SEARCHED_DOCUMENTS // 10
        low, high = min(speeds), max(speeds)
        print(
            f"| {SEARCHED_DOCUMENTS:,} | {processes} | {statistics.median(speeds):,.0f} ({low:,.0f}-{high:,.0f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
