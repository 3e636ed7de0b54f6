"""Addressed randomness: a number is a function of (seed, index, stream, position), not of history.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), written
with integer tensor arithmetic, so that one call draws for a whole batch on any device, and image i
gets the same numbers whatever else is in the batch. Integers and uniforms are equal to the bit on
every device; normals go through log, sin and cos, whose last bit a device may round differently.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox 4x32.

    Args:
        counter: four int64 tensors that hold 32-bit words; they broadcast.
        key: two such tensors.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0 = c0 * _MULTIPLIERS[0]  # wraps modulo 2^64, which keeps both halves
        p1 = c2 * _MULTIPLIERS[1]
        high0, high1 = (p0 >> 32) & _MASK, (p1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _MASK, high0 ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _words(seed: int | Tensor, index: Tensor, blocks: int, stream: str) -> Tensor:
    """4 * blocks 32-bit words for each index, as int64 [B, 4 * blocks]."""
    index = index.to(torch.int64)[:, None]  # [B, 1]
    seeds = torch.as_tensor(seed, dtype=torch.int64, device=index.device).reshape(-1, 1)
    block = torch.arange(blocks, device=index.device)[None]  # [1, blocks]
    name = torch.full_like(index, zlib.crc32(stream.encode()))
    counter = (block, name, index & _MASK, (index >> 32) & _MASK)
    words = philox(counter, (seeds & _MASK, (seeds >> 32) & _MASK))
    return torch.stack(words, dim=-1).flatten(1)  # [B, blocks, 4] -> [B, 4 * blocks]


def _unit(words: Tensor) -> Tensor:
    """32-bit words to float32 in (0, 1]."""
    return (words.double().add_(0.5) * 2.0**-32).float()


def words(seed: int | Tensor, index: Tensor, stream: str) -> Tensor:
    """One 32-bit word for each index, to make more of with `derive`.

    Args:
        seed: one seed, or one for each index, int64 [B].
        index: addresses, int64 [B]; the result lives on their device.
        stream: what the word is for; streams are independent.

    Returns:
        int64 [B].
    """
    return _words(seed, index, 1, stream)[:, 0]


def uniform(seed: int | Tensor, index: Tensor, stream: str) -> Tensor:
    """One uniform number in (0, 1] for each index.

    Args:
        seed: one seed, or one for each index, int64 [B].
        index: addresses, int64 [B]; the result lives on their device.
        stream: what the number is for; streams are independent.

    Returns:
        float32 [B].
    """
    return _unit(words(seed, index, stream))


def derive(words: Tensor, number: int | Tensor) -> Tensor:
    """Other 32-bit words from words and a number below 2^32; int64, broadcast.

    Where Philox would cost more than what it is for, as with a mask for each activation: two
    multiplications and three shifts that spread every bit (C. Wellons, "Prospecting for hash
    functions", 2018, the constants with the least bias). Both constants are below 2^31, so nothing
    overflows.
    """
    x = words ^ number
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def normal(seed: int | Tensor, index: Tensor, shape: tuple[int, ...], stream: str) -> Tensor:
    """Standard normal numbers of the given shape for each index (Box-Muller).

    Args:
        seed: one seed, or one for each index, int64 [B].
        index: addresses, int64 [B]; the result lives on their device.
        shape: shape of one draw.
        stream: what the numbers are for; streams are independent.

    Returns:
        float32 [B, *shape].
    """
    count = math.prod(shape)
    words = _words(seed, index, -(-count // 4), stream)
    u1, u2 = _unit(words).unflatten(1, (-1, 2)).unbind(-1)
    radius, angle = (-2 * u1.log()).sqrt(), 2 * math.pi * u2
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return pairs.flatten(1)[:, :count].unflatten(1, shape or (1,)).reshape(len(index), *shape)
