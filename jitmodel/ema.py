"""Exponential moving averages of the weights, several decays side by side.

Works on whole and on sharded parameters: an average has the placement of its parameter, and the
update touches local shards only. `foreach` turns thousands of small kernels into a handful.
Averages may live in main memory: they are then updated by a thread while the next step runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The shard of each tensor that this process holds; the tensor itself if it is whole."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


class EMA:
    """average <- decay average + (1 - decay) weight, after every optimizer step.

    Args:
        model: the model whose parameters are followed; build the EMA after sharding it.
        decays: one average for each.
        on_cpu: keep the averages in main memory, and their work out of the training step.
    """

    def __init__(self, model: nn.Module, decays: Iterable[float], *, on_cpu: bool = False) -> None:
        self.parameters = dict(model.named_parameters())
        device = torch.device("cpu") if on_cpu else None
        self._averages: dict[float, dict[str, Tensor]] = {
            decay: {n: p.detach().to(device, copy=True) for n, p in self.parameters.items()}
            for decay in decays
        }
        self._thread = ThreadPoolExecutor(1, "jit-ema") if on_cpu else None
        self._pending: Future[None] | None = None
        self._copies = [_pinned(p) for p in local(self.parameters.values())] if on_cpu else []

    @property
    def averages(self) -> dict[float, dict[str, Tensor]]:
        """decay -> name -> average, all updates done."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None
        return self._averages

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards the present weights."""
        averages = self.averages
        weights = local(p.detach() for p in self.parameters.values())
        if self._thread is None:
            _lerp(averages, weights)
            return
        for copy, weight in zip(self._copies, weights, strict=True):
            copy.copy_(weight, non_blocking=True)
        if weights[0].device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self._pending = self._thread.submit(_lerp, averages, self._copies)

    def state_dict(self) -> dict[str, Any]:
        """decay (as text) -> name -> tensor."""
        return {f"{decay}": dict(average) for decay, average in self.averages.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy averages in.

        Raises:
            ValueError: the decays differ.
        """
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"the checkpoint has EMAs {sorted(state)}, the run {sorted(self.state_dict())}"
            )
        for decay, average in self.averages.items():
            for name, tensor in average.items():
                tensor.copy_(state[f"{decay}"][name])


@torch.no_grad()
def _lerp(averages: dict[float, dict[str, Tensor]], weights: list[Tensor]) -> None:
    for decay, average in averages.items():
        torch._foreach_lerp_(local(average.values()), weights, 1 - decay)


def _pinned(like: Tensor) -> Tensor:
    """Memory of the host for a copy, which a GPU can write to by itself."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
