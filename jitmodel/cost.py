"""What a model costs, by arithmetic: parameters, operations and memory of a training step.

Without torch, so that a plan is printed at once. A multiply-add counts as two operations; the
paper's "Gflops" count it as one (25 for B/16, where this module says 50 GFLOP).
"""

from __future__ import annotations

from jitmodel.config import ModelConfig

PEAK_BF16 = {
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "H20": 148e12, "A100": 312e12, "L40S": 362e12,
    "L4": 121e12, "A10G": 70e12, "RTX 4090": 165e12,
}  # fmt: skip
"""Dense bf16 operations a second of a device, from the makers' data sheets, by a part of the name
that torch.cuda.get_device_name gives."""
TIME_FREQUENCIES = 256


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations a second of a device; None if it is not in the table."""
    for part, peak in PEAK_BF16.items():
        if part in device_name:
            return peak
    return None


def block_parameters(config: ModelConfig) -> int:
    """Parameters of one block."""
    D, M = config.hidden_size, config.mlp_dim
    attention = 3 * D * D + 3 * D + 2 * config.head_dim + D * D + D
    mlp = 2 * M * D + 2 * M + M * D + D
    return 2 * D + attention + mlp + 6 * D * D + 6 * D


def root_parameters(config: ModelConfig) -> int:
    """Parameters outside of the blocks: embeddings and the final layer."""
    D, patch = config.hidden_size, config.in_channels * config.patch_size**2
    time = TIME_FREQUENCIES * D + D + D * D + D
    patches = patch * config.bottleneck_dim + config.bottleneck_dim * D + D
    tables = (config.num_classes + 1 + config.in_context_len) * D
    final = D + D * patch + patch + 2 * D * D + 2 * D
    return time + patches + tables + final


def num_parameters(config: ModelConfig) -> int:
    """Trained parameters of the network."""
    return config.depth * block_parameters(config) + root_parameters(config)


def tokens(config: ModelConfig) -> list[int]:
    """Length of the sequence in each block."""
    L, K = config.grid_size**2, config.in_context_len
    return [L + (K if i >= config.in_context_start else 0) for i in range(config.depth)]


def forward_flops(config: ModelConfig) -> int:
    """Operations of one forward pass for one image: its matrix products, two for a multiply-add."""
    D, M, patch = config.hidden_size, config.mlp_dim, config.in_channels * config.patch_size**2
    macs = sum(T * (4 * D * D + 3 * D * M) + 2 * T * T * D + 6 * D * D for T in tokens(config))
    macs += config.grid_size**2 * (patch * config.bottleneck_dim + config.bottleneck_dim * D)
    macs += config.grid_size**2 * D * patch + 2 * D * D + TIME_FREQUENCIES * D + D * D
    return 2 * macs


def train_flops(config: ModelConfig) -> int:
    """Operations of one image in training: forward, and twice that backward.

    What activation checkpointing computes again is no use and does not count.
    """
    return 3 * forward_flops(config)
