"""Make the two embedded Parquet files from the idx files of Fashion-MNIST.

The first images of each class, in their original order: 2,000 a class for training, 200 a class
for test. `id` is the position in the original file. Running it again gives equal bytes.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb unpacked
    python -m pipelines.embedded.make_fashion_mnist unpacked/usr/share/datasets/fashion-mnist
"""

from __future__ import annotations

import gzip
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from jitmodel.config import ClassInfo
from pipelines.shards import Row, write_shard

CLASSES = [
    ClassInfo(name=name)
    for name in ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
                 "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
]  # fmt: skip
FILES = {  # our file: (prefix of the idx files, images a class)
    "fashion-mnist.parquet": ("train", 2000),
    "fashion-mnist-test.parquet": ("t10k", 200),
}


def make(source: Path, output: Path) -> None:
    """Write both files.

    Args:
        source: folder of the gzipped idx files.
        output: folder to write to.
    """
    for name, (prefix, per_class) in FILES.items():
        with gzip.open(source / f"{prefix}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
        with gzip.open(source / f"{prefix}-images-idx3-ubyte.gz") as file:
            images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        first = [np.flatnonzero(labels == label)[:per_class] for label in range(len(CLASSES))]
        rows = [
            Row(_png(images[i]), f"{i:05d}.png", int(labels[i]), int(i))
            for i in np.sort(np.concatenate(first))
        ]
        write_shard(output / name, rows, CLASSES, rows_per_group=500)


def _png(pixels: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(__file__).parent)
