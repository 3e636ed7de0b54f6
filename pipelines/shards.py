"""The dataset folder: schema of its shards, its manifest, and how both are checked.

A dataset folder is manifest.json, which is written last and without which the folder does not
exist for readers; data/train-00042-of-01280.parquet; rejects.parquet; README.md; contact.png;
source.json, by which the files that it was made from are told from later ones.

A row is {image: struct<bytes, path>, label, id}: the Hub's image convention, so that
`datasets.load_dataset` shows pictures and class names, and the image's position in the sorted
source. Row groups are small, because they are what training reads.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from jitmodel.config import ClassInfo, Config
from pipelines import storage
from pipelines.images import look

MANIFEST = "manifest.json"
REJECTS = "rejects.parquet"
CONTACT_SHEET = "contact.png"
CARD = "README.md"
SOURCE = "source.json"
READERS = 8
"""Shards that verification reads at once."""
GROUP_BYTES = 2**26
"""Most bytes of images in a row group, which writers and readers hold as a whole."""


class Row(NamedTuple):
    """One image of a shard."""

    image: bytes
    path: str
    """Where it is from, for people."""
    label: int
    id: int
    """Position in the sorted source."""


class Reject(NamedTuple):
    """An image that cannot be used."""

    id: int
    path: str
    reason: str


class ShardInfo(Config):
    """One shard, as written."""

    file: str
    """Path below the dataset folder."""
    rows: int
    bytes: int
    sha256: str
    row_groups: list[int]
    """Rows of each row group, in order."""


class Manifest(Config):
    """What a finished dataset folder holds."""

    format_version: Literal[1] = 1
    fingerprint: str
    """Identity of the content: digest of schema and shard digests."""
    image_size: int
    encoding: str
    num_rows: int
    num_rejects: int
    rows_per_class: list[int]
    classes: list[ClassInfo]
    shards: list[ShardInfo]
    source_sha256: str
    """Digest of the list of source images."""
    config: dict[str, Any]
    """The config that made it."""
    versions: dict[str, str]
    """Versions of the tools that decide its bytes."""


def schema(classes: Sequence[ClassInfo]) -> pa.Schema:
    """Schema of a shard, with the Hub's metadata."""
    features = {
        "image": {"_type": "Image"},
        "label": {"names": [c.name for c in classes], "_type": "ClassLabel"},
        "id": {"dtype": "int64", "_type": "Value"},
    }
    return pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("label", pa.int64()),
            ("id", pa.int64()),
        ],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )


def shard_name(index: int, count: int) -> str:
    """Path of shard `index` of `count` below the dataset folder."""
    return f"data/train-{index:05d}-of-{count:05d}.parquet"


def write_shard(
    path: Path, rows: Iterable[Row], classes: Sequence[ClassInfo], *, rows_per_group: int
) -> ShardInfo:
    """Write rows as one Parquet file, and read back what a reader relies on.

    One row group is held at a time: `rows` may read images from where they are kept.

    The bytes are a function of the arguments and of pyarrow's version. Nothing is compressed:
    images are, and training reads them faster so.

    Args:
        path: local file to write.
        rows: images in the order in which they shall be stored; may be none.
        classes: names of the labels.
        rows_per_group: rows of a row group; the last one may hold fewer, and one of images that
            are large ends before it exceeds GROUP_BYTES.

    Returns:
        The shard's entry in the manifest; `file` is the bare name of `path`.
    """
    columns, counts = schema(classes), []
    with pq.ParquetWriter(
        path, columns, compression="none", use_dictionary=False, write_statistics=["label", "id"]
    ) as writer:
        for group in _groups(rows, rows_per_group):
            images = [{"bytes": row.image, "path": row.path} for row in group]
            labels, ids = [row.label for row in group], [row.id for row in group]
            writer.write_table(pa.table([images, labels, ids], schema=columns))
            counts.append(len(group))
            del images
    info = ShardInfo(
        file=path.name,
        rows=sum(counts),
        bytes=path.stat().st_size,
        sha256=sha256(str(path)),
        row_groups=counts,
    )
    problems = check_shard(str(path), info, classes, digest=info.sha256).problems
    assert not problems, problems
    return info


def _groups(rows: Iterable[Row], rows_per_group: int) -> Iterator[list[Row]]:
    group: list[Row] = []
    held = 0
    for row in rows:
        if group and (len(group) == rows_per_group or held + len(row.image) > GROUP_BYTES):
            yield group
            group, held = [], 0
        group.append(row)
        held += len(row.image)
    if group:
        yield group


def rejects_table(rejects: Sequence[Reject]) -> bytes:
    """The images that cannot be used, as a Parquet file."""
    columns = [("id", pa.int64()), ("path", pa.string()), ("reason", pa.string())]
    buffer = BytesIO()
    rows = [reject._asdict() for reject in rejects]
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(columns)), buffer)
    return buffer.getvalue()


def sha256(uri: str) -> str:
    """Digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with storage.honest_errors(uri), storage.open_patiently(uri) as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def fingerprint(classes: Sequence[ClassInfo], shards: Iterable[ShardInfo]) -> str:
    """Identity of a dataset's content."""
    names = json.dumps([c.model_dump() for c in classes])
    parts = [str(schema(classes).remove_metadata()), names, *(s.sha256 for s in shards)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def dataset_folders(uri: str) -> list[str]:
    """The dataset folder at a URI, or those of several image sizes below it; none are none."""
    if storage.exists(storage.join(uri, MANIFEST)):
        return [uri]
    names = storage.list_folder(uri)[0] if storage.exists(uri) else []
    return [storage.join(uri, name) for name in sorted(filter(str.isdecimal, names), key=int)]


def read_manifest(uri: str) -> Manifest:
    """The manifest of a dataset folder.

    Raises:
        FileNotFoundError: the folder has none, so it is not finished.
        ValueError: it cannot be read as a manifest of this version.
    """
    place = storage.join(uri, MANIFEST)
    try:
        text = storage.read_bytes(place)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"no manifest at {place}: the shards are incomplete or were never written. "
            f"Run `jit prepare --output {uri}`, or point --data at a finished folder."
        ) from error
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(
            f"{place} is not a manifest that this version reads: {error.errors()[0]['msg']} at "
            f"{'.'.join(map(str, error.errors()[0]['loc'])) or 'the top'}"
        ) from error


def check_there(uri: str, manifest: Manifest) -> None:
    """Look whether a dataset's shards are there and whole by their length, before long work.

    Raises:
        ValueError: naming the first that is not, or there is none.
    """
    data = storage.join(uri, "data")
    files = storage.list_folder(data)[1] if storage.exists(data) else []
    sizes = {f"data/{entry.relative}": entry.bytes for entry in files}
    wrong = [info for info in manifest.shards if sizes.get(info.file) != info.bytes]
    if wrong or not manifest.shards:
        what = "it names no shards"
        if wrong:
            there = sizes.get(wrong[0].file)
            what = f"it names {wrong[0].file} of {wrong[0].bytes} bytes, which " + (
                "is not there" if there is None else f"has {there}"
            )
            what += f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(
            f"the dataset at {uri} does not fit its {MANIFEST}: {what}. Bring the shards back, or "
            "prepare it anew; `jit prepare --verify` reads all of it."
        )


def read_images(uri: str, labels: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """Label and image of the rows of a shard that have one of the labels, in their order."""
    with storage.honest_errors(uri), storage.open_patiently(uri) as source:
        file = pq.ParquetFile(source, pre_buffer=False)
        for group in range(file.num_row_groups):
            label = file.read_row_group(group, columns=["label"])["label"].to_numpy()
            rows = np.flatnonzero(np.isin(label, labels))
            if len(rows):
                column = file.read_row_group(group, columns=["image.bytes"])["image"]
                for row in rows.tolist():
                    yield int(label[row]), column[row]["bytes"].as_py()


def first_images(uri: str, count: int) -> list[tuple[int, bytes]]:
    """Id and image of the first rows of a shard."""
    with storage.honest_errors(uri), storage.open_patiently(uri) as source:
        file = pq.ParquetFile(source, pre_buffer=False)
        for batch in file.iter_batches(count, columns=["id", "image.bytes"]):
            stored = batch["image"].field("bytes")
            return list(zip(batch["id"].to_pylist(), stored.to_pylist(), strict=True))
    return []


class Check(NamedTuple):
    """What re-reading a shard found."""

    problems: list[str]
    label: np.ndarray
    id: np.ndarray


def check_shard(
    uri: str,
    info: ShardInfo,
    classes: Sequence[ClassInfo],
    *,
    digest: str = "",
    encoding: str = "",
    image_size: int = 0,
) -> Check:
    """Read the file of a shard again: digest, columns, rows, row groups, label range.

    Args:
        uri: the file.
        info: what it should be.
        classes: names of the labels.
        digest: the file's sha256, of a caller that has just read all of it.
        encoding: what images should be stored as, to look at the first one of each row group.
        image_size: their side.

    Raises:
        PermissionError: the store refuses us.
        StoreFailed: it cannot be reached, which is no damage.
    """
    nothing = np.zeros(0, np.int64)
    try:
        digest = digest or sha256(uri)
        if digest != info.sha256:
            return Check([f"{info.file}: sha256 is {digest}, not {info.sha256}"], nothing, nothing)
        with storage.honest_errors(uri), storage.open_patiently(uri) as source:
            file = pq.ParquetFile(source, buffer_size=2**20, pre_buffer=False)
            if not file.schema_arrow.equals(schema(classes), check_metadata=True):
                return Check([f"{info.file}: not the columns of a shard"], nothing, nothing)
            metadata = file.metadata
            groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            table = file.read(columns=["label", "id"])
            looks = [_look(file, i) for i in range(len(groups))] if encoding else []
    except storage.StoreFailed:
        raise
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, PermissionError) and storage.local_path(uri) is None:
            raise  # a store that refuses us does so with all shards
        return Check([f"{info.file}: {error}"], nothing, nothing)
    label, ids = table["label"].to_numpy(), table["id"].to_numpy()
    problems = []
    if table.num_rows != info.rows or groups != info.row_groups:
        problems.append(
            f"{info.file}: {table.num_rows} rows in row groups of {groups}, "
            f"not {info.rows} in {info.row_groups}"
        )
    wrong = [look for look in looks if look != (encoding, image_size, image_size)]
    if wrong:
        kind, width, height = wrong[0]
        problems.append(
            f"{info.file}: an image is {kind} of {width} x {height}, and not {encoding} of "
            f"{image_size} x {image_size}, as {MANIFEST} says"
        )
    outside = label[(label < 0) | (label >= len(classes))]
    if len(outside):
        problems.append(f"{info.file}: label {outside[0]} is outside 0..{len(classes) - 1}")
    return Check(problems, label[(label >= 0) & (label < len(classes))], ids)


def _look(file: pq.ParquetFile, group: int) -> tuple[str, int, int]:
    """Encoding, width and height of the first image of a row group."""
    batch = next(file.iter_batches(1, row_groups=[group], columns=["image.bytes"]))
    return look(batch["image"][0]["bytes"].as_py() or b"")


def verify(uri: str) -> list[str]:
    """Read all of a dataset folder again; what is wrong with it, in words.

    Digests, row counts, row groups, label range, rows per class, rejects, ids that occur twice,
    shards that the manifest does not name, card and contact sheet, and whether the images (the
    first one of each row group) are of the manifest's encoding and size.

    Raises:
        FileNotFoundError: the folder has no manifest.
        PermissionError: the store refuses us.
        StoreFailed: it cannot be reached, which is no damage.
        ValueError: the manifest cannot be read.
    """
    manifest = read_manifest(uri)
    problems: list[str] = []
    labels, ids = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    with ThreadPoolExecutor(READERS) as pool:
        places = [storage.join(uri, info.file) for info in manifest.shards]
        check_one = functools.partial(
            check_shard, classes=manifest.classes, encoding=manifest.encoding,
            image_size=manifest.image_size,
        )  # fmt: skip
        for check in pool.map(check_one, places, manifest.shards):
            problems += check.problems
            labels.append(check.label)
            ids.append(check.id)
    counts = np.bincount(np.concatenate(labels), minlength=len(manifest.classes))
    every_id = np.concatenate(ids)
    if not problems:
        if len(every_id) != manifest.num_rows:
            problems.append(f"{MANIFEST}: num_rows is {manifest.num_rows}, not {len(every_id)}")
        if counts.tolist() != manifest.rows_per_class:
            problems.append(f"{MANIFEST}: rows_per_class differs from the labels in the shards")
        if fingerprint(manifest.classes, manifest.shards) != manifest.fingerprint:
            problems.append(f"{MANIFEST}: the fingerprint is not that of its shards")
    rejected = _rejected_ids(uri)
    if rejected is None or len(rejected) != manifest.num_rejects:
        what = "it is missing or damaged" if rejected is None else f"{len(rejected)} rows"
        problems.append(f"{REJECTS}: {what}, and {MANIFEST} says {manifest.num_rejects}")
    else:
        every_id = np.concatenate([every_id, rejected])
    seen, count = np.unique(every_id, return_counts=True)
    problems += [f"id {i} occurs {n} times" for i, n in zip(seen, count, strict=True) if n > 1][:10]
    problems += [
        f"{name}: it is missing"
        for name in (CARD, CONTACT_SHEET)
        if not storage.exists(storage.join(uri, name))
    ]
    named = {info.file for info in manifest.shards}
    place = storage.join(uri, "data")
    data = storage.list_files(place) if storage.exists(place) else []
    problems += [
        f"data/{entry.relative}: not in the manifest"
        for entry in data
        if f"data/{entry.relative}" not in named
    ]
    return problems


def _rejected_ids(uri: str) -> np.ndarray | None:
    """Ids of the images that cannot be used; None if the list cannot be read."""
    try:
        with storage.open_patiently(storage.join(uri, REJECTS)) as file:
            return pq.read_table(file, columns=["id"])["id"].to_numpy()
    except (PermissionError, storage.StoreFailed):
        raise
    except (OSError, pa.ArrowException):
        return None
