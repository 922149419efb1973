"""Batches of any step on any rank: the same global batch however it is divided and made; found at once; errors."""

from __future__ import annotations

import functools
import os
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from configs.load import ConfigError
from configs.schema import PretrainConfig
from data_pipeline.mapped_shard import BLOCK_BYTES
from data_pipeline.samples import Samples, Split
from data_pipeline.shards import DataError, write_manifest
from data_pipeline.stream import Stream, open_stream
from tests.data_pipeline.token_datasets import bert_config, gpt_config, lengths, write_dataset

KINDS = ["gpt", "gpt-mixture", "gpt-best-fit", "gpt-window", "gpt-tokens", "gpt-tokens-mixture", "bert", "bert-spans"]
END = 59_999  # ends the documents of the sources c and d
STEPS = [0, 1, 2, 5, 6, 7, 8, 170]  # the mixture changes at step 2, its length at step 7; 170 is in the next block


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate("abcd"):
        for split, documents in (("train", 200), ("validation", 20)):
            shards = [lengths(number, documents), lengths(number + 5, documents)]
            write_dataset(folder / name / split, shards, end_id=END if name in "cd" else None)
    bert_config(folder / "bert")
    return folder


def settings(folder: Path, kind: str, num_workers: int = 0, **train: Any) -> PretrainConfig:
    data: dict[str, Any] = {"num_workers": num_workers}
    if kind.startswith("bert"):
        unit = "span" if kind == "bert-spans" else "token"
        return bert_config(folder / "bert", data | {"masking": {"unit": unit, "short_probability": 0.1}}, train)
    if kind == "gpt-best-fit":
        data["packing"] = "best_fit"
    if kind == "gpt-window":
        data["shuffle_window_tokens"] = 2000
    one, other = "cd" if kind.startswith("gpt-tokens") else "ab"
    if kind.endswith("-mixture"):
        data["mixture"] = {
            name: {"dir": str(folder / name), "weight": weight} for name, weight in {one: 3, other: 1}.items()
        }
        data["mixture_schedule"] = [{"from_step": 2, "weights": {one: 1, other: 3}, "ramp_steps": 3}]
        train = {"phases": [{"from_step": 7, "seq_len": 32}]} | train
    return gpt_config(folder / one, data, train)


def global_batch(stream: Stream, step: int, world_size: int) -> dict[str, torch.Tensor]:
    batches = [batch for rank in range(world_size) for batch in stream.micro_batches(step, rank, world_size)]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def wait_for_workers(stream: Stream) -> None:
    deadline = time.monotonic() + 120
    while len(stream._ahead._ready) < len(stream._ahead.workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_global_batch_is_the_same_for_any_ranks_and_workers_also_after_a_resume(folder, kind):
    alone = open_stream(settings(folder, kind), "train")
    expected = {step: global_batch(alone, step, 1) for step in STEPS}
    assert all(len(tensor) == 24 for batch in expected.values() for tensor in batch.values())
    assert not same(expected[0], expected[1])
    for num_workers in (0, 1, 4):
        stream = open_stream(settings(folder, kind, num_workers), "train")
        try:
            wait_for_workers(stream)
            for world_size in (1, 2, 3, 4, 8):
                # asked in order, so that workers have made them; the jumps are resumes
                ranks = [[stream.micro_batches(step, rank, world_size) for step in STEPS] for rank in range(world_size)]
                for place, step in enumerate(STEPS):
                    batches = [batch for rank in ranks for batch in rank[place]]
                    made = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
                    assert same(made, expected[step]), (num_workers, world_size, step)
        finally:
            stream.close()


def test_micro_batch_size_does_not_change_the_rows(folder):
    streams = [open_stream(settings(folder, "gpt-mixture", micro_batch_size=size), "train") for size in (1, 3, 24)]
    for step in (0, 3, 8):
        one, three, all_at_once = (global_batch(stream, step, 1) for stream in streams)
        assert same(one, three) and same(one, all_at_once)


def test_steps_made_ahead_are_those_asked_for_whatever_the_order(folder):
    stream, other = (open_stream(settings(folder, "gpt"), "train") for _ in range(2))
    for step in (0, 1, 2, 9, 3, 3, 4):
        assert same(
            global_batch(stream, step, 1),
            {
                name: torch.from_numpy(
                    np.concatenate([batch[name] for batch in other.samples.micro_batches(step, 0, 1)])
                )
                for name in ("input_ids", "labels", "segment_ids", "position_ids")
            },
        )


def without_knowing_ends(monkeypatch, config: PretrainConfig, split: Split) -> Stream:
    with monkeypatch.context() as patch:
        patch.setattr(Samples, "_common_document_end_id", lambda self: None)
        return open_stream(config, split)


@pytest.mark.parametrize("kind", ["gpt-tokens", "gpt-tokens-mixture"])
def test_batches_of_tokens_alone_expand_to_the_same_arrays(folder, kind, monkeypatch):
    config = settings(folder, kind, micro_batch_size=3)
    stream, whole = open_stream(config, "train"), without_knowing_ends(monkeypatch, config, "train")
    for step in STEPS:
        batches = stream.micro_batches(step, 0, 1)
        assert all(list(batch) == ["tokens"] and batch["tokens"].dtype == torch.uint16 for batch in batches)
        expanded = [stream.expand(batch) for batch in batches]
        assert all(map(same, expanded, whole.micro_batches(step, 0, 1))) and len(expanded) == 8


@pytest.mark.parametrize("world_size", [1, 3])
def test_held_out_batches_of_tokens_alone_have_the_same_targets(folder, world_size, monkeypatch):
    config = settings(folder, "gpt-tokens", micro_batch_size=4)
    stream, whole = open_stream(config, "validation"), without_knowing_ends(monkeypatch, config, "validation")
    for rank in range(world_size):
        made = [list(some.eval_batches(0, 21, rank, world_size)) for some in (stream, whole)]  # 4 does not divide 21
        assert len(made[0]) == len(made[1])
        for batch, other in zip(*made, strict=True):
            expanded, counts = stream.expand(batch), (other["labels"] != -100).any(dim=1)
            assert torch.equal(expanded["labels"], other["labels"])  # none in the rows that fill the last batch
            assert all(torch.equal(expanded[name][counts], other[name][counts]) for name in other)


@pytest.mark.parametrize("kind", ["gpt", "gpt-mixture", "gpt-best-fit", "bert"])
def test_batch_that_has_all_arrays_is_expanded_to_itself(folder, kind):
    stream = open_stream(settings(folder, kind), "train")
    batch = stream.micro_batches(0, 0, 1)[0]
    assert "labels" in batch and same(stream.expand(batch), batch)


def test_best_fit_rows_and_mixtures_of_different_ends_are_whole_arrays(folder):
    packed = settings(folder, "gpt-tokens")
    packed = packed.model_copy(update={"data": packed.data.model_copy(update={"packing": "best_fit"})})
    mixed = gpt_config(folder, {"mixture": {name: {"dir": str(folder / name), "weight": 1} for name in "ac"}})
    for config in (packed, mixed):
        assert "labels" in open_stream(config, "train").micro_batches(0, 0, 1)[0]


@pytest.mark.parametrize("kind", ["gpt", "gpt-tokens"])
def test_changing_a_batch_changes_no_other_one(folder, kind):
    stream = open_stream(settings(folder, kind), "train")
    before = {name: tensor.clone() for name, tensor in stream.micro_batches(3, 0, 1)[0].items()}
    for tensor in stream.micro_batches(3, 0, 1)[0].values():
        tensor.zero_()
    assert same(stream.micro_batches(3, 0, 1)[0], before)


def test_bert_masking_differs_between_epochs(folder):
    stream = open_stream(settings(folder, "bert", global_batch_size=1), "train")
    num_samples = stream.samples.phases[0].rows[0].num_rows
    numbers = [stream.samples._chosen(stream.samples.phases[0], place, 1)[1] for place in range(2 * num_samples)]
    first = 3
    again = next(place for place in range(num_samples, 2 * num_samples) if numbers[place] == numbers[first])
    one, other = stream.micro_batches(first, 0, 1)[0], stream.micro_batches(again, 0, 1)[0]
    assert not torch.equal(one["labels"], other["labels"])


def test_bert_rows_are_well_formed(folder):
    stream = open_stream(settings(folder, "bert"), "train")
    batch = global_batch(stream, 0, 1)
    real = batch["segment_ids"] == 1
    assert batch["input_ids"].shape == (24, 32) and int(batch["input_ids"].max()) < stream.vocab_size
    assert len(batch["input_ids"][:, 0].unique()) == 1  # [CLS]
    assert (batch["labels"][~real] == -100).all() and (batch["labels"] != -100).any(dim=1).all()


def test_bert_length_grows_from_phase_to_phase_out_of_one_dataset(folder):
    stream = open_stream(settings(folder, "bert", phases=[{"from_step": 3, "seq_len": 64}]), "train")
    assert [stream.micro_batches(step, 0, 1)[0]["labels"].shape[1] for step in range(5)] == [32, 32, 32, 64, 64]


def test_unpadded_batches_are_the_same_tokens_for_any_number_of_ranks(folder):
    config = settings(folder, "bert")
    unpadded = config.model_copy(update={"data": config.data.model_copy(update={"unpad": True})})
    stream, padded = open_stream(unpadded, "train"), open_stream(config, "train")
    real = global_batch(padded, 5, 1)
    expected = real["input_ids"][real["segment_ids"] > 0]
    for world_size in (1, 3, 8):
        batches = [batch for rank in range(world_size) for batch in stream.micro_batches(5, rank, world_size)]
        assert torch.equal(torch.cat([batch["input_ids"][0] for batch in batches]), expected)
        assert all(batch["cu_seqlens"][-1] == batch["input_ids"].shape[1] for batch in batches)


def test_dataset_at_an_address_gives_the_same_batches_and_its_next_shards_are_fetched_ahead(tmp_path):
    write_dataset(tmp_path / "data/train", [lengths(number, 40) for number in range(12)])
    window = {"shuffle_window_tokens": 3000}
    requests: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *given: object) -> None:
            requests.append(self.path.rpartition("/")[2])

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    config = gpt_config(tmp_path, {"cache": {"dir": str(tmp_path / "cache")}} | window, {"micro_batch_size": 24})
    data = config.data.model_copy(update={"dir": f"http://127.0.0.1:{server.server_port}/data"})
    local = open_stream(gpt_config(tmp_path / "data", window, {"micro_batch_size": 24}), "train")
    remote = open_stream(config.model_copy(update={"data": data}), "train")

    def fetched() -> list[str]:
        return sorted(name for name in requests if name.endswith(".tokens"))

    assert same(remote.micro_batches(0, 0, 1)[0], local.micro_batches(0, 0, 1)[0])
    deadline = time.monotonic() + 30
    while len(fetched()) <= 4:  # rows of one step are in the three or four shards of its window
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for step in range(1, 20):
        assert same(remote.micro_batches(step, 0, 1)[0], local.micro_batches(step, 0, 1)[0])
    while len(fetched()) < 12:  # the next steps need the others, which are on their way
        assert time.monotonic() < deadline
        remote.micro_batches(19, 0, 1)
    server.shutdown()
    assert len(fetched()) == len(set(fetched())) == 12


def test_damaged_data_are_an_error_of_the_step_that_uses_them(tmp_path):
    dataset = write_dataset(tmp_path / "train", [lengths(1, 3000)])
    file = tmp_path / "train/shard-00000.tokens"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    stream = open_stream(gpt_config(tmp_path), "train")
    with pytest.raises(DataError, match=r"shard-00000.tokens: is damaged between bytes"):
        for step in range(dataset.num_tokens // 16 // 24):
            stream.micro_batches(step, 0, 1)


def test_fewer_samples_than_one_global_batch_is_an_error(folder):
    config = settings(folder, "gpt", global_batch_size=100_000)
    with pytest.raises(ConfigError, match=r"fewer than one global batch of 100000; add text, or lower"):
        open_stream(config, "train")


def test_sample_longer_than_the_held_out_text_is_an_error(folder):
    with pytest.raises(ConfigError, match=r"fewer than one sample of 200000; raise data.build.validation_fraction"):
        open_stream(settings(folder, "gpt", seq_len=200_000), "validation")


def test_batch_that_does_not_divide_over_the_ranks_is_an_error(folder):
    stream = open_stream(settings(folder, "gpt"), "train")
    with pytest.raises(ConfigError, match=r"a global batch of 24 samples does not divide .* on 5 ranks"):
        stream.micro_batches(0, 0, 5)


def test_tokenizer_that_is_not_the_datasets_is_an_error(tmp_path):
    config = bert_config(tmp_path)
    file = tmp_path / "train/tokenizer.json"
    file.write_text(file.read_text().replace('"[MASK]"', '"[HIDE]"'))
    with pytest.raises(DataError, match=r"tokenizer.json: is damaged or was changed after the build"):
        open_stream(config, "train")


def test_bert_on_a_dataset_without_its_special_tokens_is_an_error(tmp_path):
    from tokenizers import Tokenizer, models

    (tmp_path / "train").mkdir()
    Tokenizer(models.BPE()).save(str(tmp_path / "train/tokenizer.json"))
    content = (tmp_path / "train/tokenizer.json").read_bytes()
    (tmp_path / "train/tokenizer.json").unlink()
    (tmp_path / "train").rmdir()
    write_dataset(tmp_path / "train", [lengths(1, 300)])
    (tmp_path / "train/tokenizer.json").write_bytes(content)
    config = gpt_config(tmp_path)
    with pytest.raises(ConfigError, match=r"data.build.tokenizer.type=wordpiece"):
        open_stream(
            config.model_copy(update={"model": config.model.model_copy(update={"architecture": "bert"})}), "train"
        )


def write_sparse(folder: Path, num_shards: int, shard_tokens: int) -> None:
    """Shards of zeros that take no room on the disk but for the ends of their documents and the checksums."""
    folder.mkdir(parents=True)
    ends = np.arange(1000, shard_tokens + 1, 1000, dtype=np.uint64)
    zeros = shard_tokens * 2 // BLOCK_BYTES
    tail = b"\0" * (shard_tokens * 2 - zeros * BLOCK_BYTES) + ends.tobytes()
    rest = [xxhash.xxh3_64_intdigest(tail[at : at + BLOCK_BYTES]) for at in range(0, len(tail), BLOCK_BYTES)]
    sums = np.array([xxhash.xxh3_64_intdigest(bytes(BLOCK_BYTES))] * zeros + rest, np.uint64).tobytes()
    entries = []
    for number in range(num_shards):
        path = folder / f"shard-{number:05d}.tokens"
        with path.open("wb") as file:
            file.seek(zeros * BLOCK_BYTES)
            file.write(tail + sums)
        entries.append(
            {
                "file": path.name,
                "documents": len(ends),
                "tokens": shard_tokens,
                "bytes": path.stat().st_size,
                "xxh3_128": "not computed",
                "sums_xxh3_128": xxhash.xxh3_128_hexdigest(sums),
            }
        )
    write_manifest(folder, entries, 50_257, "none", "test")


def test_first_batch_of_ten_gigabytes_takes_a_fifth_of_a_second_also_at_the_end_of_the_epoch(tmp_path):
    write_sparse(tmp_path / "train", 50, 100_000_000)
    assert sum(file.stat().st_size for file in (tmp_path / "train").iterdir()) > 10e9
    config = gpt_config(tmp_path, None, {"seq_len": 1024, "global_batch_size": 8, "micro_batch_size": 8})
    last_step = int(0.9 * 5e9 / 1024 / 8)
    for step in (0, last_step):
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            stream = open_stream(config, "train")
            batch = stream.micro_batches(step, 0, 1)[0]
            seconds.append(time.perf_counter() - began)
            stream.close()
            assert batch["input_ids"].shape == (8, 1024) and int(batch["segment_ids"].max()) >= 2
        assert sorted(seconds)[1] < 0.2, seconds
    assert os.stat(tmp_path / "train/shard-00000.tokens").st_blocks * 512 < 5e6
