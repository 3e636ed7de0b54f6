"""A preparation job without Ray: what it is, one shard of it, and what is published at the end.

A job is begun in a folder of its own below the output, _work/: job.json (what was asked for),
index.arrow (the list of images) and shards/*.json (an entry for each shard that is there). The
bytes of a shard are a function of the job and the source, so it does not matter who writes it, or
how often. The manifest comes last.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import PIL
import pyarrow as pa
from numpy.typing import NDArray
from PIL import features

from jitmodel.config import ClassInfo, Config
from pipelines import images, shards, sources, storage
from pipelines.config import PrepareConfig, StageFailed
from pipelines.dataset_card import COLUMNS, card, contact_sheet, shown_classes
from pipelines.deal import ids_of_shard
from pipelines.index import Index, numbered_classes
from pipelines.shards import Manifest, Reject, Row, ShardInfo

logger = logging.getLogger(__name__)

WORK = "_work"
INDEX_FILE = "index.arrow"
READERS = 16
"""Entries that are read at once."""
COMPARED = 8
"""Shards, and images of each, that are compared with a source that may be a copy."""

HINTS = {
    "source_sha256": " (the list of images differs)",
    "files_sha256": " (files of the source have other sizes or times of change)",
    "class_names_sha256": " (the names of classes differ)",
}
"""What digests that differ mean."""

# Fields of the config that say where and how to work, but not what comes out.
ELSEWHERE = {"output", "verify", "dry_run", "workers"}


class Request(Config):
    """What of a job can be told before the source is listed."""

    image_size: tuple[int, ...]
    encoding: str
    rows_per_shard: int
    rows_per_group: int
    seed: int


class Job(Request):
    """What a dataset folder is made of: equal jobs write equal bytes."""

    num_images: int
    num_classes: int
    class_names_sha256: str
    """Digest of names and wnids: they are in the schema of each shard."""
    source_sha256: str
    """Digest of the list of images."""
    files_sha256: str
    """Digest of what tells the source's files from later ones. Equal files elsewhere make equal
    shards, so no manifest holds it: it lies beside."""
    versions: dict[str, str]
    """Versions of the tools that decide bytes."""

    @property
    def num_shards(self) -> int:
        """Shards of a folder."""
        return -(-self.num_images // self.rows_per_shard)


class SizeEntry(Config):
    """What a task found out about one shard that it published."""

    info: ShardInfo
    labels: dict[int, int]
    """Images of each label that occurs."""
    rejects: list[Reject]


class ShardEntry(Config):
    """What a task found out about a shard, for each image size."""

    sizes: list[SizeEntry]

    @property
    def rejects(self) -> list[Reject]:
        """Images that are missing in one size at least."""
        return list({reject.id: reject for size in self.sizes for reject in size.rejects}.values())

    @property
    def bytes(self) -> int:
        """Bytes of all sizes."""
        return sum(size.info.bytes for size in self.sizes)


def folders_of(output: str, sizes: Sequence[int]) -> dict[int, str]:
    """The dataset folder of each image size: one is the output itself, several lie below it."""
    if len(sizes) == 1:
        return {sizes[0]: output}
    return {size: storage.join(output, str(size)) for size in sizes}


def output_of(folders: Mapping[int, str]) -> str:
    """Where the folders' common work is kept."""
    found = next(iter(folders.values()))
    return found if len(folders) == 1 else found.rpartition("/")[0]


def versions() -> dict[str, str]:
    """Versions of the tools that decide the bytes of a shard."""
    codecs = {name: str(features.version(name)) for name in ("libjpeg_turbo", "zlib", "webp")}
    return {"pillow": PIL.__version__, "pyarrow": pa.__version__, **codecs}


def classes_of(source: sources.Source, index: Index) -> list[ClassInfo]:
    """Classes of a source that was listed."""
    return source.classes or numbered_classes(index)


def class_digest(classes: Sequence[ClassInfo]) -> str:
    """Digest of the names and wnids of classes, in their order."""
    return _digest([info.model_dump() for info in classes])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def files_digest(source: sources.Source) -> str:
    """Digest of what tells the files of a source, which was listed, from later ones."""
    return _digest(sorted(source.versions.items()))


def describe(config: PrepareConfig, source: sources.Source, index: Path) -> Job:
    """The job, once the source is listed."""
    listed = Index(index)
    classes = classes_of(source, listed)
    job = Job(
        **config.model_dump(include=set(Request.model_fields)),
        num_images=len(listed),
        num_classes=len(classes),
        class_names_sha256=class_digest(classes),
        source_sha256=shards.sha256(str(index)),
        files_sha256=files_digest(source),
        versions=versions(),
    )
    logger.info(
        "%s: %d images of %d classes -> %d shards of %d",
        config.source, job.num_images, job.num_classes, job.num_shards, job.rows_per_shard,
    )  # fmt: skip
    return job


def is_finished(folders: Mapping[int, str]) -> bool:
    """Whether all folders have been published."""
    return all(storage.exists(storage.join(f, shards.MANIFEST)) for f in folders.values())


def refuse_another(output: str, folders: Mapping[int, str], ours: Request) -> None:
    """Check that nothing else was made or begun here.

    Raises:
        ValueError: something was, naming the first difference and both values.
    """
    fields = {name: _shown(value) for name, value in ours if name != "versions"}
    begun = storage.join(output, WORK, "job.json")
    found = [(output, storage.read_json(begun), "started")] if storage.exists(begun) else []
    if found and isinstance(ours, Job):
        fields["versions"] = ours.versions  # a finished folder may have been made by other ones
    if not found:
        for size, folder in {**folders, 0: output}.items():
            if storage.exists(storage.join(folder, shards.MANIFEST)):
                manifest = shards.read_manifest(folder)
                theirs = manifest.config | {
                    "num_images": manifest.num_rows + manifest.num_rejects,
                    "num_classes": len(manifest.classes),
                    "class_names_sha256": class_digest(manifest.classes),
                    "source_sha256": manifest.source_sha256,
                }
                if size and len(folders) > 1 and manifest.image_size == size:
                    theirs["image_size"] = ours.image_size
                found.append((folder, theirs, "made"))
    for place, theirs, verb in found:
        for name, now in fields.items():
            if name in theirs and _shown(theirs[name]) != now:
                raise ValueError(
                    f"{place} was {verb} with {name} {_shown(theirs[name])}, and this is "
                    f"{name} {now}{HINTS.get(name, '')}: go on with what it was {verb} with, or "
                    "choose another --output"
                )


def refuse_changed(
    config: PrepareConfig, source: sources.Source, index: Path, folders: Mapping[int, str]
) -> None:
    """Check that finished folders were made from the files that the source has now.

    Files elsewhere with an equal list may be a copy: if some of their pictures are those of the
    folder, that is a warning.

    Raises:
        ValueError: the files of the same source have changed since, or those elsewhere are others.
    """
    now = files_digest(source)
    for size, folder in folders.items():
        place = storage.join(folder, shards.SOURCE)
        then = storage.read_json(place)["files_sha256"] if storage.exists(place) else now
        if then == now:
            continue
        manifest = shards.read_manifest(folder)
        made_from = manifest.config["source"]
        if made_from == config.source:
            raise ValueError(
                f"{folder} was made when {config.source} had files_sha256 {then}, and this is "
                f"files_sha256 {now}{HINTS['files_sha256']}: choose another --output, or leave it "
                "as it is if the pictures are the same"
            )
        other = _other_picture(folder, manifest, size, source.root, Index(index))
        if other:
            raise ValueError(
                f"{folder} was made from {made_from}, and {config.source} holds other pictures, "
                f"such as {other}: choose another --output"
            )
        logger.warning(
            "%s was made from %s; the files of %s have other times of change, but the same names, "
            "sizes and, as far as some were compared, pictures: they are taken for a copy",
            folder, made_from, config.source,
        )  # fmt: skip


def _other_picture(folder: str, manifest: Manifest, size: int, root: str, index: Index) -> str:
    """One of some images of a dataset that is another one in the source; empty if none is."""
    for info in manifest.shards[:: -(-len(manifest.shards) // COMPARED)]:
        stored = shards.first_images(storage.join(folder, info.file), COMPARED)
        refs = index.refs([i for i, _ in stored])
        for i, image in sources.read_images(root, refs):
            (found,) = crops(image, refs[i].label, len(manifest.classes), [size])
            kept = images.decode_pixels(stored[i][1])
            if isinstance(found, images.BadImage) or not np.array_equal(found, kept):
                return refs[i].path
    return ""


def _shown(value: Any) -> Any:
    """A value of a config as people write it: one image size is a number, several are a list."""
    if isinstance(value, (tuple, list)):
        return value[0] if len(value) == 1 else list(value)
    return value


def refuse_strangers(output: str) -> None:
    """Check that the output is empty or was begun by a preparation.

    Raises:
        ValueError: it holds something else.
    """
    if not storage.exists(output) or storage.exists(storage.join(output, WORK, "job.json")):
        return
    folders, files = storage.list_folder(output)
    # Some stores keep the empty folders of objects that were deleted.
    full = [name for name in folders if storage.exists(storage.join(output, name))]
    found = [*full, *(entry.relative for entry in files)]
    strangers = [name for name in found if name != WORK and not name.startswith(storage.TEMPORARY)]
    if strangers:
        raise ValueError(
            f"{output} is not empty, and no preparation was started there (it holds "
            f"{strangers[0]!r}): choose another --output, or empty it"
        )


def begin(output: str, folders: Mapping[int, str], job: Job, index: Path) -> None:
    """Note in the folder what is being made, or check that it is what we make.

    Raises:
        ValueError: it was started with another job.
    """
    place = storage.join(output, WORK, "job.json")
    if storage.exists(place):
        refuse_another(output, folders, job)
        logger.info("going on with what was interrupted in %s", output)
        return
    storage.copy_in(index, storage.join(output, WORK, INDEX_FILE))
    storage.write_json(place, job.model_dump())


def entries(folders: Mapping[int, str], job: Job) -> Iterator[tuple[int, ShardEntry]]:
    """Entries of the shards that are there, with their numbers, one after the other.

    A shard counts if it has the bytes that its entry says. It was published whole and by us, and
    its entry after it, so that its content is not read again: that would take as long as --verify,
    which finds what others did to it.
    """
    output = output_of(folders)
    folder = storage.join(output, WORK, "shards")
    if not storage.exists(folder):
        return
    numbers = [int(Path(entry.relative).stem) for entry in storage.list_folder(folder)[1]
               if entry.relative.endswith(".json")]  # fmt: skip
    places = [storage.join(folder, "data") for folder in folders.values()]
    sizes = [
        {e.relative: e.bytes for e in storage.list_folder(place)[1]}
        if storage.exists(place)
        else {}
        for place in places
    ]
    with ThreadPoolExecutor(READERS) as pool:
        texts = sources.ahead(
            pool, lambda n: storage.read_bytes(_entry_place(output, n)), numbers, READERS
        )
        for number, text in zip(numbers, texts, strict=True):
            entry = ShardEntry.model_validate_json(text)
            infos = [size.info for size in entry.sizes]
            if all(
                there.get(info.file.rpartition("/")[2]) == info.bytes
                for there, info in zip(sizes, infos, strict=True)
            ):
                yield number, entry


def _entry_place(output: str, number: int) -> str:
    return storage.join(output, WORK, "shards", f"{number:05d}.json")


def write_shard(
    number: int, folders: Mapping[int, str], root: str, classes: Sequence[ClassInfo], job: Job
) -> ShardEntry:
    """Write, check and publish one shard of each size, then their entry.

    Args:
        number: which shard.
        folders: dataset folder of each image size, where begin() has been.
        root: URI that the source's files are below.
        classes: names of the labels.
        job: what is being made.

    Raises:
        RuntimeError: this machine has other versions of the tools that decide the bytes.
    """
    if versions() != job.versions:
        raise RuntimeError(
            f"a worker has {versions()}, but the job was started with {job.versions}: "
            "install the same versions on every node"
        )
    place = storage.fetch(storage.join(output_of(folders), WORK, INDEX_FILE))
    ids = ids_of_shard(place, number, rows_per_shard=job.rows_per_shard, seed=job.seed)
    refs = Index(place).refs(ids)

    name = shards.shard_name(number, job.num_shards)
    found = []
    # On a disk meanwhile: they come in the order that is cheapest to read, and may be large.
    with tempfile.TemporaryFile(prefix="jit-") as kept:
        places: dict[int, dict[int, tuple[int, int]]] = {size: {} for size in folders}
        rejects: dict[int, list[Reject]] = {size: [] for size in folders}
        for i, image in sources.read_images(root, refs):
            cropped = crops(image, refs[i].label, len(classes), folders)
            for size, pixels in zip(folders, cropped, strict=True):
                if isinstance(pixels, images.BadImage):
                    rejects[size].append(Reject(int(ids[i]), refs[i].path, str(pixels)))
                else:
                    places[size][i] = (kept.tell(), kept.write(images.encode(pixels, job.encoding)))
        for size, folder in folders.items():
            rows = (
                Row(_piece(kept, *places[size][i]), refs[i].path, refs[i].label, int(ids[i]))
                for i in sorted(places[size])
            )
            with storage.staged(storage.join(folder, name)) as temporary:
                info = shards.write_shard(
                    temporary, rows, classes, rows_per_group=job.rows_per_group
                )
            found.append(
                SizeEntry(
                    info=info.model_copy(update={"file": name}),
                    labels=Counter(refs[i].label for i in places[size]),
                    rejects=sorted(rejects[size]),
                )
            )
    pa.default_memory_pool().release_unused()  # or the last row groups would stay
    entry = ShardEntry(sizes=found)
    text = entry.model_dump_json().encode()
    storage.write_bytes(_entry_place(output_of(folders), number), text)
    return entry


def _piece(file: IO[bytes], first: int, length: int) -> bytes:
    file.seek(first)
    return file.read(length)


def crops(
    image: bytes | str, label: int, num_classes: int, sizes: Iterable[int]
) -> list[NDArray[np.uint8] | images.BadImage]:
    """The pixels that training shall see, [size, size, 3], or why there are none, for each size."""
    sizes = list(sizes)
    try:
        if isinstance(image, str):
            raise images.BadImage(image)
        if not 0 <= label < num_classes:
            raise images.BadImage(f"label {label} is outside 0..{num_classes - 1}")
        decoded = images.decode(image)
    except images.BadImage as error:
        return [error] * len(sizes)
    found: list[NDArray[np.uint8] | images.BadImage] = []
    for size in sizes:
        try:
            found.append(np.asarray(images.adm_crop(decoded, size)))
        except images.BadImage as error:
            found.append(error)
    return found


class Totals(NamedTuple):
    """What the entries of one image size add up to; they are many, and go one by one."""

    infos: dict[int, ShardInfo]
    counts: NDArray[np.int64]
    """Images of each class."""
    rejects: list[Reject]
    shown: dict[int, int]
    """Images of each class of the contact sheet that the shards in `sheet` hold."""
    sheet: list[str]
    """Shards that the contact sheet is drawn from."""


def publish(
    folders: Mapping[int, str], classes: list[ClassInfo], job: Job, config: PrepareConfig
) -> None:
    """Write what describes the shards, the manifests last.

    Raises:
        ValueError: not one image can be used.
    """
    shown = dict.fromkeys(shown_classes(len(classes)), 0)
    totals = {
        size: Totals({}, np.zeros(len(classes), np.int64), [], dict(shown), []) for size in folders
    }
    for number, entry in entries(folders, job):
        for total, found in zip(totals.values(), entry.sizes, strict=True):
            total.infos[number] = found.info
            total.rejects.extend(found.rejects)
            for label, count in found.labels.items():
                total.counts[label] += count
            new = {k: found.labels[k] for k, n in total.shown.items()
                   if n < COLUMNS and k in found.labels}  # fmt: skip
            if new:
                total.sheet.append(found.info.file)
                total.shown.update({k: total.shown[k] + count for k, count in new.items()})
    for size, folder in folders.items():
        _publish(folder, size, totals[size], classes, job, config)


def _publish(
    folder: str,
    size: int,
    totals: Totals,
    classes: list[ClassInfo],
    job: Job,
    config: PrepareConfig,
) -> None:
    infos = [info for _, info in sorted(totals.infos.items())]
    counts, rejects = totals.counts, sorted(totals.rejects)
    if len(infos) != job.num_shards:
        raise StageFailed(
            f"{job.num_shards - len(infos)} of {job.num_shards} shards of {folder} were replaced "
            "or removed by somebody else while this command wrote them: nothing else may write "
            "there. The same command again writes them anew"
        )
    if counts.sum() + len(rejects) != job.num_images:
        raise StageFailed(
            f"the shards of {folder} hold {counts.sum()} images, with {len(rejects)} rejects "
            f"beside them, but the source has {job.num_images}: an entry in {WORK}/shards is not "
            "of this job. Empty the output, and give the same command again"
        )
    if not counts.any():
        raise ValueError(f"not one image of {config.source} can be used: see {folder}/{WORK}")
    manifest = Manifest(
        fingerprint=shards.fingerprint(classes, infos),
        image_size=size,
        encoding=job.encoding,
        num_rows=int(counts.sum()),
        num_rejects=len(rejects),
        rows_per_class=counts.tolist(),
        classes=classes,
        shards=infos,
        source_sha256=job.source_sha256,
        config=config.model_dump(exclude=ELSEWHERE) | {"image_size": size},
        versions=job.versions,
    )
    storage.write_bytes(storage.join(folder, shards.REJECTS), shards.rejects_table(rejects))
    sheet = contact_sheet(manifest, folder, sorted(totals.sheet))
    storage.write_bytes(storage.join(folder, shards.CONTACT_SHEET), sheet)
    storage.write_bytes(storage.join(folder, shards.CARD), card(manifest).encode())
    files = {"files_sha256": job.files_sha256}
    storage.write_json(storage.join(folder, shards.SOURCE), files)
    for place in (folder, storage.join(folder, "data")):
        for left in storage.list_folder(place)[1]:  # by whoever was killed while writing
            if left.relative.startswith(storage.TEMPORARY):
                storage.delete(left.uri)
    storage.end_uploads(storage.join(folder, "data"))
    storage.write_json(storage.join(folder, shards.MANIFEST), manifest.model_dump())
