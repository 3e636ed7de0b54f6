"""Raw images -> dataset folder, by Ray Data, so that it can be killed at any moment.

The sorted source is permuted by a seed and cut into shard specs of fixed length; one task reads
the images of one spec, writes one shard under a temporary name, checks it and publishes it, then
writes the shard's entry. The bytes of a shard are a function of source, seed and config, so it
does not matter who writes it, how often, or what was killed: the same command again skips the
shards that have an entry. The manifest comes last; without it the folder is not a dataset.

Several image sizes make several dataset folders, OUTPUT/256 and OUTPUT/512, in one pass: each
image is read and decoded once. Each folder is what a pass for its size alone would have made.

While work goes on the output holds _work/: writer/ (who is at it), index/*.arrow (lists of the
parts of a tar), job.json (what was asked for), index.arrow (the list of images) and shards/*.json
(the entries). It goes when the manifest is there.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is slow to import: `--help` shall not wait for it
    import sys

    from pipelines.cli import main

    raise SystemExit(main(["prepare", *sys.argv[1:]]))

import contextlib
import copy
import functools
import hashlib
import json
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray

from jitmodel.config import ClassInfo
from pipelines import images, lease, runtime, shards, sources, storage
from pipelines.config import PrepareConfig, StageFailed, require
from pipelines.deal import ids_at
from pipelines.index import INDEX_SCHEMA, Index
from pipelines.job import (
    INDEX_FILE,
    READERS,
    WORK,
    Job,
    Request,
    ShardEntry,
    begin,
    classes_of,
    crops,
    describe,
    entries,
    files_digest,
    folders_of,
    is_finished,
    output_of,
    publish,
    refuse_another,
    refuse_changed,
    refuse_strangers,
    write_shard,
)
from pipelines.labels import printable
from pipelines.shards import Reject

logger = logging.getLogger(__name__)

LOG_EVERY_S, LOG_FRACTION, LOG_SELDOM_S = 5.0, 0.05, 60.0
"""A line of progress comes after a share of the time that has passed, between these bounds."""
SAMPLE_PARTS, SAMPLE_READ, SAMPLE_IMAGES, SAMPLE_S = 32, 1024, 64, 10.0
"""What a dry run looks at: parts, images that are read, and images that are decoded."""


def run(config: PrepareConfig) -> None:
    """Prepare a dataset folder, go on with an interrupted one, or verify one.

    Raises:
        ValueError: a bad source, a folder that something else was started in, too many rejects.
        FileNotFoundError: no source, or with verify no manifest.
        PermissionError: the output cannot be written, or another process writes it.
        StageFailed: a shard could not be written; with verify, the folder is damaged.
    """
    if config.verify:
        verify(config.verify)
        return
    require(config, "source", "output")
    source = sources.open_source(storage.absolute(config.source), config.classes, config.labels)
    output = storage.absolute(config.output)
    refuse_inside(output, storage.absolute(config.source))
    folders = folders_of(output, config.image_size)
    # Another command may write just one of our sizes, whose folder it calls its output.
    places = [output, *(folder for folder in folders.values() if folder != output)]
    writers = [storage.join(place, WORK, "writer") for place in places]
    with tempfile.TemporaryDirectory(prefix="jit-") as temporary:
        index = Path(temporary) / INDEX_FILE
        with contextlib.ExitStack() as stack:
            for place in writers:
                stack.enter_context(lease.told_first(place))
            refuse_another(
                output, folders, Request(**config.model_dump(include=set(Request.model_fields)))
            )
            done = is_finished(folders)
            if not done:
                refuse_strangers(output)
            if config.dry_run:
                plan(config, source, index, folders)
                return
            cheap = not any(part.key for part in source.parts)
            remote = storage.local_path(source.root) is None
            # ImageNet's tar has a million headers: on S3 its name is enough for what is finished.
            if cheap or (done and not (remote and _is_made_from(config, folders))):
                sources.write_index(source, index)
                job = describe(config, source, index)
                refuse_another(output, folders, job)
            if done:
                refuse_changed(config, source, index, folders)
        if done:
            storage.delete(storage.join(output, WORK))
            logger.info("%s is finished already", output)
            return
        check_workers(config.workers)
        storage.check_writable(output)
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(lease.claim(place)) for place in writers]
            if not is_finished(folders):
                if not cheap:
                    list_tars(output, source, index)
                    job = describe(config, source, index)
                begin(output, folders, job, index)
                classes = classes_of(source, Index(index))
                write_shards(folders, source.root, classes, job, config, held)
                refuse_replaced(config, job)
                for each in held:
                    each.check()
                publish(folders, classes, job, config)
            for place in places[1:]:
                storage.delete(storage.join(place, WORK))
        storage.delete(storage.join(output, WORK))
        for size, folder in folders.items():
            manifest = shards.read_manifest(folder)
            logger.info(
                "%s is finished: %d images of %d pixels, %d rejects, %.1f MB, fingerprint %s",
                folder, manifest.num_rows, size, manifest.num_rejects,
                sum(s.bytes for s in manifest.shards) / 1e6, manifest.fingerprint,
            )  # fmt: skip


def check_workers(workers: int) -> None:
    """Refuse more workers than the cluster has CPUs for.

    Raises:
        ValueError: naming both numbers.
    """
    if not workers:
        return
    runtime.connect()
    room = int(runtime.capacity()["CPU"])
    if workers > room:
        raise ValueError(
            f"--workers {workers} needs {workers} CPUs, but the cluster has {room}: ask for at "
            f"most {room}, or 0 for one on each"
        )


def refuse_inside(output: str, source: str) -> None:
    """Check that the output does not lie below the source: its pictures would become images.

    Raises:
        ValueError: it does.
    """
    inner, outer = (
        uri if storage.local_path(uri) is None else os.path.realpath(uri)
        for uri in (output, source)
    )
    if inner.startswith(f"{outer.rstrip('/')}/"):
        raise ValueError(
            f"--output {output} lies inside of --source {source}, where its contact sheet would be "
            "taken for an image: choose a folder beside the source"
        )


def refuse_replaced(config: PrepareConfig, job: Job) -> None:
    """Check that the source's files are still those that were listed: all shards are of these.

    Raises:
        ValueError: some are not.
        FileNotFoundError: the source is gone.
    """
    source = sources.open_source(storage.absolute(config.source), config.classes, config.labels)
    late = [part for part in source.parts if part.name not in source.versions]
    for batches in sources.list_parts(source, late):
        for _ in batches:
            pass
    now = files_digest(source)
    if now != job.files_sha256:
        raise ValueError(
            f"files of {config.source} have changed while they were read: files_sha256 was "
            f"{job.files_sha256} and is {now}, and shards may hold either. Choose another --output"
        )


def verify(uri: str) -> None:
    """Read all of a dataset folder again, or of the folders of several image sizes below it.

    Raises:
        StageFailed: it is damaged; names each problem.
    """
    for folder in shards.dataset_folders(uri) or [uri]:
        problems = shards.verify(folder)
        if problems:
            lines = "\n".join(f"  {line}" for line in problems)
            raise StageFailed(
                f"{folder} is damaged: restore the file, or prepare into a new folder\n{lines}"
            )
        manifest = shards.read_manifest(folder)
        logger.info(
            "%s is sound: %d images in %d shards, fingerprint %s",
            folder, manifest.num_rows, len(manifest.shards), manifest.fingerprint,
        )  # fmt: skip


# What would be done.


def plan(
    config: PrepareConfig, source: sources.Source, index: Path, folders: Mapping[int, str]
) -> None:
    """Say what the command would do, from the source's list and a few of its images.

    Raises:
        ValueError: something else was made or begun in the output.
    """
    parts = source.parts
    dear = storage.local_path(source.root) is None and any(part.key for part in parts)
    sampled = copy.copy(source)
    if dear and len(parts) > SAMPLE_PARTS:  # their headers are read over the network, one by one
        chosen = np.linspace(0, len(parts) - 1, SAMPLE_PARTS).round().astype(int)
        sampled.parts = [parts[i] for i in chosen]
    sources.write_index(sampled, index)
    listed = Index(index)
    total = len(listed) * len(parts) // len(sampled.parts)
    classes = classes_of(source, listed)
    if len(sampled.parts) == len(parts):
        refuse_another(output_of(folders), folders, describe(config, source, index))
        if is_finished(folders):
            refuse_changed(config, source, index, folders)
    else:
        logger.info(
            "%s: about %d images of %d classes -> %d shards of %d",
            config.source, total, len(classes), -(-total // config.rows_per_shard),
            config.rows_per_shard,
        )  # fmt: skip

    # Those that tasks would take first, so that as many share a row group as will. Some of them are
    # decoded; what reading takes and what that takes count for themselves.
    count = min(max(config.rows_per_shard, SAMPLE_IMAGES), SAMPLE_READ, len(listed))
    refs = listed.refs(ids_at(np.arange(count), index, config.seed))
    read = looked = rejects = 0
    sizes = dict.fromkeys(config.image_size, 0)
    begun = np.array([time.process_time(), time.monotonic()])
    decoding = np.zeros(2)
    for i, image in sources.read_images(source.root, refs):
        read += 1
        if (read - 1) % max(count // SAMPLE_IMAGES, 1) == 0:
            before = np.array([time.thread_time(), time.monotonic()])
            for size, pixels in zip(
                sizes, crops(image, refs[i].label, len(classes), sizes), strict=True
            ):
                if isinstance(pixels, images.BadImage):
                    rejects += 1
                else:
                    sizes[size] += len(images.encode(pixels, config.encoding))
            looked += 1
            decoding += np.array([time.thread_time(), time.monotonic()]) - before
        if time.monotonic() - begun[1] > SAMPLE_S:
            break
    reading = np.array([time.process_time(), time.monotonic()]) - begun - decoding
    core_hours, hours = (reading / read + decoding / looked) * total / 3600
    workers = config.workers or os.cpu_count() or 1
    for size, folder in folders.items():
        logger.info("%s: about %.4g GB", folder, sizes[size] / looked * total / 1e9)
    logger.info(
        "%d images tried, %d of them cannot be used; about %.2g core-hours, %.2g hours with %d "
        "workers on machines like this one",
        looked, rejects // len(sizes), core_hours, hours / workers, workers,
    )  # fmt: skip
    logger.info("dry run, nothing was written; config: %s", config.model_dump_json())


# Start, or go on.


def _is_made_from(config: PrepareConfig, folders: Mapping[int, str]) -> bool:
    """Whether finished folders were made from a source of the same name."""
    made = [shards.read_manifest(folder).config for folder in folders.values()]
    names = config.model_dump(include={"source", "classes", "labels"})
    return all(theirs.items() >= names.items() for theirs in made)


_BAD_SOURCES = {kind.__name__: kind for kind in (ValueError, FileNotFoundError, PermissionError)}
"""What a list ends with that is no failure of ours."""


def list_tars(output: str, source: sources.Source, index: Path) -> None:
    """List a source of tars, on the cluster; the lists are kept, in case we are killed.

    Raises:
        ValueError: a tar is damaged, or a class has no images.
        FileNotFoundError: a tar is gone.
        PermissionError: the store refuses us.
        StageFailed: a part could not be listed.
    """
    started = time.monotonic()
    dear = {_part_place(output, part): part for part in source.parts}
    kept = storage.join(output, WORK, "index")
    there = {e.relative for e in storage.list_folder(kept)[1]} if storage.exists(kept) else set()
    missing = [place for place in dear if place.rpartition("/")[2] not in there]
    if missing:
        logger.info("listing %d of %d tars", len(missing), len(dear))
        runtime.connect()
        runtime.quiet_data()
        cpus = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
        rows = [{"place": place, "part": json.dumps(dear[place])} for place in missing]
        blocks = min(len(missing), max(4 * cpus, len(missing) // sources.LISTERS))
        stop, pace, count = runtime.Stop(), Pace(), 0
        listed = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            functools.partial(_list_parts_task, source=source, stop=stop),
            batch_size=None,
            num_cpus=1,
        )
        with contextlib.closing(stop.rows(listed)) as answers:
            for row in answers:
                if row["error"]:
                    raise _BAD_SOURCES.get(row["kind"], StageFailed)(row["error"])
                count += row["count"]
                source.skipped.append(Counter(json.loads(row["skipped"])))
                if pace.is_due():
                    left = pace.seconds / count * (len(missing) - count)
                    logger.info("listed %d of %d tars, %.0f s left", count, len(missing), left)
    with ThreadPoolExecutor(READERS) as pool:
        sources.write_index(source, index, sources.ahead(pool, _kept, dear, READERS))
    logger.info("listed in %.1f s", time.monotonic() - started)


def _kept(place: str) -> Iterator[pa.RecordBatch]:
    path = storage.local_path(place)
    found = pa.py_buffer(storage.read_bytes(place)) if path is None else pa.OSFile(str(path))
    file = pa.ipc.open_file(found)
    return (file.get_batch(i) for i in range(file.num_record_batches))


def _part_place(output: str, part: sources.Part) -> str:
    name = hashlib.sha256(f"{part.key} {part.label}".encode("utf-8", "surrogateescape")).hexdigest()
    return storage.join(output, WORK, "index", f"{name[:32]}.arrow")


def _list_parts_task(
    batch: dict[str, NDArray[Any]], *, source: sources.Source, stop: runtime.Stop
) -> dict[str, list[Any]]:
    if stop.is_set():
        return {"kind": [""], "error": [""], "count": [0], "skipped": ["{}"]}
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("pipelines").setLevel(logging.INFO)  # how far a long tar is
    parts = [sources.Part(*json.loads(part)) for part in batch["part"]]
    source.skipped = []
    kind = error = ""
    try:
        for place, batches in zip(batch["place"], sources.list_parts(source, parts), strict=True):
            with (
                storage.staged(str(place)) as path,
                pa.ipc.new_file(path, INDEX_SCHEMA) as writer,
            ):
                for found in batches:
                    writer.write_batch(found)
    except Exception as failure:
        kind = next((name for name, k in _BAD_SOURCES.items() if isinstance(failure, k)), "")
        error = printable(str(failure) if kind else f"a part was not listed: {_named(failure)}")
    skipped = json.dumps(sum(source.skipped, Counter()))
    return {"kind": [kind], "error": [error], "count": [len(parts)], "skipped": [skipped]}


# The shards.


def write_shards(
    folders: Mapping[int, str],
    root: str,
    classes: list[ClassInfo],
    job: Job,
    config: PrepareConfig,
    held: Sequence[lease.Lease],
) -> None:
    """Write the shards that have no valid entry yet, one Ray task each.

    Raises:
        ValueError: too many images were rejected.
        PermissionError: the store refuses us, or another process took over.
        StageFailed: a shard could not be written.
    """
    progress = Progress(job, config.max_reject_fraction)
    done = set()
    for number, entry in entries(folders, job):
        done.add(number)
        progress.add(entry)
    missing = [number for number in range(job.num_shards) if number not in done]
    if not missing:
        return
    runtime.connect()
    runtime.quiet_data()
    progress.start()
    specs = ray.data.from_items([{"shard": n} for n in missing], override_num_blocks=len(missing))
    stop = runtime.Stop()
    task = functools.partial(
        _write_shard_task, folders=folders, root=root, classes=classes, job=job, stop=stop
    )
    pool = ray.data.TaskPoolStrategy(config.workers or None)
    written = specs.map(task, num_cpus=1, compute=pool)
    with contextlib.closing(stop.rows(written)) as answers:
        for row in answers:
            for each in held:
                each.check()
            if row["refused"]:
                raise PermissionError(row["error"])
            if row["error"]:
                raise StageFailed(f"shard {row['shard']} was not written: {row['error']}")
            progress.add(ShardEntry.model_validate_json(row["entry"]))
            progress.log()


class Pace:
    """When the next line of progress is due: more seldom as time goes by."""

    def __init__(self) -> None:
        self.started = self.logged = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return max(time.monotonic() - self.started, 1e-3)

    def is_due(self) -> bool:
        """Whether to say something now; notes that it was said."""
        pause = min(max(LOG_EVERY_S, self.seconds * LOG_FRACTION), LOG_SELDOM_S)
        if time.monotonic() - self.logged < pause:
            return False
        self.logged = time.monotonic()
        return True


class Progress:
    """Counts what is done, logs it now and then, and stops a job that rejects too much."""

    def __init__(self, job: Job, max_reject_fraction: float) -> None:
        self.job, self.max_reject_fraction = job, max_reject_fraction
        self.images = self.shards = self.bytes = self.images_before = self.bytes_before = 0
        self.rejects: list[Reject] = []
        self.pace = Pace()

    def start(self) -> None:
        """The rates count from here."""
        if self.shards:
            logger.info("%d of %d shards are there already", self.shards, self.job.num_shards)
        self.images_before, self.bytes_before = self.images, self.bytes
        self.pace = Pace()

    def add(self, entry: ShardEntry) -> None:
        """Take note of one more shard.

        Raises:
            ValueError: too many images were rejected by now.
        """
        self.rejects += entry.rejects
        first = entry.sizes[0]
        self.images += first.info.rows + len(first.rejects)
        self.bytes += entry.bytes
        self.shards += 1
        if len(self.rejects) / self.job.num_images <= self.max_reject_fraction:
            return
        reasons = Counter(reject.reason for reject in self.rejects).most_common(5)
        lines = [f"  {count} x {reason}" for reason, count in reasons]
        lines += [f"  such as {reject.path}: {reject.reason}" for reject in self.rejects[:5]]
        raise ValueError(
            f"{len(self.rejects)} of {self.job.num_images} images cannot be used, more than "
            f"--max-reject-fraction {self.max_reject_fraction} allows: mend the source and choose "
            "another --output (or empty this one), or run the same command with a higher fraction "
            "to go on:\n" + "\n".join(lines)
        )

    def log(self) -> None:
        """One line, now and then, and at the end."""
        if not self.pace.is_due() and self.shards < self.job.num_shards:
            return
        seconds = self.pace.seconds
        rate = (self.images - self.images_before) / seconds
        logger.info(
            "shard %d/%d, image %d/%d, %.0f images/s, %.1f MB/s, %d rejects, %.0f s left",
            self.shards, self.job.num_shards, self.images, self.job.num_images, rate,
            (self.bytes - self.bytes_before) / seconds / 1e6, len(self.rejects),
            (self.job.num_images - self.images) / max(rate, 1e-3),
        )  # fmt: skip


def _write_shard_task(
    row: dict[str, Any],
    *,
    folders: Mapping[int, str],
    root: str,
    classes: list[ClassInfo],
    job: Job,
    stop: runtime.Stop,
) -> dict[str, Any]:
    # An exception would come back wrapped in pages of Ray's own; one line is enough.
    number = int(row["shard"])
    result = {"shard": number, "entry": "", "error": "", "refused": False}
    if stop.is_set():
        return result
    try:
        entry = write_shard(number, folders, root, classes, job)
    except PermissionError as error:
        return result | {"error": printable(str(error)), "refused": True}
    except Exception as error:
        if not isinstance(error, OSError):  # which says all, and comes from many at once
            logger.exception("shard %d failed", number)
        return result | {"error": printable(_named(error))}
    return result | {"entry": entry.model_dump_json()}


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
