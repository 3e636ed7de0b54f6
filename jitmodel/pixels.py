"""The only conversion between pixels (uint8, 0..255) and x (float, -1..1)."""

from __future__ import annotations

import torch
from torch import Tensor


def to_x(pixels: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1; any shape."""
    return pixels.float() / 127.5 - 1


def to_pixels(x: Tensor) -> Tensor:
    """float -1..1 to the nearest uint8 0..255, values outside clipped; any shape."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
