"""What a model costs, by arithmetic: parameters, operations and memory of a training step.

Without torch, so that a plan is printed at once. A multiply-add counts as two operations; the
paper's "Gflops" count it as one (25 for B/16, where this module says 50 GFLOP).
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from jitmodel.config import ModelConfig

PEAK_BF16 = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "H20": 148e12,
    "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "RTX 4090": 165e12,
}  # fmt: skip
"""Dense bf16 operations a second of a device, from the makers' data sheets, by whole words
of the name that torch.cuda.get_device_name gives."""
TIME_FREQUENCIES = 256
WIDTH_MULTIPLE = 64
"""SwiGLU computes with a hidden width that is a multiple of this."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations a second of a device; None if it is not in the table."""
    for part, peak in PEAK_BF16.items():
        if re.search(rf"\b{part}\b", device_name):
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


class Memory(NamedTuple):
    """Bytes of one process in a training step."""

    weights: int
    """fp32 master weights, its shard."""
    gradients: int
    """fp32, its shard."""
    optimizer: int
    """AdamW's two moments, fp32, its shard."""
    averages: int
    """EMAs, fp32, its shard; 0 if they are in main memory."""
    gathered: int
    """What is whole for a while: weights in the compute type, gradients on their way to shards."""
    activations: int
    """What the forward pass of a micro-batch leaves for the backward pass."""
    accumulates: bool
    """Whether gradients of earlier micro-batches are there while activations are."""
    host: int
    """In main memory: the copy of weights, AdamW and EMAs that a checkpoint is stored from; EMAs
    that are kept there, and the weights they follow. On a CPU it adds to the peak."""

    @property
    def peak(self) -> int:
        """Most bytes at one moment: without accumulation gradients grow as activations go."""
        both = self.activations, self.gradients
        moving = sum(both) if self.accumulates else max(both)
        return self.weights + self.optimizer + self.averages + self.gathered + moving


def memory(
    model: ModelConfig,
    *,
    micro_batch: int,
    accumulates: bool = False,
    shards: int = 1,
    num_emas: int = 3,
    ema_on_cpu: bool = False,
    precision: Literal["fp32", "bf16"] = "bf16",
    checkpointing: Literal["none", "selective", "full"] = "none",
    compile: bool = True,
    reshard_after_forward: bool = True,
    fused_attention: bool = True,
) -> Memory:
    """Memory of a training step, without what libraries and drivers take.

    The terms of an activation were counted from the tensors that autograd saves
    (tests/jitmodel/test_cost.py compares the sum with measured peaks on a CPU).

    Args:
        model: shape of the network.
        micro_batch: images in one forward pass.
        accumulates: whether a step has more than one micro-batch.
        shards: processes that share one copy of the model.
        num_emas: averages that are kept.
        ema_on_cpu: whether they are in main memory.
        precision: compute type.
        checkpointing: what a block keeps.
        compile: whether blocks are compiled, which fuses what lies between products.
        reshard_after_forward: whether a block's weights are freed between forward and backward.
        fused_attention: False for the CPU's bf16 attention, which keeps its score matrices.
    """
    D, size, depth = model.hidden_size, 2 if precision == "bf16" else 4, model.depth
    padding = -model.mlp_dim % WIDTH_MULTIPLE
    M, block = model.mlp_dim + padding, block_parameters(model)

    # Bytes of a token in a block; 4 D is the fp32 residual stream at its input.
    scores = 0.0 if fused_attention else (4.0 if compile else 6.0) * model.num_heads
    lean = 0 if fused_attention or compile else 3 * size  # q, k and v as the fused kernel has them
    whole = (
        (4 + 11 * size) * D + 3 * size * M
        if compile
        else (40 + 11 * size - lean) * D + (4 * size * M)
    )
    kept = {"none": whole, "selective": (4 + 6 * size) * D + 2 * size * M, "full": 4 * D}
    if not fused_attention:
        kept["selective"] -= size * D  # its products are computed again
    every = checkpointing == "none"
    masks = D + M if every and model.dropout else 0
    held = sum(
        T * (kept[checkpointing] + (scores * T if every else 0) + masks * model.has_dropout(i))
        for i, T in enumerate(tokens(model))
    )
    if not every:  # one block is whole again in the backward pass
        held += max(T * (whole + scores * T) for T in tokens(model))
    # Outside of the blocks: final layer, and pixels as x, e, z, prediction, and parts of the loss.
    image = model.in_channels * model.image_size**2
    held += model.grid_size**2 * D * (8 + 2 * size) + image * (4 * 8 + 2 * size)

    # Weights in the compute type, if autograd keeps them from forward to backward: all that were
    # cast, or those that the forward pass rearranges.
    if shards == 1 and precision == "bf16":
        copied = 10 * D * D + 3 * D * M
    else:
        copied = 3 * D * D + (3 * D * M if padding else 0)
    gathered = size * copied * (depth if every else 1)
    if shards > 1:
        # The block at work, the next one, and the buffer that one arrives in; or all of them.
        at_once = 3 if reshard_after_forward else depth + 1
        gathered += size * block * at_once + 4 * root_parameters(model)
        gathered += (size + 4) * block  # a block's gradient, and its fp32 copy to be reduced
    share = -(-num_parameters(model) // shards)
    return Memory(
        weights=4 * share,
        gradients=4 * share,
        optimizer=8 * share,
        averages=0 if ema_on_cpu else 4 * num_emas * share,
        gathered=gathered,
        activations=round(micro_batch * held),
        accumulates=accumulates,
        host=(12 + 4 * num_emas + (4 * num_emas + 4 if ema_on_cpu else 0)) * share,
    )
