"""The parts of the network (Sec. 4, App. A): patches, positions, norm, attention, MLP, adaLN.

Parameters have the names, shapes and layout of the public checkpoints. Where another layout is
faster, the forward pass rearranges the weight, which costs under a percent of a step and leaves
checkpoints, optimizer and sharding unaware of it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jitmodel import random
from jitmodel.cost import WIDTH_MULTIPLE

ROTARY_THETA = 10_000.0


def axis_positions(grid_size: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Row and column of every patch in reading order, each float32 [L]."""
    cells = torch.arange(grid_size, dtype=torch.float32, device=device)
    return cells.repeat_interleave(grid_size), cells.repeat(grid_size)


def sincos_positions(width: int, grid_size: int, device: torch.device | None = None) -> Tensor:
    """MAE's fixed 2D position embedding, [1, L, width].

    The first half of the channels encodes the column, the second half the row, each as
    [sin, cos] over width / 4 frequencies.
    """
    quarter = width // 4
    omega = ROTARY_THETA ** -(torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
    row, column = axis_positions(grid_size, device)
    angles = [position.double()[:, None] * omega for position in (column, row)]  # [L, width / 4]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1)[None].float()


def rotary_tables(head_dim: int, grid_size: int, num_prefix: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the 2D rotary embedding, each [num_prefix + L, head_dim / 2].

    One angle for each pair of channels: the first half of the pairs turns with the row, the
    second with the column. Prefix tokens are not turned.
    """
    pairs = head_dim // 4
    omega = ROTARY_THETA ** -(torch.arange(pairs, dtype=torch.float32) / pairs)
    angles = torch.cat([p[:, None] * omega for p in axis_positions(grid_size)], dim=1)
    angles = F.pad(angles, (0, 0, num_prefix, 0))
    return angles.cos(), angles.sin()


def halves(weight: Tensor) -> Tensor:
    """Rows (a0, b0, a1, b1, ...) of each head to (a0, a1, ..., b0, b1, ...); [..., D] -> same."""
    return weight.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def rotate(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) of channels by its angle: (a, b) -> (a cos - b sin, b cos + a sin).

    Args:
        q: [..., L, D] with all a before all b (see `halves`).
        cos, sin: [L, D / 2].
    """
    a, b = q.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v; all [B, N, L, D].

    The softmax is fp32. On a CPU in bf16 two matmuls beat the fused kernel (2.4x forward, 4x
    backward when compiled), and the logits are rounded to bf16 between them; everywhere else the
    fused kernel wins, which keeps them in fp32.
    """
    if q.device.type == "cpu" and v.dtype == torch.bfloat16:
        logits = (q @ k.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5)
        return logits.softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def linear(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """h weight^T + bias; [..., in] -> [..., out].

    On a CPU the bf16 product with a bias first copies the bias to every row of its result. Where
    no gradient is asked for it is cheaper to add it apart, in the kernel that reads the result:
    a guided evaluation of B/16 takes 17 % less time. In training, the bias' gradient eats that.
    """
    if h.device.type == "cpu" and torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled():
        out = F.linear(h, weight)
        return out + bias.to(out.dtype)
    return F.linear(h, weight, bias)


class Linear(nn.Linear):
    """nn.Linear by way of `linear`."""

    def forward(self, h: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(h, self.weight, self.bias)


class RMSNorm(nn.Module):
    """h / rms(h) * weight, computed in fp32 and returned in the type of h."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, h: Tensor) -> Tensor:
        return rms_norm(h, self.weight, self.eps)


def rms_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis as a function."""
    h32 = h.float()
    return (h32 * torch.rsqrt(h32.square().mean(-1, keepdim=True) + eps) * weight).to(h.dtype)


class PatchEmbedding(nn.Module):
    """Patches to tokens through a bottleneck: two linear maps, no activation (Sec. 4)."""

    def __init__(self, patch_size: int, in_channels: int, bottleneck_dim: int, width: int) -> None:
        super().__init__()
        self.proj1 = nn.Conv2d(in_channels, bottleneck_dim, patch_size, patch_size, bias=False)
        self.proj2 = nn.Conv2d(bottleneck_dim, width, 1)

    def forward(self, z: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, L, D]; a strided convolution is a Linear on unfolded patches."""
        P = self.proj1.kernel_size[0]
        h = z.unflatten(3, (-1, P)).unflatten(2, (-1, P))  # [B, C, H/P, P, W/P, P]
        h = h.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, L, C P P]
        h = F.linear(h, self.proj1.weight.flatten(1))
        return F.linear(h, self.proj2.weight.flatten(1), self.proj2.bias)


class TimeEmbedding(nn.Module):
    """Time in 0..1 to a vector: 256 sinusoids of t itself, then an MLP."""

    NUM_FREQUENCIES = 128

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * self.NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        """[B] -> [B, D]."""
        half = self.NUM_FREQUENCIES
        exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[:, None] * torch.exp(-math.log(10_000.0) * exponent)
        sinusoids = torch.cat((angles.cos(), angles.sin()), dim=1)
        embedded: Tensor = self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))
        return embedded


class LabelEmbedding(nn.Module):
    """One row for each class, and a last one for "no class"."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        """[B] -> [B, D]."""
        rows: Tensor = self.embedding_table(y)
        return rows


class Dropout(nn.Module):
    """Zeroes elements while training; an image's mask is a function of its word alone.

    So it is the same in any batch, on any rank, and when a block is computed again.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, h: Tensor, words: Tensor | None) -> Tensor:
        """[B, L, D] -> [B, L, D]; words int64 [B], or None for torch's own generator."""
        if not (self.training and self.probability):
            return h
        if words is None:
            return F.dropout(h, self.probability)
        shape = h.shape[1:]
        positions = torch.arange(shape.numel(), device=h.device).view(1, *shape)
        kept = random.derive(positions, words[:, None, None]) >= int(self.probability * 2**32)
        return torch.where(kept, h * (1 / (1 - self.probability)), 0)


class Attention(nn.Module):
    """Self-attention with RMSNorm on q and k and a 2D rotary embedding."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // num_heads)
        self.k_norm = RMSNorm(width // num_heads)
        self.proj = Linear(width, width)
        self.dropout = Dropout(dropout)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, words: Tensor | None = None) -> Tensor:
        """[B, L, D] -> [B, L, D]; words [B] for dropout.

        q and k are normalised and turned in fp32 and enter the product in the compute type; the
        authors keep fp32 up to the softmax (bounded in tests/jitmodel/test_parity.py).
        """
        q, k, v = self._qkv(h)  # [B, N, L, D/N]
        q = rotate(rms_norm(q.float(), halves(self.q_norm.weight), self.q_norm.eps), cos, sin)
        k = rotate(rms_norm(k.float(), halves(self.k_norm.weight), self.k_norm.eps), cos, sin)
        out = attention(q.to(v.dtype), k.to(v.dtype), v)
        projected: Tensor = self.dropout(self.proj(out.transpose(1, 2).flatten(2)), words)
        return projected

    def _qkv(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v; the rows of q and k are put in halves, so that rotating needs no shuffle."""
        N = self.num_heads
        weight = self.qkv.weight.unflatten(0, (3, N, -1))  # [3, N, D/N, D]
        bias = self.qkv.bias.unflatten(0, (3, N, -1))  # [3, N, D/N]
        weight = torch.cat((halves(weight[:2].transpose(-1, -2)).transpose(-1, -2), weight[2:]))
        bias = torch.cat((halves(bias[:2]), bias[2:]))
        qkv = linear(h, weight.flatten(0, 2), bias.flatten())
        q, k, v = qkv.unflatten(-1, (3, N, -1)).permute(2, 0, 3, 1, 4)  # [3, B, N, L, D/N]
        return q, k, v


class SwiGLU(nn.Module):
    """silu(gate) * value between two Linears; the gate is the first half of w12.

    The true hidden width (2730, 3413, 4437 for L, H, G) is no multiple of 8, and GPUs multiply
    such matrices slowly, so the forward pass pads the weights with zeros to a multiple of 64. A
    padded channel is silu(0) * 0 = 0: it adds nothing and its gradient is cut off with it.
    Parameters keep the true width. On a CPU, which does not mind odd widths, the padding costs 1 to
    5 % of this module at 8 images; padded parameters would cost nothing, but then checkpoints,
    optimizer and shards would all have to know about them.
    """

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.w12 = Linear(width, 2 * hidden)
        self.w3 = Linear(hidden, width)
        self.dropout = Dropout(dropout)

    def forward(self, h: Tensor, words: Tensor | None = None) -> Tensor:
        """[B, L, D] -> [B, L, D]; words [B] for dropout."""
        padding = -self.w3.in_features % WIDTH_MULTIPLE
        if not padding:
            gate, value = self.w12(h).chunk(2, dim=-1)
            out: Tensor = self.w3(self.dropout(F.silu(gate) * value, words))
            return out
        w12 = F.pad(self.w12.weight.unflatten(0, (2, -1)), (0, 0, 0, padding)).flatten(0, 1)
        b12 = F.pad(self.w12.bias.unflatten(0, (2, -1)), (0, padding)).flatten()
        gate, value = linear(h, w12, b12).chunk(2, dim=-1)
        w3 = F.pad(self.w3.weight, (0, padding))
        return linear(self.dropout(F.silu(gate) * value, words), w3, self.w3.bias)


def modulation(width: int, count: int) -> nn.Sequential:
    """adaLN: the condition to `count` vectors of shift, scale or gate."""
    return nn.Sequential(nn.SiLU(), Linear(width, count * width))


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """h (1 + scale) + shift, one shift and scale for each image; h [B, L, D], others [B, D]."""
    return h * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """adaLN-Zero Transformer block: h + gate f(norm(h) (1 + scale) + shift), twice."""

    def __init__(self, width: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, num_heads, dropout)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, hidden, dropout)
        self.adaLN_modulation = modulation(width, 6)

    def forward(
        self, h: Tensor, c: Tensor, cos: Tensor, sin: Tensor, words: Tensor | None = None
    ) -> Tensor:
        """h [B, L, D], c [B, D], words [B] for dropout -> [B, L, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        attended = self.attn(modulate(self.norm1(h), shift1, scale1), cos, sin, words)
        h = h + gate1[:, None] * attended
        others = None if words is None else random.derive(words, 1)
        hidden = self.mlp(modulate(self.norm2(h), shift2, scale2), others)
        out: Tensor = h + gate2[:, None] * hidden
        return out


class FinalLayer(nn.Module):
    """Tokens to the pixels of their patches."""

    def __init__(self, width: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = Linear(width, patch_size * patch_size * out_channels)
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """h [B, L, D], c [B, D] -> [B, L, P P C]."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        patches: Tensor = self.linear(modulate(self.norm_final(h), shift, scale))
        return patches
