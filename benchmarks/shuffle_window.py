"""What a shuffle window saves and costs, for datasets that are fetched: `python -m benchmarks.shuffle_window`.

A simulated dataset of about equal shards (no data is read). Per window: how many shards 1,000 steps touch; how often an
epoch transfers each shard when the cache holds the given number of shards and forgets the one used longest ago; and how
well batches are mixed: the spread of the mean place (in the dataset) of a batch's samples over that of batches drawn
from everything. 1.0 is as good as those; at 4.0 a dataset whose parts differ shows that four times as much.
"""

from __future__ import annotations

import argparse

import numpy as np

from data_pipeline.order import nearby_ids, sample_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--shard-samples", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--cached", type=int, default=64, help="shards the cache holds")
    given = parser.parse_args()
    lengths = np.random.default_rng(0).integers(given.shard_samples * 0.95, given.shard_samples * 1.05, given.shards)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    print(
        f"{given.shards} shards of about {given.shard_samples:,} samples, batches of {given.batch}, "
        f"a cache of {given.cached} shards\n"
    )
    print("| window, in shards | shards in 1,000 steps | transfers of a shard, per epoch | spread of batch means |")
    print("|---|---|---|---|")
    for shards in (None, 256, 64, 16, 4, 1):
        window = None if shards is None else shards * given.shard_samples
        used = np.searchsorted(starts, order(0, int(starts[-1]), starts, window), side="right") - 1
        touched = len(np.unique(used[: 1000 * given.batch]))
        transfers = count_transfers(used, given.batch, given.cached) / given.shards
        print(
            f"| {shards or 'none'} | {touched} | {transfers:.2f} | {spread(given.batch, starts, window):.2f} |",
            flush=True,
        )


def order(first: int, count: int, starts: np.ndarray, window: int | None) -> np.ndarray:
    if window is None:
        return sample_ids(1, "benchmark", first, count, int(starts[-1]))
    return nearby_ids(1, "benchmark", first, count, starts, window)


def count_transfers(used: np.ndarray, batch: int, cached: int) -> int:
    """Transfers of shards for batches from the shards `used`, with a cache of `cached` shards (least recently used)."""
    held: dict[int, None] = {}
    transfers = 0
    for first in range(0, len(used), batch):
        for shard in np.unique(used[first : first + batch]).tolist():
            if shard in held:
                held.pop(shard)
            else:
                transfers += 1
                if len(held) == cached:
                    held.pop(next(iter(held)))
            held[shard] = None
    return transfers


def spread(batch: int, starts: np.ndarray, window: int | None, num_batches: int = 2000) -> float:
    """Standard deviation of batches' mean places over that of independent draws; batches from all over the epoch."""
    size = int(starts[-1])
    first = np.random.default_rng(0).integers(0, size - batch, num_batches)
    means = [order(int(start), batch, starts, window).mean() / size for start in first]
    return float(np.std(means) / np.sqrt(1 / 12 / batch))


if __name__ == "__main__":
    main()
