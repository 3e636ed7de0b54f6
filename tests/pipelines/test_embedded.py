"""The embedded images are what their README says, and their script makes them again."""

from __future__ import annotations

import gzip
import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import embedded
from pipelines.embedded import make_fashion_mnist

FOLDER = Path(embedded.__file__).parent


@pytest.mark.parametrize(
    ("name", "per_class"), [("fashion-mnist.parquet", 2000), ("fashion-mnist-test.parquet", 200)]
)
def test_the_embedded_images_are_balanced_and_can_be_decoded(name: str, per_class: int) -> None:
    table = pq.read_table(FOLDER / name)
    assert np.bincount(table["label"]).tolist() == [per_class] * 10
    for row in table["image"].to_pylist()[:: per_class // 10]:
        with Image.open(BytesIO(row["bytes"])) as img:
            assert (img.size, img.mode, img.format) == ((28, 28), "L", "PNG")
            assert np.asarray(img).std() > 5  # a picture, not a flat field
    assert table["id"].to_pylist() == sorted(set(table["id"].to_pylist()))


def test_the_embedded_files_are_small_and_come_with_their_licence() -> None:
    assert sum(file.stat().st_size for file in FOLDER.glob("*.parquet")) < 12e6
    licence = (FOLDER / "LICENSE.fashion-mnist").read_text()
    assert "Copyright: 2017, Zalando SE" in licence
    assert "Permission is hereby granted, free of charge" in licence


def test_the_script_makes_the_same_bytes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The original files are not in the project, so idx files are written from what is embedded:
    # the first images of each class in their order are then all of them.
    source, output = tmp_path / "idx", tmp_path / "made"
    source.mkdir()
    output.mkdir()
    table = pq.read_table(FOLDER / "fashion-mnist-test.parquet").to_pylist()
    pixels = [np.asarray(Image.open(BytesIO(row["image"]["bytes"]))) for row in table]
    labels = bytes(row["label"] for row in table)
    with gzip.open(source / "t10k-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">4i", 2051, len(table), 28, 28) + np.stack(pixels).tobytes())
    with gzip.open(source / "t10k-labels-idx1-ubyte.gz", "wb") as file:
        file.write(struct.pack(">2i", 2049, len(table)) + labels)
    monkeypatch.setattr(make_fashion_mnist, "FILES", {"made.parquet": ("t10k", 200)})

    make_fashion_mnist.make(source, output)
    first = (output / "made.parquet").read_bytes()
    make_fashion_mnist.make(source, output)

    assert (output / "made.parquet").read_bytes() == first
    made = pq.read_table(output / "made.parquet").to_pylist()
    assert [row["image"]["bytes"] for row in made] == [row["image"]["bytes"] for row in table]
    assert [row["label"] for row in made] == [row["label"] for row in table]
