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
from PIL import Image, ImageFile, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".jpe", ".jfif", ".apng", ".dib")
"""Endings of names, in lower case, of formats that are decoded."""
OTHER_SUFFIXES = (".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".psd", ".heic", ".heif",
                  ".avif", ".jp2", ".jxl", ".ico", ".tga")  # fmt: skip
"""Endings of other images. Content decides, so that what is one of these is named as a reject."""
IMAGE_SUFFIXES = SUFFIXES + OTHER_SUFFIXES
"""Endings of what is taken for an image."""
MAX_PIXELS = 2**30 // 12
"""Most pixels of an image: 89 million, Pillow's limit."""
MAX_IMAGE_BYTES = 2**26
"""Most bytes of an encoded image, of which workers hold two."""
MAX_DECODE_BYTES = 640_000_000
"""Most memory that decoding an image may take, or scaling it: enough for a plain RGB JPEG or PNG of
MAX_PIXELS, which takes 7 bytes a pixel when it is halved."""
MAX_METADATA_BYTES = 2**24
"""Most bytes of Exif, comments and the like, of which Pillow keeps two or three more."""
WEBP_COST = 17
"""Bytes a pixel that Pillow takes to decode WebP (measured): canvases, their copy, the image."""

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
    refuse_bytes(len(image))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow has one for each odd image
            with Image.open(BytesIO(image), formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > MAX_PIXELS:
                    raise BadImage(f"{width} x {height} is more than {MAX_PIXELS} pixels")
                metadata = _metadata_bytes(opened)
                if metadata > MAX_METADATA_BYTES:
                    raise BadImage(f"{metadata} bytes beside its pixels (Exif, comments), more "
                                   f"than {MAX_METADATA_BYTES}")  # fmt: skip
                need = width * height * _decode_cost(opened, image)
                _check_memory(need, f"decoding {width} x {height} pixels of {opened.format}")
                if opened.mode == "RGB" and opened.format != "WEBP":  # whose decoder is as large
                    opened.load()
                    return opened  # convert() would copy it
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


def refuse_bytes(length: int) -> None:
    """Check that an encoded image is not too long to be held.

    Raises:
        BadImage: it is.
    """
    if length > MAX_IMAGE_BYTES:
        raise BadImage(f"a file of {length} bytes, more than the {MAX_IMAGE_BYTES} of an image")


def _metadata_bytes(opened: ImageFile.ImageFile) -> int:
    """Bytes that Pillow has read into memory beside the pixels."""
    kept = [*opened.info.values(), *(content for _, content in getattr(opened, "applist", ()))]
    return sum(len(found) for found in kept if isinstance(found, bytes | str))


def _decode_cost(opened: ImageFile.ImageFile, image: bytes) -> int:
    """Most bytes a pixel that are held until the image is RGB, with Pillow's 4 for that."""
    if opened.format == "WEBP":
        return WEBP_COST
    own = 1 if opened.mode in ("1", "L", "P") else 2 if opened.mode.startswith("I;16") else 4
    convert = 0 if opened.mode == "RGB" else 4
    bands = len(opened.getbands())
    is_kept = False
    if opened.format in ("JPEG", "MPO"):
        # Scans that hold not all bands, or not all bits, are kept as coefficients until the last.
        scan = b"\xff\xda" + (6 + 2 * bands).to_bytes(2, "big") + bytes([bands])
        assert opened.fp is not None
        begin = opened.fp.tell() - 8 - 2 * bands
        is_kept = "progressive" in opened.info or not image.startswith(scan, max(begin, 0))
    return own + max(convert, 2 * bands if is_kept else 0)


def adm_crop(img: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve by box filter, scale the short side bicubically, cut the middle.

    Args:
        img: any image, mode RGB.
        size: side of the square to return.

    Raises:
        BadImage: so long and thin that scaling its short side would take gigabytes.
    """
    while min(img.size) >= 2 * size:
        img = _scaled(img, img.width // 2, img.height // 2, Image.Resampling.BOX)
    scale = size / min(img.size)
    width, height = round(img.width * scale), round(img.height * scale)
    img = _scaled(img, width, height, Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return img.crop((left, top, left + size, top + size))


def _scaled(img: Image.Image, width: int, height: int, kind: Image.Resampling) -> Image.Image:
    held = img.height * (img.width + width) + width * height  # Pillow scales rows, then columns
    _check_memory(4 * held, f"scaling {img.width} x {img.height} pixels to {width} x {height}")
    return img.resize((width, height), resample=kind)


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


def look(image: bytes) -> tuple[str, int, int]:
    """Encoding, width and height of a stored image, by its header; "?" where it has none."""
    try:
        with Image.open(BytesIO(image), formats=(*FORMATS, "PPM")) as opened:
            kind = {"PPM": "raw"}.get(str(opened.format), str(opened.format).lower())
            return kind, opened.width, opened.height
    except Exception:  # decoders of hostile bytes raise whatever they run into
        return "?", 0, 0


def _ppm_header(width: int, height: int) -> bytes:
    return f"P6\n{width} {height}\n255\n".encode()


def _check_memory(need: int, what: str) -> None:
    if need > MAX_DECODE_BYTES:
        raise BadImage(f"{what} would take {need} bytes of memory, more than {MAX_DECODE_BYTES}")
