"""One optimizer step, and everything that a run carries from step to step."""

import math

import pytest
import torch

from jitmodel.config import FlowConfig, ModelConfig, OptimizerConfig
from jitmodel.model import JiT
from jitmodel.state import Batch, TrainState, augment, learning_rate

SMALL = ModelConfig(
    image_size=16, patch_size=4, hidden_size=32, depth=4, num_heads=2, bottleneck_dim=8,
    in_context_len=4, in_context_start=1, num_classes=10,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_images=8, ema_decays=(0.5, 0.9))


def new_state(config=SMALL, **options):
    model = JiT(config, generator=torch.Generator().manual_seed(0))
    return TrainState(model, OPTIMIZER, total_images=1000, precision="fp32", **options)


def images(first, count):
    index = torch.arange(first, first + count)
    pixels = torch.randint(
        0, 256, (1000, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
    )
    return Batch(pixels[index], index % 10, index)


def weights(state):
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_accumulation_changes_neither_the_loss_nor_the_step(dropout):
    config = SMALL.model_copy(update={"dropout": dropout})
    whole, split = new_state(config), new_state(config)
    for first in (0, 8, 16):
        a = whole.step([images(first, 8)])
        b = split.step([images(first, 2), images(first + 2, 5), images(first + 7, 1)])
        assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-6)
        torch.testing.assert_close(a.times, b.times)
    torch.testing.assert_close(weights(whole), weights(split), rtol=1e-4, atol=1e-6)
    assert whole.images_seen == split.images_seen == 24


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_restored_state_goes_on_to_the_bit(dropout):
    config = SMALL.model_copy(update={"dropout": dropout})
    unbroken = new_state(config)
    for first in range(0, 48, 8):
        unbroken.step([images(first, 8)])

    first_half = new_state(config)
    for first in range(0, 24, 8):
        first_half.step([images(first, 8)])
    saved = first_half.state_dict()
    torch.manual_seed(99)  # a restart has another global generator
    second_half = new_state(config)
    second_half.load_state_dict(saved)
    for first in range(second_half.images_seen, 48, 8):
        second_half.step([images(first, 8)])

    assert torch.equal(weights(unbroken), weights(second_half))
    for decay, average in unbroken.ema.averages.items():
        for name, tensor in average.items():
            assert torch.equal(tensor, second_half.ema.averages[decay][name])


def test_averages_follow_the_weights_by_their_decay():
    state = new_state()
    expected = {decay: weights(state) for decay in OPTIMIZER.ema_decays}
    for first in (0, 8):
        state.step([images(first, 8)])
        for decay in expected:
            expected[decay] = decay * expected[decay] + (1 - decay) * weights(state)

    for decay, average in state.ema.averages.items():
        found = torch.cat([tensor.flatten() for tensor in average.values()])
        torch.testing.assert_close(found, expected[decay], rtol=1e-5, atol=1e-7)


def test_averages_of_other_decays_are_refused():
    state, other = new_state(), new_state()
    saved = other.state_dict()
    saved["ema"]["0.7"] = saved["ema"].pop("0.9")

    with pytest.raises(ValueError, match=r"EMAs \['0.5', '0.7'\], the run \['0.5', '0.9'\]"):
        state.load_state_dict(saved)


def test_the_rate_rises_then_stays_or_falls_to_zero():
    constant = OptimizerConfig(learning_rate=1.0, warmup_images=100)
    cosine = constant.model_copy(update={"schedule": "cosine"})

    assert [learning_rate(constant, n, 1100) for n in (50, 100, 1100)] == [0.5, 1.0, 1.0]
    assert learning_rate(cosine, 600, 1100) == pytest.approx(0.5)
    assert learning_rate(cosine, 1100, 1100) == pytest.approx(0.0)


def test_labels_are_dropped_as_often_as_asked_and_by_address():
    seen = []

    class Listening(torch.nn.Module):
        config = SMALL

        def __init__(self):
            super().__init__()
            self.flow, self.w = FlowConfig(label_drop=0.1), torch.nn.Parameter(torch.zeros(1))

        def forward(self, z, t, y, words):
            seen.append(y)
            return z * self.w

    state = TrainState(Listening(), OPTIMIZER, total_images=1, precision="fp32")
    index = torch.arange(20_000)
    pixels = torch.zeros(1, 3, 16, 16, dtype=torch.uint8).expand(20_000, -1, -1, -1)
    state.losses(Batch(pixels, index % 10, index))
    state.losses(Batch(pixels[:7], index[50:57] % 10, index[50:57]))

    assert (seen[0] == 10).double().mean().item() == pytest.approx(0.1, abs=0.008)
    kept = seen[0] != 10
    assert torch.equal(seen[0][kept], (index % 10)[kept])
    assert torch.equal(seen[1], seen[0][50:57])


def test_half_of_the_images_are_flipped_by_address():
    ramp = torch.arange(16, dtype=torch.uint8).expand(2000, 3, 16, 16)

    flipped = augment(ramp, 0, torch.arange(2000))[:, 0, 0, 0] == 15

    assert flipped.double().mean().item() == pytest.approx(0.5, abs=0.04)
    again = augment(ramp[:10], 0, torch.arange(100, 110))[:, 0, 0, 0] == 15
    assert torch.equal(again, flipped[100:110])


def test_clipping_bounds_the_gradient_and_reports_the_norm_before_it():
    clipped = OPTIMIZER.model_copy(update={"grad_clip": 1e-9})
    model = JiT(SMALL, generator=torch.Generator().manual_seed(0))
    state = TrainState(model, clipped, total_images=1000, precision="fp32")

    result = state.step([images(0, 8)])

    assert result.grad_norm.item() > 1e-3
    moments = [s["exp_avg"].norm().item() for s in state.optimizer.state.values()]
    assert math.hypot(*moments) <= 0.1 * 1e-9 * 1.01  # (1 - beta1) times the clipped gradient


def test_averages_in_main_memory_are_the_same_to_the_bit():
    here, there = new_state(), new_state(ema_on_cpu=True)
    for first in (0, 8, 16):
        here.step([images(first, 8)])
        there.step([images(first, 8)])

    saved = there.state_dict()["ema"]

    for decay, average in here.state_dict()["ema"].items():
        assert all(torch.equal(saved[decay][name], tensor) for name, tensor in average.items())
