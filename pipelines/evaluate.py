"""Artifact -> evaluation folder, and dataset folder -> reference statistics, fanned out by Ray.

What is drawn and computed is in drawing, reference and metrics, which know no Ray; how work is
dealt to workers, and what happens when one dies, is in pool.

Run the same line again to go on: parts that are valid are kept, and a folder whose plan differs is
refused. Metrics are computed from the stored features each time, so another reference costs no
drawing.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is slow to import: `--help` shall not wait for it
    import sys

    from pipelines.cli import main

    raise SystemExit(main(["evaluate", *sys.argv[1:]]))

import logging
import os
import platform
import time

import numpy as np
import torch

from jitmodel.artifact import ArtifactInfo, check_artifact, load_artifact, sha256_file
from jitmodel.config import ClassInfo
from pipelines import metrics, report, storage
from pipelines.config import EvaluateConfig, ReferenceConfig, require
from pipelines.drawing import (
    Part,
    Plan,
    channels_last,
    differences,
    draw,
    images_uri,
    part_uri,
    pixels_sha256,
    read_part,
    write_part,
)
from pipelines.features import Identity, get_extractor
from pipelines.images import encode
from pipelines.pool import Pool, Progress, fleet
from pipelines.reference import (
    Reference,
    ReferenceIdentity,
    check_match,
    read_reference,
    shard_statistics,
    write_reference,
)
from pipelines.runtime import connect
from pipelines.shards import Manifest, Row, read_manifest, write_shard
from pipelines.versions import tool_versions

logger = logging.getLogger(__name__)

PLAN = "plan.json"


def pick_device() -> torch.device:
    """The GPU that Ray gave this process, or its one CPU thread."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(1)
    return torch.device("cpu")


class SampleWorker:
    """Draws, judges and publishes chunks; holds one model and one extractor on one device."""

    def __init__(self, config: EvaluateConfig, plan: Plan, classes: tuple[ClassInfo, ...]) -> None:
        self.config, self.plan, self.classes = config, plan, classes

    def start(self) -> str:
        self.device = pick_device()
        self.model = load_artifact(storage.fetch(self.config.model), self.device)
        self.extractor = get_extractor(self.config.extractor, self.config.weights, self.device)
        return f"process {os.getpid()} on {platform.node()}, {self.device.type}"

    def run(self, chunk: int) -> int:
        part, images = draw(self.model, self.extractor, self.plan, chunk, self.device)
        if self.config.keep_images:
            rows = [
                Row(encode(pixels, "png"), f"{index:06d}.png", int(label), index)
                for index, label, pixels in zip(
                    self.plan.rows(chunk), part.label, channels_last(images), strict=True
                )
            ]
            with storage.staged(images_uri(self.config.output, chunk)) as path:
                write_shard(path, rows, self.classes, rows_per_group=64)
        write_part(part_uri(self.config.output, chunk), part, self.plan, chunk)
        return len(images)


class FeatureWorker:
    """Extracts the features of shards; holds one extractor on one device."""

    def __init__(self, config: ReferenceConfig, manifest: Manifest, num_images: int) -> None:
        self.config, self.manifest, self.num_images = config, manifest, num_images

    def start(self) -> str:
        self.device = pick_device()
        self.extractor = get_extractor(self.config.extractor, self.config.weights, self.device)
        return f"process {os.getpid()} on {platform.node()}, {self.device.type}"

    def run(self, shards: range) -> tuple[metrics.Moments, metrics.Array, int]:
        found = [
            shard_statistics(
                self.config.data, self.manifest, i, self.num_images, self.extractor, self.device
            )
            for i in shards
        ]
        moments = sum((m for m, _ in found[1:]), start=found[0][0])
        return moments, np.concatenate([kept for _, kept in found]), moments.count


def run(config: EvaluateConfig) -> None:
    """Draw the images of the plan, store their features, report their metrics.

    Raises:
        FileNotFoundError: model, reference or extractor weights are not there.
        ValueError: they do not fit each other, or the folder holds another plan.
    """
    if config.dry_run:
        print(config.model_dump_json(indent=2))
    require(config, "model", "reference", "output")
    folder = storage.fetch(config.model)
    info = check_artifact(folder)
    extractor = get_extractor(config.extractor, config.weights).identity
    reference = read_reference(config.reference)
    check_match(
        reference.identity,
        extractor.as_dict(),
        info.model.image_size,
        info.model.num_classes,
        info.classes,
    )
    digest = info.weights_sha256 or sha256_file(folder / "model.safetensors")
    plan = make_plan(config, info, digest, extractor)
    if config.dry_run:
        print(
            f"plan: {plan.num_images} images, {plan.model.num_classes} classes, "
            f"{plan.num_chunks} chunks of {plan.batch * plan.chunk_batches}, "
            f"{plan.network_evaluations()} network evaluations an image; "
            f"{extractor.distance} against {reference.identity.num_images} images"
        )
        return
    stored = stored_plan(config.output)
    if stored:
        # What has been drawn is judged on any machine, so these two matter only for drawing.
        plan = plan.model_copy(update={"device": stored.device, "torch": stored.torch})
        refuse_another(config.output, stored, plan)
    missing = missing_chunks(config, plan) if stored else list(range(plan.num_chunks))
    seconds = 0.0
    if missing:
        connect()
        storage.check_writable(config.output)
        workers, gpu = fleet(config.workers, len(missing))
        device = "cuda" if gpu else "cpu"
        plan = plan.model_copy(update={"device": device, "torch": torch.__version__})
        if stored:
            refuse_another(config.output, stored, plan)
        seconds = draw_chunks(config, plan, info.classes, missing, workers, gpu)
    parts = []
    for chunk in range(plan.num_chunks):
        part = read_part(part_uri(config.output, chunk), plan, chunk)
        if part is None:
            raise OSError(f"{part_uri(config.output, chunk)} cannot be read back: run again")
        parts.append(part)
    judged = judge(parts, reference, extractor)
    found = {
        "format_version": 1,
        "metrics": judged,
        "warnings": warnings(parts, reference, extractor),
        "identity": {
            "pixels_sha256": pixels_sha256(parts),
            "plan_sha256": plan.sha256,
            "weights_sha256": plan.weights_sha256,
            "reference_sha256": reference.sha256,
            "num_images": plan.num_images,
            "seed": plan.seed,
            "batch": plan.batch,
            "sampler": plan.sampler.model_dump(mode="json"),
            "precision": plan.precision,
            "extractor": plan.extractor,
            "ema_decay": info.ema_decay,
            "images_seen": info.images_seen,
            "run": info.run,
            "reference": reference.identity.model_dump(mode="json", exclude={"classes"}),
            "devices": sorted({part.device for part in parts}),
            "versions": tool_versions(),
        },
        "config": config.model_dump(mode="json"),
        "seconds": seconds,
    }
    report.write_report(config.output, found, shown_rows(parts, plan, info))
    logger.info("%s", report.headline(judged))
    logger.info("report: %s", storage.join(config.output, "report.md"))


def make_plan(
    config: EvaluateConfig, info: ArtifactInfo, weights_sha256: str, extractor: Identity
) -> Plan:
    """The plan that a config and an artifact make, for a CPU.

    Raises:
        ValueError: it cannot be carried out.
    """
    return Plan(
        num_images=config.num_images,
        batch=config.batch,
        chunk_batches=config.chunk_batches,
        seed=config.seed,
        precision=config.precision,
        sampler=config.sampler.over(info.sampler),
        model=info.model,
        flow=info.flow,
        weights_sha256=weights_sha256,
        extractor=extractor.as_dict(),
        device="cpu",
        torch=torch.__version__,
    ).check()


def stored_plan(output: str) -> Plan | None:
    """The plan that a folder was begun with; None if it was not.

    Raises:
        ValueError: there is something else in its place.
    """
    uri = storage.join(output, PLAN)
    if not storage.exists(uri):
        return None
    try:
        return Plan.model_validate(storage.read_json(uri)["plan"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{uri} is not a plan that this version reads: choose another --output"
        ) from error


def refuse_another(output: str, stored: Plan, plan: Plan) -> None:
    """Refuse to go on with another plan.

    Raises:
        ValueError: naming each field that differs, with both values.
    """
    lines = differences(stored.model_dump(mode="json"), plan.model_dump(mode="json"))
    if lines:
        raise ValueError(
            f"{storage.join(output, PLAN)} holds another plan: {'; '.join(lines)}. "
            "Choose another --output, or the same settings."
        )


def missing_chunks(config: EvaluateConfig, plan: Plan) -> list[int]:
    """Chunks whose part, or whose images if they are to be kept, are not there yet."""
    return [
        chunk
        for chunk in range(plan.num_chunks)
        if read_part(part_uri(config.output, chunk), plan, chunk) is None
        or (config.keep_images and not storage.exists(images_uri(config.output, chunk)))
    ]


def draw_chunks(
    config: EvaluateConfig,
    plan: Plan,
    classes: tuple[ClassInfo, ...],
    chunks: list[int],
    workers: int,
    gpu: bool,
) -> float:
    """Draw these chunks by a fleet of workers; the seconds that it took."""
    to_draw = sum(len(plan.rows(chunk)) for chunk in chunks)
    if to_draw < plan.num_images:
        logger.info("%d of %d images are there already", plan.num_images - to_draw, plan.num_images)
    names = classes or tuple(ClassInfo(name=str(i)) for i in range(plan.model.num_classes))
    with Pool(SampleWorker, config, plan, names, workers=workers, gpu=gpu) as pool:
        storage.write_json(
            storage.join(config.output, PLAN),
            {
                "plan": plan.model_dump(mode="json"),
                "sha256": plan.sha256,
                "config": config.model_dump(mode="json"),
                "versions": tool_versions(),
            },
        )
        progress = Progress("drew", plan.num_images, plan.num_images - to_draw)
        for _, images in pool.map(chunks):
            progress.add(images)
    return time.monotonic() - progress.start


def judge(parts: list[Part], reference: Reference, extractor: Identity) -> dict[str, float]:
    """Every metric of the stored features, under the names that the extractor allows."""
    found = metrics.all_metrics(
        np.concatenate([part.features for part in parts]),
        np.concatenate([part.logits for part in parts]),
        reference.mean,
        reference.covariance,
        reference.features,
    )
    return {extractor.metric(*name.split("_")): value for name, value in found.items()}


def shown_rows(parts: list[Part], plan: Plan, info: ArtifactInfo) -> list[tuple[str, list[bytes]]]:
    """Name and PNGs of each class of the report's picture."""
    rows: dict[int, list[bytes]] = {}
    for part in parts:
        for index, image in part.shown.items():
            rows.setdefault(plan.label(index), []).append(image)
    names = dict(enumerate(c.name for c in info.classes))
    return [(names.get(label, f"class {label}"), rows[label]) for label in sorted(rows)]


def warnings(parts: list[Part], reference: Reference, extractor: Identity) -> list[str]:
    """What a reader must know before quoting the numbers."""
    found = []
    drawn, real = sum(len(p.label) for p in parts), reference.identity.num_images
    for what, count in (("drawn", drawn), ("reference", real)):
        if count <= extractor.num_features:
            found.append(
                f"{count} {what} images in {extractor.num_features} dimensions: the covariance is "
                f"singular and {extractor.distance} is biased upwards; compare it only with "
                "numbers from equally many images"
            )
    devices = sorted({part.device for part in parts})
    if len(devices) > 1:
        found.append(f"drawn on different devices, which may round differently: {devices}")
    return found


def run_reference(config: ReferenceConfig) -> None:
    """Statistics of a dataset's features, as one .npz file.

    Raises:
        FileNotFoundError: dataset or extractor weights are not there.
    """
    if config.dry_run:
        print(config.model_dump_json(indent=2))
    require(config, "data", "output")
    if not config.output.endswith(".npz"):
        raise ValueError(f"--output {config.output} does not end in .npz")
    manifest = read_manifest(config.data)
    extractor = get_extractor(config.extractor, config.weights).identity
    total = min(config.num_images or manifest.num_rows, manifest.num_rows)
    if total < 2:
        raise ValueError(f"statistics need at least 2 images; {config.data} has {total}")
    groups = shard_groups(manifest, total)
    if config.dry_run:
        print(f"plan: {total} images of {manifest.num_rows} in {len(groups)} pieces")
        return
    connect()
    storage.check_writable(config.output.rpartition("/")[0] or ".")
    workers, gpu = fleet(config.workers, len(groups))
    results: dict[int, tuple[metrics.Moments, metrics.Array]] = {}
    moments, kept = None, []
    with Pool(FeatureWorker, config, manifest, total, workers=workers, gpu=gpu) as pool:
        progress = Progress("extracted", total)
        for shards, (found, features, images) in pool.map(groups):
            progress.add(images)
            results[shards.start] = (found, features)
            # Adding in the order of the shards makes the file the same for any fleet.
            while groups and groups[0].start in results:
                found, features = results.pop(groups.pop(0).start)
                moments = found if moments is None else moments + found
                kept.append(features)
    assert moments is not None
    assert moments.count == total, (moments.count, total)
    identity = ReferenceIdentity(
        extractor=extractor.as_dict(),
        image_size=manifest.image_size,
        classes=tuple(manifest.classes),
        num_images=total,
        dataset_fingerprint=manifest.fingerprint,
        versions=tool_versions(),
    )
    write_reference(config.output, identity, moments, np.concatenate(kept))
    logger.info("reference: %s, %d images", config.output, total)


def shard_groups(manifest: Manifest, num_images: int, most: int = 64) -> list[range]:
    """Shards that hold the first images, in at most `most` runs of neighbours.

    Moments of 2048 features are 33 MB, so they travel once for a run of shards.
    """
    shards, first = 0, 0
    while first < num_images:
        first += manifest.shards[shards].rows
        shards += 1
    size = -(-shards // most)
    return [range(i, min(i + size, shards)) for i in range(0, shards, size)]
