"""JiT: a plain Vision Transformer on raw pixel patches (arXiv 2511.13720, Sec. 4, App. A).

state_dict and load_state_dict use the names of the public checkpoints; their prefix `net.` is
accepted too. The model is built with its initial weights unless it lives on the meta device; then
shard it if it shall be (jitmodel/parallel.py), materialise it and call init_weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from jitmodel import random
from jitmodel.config import FlowConfig, ModelConfig
from jitmodel.layers import (
    Block,
    FinalLayer,
    LabelEmbedding,
    PatchEmbedding,
    RMSNorm,
    TimeEmbedding,
    rotary_tables,
    sincos_positions,
)

EMBEDDING_STD = 0.02


class JiT(nn.Module):
    """The network: noisy image, time and class to a prediction in `flow.prediction` space.

    Args:
        config: its shape.
        flow: what its output means; sampling reads it. Defaults to the paper's x-prediction.
        generator: source of the initial weights; torch's global one by default.
    """

    pos_embed: Tensor
    rotary_cos: Tensor
    rotary_sin: Tensor
    in_context_posemb: nn.Parameter

    def __init__(
        self,
        config: ModelConfig,
        flow: FlowConfig | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.flow = flow or FlowConfig()
        D = config.hidden_size
        self.t_embedder = TimeEmbedding(D)
        self.y_embedder = LabelEmbedding(config.num_classes, D)
        self.x_embedder = PatchEmbedding(
            config.patch_size, config.in_channels, config.bottleneck_dim, D
        )
        self.register_buffer("pos_embed", torch.empty(1, config.grid_size**2, D))
        if config.in_context_len:
            self.in_context_posemb = nn.Parameter(torch.empty(1, config.in_context_len, D))
        self.blocks = nn.ModuleList(
            Block(
                D,
                config.num_heads,
                config.mlp_dim,
                config.dropout if config.has_dropout(i) else 0.0,
            )
            for i in range(config.depth)
        )
        self.final_layer = FinalLayer(D, config.patch_size, config.in_channels)
        tables = torch.empty(config.in_context_len + config.grid_size**2, config.head_dim // 2)
        self.register_buffer("rotary_cos", tables, persistent=False)
        self.register_buffer("rotary_sin", tables.clone(), persistent=False)
        self.register_load_state_dict_pre_hook(_drop_public_prefix)  # type: ignore[no-untyped-call]
        if self.pos_embed.device.type != "meta":
            self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initial weights and tables (App. A), drawn from `generator` in the order of modules.

        Every process draws every parameter on the CPU, one at a time, and keeps its shard: the
        weights are the same for any number of processes and any device.
        """

        def xavier(whole: Tensor) -> Tensor:
            return nn.init.xavier_uniform_(whole.flatten(1), generator=generator)

        def normal(whole: Tensor) -> Tensor:
            return nn.init.normal_(whole, std=EMBEDDING_STD, generator=generator)

        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                _fill(module.weight, xavier)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                _fill(module.weight, normal)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for name, parameter in self.named_parameters():
            if name.startswith("t_embedder") and name.endswith("weight"):
                _fill(parameter, normal)
            if name == "in_context_posemb":
                _fill(parameter, normal)
            if "adaLN_modulation" in name or name == "final_layer.linear.weight":
                nn.init.zeros_(parameter)
        self.init_tables()

    @torch.no_grad()
    def init_tables(self) -> None:
        """Fill the fixed tables: position embedding and rotary angles."""
        config = self.config
        self.pos_embed.copy_(sincos_positions(config.hidden_size, config.grid_size))
        cos, sin = rotary_tables(config.head_dim, config.grid_size, config.in_context_len)
        self.rotary_cos.copy_(cos)
        self.rotary_sin.copy_(sin)

    def forward(self, z: Tensor, t: Tensor, y: Tensor, words: Tensor | None = None) -> Tensor:
        """One evaluation of the network.

        Args:
            z: noisy images, [B, C, H, W].
            t: time of each image in 0..1, [B].
            y: class of each image, int64 [B]; num_classes means "no class".
            words: 32-bit word of each image that decides its dropout masks while training, int64
                [B]; None draws them from torch's generator.

        Returns:
            The prediction, [B, C, H, W].

        Raises:
            ValueError: z is not of the model's size.
        """
        config, K = self.config, self.config.in_context_len
        if z.shape[1:] != (config.in_channels, config.image_size, config.image_size):
            raise ValueError(
                f"z has shape {tuple(z.shape)}, the model needs "
                f"[B, {config.in_channels}, {config.image_size}, {config.image_size}]"
            )
        y_embedding = self.y_embedder(y)
        c = self.t_embedder(t) + y_embedding
        h = self.x_embedder(z.to(self.pos_embed.dtype)) + self.pos_embed
        cos, sin = self.rotary_cos[K:], self.rotary_sin[K:]
        for i, block in enumerate(self.blocks):
            if K and i == config.in_context_start:
                tokens = y_embedding[:, None] + self.in_context_posemb  # [B, K, D]
                h = torch.cat((tokens.to(h.dtype), h), dim=1)
                cos, sin = self.rotary_cos, self.rotary_sin
            dropped = None
            if words is not None and config.has_dropout(i):
                dropped = random.derive(words, 2 * i)
            h = block(h, c, cos, sin, dropped)
        return self.unpatchify(self.final_layer(h[:, K:], c))

    def unpatchify(self, patches: Tensor) -> Tensor:
        """[B, L, P P C] with order (row, column, channel) inside a patch -> [B, C, H, W]."""
        G, P = self.config.grid_size, self.config.patch_size
        grid = patches.unflatten(2, (P, P, -1)).unflatten(1, (G, G))  # [B, G, G, P, P, C]
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.config.in_channels, G * P, G * P)


def _fill(parameter: Tensor, draw: Callable[[Tensor], Tensor]) -> None:
    """Give a parameter, or this process's shard of it, the values of a whole one."""
    whole = draw(torch.empty(parameter.shape)).reshape(parameter.shape)
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        whole = distribute_tensor(whole, mesh, placements, src_data_rank=None)  # all drew the same
    parameter.copy_(whole)


def _drop_public_prefix(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The public checkpoints put `net.` before every name."""
    for name in [name for name in state if name.startswith(f"{prefix}net.")]:
        state[prefix + name.removeprefix(f"{prefix}net.")] = state.pop(name)
