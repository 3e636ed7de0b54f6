"""How a network begins, where it drops out, and what it takes besides photographs."""

import pytest
import torch
from torch import nn

from jitmodel import random
from jitmodel.config import FlowConfig, ModelConfig, OptimizerConfig
from jitmodel.layers import Dropout
from jitmodel.model import JiT
from jitmodel.random import normal
from jitmodel.state import Batch, TrainState

CONFIG = ModelConfig(
    image_size=64, patch_size=8, hidden_size=192, depth=8, num_heads=4, bottleneck_dim=48,
    in_context_len=32, in_context_start=2, num_classes=100,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> JiT:
    return JiT(CONFIG, generator=torch.Generator().manual_seed(0))


def test_matrices_begin_xavier_uniform_and_biases_at_zero(model: JiT):
    zero = {"final_layer.linear"} | {n for n, _ in model.named_modules() if "adaLN" in n}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        if module.bias is not None:
            assert not module.bias.any(), name
        if name in zero or name.startswith("t_embedder"):
            continue
        rows, columns = module.weight.flatten(1).shape  # patch maps count as their matrices
        bound = (6 / (rows + columns)) ** 0.5
        assert module.weight.abs().max() <= bound, name
        assert module.weight.abs().max() > 0.95 * bound, name
        torch.testing.assert_close(module.weight.std().item(), bound / 3**0.5, rtol=0.05, atol=0)


def test_modulation_and_output_begin_at_zero_and_norms_at_one(model: JiT):
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            assert not parameter.any(), name
        if "norm" in name:
            assert (parameter == 1).all(), name


@pytest.mark.parametrize(
    "name",
    [
        "y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight",
        "in_context_posemb",
    ],
)  # fmt: skip
def test_tables_and_the_time_embedding_begin_normal_with_deviation_0_02(model: JiT, name: str):
    values = model.get_parameter(name)

    torch.testing.assert_close(values.std().item(), 0.02, rtol=0.05, atol=0)
    assert values.mean().abs() < 0.001
    assert values.abs().max() > 0.05, "a normal distribution has tails"


def test_dropout_is_in_both_branches_of_the_middle_half_and_nowhere_else():
    model = JiT(CONFIG.model_copy(update={"dropout": 0.2}))

    rates = [
        {m.probability for m in block.modules() if isinstance(m, Dropout)} for block in model.blocks
    ]

    assert rates == [{0.0}] * 2 + [{0.2}] * 4 + [{0.0}] * 2
    block = model.blocks[3].train()
    h = torch.randn(1, 5, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
    cos, sin = model.rotary_cos[:5], model.rotary_sin[:5]
    for branch in (lambda: block.attn(h, cos, sin), lambda: block.mlp(h)):
        assert not torch.equal(branch(), branch())
    block.eval()
    for branch in (lambda: block.attn(h, cos, sin), lambda: block.mlp(h)):
        torch.testing.assert_close(branch(), branch(), rtol=0, atol=0)


def test_a_mask_is_a_function_of_the_word_of_its_image_and_keeps_the_mean():
    dropout = Dropout(0.2).train()
    words = random.words(7, torch.arange(64), "dropout")
    h = torch.ones(64, 40, 96)

    dropped = dropout(h, words)

    assert set(dropped.unique().tolist()) == {0.0, 1.25}
    torch.testing.assert_close(dropped.mean().item(), 1.0, rtol=0.01, atol=0)
    for dims in ((1, 2), (0, 2), (0, 1)):  # no image, token or channel has more than its share
        assert (dropped.mean(dims) - 1).abs().max() < 0.1
    kept = (dropped > 0).float().flatten(1) - 0.8
    correlation = (kept @ kept.T / kept.shape[1] / 0.16).fill_diagonal_(0)
    assert correlation.abs().max() < 0.1
    torch.testing.assert_close(dropout(h[5:9], words[5:9]), dropped[5:9], rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_may_have_any_number_of_channels(channels: int):
    config = CONFIG.model_copy(update={"in_channels": channels, "depth": 3})
    state = TrainState(
        JiT(config), OptimizerConfig(ema_decays=(0.9,)), total_images=100, precision="fp32"
    )
    pixels = torch.randint(0, 256, (2, channels, 64, 64), dtype=torch.uint8)

    result = state.step([Batch(pixels, torch.tensor([0, 1]), torch.arange(2))])

    assert result.loss.isfinite()
    net = state.model(torch.zeros(pixels.shape), torch.zeros(2), torch.zeros(2).long())
    assert net.shape == pixels.shape


def test_training_corrupts_with_noise_of_the_configs_scale(monkeypatch: pytest.MonkeyPatch):
    seen = []
    config, index = CONFIG.model_copy(update={"depth": 3}), torch.arange(2)
    state = TrainState(
        JiT(config, FlowConfig(noise_scale=3.0)), OptimizerConfig(ema_decays=(0.9,)),
        total_images=100, precision="fp32", flip=False,
    )  # fmt: skip
    state.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    pixels = torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)  # x = 1

    state.losses(Batch(pixels, torch.tensor([0, 1]), index))

    ((z, t, _, _),) = seen
    t = t[:, None, None, None]
    torch.testing.assert_close(z, t + (1 - t) * 3.0 * normal(0, index, (3, 64, 64), "noise"))
