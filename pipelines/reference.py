"""The reference of an evaluation: statistics of a dataset's features, in one .npz file. No Ray.

It holds mean and covariance (`mu`, `sigma`, as other tools name them), the count, an evenly spread
subset of the features for the metrics that need images and not moments, and an identity block.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is slow to import: `--help` shall not wait for it
    import sys

    from pipelines.cli import main

    raise SystemExit(main(["reference", *sys.argv[1:]]))

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from jitmodel.config import ClassInfo, Config
from pipelines import storage
from pipelines.features import Extractor
from pipelines.images import decode_pixels
from pipelines.metrics import Array, Moments
from pipelines.shards import Manifest

BATCH = 64
"""Images that are decoded and extracted together; batches do not cross shards."""

MAX_FEATURES = 10_000
"""Most features that are stored as they are."""


class ReferenceIdentity(Config):
    """What the numbers of a reference file are about."""

    format_version: Literal[1] = 1
    extractor: dict[str, str | int]
    image_size: int
    classes: tuple[ClassInfo, ...]
    num_images: int
    dataset_fingerprint: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Reference:
    """A reference file in memory."""

    identity: ReferenceIdentity
    sha256: str
    """Digest of the file."""
    mean: Array
    covariance: Array
    features: Array
    """Up to MAX_FEATURES features, spread evenly over the images."""


def is_kept(position: Array, num_images: int) -> Array:
    """Which positions of the dataset belong to the subset of the features."""
    keep = min(MAX_FEATURES, num_images)
    kept: Array = (position + 1) * keep // num_images > position * keep // num_images
    return kept


def shard_statistics(
    data: str,
    manifest: Manifest,
    shard: int,
    num_images: int,
    extractor: Extractor,
    device: torch.device,
) -> tuple[Moments, Array]:
    """Moments and the kept features of one shard.

    Args:
        data: URI of the dataset folder.
        manifest: its manifest.
        shard: which one.
        num_images: images of the dataset that count, from the first one on.
        extractor: on `device`.
        device: where it runs.
    """
    first = sum(info.rows for info in manifest.shards[:shard])
    info = manifest.shards[shard]
    rows = min(info.rows, num_images - first)
    found = [
        extractor(pixels.to(device))[0].cpu().numpy()
        for pixels in _batches(storage.join(data, info.file), rows)
    ]
    features = np.concatenate(found)
    assert len(features) == rows, (len(features), rows)
    return Moments.of(features), features[is_kept(first + np.arange(rows), num_images)]


def _batches(uri: str, rows: int) -> Iterator[Tensor]:
    """The first images of a shard, uint8 [B, 3, H, W]."""
    with storage.open_input(uri) as source:
        for batch in pq.ParquetFile(source).iter_batches(BATCH, columns=["image"]):
            images = batch.column(0).field("bytes")[:rows]
            rows -= len(images)
            if len(images):
                pixels = np.stack([decode_pixels(image.as_py()) for image in images])
                yield torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def write_reference(
    uri: str, identity: ReferenceIdentity, moments: Moments, features: Array
) -> None:
    """Publish a reference file; its bytes are a function of the arguments."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        mu=moments.mean,
        sigma=moments.covariance,
        count=np.int64(moments.count),
        features=features,
        identity=np.array(json.dumps(identity.model_dump(mode="json"))),
    )
    storage.write_bytes(uri, buffer.getvalue())


def read_reference(uri: str) -> Reference:
    """Read a reference file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged, or not a reference file of ours.
    """
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no reference at {uri}: make one with `jit reference DATASET --output {uri}`"
        ) from error
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return Reference(
                identity=ReferenceIdentity.model_validate_json(str(file["identity"])),
                sha256=hashlib.sha256(content).hexdigest(),
                mean=file["mu"],
                covariance=file["sigma"],
                features=file["features"],
            )
    except KeyError as error:
        raise ValueError(
            f"{uri} has no {error.args[0]}: it was not made by `jit reference`, so nobody can "
            "tell whether its extractor, image size and classes are the model's"
        ) from error
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{uri} is not a reference file: {error}") from error


def check_match(
    reference: ReferenceIdentity,
    extractor: dict[str, Any],
    image_size: int,
    num_classes: int,
    classes: tuple[ClassInfo, ...],
) -> None:
    """Refuse to compare what cannot be compared.

    Raises:
        ValueError: extractor, image size or classes differ; both are named.
    """
    for field, theirs in reference.extractor.items():
        if theirs != extractor[field]:
            raise ValueError(
                f"the reference was made with another extractor: its {field} is {theirs}, "
                f"this evaluation's is {extractor[field]}"
            )
    if reference.image_size != image_size:
        raise ValueError(
            f"the reference is about images of {reference.image_size} pixels, "
            f"the model draws {image_size}"
        )
    if len(reference.classes) != num_classes:
        raise ValueError(
            f"the reference has {len(reference.classes)} classes, the model has {num_classes}"
        )
    for label, (real, drawn) in enumerate(zip(reference.classes, classes, strict=False)):
        if real != drawn:
            raise ValueError(
                f"class {label} is {real.name!r} in the reference and {drawn.name!r} in the model"
            )
