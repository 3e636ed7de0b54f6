"""How a model is made to fit and made fast: recompute, compile, shard - in this order.

Each step wraps what the one before made: checkpointing changes what a block's backward pass does,
compile fuses it, and fully_shard (FSDP2) gathers its weights around it. A model is built on the
meta device, goes through here, and is materialised afterwards, so that a process never holds more
than its shards:

    with torch.device("meta"):
        model = JiT(config)
    parallelize(model, device_mesh("cuda", world_size))
    model.to_empty(device="cuda")
    model.init_weights(generator)
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from jitmodel.model import JiT

Precision = Literal["fp32", "bf16"]
Checkpointing = Literal["none", "selective", "full"]

_aten = torch.ops.aten
KEPT = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]
"""What selective checkpointing keeps: results of GEMMs and of fused attention."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_INT_MAX = 2**31 - 1


def tune_cpu(threads: int) -> None:
    """Make this process ready to compute on a CPU: its threads, and memory that it keeps.

    glibc gives large blocks back to the kernel when they are freed. Activations are allocated and
    freed in every step, so each step gets them back page by page and zeroed: 0.3 to 0.9 s of a 2 s
    step of B/16 at 8 images, depending on how the heap happens to lie. Other C libraries have no
    mallopt, and nothing changes there.
    """
    torch.set_num_threads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
        mallopt(_M_TRIM_THRESHOLD, _INT_MAX)


def device_mesh(device_type: str, world_size: int, shard_size: int = 0) -> DeviceMesh | None:
    """The processes to shard over; None for a single one.

    Args:
        device_type: "cuda" or "cpu".
        world_size: number of processes; torch.distributed is initialised.
        shard_size: neighbouring ranks that share one copy of the model, such as those of a node;
            the copies are replicas (HSDP). 0 makes one copy of all processes.

    Raises:
        ValueError: shard_size does not divide world_size.
    """
    if world_size == 1:
        return None
    if not shard_size or shard_size == world_size:
        return init_device_mesh(device_type, (world_size,))
    if world_size % shard_size:
        raise ValueError(
            f"shard_size {shard_size} does not divide {world_size}, the number of processes"
        )
    return init_device_mesh(
        device_type,
        (world_size // shard_size, shard_size),
        mesh_dim_names=("replicate", "shard"),
    )


def parallelize(
    model: JiT,
    mesh: DeviceMesh | None = None,
    *,
    checkpointing: Checkpointing = "none",
    compile: bool = False,
    precision: Precision = "fp32",
    reshard_after_forward: bool = True,
) -> JiT:
    """Apply the recipe to a model, in place.

    Args:
        model: whole, or on the meta device (then materialise it after this).
        mesh: what device_mesh gave; None keeps the model whole.
        checkpointing: what each block keeps for its backward pass: everything, the results of its
            GEMMs ("selective"), or its input ("full").
        compile: torch.compile each block; one compilation serves all of them.
        precision: type in which the blocks' weights are gathered. Gradients are reduced, and
            weights kept, in fp32. What is outside of the blocks is gathered in fp32: it is small,
            and rounding time and label would change what every block is told.
        reshard_after_forward: free gathered weights between forward and backward.
    """
    # Inputs are not cast: time and the rotary angles need fp32, and autocast casts the rest.
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    compute = torch.bfloat16 if precision == "bf16" else torch.float32
    halved = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        if checkpointing != "none":
            recompute_in_backward(block, selective=checkpointing == "selective")
        if compile:
            block.compile()
        if mesh is not None:
            fully_shard(
                block, mesh=mesh, mp_policy=halved, reshard_after_forward=reshard_after_forward
            )
    if mesh is not None:
        fully_shard(model, mesh=mesh, mp_policy=whole)
    return model


def recompute_in_backward(block: nn.Module, *, selective: bool) -> None:
    """Keep a block's inputs only, or also what KEPT names; state_dict does not change."""
    forward = block.forward
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT)

    def recomputed(*inputs: Tensor) -> Any:
        return checkpoint(forward, *inputs, **options)

    block.forward = recomputed


def store_as_computed(model: JiT, precision: Precision) -> JiT:
    """Keep the weights that autocast would cast at every use in the compute type, in place.

    For drawing only: every bit of the output stays, a network evaluation reads half of the bytes
    and casts nothing. Norms, tables and embeddings are used in fp32 and stay so.
    """
    if precision == "bf16":
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(torch.bfloat16)
    return model


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """bf16 autocast as the paper trains, or nothing for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
