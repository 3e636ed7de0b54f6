"""Which images of a sorted source a shard gets, as arithmetic: (index, seed, shard) -> ids.

Images that are read together (rows of a Parquet row group) stay together; otherwise the order is
a permutation that is computed where it is needed, so that a worker of ten million images holds no
list of them. It is the same on every machine: Philox and SeedSequence keep their output between
versions of NumPy, and the rest is integers.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.index import Index

ROUNDS = 8


def permutation(n: int, *seed: int) -> NDArray[np.int64]:
    """The numbers below n in an order that is the same on every machine, for ever."""
    return np.argsort(np.random.Philox(np.random.SeedSequence(seed)).random_raw(n), kind="stable")


def permuted(x: NDArray[np.int64], n: int, *seed: int) -> NDArray[np.int64]:
    """Where a permutation of the numbers below n takes those in x, without making all of it.

    A Feistel network over the smallest 2^(2h) >= n; what it takes to n or above walks on.
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    mask, shift = np.uint64(2**half - 1), np.uint64(half)
    keys = np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)
    found = np.asarray(x).astype(np.uint64)
    todo = np.arange(len(found))
    while len(todo):
        left, right = found[todo] >> shift, found[todo] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & mask)
        found[todo] = left << shift | right
        todo = todo[found[todo] >= n]
    return found.astype(np.int64)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


class Units(NamedTuple):
    """What is read together, in a random order."""

    starts: NDArray[np.int64]
    """First image of each."""
    ends: NDArray[np.int64]
    """Position after its last image."""


def shuffled_units(index: Path, seed: int) -> Units:
    """The units of an index in a random order."""
    found = index.stat()  # a process may see the indices of several jobs at one path
    return _shuffled_units(index, seed, (found.st_size, found.st_mtime_ns, found.st_ino))


@functools.lru_cache(maxsize=2)
def _shuffled_units(index: Path, seed: int, version: tuple[int, ...]) -> Units:
    listed = Index(index)
    starts = listed.unit_starts()
    order = permutation(len(starts), seed)
    sizes = np.diff(starts, append=len(listed))[order]
    return Units(starts[order], np.cumsum(sizes))


def ids_at(positions: NDArray[np.int64], index: Path, seed: int) -> NDArray[np.int64]:
    """Ids of the images at some positions of the shuffled source."""
    listed = Index(index)
    if listed.units == len(listed):
        return permuted(positions, len(listed), seed)
    units = shuffled_units(index, seed)
    unit = np.searchsorted(units.ends, positions, "right")
    first = np.concatenate([[0], units.ends])[unit]
    return units.starts[unit] + positions - first


def ids_of_shard(index: Path, number: int, *, rows_per_shard: int, seed: int) -> NDArray[np.int64]:
    """Ids of a shard's images, in the order in which it stores them."""
    first = number * rows_per_shard
    positions = np.arange(first, min(first + rows_per_shard, len(Index(index))))
    ids = ids_at(positions, index, seed)
    return ids[permutation(len(ids), seed, number)]
