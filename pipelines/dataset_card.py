"""What a person sees of a dataset folder: the card that the Hub reads, and the contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
import yaml

from jitmodel.config import ClassInfo
from pipelines import images, report, shards, sources
from pipelines.index import Index
from pipelines.shards import Manifest

CONTACT_SHEET = "contact.png"
CLASSES, COLUMNS, PIXELS = 20, 8, 128
"""Most rows of the contact sheet, images in a row, and their side."""


def contact_sheet(
    root: str, classes: Sequence[ClassInfo], index: Index, rejected: set[int], size: int
) -> bytes:
    """PNG of the first images of some classes, spread over all of them, one row a class."""
    num = len(classes)
    chosen = np.unique(np.linspace(0, num - 1, min(num, CLASSES)).round().astype(int))
    found: dict[int, list[int]] = {label: [] for label in chosen.tolist()}
    start = 0
    for label in index.column("label"):
        for number, row in found.items():
            if len(row) < COLUMNS:
                new = (np.flatnonzero(label == number) + start).tolist()
                row += [i for i in new if i not in rejected][: COLUMNS - len(row)]
        start += len(label)
    columns = max(map(len, found.values())) or 1
    ids = [(r * columns + k, i) for r, f in enumerate(found.values()) for k, i in enumerate(f)]
    side = min(size, PIXELS)
    pixels = np.full((len(chosen) * columns, side, side, 3), 255, np.uint8)
    for i, image in sources.read_images(root, index.refs([i for _, i in ids])):
        assert isinstance(image, bytes)
        pixels[ids[i][0]] = np.asarray(images.adm_crop(images.decode(image), side))
    names = [classes[number].name.split(",")[0][:24] for number in chosen]
    buffer = BytesIO()
    scale = max(1, 64 // side)
    report.image_grid(pixels, columns, names, scale).save(buffer, "PNG")
    return buffer.getvalue()


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
