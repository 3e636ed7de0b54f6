"""Images are decoded and cropped as the paper's loader and ADM's code do it, pixel for pixel."""

from __future__ import annotations

import subprocess
import sys
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import images
from pipelines.images import BadImage, adm_crop, decode, decode_pixels, encode


def _adm_transcription(image: bytes, size: int) -> np.ndarray[Any, Any]:
    """center_crop_arr of guided-diffusion, as the authors of the paper call it."""
    pil = Image.open(BytesIO(image)).convert("RGB")
    while min(*pil.size) >= 2 * size:
        pil = pil.resize(tuple(x // 2 for x in pil.size), resample=Image.BOX)
    scale = size / min(*pil.size)
    pil = pil.resize(tuple(round(x * scale) for x in pil.size), resample=Image.BICUBIC)
    arr = np.array(pil)
    y, x = (arr.shape[0] - size) // 2, (arr.shape[1] - size) // 2
    return arr[y : y + size, x : x + size]


def _save(img: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    img.save(buffer, kind, **options)
    return buffer.getvalue()


def _noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [64, 256, 512])
def test_real_photographs_are_cropped_as_adm_does(imagenet_sample: Path, size: int) -> None:
    files = sorted(imagenet_sample.glob("*.JPEG"))
    assert len(files) == 200
    # A quarter at the sizes that take long; the slow test below takes all of them.
    chosen = files if size == 64 else files[size // 512 :: 4]
    for file in chosen:
        image = file.read_bytes()
        found = np.asarray(adm_crop(decode(image), size))
        assert np.array_equal(found, _adm_transcription(image, size)), file.name


@pytest.mark.slow
@pytest.mark.parametrize("size", [256, 512])
def test_every_real_photograph_is_cropped_as_adm_does(imagenet_sample: Path, size: int) -> None:
    for file in sorted(imagenet_sample.glob("*.JPEG")):
        image = file.read_bytes()
        found = np.asarray(adm_crop(decode(image), size))
        assert np.array_equal(found, _adm_transcription(image, size)), file.name


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (28, 28),
        (63, 64),
        (64, 127),
        (127, 128),
        (129, 128),
        (257, 300),
        (100, 999),
        (1, 1),
        (3, 40),
    ],
)
def test_odd_sizes_are_cropped_as_adm_does(width: int, height: int) -> None:
    for size in (28, 32, 64):
        image = _save(_noise(width, height), "PNG")
        found = np.asarray(adm_crop(decode(image), size))
        assert found.shape == (size, size, 3)
        assert np.array_equal(found, _adm_transcription(image, size))


def test_what_the_papers_loader_accepts_is_seen_as_it_sees_it() -> None:
    noise = _noise(40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate: the paper's loader ignores it
    paletted = noise.quantize(16)
    paletted.info["transparency"] = 3
    deep = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    cases = {
        "grey JPEG": _save(noise.convert("L"), "JPEG"),
        "CMYK JPEG": _save(noise.convert("CMYK"), "JPEG"),
        "rotated by EXIF": _save(noise, "JPEG", exif=exif),
        "corrupt EXIF": _save(noise, "JPEG", exif=b"Exif\0\0" + b"\xff" * 40),
        "palette with a clear colour": _save(paletted, "PNG", transparency=3),
        "RGBA": _save(noise.convert("RGBA"), "PNG"),
        "16 bit": _save(deep, "PNG"),
        "one bit": _save(noise.convert("1"), "PNG"),
        "WebP": _save(noise, "WEBP"),
        "BMP": _save(noise, "BMP"),
        "GIF of two frames": _save(
            paletted, "GIF", save_all=True, append_images=[_noise(40, 30, 1).quantize(16)]
        ),
        "bytes after the end": _save(noise, "JPEG") + b"more",
    }
    for name, image in cases.items():
        found = decode(image)
        assert found.mode == "RGB", name
        assert found.size == (40, 30), name
        assert found.tobytes() == Image.open(BytesIO(image)).convert("RGB").tobytes(), name


def test_what_cannot_be_used_says_why_and_equally_each_time() -> None:
    noise = _noise(400, 300)
    jpeg = _save(noise, "JPEG")
    png = _save(noise, "PNG")
    cases = {
        "empty file": b"",
        "not an image of JPEG, PNG": b"some text, named .JPEG",
        "truncated": jpeg[: len(jpeg) // 2],
        "image file is truncated": png[: len(png) // 2],
        "Truncated File Read": jpeg[:10],
        "more than 89478485 pixels": _save(Image.new("1", (10_000, 9_000)), "PNG"),
        "decompression bomb": _save(Image.new("1", (20_000, 10_000)), "PNG"),
        "not an image of": _save(noise, "TIFF"),
    }
    for reason, image in cases.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with pytest.raises(BadImage, match=reason) as first:
                decode(image)
            with pytest.raises(BadImage) as second:
                decode(image)
        assert str(first.value) == str(second.value)
        assert "0x" not in str(first.value)


def test_an_image_too_long_to_scale_is_refused_before_memory_is_taken() -> None:
    with pytest.raises(BadImage, match="5120000 x 256"):
        adm_crop(Image.new("RGB", (20_000, 1)), 256)


SAVED: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "RGB JPEG": ("RGB", "JPEG", {}, 4),
    "grey JPEG": ("L", "JPEG", {}, 5),
    "CMYK JPEG": ("CMYK", "JPEG", {}, 8),
    "progressive JPEG": ("RGB", "JPEG", {"progressive": True, "subsampling": 0}, 10),
    "progressive CMYK JPEG": ("CMYK", "JPEG", {"progressive": True}, 12),
    "RGB PNG": ("RGB", "PNG", {"compress_level": 1}, 4),
    "RGBA PNG": ("RGBA", "PNG", {"compress_level": 1}, 8),
    "palette PNG": ("P", "PNG", {"compress_level": 1}, 5),
    "16-bit PNG": ("I;16", "PNG", {"compress_level": 1}, 6),
    "BMP": ("RGB", "BMP", {}, 4),
    "GIF": ("P", "GIF", {}, 5),
    "WebP": ("RGB", "WEBP", {"method": 0}, 17),
    "lossless WebP": ("RGB", "WEBP", {"lossless": True, "quality": 0, "method": 0}, 17),
}
"""Kinds of images: mode, format, options, and the bytes a pixel that decoding them takes."""


def _saved(name: str, width: int, height: int) -> bytes:
    mode, kind, options, _ = SAVED[name]
    noise = _noise(max(width // 8, 1), max(height // 8, 1)).resize((width, height))
    return _save(noise.quantize(64) if mode == "P" else noise.convert(mode), kind, **options)


PEAK = """
import sys
from PIL import Image
from pipelines.images import decode
Image.init()
def kilobytes(name):
    return int(open("/proc/self/status").read().split(name)[1].split()[0])
image = sys.stdin.buffer.read()
before = kilobytes("VmRSS:")
decode(image)
print((kilobytes("VmHWM:") - before) * 1024)
"""


@pytest.mark.parametrize("name", SAVED)
def test_decoding_takes_the_memory_that_it_is_refused_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to measure memory")
    width, height, cost = 3000, 2000, SAVED[name][3]
    image = _saved(name, width, height)
    command = [sys.executable, "-c", PEAK]
    done = subprocess.run(command, input=image, capture_output=True, check=True)
    need, taken = cost * width * height, int(done.stdout)
    assert 0.75 * need < taken < 1.05 * need + 2 * len(image) + 2**23

    monkeypatch.setattr(images, "MAX_DECODE_BYTES", need)
    decode(image)
    monkeypatch.setattr(images, "MAX_DECODE_BYTES", need - 1)
    with pytest.raises(BadImage, match=rf"decoding 3000 x 2000 pixels of \w+ would take {need} "):
        decode(image)


def test_a_jpeg_of_one_scan_for_each_band_is_taken_for_what_it_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = _save(_noise(40, 30), "JPEG")
    place = plain.index(b"\xff\xda\x00\x0c\x03")  # where its scan begins, and of three bands
    monkeypatch.setattr(images, "MAX_DECODE_BYTES", 10 * 40 * 30 - 1)
    decode(plain)
    with pytest.raises(BadImage, match="would take 12000 bytes of memory, more than 11999"):
        decode(plain[:place] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + plain[place + 14 :])


def test_an_image_with_megabytes_beside_its_pixels_is_refused_for_pillow_keeps_them() -> None:
    jpeg, png = BytesIO(), BytesIO()
    img = Image.new("RGB", (40, 40))
    img.save(jpeg, "JPEG", exif=b"Exif\0\0" + bytes(60_000))
    img.save(png, "PNG")
    segment = b"\xff\xe1\xff\xff" + b"Exif\0\0" + bytes(65_527)
    flooded = jpeg.getvalue()[:2] + segment * 300 + jpeg.getvalue()[2:]

    for content in (jpeg, png):
        assert decode(content.getvalue()).size == (40, 40)
    with pytest.raises(BadImage, match=r"^\d+ bytes beside its pixels .* more than 16777216$"):
        decode(flooded)


def test_a_file_too_long_to_be_an_image_is_refused() -> None:
    with pytest.raises(BadImage, match="a file of 67108865 bytes, more than the 67108864"):
        decode(bytes(2**26 + 1))


@pytest.mark.parametrize("encoding", ["png", "webp", "raw"])
def test_stored_pixels_come_back_exactly(encoding: str) -> None:
    for side in (1, 28, 64):
        pixels = np.asarray(_noise(side, side))
        image = encode(pixels, encoding)
        assert image == encode(pixels, encoding)
        assert np.array_equal(decode_pixels(image), pixels)
        assert Image.open(BytesIO(image)).size == (side, side)  # any viewer opens it


def test_an_unknown_encoding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"jpeg.*expected png, webp or raw"):
        encode(np.zeros((1, 1, 3), np.uint8), "jpeg")
