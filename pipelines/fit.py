"""The training loop: dataset folder -> run folder, in one of `world_size` equal processes.

`fit(config, context)` knows nothing of Ray: a context says who the process is. Ray Train and a
plain local process are its two implementations. With more than one process, torch.distributed is
initialised before fit is called, and the model is sharded over all of them (FSDP2).

The run folder decides where to begin: fit continues from its newest complete checkpoint, or at
image 0 if there is none. Everything random is addressed by images_seen, so a continued run is the
unbroken run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from jitmodel import state as train_state
from jitmodel.ema import local
from jitmodel.model import JiT
from jitmodel.parallel import autocast, device_mesh, parallelize
from jitmodel.pixels import to_pixels
from jitmodel.sampler import sample, start_noise
from jitmodel.state import StepResult, TrainState
from pipelines import checkpoints, storage
from pipelines.checkpoints import Checkpoint, Meta
from pipelines.config import StageFailed, TrainConfig
from pipelines.journal import Journal
from pipelines.loader import Batch, Loader
from pipelines.report import image_grid
from pipelines.shards import Manifest, read_manifest
from pipelines.versions import tool_versions

logger = logging.getLogger(__name__)

GRID_ROWS, GRID_COLUMNS = 10, 8
"""Classes and images of a class in a grid of samples."""


class FitContext(Protocol):
    """Who this process is, and whom it tells."""

    rank: int
    world_size: int
    device: torch.device

    def report(self, metrics: dict[str, Any]) -> None:
        """Called by every rank after each checkpoint."""

    def preempted(self) -> bool:
        """Whether this run will soon lose a machine; every rank gets the same answer."""


@dataclass
class LocalContext:
    """One plain process."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(
        default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )

    def report(self, metrics: dict[str, Any]) -> None:
        """Nobody is told."""

    def preempted(self) -> bool:
        """A local process is not warned."""
        return False


class FitResult(NamedTuple):
    """What a finished run says."""

    run: str
    images_seen: int
    checkpoint: str
    metrics: dict[str, Any]
    """The last line of metrics.jsonl that this process computed; empty if it had no step to do."""


class NonFiniteLoss(StageFailed):
    """The loss or the gradient is no longer a number; the last checkpoint is from before."""


def run_uri(config: TrainConfig) -> str:
    """The run folder."""
    return storage.join(config.storage, config.name)


def resume_point(config: TrainConfig, manifest: Manifest) -> Checkpoint | None:
    """The checkpoint that a run continues from; None to begin at image 0.

    Raises:
        ValueError: the dataset does not fit the model, or the run was started as another one.
    """
    model, found = config.model, (manifest.image_size, len(manifest.classes), 3)
    wanted = (model.image_size, model.num_classes, model.in_channels)
    names = ("image_size", "num_classes", "in_channels")
    for name, has, needs in zip(names, found, wanted, strict=True):
        if has != needs:
            raise ValueError(
                f"the dataset at {config.data} has {name} {has}, but model.{name} is {needs}: "
                f"set --model.{name.replace('_', '-')} {has}, or name another dataset"
            )
    checkpoint = checkpoints.newest(run_uri(config))
    if checkpoint:
        checkpoints.check_same(checkpoint, checkpoints.identity(config, manifest))
    return checkpoint


def build(config: TrainConfig, context: FitContext) -> TrainState:
    """Model, optimizer and EMAs of a run at image 0; no process ever holds more than its shard."""
    parallel = config.parallel
    with torch.device("meta"):
        model = JiT(config.model, config.flow)
    parallelize(
        model,
        device_mesh(context.device.type, context.world_size, parallel.shard_size),
        checkpointing=parallel.checkpointing,
        compile=parallel.compile,
        precision=parallel.precision,
        reshard_after_forward=parallel.reshard_after_forward,
    )
    model.to_empty(device=context.device)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    return TrainState(
        model,
        config.optimizer,
        total_images=config.total_images,
        seed=config.seed,
        precision=parallel.precision,
        flip=config.flip,
        ema_on_cpu=parallel.ema_on_cpu,
    )


def fit(config: TrainConfig, context: FitContext) -> FitResult:
    """Train until config.total_images have been seen.

    Raises:
        ValueError: the run cannot be continued with this config or dataset.
        FileNotFoundError: the dataset is not there.
        NonFiniteLoss: on every rank, with the same message.
    """
    run, manifest = run_uri(config), read_manifest(config.data)
    micro_batch, accumulation = config.split(context.world_size)
    start = _broadcast(resume_point(config, manifest), context)
    state = build(config, context)
    if start:
        checkpoints.load(start.uri, state)
    loader = Loader(
        config.data,
        manifest,
        config.loader,
        seed=config.seed,
        global_batch=config.global_batch,
        micro_batch=micro_batch,
        rank=context.rank,
        world_size=context.world_size,
    )
    journal = Journal(run, config, state.images_seen) if context.rank == 0 else None
    if journal:
        logger.info(
            "%s: %s at image %d of %d; %d processes on %s, global batch %d = %d x %d x %d",
            config.name,
            "going on" if start else "starting",
            state.images_seen,
            config.total_images,
            context.world_size,
            context.device.type,
            config.global_batch,
            context.world_size,
            micro_batch,
            accumulation,
        )
    meter = Meter(config, context, manifest.num_rows, start.meta.losses if start else ())
    uri, line = start.uri if start else "", dict[str, Any]()
    stream = loader.batches(state.images_seen)
    warned = False
    while state.images_seen < config.total_images:
        waiting = time.perf_counter()
        batches = [next(stream) for _ in range(accumulation)]
        meter.waited += time.perf_counter() - waiting
        result = state.step([_on(context.device, batch) for batch in batches])
        meter.add(state.images_seen, batches, result)

        seen = state.images_seen
        last = seen >= config.total_images
        # A round number of images was passed in this step.
        save, draw = (
            last or seen // every > (seen - config.global_batch) // every
            for every in (config.checkpoint_every_images, config.grid_every_images or seen + 1)
        )
        if not warned and context.preempted():
            warned = save = True
            logger.warning("this run will lose a machine: saving at image %d", seen)
        if last or seen // config.global_batch % config.log_every_steps == 0:
            line = meter.line(state)
            if journal:
                journal.line(line)
                logger.info(meter.status(line))
        began = time.perf_counter()
        if draw and config.grid_every_images:
            picture = draw_grid(config, context, state, manifest)
            if journal:
                logger.info("samples: %s", journal.grid(image_grid(*picture), seen))
        if save:
            meter.check()
            if journal:
                journal.sync()
            meta = Meta(
                run=config.name,
                images_seen=seen,
                identity=checkpoints.identity(config, manifest),
                config=config.model_dump(mode="json"),
                data=manifest.fingerprint,
                classes=tuple(manifest.classes),
                world_size=context.world_size,
                losses=tuple(meter.losses),
                files={},
                versions=tool_versions(),
            )
            uri = checkpoints.save(
                run,
                seen // config.global_batch,
                state,
                meta,
                rank=context.rank,
                world_size=context.world_size,
                keep=config.keep_checkpoints,
            )
            context.report({**line, "images_seen": seen})
            if journal:
                logger.info("checkpoint: %s", uri)
        meter.pause(time.perf_counter() - began)
    stream.close()
    if journal:
        journal.close()
    return FitResult(run, state.images_seen, uri, line)


class Meter:
    """Losses and speed since the last line of metrics.jsonl; finds losses that are no numbers.

    On a GPU a loss is read while the next step runs, so that reading it stalls nothing.
    """

    def __init__(
        self, config: TrainConfig, context: FitContext, num_rows: int, losses: tuple[float, ...]
    ) -> None:
        self.config, self.context, self.num_rows = config, context, num_rows
        self.losses = list(losses)
        self.waited = 0.0
        self._unread: list[tuple[int, list[Batch], StepResult]] = []
        self._last: StepResult | None = None
        self._steps = 0
        self._began = time.perf_counter()

    def add(self, images_seen: int, batches: list[Batch], result: StepResult) -> None:
        """Take in a step."""
        self._steps += 1
        self._unread.append((images_seen, batches, result))
        self.check(leave=1 if self.context.device.type == "cuda" else 0)

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
            self._last = result

    def line(self, state: TrainState) -> dict[str, Any]:
        """Numbers since the last line, which then count anew."""
        self.check()
        assert self._last is not None
        elapsed = time.perf_counter() - self._began
        line = {
            "images_seen": state.images_seen,
            "epoch": round(state.images_seen / self.num_rows, 4),
            "loss": sum(self.losses) / len(self.losses),
            "learning_rate": self._last.learning_rate,
            "grad_norm": self._last.grad_norm.item(),
            "images_per_s": round(self._steps * self.config.global_batch / elapsed, 2),
            "data_wait": round(self.waited / elapsed, 4),
        }
        self.losses, self.waited, self._steps = [], 0.0, 0
        self._began = time.perf_counter()
        return line

    def status(self, line: dict[str, Any]) -> str:
        """A line for people."""
        left_s = (self.config.total_images - line["images_seen"]) / max(line["images_per_s"], 0.01)
        return (
            f"images {line['images_seen']}/{self.config.total_images}  epoch {line['epoch']:.2f}  "
            f"loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  "
            f"grad {line['grad_norm']:.3f}  {line['images_per_s']:.1f} images/s  "
            f"data wait {line['data_wait']:.1%}  left {max(0, left_s) / 60:.1f} min"
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
        if self.context.world_size > 1:
            everyone = [None] * self.context.world_size
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
            "this state. Lower --optimizer.learning-rate, set --optimizer.grad-clip, or look at "
            "the images; the same line again goes on from the last checkpoint."
        )


def draw_grid(
    config: TrainConfig, context: FitContext, state: TrainState, manifest: Manifest
) -> tuple[Tensor, int, list[str]]:
    """Images from the grid's EMA, the same noise each time; every rank calls it and draws a part.

    Returns:
        Arguments of image_grid.
    """
    num_rows = min(GRID_ROWS, config.model.num_classes)
    labels = np.linspace(0, config.model.num_classes - 1, num_rows).round().astype(int)
    y = torch.from_numpy(labels).repeat_interleave(GRID_COLUMNS)
    each = -(-len(y) // context.world_size)  # as many for every rank: sharded weights are gathered
    mine = (torch.arange(each) * context.world_size + context.rank) % len(y)
    index, y_mine = mine.to(context.device), y[mine].to(context.device)
    model, precision = state.model, config.parallel.precision
    model.eval()
    with averaged(state, config.grid_ema), autocast(context.device, precision):
        e = start_noise(config.flow, config.model, config.seed, index)
        pixels = to_pixels(sample(model, y_mine, e, config.sampler))
    if context.world_size > 1:
        parts = [torch.empty_like(pixels) for _ in range(context.world_size)]
        dist.all_gather(parts, pixels.contiguous())
        pixels = torch.stack(parts, dim=1).flatten(0, 1)  # rank r drew r, r + W, r + 2 W, ...
    names = [manifest.classes[label].name.split(",")[0] for label in labels]
    return pixels[: len(y)].cpu(), GRID_COLUMNS, names


@contextmanager
def averaged(state: TrainState, decay: float) -> Iterator[None]:
    """The model has the weights of an EMA inside; shards are swapped in place, none is gathered."""
    if not decay:
        yield
        return

    @torch.no_grad()
    def swap() -> None:
        if isinstance(state.model, FSDPModule):
            state.model.reshard()  # the root keeps gathered weights after a forward pass
        weights = local(state.ema.parameters.values())
        for weight, average in zip(weights, local(state.ema.averages[decay].values()), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    swap()
    try:
        yield
    finally:
        swap()


def _on(device: torch.device, batch: Batch) -> train_state.Batch:
    return train_state.Batch(
        *(t.to(device, non_blocking=True) for t in (batch.pixels, batch.label, batch.index))
    )


def _broadcast(start: Checkpoint | None, context: FitContext) -> Checkpoint | None:
    """What rank 0 found: the others may have looked at another moment."""
    if context.world_size == 1:
        return start
    box: list[Any] = [start]
    dist.broadcast_object_list(box, src=0)
    found: Checkpoint | None = box[0]
    return found
