"""Encoded images to pixels and back, exactly as the paper's data loader and ADM's crop do it.

Decoding is Pillow's `Image.open(...).convert("RGB")`: no draft mode, no EXIF rotation, truncated
files refused. The crop is ADM's (Dhariwal & Nichol 2021), which the paper uses, and equals it
pixel for pixel. What is stored is lossless, so training sees the pixels of the paper's loader.

Only JPEG, PNG, WebP, GIF and BMP are opened, by content and not by name. They cover ImageNet
(which has PNGs and BMPs named .JPEG) and folders of photographs; each further decoder of Pillow
is a door for hostile files (EPS even starts Ghostscript), and TIFF or PSD say too little about
which of several pages or depths is the picture.
"""

from __future__ import annotations

import re
import warnings
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".jpe", ".jfif", ".apng", ".dib")
"""Endings of names, in lower case, of formats that are decoded."""
OTHER_SUFFIXES = (".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".psd", ".heic", ".heif",
                  ".avif", ".jp2", ".jxl", ".ico", ".tga")  # fmt: skip
"""Endings of other images. Content decides, so that what is one of these is named as a reject."""
IMAGE_SUFFIXES = SUFFIXES + OTHER_SUFFIXES
"""Endings of what is taken for an image."""
MAX_PIXELS = 2**30 // 12
"""Most pixels of an image, before and after scaling: 89 million, Pillow's limit."""

# On 50 ImageNet photographs at 256 pixels, one core, images/s: PNG level 1: 119 kB, 197 written,
# 520 read; level 6: 112 kB, 62 written, 580 read. WebP effort 0, method 0: 95 kB, 384 written,
# 853 read; effort 80, method 4: 85 kB, 16 written, 757 read.
PNG_LEVEL = 1
WEBP_EFFORT = 0
WEBP_METHOD = 0


class BadImage(ValueError):
    """An image that cannot be used; the message says why, equally on every machine."""


def decode(image: bytes) -> Image.Image:
    """An encoded image as the paper's loader sees it, mode RGB.

    Raises:
        BadImage: it is empty, broken, truncated, too large, or of another format.
    """
    if not image:
        raise BadImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow has one for each odd image
            with Image.open(BytesIO(image), formats=FORMATS) as opened:
                _check_size(opened.width, opened.height)
                return opened.convert("RGB")
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"not an image of {', '.join(FORMATS)}, or a broken header") from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"more than {MAX_PIXELS} pixels: a decompression bomb?") from error
    except Exception as error:  # decoders of hostile bytes raise whatever they run into
        text = re.sub(r" at 0x[0-9a-f]+", "", str(error))
        raise BadImage(f"{type(error).__name__}: {text}") from error


def adm_crop(img: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve by box filter, scale the short side bicubically, cut the middle.

    Args:
        img: any image, mode RGB.
        size: side of the square to return.

    Raises:
        BadImage: so long and thin that scaling its short side would take gigabytes.
    """
    while min(img.size) >= 2 * size:
        img = img.resize((img.width // 2, img.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(img.size)
    width, height = round(img.width * scale), round(img.height * scale)
    _check_size(width, height)
    img = img.resize((width, height), resample=Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return img.crop((left, top, left + size, top + size))


def resize(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Pixels [H, W, 3] of another side, by Pillow's bicubic filter: antialiased when it shrinks."""
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def encode(pixels: NDArray[np.uint8], encoding: str) -> bytes:
    """Pixels as a lossless image that every viewer and `datasets` can open.

    Args:
        pixels: uint8, [H, W, 3].
        encoding: "png"; "webp" (lossless); "raw" (PPM: a short header and the bare pixels).
    """
    buffer = BytesIO()
    img = Image.fromarray(pixels)
    if encoding == "png":
        img.save(buffer, "PNG", compress_level=PNG_LEVEL)
    elif encoding == "webp":
        img.save(buffer, "WEBP", lossless=True, quality=WEBP_EFFORT, method=WEBP_METHOD)
    elif encoding == "raw":
        return _ppm_header(img.width, img.height) + pixels.tobytes()
    else:
        raise ValueError(f"unknown encoding {encoding!r}: expected png, webp or raw")
    return buffer.getvalue()


def decode_pixels(image: bytes | memoryview) -> NDArray[np.uint8]:
    """An image of a shard as pixels, uint8, [H, W, 3]; a raw one is not copied."""
    if image[:3] == b"P6\n":
        head = bytes(image[:64])
        _, size, depth, rest = head.split(b"\n", 3)
        assert depth == b"255", depth
        width, height = map(int, size.split())
        pixels = np.frombuffer(image, np.uint8, offset=len(head) - len(rest))
        return pixels.reshape(height, width, 3)
    with Image.open(BytesIO(image), formats=FORMATS) as opened:
        return np.asarray(opened.convert("RGB"))


def _ppm_header(width: int, height: int) -> bytes:
    return f"P6\n{width} {height}\n255\n".encode()


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} is more than {MAX_PIXELS} pixels")
