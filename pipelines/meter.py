"""What a training run says about itself: losses, speed, memory; and when a loss is no number.

Every rank has a meter and calls it alike: what is said is about all of them.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from jitmodel import cost
from jitmodel.state import StepResult, TrainState
from pipelines.config import StageFailed, TrainConfig
from pipelines.loader import Batch

LEVELS = 10
"""Bins of t, between noise (0) and image (1), in which losses are told apart."""
Levels = tuple[tuple[float, ...], ...]
"""Sum and number of the losses of each bin."""


class Place(Protocol):
    """Which process this is."""

    rank: int
    world_size: int
    device: torch.device


class NonFiniteLoss(StageFailed):
    """The loss or the gradient is no longer a number; the last checkpoint is from before."""

    def __init__(self, message: str, images_seen: int) -> None:
        super().__init__(message)
        self.images_seen = images_seen
        """Images seen before the step."""


class Meter:
    """Losses and speed since the last line of metrics.jsonl; finds losses that are no numbers.

    On a GPU a loss is read while the next step runs, so that reading it stalls nothing.

    Args:
        config: of the run.
        place: which process this is.
        num_rows: images in an epoch.
        losses: of the steps since the last line, from a checkpoint.
        levels: the same by noise level.
    """

    def __init__(
        self,
        config: TrainConfig,
        place: Place,
        num_rows: int,
        losses: tuple[float, ...] = (),
        levels: Levels = (),
    ) -> None:
        self.config, self.place, self.num_rows = config, place, num_rows
        self.losses = list(losses)
        self.waited = 0.0
        self.peak_flops = 1e12 * config.peak_tflops or known_peak(place.device)
        self._flops = cost.train_flops(config.model)
        self._levels = torch.zeros(2, LEVELS, dtype=torch.float64)
        if levels and place.rank == 0:
            self._levels += torch.tensor(levels, dtype=torch.float64)
        self._unread: list[tuple[int, list[Batch], StepResult]] = []
        self._last: StepResult | None = None
        self.steps = 0
        """Taken in since the last line."""
        self._began = time.perf_counter()

    def add(self, images_seen: int, batches: list[Batch], result: StepResult) -> None:
        """Take in a step."""
        self.steps += 1
        self._unread.append((images_seen, batches, result))
        self.check(leave=1 if self.place.device.type == "cuda" else 0)

    def check(self, leave: int = 0) -> None:
        """Read all losses but the newest `leave`.

        Raises:
            NonFiniteLoss: one is no number; every rank raises at the same step.
        """
        while len(self._unread) > leave:
            images_seen, batches, result = self._unread.pop(0)
            loss, norm = result.loss.item(), result.grad_norm.item()
            if not np.isfinite((loss, norm)).all():
                self._stop(images_seen, batches, result, loss, norm)
            self.losses.append(loss)
            self._levels += by_level(result.times.cpu(), result.losses.cpu())
            self._last = result

    def levels(self) -> Levels:
        """Sum and number of the losses by noise level since the last line, over all ranks."""
        total = self._levels.clone()
        if self.place.world_size > 1:
            dist.all_reduce(total)
        return tuple(tuple(row) for row in total.tolist())

    def line(self, state: TrainState) -> dict[str, Any]:
        """Numbers since the last line, which then count anew; there was a step since then."""
        self.check()
        assert self._last is not None
        elapsed = time.perf_counter() - self._began
        worst = torch.tensor([self.waited, memory_gib(self.place.device)])
        if self.place.world_size > 1:
            dist.all_reduce(worst, dist.ReduceOp.MAX)
        waited, memory = worst.tolist()
        sums, counts = self.levels()
        speed = self.steps * self.config.global_batch / elapsed
        peak = self.peak_flops * self.place.world_size
        line = {
            "images_seen": state.images_seen,
            "epoch": round(state.images_seen / self.num_rows, 4),
            "loss": sum(self.losses) / len(self.losses),
            "learning_rate": self._last.learning_rate,
            "grad_norm": self._last.grad_norm.item(),
            "images_per_s": round(speed, 2),
            "mfu": round(speed * self._flops / peak, 4) if peak else None,
            "data_wait": round(waited / elapsed, 4),
            "memory_gib": round(memory, 2),
            "loss_by_t": [
                round(s / n, 6) if n else None for s, n in zip(sums, counts, strict=True)
            ],
        }
        self.losses, self.waited, self.steps = [], 0.0, 0
        self._levels.zero_()
        self._began = time.perf_counter()
        return line

    def status(self, line: dict[str, Any]) -> str:
        """A line for people."""
        left_s = (self.config.total_images - line["images_seen"]) / max(line["images_per_s"], 0.01)
        mfu = "-" if line["mfu"] is None else f"{line['mfu']:.1%}"
        return (
            f"images {line['images_seen']}/{self.config.total_images}  epoch {line['epoch']:.2f}  "
            f"loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  "
            f"grad {line['grad_norm']:.3f}  {line['images_per_s']:.1f} images/s  MFU {mfu}  "
            f"data wait {line['data_wait']:.1%}  memory {line['memory_gib']:.2f} GiB  "
            f"left {duration(max(0, left_s))}"
        )

    def pause(self, seconds: float) -> None:
        """Leave out time that was not training."""
        self._began += seconds

    def _stop(
        self, images_seen: int, batches: list[Batch], result: StepResult, loss: float, norm: float
    ) -> None:
        ids = torch.cat([batch.id for batch in batches])
        bad = ids[~result.losses.isfinite().cpu()].tolist()
        everyone: list[Any] = [bad]
        if self.place.world_size > 1:
            everyone = [None] * self.place.world_size
            dist.all_gather_object(everyone, bad)
        named = sorted(i for part in everyone for i in part)
        who = "each image's loss is finite, so it is the gradient that is not"
        if named:
            more = f" and {len(named) - 20} more" if len(named) > 20 else ""
            who = f"not finite for images with id {', '.join(map(str, named[:20]))}{more}"
        batch = self.config.global_batch
        raise NonFiniteLoss(
            f"loss {loss}, gradient norm {norm} at step {images_seen // batch} (places "
            f"{images_seen - batch} .. {images_seen - 1} of the run): {who}. No checkpoint holds "
            "this state. Look at the images; the same line again goes on from the last checkpoint, "
            "with --non-finite skip without such a batch. A lower --optimizer.learning-rate, or "
            "--optimizer.grad-clip 1, makes another run: give it a --name of its own.",
            images_seen - batch,
        )


def by_level(times: Tensor, losses: Tensor) -> Tensor:
    """Sum and number of losses in each bin of t; [B] and [B] -> float64 [2, LEVELS]."""
    level = (times.double() * LEVELS).long().clamp(0, LEVELS - 1)
    sums = torch.bincount(level, losses.double(), minlength=LEVELS)
    return torch.stack((sums, torch.bincount(level, minlength=LEVELS).double()))


def known_peak(device: torch.device) -> float:
    """Peak of a device in FLOP/s; 0 if we do not know it."""
    known = device.type == "cuda" and cost.peak_flops(torch.cuda.get_device_name(device))
    return known or 0.0


def memory_gib(device: torch.device) -> float:
    """Most memory that this process has held: of its GPU, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_resident_bytes() / 2**30


def peak_resident_bytes() -> int:
    """Most memory that this process has held, where there is Linux' /proc; 0 elsewhere.

    getrusage's maximum is no less than that of the process which started this one.
    """
    try:
        status = Path("/proc/self/status").read_text("ascii")
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


def duration(seconds: float) -> str:
    """A time for people: 42 s, 12.5 min, 3.2 h or 4.1 days."""
    for unit, length, until in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < until:
            return f"{seconds / length:.{0 if unit == 's' else 1}f} {unit}"
    return f"{seconds / 86_400:.1f} days"
