"""The reference of an evaluation: statistics of real images' features, in one .npz file. No Ray.

It holds mean and covariance of the pooled and of the spatial features (`mu`, `sigma`, `mu_s`,
`sigma_s`, as other tools name them), the count, an evenly spread subset of the features for the
metrics that need images and not moments, and an identity block.

The statistics files of others are read as they are: `mu` and `sigma` in an .npz (pytorch-fid, the
authors of JiT, ADM's VIRTUAL_imagenet*.npz, which has `mu_s` and `sigma_s` too) or in a .pt
(torch-fidelity's cache). They have no identity block, so only their widths can be checked.

The images come from a dataset folder, or from the array `arr_0` of an .npz such as ADM's. They are
cut into pieces, which depend on them alone; each piece is published beside the file when it is
extracted, and the sum is taken in the order of the pieces, so the file is the same for any fleet,
and a run that was killed goes on: Ray Data is given the pieces that are missing.
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
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.lib import format as npy
from torch import Tensor

from jitmodel.config import ClassInfo, Config
from pipelines import storage
from pipelines.features import Extractor, Identity, check_finite, load_plain
from pipelines.images import decode_pixels
from pipelines.metrics import Array, Moments, Real, Statistics
from pipelines.shards import Manifest, ShardInfo, read_manifest

BATCH = 64
"""Images that are decoded and extracted together; batches do not cross shards."""

KEEP_FEATURES = 10_000
"""Most features that are stored as they are, where nobody says another number."""

TOLERANCE = 1e-5
"""How far rounding may take a covariance from symmetry, and its eigenvalues below zero, as a
fraction of the largest number and eigenvalue."""

MAX_PIECES = 64
"""Most pieces: with Inception's features one takes 66 MB until the file is written."""


class ReferenceIdentity(Config):
    """What the numbers of a reference file are about."""

    format_version: Literal[1] = 1
    extractor: dict[str, str | int]
    image_size: int
    classes: tuple[ClassInfo, ...]
    """Empty if unknown."""
    num_images: int
    dataset_fingerprint: str
    keep_features: int = KEEP_FEATURES
    """Most features that are stored as they are."""
    versions: dict[str, str]


@dataclass(frozen=True)
class Reference:
    """A reference file in memory."""

    identity: ReferenceIdentity | None
    """None for a file that another tool wrote."""
    sha256: str
    """Digest of the file."""
    count: int | None
    """Images behind the moments, if known."""
    real: Real


class RealImages(Protocol):
    """Real images of one size, in a fixed order and in pieces that do not depend on a fleet."""

    image_size: int
    classes: tuple[ClassInfo, ...]
    num_images: int
    fingerprint: str
    pieces: list[range]
    """Positions of the images of each piece."""

    def batches(self, piece: range) -> Iterator[Tensor]:
        """The pixels of a piece, uint8 [B, 3, H, W]."""
        ...


class DatasetImages:
    """The first images of a dataset folder; a piece is a run of neighbouring shards."""

    def __init__(self, data: str, manifest: Manifest, num_images: int = 0) -> None:
        self.data = storage.absolute(data)
        self.advice = f"run `jit prepare --verify {data}` to see what is damaged"
        self.image_size = manifest.image_size
        self.classes = tuple(manifest.classes)
        self.fingerprint = manifest.fingerprint
        self.num_images = _how_many(data, num_images, manifest.num_rows)
        self.shards: list[tuple[ShardInfo, range]] = []
        first = 0
        for info in manifest.shards:
            if info.rows and first < self.num_images:
                last = min(first + info.rows, self.num_images)
                self.shards.append((info, range(first, last)))
            first += info.rows
        size = -(-len(self.shards) // MAX_PIECES)
        self.pieces = [
            range(group[0][1].start, group[-1][1].stop)
            for group in (self.shards[i : i + size] for i in range(0, len(self.shards), size))
        ]

    def batches(self, piece: range) -> Iterator[Tensor]:
        for info, positions in self.shards:
            if positions.start in piece:
                yield from self._shard(info, len(positions))

    def _shard(self, info: ShardInfo, rows: int) -> Iterator[Tensor]:
        """Pixels of the first rows of a shard.

        Raises:
            FileNotFoundError, ValueError: the shard is missing or damaged; names it, and the row.
        """
        uri, done = storage.join(self.data, info.file), 0
        try:
            with storage.honest_errors(uri), storage.open_input(uri) as source:
                if source.size() != info.bytes:
                    raise ValueError(
                        f"it has {source.size()} bytes, the manifest says {info.bytes}"
                    )
                for batch in pq.ParquetFile(source).iter_batches(BATCH, columns=["image"]):
                    images = batch.column(0).field("bytes")[: rows - done]
                    if len(images):
                        pixels = [self._pixels(im.as_py(), done + i) for i, im in enumerate(images)]
                        done += len(images)
                        yield torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{uri} is missing: {self.advice}") from error
        except (ValueError, pa.ArrowException) as error:
            raise ValueError(f"{uri} is damaged: {error}; {self.advice}") from error
        except PermissionError:
            raise
        except OSError as error:  # pyarrow has one kind for a bad page and for a bad store
            if error.errno is None and storage.local_path(uri) is not None:
                raise ValueError(f"{uri} is damaged: {error}; {self.advice}") from error
            raise

    def _pixels(self, image: bytes, row: int) -> Array:
        try:
            pixels = decode_pixels(image)
        except Exception as error:  # decoders of hostile bytes raise whatever they run into
            raise ValueError(f"row {row} cannot be decoded ({error})") from error
        size = self.image_size
        if pixels.shape != (size, size, 3):
            height, width, _ = pixels.shape
            raise ValueError(f"row {row} has {width} x {height} pixels, the manifest says {size}")
        return pixels


class ArrayImages:
    """The first images of the array `arr_0` of an .npz file, uint8 [N, H, H, 3]."""

    PIECE = 1024

    def __init__(self, uri: str, num_images: int = 0) -> None:
        self.uri = storage.absolute(uri)
        self.classes: tuple[ClassInfo, ...] = ()
        try:
            with storage.open_input(self.uri) as source, zipfile.ZipFile(source) as archive:
                crc = archive.getinfo("arr_0.npy").CRC
                with archive.open("arr_0.npy") as array:
                    shape, dtype = _npy_header(array)
            if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or dtype != np.uint8:
                raise ValueError(f"arr_0 is {dtype} {list(shape)}")
        except OSError:
            raise
        except Exception as error:  # readers of damaged archives raise whatever they run into
            raise ValueError(
                f"{uri} does not hold images: expected an .npz with an array arr_0, uint8 "
                f"[N, H, H, 3]; {error}"
            ) from error
        self.image_size = shape[1]
        self.num_images = _how_many(uri, num_images, shape[0])
        self.fingerprint = f"arr_0 of shape {list(shape)}, CRC {crc:08x}"
        size = max(self.PIECE, -(-self.num_images // MAX_PIECES))
        self.pieces = [
            range(i, min(i + size, self.num_images)) for i in range(0, self.num_images, size)
        ]

    def batches(self, piece: range) -> Iterator[Tensor]:
        try:
            yield from self._batches(piece)
        except OSError:
            raise
        except Exception as error:  # readers of damaged archives raise whatever they run into
            raise ValueError(
                f"{self.uri} is damaged in images {piece.start} to {piece.stop - 1} ({error}): get "
                "the file again"
            ) from error

    def _batches(self, piece: range) -> Iterator[Tensor]:
        shape = (self.image_size, self.image_size, 3)
        each = int(np.prod(shape))
        with (
            storage.open_input(self.uri) as source,
            zipfile.ZipFile(source) as archive,
            archive.open("arr_0.npy") as array,
        ):
            _npy_header(array)
            array.seek(array.tell() + piece.start * each)
            for first in range(piece.start, piece.stop, BATCH):
                number = min(BATCH, piece.stop - first)
                pixels = np.frombuffer(bytearray(array.read(number * each)), np.uint8)
                batch = torch.from_numpy(pixels.reshape(number, *shape))
                yield batch.permute(0, 3, 1, 2).contiguous()


def _npy_header(array: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array in an .npz, whose values follow in C order."""
    if npy.read_magic(array) != (1, 0):
        raise ValueError("an unknown version of the .npy format")
    shape, fortran, dtype = npy.read_array_header_1_0(array)
    if fortran:
        raise ValueError("an array in Fortran order")
    return shape, dtype


def _how_many(uri: str, wanted: int, there: int) -> int:
    if wanted > there:
        raise ValueError(f"--num-images {wanted} is more than the {there} images of {uri}")
    return wanted or there


def real_images(uri: str, num_images: int = 0) -> RealImages:
    """The real images at a URI: a dataset folder, or an .npz with arr_0.

    Args:
        uri: of either.
        num_images: how many count, from the first one on; 0 means all.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: the .npz has no images, or there are too few.
    """
    images: RealImages
    if uri.endswith(".npz"):
        if not storage.exists(uri):
            raise FileNotFoundError(storage.NOTHING_THERE.format(uri=uri))
        images = ArrayImages(uri, num_images)
    else:
        images = DatasetImages(uri, read_manifest(uri), num_images)
    if images.num_images < 2:
        raise ValueError(f"statistics need at least 2 images; {uri} has {images.num_images}")
    return images


def is_kept(position: Array, num_images: int, most: int = KEEP_FEATURES) -> Array:
    """Which positions of the images belong to the subset of the features."""
    keep = min(most, num_images)
    kept: Array = (position + 1) * keep // num_images > position * keep // num_images
    return kept


class Piece(NamedTuple):
    """What is known of a piece of the images."""

    pooled: Moments
    spatial: Moments
    """Of zero width where the extractor has no spatial features."""
    kept: Array
    """Pooled features of the subset, [M, D]."""


def extract(
    images: RealImages,
    piece: range,
    extractor: Extractor,
    device: torch.device,
    keep_features: int = KEEP_FEATURES,
) -> Piece:
    """Features of a piece of the images, reduced to what a reference holds.

    Raises:
        ValueError: the features of an image are not finite.
    """
    found, seen = [], piece.start
    for pixels in images.batches(piece):
        features = extractor(pixels.to(device))
        check_finite(features, range(seen, seen + len(pixels)))
        seen += len(pixels)
        found.append((features.pooled.cpu().numpy(), features.spatial.cpu().numpy()))
    pooled, spatial = (np.concatenate(values) for values in zip(*found, strict=True))
    assert len(pooled) == len(piece), (len(pooled), piece)
    positions = np.arange(piece.start, piece.stop)
    kept = pooled[is_kept(positions, images.num_images, keep_features)]
    return Piece(Moments.of(pooled), Moments.of(spatial), kept)


def piece_uri(output: str, identity: ReferenceIdentity, piece: range) -> str:
    """Where a piece is until the file is written; the name tells what it is of, too."""
    content = json.dumps(identity.model_dump(mode="json"))
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    return storage.join(pieces_uri(output), f"{key}-{piece.start:09d}-{piece.stop:09d}.npz")


def pieces_uri(output: str) -> str:
    """Folder of the pieces of a file that is not finished."""
    return f"{output}.pieces"


def write_piece(uri: str, piece: Piece) -> None:
    """Publish a piece."""
    arrays: dict[str, Array] = {"kept": piece.kept}
    for name, moments in (("pooled", piece.pooled), ("spatial", piece.spatial)):
        arrays |= {f"{name}_sum": moments.sum, f"{name}_outer": moments.outer}
    buffer = io.BytesIO()
    np.savez(buffer, count=np.int64(piece.pooled.count), **arrays)  # type: ignore[arg-type]
    storage.write_bytes(uri, buffer.getvalue())


def read_piece(uri: str) -> Piece | None:
    """A piece that was published; None if it is missing or damaged."""
    try:
        with np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False) as file:
            pooled, spatial = (
                Moments(int(file["count"]), file[f"{name}_sum"], file[f"{name}_outer"])
                for name in ("pooled", "spatial")
            )
            return Piece(pooled, spatial, file["kept"])
    except (FileNotFoundError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def write_reference(uri: str, identity: ReferenceIdentity, pieces: Iterator[Piece]) -> None:
    """Publish a reference file; its bytes are a function of the arguments.

    Args:
        uri: of the file.
        identity: what it is about.
        pieces: all of them, in order.
    """
    first = next(pieces)
    pooled, spatial, kept = first.pooled, first.spatial, [first.kept]
    for piece in pieces:
        pooled, spatial = pooled + piece.pooled, spatial + piece.spatial
        kept.append(piece.kept)
    assert pooled.count == identity.num_images, (pooled.count, identity.num_images)
    arrays: dict[str, Array] = {"mu": pooled.mean, "sigma": pooled.covariance}
    if len(spatial.sum):
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    if identity.keep_features:
        arrays["features"] = np.concatenate(kept)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        count=np.int64(pooled.count),
        identity=np.array(json.dumps(identity.model_dump(mode="json"))),
        **arrays,  # type: ignore[arg-type]
    )
    storage.write_bytes(uri, buffer.getvalue())


def read_reference(uri: str) -> Reference:
    """Read a reference file, of ours or of others.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged, or no file of statistics.
    """
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no reference at {uri}: make one with `jit reference DATASET --output {uri}`"
        ) from error
    except IsADirectoryError as error:
        raise IsADirectoryError(
            f"{uri} is a folder: name the .npz file of its statistics, which `jit reference {uri} "
            "--output FILE.npz` makes of a dataset"
        ) from error
    try:
        file = _arrays(content)
        if "mu" not in file and "arr_0" in file:
            raise ValueError(
                f"it holds images and no statistics: run `jit reference {uri} --output FILE.npz` "
                "and name that file"
            )
        identity = None
        if "identity" in file:
            identity = ReferenceIdentity.model_validate_json(str(file["identity"]))
        spatial = None
        if "mu_s" in file:
            spatial = _statistics(file, "mu_s", "sigma_s")
        pooled = _statistics(file, "mu", "sigma")
        return Reference(
            identity=identity,
            sha256=hashlib.sha256(content).hexdigest(),
            count=_count(file),
            real=Real(pooled, spatial, _features(file, len(pooled.mean))),
        )
    except KeyError as error:
        raise ValueError(
            f"{uri} has no {error.args[0]}: a reference holds at least mu and sigma, the mean and "
            "covariance of features"
        ) from error
    except ValueError as error:
        raise ValueError(f"{uri} is not a reference file: {error}") from error


NAMES = ("mu", "sigma", "mu_s", "sigma_s", "count", "features", "identity")


def _arrays(content: bytes) -> dict[str, Array]:
    """The arrays of a file that a reference is made of; images are not read."""
    if b"/data.pkl" in content[:4096]:  # a zip file of torch.save
        return _torch_arrays(content)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            found = {name: file[name] for name in NAMES if name in file}
            if "arr_0" in file and "mu" not in file:
                found["arr_0"] = np.empty(0)
            return found
    except Exception as error:  # readers of damaged archives raise whatever they run into
        raise ValueError(
            "it is damaged, or neither an .npz of numbers nor a .pt of torch.save"
        ) from error


def _torch_arrays(content: bytes) -> dict[str, Array]:
    """The arrays of a file of torch.save, which may name NumPy's arrays and nothing that runs."""
    known = [np._core.multiarray._reconstruct, np.ndarray, np.dtype]  # type: ignore[attr-defined]
    known += [type(np.dtype(kind)) for kind in ("f4", "f8")]
    with torch.serialization.safe_globals(known):
        found = load_plain(content)
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not a dict with mu and sigma")
    return {
        name: _float64(value) if isinstance(value, Tensor) else np.asarray(value)
        for name, value in found.items()
        if name in NAMES
    }


def _float64(tensor: Tensor) -> Array:
    """A tensor of any real type, for NumPy does not know all of torch's."""
    plain = tensor.detach().to_dense()
    array: Array = (plain if plain.is_complex() else plain.double()).numpy()
    return array


def _count(file: dict[str, Array]) -> int | None:
    if "count" not in file:
        return None
    count = _numbers(file, "count")
    if count.size != 1:
        raise ValueError(f"count has shape {list(count.shape)}; expected one number")
    return int(count.item())


def _statistics(file: dict[str, Array], mean: str, covariance: str) -> Statistics:
    m, c = _numbers(file, mean).astype(np.float64), _numbers(file, covariance).astype(np.float64)
    if m.ndim != 1 or c.shape != (len(m), len(m)):
        raise ValueError(f"{mean} has shape {list(m.shape)} and {covariance} {list(c.shape)}")
    if np.abs(c - c.T).max() > TOLERANCE * np.abs(c).max():
        raise ValueError(f"{covariance} is no covariance: it is not symmetric")
    values = np.linalg.eigvalsh(c)
    if values[0] < -TOLERANCE * values[-1]:
        raise ValueError(
            f"{covariance} is no covariance: its eigenvalues reach from {values[0]:.4g} to "
            f"{values[-1]:.4g}, and none may be below zero"
        )
    return Statistics(m, c)


def _features(file: dict[str, Array], width: int) -> Array | None:
    if "features" not in file:
        return None
    features = _numbers(file, "features")
    if features.ndim != 2 or features.shape[1] != width:
        raise ValueError(
            f"features has shape {list(features.shape)}; expected [M, {width}], for mu has {width} "
            "numbers"
        )
    return features


def _numbers(file: dict[str, Array], name: str) -> Array:
    """An array of real numbers, all of them finite."""
    array = file[name]
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} is {array.dtype}, not real numbers")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has values that are not finite")
    return array


def check_match(
    reference: Reference,
    extractor: Identity,
    image_size: int,
    num_classes: int,
    classes: tuple[ClassInfo, ...],
) -> None:
    """Refuse to compare what cannot be compared.

    Args:
        reference: the real side.
        extractor: of the drawn side.
        image_size: of the drawn images, as they are judged.
        num_classes, classes: of the drawn images; the names may be unknown.

    Raises:
        ValueError: extractor, image size or classes differ; both are named.
    """
    about = reference.identity
    if about:
        for field, ours in extractor.as_dict().items():
            if about.extractor.get(field) != ours:
                raise ValueError(
                    f"the reference was made with another extractor: its {field} is "
                    f"{about.extractor.get(field)}, this evaluation's is {ours}"
                )
    spatial = reference.real.spatial if extractor.num_spatial else None
    for kind, statistics, width in (
        ("", reference.real.pooled, extractor.num_features),
        ("spatial ", spatial, extractor.num_spatial),
    ):
        if statistics and len(statistics.mean) != width:
            raise ValueError(
                f"the reference is about {len(statistics.mean)} {kind}features (the standard "
                f"Inception has 2048, and 2023 spatial ones), but extractor {extractor.name} has "
                f"{width}: name the extractor that it was made with"
            )
    if about is None:
        return
    if about.image_size != image_size:
        raise ValueError(
            f"the reference is about images of {about.image_size} pixels, those to be judged have "
            f"{image_size}: name another one, or --resize the drawn images to its size"
        )
    if not about.classes:
        return
    if len(about.classes) != num_classes:
        raise ValueError(
            f"the reference has {len(about.classes)} classes, the model has {num_classes}"
        )
    for label, (real, drawn) in enumerate(zip(about.classes, classes, strict=False)):
        if real != drawn:
            raise ValueError(
                f"class {label} is {real.name!r} in the reference and {drawn.name!r} in the model"
            )
