"""Remembers the token ids of short stretches of text, so that each distinct one is tokenized once.

A tokenizer never looks across certain places, such as the white space between two words of BERT. What lies between two
such places, a chunk, has the same ids wherever it stands. Few chunks make up most of a text, so the work left is to cut
the text and look its chunks up, which numpy does for 200,000 of them at once: about 6 ms for 1 MB of English.

A chunk's key is its bytes, padded with zeros, and its length. Equal keys are equal chunks, so nothing rests on a hash
being free of collisions. Keys are found by open addressing with linear probing (Knuth, TAOCP 3, 6.4, algorithm L).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

PADDING = 32  # bytes that must follow the last chunk, for keys are read in whole words
SLOTS = 1 << 20  # of the table of short chunks; 24 MB once in use
LARGEST_LOAD = 0.75  # share of the slots in use at which everything is forgotten

# What becomes of chunks: their ids one after the other, and how many each of them has.
IdsOf = Callable[[list[bytes]], tuple[np.ndarray, np.ndarray]]

_LOW_BYTES = np.array([(1 << (8 * count)) - 1 for count in range(9)], dtype=np.uint64)
_MULTIPLIERS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], dtype=np.uint64
)


class ChunkTable:
    """Ids of chunks, each asked from `ids_of` once; `dtype` is that of the ids."""

    def __init__(self, ids_of: IdsOf, dtype: np.dtype, slots: int = SLOTS) -> None:
        self.ids_of, self.slots, self.dtype = ids_of, slots, dtype
        self.forget()

    def forget(self) -> None:
        # most chunks are shorter than 16 bytes; words of Cyrillic or Devanagari are often longer
        self.tables = [KeyTable(2, self.slots), KeyTable(4, self.slots // 4)]
        self.ids = np.zeros(1 << 16, self.dtype)  # of all chunks that are remembered, one after the other
        self.num_ids = 0

    def look_up(self, data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the chunks data[starts[i]:ends[i]], one after the other, and their counts, (num_chunks,) int64.

        data: (bytes,) uint8, with `PADDING` bytes after the last chunk. starts, ends: (num_chunks,) int64.
        """
        lengths = ends - starts
        members = self._members(lengths)
        if any(table.is_full(len(which)) for table, which in zip(self.tables, members, strict=True)):
            self.forget()
        places = np.full(len(starts), -1)  # offset in self.ids << 32 | count; -1: not known
        for table, which in zip(self.tables, members, strict=True):
            if len(which):
                places[which] = table.find(table.keys(data, starts[which], lengths[which]))
        if len(unknown := np.flatnonzero(places < 0)):
            try:
                places[unknown] = self._learn(data, starts[unknown], lengths[unknown])
            except BaseException:
                self.forget()  # keys were added that have no ids
                raise
        counts = places & 0xFFFFFFFF
        index = np.repeat((places >> 32) - (np.cumsum(counts) - counts), counts)
        index += np.arange(len(index))
        return self.ids[index], counts

    def _members(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Of each table, the chunks whose keys it holds."""
        short = lengths <= self.tables[0].longest
        return [np.flatnonzero(short), np.flatnonzero(~short & (lengths <= self.tables[1].longest))]

    def _learn(self, data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Places of chunks that no table has. Those too long for a key are overwritten by what is learnt next."""
        content = data.data
        chunks: list[bytes] = []
        added: list[tuple[KeyTable, np.ndarray, np.ndarray, np.ndarray]] = []
        for table, which in zip(self.tables, self._members(lengths), strict=True):
            if not len(which):
                continue
            slots = table.add(table.keys(data, starts[which], lengths[which]))
            slots, first, inverse = np.unique(slots, return_index=True, return_inverse=True)
            added.append((table, which, slots, inverse))
            chunks += _slices(content, starts[which[first]], lengths[which[first]])
        num_kept = len(chunks)
        long = np.flatnonzero(lengths > self.tables[-1].longest)
        chunks += _slices(content, starts[long], lengths[long])

        ids, counts = self.ids_of(chunks)
        new_places = (self.num_ids + np.cumsum(counts) - counts) << 32 | counts
        if self.num_ids + len(ids) > len(self.ids):
            self.ids = np.concatenate([self.ids[: self.num_ids], np.empty(len(ids) + self.num_ids, self.dtype)])
        self.ids[self.num_ids : self.num_ids + len(ids)] = ids
        self.num_ids += int(counts[:num_kept].sum())

        places = np.empty(len(starts), np.int64)
        done = 0
        for table, which, slots, inverse in added:
            table.rows[slots, -1] = new_places[done : done + len(slots)]
            table.num_keys += len(slots)
            places[which] = new_places[done : done + len(slots)][inverse]
            done += len(slots)
        places[long] = new_places[num_kept:]
        return places


class KeyTable:
    """A hash table with keys of `num_words` uint64 each and one int64 as value."""

    def __init__(self, num_words: int, slots: int) -> None:
        self.longest = 8 * num_words - 1  # bytes; the last byte of a key is the chunk's length, so no key is all zero
        self.num_words, self.slots, self.num_keys = num_words, slots, 0
        # a row is a key and its value: one look-up then touches one line of the processor's cache, not three
        self.rows = np.zeros((slots, num_words + 1), np.uint64)  # the last word of the key is 0: the slot is empty

    def is_full(self, num_more: int) -> bool:
        return self.num_keys > 0 and self.num_keys + num_more > LARGEST_LOAD * self.slots

    def keys(self, data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(num_words, chunks) uint64."""
        unaligned = np.ndarray((len(data) - 7,), np.dtype("<u8"), data, strides=(1,))
        keys = np.empty((self.num_words, len(starts)), np.uint64)
        for number, key in enumerate(keys):
            np.take(unaligned, starts + 8 * number if number else starts, out=key, mode="clip")
            key &= _LOW_BYTES.take(lengths - 8 * number, mode="clip")
        keys[-1] |= lengths.view(np.uint64) << np.uint64(56)
        return keys

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The value of each key, -1 where there is none."""
        slots = self._first_slots(keys)
        found = np.full(len(slots), -1)
        left: np.ndarray | slice = slice(None)
        while len(slots):
            rows = self.rows.take(slots, axis=0, mode="clip")
            same = self._same(rows, keys)
            found[left] = np.where(same, rows[:, -1].view(np.int64), -1)
            on = np.flatnonzero(~same & (rows[:, -2] != 0))
            left = on if isinstance(left, slice) else left[on]
            slots, keys = (slots[on] + 1) % self.slots, keys[:, on]
        return found

    def add(self, keys: np.ndarray) -> np.ndarray:
        """The slots given to keys that the table does not have; equal keys get the same one."""
        slots = self._first_slots(keys)
        left = np.arange(len(slots))
        while len(left):
            here = slots[left]
            free = self.rows[here, -2] == 0
            self.rows[here[free], :-1] = keys[:, left[free]].T  # where several want one slot, one of them stays
            left = left[~self._same(self.rows[here], keys[:, left])]
            slots[left] = (slots[left] + 1) % self.slots
        return slots

    def _same(self, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
        same = rows[:, 0] == keys[0]
        for number in range(1, self.num_words):
            same &= rows[:, number] == keys[number]
        return same

    def _first_slots(self, keys: np.ndarray) -> np.ndarray:
        mixed = keys[0] * _MULTIPLIERS[0]
        for number in range(1, self.num_words):
            mixed ^= keys[number] * _MULTIPLIERS[number]
        mixed ^= mixed >> np.uint64(29)
        mixed *= _MULTIPLIERS[0]
        mixed >>= np.uint64(65 - self.slots.bit_length())
        return mixed.view(np.int64)


def _slices(content: memoryview, starts: np.ndarray, lengths: np.ndarray) -> list[bytes]:
    return [
        bytes(content[start : start + length]) for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
    ]
