"""Pictures and pages about images: grids, and the report of an evaluation.

Leaves out how images are drawn and how metrics are computed; takes arrays and plain dictionaries.
"""

from __future__ import annotations

import functools
import io
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipelines import storage

GUTTER = 2
INK = (32, 32, 32)
WHITE = (255, 255, 255)


def image_grid(
    pixels: object,
    columns: int,
    row_labels: Sequence[str] | None = None,
    scale: int = 1,
) -> Image.Image:
    """Images side by side on white, row after row, with an optional label left of each row.

    Args:
        pixels: uint8 tensor or array, [N, 3, H, W] or [N, H, W, 3].
        columns: images in a row; the last row may hold fewer.
        row_labels: one text for each row.
        scale: whole factor by which every image is enlarged, without smoothing.

    Raises:
        ValueError: the shape or type is not that of pixels, or the labels do not fit the rows.
    """
    images = _channels_last(pixels)
    num, height, width, _ = images.shape
    rows = -(-num // columns)
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(f"{len(row_labels)} row labels for a grid of {rows} rows")
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = height * scale, width * scale
    gutter = GUTTER * max(1, min(scale, height // 64))

    font = load_font(max(11, min(20, height // 3)))
    labels = [drawable(label) for label in row_labels or []]
    left = round(max((font.getlength(s) for s in labels), default=-8)) + 8 + gutter
    canvas = Image.new(
        "RGB",
        (left + columns * (width + gutter), gutter + rows * (height + gutter)),
        WHITE,
    )
    for i, image in enumerate(images):
        x = left + i % columns * (width + gutter)
        y = gutter + i // columns * (height + gutter)
        canvas.paste(Image.fromarray(image), (x, y))
    draw = ImageDraw.Draw(canvas)
    for row, label in enumerate(labels):
        middle = gutter + row * (height + gutter) + height // 2
        draw.text((left - 8, middle), label, fill=INK, font=font, anchor="rm")
    return canvas


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib; Pillow's own font knows ASCII only."""
    return ImageFont.truetype(_font_file(), size)


def drawable(text: str) -> str:
    """A text on one line, with Python's escapes for what our font has no sign for."""
    from matplotlib.ft2font import FT2Font

    font = FT2Font(_font_file())
    return "".join(
        c
        if c.isprintable() and font.get_char_index(ord(c))
        else c.encode("unicode_escape").decode()
        for c in text
    )


@functools.cache
def _font_file() -> str:
    import matplotlib as mpl

    return str(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def _channels_last(pixels: object) -> np.ndarray:
    """uint8 pixels in either layout -> [N, H, W, 3]."""
    detach = getattr(pixels, "detach", None)
    images = np.asarray(detach().cpu() if detach else pixels)
    if images.dtype != np.uint8 or images.ndim != 4 or 3 not in (images.shape[1], images.shape[3]):
        raise ValueError(
            f"a grid takes uint8 pixels [N, 3, H, W] or [N, H, W, 3], "
            f"not {images.dtype} {list(images.shape)}"
        )
    if images.shape[1] == 3:
        images = images.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images)


def headline(metrics: Mapping[str, float]) -> str:
    """The metrics on one line."""
    return "   ".join(f"{name} {number(value)}" for name, value in metrics.items())


def write_report(
    output: str, report: Mapping[str, Any], shown: Sequence[tuple[str, Sequence[bytes]]]
) -> None:
    """Publish report.png, report.md and, last, report.json.

    Args:
        output: URI of the evaluation folder.
        report: what report.json holds; see evaluate.run.
        shown: name and PNGs of each row of the picture.
    """
    buffer = io.BytesIO()
    picture(report["metrics"], shown).save(buffer, "PNG")
    storage.write_bytes(storage.join(output, "report.png"), buffer.getvalue())
    storage.write_bytes(storage.join(output, "report.md"), page(report).encode())
    storage.write_json(storage.join(output, "report.json"), report)


def picture(
    metrics: Mapping[str, float], shown: Sequence[tuple[str, Sequence[bytes]]]
) -> Image.Image:
    """Drawn images, one class a row, with the metrics below them."""
    columns = max(len(images) for _, images in shown)
    pixels = [np.asarray(Image.open(io.BytesIO(png))) for _, images in shown for png in images]
    size = len(pixels[0])
    grid = image_grid(
        np.stack(pixels), columns, [name for name, _ in shown], scale=max(1, 64 // size)
    )
    font = load_font(14)
    lines = [f"{name}  {number(value)}" for name, value in metrics.items()]
    width = round(max(font.getlength(line) for line in lines)) + 24
    across = max(1, grid.width // width)
    rows = -(-len(lines) // across)
    canvas = Image.new("RGB", (max(grid.width, width), grid.height + 20 * rows + 12), WHITE)
    canvas.paste(grid, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        place = (8 + i // rows * width, grid.height + 6 + i % rows * 20)
        draw.text(place, line, fill=INK, font=font)
    return canvas


def page(report: Mapping[str, Any]) -> str:
    """The report as Markdown: numbers, warnings, and what is needed to do it again."""
    lines = ["# Evaluation", "", "| metric | value |", "| --- | --- |"]
    lines += [f"| {name} | {number(value)} |" for name, value in report["metrics"].items()]
    lines += [""] + [f"> {warning}" for warning in report["warnings"]]
    lines += ["", "![samples](report.png)", "", "| identity | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in flat(report["identity"])]
    config = report["config"]
    lines += ["", "Do it again:", "", "```", command("evaluate", config), "```", ""]
    return "\n".join(lines)


def command(stage: str, config: Mapping[str, Any]) -> str:
    """The command line of a stage's config, without what is left out or empty."""
    words = []
    for name, value in flat(config):
        if value is None or value is False or value in ("", [], ()) or name == "workers":
            continue
        each = value if isinstance(value, (list, tuple)) else [value]
        each = [part for item in each for part in (item if isinstance(item, list) else [item])]
        words.append(f"--{name.replace('_', '-')} {' '.join(shlex.quote(str(v)) for v in each)}")
    words = [word.removesuffix(" True") for word in words]
    return " \\\n    ".join([f"jit {stage}", *words])


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested values under dotted names."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += flat(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found


def number(value: float) -> str:
    """Four digits, or one after the point."""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"
