"""Model -> evaluation folder, and real images -> reference statistics, fanned out by Ray.

What is drawn and computed is in evaluation, drawing, reference and metrics, which know no Ray. How
chunks are dealt to workers that draw, and what happens when one dies, is in pool; the pieces of a
reference are mapped by Ray Data.

Run the same line again to go on: parts that are valid are kept, and a folder whose plan differs is
refused. Metrics are computed from the stored features each time, so another reference costs no
drawing.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is slow to import: `--help` shall not wait for it
    import sys

    from pipelines.cli import main

    raise SystemExit(main(["evaluate", *sys.argv[1:]]))

import contextlib
import logging
import warnings
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import ray.data

from pipelines import evaluation, lease, runtime, storage
from pipelines.config import EvaluateConfig, ReferenceConfig, StageFailed, require
from pipelines.drawing import NotFinite, warn_of_slow_bf16
from pipelines.evaluation import (
    DRAWN_BY,
    WRITER,
    Job,
    SampleWorker,
    Stored,
    explained,
    foreseen,
    make_plan,
    missing_chunks,
    pick_device,
    refuse_another,
    refuse_strangers,
    stored_plan,
    write_plan,
)
from pipelines.features import Extractor, get_extractor, portable_weights
from pipelines.models import find_model
from pipelines.pool import Pool, Progress, fleet
from pipelines.reference import (
    Piece,
    RealImages,
    ReferenceIdentity,
    check_match,
    extract,
    piece_uri,
    pieces_uri,
    read_piece,
    read_reference,
    real_images,
    write_piece,
    write_reference,
)
from pipelines.runtime import connect
from pipelines.versions import tool_versions

logger = logging.getLogger(__name__)


MAX_DEATHS = 3
"""Times that a worker may die, and that a piece may lose its worker, while a reference is made."""


class FeatureWorker:
    """Extracts and publishes pieces of a reference, as Ray Data hands them out; holds one
    extractor on one device."""

    def __init__(
        self,
        config: ReferenceConfig,
        images: RealImages,
        identity: ReferenceIdentity,
        weights: ray.ObjectRef[str | bytes],
        stop: runtime.Stop,
    ) -> None:
        self.config, self.images, self.identity = config, images, identity
        self.weights, self.stop = weights, stop

    @cached_property
    def extractor(self) -> Extractor:
        """Loaded with the first piece, whose answer tells what went wrong."""
        self.device = pick_device()
        return get_extractor(self.config.extractor, ray.get(self.weights), self.device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """How many images were extracted, or which error stopped it."""
        # An exception would come back wrapped in pages of Ray's own; one line is enough.
        result = {"images": 0, "kind": "", "error": ""}
        if self.stop.is_set():
            return result
        piece = range(row["start"], row["stop"])
        try:
            with explained(self.config.output):
                extractor, keep = self.extractor, self.config.keep_features
                found = extract(self.images, piece, extractor, self.device, keep)
                write_piece(piece_uri(self.config.output, self.identity, piece), found)
        except Exception as error:
            logger.exception("images %d to %d failed", piece.start, piece.stop - 1)
            return result | {"kind": type(error).__name__, "error": str(error)}
        return result | {"images": len(piece)}


def run(config: EvaluateConfig) -> None:
    """Draw the images of the plan, store their features, report their metrics.

    Raises:
        FileNotFoundError: model, reference or extractor weights are not there.
        ValueError: they do not fit each other, or the folder holds another plan.
        PermissionError: another process writes to the folder.
        StageFailed: the disk is full.
    """
    if config.dry_run:
        print(config.model_dump_json(indent=2))
    require(config, "model", "reference", "output")
    refuse_strangers(config.output)
    extractor = get_extractor(config.extractor, config.weights).identity
    reference = read_reference(config.reference)
    source = find_model(config.model, config.ema)
    info = source.info
    resize = evaluation.resize_to(config, reference, info.model.image_size)
    plan = make_plan(config, source, extractor, resize)
    check_match(reference, extractor, plan.image_size, info.model.num_classes, info.classes)
    output = storage.absolute(config.output)
    job = Job(source, plan, output, config.keep_images, config.mix_devices)
    stored, missing = stored_plan(output), list(range(plan.num_chunks))
    if stored:
        # What has been drawn is judged anywhere, so what draws matters only for drawing.
        begun = stored.plan.model_dump(include=set(DRAWN_BY))
        job = job._replace(plan=plan.model_copy(update=begun))
        refuse_another(job, stored)
        missing = missing_chunks(job)
        if missing:  # of what draws, only the workers know the device
            here = plan.model_copy(update={"device": stored.plan.device})
            refuse_another(job._replace(plan=here), stored)
    if missing:  # the report says it again
        for warning in foreseen(plan.num_images, info.classes, reference, extractor):
            logger.warning("%s", warning)
    if config.dry_run:
        print(
            f"plan: {plan.num_images} images, {plan.model.num_classes} classes, "
            f"{plan.num_chunks} chunks of {plan.batch * plan.chunk_batches}, "
            f"{plan.network_evaluations()} network evaluations an image; "
            f"{extractor.distance} against {reference.count or 'unknown'} images"
        )
        return
    if missing:
        connect()
        storage.check_writable(output)
        workers, gpu = fleet(config.workers, len(missing))
        if not gpu:
            warn_of_slow_bf16(plan.precision)
        with explained(output), lease.claim(storage.join(output, WRITER)) as held:
            job = draw_chunks(config, job, stored, missing, workers, gpu, held)
            held.check()
            storage.delete(storage.join(output, WRITER))
    evaluation.write_evaluation(job, config, reference, extractor)


def draw_chunks(
    config: EvaluateConfig, job: Job, stored: Stored | None, chunks: list[int], workers: int,
    gpu: bool, held: lease.Lease,
) -> Job:  # fmt: skip
    """Draw these chunks by a fleet of workers; the job, its plan naming their kind of device.

    Raises:
        NotFinite: an image is not finite; the first such, whichever worker finds one first.
        PermissionError: another process took the folder over meanwhile.
        ValueError: the workers' kind of device is another one than the folder's, or than that of
            their first, and they may not be mixed.
    """
    total = job.plan.num_images
    to_draw = sum(len(job.plan.rows(chunk)) for chunk in chunks)
    if to_draw < total:
        logger.info("%d of %d images are there already", total - to_draw, total)
    weights = portable_weights(config.extractor, config.weights)
    with Pool(SampleWorker, config.extractor, weights, workers=workers, gpu=gpu) as pool:
        if not (stored and config.mix_devices):
            device = pool.started[0].device
            job = job._replace(plan=job.plan.model_copy(update={"device": device}))
        if stored:
            refuse_another(job, stored)
        write_plan(job, config.model_dump(mode="json"))
        progress = Progress("drew", total, total - to_draw)
        broken: dict[int, NotFinite] = {}
        # Whoever finds one ends the giving out; the chunks before it are given out already.
        for (_, chunk), found in pool.map((job, chunk) for chunk in chunks if not broken):
            held.check()
            if isinstance(found, NotFinite):
                broken[chunk] = found
            else:
                progress.add(found)
        if broken:
            raise broken[min(broken)]
    return job


def run_reference(config: ReferenceConfig) -> None:
    """Statistics of real images' features, as one .npz file.

    Raises:
        FileNotFoundError: images or extractor weights are not there.
        ValueError: the file is there and about something else.
        StageFailed: the disk is full.
    """
    if config.dry_run:
        print(config.model_dump_json(indent=2))
    require(config, "data", "output")
    if not config.output.endswith(".npz"):
        raise ValueError(f"--output {config.output} does not end in .npz")
    images = real_images(config.data, config.num_images)
    identity = ReferenceIdentity(
        extractor=get_extractor(config.extractor, config.weights).identity.as_dict(),
        image_size=images.image_size,
        classes=images.classes,
        num_images=images.num_images,
        dataset_fingerprint=images.fingerprint,
        keep_features=config.keep_features,
        versions=tool_versions(),
    )
    finished = storage.exists(config.output)
    if finished:
        refuse_another_reference(config.output, identity)
    if config.dry_run:
        print(f"plan: {images.num_images} images in {len(images.pieces)} pieces")
        return
    if finished:
        logger.info("%s is finished already", config.output)
        return
    config = config.model_copy(update={"output": storage.absolute(config.output)})
    missing = [
        piece
        for piece in images.pieces
        if read_piece(piece_uri(config.output, identity, piece)) is None
    ]
    if missing:
        connect()
    storage.check_writable(config.output.rpartition("/")[0] or "/")
    place = storage.join(pieces_uri(config.output), WRITER)
    with explained(config.output), lease.claim(place) as held:
        if missing:
            extract_pieces(config, images, identity, missing, held)
        held.check()
        write_reference(config.output, identity, all_pieces(config.output, identity, images))
        storage.delete(pieces_uri(config.output))
    logger.info("reference: %s, %d images", config.output, images.num_images)


def extract_pieces(
    config: ReferenceConfig, images: RealImages, identity: ReferenceIdentity, pieces: list[range],
    held: lease.Lease,
) -> None:  # fmt: skip
    """Extract and publish these pieces, by a fleet of workers.

    Raises:
        FileNotFoundError, PermissionError, ValueError: an image cannot be used, or not be read.
        PermissionError: or another process took over meanwhile.
        StageFailed: a piece could not be written, or its workers died.
    """
    runtime.quiet_data()
    workers, gpu = fleet(config.workers, len(pieces))
    weights = ray.put(portable_weights(config.extractor, config.weights))
    stop = runtime.Stop()
    rows = [{"start": piece.start, "stop": piece.stop} for piece in pieces]
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        # Ray 2.60 warns of max_restarts without another name for it; its default is no end.
        extracted = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            FeatureWorker,  # type: ignore[arg-type]  # a class: its instances are called
            fn_constructor_args=(config, images, identity, weights, stop),
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            num_cpus=1,
            num_gpus=int(gpu),
            max_restarts=MAX_DEATHS,
            max_task_retries=MAX_DEATHS,
        )
    kinds = {kind.__name__: kind for kind in (FileNotFoundError, PermissionError, ValueError)}
    progress = Progress("extracted", images.num_images, images.num_images - sum(map(len, pieces)))
    try:
        with contextlib.closing(stop.rows(extracted)) as answers:
            for row in answers:
                if row["error"]:
                    raise kinds.get(row["kind"], StageFailed)(row["error"])
                held.check()
                progress.add(row["images"])
    except ray.exceptions.RayError as error:
        raise StageFailed(
            "workers died again and again over the same images; out of memory? The same command "
            f"goes on ({str(error).strip().splitlines()[0]})"
        ) from error


def refuse_another_reference(output: str, identity: ReferenceIdentity) -> None:
    """Refuse to replace a reference that is about something else.

    Raises:
        ValueError: naming what differs.
    """
    found = read_reference(output).identity
    there = found.model_dump(mode="json", exclude={"versions"}) if found else {}
    wanted = identity.model_dump(mode="json", exclude={"versions"})
    differing = [
        f"{name} is {there.get(name)} there, {value} here"
        for name, value in wanted.items()
        if there.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{output} holds another reference: {'; '.join(differing)[:500]}. Delete it, or choose "
            "another --output."
        )


def all_pieces(output: str, identity: ReferenceIdentity, images: RealImages) -> Iterator[Piece]:
    """The pieces of a reference, in order.

    Raises:
        StageFailed: one cannot be read back.
    """
    for piece in images.pieces:
        found = read_piece(piece_uri(output, identity, piece))
        if found is None:
            raise StageFailed(f"{piece_uri(output, identity, piece)} cannot be read: run again")
        yield found
