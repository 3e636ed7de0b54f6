"""SwiGLU's padding: computed with, never stored."""

import pytest
import torch
import torch.nn.functional as F

from jitmodel.config import ModelConfig, OptimizerConfig
from jitmodel.layers import SwiGLU
from jitmodel.model import JiT
from jitmodel.state import Batch, TrainState

WIDTH, HIDDEN = 32, 85  # 85 = int(4 * 32 * 2 / 3), padded to 128 inside


def plain(mlp: SwiGLU, h: torch.Tensor) -> torch.Tensor:
    """The formula at the true width."""
    gate, value = F.linear(h, mlp.w12.weight, mlp.w12.bias).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * value, mlp.w3.weight, mlp.w3.bias)


@pytest.mark.parametrize("hidden", [HIDDEN, 1, 63, 64, 128])
def test_the_padded_mlp_has_the_outputs_and_gradients_of_its_true_width(hidden):
    torch.manual_seed(0)
    mlp = SwiGLU(WIDTH, hidden, 0.0).double()
    h = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    inputs, direction = (h, *mlp.parameters()), torch.randn(2, 5, WIDTH, dtype=torch.float64)

    out, expected = mlp(h), plain(mlp, h)

    torch.testing.assert_close(out, expected)
    for found, wanted in zip(
        torch.autograd.grad((out * direction).sum(), inputs),
        torch.autograd.grad((expected * direction).sum(), inputs),
        strict=True,
    ):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found, wanted)


def test_products_run_at_a_multiple_of_64(monkeypatch):
    widths = []
    linear = F.linear

    def listening(h, weight, bias=None):
        widths.append(tuple(weight.shape))
        return linear(h, weight, bias)

    monkeypatch.setattr(F, "linear", listening)
    SwiGLU(WIDTH, HIDDEN, 0.0)(torch.randn(1, 2, WIDTH))

    assert widths == [(2 * 128, WIDTH), (WIDTH, 128)]


def test_weights_optimizer_and_averages_of_a_run_keep_the_true_width():
    config = ModelConfig(
        image_size=16, patch_size=4, hidden_size=WIDTH, depth=2, num_heads=2, bottleneck_dim=8,
        in_context_len=4, in_context_start=1, num_classes=10,
    )  # fmt: skip
    assert config.mlp_dim == HIDDEN
    state = TrainState(JiT(config), OptimizerConfig(ema_decays=(0.9,)), total_images=100)
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    state.step([Batch(pixels, torch.arange(4), torch.arange(4))])

    saved = state.state_dict()

    shapes = {"w12.weight": (170, 32), "w12.bias": (170,), "w3.weight": (32, 85), "w3.bias": (32,)}
    for name, shape in shapes.items():
        name = f"blocks.1.mlp.{name}"
        moments = saved["optimizer"]["state"][name]
        for tensor in (saved["model"][name], saved["ema"]["0.9"][name], moments["exp_avg_sq"]):
            assert tensor.shape == shape
