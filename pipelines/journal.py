"""What a run writes down while it trains: config.yaml, metrics.jsonl, TensorBoard events, grids.

One process writes (rank 0). A run folder on a disk is written in place; for one in an object
store the files grow in a local folder and are copied at intervals. After a resume nothing is
said twice: lines past the checkpoint are cut off before new ones are added, and TensorBoard is
told to forget them.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from pipelines import storage
from pipelines.config import TrainConfig

METRICS = "metrics.jsonl"
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
        storage.write_bytes(storage.join(run, "config.yaml"), text.encode())

        self.metrics = self.folder / METRICS
        storage.write_bytes(str(self.metrics), b"".join(kept_lines(run, images_seen)))
        self.events = SummaryWriter(
            self.folder / "tensorboard", purge_step=images_seen + 1 if images_seen else None
        )
        self._copied: dict[Path, int] = {}
        self._synced = time.monotonic()

    def line(self, values: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl, and its numbers to TensorBoard, over images_seen."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        for name, value in values.items():
            if name != "images_seen":
                self.events.add_scalar(f"train/{name}", value, values["images_seen"])
        if time.monotonic() - self._synced > SYNC_S:
            self.sync()

    def grid(self, picture: Image.Image, images_seen: int) -> str:
        """Store a grid of samples; its URI."""
        uri = storage.join(self.run, "samples", f"images_{images_seen:010d}.png")
        with storage.staged(uri) as path:
            picture.save(path, format="png")
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        shape = (picture.height, picture.width, 3)
        self.events.add_image("samples", pixels.view(shape), images_seen, dataformats="HWC")
        return uri

    def sync(self) -> None:
        """Make everything said so far visible at the run's URI."""
        self.events.flush()
        self._synced = time.monotonic()
        if not self.is_remote:
            return
        assert self.folder is not None
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            size = path.stat().st_size
            if self._copied.get(path) != size:
                relative = path.relative_to(self.folder).as_posix()
                storage.write_bytes(storage.join(self.run, relative), path.read_bytes())
                self._copied[path] = size

    def close(self) -> None:
        """Write what is left."""
        self.events.close()
        self.sync()
        if self._temporary:
            self._temporary.cleanup()


def kept_lines(run: str, images_seen: int) -> list[bytes]:
    """Lines of metrics.jsonl up to a checkpoint; what came after will be computed again."""
    uri = storage.join(run, METRICS)
    if not images_seen or not storage.exists(uri):
        return []
    lines = storage.read_bytes(uri).splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]  # a kill may cut the last one
    return [line for line in whole if json.loads(line)["images_seen"] <= images_seen]
