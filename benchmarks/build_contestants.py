"""What `benchmarks.data_build` compares `millstream data build` with, each in a process of its own.

    python -m benchmarks.build_contestants NAME TOKENIZER OUT FILES

FILES are jsonl.zst with a field `text`, TOKENIZER a folder with GPT-2's vocab.json and merges.txt or BERT's vocab.txt,
OUT a folder that is not there. Prints JSON: `seconds` of the work without the imports; `digest` of all ids, with an end
of text after each of GPT-2's documents, and of all lengths, which took another `digest_seconds`.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

NUM_PROCESSES = 2
END_OF_TEXT = 50256  # of GPT-2
Ids = Iterable[Any]  # of each document, a list or an array


def main() -> None:
    name, tokenizer, out, files = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    for module in IMPORTS[name]:
        importlib.import_module(module)
    if name in IN_MEMORY:
        texts = list(read_texts(files))
        began = time.perf_counter()
        ids = IN_MEMORY[name](tokenizer, texts)
        seconds = time.perf_counter() - began
    else:
        began = time.perf_counter()
        ids = FROM_FILES[name](tokenizer, files, out)
        seconds = time.perf_counter() - began
    is_gpt = (tokenizer / "merges.txt").exists()
    began = time.perf_counter()
    found = digest(ids, END_OF_TEXT if is_gpt else None)
    print(json.dumps({"seconds": seconds, "digest": found, "digest_seconds": time.perf_counter() - began}))


def read_lines(files: list[str]) -> Iterator[bytes]:
    for file in files:
        with open(file, "rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
            rest = b""
            while block := stream.read(1 << 20):
                *lines, rest = (rest + block).split(b"\n")
                yield from (line for line in lines if line)
            if rest:
                yield rest


def read_texts(files: list[str]) -> Iterator[str]:
    return (json.loads(line)["text"] for line in read_lines(files))


def digest(documents: Ids, end: int | None) -> str:
    """A checksum of all ids and of the lengths of the documents that have any; `end` is added to each document."""
    state, lengths = xxhash.xxh3_128(), []
    for document in documents:
        ids = np.asarray(document, np.uint32)
        if end is not None:
            ids = np.append(ids, np.uint32(end))
        if len(ids):
            state.update(ids.tobytes())
            lengths.append(len(ids))
    state.update(np.array(lengths, np.int64).tobytes())
    return state.hexdigest()


# ---- from files to a dataset


def datasets_map(tokenizer: Path, files: list[str], out: Path) -> Ids:
    """As transformers' run_clm.py prepares a corpus, without its grouping and without attention masks."""
    import datasets

    fast = hf_tokenizer(tokenizer)
    cache = str(out / "cache")
    parts = [datasets.load_dataset("json", data_files=file, split="train", cache_dir=cache) for file in files]
    texts = datasets.concatenate_datasets([part.select_columns(["text"]) for part in parts])

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        encoded = fast(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
        return {"input_ids": encoded["input_ids"]}

    mapped = texts.map(tokenize, batched=True, num_proc=NUM_PROCESSES, remove_columns=texts.column_names)
    mapped.save_to_disk(str(out / "dataset"))
    return mapped.with_format("numpy")["input_ids"]


def hf_tokenizer(folder: Path) -> Any:
    from transformers import BertTokenizerFast, GPT2TokenizerFast

    is_gpt = (folder / "merges.txt").exists()
    return (GPT2TokenizerFast if is_gpt else BertTokenizerFast).from_pretrained(str(folder))


def megatron(tokenizer: Path, files: list[str], out: Path) -> Ids:
    """As Megatron-LM's tools/preprocess_data.py: a pool of workers tokenizes lines, the parent writes."""
    import multiprocessing

    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    out.mkdir()
    builder = IndexedDatasetBuilder(str(out / "text.bin"), dtype=np.uint16)
    with multiprocessing.Pool(NUM_PROCESSES, _start_megatron_worker, [tokenizer]) as pool:
        for ids in pool.imap(_megatron_line, read_lines(files), 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(str(out / "text.idx"))
    return (document[:-1] for document in IndexedDataset(str(out / "text")))


def _start_megatron_worker(tokenizer: Path) -> None:
    global _worker_tokenizer
    _worker_tokenizer = hf_tokenizer(tokenizer).backend_tokenizer


def _megatron_line(line: bytes) -> list[int]:
    text = json.loads(line)["text"]
    return [*_worker_tokenizer.encode(text, add_special_tokens=False).ids, END_OF_TEXT]


# ---- from texts in memory to ids in memory: tokenizing alone


def encode_batch(tokenizer: Path, texts: list[str]) -> Ids:
    """`tokenizers` with RAYON_NUM_THREADS threads, a thousand documents at once, as `datasets.map` does."""
    backend = hf_tokenizer(tokenizer).backend_tokenizer
    ids: list[np.ndarray] = []
    for start in range(0, len(texts), 1000):
        batch = backend.encode_batch(texts[start : start + 1000], add_special_tokens=False)
        ids += [np.array(encoding.ids, np.uint16) for encoding in batch]
    return ids


def tiktoken(tokenizer: Path, texts: list[str]) -> Ids:
    from tiktoken import Encoding
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks = data_gym_to_mergeable_bpe_ranks(str(tokenizer / "merges.txt"), str(tokenizer / "vocab.json"))
    encoding = Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": END_OF_TEXT}
    )
    return [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]


def millstream(tokenizer: Path, texts: list[str]) -> Ids:
    """What a worker of `millstream data build` calls, a megabyte at a time."""
    from data_pipeline.passes import BATCH_CHARACTERS
    from data_pipeline.tokenizer import flat_encoder, load_tokenizer

    encode_flat = flat_encoder(load_tokenizer(tokenizer))
    ids: list[np.ndarray] = []
    batch: list[str] = []
    size = 0
    for number, text in enumerate(texts):
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS or number + 1 == len(texts):
            tokens, lengths = encode_flat(batch, None)
            ids += np.split(tokens, np.cumsum(lengths)[:-1])
            batch, size = [], 0
    return ids


FROM_FILES: dict[str, Callable[[Path, list[str], Path], Ids]] = {"datasets.map": datasets_map, "megatron": megatron}
IN_MEMORY: dict[str, Callable[[Path, list[str]], Ids]] = {
    "encode_batch": encode_batch,
    "tiktoken": tiktoken,
    "millstream": millstream,
}
IMPORTS = {
    "datasets.map": ["datasets", "transformers"],
    "megatron": ["megatron.core.datasets.indexed_dataset", "transformers"],
    "encode_batch": ["transformers"],
    "tiktoken": ["tiktoken"],
    "millstream": ["data_pipeline.passes"],
}

if __name__ == "__main__":
    main()
