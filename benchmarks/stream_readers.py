"""The readers that `benchmarks.data_stream` compares, each in a process of its own, ours and the peers'.

    python -m benchmarks.stream_readers write NAME FOLDER           write FOLDER's tokens in NAME's own format
    python -m benchmarks.stream_readers read NAME FOLDER FIRST      read batches, from batch FIRST of the epoch on

FOLDER has `tokens.bin` (uint16), `ends.npy` (where each document ends, in tokens) and `config.json` (of millstream).
A reader first writes the seconds from opening the dataset to its first batch, what it imports being loaded before. Then
it answers lines on stdin with the mean seconds that a batch took: "40" makes 40 batches, "40 0.002" makes 40 and sleeps
2 ms before each, as one does who waits for an accelerator, and answers with the median.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROWS, SEQ_LEN = 8, 1024
CHUNK_BYTES = 64 << 20  # of a peer's file
NextBatch = Callable[[], object]


def main() -> None:
    action, name, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    prepare(name)
    if action == "write":
        WRITERS[name](folder)
        return
    began = time.perf_counter()
    next_batch = READERS[name](folder, int(sys.argv[4]))
    next_batch()
    print(time.perf_counter() - began, flush=True)
    for line in sys.stdin:
        count, *step_seconds = line.split()
        print(seconds_of_batch(next_batch, int(count), *map(float, step_seconds)), flush=True)


def prepare(name: str) -> None:
    """Import what the reader needs."""
    for module in IMPORTS[name]:
        if module == "streaming":
            from benchmarks.peers import stand_in_for_torchvision

            stand_in_for_torchvision()
        importlib.import_module(module)


def seconds_of_batch(next_batch: NextBatch, count: int, step_seconds: float = 0.0) -> float:
    """Seconds a batch: the mean, or, with something to do before each, the median of the waits."""
    if not step_seconds:
        began = time.perf_counter()
        for _ in range(count):
            next_batch()
        return (time.perf_counter() - began) / count
    waits = []
    for _ in range(count):
        time.sleep(step_seconds)
        began = time.perf_counter()
        next_batch()
        waits.append(time.perf_counter() - began)
    return statistics.median(waits)


# ---- numpy alone, on our shards


def shard_arrays(folder: Path) -> list[np.ndarray]:
    """The tokens of each shard, as plain arrays over the mapped files: slices of np.memmap itself cost more."""
    train = Path(json.loads((folder / "config.json").read_text())["data"]["dir"]) / "train"
    shards = json.loads((train / "manifest.json").read_text())["shards"]
    return [np.asarray(np.memmap(train / s["file"], np.uint16, "r", shape=(s["tokens"],))) for s in shards]


def random_starts(shards: list[np.ndarray]) -> Iterator[list[tuple[np.ndarray, list[int]]]]:
    """Batches of rows that lie inside a shard, as [(shard, first tokens of its rows)], in an order drawn beforehand."""
    rows = [(number, low) for number, shard in enumerate(shards) for low in range(0, len(shard) - SEQ_LEN - 1, SEQ_LEN)]
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    batches = []
    for first in range(0, len(order) - ROWS + 1, ROWS):
        chosen = [rows[place] for place in order[first : first + ROWS]]
        numbers = sorted({number for number, _ in chosen})
        batches.append([(shards[number], [low for other, low in chosen if other == number]) for number in numbers])
    while True:
        yield from batches


def memmap_slices(folder: Path, first: int) -> NextBatch:
    batches = random_starts(shard_arrays(folder))

    def next_batch() -> np.ndarray:
        rows = [shard[low : low + SEQ_LEN + 1] for shard, lows in next(batches) for low in lows]
        return np.stack(rows)

    return next_batch


def memmap_concatenated(folder: Path, first: int) -> NextBatch:
    batches = random_starts(shard_arrays(folder))

    def next_batch() -> np.ndarray:
        rows = [shard[low : low + SEQ_LEN + 1] for shard, lows in next(batches) for low in lows]
        return np.concatenate(rows).reshape(len(rows), SEQ_LEN + 1)

    return next_batch


def memmap_targets(folder: Path, first: int) -> NextBatch:
    """Inputs and targets of the fastest gather, in the type that models take."""
    next_ids = memmap_concatenated(folder, first)

    def next_batch() -> tuple[np.ndarray, np.ndarray]:
        ids = next_ids()
        return ids[:, :-1].astype(np.int64), ids[:, 1:].astype(np.int64)

    return next_batch


def memmap_index(folder: Path, first: int) -> NextBatch:
    batches = random_starts(shard_arrays(folder))
    columns = np.arange(SEQ_LEN + 1)

    def next_batch() -> np.ndarray:
        parts = [shard[np.array(lows)[:, None] + columns] for shard, lows in next(batches)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return next_batch


# ---- millstream


def open_samples(folder: Path):
    from configs.schema import PretrainConfig
    from data_pipeline.samples import open_samples

    return open_samples(PretrainConfig.model_validate_json((folder / "config.json").read_text()), "train")


def millstream(folder: Path, first: int) -> Callable[[], list[dict[str, Any]]]:
    """What the stream hands out, made when it is asked for, without its thread."""
    import torch

    samples, steps = open_samples(folder), steps_from(first)

    def next_batch() -> list[dict[str, torch.Tensor]]:
        batches = samples.micro_batches(next(steps), 0, 1)
        return [{name: torch.from_numpy(array) for name, array in arrays.items()} for arrays in batches]

    return next_batch


def millstream_expanded(folder: Path, first: int) -> NextBatch:
    """The same and, what training does on the accelerator, all that the model takes made of it; here on the CPU."""
    from data_pipeline.expand import expand_tokens

    end_id = open_samples(folder).document_end_id
    assert end_id is not None
    next_tokens = millstream(folder, first)
    return lambda: [expand_tokens(batch["tokens"], end_id) for batch in next_tokens()]


def millstream_ahead(folder: Path, first: int, num_workers: int = 0) -> NextBatch:
    """What training uses: a thread makes one step ahead, or processes."""
    from configs.schema import PretrainConfig
    from data_pipeline.stream import open_stream

    config = json.loads((folder / "config.json").read_text())
    config["data"]["num_workers"] = num_workers
    stream, steps = open_stream(PretrainConfig.model_validate(config), "train"), steps_from(first)
    return lambda: stream.micro_batches(next(steps), 0, 1)


def steps_from(first: int) -> Iterator[int]:
    while True:
        yield first
        first += 1


# ---- peers


def token_rows(folder: Path) -> np.ndarray:
    """Rows that begin with the last token of the row before: (rows, SEQ_LEN + 1) uint16."""
    tokens = np.fromfile(folder / "tokens.bin", np.uint16)
    return np.lib.stride_tricks.sliding_window_view(tokens, SEQ_LEN + 1)[::SEQ_LEN]


def nanogpt(folder: Path, first: int) -> NextBatch:
    """As in its train.py: a memmap opened for every batch, rows anywhere, inputs and targets copied one by one."""
    import torch

    def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
        data = np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - SEQ_LEN, (ROWS,))
        inputs = [torch.from_numpy(data[start : start + SEQ_LEN].astype(np.int64)) for start in starts]
        targets = [torch.from_numpy(data[start + 1 : start + SEQ_LEN + 1].astype(np.int64)) for start in starts]
        return torch.stack(inputs), torch.stack(targets)

    return next_batch


def write_mosaicml(folder: Path) -> None:
    from streaming import MDSWriter

    columns = {"tokens": f"ndarray:uint16:{SEQ_LEN + 1}"}
    with MDSWriter(out=str(folder / "mosaicml"), columns=columns, size_limit=CHUNK_BYTES) as writer:
        for row in token_rows(folder):
            writer.write({"tokens": np.ascontiguousarray(row)})


def mosaicml(folder: Path, first: int) -> NextBatch:
    from streaming import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(local=str(folder / "mosaicml"), shuffle=True, batch_size=ROWS)
    loader = StreamingDataLoader(dataset, batch_size=ROWS, num_workers=0, drop_last=True)
    if first:
        loader.load_state_dict(dataset.state_dict(first * ROWS, True) | {"epoch": 0})
    return endlessly(loader)


def write_litdata(folder: Path) -> None:
    import litdata

    litdata.optimize(
        fn=_litdata_row,
        inputs=[(str(folder), number) for number in range(len(token_rows(folder)))],
        output_dir=str(folder / "litdata"),
        chunk_size=CHUNK_BYTES // (2 * (SEQ_LEN + 1)) * (SEQ_LEN + 1),
        num_workers=1,
        item_loader=litdata.TokensLoader(block_size=SEQ_LEN + 1),
        verbose=False,
    )


def _litdata_row(place: tuple[str, int]) -> np.ndarray:
    folder, number = place
    tokens = np.memmap(Path(folder) / "tokens.bin", np.uint16, "r")
    return np.array(tokens[number * SEQ_LEN : (number + 1) * SEQ_LEN + 1])


def litdata(folder: Path, first: int) -> NextBatch:
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    item_loader = TokensLoader(block_size=SEQ_LEN + 1)
    dataset = StreamingDataset(str(folder / "litdata"), item_loader=item_loader, shuffle=True, drop_last=True)
    loader = StreamingDataLoader(dataset, batch_size=ROWS, num_workers=0)
    if first:
        state = loader.state_dict()
        state["num_samples_yielded"] = state["dataset"]["num_samples_yielded"] = first * ROWS
        state["dataset"]["sample_in_epoch"] = first * ROWS
        loader.load_state_dict(state)
    return endlessly(loader)


def endlessly(loader: Any) -> NextBatch:
    def batches() -> Iterator[object]:
        while True:
            yield from loader

    endless = batches()
    return lambda: next(endless)


def write_datasets(folder: Path) -> None:
    import datasets

    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})  # what a map over texts leaves
    rows = token_rows(folder)
    generated = datasets.Dataset.from_generator(
        _datasets_rows, features=features, gen_kwargs={"rows": rows}, cache_dir=str(folder / "datasets-cache")
    )
    generated.save_to_disk(str(folder / "datasets"))


def _datasets_rows(rows: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    for row in rows:
        yield {"input_ids": row.astype(np.int32)}


def hf_datasets(folder: Path, first: int) -> NextBatch:
    import datasets

    dataset = datasets.load_from_disk(str(folder / "datasets")).with_format("torch")
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    steps = steps_from(first)

    def next_batch() -> object:
        start = next(steps) * ROWS % (len(order) - ROWS)
        return dataset[order[start : start + ROWS]]["input_ids"]

    return next_batch


def write_megatron(folder: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    tokens = np.fromfile(folder / "tokens.bin", np.uint16)
    builder = IndexedDatasetBuilder(str(folder / "megatron.bin"), dtype=np.uint16)
    begin = 0
    for end in np.load(folder / "ends.npy").tolist():
        builder.add_document(tokens[begin:end], [end - begin])
        begin = end
    builder.finalize(str(folder / "megatron.idx"))


def megatron(folder: Path, first: int, knows_documents: bool = False) -> NextBatch:
    from types import SimpleNamespace

    import torch
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    prefix = str(folder / "megatron")
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ_LEN,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(folder / "megatron-cache"),
        tokenizer=SimpleNamespace(eod=50256, vocab_size=50257, unique_identifiers={}),  # type: ignore[arg-type]
        reset_position_ids=knows_documents,
        reset_attention_mask=False,
        eod_mask_loss=knows_documents,
        create_attention_mask=False,
    )
    indexed = GPTDataset.build_low_level_dataset(prefix, config)
    documents = np.arange(len(indexed.sequence_lengths), dtype=np.int32)
    dataset = GPTDataset(indexed, prefix, documents, None, Split.train, config)
    batches = [list(range(start, start + ROWS)) for start in range(0, len(dataset) - ROWS + 1, ROWS)]
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=batches[first:], num_workers=0)
    return endlessly(loader)


WRITERS: dict[str, Callable[[Path], None]] = {
    "mosaicml": write_mosaicml,
    "litdata": write_litdata,
    "datasets": write_datasets,
    "megatron": write_megatron,
}
READERS: dict[str, Callable[[Path, int], NextBatch]] = {
    "memmap, slices": memmap_slices,
    "memmap, concatenated": memmap_concatenated,
    "memmap, index arrays": memmap_index,
    "memmap, inputs and targets": memmap_targets,
    "millstream": millstream,
    "millstream, a thread ahead": millstream_ahead,
    "millstream, 1 process ahead": lambda folder, first: millstream_ahead(folder, first, 1),
    "millstream, 2 processes ahead": lambda folder, first: millstream_ahead(folder, first, 2),
    "millstream, expanded": millstream_expanded,
    "nanogpt": nanogpt,
    "mosaicml": mosaicml,
    "litdata": litdata,
    "datasets": hf_datasets,
    "megatron": megatron,
    "megatron, documents": lambda folder, first: megatron(folder, first, knows_documents=True),
}
OURS = {name for name in READERS if name.startswith(("memmap", "millstream"))}  # the others want the peers' environment
_TRAINING = ["torch", "data_pipeline.stream"]
IMPORTS: dict[str, list[str]] = {
    **dict.fromkeys(OURS, _TRAINING),
    "nanogpt": ["torch"],
    "mosaicml": ["streaming"],
    "litdata": ["litdata"],
    "datasets": ["torch", "datasets"],
    "megatron": ["megatron.core.datasets.gpt_dataset"],
    "megatron, documents": ["megatron.core.datasets.gpt_dataset"],
}

if __name__ == "__main__":
    main()
