"""Floating-point operations of the network, counted from its shape. Two for a multiply-add.

The paper's "Gflops" (25, 88, 182, 383 for B, L, H, G /16) are multiply-adds; here they are twice
that. Counted are matrix products, which is what peak rates of devices are about; norms, rotary
angles and activations are left out.
"""

from __future__ import annotations

from jitmodel.config import ModelConfig

BACKWARD = 2
"""A backward pass multiplies twice as much as the forward pass."""


def forward_flops(model: ModelConfig) -> int:
    """FLOPs of one image through the network."""
    D, L = model.hidden_size, model.grid_size**2
    patch = model.patch_size**2 * model.in_channels
    total = L * model.bottleneck_dim * (patch + D)  # patch embedding
    total += 256 * D + D * D  # time embedding
    for i in range(model.depth):
        tokens = L + (model.in_context_len if i >= model.in_context_start else 0)
        total += tokens * (4 * D * D + 3 * D * model.mlp_dim)  # qkv, projection, SwiGLU
        total += 2 * tokens * tokens * D  # attention: scores and weighted sum
        total += 6 * D * D  # adaLN
    total += L * D * patch + 2 * D * D  # final layer
    return 2 * total


def train_flops(model: ModelConfig) -> int:
    """FLOPs of one image in a training step; recomputed activations do not count."""
    return (1 + BACKWARD) * forward_flops(model)
