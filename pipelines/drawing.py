"""The plan of an evaluation, and the parts that it is carried out in. No Ray.

The plan fixes index, label, seed and batch of every image, so whoever draws a chunk, its bytes are
the same on the same kind of device and build. A chunk becomes one Parquet file: features, logits,
spatial features where the extractor has them, and a digest of the pixels of each image, and of them
all. A part that is damaged, or of another plan, counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

import jitmodel
from jitmodel.config import Config, FlowConfig, ModelConfig, SamplerConfig
from jitmodel.model import JiT
from jitmodel.pixels import to_pixels
from jitmodel.sampler import guidance_acts, sample, start_noise, times
from pipelines import storage
from pipelines.features import Extractor, check_finite
from pipelines.images import encode, resize
from pipelines.metrics import Array

logger = logging.getLogger(__name__)

SHOWN_CLASSES, SHOWN_EACH = 10, 8
"""Rows and columns of the report's picture; the images in it are stored with their features."""

VECTORS = ("features", "logits", "spatial")
"""Fields of a part that hold a vector for each image."""

MULTIPLIES_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Instructions of a processor that multiply bf16."""

BF16_FLAGS = (*MULTIPLIES_BF16, "avx_ne_convert")
"""Instructions of a processor by which oneDNN chooses how to multiply bf16."""

CPU_VARIABLES = (
    *(f"{library}_{name}" for library in ("ONEDNN", "DNNL")
      for name in ("MAX_CPU_ISA", "CPU_ISA_HINTS", "DEFAULT_FPMATH_MODE")),
    "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS",
)  # fmt: skip
"""Variables by which one and the same processor multiplies in another way."""

MIN_IMAGES = 10
"""Inception score has ten splits, and none may be empty."""


class NotFinite(ValueError):
    """An image that is no image: the model diverged."""


class Plan(Config):
    """All that decides the pixels and features of an evaluation."""

    format_version: Literal[1] = 1
    num_images: int
    batch: int
    chunk_batches: int
    seed: int
    precision: Literal["fp32", "bf16"]
    sampler: SamplerConfig
    model: ModelConfig
    flow: FlowConfig
    weights_sha256: str
    extractor: dict[str, str | int]
    """Identity of the feature extractor."""
    resize: int | None = None
    """Side to which the drawn pixels are resized (Pillow, bicubic) before they are judged."""
    compile: bool = False
    """Whether the network is compiled, which may round differently."""
    device: str
    """Kind of device that the drawing began on: others may round differently."""
    torch: str
    """Version that draws: another one may round differently."""
    code: str
    """Digest of the sources that draw: others may add in another order."""

    def check(self, option: str = "--num-images") -> Self:
        """This plan, if it can be carried out.

        Args:
            option: what its number of images was chosen by.

        Raises:
            ValueError: there are too few images, the classes do not divide them, or they have
                no three colours.
        """
        classes = self.model.num_classes
        if self.num_images < MIN_IMAGES:
            raise ValueError(
                f"{option}: {self.num_images} images are too few for the metrics: draw at least "
                f"{MIN_IMAGES}"
            )
        if self.num_images % classes:
            low = self.num_images // classes * classes
            near = f"{low} or {low + classes}" if low else str(classes)
            raise ValueError(
                f"{option}: {self.num_images} images cannot be spread evenly over {classes} "
                f"classes: choose {near}"
            )
        if self.model.in_channels != 3:
            raise ValueError(
                f"the model draws {self.model.in_channels} channels; extractors see RGB images"
            )
        return self

    @property
    def image_size(self) -> int:
        """Side of the images that are judged, in pixels."""
        return self.resize or self.model.image_size

    @property
    def sha256(self) -> str:
        """Digest of the plan."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json")).encode()).hexdigest()

    @property
    def num_chunks(self) -> int:
        """Parts that the images come in."""
        return -(-self.num_images // (self.batch * self.chunk_batches))

    def rows(self, chunk: int) -> range:
        """Indices of a chunk's images."""
        size = self.batch * self.chunk_batches
        return range(chunk * size, min(self.num_images, (chunk + 1) * size))

    def label(self, index: int) -> int:
        """Class of an image; any first images are spread evenly too."""
        return index % self.model.num_classes

    def is_shown(self, index: int) -> bool:
        """Whether the image is one of the report's picture."""
        step = max(1, self.model.num_classes // SHOWN_CLASSES)
        row, rest = divmod(self.label(index), step)
        return rest == 0 and row < SHOWN_CLASSES and index // self.model.num_classes < SHOWN_EACH

    def network_evaluations(self) -> int:
        """Images that pass the network for one drawn image; a guided time counts twice."""
        total = 0
        config = self.sampler
        low, high = (torch.tensor([end]) for end in config.cfg_interval)
        scale = torch.tensor([config.cfg_scale])
        grid = times(config.steps)
        for i in range(config.steps):
            both = config.solver == "heun" and i + 1 < config.steps
            for t in grid[i : i + 2 if both else i + 1]:
                total += 1 + int(guidance_acts(t[None], scale, low, high))
        return total


def differences(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """Fields in which two plans differ, with both values."""
    lines = []
    for key in sorted(found.keys() | wanted.keys()):
        a, b = found.get(key), wanted.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key} is {a} there, {b} here")
    return lines


@dataclass(frozen=True)
class Part:
    """The drawn images of a chunk, in the plan's order."""

    label: Array
    sha256: list[bytes]
    """Digest of each image's pixels, uint8 [3, H, W], as judged."""
    features: Array
    logits: Array
    spatial: Array
    """Empty rows where the extractor has no such layer."""
    shown: dict[int, bytes]
    """PNGs of the images for the report, by index."""
    device: str
    """What drew them."""


def code_sha256() -> str:
    """Digest of the sources that decide how an image is drawn."""
    digest = hashlib.sha256()
    for file in sorted(Path(jitmodel.__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def device_name(device: torch.device) -> str:
    """What kind of device draws here; other kinds may round differently."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    # torch's own kernels follow its capability; those of oneDNN, which multiplies bf16, the
    # processor; those of MKL, which multiplies fp32, the vendor as well.
    flags = [name for name, has in torch.cpu.get_capabilities().items() if has is True]
    bf16 = sorted(name for name in flags if name in BF16_FLAGS)
    changes = [f"{name}={os.environ[name]}" for name in CPU_VARIABLES if os.environ.get(name)]
    capability = torch.backends.cpu.get_cpu_capability()
    return " ".join([platform.machine(), *cpu_vendor(), capability, *bf16, *changes])


def native_precision() -> Literal["fp32", "bf16"]:
    """bf16 where this machine's CPU multiplies it itself; elsewhere fp32 is much faster."""
    can = torch.cpu.get_capabilities()
    return "bf16" if any(can.get(flag) for flag in MULTIPLIES_BF16) else "fp32"


def warn_of_slow_bf16(precision: str) -> None:
    """Say so before images are drawn on this machine's CPU in bf16 that it cannot multiply."""
    if (precision, native_precision()) == ("bf16", "fp32"):
        logger.warning(
            "this machine's CPU does not multiply bf16 itself: --precision fp32 draws several "
            "times as fast"
        )


def cpu_vendor() -> list[str]:
    """`GenuineIntel` or `AuthenticAMD`; empty where Linux names none, as on ARM."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line.split()[-1] for line in lines if line.startswith("vendor_id")][:1]


def draw(
    model: JiT, extractor: Extractor, plan: Plan, chunk: int, device: torch.device
) -> tuple[Part, Array]:
    """Draw and judge a chunk.

    Returns:
        The part, and the pixels, uint8 [N, 3, H, W].

    Raises:
        NotFinite: an image is not finite.
        ValueError: its features are not.
    """
    found, pixels = [], []
    rows = plan.rows(chunk)
    for first in range(rows.start, rows.stop, plan.batch):
        index = torch.arange(first, min(first + plan.batch, rows.stop), device=device)
        drawn = draw_batch(model, plan, index)
        if plan.resize:
            drawn = resized(drawn, plan.resize)
        features = extractor(drawn)
        check_finite(features, index.tolist())
        found.append([values.cpu().numpy() for values in features])
        pixels.append(drawn.cpu().numpy())
    images = np.concatenate(pixels)
    pooled, logits, spatial = (np.concatenate(values) for values in zip(*found, strict=True))
    part = Part(
        label=np.array([plan.label(i) for i in rows]),
        sha256=[hashlib.sha256(image.tobytes()).digest() for image in images],
        features=pooled,
        logits=logits,
        spatial=spatial,
        shown={
            index: encode(image, "png")
            for index, image in zip(rows, channels_last(images), strict=True)
            if plan.is_shown(index)
        },
        device=device_name(device),
    )
    return part, images


def draw_batch(model: JiT, plan: Plan, index: Tensor) -> Tensor:
    """Pixels of the images of these indices, drawn together, uint8 [B, 3, H, W].

    Raises:
        NotFinite: an image is not finite.
    """
    e = start_noise(plan.flow, plan.model, plan.seed, index)
    y = index % plan.model.num_classes
    with torch.autocast(index.device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
        x = sample(model, y, e, plan.sampler)
    broken = ~x.isfinite().flatten(1).all(1)
    if broken.any():
        raise NotFinite(
            f"image {index[broken][0].item()} of class {y[broken][0].item()} is not finite: "
            f"the model diverged, or --precision {plan.precision} does not suit it"
        )
    return to_pixels(x)


def resized(pixels: Tensor, size: int) -> Tensor:
    """Pixels [B, 3, H, W] of another side; by way of the CPU, so for all devices alike."""
    images = [resize(image, size) for image in channels_last(pixels.cpu().numpy())]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().to(pixels.device)


def channels_last(images: Array) -> Array:
    """Pixels [N, 3, H, W] as [N, H, W, 3]."""
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def part_uri(output: str, chunk: int) -> str:
    """Where the features of a chunk are."""
    return storage.join(output, "features", f"part-{chunk:05d}.parquet")


def time_uri(output: str, chunk: int) -> str:
    """Where it says how long a chunk took: apart, for a part's bytes are the same for any fleet."""
    return storage.join(output, "times", f"part-{chunk:05d}.json")


def write_part(uri: str, part: Part, plan: Plan, chunk: int) -> None:
    """Publish a part; the bytes are a function of the part and of pyarrow's version."""
    rows = plan.rows(chunk)
    columns = {
        "index": pa.array(rows, pa.int64()),
        "label": pa.array(part.label, pa.int64()),
        "sha256": pa.array(part.sha256, pa.binary(32)),
        "shown": pa.array([part.shown.get(i) for i in rows], pa.binary()),
    }
    for name in VECTORS:
        values = getattr(part, name)
        if values.shape[1]:
            columns[name] = _vectors(values)
    metadata = {
        "plan": plan.sha256,
        "device": part.device,
        "pixels_sha256": pixels_sha256(part.sha256),
        "part_sha256": _part_sha256(part),
    }
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table(columns).replace_schema_metadata(metadata),
        sink,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    storage.write_bytes(uri, sink.getvalue().to_pybytes())


def read_part(uri: str, plan: Plan, chunk: int) -> Part | None:
    """A part that was published; None if it is missing, damaged, or of another plan.

    Raises:
        OSError: the store does not answer, or refuses us: that is no reason to draw again.
    """
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        return None
    try:
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        table = file.read()
        metadata = table.schema.metadata or {}
        if metadata.get(b"plan") != plan.sha256.encode() or table["index"].to_pylist() != list(
            plan.rows(chunk)
        ):
            logger.warning("%s belongs to another plan and will be drawn again", uri)
            return None
        shown = zip(plan.rows(chunk), table["shown"].to_pylist(), strict=True)
        part = Part(
            label=table["label"].to_numpy(),
            sha256=table["sha256"].to_pylist(),
            shown={index: image for index, image in shown if image is not None},
            device=metadata[b"device"].decode(),
            **{name: _matrix(table, name) for name in VECTORS},
        )
        # Checksums of pages say nothing of names, types and metadata behind them.
        if metadata[b"part_sha256"].decode() != _part_sha256(part):
            raise ValueError("its content is not what was written")
    except Exception as error:  # damaged bytes raise whatever their reader runs into
        logger.warning("%s is damaged and will be drawn again: %s", uri, error)
        return None
    return part


def _part_sha256(part: Part) -> str:
    """Digest over all that a part holds, however it is stored."""
    vectors = [np.ascontiguousarray(getattr(part, name), np.float32) for name in VECTORS]
    said = {
        "label": part.label.tolist(),
        "sha256": [digest.hex() for digest in part.sha256],
        "shown": {i: hashlib.sha256(image).hexdigest() for i, image in part.shown.items()},
        "device": part.device,
        "vectors": [(v.shape, hashlib.sha256(v.tobytes()).hexdigest()) for v in vectors],
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def pixels_sha256(digests: Iterable[bytes]) -> str:
    """Digest over the digests of images, in the plan's order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _vectors(values: Array) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _matrix(table: pa.Table, name: str) -> Array:
    if name not in table.column_names:
        return np.empty((len(table), 0), np.float32)
    flat = table[name].combine_chunks().flatten().to_numpy()
    return flat.reshape(len(table), -1)
