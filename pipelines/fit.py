"""The training loop: dataset folder -> run folder, in one of `world_size` equal processes.

`fit(config, context)` knows nothing of Ray: a context says who the process is. Ray Train and a
plain local process are its two implementations. With more than one process, torch.distributed is
initialised before fit is called, and the model is sharded over all of them (FSDP2).

The run folder decides where to begin: fit continues from its newest complete checkpoint, or at
image 0 if there is none. Everything random is addressed by images_seen, so a continued run is the
unbroken run.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

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
from jitmodel.state import TrainState
from pipelines import checkpoints, health, storage, validation
from pipelines.checkpoints import Checkpoint, Meta, Saver
from pipelines.config import TrainConfig
from pipelines.journal import Journal
from pipelines.loader import Batch, Loader
from pipelines.meter import Meter, NonFiniteLoss
from pipelines.report import image_grid
from pipelines.shards import Manifest, read_manifest
from pipelines.versions import tool_versions

logger = logging.getLogger(__name__)
T = TypeVar("T")

GRID_ROWS, GRID_COLUMNS = 10, 8
"""Classes and images of a class in a grid of samples."""


class FitContext(Protocol):
    """Who this process is, and whom it tells."""

    rank: int
    world_size: int
    device: torch.device

    def report(self, metrics: dict[str, Any], checkpoint: str) -> None:
        """Called by every rank when a checkpoint is stored, with its URI."""

    def preempted(self) -> bool:
        """Whether this run has just been told that it will lose a machine; every rank gets the
        same answer."""

    def check_alone(self) -> None:
        """Raise PermissionError if another command writes this run by now."""


@dataclass
class LocalContext:
    """One plain process."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(
        default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )

    def report(self, metrics: dict[str, Any], checkpoint: str) -> None:
        """Nobody is told."""

    def preempted(self) -> bool:
        """A local process is not warned."""
        return False

    def check_alone(self) -> None:
        """Who calls fit by hand sees to that."""


class FitResult(NamedTuple):
    """What a finished run says."""

    run: str
    images_seen: int
    checkpoint: str
    metrics: dict[str, Any]
    """The last line of metrics.jsonl that this process computed; empty if it had no step to do."""
    stopped: str = ""
    """Why the run ended before it had seen all images; empty if it has seen them."""


def run_uri(config: TrainConfig) -> str:
    """The run folder."""
    return storage.join(config.storage, config.name)


def check_fits(config: TrainConfig, manifest: Manifest) -> None:
    """Refuse a dataset that the model cannot be trained on.

    Raises:
        ValueError: naming both values, and the option.
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


def resume_point(config: TrainConfig, manifest: Manifest) -> Checkpoint | None:
    """The checkpoint that a run continues from; None to begin at image 0.

    Raises:
        ValueError: the run was started as another one.
        FileNotFoundError: the run had a complete checkpoint, and has none now.
    """
    identity = checkpoints.identity(config, manifest)
    checkpoint = checkpoints.newest(run_uri(config))
    if checkpoint:
        checkpoints.check_same(checkpoint, identity)
    else:
        checkpoints.check_never_saved(run_uri(config), identity)
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
        NonFiniteLoss: on every rank, with the same message; with config.non_finite "skip", when
            it happened more than config.max_skips times in this start of the run.
        SaveFailed: on every rank, with the same message.
    """
    skipped: set[int] = set()
    skips = 0
    while True:
        try:
            return _fit(config, context, skipped)
        except NonFiniteLoss as error:
            if config.non_finite == "stop" or skips == config.max_skips:
                raise
            skips += 1
            skipped.add(error.images_seen)
            if context.rank == 0:
                logger.warning("%s\nGoing back, and leaving this batch out.", str(error))
        gc.collect()  # a sharded model has cycles, and a second one may not fit beside it


def _fit(config: TrainConfig, context: FitContext, skipped: set[int]) -> FitResult:
    """fit, without going back.

    Args:
        skipped: places at which a batch begins that is left out; those that the run has left out
            before are added.
    """
    run, manifest = run_uri(config), read_manifest(config.data)
    check_fits(config, manifest)
    micro_batch, accumulation = config.split(context.world_size)
    start = _broadcast(resume_point(config, manifest), context)
    state = build(config, context)
    if start:
        checkpoints.load(start.uri, state)
        skipped |= set(start.meta.skipped)
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
    carried = (start.meta.losses, start.meta.levels) if start else ()
    meter = Meter(config, context, manifest.num_rows, *carried)
    saver = Saver(
        run,
        rank=context.rank,
        world_size=context.world_size,
        keep=partial(kept_steps, config),
        check=context.check_alone,
    )
    if start:
        saver.prepare(state)
    uri, line = start.uri if start else "", dict[str, Any]()
    rising = _broadcast(early_stop(config), context)
    for unjudged in _broadcast(without_score(config), context):
        context.report({}, unjudged)

    def stored(found: str) -> str:
        """A save has ended, in the same step on every rank; why training shall stop now."""
        nonlocal uri
        if not found:
            return ""
        uri = found
        context.report({**line, "images_seen": state.images_seen}, uri)
        if journal:
            logger.info("checkpoint: %s", uri)
        return _broadcast(early_stop(config), context)

    stream = loader.batches(state.images_seen)
    try:
        while state.images_seen < config.total_images and not rising:
            waiting = time.perf_counter()
            batches = [next(stream) for _ in range(accumulation)]
            meter.waited += time.perf_counter() - waiting
            if state.images_seen in skipped:
                state.images_seen += config.global_batch
            else:
                result = state.step([_on(context.device, batch) for batch in batches])
                meter.add(state.images_seen, batches, result)
                saver.prepare(state)
            rising = stored(saver.poll())

            seen = state.images_seen
            last = seen >= config.total_images
            # A round number of images was passed in this step.
            save, draw = (
                last or seen // every > (seen - config.global_batch) // every
                for every in (config.checkpoint_every_images, config.grid_every_images or seen + 1)
            )
            notice = context.preempted()
            if notice:
                save = True
                logger.warning("this run will lose a machine: saving at image %d", seen)
            if meter.steps and (last or seen // config.global_batch % config.log_every_steps == 0):
                line = meter.line(state)
                if journal:
                    journal.line(line)
                    logger.info(meter.status(line))
            if draw and config.grid_every_images:
                began = time.perf_counter()
                picture = draw_grid(config, context, state, manifest)
                if journal:
                    journal.grid(image_grid(*picture), seen)
                    real = torch.cat([batch.pixels for batch in batches])
                    look_at(picture[0], real, config, journal, seen)
                meter.pause(time.perf_counter() - began)
            if save and saver.is_prepared:  # with nothing trained there is nothing to save
                meter.check()
                rising = stored(saver.wait()) or rising
                if rising:
                    break
                meta = Meta(
                    run=config.name,
                    images_seen=seen,
                    identity=checkpoints.identity(config, manifest),
                    config=config.model_dump(mode="json"),
                    data=manifest.fingerprint,
                    classes=tuple(manifest.classes),
                    world_size=context.world_size,
                    losses=tuple(meter.losses),
                    levels=meter.levels(),
                    skipped=tuple(sorted(skipped)),
                    files={},
                    versions=tool_versions(),
                )
                step = seen // config.global_batch
                saver.start(step, state, meta, before=journal.sync if journal else None)
                if last or notice:
                    rising = stored(saver.wait())
    except NonFiniteLoss:
        if config.non_finite == "skip":  # go back to the newest, which may be in work
            saver.wait()
        raise
    finally:
        saver.leave()
        stream.close()
        if journal:
            journal.close()
    ended = state.images_seen >= config.total_images
    return FitResult(run, state.images_seen, uri, line, "" if ended else rising)


def early_stop(config: TrainConfig) -> str:
    """Why training shall stop before its end; empty if it shall go on."""
    if not config.validation.patience:
        return ""
    try:
        found = validation.scores(run_uri(config), config.validation, config.sampler)
    except OSError as error:
        logger.warning("scores cannot be read, training goes on: %s", error)
        return ""
    return validation.verdict(found, config.validation.patience)


def without_score(config: TrainConfig) -> list[str]:
    """Complete checkpoints that nobody has judged yet, newest first."""
    if not config.validation.reference:
        return []
    run = run_uri(config)
    judged = {score.step for score in validation.scores(run, config.validation, config.sampler)}
    there = checkpoints.complete(run)
    return [there[step] for step in sorted(there, reverse=True) if step not in judged]


def look_at(
    drawn: Tensor, real: Tensor, config: TrainConfig, journal: Journal, images_seen: int
) -> None:
    """Write down how healthy drawn images are beside real ones, and warn of what is not."""
    patch = config.model.patch_size
    here, there = (health.measure(pixels.numpy(), patch) for pixels in (drawn, real))
    journal.health(here._asdict(), there._asdict(), images_seen)
    for sentence in health.findings(here, there):
        logger.warning("health check at image %d: %s", images_seen, sentence)


def kept_steps(config: TrainConfig, steps: list[int]) -> set[int]:
    """Checkpoints that stay: the newest ones, each n-th that the schedule made, the best ones and
    the one that is being judged."""
    stay = set(steps[-config.keep_checkpoints :])
    if config.keep_every:
        every = config.keep_every * config.checkpoint_every_images
        batch = config.global_batch
        stay |= {step for step in steps if step * batch // every > (step - 1) * batch // every}
    if config.validation.reference:
        found = validation.scores(run_uri(config), config.validation, config.sampler)
        there = [score for score in found if score.step in steps]
        stay |= {score.step for score in validation.best(there, config.validation.keep_best)}
        stay |= validation.judged_now(run_uri(config)) & set(steps)
    return stay


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
        for part in state.model.modules():
            if isinstance(part, FSDPModule):  # one may keep gathered weights after a forward pass
                part.reshard()
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


def _broadcast(value: T, context: FitContext) -> T:
    """What rank 0 found: the others may have looked at another moment."""
    if context.world_size == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    found: T = box[0]
    return found
