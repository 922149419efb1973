"""What `millstream data inspect|head|verify` print, of a dataset that was really built."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from configs.load import ConfigError, load_pretrain
from configs.schema import PretrainConfig
from data_pipeline import build_steps, mixture, show
from data_pipeline.packing import packing_report
from data_pipeline.samples import mixture_stages, open_samples
from data_pipeline.shards import DataError, Dataset, open_dataset, write_manifest, write_shard
from data_pipeline.tokenizer import load_tokenizer
from tests.conftest import ROOT
from tests.data_pipeline.token_datasets import bert_config, lengths, write_dataset

WORDS = np.array(["the", "sun", "moon", "[red]stone[/red]", ":smile:", "東京", "runs", "slowly", "."])


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """The configuration of a dataset that is built, in the folder of that dataset."""
    folder = tmp_path_factory.mktemp("show")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 200))) for _ in range(300)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "config.yaml").write_text(
        f"run_dir: unused\ntrain: {{seq_len: 64, global_batch_size: 4, micro_batch_size: 1, num_steps: 50}}\n"
        f"data:\n  dir: {folder}/data\n  cache: {{dir: {folder}/cache}}\n"
        f"  build:\n    sources: [{folder}/corpus.jsonl]\n    validation_fraction: 0.1\n    num_workers: 1\n"
        f"    tokenizer: {{vocab_size: 300}}\n    shard_tokens: 10000\n"
    )
    build_steps.build(load_pretrain(folder / "config.yaml"), Console(quiet=True))
    return folder / "config.yaml"


def printed(function, *given) -> str:
    """What is printed where lines have 80 columns."""
    with open(os.devnull, "w") as nowhere:
        console = Console(width=80, record=True, file=nowhere, highlight=False, emoji=False, markup=False)
        function(*given, console)
        return console.export_text()


def split(config: Path, name: str = "train") -> Dataset:
    return open_dataset(config.parent / "data" / name)


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher.cli", "data", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})


def row(text: str, first: str) -> list[str]:
    """The cells of the first row that starts with `first`."""
    line = next(line for line in text.splitlines() if line.split() and line.split()[0] == first)
    return re.split(r"\s{2,}", line.strip())


def document_lengths(dataset: Dataset) -> list[int]:
    ranges = [dataset.document(number) for number in range(dataset.num_documents)]
    return [stop - start for start, stop in ranges]


# inspect


def test_inspect_gives_the_sizes(config):
    text = printed(show.inspect, str(config.parent / "data"), [])
    for name in ("train", "validation"):
        dataset = split(config, name)
        num_bytes = sum(file.stat().st_size for file in dataset.path.glob("*.tokens"))
        counts = [dataset.num_documents, dataset.num_tokens, len(dataset.shards), num_bytes]
        assert row(text, name) == [name, *(f"{count:,}" for count in counts)]
    assert f"vocabulary of {split(config).vocab_size}, ids of uint16" in text


def test_inspect_gives_the_lengths_of_documents(config):
    text = printed(show.inspect, str(config.parent / "data" / "train"), ["documents=0"])
    found = sorted(document_lengths(split(config)))
    assert f"train: {sum(found) / len(found):,.0f} tokens a document" in text
    assert f"median {found[(len(found) - 1) // 2]:,}, longest {found[-1]:,}" in text
    shown = {}
    for low, count, share in re.findall(r"([\d,]+) – [\d,]+ +([\d,]+) +([\d.]+) %", text):
        low = int(low.replace(",", ""))
        shown[low] = int(count.replace(",", ""))
        here = [length for length in found if low <= length < 2 * low]
        assert shown[low] == len(here) and abs(float(share) - 100 * sum(here) / sum(found)) < 0.051
    assert sum(shown.values()) == len(found) - found.count(1) and len(shown) > 5


@pytest.mark.parametrize(("sizes", "median"), [([1, 9, 5], 5), ([1, 9, 5, 7], 5), ([2, 2, 1], 2), ([4], 4)])
def test_median_is_the_lower_middle_one(tmp_path, sizes, median):
    text = printed(show.show_lengths, "train", write_dataset(tmp_path / "data", [sizes]))
    assert f"median {median}, longest {max(sizes)}" in text


def test_longest_bar_is_the_most_frequent_length(config):
    text = printed(show.inspect, str(config.parent / "data" / "train"), ["documents=0"])
    bars = [(line.count("█"), int(count)) for line in text.splitlines() for count in re.findall(r"– \d+ +(\d+)", line)]
    most = max(count for _, count in bars)
    assert all(length == -(-show.BAR_WIDTH * count // most) for length, count in bars) and len(bars) > 5


def test_inspect_shows_documents_from_all_over_the_dataset(config):
    text = printed(show.inspect, str(config.parent / "data" / "train"), ["documents=3"])
    dataset = split(config)
    tokenizer = load_tokenizer(dataset.path)
    for number in (dataset.num_documents // 6, dataset.num_documents // 2, 5 * dataset.num_documents // 6):
        start, stop = dataset.document(number)
        assert f"train, document {number:,}, {stop - start:,} tokens" in text
        whole = tokenizer.decode(dataset.tokens(start, stop).tolist())
        beginning = whole[: min(stop - start, show.SHOWN_CHARACTERS) // 2]
        assert re.sub(r"\s+", "", beginning) in re.sub(r"\s+", "", text)
    assert text.count("train, document") == 3 and "[red]" in text and ":smile:" in text


def test_no_line_is_wider_than_the_terminal(config):
    ran = run(
        "inspect", config, "picture=" + str(config.parent / "a.png"), "train.phases=[{from_step: 9, seq_len: 32}]"
    )
    assert ran.returncode == 0, ran.stderr
    lines = [line for line in ran.stdout.splitlines() if str(config.parent) not in line]
    assert max(map(len, lines)) <= 80 and "…" not in ran.stdout
    assert "\n\n\n" not in ran.stdout


def test_inspect_reports_both_packings(config):
    text = printed(show.inspect, str(config.parent / "data"), ["documents=0", "seq_len=128"])
    report = packing_report(split(config), 128)
    assert "rows of 128 tokens" in text
    table = text[text.index("rows of 128") :]
    for name, cells in (("concatenate", row(table, "train")[1:]), ("best_fit", row(table, "best_fit"))):
        found = report[name]
        shares = [f"{100 * found[share]:.2f} %" for share in ("truncated", "padding")]
        assert cells == [name, f"{found['rows']:,}", *shares]
    assert "rows of" not in printed(show.inspect, str(config.parent / "data"), ["documents=0"])


def test_inspect_says_once_how_the_tokenizer_fits(config):
    text = printed(show.inspect, str(config.parent / "data"), ["documents=0"])
    report = json.loads((config.parent / "data/train/stages.json").read_text())["tokenizer"]
    assert text.count(f"tokenizer: BPE, {report['vocab_size']} tokens") == 1
    assert f"0 of {report['all']['texts']:,}" in text and f" {report['all']['tokens_per_word']:.2f} " in text


def test_picture_is_drawn(config, tmp_path):
    from matplotlib import image

    printed(show.inspect, str(config.parent / "data"), [f"picture={tmp_path}/lengths.png"])
    pixels = image.imread(tmp_path / "lengths.png")
    assert pixels.shape[:2] == (720, 1200)  # two rows of two panels
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 20


@pytest.mark.parametrize("name", ["nowhere/lengths.png", "lengths.xyz"])
def test_picture_that_cannot_be_written_is_named(config, tmp_path, name):
    with pytest.raises(DataError, match=f"picture={tmp_path}/{name}: cannot be written"):
        printed(show.inspect, str(config.parent / "data"), [f"picture={tmp_path}/{name}"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["documents=many"], "documents=many: expected a whole number"),
        (["train.num_steps=3"], "train.num_steps=3: settings go with a configuration"),
        (["pictures=a"], "did you mean picture="),
    ],
)
def test_words_that_inspect_does_not_know_are_named(config, words, expected):
    with pytest.raises(ConfigError) as caught:
        printed(show.inspect, str(config.parent / "data"), words)
    assert expected in str(caught.value)


def test_histogram_is_by_powers_of_two():
    rng = np.random.default_rng(0)
    found = np.concatenate([rng.integers(4, 5000, 500), [1, 2, 4096, 4095, 2**40]])
    values, counts = np.unique(found, return_counts=True)
    rows = show.histogram(values, counts)
    assert [low for low, _, _ in rows] == [2**power for power in range(41)]
    for low, documents, tokens in rows:
        here = found[(found >= low) & (found < 2 * low)]
        assert (documents, tokens) == (len(here), here.sum())


# inspect CONFIG


def mixed(config: Path, **data: object) -> PretrainConfig:
    """A mixture of three datasets of different sizes, with a schedule and a phase."""
    sources = {}
    for number, (name, documents) in enumerate({"b": 30, "a": 200, "c": 90}.items()):
        folder = config.parent / f"source-{name}"
        if not folder.exists():
            shutil.copytree(config.parent / "data", folder)
            for file in folder.glob("*/shard-*"):
                file.unlink()
            for split_name in ("train", "validation"):
                sizes = np.array(lengths(number, documents))
                pieces = [(np.arange(sizes.sum()) % 300, sizes)]
                entry = write_shard(folder / split_name / "shard-00000.tokens", pieces, 300)
                write_manifest(folder / split_name, [entry], 300, split(config).tokenizer_fingerprint, "test")
        sources[name] = {"dir": str(folder), "weight": {"a": 3, "b": 1, "c": 2}[name]}
    content = json.loads(load_pretrain(config).model_dump_json())
    schedule = [{"from_step": 20, "ramp_steps": 10, "weights": {"a": 0, "b": 4, "c": 1}}]
    content["data"] |= {"mixture": sources, "mixture_schedule": schedule, **data}
    content["train"] |= {"seq_len": 16, "num_steps": 80, "phases": [{"from_step": 60, "seq_len": 32}]}
    return PretrainConfig.model_validate(content)


def test_mixture_table_counts_what_a_run_draws(config):
    settings = mixed(config)
    text = printed(show.show_run, settings)
    samples = open_samples(settings, "train")
    stages = mixture_stages(settings, [rows.num_rows for rows in samples.phases[0].rows])
    drawn, _ = mixture.places(mixture.make_mixture(stages), 0, 80 * 4)  # source of each sample of the run
    assert "80 steps: 320 samples, 6,400 tokens" in text  # 60 steps of 4 x 16 and 20 of 4 x 32
    for source, (name, first, last) in enumerate([("a", 3 / 6, 0), ("b", 1 / 6, 4 / 5), ("c", 2 / 6, 1 / 5)]):
        sizes = [phase.rows[source].num_rows for phase in samples.phases]
        counts = [np.count_nonzero(part == source) for part in (drawn[:240], drawn[240:])]
        epochs = counts[0] / sizes[0] + counts[1] / sizes[1]
        shares = [f"{100 * share:.1f} %" for share in (first, last, sum(counts) / 320)]
        assert row(text, name) == [name, *map(str, sizes), str(sum(counts)), f"{epochs:.2f}", *shares]


def test_run_that_ends_before_a_phase_draws_nothing_from_it(config):
    settings = mixed(config)
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"num_steps": 10})})
    text = printed(show.show_run, settings)
    assert "10 steps: 40 samples, 640 tokens" in text
    assert [row(text, name)[6] for name in "abc"] == ["50.0 %", "16.7 %", "33.3 %"]  # as the first weights are
    assert sum(int(row(text, name)[3]) for name in "abc") == 40


def test_source_that_is_seen_too_often_is_warned_of(config):
    text = printed(show.show_run, mixed(config)).replace("\n", " ")
    epochs = {name: float(row(printed(show.show_run, mixed(config)), name)[4]) for name in "abc"}
    assert {name for name in "abc" if f"{name} is seen {epochs[name]:.1f} times" in text} == {
        name for name in "abc" if epochs[name] > 4
    }
    assert "warning: " not in printed(show.show_run, load_pretrain(config, ["train.num_steps=5"]))
    text = printed(show.show_run, load_pretrain(config, ["train.num_steps=2000"]))
    assert re.search(r"warning: \S+/data is seen 1\d\.\d times", text.replace("\n", " "))


def test_configuration_is_shown_with_its_datasets(config, tmp_path):
    settings = mixed(config)
    (tmp_path / "mix.yaml").write_text(settings.model_dump_json())  # json is yaml
    text = printed(show.inspect, str(tmp_path / "mix.yaml"), ["documents=1", "train.num_steps=70"])
    assert "70 steps: 280 samples" in text
    assert [row(text, f"{name}/train")[1] for name in "abc"] == ["200", "30", "90"]
    assert "rows of 16 tokens" in text and "rows of 32 tokens" in text  # what packing does in both phases
    assert "a/validation: " not in text and "a/train: " in text


def test_bert_is_shown_without_packing(tmp_path):
    settings = bert_config(tmp_path / "data", train={"num_steps": 10})
    (tmp_path / "bert.yaml").write_text(settings.model_dump_json())
    text = printed(show.inspect, str(tmp_path / "bert.yaml"), [])
    num_rows = open_samples(settings, "train").phases[0].rows[0].num_rows
    assert "10 steps: 240 samples" in text and f"{240 / num_rows:.2f}" in text and "best_fit" not in text


# head


def test_head_prints_the_first_documents_whole(config):
    text = printed(show.head, str(config.parent / "data"), ["documents=4"])
    dataset = split(config)
    tokenizer = load_tokenizer(dataset.path)
    for number in range(4):
        start, stop = dataset.document(number)
        assert tokenizer.decode(dataset.tokens(start, stop).tolist(), skip_special_tokens=False) in text
    assert text.count("<|endoftext|>") == 4


def test_control_characters_are_shown_and_not_obeyed(config, tmp_path):
    shutil.copytree(config.parent / "data" / "train", tmp_path / "data")
    tokenizer = load_tokenizer(tmp_path / "data")
    ids = tokenizer.encode("a\x1b[2Jb\x07\x9bc\td\x00e\rf").ids
    for file in (tmp_path / "data").glob("shard-*"):
        file.unlink()
    entry = write_shard(tmp_path / "data" / "shard-00000.tokens", [(np.array(ids), np.array([len(ids)]))], 300)
    write_manifest(tmp_path / "data", [entry], 300, "none", "test")
    for text in (run("head", tmp_path / "data").stdout, run("inspect", tmp_path / "data").stdout):
        assert not set(text) & {"\x1b", "\x07", "\x9b", "\x00"}
        assert "a␛[2Jb␇\ufffdc" in text and "d␀e␍f" in text


def test_output_may_be_cut_off(config):
    command = f"{sys.executable} -m data_pipeline.show head {config.parent}/data documents=200 | head -1"
    ran = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.startswith("train, document 0") and ran.stderr == ""


def test_datasets_at_an_address_are_shown(config, monkeypatch, tmp_path):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *given) -> None:
            pass

    monkeypatch.setenv("HOME", str(tmp_path))  # where the default cache is
    handler = functools.partial(Quiet, directory=str(config.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/data"
        there = printed(show.inspect, url, []), printed(show.head, url, [])
        with pytest.raises(DataError, match=f"{url}: only a folder can be verified"):
            show.verify(url, Console(quiet=True))
        server.shutdown()
    here = str(config.parent / "data")
    inspected, card = there[0].rsplit("\n\n", 1)
    assert inspected == printed(show.inspect, here, []).rsplit("\n\n", 1)[0] and "card.html" in card
    assert there[1] == printed(show.head, here, [])


# verify


@pytest.fixture
def copied(config, tmp_path) -> Path:
    return shutil.copytree(config.parent / "data", tmp_path / "data")


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


def test_intact_dataset_is_verified(copied):
    num_bytes = sum(file.stat().st_size for file in copied.glob("*/*"))
    for place in (copied, f"{copied}/"):
        ran = run("verify", place)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert ran.stdout.splitlines()[-1] == f"{place}: all {num_bytes:,} bytes are as they were written"


def test_all_faults_of_both_splits_are_named(copied):
    flip(copied / "train" / "shard-00001.tokens", 100)
    flip(copied / "train" / "tokenizer.json", 50)
    flip(copied / "validation" / "shard-00000.tokens", 7)
    (copied / "validation" / "notes.txt").write_text("mine")
    (copied / "train" / "shard-00000.tokens").unlink()
    ran = run("verify", copied)
    assert ran.returncode == 1 and "as they were written" not in ran.stdout
    *faults, last = ran.stderr.splitlines()
    assert last == f"{copied}: 5 faults" and len(faults) == 5
    for file in ("train/shard-00000.tokens", "train/shard-00001.tokens", "train/tokenizer.json"):
        assert any(fault.startswith(f"{copied}/{file}: ") for fault in faults)
    for file in ("validation/shard-00000.tokens", "validation/notes.txt"):
        assert any(fault.startswith(f"{copied}/{file}: ") for fault in faults)


def test_one_split_is_verified_alone(copied):
    flip(copied / "train" / "shard-00001.tokens", 100)
    assert run("verify", copied / "validation").returncode == 0
    assert run("verify", copied / "train").returncode == 1


@pytest.mark.parametrize("change", ["lost", "edited"])
def test_split_without_its_manifest_is_a_fault(copied, change):
    manifest = copied / "train" / "manifest.json"
    manifest.unlink() if change == "lost" else flip(manifest, 300)
    ran = run("verify", copied)
    assert ran.returncode == 1 and f"{copied}/train" in ran.stderr and "Traceback" not in ran.stderr


def test_progress_is_shown_on_a_terminal(config):
    with open(os.devnull, "w") as nowhere:
        console = Console(width=80, force_terminal=True, record=True, file=nowhere)
        assert show.verify(str(config.parent / "data"), console) == 0
    assert re.search(r"verify .*━━.* [kM]?B", console.export_text())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["verify", "nowhere"], "nowhere: holds no finished dataset"),
        (["inspect", "nowhere"], "nowhere: holds no finished dataset"),
        (["head", "nowhere"], "nowhere: holds no finished dataset"),
        (["inspect", "nowhere.yaml"], "nowhere.yaml"),
        (["inspect", "a" * 300], "cannot be read (File name too long)"),
        (["verify", "a", "b"], "usage: millstream data inspect"),
        (["head", "nowhere", "documents"], "documents: did you mean documents="),
    ],
)
def test_commands_that_cannot_be_end_with_one_message(words, expected):
    ran = run(*words)
    assert ran.returncode == 1 and expected in ran.stderr and "Traceback" not in ran.stderr
