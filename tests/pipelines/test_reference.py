"""References: made in pieces, of datasets and of arrays, and read from the files of others."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics

from jitmodel.config import ClassInfo
from pipelines import shards
from pipelines.features import INCEPTION_SHA256, Extractor, Identity, get_extractor
from pipelines.images import decode_pixels, encode
from pipelines.metrics import Real, Statistics
from pipelines.reference import (
    ArrayImages,
    DatasetImages,
    RealImages,
    Reference,
    ReferenceIdentity,
    check_match,
    extract,
    piece_uri,
    read_piece,
    read_reference,
    real_images,
    write_piece,
    write_reference,
)
from tests.conftest import make_dataset

CPU = torch.device("cpu")


def pooling_extractor() -> Extractor:
    """Four features, and six spatial ones: enough to follow every number."""

    def forward(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = pixels.float()
        pooled = torch.cat([x.mean((2, 3)), x.amax((1, 2, 3))[:, None]], 1)
        return pooled, pooled[:, :2], x[:, 0, :2, :3].flatten(1)

    return Extractor(Identity("pooling", "0", 28, "none", 4, 2, 6), forward)


def identity_of(images: RealImages, extractor: Extractor) -> ReferenceIdentity:
    return ReferenceIdentity(
        extractor=extractor.identity.as_dict(), image_size=images.image_size,
        classes=images.classes, num_images=images.num_images,
        dataset_fingerprint=images.fingerprint, versions={},
    )  # fmt: skip


def make_reference(images: RealImages, path: Path) -> Reference:
    extractor = pooling_extractor()
    pieces = (extract(images, piece, extractor, CPU) for piece in images.pieces)
    write_reference(str(path), identity_of(images, extractor), pieces)
    return read_reference(str(path))


def all_pixels(dataset: Path) -> np.ndarray:
    """[N, H, W, 3], in the dataset's order."""
    rows = [
        row
        for info in shards.read_manifest(str(dataset)).shards
        for row in pq.read_table(dataset / info.file).to_pylist()
    ]
    return np.stack([decode_pixels(row["image"]["bytes"]) for row in rows])


def test_a_reference_holds_the_moments_of_every_image(tiny_dataset: Path, tmp_path: Path):
    images = real_images(str(tiny_dataset))
    pixels = all_pixels(tiny_dataset)

    found = make_reference(images, tmp_path / "r.npz")

    pooled = np.concatenate([pixels.mean((1, 2)), pixels.max((1, 2, 3))[:, None]], 1)
    spatial = pixels[:, :2, :3, 0].reshape(len(pixels), 6).astype(float)
    assert found.count == found.identity.num_images == 211
    np.testing.assert_allclose(found.real.pooled.mean, pooled.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.real.pooled.covariance, np.cov(pooled, rowvar=False), 1e-4)
    assert found.real.spatial is not None
    np.testing.assert_allclose(found.real.spatial.mean, spatial.mean(0))
    np.testing.assert_allclose(
        found.real.spatial.covariance, np.cov(spatial, rowvar=False), atol=1e-9
    )
    np.testing.assert_allclose(found.real.features, pooled, rtol=1e-6)


def test_shards_without_images_change_no_reference(tmp_path: Path):
    for name, sizes in (("full", (20, 5)), ("holey", (0, 20, 0, 0, 5, 0))):
        (tmp_path / name).mkdir()
        make_dataset(tmp_path / name, sizes)
    images = real_images(str(tmp_path / "holey"))
    assert images.pieces == [range(20), range(20, 25)]

    found = make_reference(images, tmp_path / "holey.npz")
    expected = make_reference(real_images(str(tmp_path / "full")), tmp_path / "full.npz")

    assert found.count == expected.count == 25
    assert np.array_equal(found.real.pooled.covariance, expected.real.pooled.covariance)


def test_the_first_images_of_a_dataset_can_be_chosen(tiny_dataset: Path, tmp_path: Path):
    images = real_images(str(tiny_dataset), 100)  # the shards hold 80, 80 and 51
    assert [len(piece) for piece in images.pieces] == [80, 20]

    found = make_reference(images, tmp_path / "r.npz")

    assert found.count == 100
    expected = all_pixels(tiny_dataset)[:100].mean((0, 1, 2))
    np.testing.assert_allclose(found.real.pooled.mean[:3], expected, rtol=1e-6)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_array_of_images_gives_the_reference_of_the_dataset_with_these_images(
    tiny_dataset: Path, tmp_path: Path, save, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ArrayImages, "PIECE", 70)
    save(tmp_path / "batch.npz", arr_0=all_pixels(tiny_dataset), arr_1=np.arange(211))
    array = real_images(str(tmp_path / "batch.npz"))
    assert isinstance(array, ArrayImages)
    assert [len(piece) for piece in array.pieces] == [70, 70, 70, 1]

    found = make_reference(array, tmp_path / "a.npz")
    expected = make_reference(real_images(str(tiny_dataset)), tmp_path / "b.npz")

    np.testing.assert_allclose(found.real.pooled.mean, expected.real.pooled.mean)
    np.testing.assert_allclose(
        found.real.pooled.covariance, expected.real.pooled.covariance, atol=1e-9
    )
    np.testing.assert_array_equal(found.real.features, expected.real.features)
    assert (found.identity.image_size, found.identity.classes) == (28, ())


def test_pieces_are_published_found_again_and_known_by_what_they_are_of(
    tiny_dataset: Path, tmp_path: Path
):
    images, extractor = real_images(str(tiny_dataset)), pooling_extractor()
    identity = identity_of(images, extractor)
    output = str(tmp_path / "r.npz")
    places = [piece_uri(output, identity, piece) for piece in images.pieces]
    for place, piece in reversed(list(zip(places, images.pieces, strict=True))):
        write_piece(place, extract(images, piece, extractor, CPU))

    write_reference(output, identity, (read_piece(place) for place in places))

    whole = tmp_path / "whole.npz"
    make_reference(images, whole)
    assert Path(output).read_bytes() == whole.read_bytes()
    damaged = Path(places[1])
    damaged.write_bytes(damaged.read_bytes()[:-200])
    assert read_piece(places[1]) is None
    assert read_piece(places[0]) is not None
    other = identity.model_copy(update={"dataset_fingerprint": "another"})
    assert not Path(piece_uri(output, other, images.pieces[0])).exists()


def test_a_dataset_of_many_shards_is_cut_into_few_pieces():
    infos = [
        shards.ShardInfo(file=f"{i}", rows=10, bytes=1, sha256="", row_groups=[10])
        for i in range(130)
    ]
    manifest = shards.Manifest(
        fingerprint="", image_size=8, encoding="png", num_rows=1300, num_rejects=0,
        source_sha256="", rows_per_class=[1300], classes=[ClassInfo(name="a")], shards=infos,
        config={}, versions={},
    )  # fmt: skip

    pieces = DatasetImages("nowhere", manifest).pieces

    assert len(pieces) == 44  # of three shards each
    assert [position for piece in pieces for position in piece] == list(range(1300))


def statistics(width: int) -> dict[str, np.ndarray]:
    f = np.random.default_rng(0).normal(size=(200, width))
    return {"mu": f.mean(0), "sigma": np.cov(f, rowvar=False)}


def test_the_public_files_of_the_field_are_read(tmp_path: Path):
    plain, adm, cache = statistics(16), statistics(16), tmp_path / "cache.pt"
    spatial = {f"{name}_s": value for name, value in statistics(6).items()}
    np.savez(tmp_path / "plain.npz", **plain)  # pytorch-fid, the authors of JiT
    images = np.zeros((3, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "adm.npz", arr_0=images, arr_1=np.zeros(3, int), **adm, **spatial)
    features = torch.randn(50, 16)
    torch.save(fid_features_to_statistics(features), cache)  # torch-fidelity's cache

    for name in ("plain.npz", "adm.npz"):
        found = read_reference(str(tmp_path / name))
        np.testing.assert_array_equal(found.real.pooled.mean, plain["mu"])
        np.testing.assert_array_equal(found.real.pooled.covariance, plain["sigma"])
        assert (found.identity, found.count, found.real.features) == (None, None, None)
        assert (found.real.spatial is None) == (name == "plain.npz")
    found = read_reference(str(cache))
    np.testing.assert_allclose(found.real.pooled.mean, features.mean(0), atol=1e-6)
    assert found.real.pooled.covariance.shape == (16, 16)


@pytest.mark.parametrize("kept", [0, 5, 40])
def test_how_many_features_are_kept_can_be_chosen(tiny_dataset: Path, tmp_path: Path, kept: int):
    images, extractor = real_images(str(tiny_dataset)), pooling_extractor()
    identity = identity_of(images, extractor).model_copy(update={"keep_features": kept})
    pieces = (extract(images, piece, extractor, CPU, kept) for piece in images.pieces)

    write_reference(str(tmp_path / "r.npz"), identity, pieces)

    found = read_reference(str(tmp_path / "r.npz"))
    assert found.count == 211
    assert (0 if found.real.features is None else len(found.real.features)) == kept


def test_rounding_does_not_make_a_covariance_of_few_images_a_wrong_one(tmp_path: Path):
    few = np.random.default_rng(0).normal(size=(20, 300)).astype(np.float32)
    np.savez(tmp_path / "r.npz", mu=few.mean(0), sigma=np.cov(few, rowvar=False, dtype=np.float32))

    assert read_reference(str(tmp_path / "r.npz")).real.pooled.covariance.shape == (300, 300)


def test_what_is_no_reference_is_refused_in_one_sentence(tmp_path: Path):
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("code from a reference ran",))

    good = statistics(4)
    files = {
        "images.npz": {"arr_0": np.zeros((3, 8, 8, 3), np.uint8)},
        "half.npz": {"mu": good["mu"]},
        "shape.npz": {"mu": good["mu"], "sigma": np.eye(3)},
        "nan.npz": {"mu": good["mu"] * np.nan, "sigma": good["sigma"]},
        "complex.npz": {"mu": good["mu"], "sigma": good["sigma"] + 0j},
        "words.npz": {"mu": np.array(["a"] * 4), "sigma": good["sigma"]},
        "skew.npz": {"mu": good["mu"], "sigma": good["sigma"] + np.triu(np.ones((4, 4)), 1)},
        "negative.npz": {"mu": good["mu"], "sigma": -good["sigma"]},
        "spatial.npz": {**good, "mu_s": np.zeros(2), "sigma_s": -np.eye(2)},
        "wide.npz": {**good, "features": np.zeros((9, 5))},
        "flat.npz": {**good, "features": np.zeros(9)},
        "lost.npz": {**good, "features": np.full((9, 4), np.inf)},
    }
    for name, arrays in files.items():
        np.savez(tmp_path / name, **arrays)
    torch.save({"mu": Payload()}, tmp_path / "hostile.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"mu": torch.zeros(4), "sigma": torch.eye(4) * 1j}, tmp_path / "complex.pt")
    (tmp_path / "text.npz").write_text("mu")
    np.save(tmp_path / "array.npy", good["sigma"])
    np.savez(tmp_path / "counts.npz", **good, count=np.array([1, 2]))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **good)
    content = bytearray(buffer.getvalue())
    (tmp_path / "cut.npz").write_bytes(content[:-60])
    content[80] ^= 0xFF
    (tmp_path / "flipped.npz").write_bytes(content)

    for name, message in {
        "images.npz": r"holds images and no statistics: run `jit reference .*images.npz --output",
        "half.npz": "has no sigma: a reference holds at least mu and sigma",
        "shape.npz": r"mu has shape \[4\] and sigma \[3, 3\]",
        "nan.npz": "mu has values that are not finite",
        "complex.npz": "sigma is complex128, not real numbers",
        "words.npz": "mu is <U1, not real numbers",
        "skew.npz": "sigma is no covariance: it is not symmetric",
        "negative.npz": "sigma is no covariance: its eigenvalues reach from -",
        "spatial.npz": "sigma_s is no covariance: its eigenvalues reach from -1 to -1",
        "wide.npz": r"features has shape \[9, 5\]; expected \[M, 4\], for mu has 4 numbers",
        "flat.npz": r"features has shape \[9\]; expected \[M, 4\]",
        "lost.npz": "features has values that are not finite",
        "hostile.pt": "is not a reference file: it is damaged, .* or holds objects that would run",
        "complex.pt": "sigma is complex64, not real numbers",
        "array.npy": "is not a reference file: it is damaged, or neither an .npz",
        "counts.npz": r"count has shape \[2\]; expected one number",
        "flipped.npz": "is not a reference file: it is damaged",
        "list.pt": "holds a list, not a dict",
        "text.npz": "is not a reference file",
        "cut.npz": "is not a reference file",
    }.items():
        with pytest.raises(ValueError, match=message) as refusal:
            read_reference(str(tmp_path / name))
        assert "weights_only" not in str(refusal.value)  # no advice to run what is in the file
        assert "allow_pickle" not in str(refusal.value)
    with pytest.raises(IsADirectoryError, match=r"is a folder: name the .npz file"):
        read_reference(str(tmp_path))
    with pytest.raises(ValueError, match=r"half.npz does not hold images: expected an .npz with"):
        real_images(str(tmp_path / "half.npz"))
    with pytest.raises(FileNotFoundError, match="there is no file or folder at"):
        real_images(str(tmp_path / "absent.npz"))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_any_real_type_are_read(tmp_path: Path, kind: torch.dtype):
    mu, sigma = torch.ones(4, dtype=kind, requires_grad=True), torch.eye(4, dtype=kind)
    torch.save({"mu": mu, "sigma": sigma, "count": 7}, tmp_path / "r.pt")

    found = read_reference(str(tmp_path / "r.pt"))

    np.testing.assert_array_equal(found.real.pooled.mean, np.ones(4))
    assert found.count == 7


def damage_shard(dataset: Path, change: Callable[[list[dict]], None]) -> None:
    """Rewrite the second shard of a dataset, and what the manifest says of its bytes."""
    manifest = shards.read_manifest(str(dataset))
    info = manifest.shards[1]
    rows = pq.read_table(dataset / info.file).to_pylist()
    change(rows)
    again = [shards.Row(r["image"]["bytes"], "", r["label"], r["id"]) for r in rows]
    new = shards.write_shard(dataset / info.file, again, manifest.classes, rows_per_group=16)
    manifest.shards[1] = new.model_copy(update={"file": info.file})
    (dataset / shards.MANIFEST).write_text(manifest.model_dump_json())


def cut_image(rows: list[dict]) -> None:
    rows[7]["image"]["bytes"] = rows[7]["image"]["bytes"][:60]


def grow_image(rows: list[dict]) -> None:
    rows[70]["image"]["bytes"] = encode(np.zeros((32, 32, 3), np.uint8), "png")


def flip_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4:40] = bytes(36)
    path.write_bytes(content)


@pytest.mark.parametrize(("damage", "message"), [
    (lambda d, f: damage_shard(d, cut_image), r"00001.*damaged: row 7 cannot be decoded"),
    (lambda d, f: damage_shard(d, grow_image), "damaged: row 70 has 32 x 32 pixels, the man.* 28"),
    (lambda d, f: f.write_bytes(f.read_bytes()[:-9]), r"damaged: it has \d+ bytes, the manifest"),
    (lambda d, f: flip_page(f), "00001.*is damaged"),
    (lambda d, f: f.unlink(), "00001.* is missing"),
])  # fmt: skip
def test_a_damaged_shard_is_named_with_its_row(
    tiny_dataset: Path, tmp_path: Path, damage, message: str
):
    dataset = tmp_path / "d"
    shutil.copytree(tiny_dataset, dataset)
    damage(dataset, dataset / shards.read_manifest(str(dataset)).shards[1].file)

    with pytest.raises((ValueError, FileNotFoundError), match=message) as refusal:
        make_reference(real_images(str(dataset)), tmp_path / "r.npz")

    assert f"jit prepare --verify {dataset}" in str(refusal.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_array_of_images_is_named(tmp_path: Path, save):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 28, 28, 3), dtype=np.uint8)
    path = tmp_path / "batch.npz"
    save(path, arr_0=pixels)
    good = path.read_bytes()
    for name, content in {
        "cut": good[:-3000], "head": good[:20] + bytes(60) + good[80:],
        "body": good[:2000] + bytes(4000) + good[6000:],
    }.items():  # fmt: skip
        path.write_bytes(content)
        if (name, save) == ("body", np.savez):
            continue  # bytes that lie as they are have nothing to tell them by
        with pytest.raises(ValueError, match=r"batch.npz (does not hold images|is damaged in im)"):
            make_reference(real_images(str(path)), tmp_path / "r.npz")


@pytest.mark.parametrize("layer", ["pooled", "spatial"])
def test_features_that_are_no_numbers_are_refused_with_the_image(
    tiny_dataset: Path, tmp_path: Path, layer: str
):
    whole = pooling_extractor()

    def forward(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = whole(pixels)
        if len(pixels) > 3:
            getattr(features, layer)[3, 1] = float("nan")  # pooled ones are the logits, too
        return features

    images = real_images(str(tiny_dataset))
    with pytest.raises(ValueError, match=r"features of image 3 are not finite: .* --weights"):
        extract(images, range(images.num_images), Extractor(whole.identity, forward), CPU)


def test_more_images_than_there_are_are_refused(tiny_dataset: Path):
    with pytest.raises(ValueError, match="--num-images 212 is more than the 211 images of"):
        real_images(str(tiny_dataset), 212)


def test_a_reference_that_does_not_fit_is_refused_and_both_sides_are_named(tmp_path: Path):
    extractor = get_extractor("efflite0").identity
    cats = (ClassInfo(name="cat"), ClassInfo(name="dog"))
    about = ReferenceIdentity(
        extractor=extractor.as_dict(), image_size=256, classes=cats, num_images=9,
        dataset_fingerprint="", versions={},
    )  # fmt: skip
    np.savez(tmp_path / "r.npz", **statistics(1280))
    foreign = read_reference(str(tmp_path / "r.npz"))

    def match(
        identity: ReferenceIdentity | None, size: int = 256, names=cats, of=extractor
    ) -> None:
        real = Reference(identity, "0", 9, foreign.real)
        check_match(real, of, size, len(names), names)

    match(about)
    match(None)  # its 1280 features are all that can be checked
    match(about.model_copy(update={"classes": ()}), names=(*cats, *cats))
    with pytest.raises(ValueError, match="about images of 256 pixels, those to be judged have 512"):
        match(about, size=512)
    with pytest.raises(ValueError, match="has 2 classes, the model has 1"):
        match(about, names=cats[:1])
    with pytest.raises(ValueError, match="class 0 is 'cat' in the reference and 'dog' in the"):
        match(about, names=cats[::-1])
    inception = Identity("inception-12345678", "9", 299, "bilinear-tensorflow1", 2048, 1008, 2023)
    with pytest.raises(ValueError, match="its name is efflite0, this evaluation's is inception-1"):
        match(about, of=inception)
    with pytest.raises(ValueError, match=r"about 1280 features .* inception-12345678 has 2048"):
        match(None, of=inception)
    with pytest.raises(ValueError, match=r"about 6 spatial features .* has 2023"):
        check_match(
            Reference(None, "0", 9, Real(*[Statistics(np.zeros(n), np.eye(n)) for n in (2048, 6)])),
            inception, 256, 2, cats,
        )  # fmt: skip


def test_the_standard_inception_names_every_number_and_no_other_file_does():
    standard = Identity(
        "inception", INCEPTION_SHA256, 299, "bilinear-tensorflow1", 2048, 1008, 2023
    )
    other = Identity("inception-1", "1", 299, "bilinear-tensorflow1", 2048, 1008, 2023)

    assert [standard.metric(n) for n in ("FD", "sFD", "KID")] == ["FID", "sFID", "KID"]
    assert standard.metric("FD", "low") == "FID_low"
    assert [other.metric(n) for n in ("FD", "sFD")] == ["FD-inception-1", "sFD-inception-1"]
