"""Dataset folder + order -> batches of (pixels, label, id, index) for one worker.

A batch is the worker's share of one global batch, or of a part of it (micro-batches). The only
state is `images_seen`: start at any value and the stream goes on from there, for any number of
workers. Row groups are read by a few threads, when a lane of this worker comes to them, and stay
encoded in memory until the lane has left their window; images are decoded by other threads,
`prefetch` batches ahead of the caller. Retries belong to storage.

A fault of the data is a DamagedData that names shard, row group and row.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipelines import images, storage
from pipelines.config import LoaderConfig
from pipelines.order import Order, Window
from pipelines.shards import Manifest, ShardInfo

logger = logging.getLogger(__name__)

READERS = 4
"""Row groups read at once: latency of an object store, not work."""
READ_AHEAD = 2
"""Batches whose row groups are being read while the one before them is decoded or in use."""
GPU_PREFETCH = 2
"""Batches that are decoded ahead by default where a GPU computes."""
STALL_S = 30.0
"""A batch that takes longer is reported in the log."""


@dataclass(frozen=True)
class Batch:
    """Images of one worker; rows rise by index."""

    pixels: Tensor
    """uint8 [B, 3, H, W] (stored channels last)."""
    label: Tensor
    """int64 [B]."""
    id: Tensor
    """The dataset's stable name of the image, int64 [B]."""
    index: Tensor
    """Position in the stream of the run: images seen before it, int64 [B]."""


@dataclass(frozen=True)
class RowGroup:
    """One row group in memory, encoded."""

    where: str
    image: pa.Array
    label: np.ndarray
    id: np.ndarray


class DamagedData(ValueError):
    """The dataset is not what its manifest says; whoever reads it again meets the same."""


Place = tuple[Future[RowGroup], int]
"""An image: its row group, and its row there."""


class Reader:
    """Reads and checks single row groups of a dataset folder; safe to share between threads."""

    def __init__(self, uri: str, manifest: Manifest) -> None:
        self.uri, self.num_classes = uri, len(manifest.classes)
        self.groups: list[tuple[ShardInfo, int]] = [
            (shard, g) for shard in manifest.shards for g in range(len(shard.row_groups))
        ]
        self._advice = f"run `jit prepare --verify {uri}` to see what is damaged"
        self._footers: dict[str, pq.FileMetaData] = {}
        self._lock = threading.Lock()

    def read(self, group: int) -> RowGroup:
        """Read one row group.

        Raises:
            FileNotFoundError: its shard is gone.
            DamagedData: the shard is not what the manifest says, or a label has no class.
        """
        shard, number = self.groups[group]
        uri = storage.join(self.uri, shard.file)
        where = f"row group {number} of {uri}"
        try:
            with storage.open_input(uri) as file:
                footer = self._footers.get(uri)
                if footer is None:
                    footer = self._footer(uri, shard, file)
                parquet = pq.ParquetFile(file, metadata=footer)
                table = parquet.read_row_group(number, columns=["image.bytes", "label", "id"])
        except pa.ArrowInvalid as error:  # an OSError may be the store's, which may come back
            why = " ".join(str(error).split())
            raise DamagedData(f"{where} is damaged: {why}; {self._advice}") from error
        label = table["label"].to_numpy()
        wrong = np.flatnonzero((label < 0) | (label >= self.num_classes))
        if len(wrong):
            raise DamagedData(
                f"row {wrong[0]} in {where} has label {label[wrong[0]]}, but the dataset has "
                f"{self.num_classes} classes: prepare it again with `jit prepare`"
            )
        image = table["image"].combine_chunks().field("bytes")
        return RowGroup(where, image, label, table["id"].to_numpy())

    def _footer(self, uri: str, shard: ShardInfo, file: pa.NativeFile) -> pq.FileMetaData:
        """The shard's footer, compared with the manifest."""
        if file.size() != shard.bytes:
            raise DamagedData(
                f"{uri} has {file.size()} bytes, the manifest says {shard.bytes}; {self._advice}"
            )
        footer = pq.read_metadata(file)
        rows = [footer.row_group(g).num_rows for g in range(footer.num_row_groups)]
        if rows != list(shard.row_groups):
            raise DamagedData(
                f"{uri} has row groups of {rows} rows, the manifest says "
                f"{list(shard.row_groups)}; {self._advice}"
            )
        with self._lock:
            self._footers[uri] = footer
        return footer


class _Lane:
    """Where one lane stands: its window, and the row groups held for it."""

    def __init__(self, window: Window, skip: int, held: dict[int, Future[RowGroup]]) -> None:
        self.window, self.at, self.held = window, skip, held


def threads_here() -> int:
    """Decoding threads of a worker: its share of the machine's CPUs, from 2 to 8."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(8, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class Loader:
    """Batches of one worker from a dataset folder.

    Args:
        uri: the dataset folder.
        manifest: its manifest.
        config: lanes, window, threads, prefetch.
        seed: seed of the order.
        global_batch: images in a global batch; a multiple of the lanes.
        micro_batch: images in a batch of this worker; divides its share of the global batch.
        rank: number of this worker.
        world_size: number of workers; divides the lanes.

    Raises:
        ValueError: the numbers do not fit each other.
    """

    def __init__(
        self,
        uri: str,
        manifest: Manifest,
        config: LoaderConfig,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if global_batch % config.lanes:
            raise ValueError(
                f"global_batch {global_batch} is not a multiple of loader.lanes {config.lanes}: "
                "each batch takes equally many images from every lane"
            )
        self.reader = Reader(uri, manifest)
        self.order = Order(
            [shard.row_groups[g] for shard, g in self.reader.groups],
            seed=seed,
            lanes=config.lanes,
            window=config.window,
        )
        self.owned = self.order.owned(rank, world_size)
        share = global_batch // world_size
        self.micro_batch = micro_batch or share
        if share % self.micro_batch:
            raise ValueError(
                f"micro_batch {self.micro_batch} does not divide {share}, a worker's share of "
                f"global_batch {global_batch} among {world_size} workers"
            )
        self.config, self.global_batch = config, global_batch
        self.threads = config.threads or threads_here()
        default = GPU_PREFETCH if torch.cuda.is_available() else 0
        self.prefetch = default if config.prefetch is None else config.prefetch
        self.image_size = manifest.image_size

    def batches(self, images_seen: int = 0) -> Generator[Batch]:
        """The endless stream of this worker's batches from `images_seen` on.

        Raises:
            FileNotFoundError: a shard is gone.
            DamagedData: a shard or an image in it is damaged.
        """
        lanes: dict[int, _Lane] = {}
        shared: dict[int, tuple[Future[RowGroup], int]] = {}  # with the number of lanes holding it
        readers = ThreadPoolExecutor(READERS, "jit-read")
        decoders = ThreadPoolExecutor(self.threads, "jit-decode")

        def hold(window: Window) -> dict[int, Future[RowGroup]]:
            held = {}
            for group in dict.fromkeys(window.group.tolist()):  # in the order of first use
                future, holders = shared.get(group) or (
                    readers.submit(self.reader.read, group),
                    0,
                )
                shared[group] = future, holders + 1
                held[group] = future
            return held

        def release(groups: dict[int, Future[RowGroup]]) -> None:
            for group in groups:
                future, holders = shared.pop(group)
                if holders > 1:
                    shared[group] = future, holders - 1

        def locate(index: int) -> Place:
            """Row group and row of an index; each lane's indices must come in order."""
            lane = lanes.get(index % self.order.lanes)
            if lane is None or lane.at == len(lane.window.row):
                window = self.order.window(index)
                skip = (index - window.first) // self.order.lanes
                held = hold(window)
                if lane:
                    release(lane.held)
                lane = lanes[index % self.order.lanes] = _Lane(window, skip, held)
            group, row = lane.window.group[lane.at], lane.window.row[lane.at]
            lane.at += 1
            return lane.held[int(group)], int(row)

        def start(index: np.ndarray, places: list[Place]) -> tuple[Batch, list[Future[None]]]:
            """Begin to fill a batch."""
            batch = self._empty(index)
            todo = deque(range(len(index)))  # images differ in cost: each thread takes the next one
            work = [decoders.submit(self._fill, batch, places, todo) for _ in range(self.threads)]
            return batch, work

        def plan() -> Iterator[np.ndarray]:
            begin = images_seen
            while True:
                index = self.order.indices(begin, begin + self.global_batch, self.owned)
                yield from index.reshape(-1, self.micro_batch)
                begin += self.global_batch

        try:
            reading: deque[tuple[np.ndarray, list[Place]]] = deque()
            decoding: deque[tuple[Batch, list[Future[None]]]] = deque()
            indices = plan()
            while True:
                if len(reading) == READ_AHEAD:
                    decoding.append(start(*reading.popleft()))
                index = next(indices)  # while the decoders work
                reading.append((index, [locate(i) for i in index.tolist()]))
                if len(decoding) > self.prefetch:
                    batch, work = decoding.popleft()
                    self._finish(batch, work)
                    yield batch
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
            decoders.shutdown(wait=False, cancel_futures=True)

    def _empty(self, index: np.ndarray) -> Batch:
        n, size, pin = len(index), self.image_size, torch.cuda.is_available()
        pixels = torch.empty((n, size, size, 3), dtype=torch.uint8, pin_memory=pin)
        label, ids = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.int64)
        return Batch(pixels.permute(0, 3, 1, 2), label, ids, torch.from_numpy(index.copy()))

    def _fill(self, batch: Batch, places: list[Place], todo: deque[int]) -> None:
        """Decode images of a batch until none is left to do; several threads share `todo`."""
        pixels = batch.pixels.permute(0, 2, 3, 1).numpy()
        label, ids = batch.label.numpy(), batch.id.numpy()
        while True:
            try:
                i = todo.popleft()
            except IndexError:
                return
            future, row = places[i]
            group = future.result()
            try:
                decoded = images.decode_pixels(memoryview(group.image[row].as_buffer()))
            except Exception as error:  # decoders raise whatever damaged bytes lead them to
                raise DamagedData(f"row {row} in {group.where} is no image: {error}") from error
            if decoded.shape != pixels.shape[1:]:
                raise DamagedData(
                    f"row {row} in {group.where} has shape {decoded.shape}, "
                    f"the manifest says {pixels.shape[1:]}"
                )
            pixels[i], label[i], ids[i] = decoded, group.label[row], group.id[row]

    def _finish(self, batch: Batch, work: list[Future[None]]) -> None:
        began = time.monotonic()
        while not_done := wait(work, timeout=STALL_S).not_done:
            logger.warning(
                "the loader has waited %.0f s for images %d .. %d (%d of %d parts still open)",
                time.monotonic() - began,
                batch.index[0],
                batch.index[-1],
                len(not_done),
                len(work),
            )
        for future in work:
            future.result()
