"""The loader against others, 256 px on two cores; needs the photographs of the tests.

Each contender gives batches of 64 (uint8 pixels, labels) in a shuffled order, as its makers advise,
with two worker processes, or two threads for ours, and reads from a warm page cache. The first
batch of a round is not timed. webdataset and litdata are measured if they are installed (extra
`bench`).
"""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from jitmodel.config import ClassInfo
from jitmodel.parallel import tune_cpu
from pipelines import images, shards
from pipelines.config import LoaderConfig
from pipelines.loader import Loader

PHOTOGRAPHS = Path(__file__).resolve().parents[3] / "shared" / "imagenet-sample"
SIZE, BATCH, THREADS, ROUNDS = 256, 64, 2, 3
RAW_COPIES, ENCODED_COPIES = 20, 8
"""Of 200 photographs."""

Batches = Callable[[], Iterable[object]]


def run() -> dict:
    if not PHOTOGRAPHS.is_dir():
        sys.exit(f"needs the real photographs at {PHOTOGRAPHS}")
    tune_cpu(threads=1)
    folder = Path(tempfile.mkdtemp(prefix="jit-bench-"))
    try:
        files = sorted(PHOTOGRAPHS.glob("*.JPEG"))
        crops = [np.asarray(images.adm_crop(images.decode(f.read_bytes()), SIZE)) for f in files]
        return {"tables": [raw(folder, files, crops), codecs(folder, crops)]}
    finally:
        shutil.rmtree(folder)


def raw(folder: Path, files: list[Path], crops: list[np.ndarray]) -> dict:
    """Ours against the others on the same raw images, and against ImageFolder on the JPEGs."""
    contenders: dict[str, tuple[int, Batches]] = {
        "ours, raw in Parquet": (len(crops) * RAW_COPIES, ours(folder / "ours", crops, "raw")),
        "ImageFolder, original JPEGs, ADM crop": (len(files) * 4, image_folder(folder, files)),
    }
    for name, module in (("webdataset", web_dataset), ("litdata", lit_data)):
        if importlib.util.find_spec(name):
            contenders[f"{name}, raw"] = (
                len(crops) * RAW_COPIES,
                module(folder / name, crops),
            )
        else:
            print(f"{name} is not installed (extra `bench`): left out")
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, (number, batches) in contenders.items():
            speeds[name].append(speed(batches, number))
    mine = speeds["ours, raw in Parquet"]
    rows = [
        {
            "loader": name,
            "images/s": round(statistics.median(found)),
            "slowest round": round(min(found)),
            "ours is faster by": statistics.median(a / b for a, b in zip(mine, found, strict=True)),
        }
        for name, found in speeds.items()
    ]
    return {
        "title": f"Loaders at {SIZE} px, {BATCH} images a batch, two cores, "
        f"median of {ROUNDS} alternating rounds",
        "rows": rows,
    }


def codecs(folder: Path, crops: list[np.ndarray]) -> dict:
    """Ours against a bare loop over the decoder in as many threads."""
    rows = []
    for encoding in ("webp", "png"):
        batches = ours(folder / encoding, crops, encoding, copies=ENCODED_COPIES)
        stored = [images.encode(crop, encoding) for crop in crops] * (ENCODED_COPIES // 2)
        rounds = [
            (speed(batches, len(crops) * ENCODED_COPIES), bare(stored)) for _ in range(ROUNDS)
        ]
        rows.append(
            {
                "encoding": encoding,
                "loader, images/s": round(statistics.median(a for a, _ in rounds)),
                "bare decoding, images/s": round(statistics.median(b for _, b in rounds)),
                "loader / bare": statistics.median(a / b for a, b in rounds),
                "worst round": min(a / b for a, b in rounds),
            }
        )
    return {
        "title": f"The loader against its decoder alone, {THREADS} threads on two cores",
        "rows": rows,
    }


def speed(batches: Batches, number: int) -> float:
    """Images a second over about `number` images, the first batch apart."""
    stream = iter(batches())
    next(stream)
    began = time.perf_counter()
    count = sum(1 for _ in itertools.islice(stream, number // BATCH - 1))
    elapsed = time.perf_counter() - began
    if hasattr(stream, "close"):
        stream.close()
    return count * BATCH / elapsed


def bare(stored: list[bytes]) -> float:
    """Images a second of THREADS threads that only decode."""

    def work(part: list[bytes]) -> None:
        for image in part:
            images.decode_pixels(image)

    with ThreadPoolExecutor(THREADS) as pool:
        began = time.perf_counter()
        list(pool.map(work, [stored[i::THREADS] for i in range(THREADS)]))
        return len(stored) / (time.perf_counter() - began)


def dataset(
    folder: Path, crops: list[np.ndarray], encoding: str, *, copies: int
) -> shards.Manifest:
    """Write `copies` (even) of the crops as a dataset folder; its manifest."""
    (folder / "data").mkdir(parents=True)
    classes = [ClassInfo(name=str(i)) for i in range(len(crops))]
    stored = [images.encode(crop, encoding) for crop in crops]
    infos = []
    for number in range(copies // 2):
        rows = [
            shards.Row(stored[i], "", i, number * 2 * len(crops) + k)
            for k, i in enumerate([*range(len(crops))] * 2)
        ]
        file = shards.shard_name(number, copies // 2)
        info = shards.write_shard(folder / file, rows, classes, rows_per_group=32)
        infos.append(info.model_copy(update={"file": file}))
    manifest = shards.Manifest(
        fingerprint="", image_size=SIZE, encoding=encoding, num_rows=len(crops) * copies,
        num_rejects=0, rows_per_class=[copies] * len(crops), classes=classes, shards=infos,
        source_sha256="", config={}, versions={},
    )  # fmt: skip
    (folder / shards.MANIFEST).write_text(manifest.model_dump_json(), encoding="utf-8")
    return manifest


def ours(folder: Path, crops: list[np.ndarray], encoding: str, copies: int = RAW_COPIES) -> Batches:
    """A dataset folder in this project's layout, and its loader."""
    manifest = dataset(folder, crops, encoding, copies=copies)
    config = LoaderConfig(lanes=16, threads=THREADS)
    return lambda: Loader(
        str(folder), manifest, config, seed=time.time_ns() % 1000, global_batch=BATCH
    ).batches()


def image_folder(folder: Path, files: list[Path]) -> Batches:
    """The paper's loader: ImageFolder, PIL, ADM crop, flip."""
    from torchvision import datasets, transforms

    for copy in range(4):
        for file in files:
            place = folder / "jpeg" / file.name.partition("_")[0]
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place / f"{copy}.jpeg")
    transform = transforms.Compose(
        [
            transforms.Lambda(_crop),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    dataset = datasets.ImageFolder(folder / "jpeg", transform)
    return lambda: torch.utils.data.DataLoader(
        dataset, BATCH, shuffle=True, num_workers=THREADS, drop_last=True
    )


def _crop(img: object) -> object:
    return images.adm_crop(img, SIZE)  # type: ignore[arg-type]


def web_dataset(folder: Path, crops: list[np.ndarray]) -> Batches:
    """Tars of raw pixels, two shards for each worker, a shuffle buffer of 1000.

    The pipeline makes the batches itself, as its documentation advises.
    """
    import webdataset

    folder.mkdir()
    number = len(crops) * RAW_COPIES
    for shard in range(4):
        with webdataset.TarWriter(str(folder / f"{shard}.tar")) as tar:
            for i in range(shard, number, 4):
                crop = crops[i % len(crops)]
                tar.write({"__key__": f"{i:06d}", "raw": crop.tobytes(), "cls": i % len(crops)})

    urls = [str(folder / f"{shard}.tar") for shard in range(4)]
    stream = webdataset.WebDataset(urls, shardshuffle=4).shuffle(1000).map(_unpack)
    stream = stream.batched(BATCH, collation_fn=torch.utils.data.default_collate, partial=False)
    return lambda: webdataset.WebLoader(stream, batch_size=None, num_workers=THREADS)


def _unpack(sample: dict) -> tuple[torch.Tensor, int]:
    pixels = torch.frombuffer(bytearray(sample["raw"]), dtype=torch.uint8)
    return pixels.view(SIZE, SIZE, 3), int(sample["cls"])


def lit_data(folder: Path, crops: list[np.ndarray]) -> Batches:
    """Chunks of 64 MB of raw pixels, shuffled by the streaming dataset."""
    import litdata

    number = len(crops) * RAW_COPIES
    samples = _Samples(crops)
    litdata.optimize(samples, list(range(number)), str(folder), chunk_bytes="64MB", num_workers=1)
    return lambda: litdata.StreamingDataLoader(
        litdata.StreamingDataset(str(folder), shuffle=True, drop_last=True),
        batch_size=BATCH,
        num_workers=THREADS,
    )


class _Samples:
    """What litdata calls in a process of its own."""

    def __init__(self, crops: list[np.ndarray]) -> None:
        self.crops = crops

    def __call__(self, i: int) -> dict[str, object]:
        pixels = torch.from_numpy(self.crops[i % len(self.crops)])
        return {"pixels": pixels, "label": i % len(self.crops)}
