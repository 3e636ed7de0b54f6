"""Whatever lies in a source, the job ends: it is seen as the paper's loader does, or rejected."""

from __future__ import annotations

import gzip
import io
import os
import socket
import tarfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from pipelines import images, job, lease, prepare, shards, sources
from pipelines.config import PrepareConfig
from pipelines.index import Index

SIZE = 32
NOT_ALLOWED = ("tiff.jpg", "icon.png", "jp2.jpg")
"""Pillow could decode them; they are outside our list of formats."""


def paper_pixels(image: bytes) -> np.ndarray[Any, Any]:
    """The authors' loader and crop: torchvision's pil_loader, then ADM's center_crop_arr."""
    pil = Image.open(io.BytesIO(image)).convert("RGB")
    while min(*pil.size) >= 2 * SIZE:
        pil = pil.resize(tuple(x // 2 for x in pil.size), resample=Image.BOX)
    scale = SIZE / min(*pil.size)
    pil = pil.resize(tuple(round(x * scale) for x in pil.size), resample=Image.BICUBIC)
    arr = np.array(pil)
    y, x = (arr.shape[0] - SIZE) // 2, (arr.shape[1] - SIZE) // 2
    return arr[y : y + SIZE, x : x + SIZE]


def save(img: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    img.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 50, height: int = 40, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png_of(width: int, height: int, depth: int = 8) -> bytes:
    """A PNG that says how large it is and holds next to nothing."""
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, 0, 0, 0, 0])
    body = png_chunk(b"IHDR", head) + png_chunk(b"IDAT", zlib.compress(b"0"))
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG whose comment is 100 MB of zeros, compressed."""
    text = zlib.compress(bytes(100_000_000), 9)
    plain = save(noise(), "PNG")
    return plain[:33] + png_chunk(b"zTXt", b"Comment\0\0" + text) + plain[33:]


def files() -> dict[str, tuple[bytes, str | None]]:
    """File name -> content, and why it is rejected (None: it is kept)."""
    img = noise()
    jpeg, png, gif = save(img, "JPEG"), save(img, "PNG"), save(img, "GIF")
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = img.quantize(16)
    frames = [noise(seed=i) for i in (1, 2)]
    deep = Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50) * 30)
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 1000)
    no_image = "not an image of JPEG, PNG, WEBP, GIF, BMP, or a broken header"
    bomb = "20000 x 5000 is more than 89478485 pixels"
    return {
        "plain.JPEG": (jpeg, None),
        "UPPER.JPG": (jpeg, None),
        "double.jpeg": (jpeg, None),
        ".hidden.png": (png, None),
        "empty.png": (b"", "empty file"),
        "text.JPEG": (b"this is no image", no_image),
        "page.jpg": (b"<!DOCTYPE html><html>404 Not Found</html>", no_image),
        "._mac.JPEG": (b"\0\5\26\7\0\2\0\0Mac OS X        \0\2\0\0\0\t", no_image),
        "zipped.jpg": (gzip.compress(jpeg, mtime=0), no_image),
        "zeros.jpg": (bytes(5000), no_image),
        "half.JPEG": (jpeg[: len(jpeg) // 2], "OSError: image file is truncated"),
        "head.JPEG": (jpeg[:12], "OSError: Truncated File Read"),
        "no-end.JPEG": (jpeg[:-2], "OSError: image file is truncated"),
        "more.JPEG": (jpeg + b"and more", None),
        "two.JPEG": (jpeg + jpeg, None),
        "late.JPEG": (b"xx" + jpeg, no_image),
        "png-inside.JPEG": (png, None),
        "gif-inside.JPEG": (gif, None),
        "bmp-inside.JPEG": (save(img, "BMP"), None),
        "webp-inside.JPEG": (save(img, "WEBP", lossless=True), None),
        "jpeg-inside.png": (jpeg, None),
        "cmyk.JPEG": (save(img.convert("CMYK"), "JPEG"), None),
        "grey.JPEG": (save(img.convert("L"), "JPEG"), None),
        "progressive.JPEG": (save(img, "JPEG", progressive=True), None),
        "sampled.JPEG": (save(img, "JPEG", subsampling=2, quality=1), None),
        "rotated.JPEG": (save(img, "JPEG", exif=exif), None),
        "exif.JPEG": (save(img, "JPEG", exif=b"Exif\0\0" + b"\xff" * 60), None),
        "exif-long.JPEG": (save(img, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f"), None),
        "profile.JPEG": (save(img, "JPEG", icc_profile=b"no profile at all"), None),
        "mpo.JPEG": (save(img, "MPO", save_all=True, append_images=frames), None),
        "grey-alpha.png": (save(img.convert("LA"), "PNG"), None),
        "rgba.png": (save(img.convert("RGBA"), "PNG"), None),
        "palette.png": (save(palette, "PNG"), None),
        "palette-alpha.png": (save(palette, "PNG", transparency=bytes(range(0, 160, 10))), None),
        "deep.png": (save(deep, "PNG"), None),
        "bits.png": (save(img.convert("1"), "PNG"), None),
        "animated.png": (save(img, "PNG", save_all=True, append_images=frames), None),
        "text.png": (save(img, "PNG", pnginfo=text), None),
        "text-bomb.png": (text_bomb(), "ValueError: Decompressed data too large"),
        "half.png": (png[: len(png) // 2], "OSError: image file is truncated"),
        "crc.png": (png[:40] + b"\0\0\0\0" + png[44:], "not an image|SyntaxError|OSError"),
        "hollow.png": (png_of(50, 40), "OSError: "),
        "flat.png": (png_of(0, 40), "not an image|tile|ValueError|OSError"),
        "bomb.png": (png_of(20_000, 5_000, 1), bomb),
        "big-bomb.png": (png_of(60_000, 60_000, 1), "a decompression bomb"),
        "largest.png": (png_of(2**31 - 1, 2**31 - 1), "a decompression bomb|more than"),
        "frames.gif": (save(palette, "GIF", save_all=True, append_images=frames), None),
        "clear.gif": (save(palette, "GIF", transparency=3), None),
        "half.gif": (gif[: len(gif) // 2], "OSError: image file is truncated"),
        "frames.webp": (save(img, "WEBP", save_all=True, append_images=frames), None),
        "half.webp": (save(img, "WEBP")[:200], "OSError|could not|not an image"),
        "half.bmp": (save(img, "BMP")[:3000], "OSError: image file is truncated"),
        "one.png": (save(noise(1, 1), "PNG"), None),
        "long.png": (save(noise(20_000, 1), "PNG"), None),
        "tall.png": (save(noise(1, 2_000), "PNG"), None),
        "tiff.jpg": (save(img, "TIFF"), no_image),
        "icon.png": (save(img, "ICO"), no_image),
        "jp2.jpg": (save(img, "JPEG2000"), no_image),
        "eps.jpg": (save(img, "EPS"), no_image),
        "pdf.jpg": (save(img, "PDF"), no_image),
        "psd.jpg": (b"8BPS\0\1" + bytes(40), no_image),
        "fits.jpg": (b"SIMPLE  =                    T" + bytes(3000), no_image),
        "svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", no_image),
        'quote"\n\\.png': (png, None),
        "a\u0308.png": (png, None),  # an umlaut in two parts, as macOS writes it
        "\udcff\udcfe.png": (png, None),  # bytes that are not UTF-8
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class folder of all these, and of what is odd about files."""
    root = tmp_path_factory.mktemp("odd") / "tree"
    (root / "a" / "folder.png").mkdir(parents=True)
    for name, (content, _) in files().items():
        (root / "a" / name).write_bytes(content)
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "photo.png").write_bytes(save(noise(seed=5), "PNG"))
    (root / "a" / "out.png").symlink_to(elsewhere / "photo.png")
    (root / "a" / "nowhere.png").symlink_to("nowhere")
    (root / "a" / "itself.png").symlink_to("itself.png")
    (root / "a" / "memory.png").symlink_to("/proc/self/mem")  # opens, and fails when it is read
    os.mkfifo(root / "a" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(os.path.relpath(root / "a" / "socket.png"))  # a path may have 107 bytes
    (root / "a" / "device.png").symlink_to("/dev/zero")
    return root


@pytest.mark.ray
def test_what_the_papers_loader_can_decode_is_kept_and_the_rest_is_named(
    tree: Path, tmp_path: Path, ray_cluster: None
) -> None:
    cases = files()
    assert len(cases) >= 60
    config = PrepareConfig(
        source=str(tree), output=str(tmp_path / "out"), image_size=SIZE, rows_per_shard=40,
        encoding="png", max_reject_fraction=1,
    )  # fmt: skip
    prepare.run(config)
    kept, rejected = outcome(tmp_path / "out")

    expected = {f"a/{sources.printable(name)}": why for name, (_, why) in cases.items()}
    expected |= {"a/out.png": None, "a/nowhere.png": "unreadable: No such file"}
    expected |= {"a/itself.png": "unreadable: Too many levels"}
    expected |= {"a/memory.png": "unreadable: Input/output error"}
    odd = "unreadable: a pipe, socket or device, not a file"
    expected |= dict.fromkeys(("a/pipe.png", "a/socket.png", "a/device.png"), odd)
    assert set(kept) | set(rejected) == set(expected)
    for path, why in expected.items():
        if why is None:
            assert path in kept, (path, rejected[path])
        else:
            assert path in rejected, path
            assert any(part in rejected[path] for part in why.split("|")), (path, rejected[path])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (content, why) in cases.items():
            if why is None:
                assert np.array_equal(kept[f"a/{sources.printable(name)}"], paper_pixels(content))
            elif name not in NOT_ALLOWED:
                with pytest.raises(Exception):  # noqa: B017, PT011 the paper's loader ends here
                    paper_pixels(content)
    assert shards.verify(str(tmp_path / "out")) == []


def outcome(folder: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """Pixels by path, and reasons by path."""
    rows = [r for f in (folder / "data").iterdir() for r in pq.read_table(f).to_pylist()]
    rejects = pq.read_table(folder / "rejects.parquet").to_pylist()
    assert len(rows) + len(rejects) == len({r["id"] for r in rows + rejects})
    return (
        {r["image"]["path"]: images.decode_pixels(r["image"]["bytes"]) for r in rows},
        {r["path"]: r["reason"] for r in rejects},
    )


def prepared_without_ray(source: Path, output: Path, size: int = SIZE) -> Path:
    """What prepare.run() does, in this process."""
    config = PrepareConfig(source=str(source), output=str(output), image_size=size, encoding="png")
    opened = sources.open_source(str(source))
    index = output.parent / f"{output.name}.arrow"
    sources.write_index(opened, index)
    asked = job.describe(config, opened, index)
    folders, listed = {size: str(output)}, Index(index)
    classes = job.classes_of(opened, listed)
    with lease.claim(str(output / "_work" / "writer")):
        job.begin(str(output), folders, asked, index)
    for number in range(asked.num_shards):
        job.write_shard(number, folders, opened.root, classes, asked)
    job.publish(folders, classes, asked, config)
    return output


def test_odd_members_of_a_tar_are_kept_or_named(tmp_path: Path) -> None:
    png = save(noise(), "PNG")
    other = save(noise(seed=1), "PNG")

    def member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        for field, value in fields.items():
            setattr(info, field, value)
        return info, content

    table: list[tuple[tuple[tarfile.TarInfo, bytes], str, str | None]] = [
        (member("plain.png", png), "plain.png", None),
        (member("/absolute.png", png), "absolute.png", None),
        (member("./dot/./x.png", png), "dot/x.png", None),
        (member("../../up.png", png), "../../up.png", "leads out of the archive"),
        (member("a/../../up2.png", png), "../up2.png", "leads out of the archive"),
        (member("soft.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "soft.png",
         "a symbolic link, not a file"),
        (member("hard.png", type=tarfile.LNKTYPE, linkname="plain.png"), "hard.png",
         "a hard link, not a file"),
        (member("char.png", type=tarfile.CHRTYPE), "char.png", "a device, not a file"),
        (member("block.png", type=tarfile.BLKTYPE), "block.png", "a device, not a file"),
        (member("fifo.png", type=tarfile.FIFOTYPE), "fifo.png", "a pipe, not a file"),
        (member("\udcff.png", png), "\\udcff.png", None),
        (member("x" * 300 + ".png", png), "x" * 300 + ".png", None),
        (member("d" * 90 + "/" + "e" * 90 + ".png", png), "d" * 90 + "/" + "e" * 90 + ".png", None),
        (member("empty.png"), "empty.png", "empty file"),
        (member("half.png", png[:500]), "half.png", "truncated"),
        (member("tar-inside.png", bytes(10240)), "tar-inside.png", "not an image"),
    ]  # fmt: skip
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        inner = io.BytesIO()
        with tarfile.open(fileobj=inner, mode="w", format=kind) as archive:
            archive.addfile(member("folder.png/", type=tarfile.DIRTYPE)[0])
            archive.addfile(member("twice.png", png)[0], io.BytesIO(png))
            for (info, content), _, _ in table:
                archive.addfile(info, io.BytesIO(content))
            archive.addfile(member("twice.png", other)[0], io.BytesIO(other))
        content = inner.getvalue()
        with tarfile.open(tmp_path / "outer.tar", "w") as archive:
            archive.addfile(member("cat.tar", content)[0], io.BytesIO(content))
        kept, rejected = outcome(
            prepared_without_ray(tmp_path / "outer.tar", tmp_path / f"out{kind}")
        )

        for _, name, why in table:
            if why is None:
                assert np.array_equal(kept[f"cat/{name}"], paper_pixels(png)), name
            else:
                assert why in rejected[f"cat/{name}"], name
        assert np.array_equal(kept["cat/twice.png"], paper_pixels(other))  # as unpacking would
        assert rejected["cat/twice.png"] == "a later file of the archive has the same name"
        assert len(kept) + len(rejected) == len(table) + 2


def test_odd_rows_of_parquet_are_kept_or_named(tmp_path: Path) -> None:
    png = save(noise(), "PNG")
    rows: list[tuple[Any, int | None, str | None]] = [
        ({"bytes": png, "path": None}, 0, None),
        ({"bytes": png, "path": "x.png"}, 1, None),
        ({"bytes": None, "path": "x.png"}, 1, "the image column holds no bytes"),
        (None, 1, "the image column holds no bytes"),
        ({"bytes": b"", "path": None}, 1, "empty file"),
        ({"bytes": png, "path": None}, None, "label -1 is outside 0..1"),
        ({"bytes": png, "path": None}, -7, "label -7 is outside 0..1"),
        ({"bytes": png, "path": None}, 2, "label 2 is outside 0..1"),
        ({"bytes": png, "path": None}, 2**62, f"label {2**62} is outside 0..1"),
    ]
    schema = shards.schema(sources.name_classes(["cat", "dog"]))
    pq.write_table(
        pa.table([[r[0] for r in rows], [r[1] for r in rows], list(range(len(rows)))],
                 schema=schema),
        tmp_path / "x.parquet", row_group_size=4,
    )  # fmt: skip
    kept, rejected = outcome(prepared_without_ray(tmp_path / "x.parquet", tmp_path / "out"))
    for i, (_, _, why) in enumerate(rows):
        path = f"x.parquet#{i}"
        assert (path in kept) if why is None else rejected[path] == why, path


def test_an_image_that_is_too_long_at_one_size_is_kept_at_the_other(tmp_path: Path) -> None:
    long = save(noise(20_000, 1), "PNG")
    small, large = job.crops(long, 0, 1, (SIZE, 256))
    assert isinstance(small, np.ndarray)
    assert np.array_equal(small, paper_pixels(long))
    assert isinstance(large, images.BadImage)
    assert "5120000 x 256" in str(large)


def test_odd_images_are_decoded_without_a_word() -> None:
    """Pillow warns of a bomb between its limit and twice that, and of odd palettes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, (content, why) in files().items():
            if why is None:
                images.decode(content)
            elif name == "bomb.png":
                with pytest.raises(images.BadImage, match="is more than"):
                    images.decode(content)


def test_decoding_for_several_sizes_happens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    decode: Callable[[bytes], Image.Image] = images.decode
    monkeypatch.setattr(images, "decode", lambda image: decoded.append(1) or decode(image))
    small, large = job.crops(save(noise(300, 200), "JPEG"), 0, 1, (16, 64))
    assert isinstance(small, np.ndarray)
    assert isinstance(large, np.ndarray)
    assert (small.shape, large.shape) == ((16, 16, 3), (64, 64, 3))
    assert decoded == [1]
