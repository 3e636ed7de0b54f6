"""The order of the training images, as arithmetic: (seed, absolute index) -> row group and row.

The run is one endless stream of images, addressed by `index`, the number of images seen before.
With N rows in the dataset and L lanes:

- Epoch e is exactly the indices e*N .. (e+1)*N - 1, and each row comes once in it. Nothing is
  dropped or padded: a global batch may hold the end of one epoch and the start of the next.
- Lane l is the indices i with i % L == l. So any L (or 2L, ...) consecutive images hold equally
  many of every lane, wherever they start, also across the seam of two epochs.
- Row groups are permuted anew in each epoch and laid end to end, which gives N positions. The
  positions are cut into L consecutive segments, one a lane, as long as the lane has indices in
  the epoch: N // L or one more. Cutting rows and not whole groups is what keeps the lanes equal
  with uneven groups, with fewer groups than lanes, and with a prime N; its price is that the
  groups at the L - 1 cuts are read by two lanes.
- Inside its segment a lane shuffles the rows of `window` consecutive row groups together, so it
  holds one window in memory. Lane l's first window is shorter by l % window groups, so that the
  lanes do not all come to a new window in the same step.

A worker of a world of W owns the lanes rank * L/W .. (rank + 1) * L/W - 1: its memory is
L/W windows, and the global batch is the same for every W that divides L.

Permutations sort the raw output of Philox, keyed by (seed, epoch) or (seed, epoch, lane,
window). NumPy keeps raw output stable between versions, which it does not promise for
`Generator.permutation`, so a run may be resumed years later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Window(NamedTuple):
    """Rows that one lane draws in this order."""

    first: int
    """Index of the first row; the next rows follow in steps of `lanes`."""
    group: Ints
    """Row group of each row."""
    row: Ints
    """Row inside its row group."""


class _Epoch(NamedTuple):
    groups: Ints
    """Row groups in this epoch's order."""
    ends: Ints
    """Position after the last row of each of them."""


def _permutation(n: int, seed: int, *key: int) -> Ints:
    sequence = np.random.SeedSequence(seed, spawn_key=key)
    return np.argsort(np.random.Philox(sequence).random_raw(n), kind="stable")


class Order:
    """The order of a dataset whose row groups hold `group_rows` rows.

    Raises:
        ValueError: there are no rows, or a row group is empty.
    """

    def __init__(self, group_rows: Sequence[int], *, seed: int, lanes: int, window: int) -> None:
        self.group_rows = np.asarray(group_rows, np.int64)
        if len(self.group_rows) == 0 or self.group_rows.min() < 1:
            raise ValueError("cannot order a dataset with no row group, or with an empty one")
        self.num_rows = int(self.group_rows.sum())
        self.seed, self.lanes, self.window_groups = seed, lanes, window
        self._epochs: dict[int, _Epoch] = {}

    def owned(self, rank: int, world_size: int) -> range:
        """Lanes of one worker.

        Raises:
            ValueError: the lanes cannot be dealt evenly.
        """
        if self.lanes % world_size:
            raise ValueError(
                f"{self.lanes} lanes cannot be dealt evenly to {world_size} workers: use a number "
                f"of workers that divides {self.lanes} (--loader.lanes is fixed for a run)"
            )
        each = self.lanes // world_size
        return range(rank * each, (rank + 1) * each)

    def indices(self, start: int, stop: int, lanes: range) -> Ints:
        """The indices in start .. stop - 1 that belong to `lanes`, rising."""
        index = np.arange(start, stop, dtype=np.int64)
        lane = index % self.lanes
        return index[(lane >= lanes.start) & (lane < lanes.stop)]

    def window(self, index: int) -> Window:
        """The window that `index` falls into, whole."""
        epoch, lane = index // self.num_rows, index % self.lanes
        groups, ends = self._epoch(epoch)
        start, length = self._segment(epoch, lane)
        first = epoch * self.num_rows + (lane - epoch * self.num_rows) % self.lanes
        position = start + (index - first) // self.lanes

        slot, first_slot = np.searchsorted(ends, (position, start), side="right").tolist()
        lead = lane % self.window_groups
        number = (slot - first_slot + lead) // self.window_groups
        begin = first_slot - lead + number * self.window_groups
        end = min(begin + self.window_groups, len(ends))
        low = max(start, int(ends[begin - 1]) if begin > 0 else 0)
        high = min(start + length, int(ends[end - 1]))

        positions = low + _permutation(high - low, self.seed, 1, epoch, lane, number)
        slots = np.searchsorted(ends, positions, side="right")
        group = groups[slots]
        row = positions - (ends[slots] - self.group_rows[group])
        return Window(first + (low - start) * self.lanes, group, row)

    def rows(self, start: int, stop: int) -> tuple[Ints, Ints]:
        """Row group and row of the indices start .. stop - 1, for any range of them."""
        group = np.empty(stop - start, np.int64)
        row = np.empty(stop - start, np.int64)
        for index in range(start, min(start + self.lanes, stop)):
            at = index
            while at < stop:
                window = self.window(at)
                skip = (at - window.first) // self.lanes
                n = min(len(window.row) - skip, -(-(stop - at) // self.lanes))
                into = slice(at - start, at - start + n * self.lanes, self.lanes)
                group[into] = window.group[skip : skip + n]
                row[into] = window.row[skip : skip + n]
                at += n * self.lanes
        return group, row

    def _segment(self, epoch: int, lane: int) -> tuple[int, int]:
        """First position of a lane in an epoch, and how many it has."""
        each, extra = divmod(self.num_rows, self.lanes)
        # The epoch starts in lane `s`; lanes s, s + 1, ... (mod L) have the `extra` rows.
        s = epoch * self.num_rows % self.lanes
        before = min(max(lane - s, 0), extra) + min(lane, max(s + extra - self.lanes, 0))
        return lane * each + before, each + ((lane - s) % self.lanes < extra)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            if len(self._epochs) >= 4:  # lanes are at most one epoch apart, unless rows are few
                self._epochs.pop(next(iter(self._epochs)))
            groups = _permutation(len(self.group_rows), self.seed, 0, epoch)
            self._epochs[epoch] = _Epoch(groups, np.cumsum(self.group_rows[groups]))
        return self._epochs[epoch]
