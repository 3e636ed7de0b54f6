"""How a model is made to fit and made fast: recompute, compile, shard - in this order.

Each step wraps what the one before made: checkpointing changes what a block's backward pass does,
compile fuses it, and fully_shard (FSDP2) gathers its weights around it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from jitmodel.model import JiT

Precision = Literal["fp32", "bf16"]


def parallelize(
    model: JiT,
    mesh: DeviceMesh | None = None,
    *,
    recompute: bool = False,
    compile: bool = False,
    reshard_after_forward: bool = True,
) -> JiT:
    """Apply the recipe to a model, in place.

    Args:
        model: whole, or on the meta device (then materialise it after this).
        mesh: one-dimensional mesh of the processes to shard over; None keeps it whole.
        recompute: recompute each block in the backward pass instead of keeping activations.
        compile: torch.compile each block; one compilation serves all of them.
        reshard_after_forward: free gathered weights between forward and backward.
    """
    for block in model.blocks:
        if recompute:
            recompute_in_backward(block)
        if compile:
            block.compile()
        if mesh is not None:
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    return model


def recompute_in_backward(block: nn.Module) -> None:
    """Keep a block's inputs only; names in state_dict stay as they are."""
    forward = block.forward

    def recomputed(*inputs: Tensor) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False)

    block.forward = recomputed


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """bf16 autocast as the paper trains, or nothing for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
