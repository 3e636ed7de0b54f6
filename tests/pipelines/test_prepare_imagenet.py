"""The README's road from ImageNet's own tar on S3 to training, walked with the real sample."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pipelines import images, shards, storage

TAR = "s3://bucket/ILSVRC2012_img_train.tar"
OUTPUT = "s3://bucket/imagenet-256"
ROAD = f"""
jit prepare imagenet-256 --source {TAR} --output {OUTPUT} --dry-run
jit prepare imagenet-256 --source {TAR} --output {OUTPUT}
jit prepare --verify {OUTPUT}
"""
TRAIN = f"jit train --data {OUTPUT} --storage s3://bucket/runs --name b16 --workers 2"
SMALL = """--model.patch-size 32 --model.hidden-size 32 --model.depth 2 --model.num-heads 2
--model.bottleneck-dim 16 --model.in-context-len 2 --model.in-context-start 1
--model.num-classes 200 --global-batch 16 --micro-batch 8 --total-images 32 --loader.lanes 4
--checkpoint-every-images 32 --grid-every-images 0 --parallel.precision fp32
--optimizer.warmup-images 16"""


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readmes_road_from_imagenets_tar_on_s3_to_training(
    imagenet_sample: Path, s3_environment: dict[str, str], tmp_path: Path, repository: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    readme = (repository / "README.md").read_text(encoding="utf-8")
    if "Preparing ImageNet" in readme:
        assert all(line in readme for line in ROAD.split("\n"))
    for name, value in (s3_environment | {"JIT_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    photographs = sorted(imagenet_sample.glob("*.JPEG"))
    outer = io.BytesIO()
    with tarfile.open(fileobj=outer, mode="w") as archive:
        for file in photographs:
            inner, wnid = io.BytesIO(), file.name.split("_")[0]
            with tarfile.open(fileobj=inner, mode="w") as one:
                _add(one, f"{wnid}_1.JPEG", file.read_bytes())
            _add(archive, f"{wnid}.tar", inner.getvalue())
    storage.write_bytes(TAR, outer.getvalue())

    said = ""
    small = f"{TRAIN} {SMALL}".replace("\n", " ")
    for line in [*ROAD.strip().splitlines(), small]:
        word, *arguments = shlex.split(line)
        command = [str(Path(sys.executable).parent / word), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        said += done.stderr
    assert "about 200 images of 200 classes" in said
    assert "is sound: 200 images in 1 shards" in said

    manifest = shards.read_manifest(OUTPUT)
    assert manifest.rows_per_class == [1] * 200
    assert manifest.classes[0].name == "tench, Tinca tinca"
    with storage.open_input(storage.join(OUTPUT, manifest.shards[0].file)) as file:
        import pyarrow.parquet as pq

        row = pq.read_table(file).slice(7, 1).to_pylist()[0]
    pixels = images.decode_pixels(row["image"]["bytes"])
    original = images.decode(photographs[row["label"]].read_bytes())
    assert (pixels == images.adm_crop(original, 256)).all()
    assert storage.exists("s3://bucket/runs/b16/latest.json")
