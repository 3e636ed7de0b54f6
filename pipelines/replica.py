"""A replica of the server: a network with its engine, the application over it, and its metrics.

A replica learns what to serve from `user_config`, when it starts and whenever that changes. A new
artifact is loaded and warmed beside the old one and takes over between two requests; requests that
are being drawn stay with the old one until they are done. What cannot be loaded is refused and the
old one goes on: /readyz and the metrics say so. Such a change does not hold up `reconfigure`,
because Ray sends a replica no requests meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import secrets
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import ray
import torch
from fastapi import FastAPI
from pydantic import ConfigDict, PositiveInt, StringConstraints
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.util import metrics

from jitmodel.artifact import (
    AGAIN,
    CONFIG,
    WEIGHTS,
    ArtifactInfo,
    check_artifact,
    load_artifact,
    sha256_file,
)
from jitmodel.config import Config
from pipelines import scaling, storage
from pipelines.api import Live, Service, create_app
from pipelines.config import ServeConfig
from pipelines.drawing import warn_of_slow_bf16
from pipelines.engine import Drawing, Engine, EngineFailed, few_sizes
from pipelines.generation import MAX_GUIDANCE
from pipelines.guard import QUEUE_FULL, Key
from pipelines.proxy import Tally
from pipelines.telemetry import RequestRecord

logger = logging.getLogger(__name__)

GAUGE_PERIOD_S = 1.0
KEPT_ARTIFACTS = 3
"""Copies of artifacts that a machine keeps, of those that it served last."""
KEPT_NOTES = 100
"""Servers of which a machine still knows what they served last."""
SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]


Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class Wanted(Config):
    """What `user_config` says."""

    # where a digest should be there may be a key, which no error shall repeat
    model_config = ConfigDict(hide_input_in_errors=True)

    model: str
    """URI of the artifact."""
    artifact_sha256: str = ""
    """Digest that it shall have; empty: any."""
    keys: tuple[tuple[Sha256, PositiveInt], ...] = ()
    """SHA-256 of each key, and how many requests it may have in work."""
    wish: str = ""
    """Another one each time: what was said before, Ray would not pass on."""


def wish() -> str:
    """A name for a wish that no other one has."""
    return secrets.token_hex(8)


class Server:
    """A replica: holds the network on its device, and the application over it."""

    def __init__(self, config: ServeConfig) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
        logging.getLogger("pipelines").setLevel(logging.INFO)
        self.config, self.live = config, Live()
        self.wanted: Wanted | None = None
        self.meter = Meter(config.slots)
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray Serve sends requests to; called after the constructor."""
        return create_app(self.live, self.meter.report)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serves something else from now on; called by Ray Serve."""
        self.wanted = wanted = Wanted.model_validate(user_config)
        if self.live.current is None:
            service, self.live.refused = await asyncio.to_thread(begin, self.config, wanted)
            self.take(service, wanted)
            self.live.wish = wanted.wish
            if self.live.refused is not None:
                self.meter.reloads.inc(tags={"result": "refused"})
            self.meter.watch(self.live)
            return
        # The keys at once: a lost one is not let in while an artifact loads, or because it is bad.
        self.take(self.live.service, wanted)
        task = asyncio.create_task(self.replace(wanted))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def take(self, service: Service, wanted: Wanted) -> None:
        """Lets a service answer, with the keys of a wish."""
        keys = tuple(Key(sha256, concurrent) for sha256, concurrent in wanted.keys)
        self.live.current = dataclasses.replace(service, keys=keys)
        self.meter.engines.setdefault(service.engine, (0, 0.0, 0))  # once it is no longer to come

    async def replace(self, wanted: Wanted) -> None:
        """Loads a successor beside what is served and lets it take over, unless it is refused."""
        async with self._turn:
            if wanted is not self.wanted:
                return  # another wish came meanwhile
            if wanted.artifact_sha256 == self.live.service.info.sha256:
                self.live.refused, self.live.wish = None, wanted.wish
                logger.info(
                    "serving %s as before: the artifact is the same", wanted.artifact_sha256[:12]
                )
                return
            try:
                successor = await asyncio.to_thread(load, self.config, wanted)
            except Exception as error:  # whatever is wrong with it, the old one goes on
                self.live.refused, self.live.wish = f"{wanted.model}: {error}", wanted.wish
                self.meter.reloads.inc(tags={"result": "refused"})
                logger.error(
                    "the new artifact is refused, the old one goes on with the keys of now: %s",
                    error,
                )
                return
            old = self.live.service
            self.take(successor, self.wanted)  # another wish may have come, with its keys
            self.live.refused, self.live.wish = None, wanted.wish
            self.meter.reloads.inc(tags={"result": "done"})
            logger.info("serving %s from now on", successor.info.sha256[:12])
        while old.engine.running or old.engine.waiting:  # nothing joins it any more
            await asyncio.sleep(0.05)
        await asyncio.to_thread(old.engine.close)

    async def record_autoscaling_stats(self) -> dict[str, int]:
        """What the policy of `pipelines.scaling` counts; asked by Ray Serve."""
        engines = list(self.meter.engines)  # one that drains takes its share of the machine too
        images = sum(engine.running + engine.waiting for engine in engines)
        # Slow images are refused for want of time long before slots and queue are full of them.
        refused, self.meter.refused = self.meter.refused, False
        return {scaling.IMAGES: max(images, self.config.slots + 1) if refused else images}

    def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises."""
        if self.live.current is not None and not self.live.current.engine.healthy:
            raise RuntimeError("the engine does not draw")

    def __del__(self) -> None:
        if hasattr(self, "live") and self.live.current is not None:
            self.live.current.engine.close()


def opened(uri: str, artifact_sha256: str = "") -> tuple[Path, ArtifactInfo]:
    """A local folder with an artifact that can be served, and what it says about itself.

    Args:
        uri: where the artifact is.
        artifact_sha256: digest that it shall have; empty: any.

    Raises:
        FileNotFoundError: there is no artifact.
        ValueError: it is damaged, cannot be served, or is not the one that was meant.
    """
    folder = storage.fetch(uri)
    info = check_artifact(folder)
    found = sha256_file(folder / WEIGHTS)
    if found != info.weights_sha256:
        said = f"says {info.weights_sha256}" if info.weights_sha256 else "holds no weights_sha256"
        raise ValueError(
            f"the weights of {uri} have sha256 {found}, but {CONFIG} {said}: they are damaged or "
            f"were replaced. {AGAIN}"
        )
    if artifact_sha256 not in ("", info.sha256):
        raise ValueError(
            f"{uri} holds the artifact {info.sha256[:12]}, but {artifact_sha256[:12]} is wanted: "
            "it was replaced meanwhile"
        )
    if info.model.in_channels not in (1, 3):
        raise ValueError(f"{uri} draws {info.model.in_channels} channels: a picture has 1 or 3")
    if info.sampler.cfg_scale > MAX_GUIDANCE:
        raise ValueError(
            f"{uri} recommends guidance {info.sampler.cfg_scale:g}, but images are drawn with "
            f"{MAX_GUIDANCE:g} at most: change sampler.cfg_scale in its {CONFIG}"
        )
    return folder, info


def kept(artifact_sha256: str) -> Path:
    """Where this machine keeps the artifact with this digest, once it was served here."""
    return storage.cache_folder() / "served" / artifact_sha256


def keep(folder: Path, info: ArtifactInfo) -> None:
    """Copies an artifact that can be served, so that a replica can start again when it is gone."""
    target = kept(info.sha256)
    if folder == target:
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-") as temporary:
                whole = Path(temporary) / "artifact"
                whole.mkdir()
                for name in (WEIGHTS, CONFIG):
                    shutil.copy(folder / name, whole)
                try:
                    whole.rename(target)
                except OSError:
                    if not target.exists():  # else another replica was first
                        raise
        os.utime(target)
        old = sorted(target.parent.glob("[!.]*"), key=lambda f: f.stat().st_mtime)[:-KEPT_ARTIFACTS]
        for folder in old:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:  # it is served all the same
        logger.warning("the artifact is not kept at %s: %s", target, error)


def wanted_artifact(wanted: Wanted) -> tuple[Path, ArtifactInfo]:
    """The artifact that a replica shall serve; where it was damaged since, the copy of it.

    Raises:
        FileNotFoundError, ValueError: as `opened`.
    """
    try:
        return opened(wanted.model, wanted.artifact_sha256)
    except (OSError, ValueError) as error:
        copy = kept(wanted.artifact_sha256)
        if not wanted.artifact_sha256 or not copy.exists():
            raise
        logger.warning("%s; serving the copy at %s", error, copy)
        return opened(str(copy), wanted.artifact_sha256)


def last_served() -> Path:
    """File in which a machine notes the artifact that the Serve that runs served last.

    Each Serve has its own, so that what another server on the machine draws is never taken for
    what this one drew; without Serve, all have the same.
    """
    owner = ""
    if ray.is_initialized():
        with contextlib.suppress(ValueError):  # no Serve runs
            owner = ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)._actor_id.hex()
    return storage.cache_folder() / "served" / f".last-{owner}"


def note(artifact_sha256: str) -> None:
    """Notes that this artifact is served, if this machine keeps it."""
    if not kept(artifact_sha256).exists():
        return
    file = last_served()
    try:
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
            temporary.write(artifact_sha256)
        Path(temporary.name).replace(file)
        notes = sorted(file.parent.glob(".last-*"), key=lambda f: f.stat().st_mtime)
        for old in notes[:-KEPT_NOTES]:
            old.unlink(missing_ok=True)
    except OSError as error:  # it is served all the same
        logger.warning("%s does not say what is served: %s", file, error)


def begin(config: ServeConfig, wanted: Wanted) -> tuple[Service, str | None]:
    """What a replica begins with: what is wanted, or else what its server served here last.

    Where an artifact was refused, the replicas that were there go on with the one before, and so
    shall one that takes the place of a dead one.

    Returns:
        The service, and why the artifact was refused; None if it was not.

    Raises:
        FileNotFoundError, ValueError: as `load`; and nothing was served here before.
    """
    try:
        return load(config, wanted), None
    except Exception as error:
        file = last_served()
        last = file.read_text() if file.exists() else ""
        if last in ("", wanted.artifact_sha256) or not kept(last).exists():
            raise
        logger.error("the artifact is refused, the one before goes on: %s", error)
        before = wanted.model_copy(update={"model": str(kept(last)), "artifact_sha256": last})
        return load(config, before), f"{wanted.model}: {error}"


def try_out(engine: Engine, info: ArtifactInfo, uri: str) -> None:
    """Draws one image, in two steps, with an engine that has not been started.

    Raises:
        ValueError: it has pixels that are no numbers, or the network fails.
    """
    sampler = info.sampler.model_copy(update={"steps": 2})
    future = engine.submit([Drawing(0, 0, 0, sampler)], timeout_s=math.inf)
    while not future.done():
        engine.tick()
    try:
        (x,) = future.result().images
        if not x.isfinite().all():
            raise EngineFailed("its image is not finite")
    except EngineFailed as error:
        raise ValueError(
            f"nothing can be drawn with {uri}: {error}. Export a healthy checkpoint with "
            "`jit export`, or name another artifact"
        ) from error
    engine.ticks, engine.ticking_s, engine.images = 0, 0.0, 0  # nobody asked for this image


def load(config: ServeConfig, wanted: Wanted) -> Service:
    """A service over a warm engine, without keys.

    Raises:
        FileNotFoundError: there is no artifact.
        ValueError: it is damaged, cannot be served, or is not the one that was meant.
    """
    folder, info = wanted_artifact(wanted)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_artifact(folder, device, verify=False)  # `opened` did
    if device.type == "cpu":
        warn_of_slow_bf16(config.precision)
    if config.compile:
        # Blocks of one kind share their compiled code, also with those of an artifact before.
        torch._dynamo.config.recompile_limit = 100
        for block in model.blocks:
            block.compile(dynamic=False)
    engine = Engine(
        model,
        device,
        slots=config.slots,
        max_queue=config.max_queue,
        pad_to=few_sizes(config.slots) if config.compile else (),
        precision=config.precision,
    )
    engine.warm_up()
    try_out(engine, info, wanted.model)
    keep(folder, info)
    note(info.sha256)
    engine.start()
    return Service(
        engine=engine,
        info=info,
        config=config,
        model=info.run or folder.name,
        created=int((folder / CONFIG).stat().st_mtime),
    )


class Meter:
    """What Prometheus hears of a replica, through Ray's agent, which puts `ray_` before names."""

    def __init__(self, slots: int) -> None:
        counter, gauge = metrics.Counter, metrics.Gauge
        self.tally = Tally()
        self.images = counter("jit_images_total", "Images drawn.")
        self.ticks = counter("jit_ticks_total", "Network evaluations of the running batch.")
        self.ticking = counter("jit_tick_seconds_total", "Seconds spent in them.")
        self.reloads = counter("jit_reloads_total", "Changes of artifact.", ("result",))
        self.slots = gauge("jit_slots", "Images that the running batch may hold.")
        self.used = gauge("jit_slots_used", "Images in the running batch.")
        self.queue = gauge("jit_queue_images", "Images that wait for a slot.")
        self.seconds = metrics.Histogram(
            "jit_request_seconds", "Seconds of an image request.", SECONDS, ("phase",)
        )
        self.slots.set(slots)
        self.engines: dict[Engine, tuple[int, float, int]] = {}
        """Each that draws, with its ticks, their seconds and its images when it was read last."""
        self.refused = False
        """Whether an engine had no room or no time since the autoscaling asked."""

    def report(self, record: RequestRecord) -> None:
        """One request is over."""
        self.tally.report(record)
        self.refused |= record.code == QUEUE_FULL
        if record.drawing_s is not None:
            phases = ("queued", "drawing", "encoding", "total")
            for phase in phases:
                self.seconds.observe(getattr(record, f"{phase}_s"), tags={"phase": phase})

    def watch(self, live: Live) -> None:
        """Reads the engines every second, in a thread that ends with the process."""
        threading.Thread(target=self._watch, args=(live,), daemon=True).start()

    def _watch(self, live: Live) -> None:
        while True:
            self.read(live)
            time.sleep(GAUGE_PERIOD_S)

    def read(self, live: Live) -> None:
        """Counts what every engine did since the last time; one that drained is let go then."""
        used = queue = 0
        for engine, before in list(self.engines.items()):
            is_done = engine is not live.service.engine and not engine.running + engine.waiting
            now = (engine.ticks, engine.ticking_s, engine.images)
            counters = (self.ticks, self.ticking, self.images)
            for counter, least, most in zip(counters, before, now, strict=True):
                if most > least:
                    counter.inc(most - least)
            self.engines[engine] = now
            used, queue = used + engine.running, queue + engine.waiting
            if is_done:
                del self.engines[engine]
        self.used.set(used)
        self.queue.set(queue)
