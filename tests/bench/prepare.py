"""Preparation on real photographs: encodings, speed beside a bare loop, memory, index, requests.

Needs the photographs of the tests. The bare loop is one process that decodes, crops and encodes;
what Ray, Parquet, digests and publishing cost beyond it is the efficiency. 5 GB of disk are taken
for a while: ImageNet's tar in its real size, all holes but the headers.
`PARTS="efficiency index" make bench WHAT=prepare` chooses some.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from parts import chosen
from PIL import Image

from pipelines import images, sources, storage
from pipelines.index import Index

PHOTOGRAPHS = Path(__file__).resolve().parents[3] / "shared" / "imagenet-sample"
WORKERS = 2
ROUNDS = 3
PASSES = 5  # over the photographs, for a bare loop
COPIES = {256: 70, 512: 60}  # of the photographs, for the steady state: 14 and 12 shards
REFERENCES = (1_000, 10_000, 100_000, 1_000_000)
LISTED = (100_000, 400_000)  # references, without Ray
PROJECTED = 10**7
REQUESTED = 2_000  # members of a tar on S3
INNER_TARS, MEMBERS, MEMBER_BYTES = 1_000, 1_281, 110_000

try:
    import qoi
except ImportError:
    qoi = None


def run() -> dict:
    if not PHOTOGRAPHS.is_dir():
        sys.exit(f"needs the real photographs at {PHOTOGRAPHS}")
    parts: dict[str, Callable[[], dict]] = {
        "encodings": encodings, "efficiency": efficiency, "memory": memory, "lists": lists,
        "index": index, "requests": requests,
    }  # fmt: skip
    return {"tables": [part() for part in chosen(parts)]}


def photographs() -> list[bytes]:
    return [file.read_bytes() for file in sorted(PHOTOGRAPHS.glob("*.JPEG"))]


# How an image is stored.


def _pillow(kind: str, **options: object) -> Callable[[np.ndarray], bytes]:
    def encode(pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind, **options)
        return buffer.getvalue()

    return encode


def encodings() -> dict:
    """Bytes, encodings and decodings a second on one core, of the cropped photographs."""
    decode = images.decode_pixels
    codecs: dict[str, tuple[Callable, Callable]] = {
        "webp (as stored)": (lambda p: images.encode(p, "webp"), decode),
        "webp, effort 20": (_pillow("WEBP", lossless=True, quality=20, method=1), decode),
        "png (as stored)": (lambda p: images.encode(p, "png"), decode),
        "png, level 6": (_pillow("PNG", compress_level=6), decode),
        "raw": (lambda p: images.encode(p, "raw"), decode),
    }
    if qoi:
        codecs["qoi"] = (qoi.encode, qoi.decode)
    rows = []
    for size in (256, 512):
        crops = [np.asarray(images.adm_crop(images.decode(p), size)) for p in photographs()[::2]]
        for name, (encode, decoder) in codecs.items():
            encoding, decoding = [], []
            for _ in range(ROUNDS):
                started = time.process_time()
                stored = [encode(crop) for crop in crops]
                encoded = time.process_time()
                back = [decoder(image) for image in stored]
                decoding.append(len(crops) / (time.process_time() - encoded))
                encoding.append(len(crops) / (encoded - started))
            assert all(np.array_equal(a, b) for a, b in zip(crops, back, strict=True))
            rows.append(
                {
                    "encoding": name,
                    "pixels": size,
                    "kB an image": round(sum(map(len, stored)) / len(crops) / 1e3, 1),
                    "encoded/s": round(statistics.median(encoding)),
                    "decoded/s": round(statistics.median(decoding)),
                }
            )
    return {
        "title": f"Lossless encodings of {len(crops)} ImageNet photographs, one core, "
        f"median of {ROUNDS} rounds",
        "rows": rows,
    }


# Two workers against a bare loop.


def bare_loop(size: int, encoding: str) -> float:
    """Images a second of one process that does nothing else."""
    loaded = PASSES * sorted(PHOTOGRAPHS.glob("*.JPEG"))
    started = time.perf_counter()
    for file in loaded:
        crop = images.adm_crop(images.decode(file.read_bytes()), size)
        images.encode(np.asarray(crop), encoding)
    return len(loaded) / (time.perf_counter() - started)


def bare_loops(count: int, size: int, encoding: str) -> float:
    """Images a second of so many bare loops side by side."""
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(bare_loop, [8] * count, ["raw"] * count))  # all that is imported late
        return sum(pool.map(bare_loop, [size] * count, [encoding] * count))


DRIVER = """
import json, sys, time
from pipelines import prepare
from pipelines.config import PrepareConfig
started, noted = time.perf_counter(), []
class Progress(prepare.Progress):
    def add(self, entry):
        super().add(entry)
        noted.append((time.perf_counter() - started, self.images))
prepare.Progress = Progress
prepare.run(PrepareConfig.model_validate_json(sys.argv[1]))
status = open("/proc/self/status").read()  # getrusage's peak is inherited from the parent
peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
print(json.dumps({"noted": noted, "total": time.perf_counter() - started, "driver MB": peak}))
"""


def prepared(source: Path, output: Path, **fields: object) -> dict:
    """Prepare in a process of its own; what it took, and the most memory of a worker."""
    import json

    config = {"source": str(source), "output": str(output), "workers": WORKERS} | fields
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps(config)], stdout=subprocess.PIPE, text=True
    )
    peak = [0.0]
    watching = threading.Thread(target=_watch, args=(process, peak), daemon=True)
    watching.start()
    text, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(text.splitlines()[-1]) | {"worker MB": peak[0]}


def _watch(process: subprocess.Popen, peak: list[float]) -> None:
    while process.poll() is None:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if "ray::" not in (folder / "cmdline").read_text()[:8]:
                    continue
                if f"/proc/{process.pid}" not in _ancestors(folder):
                    continue
                status = (folder / "status").read_text()
            except OSError:
                continue
            high = next(line for line in status.splitlines() if line.startswith("VmHWM"))
            peak[0] = max(peak[0], int(high.split()[1]) / 1024)
        time.sleep(1)


def _ancestors(folder: Path) -> Iterator[str]:
    while folder.name not in ("0", "1"):
        folder = Path("/proc") / (folder / "stat").read_text().rpartition(")")[2].split()[1]
        yield str(folder)


def tree_of(folder: Path, copies: int) -> Path:
    """The photographs, several times, by links."""
    for copy in range(copies):
        for file in PHOTOGRAPHS.glob("*.JPEG"):
            place = folder / file.name.partition("_")[0] / f"{copy}.JPEG"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(file)
    return folder


def efficiency() -> dict:
    """The steady state of two workers."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trees = {size: tree_of(folder / f"tree{size}", copies) for size, copies in COPIES.items()}
        for size, encoding in ((256, "webp"), (512, "webp"), (256, "png")):
            bare = [[bare_loops(count, size, encoding) for count in (1, WORKERS)]]
            rounds = []
            for _ in range(ROUNDS):
                rounds.append(
                    prepared(trees[size], folder / "out", image_size=size, encoding=encoding)
                )
                shutil.rmtree(folder / "out")
                bare.append([bare_loops(count, size, encoding) for count in (1, WORKERS)])
            steady = [_steady(each["noted"]) for each in rounds]
            times = [2 * speed / (bare[i][0] + bare[i + 1][0]) for i, speed in enumerate(steady)]
            starts = [
                each["total"] - each["noted"][-1][1] / speed
                for each, speed in zip(rounds, steady, strict=True)
            ]
            rows.append(
                {
                    "what": f"{size} px, {encoding}",
                    "bare loop, images/s": round(statistics.median(one for one, _ in bare)),
                    "two workers, images/s": round(statistics.median(steady)),
                    "times": round(statistics.median(times), 2),
                    "lowest": round(min(times), 2),
                    "highest": round(max(times), 2),
                    "two bare loops, times": round(
                        statistics.median(two / one for one, two in bare), 2
                    ),
                    "start-up and end, s": round(statistics.median(starts), 1),
                    "worker MB": round(max(each["worker MB"] for each in rounds)),
                }
            )
    return {
        "title": "Preparing photographs in shards of 1,024, steady state, beside bare loops before "
        f"and after; median of {ROUNDS} rounds",
        "rows": rows,
    }


def _steady(noted: list[tuple[float, int]]) -> float:
    """Images a second between the fourth shard and about the last but two."""
    first, last = 3, len(noted) - 3
    last -= (last - first) % WORKERS  # they end their shards side by side
    (t0, n0), (t1, n1) = noted[first], noted[last]
    return (n1 - n0) / (t1 - t0)


# Memory.


def memory() -> dict:
    """The driver's peak as references grow; a worker's with full shards and with large images."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny = io.BytesIO()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tiny, "PNG")
        (folder / "files").mkdir()
        for i in range(1000):
            (folder / "files" / f"{i}.png").write_bytes(tiny.getvalue())
        for count in REFERENCES:
            tree = folder / f"tree{count}"
            tree.mkdir()
            for i in range(count // 1000):
                (tree / f"{i:05d}").symlink_to(folder / "files")
            got = prepared(tree, folder / f"out{count}", image_size=8, encoding="raw")
            rows.append(_memory_row(f"{count:,} references, tiny images", got))
        # Below, what a start takes differs by more than what references take.
        per_reference = (rows[-1]["driver MB"] - rows[-2]["driver MB"]) / (
            REFERENCES[-1] - REFERENCES[-2]
        )
        projected = rows[-1]["driver MB"] + per_reference * (PROJECTED - REFERENCES[-1])
        rows.append({"what": f"{PROJECTED:,} references, projected", "driver MB": round(projected),
                     "worker MB": "", "seconds": ""})  # fmt: skip
        tree = tree_of(folder / "full", 11)
        got = prepared(tree, folder / "o256", image_size=256)
        rows.append(_memory_row("256 px, 1024 photographs a shard", got))
        got = prepared(tree, folder / "o512", image_size=512, encoding="raw")
        rows.append(_memory_row("512 px, raw, 1024 photographs a shard", got))
        got = prepared(tree, folder / "o1024", image_size=1024, encoding="raw")
        rows.append(_memory_row("1024 px, raw, 1024 photographs a shard", got))
        got = prepared(huge_images(folder / "huge"), folder / "ohuge", image_size=512)
        rows.append(_memory_row("the largest images that are decoded, 11 kinds", got))
        got = prepared(one_row_group(folder / "group"), folder / "ogroup", image_size=512)
        rows.append(_memory_row("Parquet, one row group of 1.5 GB", got))
        got = prepared(one_page(folder / "page"), folder / "opage", image_size=512)
        rows.append(_memory_row("Parquet, the largest page that is read (a dictionary)", got))
        got = prepared(long_labels(folder / "labels"), folder / "olabels", image_size=256)
        rows.append(_memory_row("WebDataset, the longest labels that are read, 24 tars", got))
    return {"title": "Most memory (resident, MB)", "rows": rows}


LISTER = """
import sys, tempfile
from pathlib import Path
from pipelines import job, sources
from pipelines.config import PrepareConfig
config = PrepareConfig(source=sys.argv[1], classes=sys.argv[2])
source = sources.open_source(config.source, config.classes)
with tempfile.TemporaryDirectory() as folder:
    index = Path(folder) / "index"
    sources.write_index(source, index)
    assert job.describe(config, source, index).num_images == int(sys.argv[3])
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def lists() -> dict:
    """The peak of a process that makes a driver's list, and a straight line through two of them."""
    layouts: dict[str, Callable[[Path, int], tuple[Path, str]]] = {
        "a folder for each 1,000": _folders,
        "all in one folder": _one_folder,
        "all in one tar": _flat_tar,
    }
    rows = []
    for what, make in layouts.items():
        peaks = []
        for count in LISTED:
            with tempfile.TemporaryDirectory() as name:
                source, classes = make(Path(name), count)
                command = [sys.executable, "-c", LISTER, str(source), classes, str(count)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            peaks.append(int(done.stdout) / 1024)
        slope = (peaks[1] - peaks[0]) / (LISTED[1] - LISTED[0])
        row = {"what": what}
        row |= {f"{n:,}": round(peak) for n, peak in zip(LISTED, peaks, strict=True)}
        rows.append(row | {f"{PROJECTED:,}": round(peaks[1] + slope * (PROJECTED - LISTED[1]))})
    return {"title": "The driver's list alone, without Ray (resident, MB); the last column is "
            "projected", "rows": rows}  # fmt: skip


def _folders(folder: Path, count: int) -> tuple[Path, str]:
    """One folder of 1,000 empty files, under many names."""
    _one_folder(folder / "files", 1_000)
    (folder / "tree").mkdir()
    for i in range(count // 1_000):
        (folder / "tree" / f"{i:05d}").symlink_to(folder / "files" / "a")
    return folder / "tree", ""


def _one_folder(folder: Path, count: int) -> tuple[Path, str]:
    (folder / "a").mkdir(parents=True)
    for i in range(count):
        os.mknod(folder / "a" / f"{i:08d}.JPEG")
    return folder, ""


def _flat_tar(folder: Path, count: int) -> tuple[Path, str]:
    with (folder / "flat.tar").open("wb") as file:
        for i in range(count):
            file.write(tarfile.TarInfo(f"{i:08d}.JPEG").tobuf(tarfile.GNU_FORMAT))
        file.write(bytes(2 * tarfile.BLOCKSIZE))
    return folder / "flat.tar", "one"


HUGE: dict[str, tuple[str, float, dict]] = {
    "rgb.jpg": ("RGB", 89.4, {"quality": 80}),
    "grey.jpg": ("L", 89.4, {"quality": 80}),
    "cmyk.jpg": ("CMYK", 79.9, {"quality": 80}),
    "progressive.jpg": ("RGB", 63.9, {"progressive": True, "subsampling": 0}),
    "progressive-cmyk.jpg": ("CMYK", 53.2, {"progressive": True}),
    "rgb.png": ("RGB", 89.4, {"compress_level": 1}),
    "rgba.png": ("RGBA", 79.9, {"compress_level": 1}),
    "x.bmp": ("RGB", 22.3, {}),
    "x.gif": ("P", 89.4, {}),
    "lossy.webp": ("RGB", 37.6, {"quality": 50, "method": 0}),
    "lossless.webp": ("RGB", 37.6, {"lossless": True, "quality": 0, "method": 0}),
}
"""The most million pixels that are decoded of each kind of file, and how it is saved."""


def huge_images(folder: Path) -> Path:
    """One class of the largest images that are decoded, smooth enough to be files below 64 MiB."""
    (folder / "a").mkdir(parents=True)
    noise = Image.effect_noise((500, 500), 40).convert("RGB")
    for name, (mode, million, options) in HUGE.items():
        side = int((million * 1e6) ** 0.5)
        large = noise.resize((side, side))
        large = large.quantize(64) if mode == "P" else large.convert(mode)
        large.save(folder / "a" / name, **options)
    return folder


def one_row_group(folder: Path) -> Path:
    """10,000 photographs in one row group of Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    some = photographs()
    rows = [some[i % len(some)] for i in range(10_000)]
    folder.mkdir()
    schema = pa.schema([("image", pa.large_binary()), ("label", pa.int64())])
    table = pa.table([rows, [0] * len(rows)], schema=schema)
    pq.write_table(table, folder / "a.parquet", compression="none", use_dictionary=False,
                   row_group_size=len(rows))  # fmt: skip
    return folder


def one_page(folder: Path) -> Path:
    """Photographs of 2.5 MB as pyarrow writes them if nothing is said: all in one page."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    photograph, random = photographs()[0], np.random.default_rng(0)
    size = 2_500_000
    rows = [photograph + random.bytes(size - len(photograph))
            for _ in range(sources.PAGE_BYTES // (size + 4))]  # fmt: skip
    folder.mkdir()
    pq.write_table(pa.table({"image": rows, "label": [0] * len(rows)}), folder / "a.parquet")
    return folder


def long_labels(folder: Path) -> Path:
    """Tars whose photographs have the longest .json that is read, of many small objects."""
    some = photographs()
    folder.mkdir()
    filler = "[]," * ((sources.LABEL_BYTES - 40) // 3)
    label = f'{{"label": 0, "x": [{filler}0]}}'.encode()
    for number in range(24):
        with tarfile.open(folder / f"{number:02d}.tar", "w") as tar:
            for i in range(10):
                for ending, content in (("jpg", some[i % len(some)]), ("json", label)):
                    member = tarfile.TarInfo(f"{number:02d}-{i:04d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def _memory_row(what: str, got: dict) -> dict:
    return {
        "what": what,
        "driver MB": round(got["driver MB"]),
        "worker MB": round(got["worker MB"]),
        "seconds": round(got["total"], 1),
    }


# The index of ImageNet's tar.


def sparse_tar(path: Path, inner: int, members: int, size: int) -> None:
    """ImageNet's layout with all its headers; the images are holes."""

    def header(name: str, length: int) -> bytes:
        info = tarfile.TarInfo(name)
        info.size = length
        return info.tobuf(tarfile.GNU_FORMAT)

    padded = (size + 511) // 512 * 512
    one = members * (512 + padded) + 1024
    with path.open("wb") as file:
        place = 0
        for number in range(inner):
            wnid = f"n{number:08d}"
            file.seek(place)
            file.write(header(f"{wnid}.tar", one))
            for i in range(members):
                file.seek(place + 512 + i * (512 + padded))
                file.write(header(f"{wnid}_{i}.JPEG", size))
            place += 512 + (one + 511) // 512 * 512
        file.truncate(place + 1024)


def index() -> dict:
    """The list of 1.28 million members, by a pool of two processes and by one."""
    from concurrent.futures import ProcessPoolExecutor

    rows = []
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "train.tar"
        sparse_tar(path, INNER_TARS, MEMBERS, MEMBER_BYTES)
        for workers in (1, WORKERS):
            started, before = time.perf_counter(), _cpu_seconds()
            source = sources.open_source(str(path))
            with ProcessPoolExecutor(workers) as pool:
                listed = pool.map(_list, [source] * INNER_TARS, source.parts, chunksize=10)
                count = sources.write_index(source, Path(name) / "index", listed)
            row = {
                "what": f"{workers} processes",
                "members": count,
                "GB (apparent)": round(path.stat().st_size / 1e9),
                "seconds": round(time.perf_counter() - started, 1),
                "core-seconds": round(_cpu_seconds() - before, 1),
                "index MB": round((Path(name) / "index").stat().st_size / 1e6),
            }
            rows.append(row)
            assert len(Index(Path(name) / "index")) == INNER_TARS * MEMBERS
    return {"title": "Index of a tar of ImageNet's real size, local disk", "rows": rows}


def requests() -> dict:
    """What a request to S3 costs this side: headers of a tar, and its images."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from seaweed import serve_s3

    with tempfile.TemporaryDirectory() as name, serve_s3(Path(name)) as environment:
        os.environ |= environment
        with (Path(name) / "flat.tar").open("wb") as file:
            for i in range(REQUESTED):
                info = tarfile.TarInfo(f"{i:08d}.JPEG")
                info.size = MEMBER_BYTES
                file.write(info.tobuf(tarfile.GNU_FORMAT) + bytes(-(-info.size // 512) * 512))
            file.write(bytes(2 * tarfile.BLOCKSIZE))
        storage.write_bytes("s3://bucket/flat.tar", (Path(name) / "flat.tar").read_bytes())
        source = sources.open_source("s3://bucket/flat.tar", "one")
        rows = []
        for what, call in (
            ("headers of a tar", lambda: sources.write_index(source, Path(name) / "index")),
            ("images of a tar", lambda: _read_all(source.root, Index(Path(name) / "index"))),
        ):
            started, before = time.perf_counter(), time.process_time()
            assert call() == REQUESTED
            used, took = time.process_time() - before, time.perf_counter() - started
            rows.append({"what": what, "requests": REQUESTED, "ms of a core, each":
                         round(1e3 * used / REQUESTED, 2), "seconds": round(took, 1)})  # fmt: skip
    return {"title": "Requests to SeaweedFS beside us: what they cost the client", "rows": rows}


def _read_all(root: str, index: Index) -> int:
    read = sources.read_images(root, index.refs(range(len(index))))
    return sum(isinstance(image, bytes) for _, image in read)


def _list(source: sources.Source, part: sources.Part) -> list:
    return list(sources.list_part(source, part))


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)
