"""The network of DINOv2 (Oquab et al., arXiv 2304.07193), as far as its class token needs it.

Names and shapes of the state dict are those of the public dinov2_vit{s,b,l,g}14_pretrain.pth. Drop
path and masks are left out: they act in training only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 14
LETTERS = {384: "s", 768: "b", 1024: "l", 1536: "g"}
"""Size by width."""
HEAD_WIDTH = 64


class Dinov2(nn.Module):
    """Normalised pixels -> class token."""

    def __init__(self, width: int, depth: int, grid: int, gated: bool) -> None:
        super().__init__()
        self.width, self.grid = width, grid
        self.letter = LETTERS[width]
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid**2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.blocks = nn.ModuleList(Block(width, gated) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Class token [B, D] of images [B, 3, H, W], H and W multiples of 14."""
        tokens = self.patch_embed["proj"](x)
        place = self.places(tokens.shape[2], tokens.shape[3])
        tokens = torch.cat((self.cls_token.expand(len(x), -1, -1), tokens.flatten(2).mT), 1) + place
        for block in self.blocks:
            tokens = block(tokens)
        found: Tensor = self.norm(tokens[:, 0])
        return found

    def places(self, rows: int, columns: int) -> Tensor:
        """Position embedding of another grid; the 0.1 is the authors' way to the right size."""
        if rows == columns == self.grid:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        factor = ((rows + 0.1) / self.grid, (columns + 0.1) / self.grid)
        scaled = F.interpolate(grid, scale_factor=factor, mode="bicubic", antialias=False)
        assert scaled.shape[2:] == (rows, columns), scaled.shape
        return torch.cat((self.pos_embed[:, :1], scaled.flatten(2).mT), 1)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and scaled channel by channel."""

    def __init__(self, width: int, gated: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.ls1 = nn.ParameterDict({"gamma": torch.empty(width)})
        self.ls2 = nn.ParameterDict({"gamma": torch.empty(width)})
        self.gated = gated
        if gated:
            hidden = (4 * width * 2 // 3 + 7) // 8 * 8
            first, second = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)
            self.mlp = nn.ModuleDict({"w12": first, "w3": second})
        else:
            first, second = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.mlp = nn.ModuleDict({"fc1": first, "fc2": second})

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, L, D] -> tokens."""
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, -1, HEAD_WIDTH)).unbind(2)
        mixed = F.scaled_dot_product_attention(*(h.transpose(1, 2) for h in (q, k, v)))
        x = x + self.ls1["gamma"] * self.attn["proj"](mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        if self.gated:
            gate, value = self.mlp["w12"](h).chunk(2, -1)
            h = self.mlp["w3"](F.silu(gate) * value)
        else:
            h = self.mlp["fc2"](F.gelu(self.mlp["fc1"](h)))
        return x + self.ls2["gamma"] * h


def load_dinov2(state: dict[str, Tensor]) -> Dinov2:
    """The network whose weights these are.

    Raises:
        LookupError, RuntimeError, ValueError: they are not those of a DINOv2.
    """
    width = state["cls_token"].shape[-1]
    if width not in LETTERS:
        raise ValueError(f"cls_token has width {width}; DINOv2 has one of {list(LETTERS)}")
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    grid = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    with torch.device("meta"):
        network = Dinov2(width, depth, grid, gated="blocks.0.mlp.w12.weight" in state)
    network.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return network
