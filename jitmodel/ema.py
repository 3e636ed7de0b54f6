"""Exponential moving averages of the weights, several decays side by side.

Works on whole and on sharded parameters: an average has the placement of its parameter, and the
update touches local shards only. `foreach` turns thousands of small kernels into a handful.
"""

from __future__ import annotations

from collections.abc import Iterable
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
    """

    def __init__(self, model: nn.Module, decays: Iterable[float]) -> None:
        self.parameters = dict(model.named_parameters())
        self.averages: dict[float, dict[str, Tensor]] = {
            decay: {name: p.detach().clone() for name, p in self.parameters.items()}
            for decay in decays
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards the present weights."""
        weights = local(p.detach() for p in self.parameters.values())
        for decay, average in self.averages.items():
            torch._foreach_lerp_(local(average.values()), weights, 1 - decay)

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
