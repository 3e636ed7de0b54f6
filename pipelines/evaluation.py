"""One evaluation, from what it shall draw to its report; no Ray.

An evaluation folder is plan.json; features/part-*.parquet; times/part-*.json, what each of them
took; on request images/; and, last, the report. Whoever has the folder can compute the metrics
anew, against another reference too, without the model or a GPU.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import platform
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from jitmodel.config import ClassInfo
from jitmodel.model import JiT
from jitmodel.parallel import parallelize, store_as_computed, tune_cpu
from pipelines import metrics, report, storage
from pipelines.config import EvaluateConfig, KeepImages, StageFailed
from pipelines.drawing import (
    VECTORS,
    NotFinite,
    Part,
    Plan,
    channels_last,
    code_sha256,
    device_name,
    differences,
    draw,
    part_uri,
    pixels_sha256,
    read_part,
    time_uri,
    write_part,
)
from pipelines.features import Identity, get_extractor
from pipelines.images import encode
from pipelines.metrics import Array
from pipelines.models import Source, load_model
from pipelines.reference import Reference
from pipelines.shards import Row, write_shard
from pipelines.versions import tool_versions

logger = logging.getLogger(__name__)

PLAN, IMAGES, WRITER = "plan.json", "images", "writer"
DRAWN_BY = ("device", "torch", "code")
"""Fields of a plan that say on what and by which programs it is drawn."""
MIX = "--mix-devices, which the report will tell"


class Job(NamedTuple):
    """A folder to fill by carrying out a plan."""

    source: Source
    plan: Plan
    output: str
    keep_images: KeepImages = "none"
    mix_devices: bool = False
    """Whether devices of other kinds than the plan's may draw."""


class Card(NamedTuple):
    """What a worker says of itself when it starts."""

    process: int
    node: str
    device: str
    """Its kind."""
    torch: str
    code: str
    """As a plan has them."""

    def __str__(self) -> str:
        return f"process {self.process} on {self.node}, {self.device}"


def pick_device() -> torch.device:
    """The GPU that Ray gave this process, or its one CPU thread."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    tune_cpu(threads=1)
    return torch.device("cpu")


class SampleWorker:
    """Draws, judges and publishes chunks of any jobs; holds one model and one extractor."""

    def __init__(self, extractor: str, weights: str | bytes) -> None:
        self.extractor_name, self.weights = extractor, weights
        self.loaded: tuple[str, str, bool] | None = None
        self.model: JiT

    def start(self) -> Card:
        self.device = pick_device()
        self.extractor = get_extractor(self.extractor_name, self.weights, self.device)
        device = device_name(self.device)
        self.card = Card(os.getpid(), platform.node(), device, torch.__version__, code_sha256())
        return self.card

    def hold(self, job: Job) -> None:
        """Load the model of a job, unless it is the one that is held.

        Raises:
            ValueError: other devices than this one began to draw, and they may not be mixed; or
                the programs here are not those of the plan.
        """
        plan = job.plan
        if plan.device != self.card.device and not job.mix_devices:
            raise ValueError(
                f"{self.card} would draw what {plan.device} began in {job.output}, and round "
                f"differently. Choose workers of one kind, or {MIX}"
            )
        for field, what in (("torch", "torch"), ("code", "the sources of jitmodel")):
            here, begun = getattr(self.card, field), getattr(plan, field)
            if here != begun:
                raise ValueError(
                    f"{self.card} has {what} {here}, the plan of {job.output} {begun}, which may "
                    "round differently: install the same on every node"
                )
        wanted = (plan.weights_sha256, plan.precision, plan.compile)
        if wanted != self.loaded:
            self.model = store_as_computed(load_model(job.source, self.device), plan.precision)
            if plan.compile:
                parallelize(self.model, compile=True)
            self.loaded = wanted

    def run(self, item: tuple[Job, int]) -> int | NotFinite:
        """Draw a chunk of a job, unless it is stored; the number of its images.

        An image that is not finite is an answer, for who asked decides what it ends.
        """
        job, chunk = item
        if is_stored(job, chunk):  # by a worker that died before it could say so
            return len(job.plan.rows(chunk))
        self.hold(job)
        start = time.monotonic()
        try:
            part, images = draw(self.model, self.extractor, job.plan, chunk, self.device)
        except NotFinite as error:
            return error
        keep(images, part, job, chunk)
        took = {"images": len(images), "seconds": time.monotonic() - start}
        storage.write_json(time_uri(job.output, chunk), took)
        write_part(part_uri(job.output, chunk), part, job.plan, chunk)
        return len(images)


def resize_to(config: EvaluateConfig, reference: Reference, image_size: int) -> int | None:
    """Side to which images of this size are resized before they are judged; None: they are not.

    Raises:
        ValueError: nobody knows the reference's size.
    """
    size = config.resize_to
    if config.resize and size is None:
        if reference.identity is None:
            raise ValueError(
                f"--resize needs a reference that tells its image size; {config.reference} has no "
                "identity block: add --resize-to SIZE"
            )
        size = reference.identity.image_size
    return None if size == image_size else size


def make_plan(
    config: EvaluateConfig, source: Source, extractor: Identity, resize: int | None = None,
    *, option: str = "--num-images",
) -> Plan:  # fmt: skip
    """The plan that a config and a model make, for this machine's CPU.

    Args:
        config: what is asked for.
        source: the model.
        extractor: identity of the extractor.
        resize: side to which the drawn images are resized, if they are.
        option: what the number of images was chosen by.

    Raises:
        ValueError: it cannot be carried out.
    """
    info = source.info
    return Plan(
        num_images=config.num_images,
        batch=config.batch,
        chunk_batches=config.chunk_batches,
        seed=config.seed,
        precision=config.precision,
        sampler=config.sampler.over(info.sampler),
        model=info.model,
        flow=info.flow,
        weights_sha256=info.weights_sha256,
        extractor=extractor.as_dict(),
        resize=resize,
        compile=config.compile,
        device=device_name(torch.device("cpu")),
        torch=torch.__version__,
        code=code_sha256(),
    ).check(option)


STRANGERS = {
    "config.json": "an artifact",
    "manifest.json": "a dataset",
    "_work": "a preparation",
    "config.yaml": "a run",
    "latest.json": "a run",
    "meta.json": "a checkpoint",
}
"""What other stages' folders are told by."""


def refuse_strangers(output: str) -> None:
    """Check that a folder to write is not one of another stage.

    Raises:
        ValueError: it is; says of which.
    """
    for name, what in STRANGERS.items() if storage.exists(output) else ():
        if storage.exists(storage.join(output, name)):
            raise ValueError(
                f"--output {output} holds {what} ({name}), which an evaluation would mix with its "
                "own files: choose another --output"
            )


class Stored(NamedTuple):
    """What a folder was begun for."""

    plan: Plan
    keep_images: KeepImages


def write_plan(job: Job, config: Mapping[str, Any]) -> None:
    """Say what a folder is for, before anything else is written to it."""
    content = {
        "plan": job.plan.model_dump(mode="json"),
        "sha256": job.plan.sha256,
        "keep_images": job.keep_images,
        "config": config,
        "versions": tool_versions(),
    }
    storage.write_json(storage.join(job.output, PLAN), content)


def stored_plan(output: str) -> Stored | None:
    """What a folder was begun for; None if it was not.

    Raises:
        ValueError: there is something else in its place.
    """
    uri = storage.join(output, PLAN)
    if not storage.exists(uri):
        return None
    try:
        content = storage.read_json(uri)
        return Stored(Plan.model_validate(content["plan"]), content["keep_images"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{uri} is not a plan that this version reads: choose another --output"
        ) from error


def refuse_another(job: Job, stored: Stored) -> None:
    """Refuse to go on with another plan, or to keep images in another form: they would be drawn
    again.

    Raises:
        ValueError: naming each field that differs, with both values.
    """
    there, here = (
        {**side.plan.model_dump(mode="json"), "keep_images": side.keep_images}
        for side in (stored, job)
    )
    lines = differences(there, here)
    if lines:
        raise ValueError(
            f"{storage.join(job.output, PLAN)} holds another plan: {'; '.join(lines)}. "
            f"Choose another --output, or the same settings{or_mix(lines)}."
        )


def or_mix(lines: list[str]) -> str:
    """The way out where nothing but the kind of device differs."""
    return f", or {MIX}" if all(line.startswith("device is ") for line in lines) else ""


@contextmanager
def explained(output: str) -> Iterator[None]:
    """Say of a full disk what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StageFailed(
                f"no room to write to {error.filename or output} ({os.strerror(error.errno)}): "
                "make room and run the same command again; what is finished is kept"
            ) from error
        raise


def missing_chunks(job: Job) -> list[int]:
    """Chunks whose part, or whose images if they are to be kept, are not there yet."""
    folder = storage.join(job.output, IMAGES)
    wanted = job.keep_images != "none"
    there: set[str] = set()
    if wanted and storage.exists(folder):
        there = {entry.relative for entry in storage.list_folder(folder)[1]}
    return [
        chunk
        for chunk in range(job.plan.num_chunks)
        if read_part(part_uri(job.output, chunk), job.plan, chunk) is None
        or not there.issuperset(image_files(job, chunk))
    ]


def is_stored(job: Job, chunk: int) -> bool:
    """Whether a chunk's part, and its images if they are to be kept, are there."""
    return read_part(part_uri(job.output, chunk), job.plan, chunk) is not None and all(
        storage.exists(storage.join(job.output, IMAGES, name)) for name in image_files(job, chunk)
    )


def image_files(job: Job, chunk: int) -> list[str]:
    """Names of the files that hold a chunk's images, in the folder of images."""
    if job.keep_images == "png":
        return [f"{index:06d}.png" for index in job.plan.rows(chunk)]
    return [] if job.keep_images == "none" else [f"part-{chunk:05d}.{job.keep_images}"]


def keep(images: Array, part: Part, job: Job, chunk: int) -> None:
    """Publish a chunk's images, if they are to be kept; their bytes are a function of the pixels.

    Args:
        images: uint8 [N, 3, H, W].
        part: what else is known of them.
        job: tells where and how.
        chunk: which chunk it is.
    """
    files = image_files(job, chunk)
    if not files:
        return
    places = [storage.join(job.output, IMAGES, file) for file in files]
    rows = job.plan.rows(chunk)
    pngs = [encode(image, "png") for image in channels_last(images)]
    if job.keep_images == "png":
        for place, png in zip(places, pngs, strict=True):
            storage.write_bytes(place, png)
    elif job.keep_images == "tar":
        storage.write_bytes(places[0], _webdataset(rows, part.label, pngs))
    else:
        names = job.source.info.classes or [
            ClassInfo(name=str(i)) for i in range(job.plan.model.num_classes)
        ]
        kept = [
            Row(png, f"{index:06d}.png", int(label), index)
            for index, label, png in zip(rows, part.label, pngs, strict=True)
        ]
        with storage.staged(places[0]) as path:
            write_shard(path, kept, names, rows_per_group=64)


def _webdataset(rows: range, label: Array, pngs: list[bytes]) -> bytes:
    """A tar of 000012.png and 000012.cls for each image."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for index, number, png in zip(rows, label, pngs, strict=True):
            for suffix, content in (("png", png), ("cls", str(number).encode())):
                member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@dataclass(frozen=True)
class Drawn:
    """All images of an evaluation, as its folder holds them, in the plan's order."""

    features: Array
    logits: Array
    spatial: Array
    pixels_sha256: str
    shown: dict[int, bytes]
    """PNGs of the images for the report, by index."""
    devices: list[str]
    """Kinds of devices that drew them."""
    timed_images: int
    worker_seconds: float
    """What one worker would have taken to draw and judge those that are timed."""


def read_times(job: Job) -> tuple[int, float]:
    """Images of a folder whose drawing was timed, and the seconds that workers took for them."""
    images, seconds = 0, 0.0
    for chunk in range(job.plan.num_chunks):
        try:
            took = storage.read_json(time_uri(job.output, chunk))
            images, seconds = images + int(took["images"]), seconds + float(took["seconds"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            continue  # a missing or damaged statistic shall not cost an evaluation
    return images, seconds


def read_drawn(job: Job) -> Drawn:
    """Read a folder in which no chunk is missing.

    Raises:
        StageFailed: a chunk cannot be read back.
    """
    arrays: dict[str, Array] = {}
    parts = []
    for chunk in range(job.plan.num_chunks):
        part = read_part(part_uri(job.output, chunk), job.plan, chunk)
        if part is None:
            raise StageFailed(f"{part_uri(job.output, chunk)} cannot be read back: run again")
        rows = job.plan.rows(chunk)
        for name in VECTORS:
            values = getattr(part, name)
            if name not in arrays:  # filled part by part: two copies of everything would not fit
                arrays[name] = np.empty((job.plan.num_images, values.shape[1]), values.dtype)
            arrays[name][rows.start : rows.stop] = values
        parts.append((part.sha256, part.shown, part.device))
    timed_images, worker_seconds = read_times(job)
    return Drawn(
        **arrays,
        pixels_sha256=pixels_sha256(digest for digests, _, _ in parts for digest in digests),
        shown={index: png for _, shown, _ in parts for index, png in shown.items()},
        devices=sorted({device for _, _, device in parts}),
        timed_images=timed_images,
        worker_seconds=worker_seconds,
    )


def judge(drawn: Drawn, reference: Reference, extractor: Identity) -> dict[str, float]:
    """Every metric of the stored features, under the names that the extractor allows."""
    found = metrics.all_metrics(drawn.features, drawn.logits, drawn.spatial, reference.real)
    return {extractor.metric(*name.split("_")): value for name, value in found.items()}


def foreseen(
    num_images: int, classes: Sequence[ClassInfo], reference: Reference, extractor: Identity
) -> list[str]:
    """What a reader must know before quoting the numbers, as far as it is known before drawing.

    Args:
        num_images: how many are drawn.
        classes: of the model; empty if their names are unknown.
        reference: what the images are compared with.
        extractor: identity of the extractor.
    """
    found = []
    counts = {"drawn": num_images, "reference": reference.count}
    for what, count in counts.items():
        if count is not None and count <= extractor.num_features:
            found.append(
                f"{count} {what} images in {extractor.num_features} dimensions: the covariance is "
                f"singular and {extractor.distance} is biased upwards, by more the fewer images "
                "there are; compare it only with numbers from equally many images"
            )
    if reference.identity is None:
        found.append(
            "the reference says nothing about itself: that it was made with this extractor, from "
            "images of this size and these classes, was taken on trust"
        )
    elif not (reference.identity.classes and classes):
        side = "model" if reference.identity.classes else "reference"
        found.append(
            f"class names are unknown on one side, the {side}'s: that both are about the same "
            "classes was taken on trust"
        )
    kept = reference.real.features
    if kept is None:
        found.append(
            "the reference holds moments only, so there is no KID, precision, recall, density or "
            "coverage"
        )
    elif len(kept) <= max(metrics.NEIGHBOURS):
        lost = "precision, recall, density and coverage"
        found.append(
            f"the reference keeps the features of {len(kept)} images, too few for {lost}, which "
            f"need more than {max(metrics.NEIGHBOURS)}"
            + ("" if len(kept) > 1 else ", and for KID, which needs 2")
        )
    return found


def warnings(job: Job, drawn: Drawn, reference: Reference, extractor: Identity) -> list[str]:
    """What a reader must know before quoting the numbers."""
    found = foreseen(job.plan.num_images, job.source.info.classes, reference, extractor)
    if len(drawn.devices) > 1:
        found.append(f"drawn on different devices, which may round differently: {drawn.devices}")
    return found


def identity(job: Job, drawn: Drawn, reference: Reference) -> dict[str, Any]:
    """All that is needed to draw the same images and get the same numbers again."""
    plan, info = job.plan, job.source.info
    about: dict[str, Any] = {"identity": "none"}
    if reference.identity:
        about = reference.identity.model_dump(mode="json", exclude={"classes"})
    return {
        "pixels_sha256": drawn.pixels_sha256,
        "plan_sha256": plan.sha256,
        "weights_sha256": plan.weights_sha256,
        "reference_sha256": reference.sha256,
        "num_images": plan.num_images,
        "num_real_features": 0 if reference.real.features is None else len(reference.real.features),
        "seed": plan.seed,
        "batch": plan.batch,
        "sampler": plan.sampler.model_dump(mode="json"),
        "precision": plan.precision,
        "compile": plan.compile,
        "image_size": plan.image_size,
        "resize": f"{plan.model.image_size} to {plan.resize}, Pillow bicubic"
        if plan.resize
        else "none",
        "extractor": plan.extractor,
        "ema_decay": info.ema_decay,
        "images_seen": info.images_seen,
        "run": info.run,
        "model": job.source.uri,
        "reference": about,
        "devices": drawn.devices,
        "timed_images": drawn.timed_images,
        "worker_hours": drawn.worker_seconds / 3600,
        "code": plan.code,
        "versions": tool_versions(),
    }


def pinned(config: EvaluateConfig, job: Job) -> EvaluateConfig:
    """The config that draws from the same weights again, though the run may go on."""
    chosen: dict[str, Any] = {"model": job.source.uri}
    if not job.source.is_artifact:
        chosen["ema"] = job.source.info.ema_decay
    return config.model_copy(update=chosen)


def shown_rows(drawn: Drawn, job: Job) -> list[tuple[str, list[bytes]]]:
    """Name and PNGs of each class of the report's picture."""
    rows: dict[int, list[bytes]] = {}
    for index, image in drawn.shown.items():
        rows.setdefault(job.plan.label(index), []).append(image)
    names = dict(enumerate(c.name for c in job.source.info.classes))
    return [(names.get(label, f"class {label}"), rows[label]) for label in sorted(rows)]


def write_evaluation(
    job: Job, config: EvaluateConfig, reference: Reference, extractor: Identity
) -> dict[str, Any]:
    """Judge a folder in which no chunk is missing, and publish its report.

    Args:
        job: what was drawn.
        config: what was asked for.
        reference: what the images are compared with.
        extractor: identity of the extractor.

    Returns:
        What report.json holds.
    """
    drawn = read_drawn(job)
    judged, warned = judge(drawn, reference, extractor), warnings(job, drawn, reference, extractor)
    found = {
        "format_version": 1,
        "metrics": judged,
        "warnings": warned,
        "identity": identity(job, drawn, reference),
        "config": pinned(config, job).model_dump(mode="json"),
    }
    for warning in warned:
        logger.warning("%s", warning)
    with explained(job.output):
        report.write_report(job.output, found, shown_rows(drawn, job))
    logger.info("%s", report.headline(judged))
    logger.info("report: %s", storage.join(job.output, "report.md"))
    return found
