"""What a run writes down while it trains: config.yaml, metrics.jsonl, TensorBoard events, grids.

One process writes (rank 0). A run folder on a disk is written in place; for one in an object
store the files grow in a local folder and are copied at intervals. After a resume nothing is
said twice: lines past the checkpoint are cut off before new ones are added, and TensorBoard is
told to forget them.

What cannot be written down stops no training: the first time there is a warning.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from pipelines import storage
from pipelines.checkpoints import CONFIG, METRICS, metrics_lines
from pipelines.config import TrainConfig
from pipelines.trackers import Outbox, open_trackers

logger = logging.getLogger(__name__)

SYNC_S = 60.0
"""Longest time that an object store lacks the newest lines, beside checkpoints."""


class Journal:
    """The records of a run.

    Args:
        run: URI of the run folder.
        config: written as config.yaml.
        images_seen: where the run goes on; 0 for a new one.
    """

    def __init__(self, run: str, config: TrainConfig, images_seen: int) -> None:
        self.run = run
        self.folder = storage.local_path(run)
        self.is_remote = self.folder is None
        self._temporary = tempfile.TemporaryDirectory(prefix="jit-run-") if self.is_remote else None
        if self._temporary:
            self.folder = Path(self._temporary.name)
        assert self.folder is not None
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        storage.write_bytes(storage.join(run, CONFIG), text.encode())

        self.metrics = self.folder / METRICS
        # What came after the checkpoint will be computed again.
        kept = [line for seen, line in metrics_lines(run) if seen <= images_seen]
        storage.write_bytes(str(self.metrics), b"".join(kept))
        # At image 0, too: a run that was killed before its first checkpoint has points already.
        self.events = SummaryWriter(self.folder / "tensorboard", purge_step=images_seen + 1)
        self.trackers = Outbox(open_trackers(run, config, str(self.folder)))
        self._copied: dict[Path, int] = {}
        # One thread, so that a slow store delays no step, and all goes in turn.
        self._later = ThreadPoolExecutor(1, "jit-journal")
        self._synced = time.monotonic()
        self._has_warned = False

    def line(self, values: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl, and its numbers to TensorBoard, over images_seen."""
        self._try(self._append, json.dumps(values) + "\n")
        self._curves("train", numbers(values), values["images_seen"])
        if self.is_remote and time.monotonic() - self._synced > SYNC_S:
            self._synced = time.monotonic()
            self._try(self.events.flush)
            self._later.submit(self._try, self._upload)

    def _append(self, line: str) -> None:
        end = self.metrics.stat().st_size
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError:
            os.truncate(self.metrics, end)  # the half of a line that a full disk took
            raise

    def grid(self, picture: Image.Image, images_seen: int) -> None:
        """Store a grid of samples."""
        self._try(self._grid, picture, images_seen)

    def _grid(self, picture: Image.Image, images_seen: int) -> None:
        uri = storage.join(self.run, "samples", f"images_{images_seen:010d}.png")
        with storage.staged(uri) as path:
            picture.save(path, format="png")
        logger.info("samples: %s", uri)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        shape = (picture.height, picture.width, 3)
        self.events.add_image("samples", pixels.view(shape), images_seen, dataformats="HWC")

    def health(self, drawn: dict[str, float], real: dict[str, float], images_seen: int) -> None:
        """Add the health of a grid to the curves, beside that of real images."""
        for whose, values in (("drawn", drawn), ("real", real)):
            named = {f"{name}_{whose}": value for name, value in values.items()}
            self._curves("health", named, images_seen)

    def _curves(self, group: str, values: dict[str, float], images_seen: int) -> None:
        named = {f"{group}/{name}": value for name, value in values.items()}
        for name, value in named.items():
            self._try(self.events.add_scalar, name, value, images_seen)
        self.trackers.log(named, images_seen)

    def sync(self) -> None:
        """Make everything said so far visible at the run's URI; any thread may ask for it.

        Raises:
            OSError: the store cannot be written.
        """
        self._try(self.events.flush)
        if self.is_remote:
            self._later.submit(self._upload).result()

    def _upload(self) -> None:
        assert self.folder is not None
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            size = path.stat().st_size
            if self._copied.get(path) != size:
                relative = path.relative_to(self.folder).as_posix()
                storage.write_bytes(storage.join(self.run, relative), path.read_bytes())
                self._copied[path] = size

    def close(self) -> None:
        """Write what is left."""
        self._try(self.events.close)
        if self.is_remote:
            self._later.submit(self._try, self._upload)
        self._later.shutdown()
        self.trackers.close()
        if self._temporary:
            self._temporary.cleanup()

    def _try(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do something without which training goes on; any thread may."""
        try:
            work(*arguments)
        except Exception as error:  # TensorBoard's writer raises what its thread ran into
            if not self._has_warned:
                logger.warning("metrics could not be stored, training goes on: %s", error)
            self._has_warned = True


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line by name, for tools that draw curves; lists get one name an item."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            flat |= {f"{name}/{i}": v for i, v in enumerate(value) if v is not None}
        elif name != "images_seen" and value is not None:
            flat[name] = value
    return flat
