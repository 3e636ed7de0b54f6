"""What a person sees of a dataset folder: the card that the Hub reads, and the contact sheet."""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO

import numpy as np
import yaml
from numpy.typing import NDArray

from jitmodel.config import ClassInfo
from pipelines import images, report, shards, storage
from pipelines.shards import CONTACT_SHEET, Manifest

CLASSES, COLUMNS, PIXELS = 20, 8, 128
"""Most rows of the contact sheet, images in a row, and their side."""


def shown_classes(num_classes: int) -> list[int]:
    """Labels of the classes that the contact sheet shows, spread over all of them."""
    spread = np.linspace(0, num_classes - 1, min(num_classes, CLASSES))
    return np.unique(spread.round().astype(int)).tolist()


def contact_sheet(manifest: Manifest, folder: str, files: Iterable[str]) -> bytes:
    """PNG of the first images of some classes, one row a class, from the shards.

    Args:
        manifest: of the dataset.
        folder: URI of the dataset folder.
        files: shards, in order, that hold COLUMNS images of each class shown, or all there are.
    """
    found: dict[int, list[NDArray[np.uint8]]] = {
        label: [] for label in shown_classes(len(manifest.classes))
    }
    side = min(manifest.image_size, PIXELS)
    for file in files:
        for label, image in shards.read_images(storage.join(folder, file), list(found)):
            if len(found[label]) < COLUMNS:
                found[label].append(images.resize(images.decode_pixels(image), side))
    columns = max(map(len, found.values())) or 1
    pixels = np.full((len(found) * columns, side, side, 3), 255, np.uint8)
    for r, row in enumerate(found.values()):
        for k, one in enumerate(row):
            pixels[r * columns + k] = one
    names = [_title(label, manifest.classes[label]) for label in found]
    buffer = BytesIO()
    scale = max(1, 64 // side)
    report.image_grid(pixels, columns, names, scale).save(buffer, "PNG")
    return buffer.getvalue()


def _title(label: int, info: ClassInfo) -> str:
    """What a row is called: the number of a class whose name our font has no signs for."""
    name = info.name.split(",")[0][:24]
    return name if report.drawable(name) == name else info.wnid or f"class {label}"


def card(manifest: Manifest) -> str:
    """The dataset card, with the front matter that the Hub reads."""
    side, names = manifest.image_size, {str(i): c.name for i, c in enumerate(manifest.classes)}
    front = {
        "dataset_info": {
            "features": [
                {"name": "image", "dtype": "image"},
                {"name": "label", "dtype": {"class_label": {"names": names}}},
                {"name": "id", "dtype": "int64"},
            ],
            "splits": [
                {
                    "name": "train",
                    "num_bytes": sum(s.bytes for s in manifest.shards),
                    "num_examples": manifest.num_rows,
                }
            ],
        },
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/train-*"}],
            }
        ],
    }
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip()}
---

# {manifest.num_rows} images of {len(manifest.classes)} classes, {side} x {side}

Made by `jit prepare`: each image as RGB, ADM's centre crop to {side} pixels, stored
without loss as {manifest.encoding}. `id` is the image's position in the sorted source.

![some images of each class]({CONTACT_SHEET})

- {len(manifest.shards)} shards in `data/`; their digests, and the config that made them, are in
  `{shards.MANIFEST}`
- {manifest.num_rejects} images of the source could not be used: `{shards.REJECTS}` names each
- fingerprint `{manifest.fingerprint}`

Check it with `jit prepare --verify` and the URI of this folder.
"""
