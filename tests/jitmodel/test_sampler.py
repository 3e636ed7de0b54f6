"""Sampling against a plain transcription of the paper that always runs both passes."""

import pytest
import torch

from jitmodel.config import FlowConfig, ModelConfig, SamplerConfig
from jitmodel.model import JiT
from jitmodel.sampler import guidance_acts, guided_velocity, sample, start_noise, times

SMALL = ModelConfig(
    image_size=16, patch_size=4, hidden_size=32, depth=4, num_heads=2, bottleneck_dim=8,
    in_context_len=4, in_context_start=1, num_classes=10,
)  # fmt: skip


class Counted:
    """A network that counts its calls and the images that went through it."""

    def __init__(self, network, flow=None):
        self.network, self.config, self.flow = network, SMALL, flow or FlowConfig()
        self.calls = self.images = 0

    def __call__(self, z, t, y):
        self.calls += 1
        self.images += len(z)
        return self.network(z, t, y)


def lively(flow=None, seed=0):
    """A small network whose every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    model = JiT(SMALL, flow, generator=generator).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.3, generator=generator)
    return model


def paper_sampler(model, y, e, steps, scale, low, high, t_eps=0.05):
    """Section 4, literally: both passes at every evaluation, Heun with a last Euler step."""
    ts = torch.linspace(0, 1, steps + 1)
    null = torch.full_like(y, model.config.num_classes)

    def v_of(z, t):
        batch = torch.full((len(z),), float(t))
        x_cond, x_uncond = model(z, batch, y), model(z, batch, null)
        v_cond, v_uncond = ((x - z) / max(1 - float(t), t_eps) for x in (x_cond, x_uncond))
        w = scale if (t < high and (low == 0 or t > low)) else 1.0
        return v_uncond + w * (v_cond - v_uncond)

    z = e
    with torch.no_grad():
        for i in range(steps):
            dt = ts[i + 1] - ts[i]
            v = v_of(z, ts[i])
            if i + 1 < steps:
                v = (v + v_of(z + dt * v, ts[i + 1])) / 2
            z = z + dt * v
    return z


@pytest.mark.parametrize(("low", "high"), [(0.1, 1.0), (0.0, 0.6)])
def test_heun_with_guidance_equals_the_paper(low, high):
    model, y = lively(), torch.tensor([0, 3, 9])
    e = start_noise(model.flow, SMALL, 0, torch.arange(3))

    ours = sample(model, y, e, SamplerConfig(steps=10, cfg_scale=2.9, cfg_interval=(low, high)))
    theirs = paper_sampler(model, y, e, 10, 2.9, low, high)

    assert (ours - theirs).norm() / theirs.norm() < 1e-5
    without = sample(model, y, e, SamplerConfig(steps=10, cfg_scale=1.0))
    assert (ours - without).norm() / theirs.norm() > 0.01  # guidance matters here


def test_fifty_heun_steps_cost_99_calls_and_skip_the_pass_that_changes_nothing():
    model = Counted(lively())
    y, e = torch.tensor([1]), torch.zeros(1, 3, 16, 16)

    sample(model, y, e, SamplerConfig(steps=50, cfg_scale=2.9, cfg_interval=(0.1, 1.0)))
    assert (model.calls, model.images) == (99, 187)  # 11 evaluations at t <= 0.1 are single

    model.calls = model.images = 0
    sample(model, y, e, SamplerConfig(steps=50, cfg_scale=1.0))
    assert (model.calls, model.images) == (99, 99)

    model.calls = model.images = 0
    sample(model, y, e, SamplerConfig(steps=50, solver="euler", cfg_scale=1.0))
    assert (model.calls, model.images) == (50, 50)


def test_a_time_on_the_edge_of_an_interval_is_outside_whatever_the_number_of_steps():
    one = torch.ones(1)
    for steps in range(20, 1001, 20):
        t = times(steps)
        for twentieth in range(1, 20):  # 1/20, 2/20, ... are times of each of these
            edge = torch.tensor([twentieth / 20])
            acts = [guidance_acts(t, 2 * one, edge, one), guidance_acts(t, 2 * one, 0 * one, edge)]
            at = twentieth * steps // 20
            assert [a[at - 1 : at + 2].tolist() for a in acts] == [
                [False, False, at + 1 < steps], [True, False, False],
            ], (steps, twentieth)  # fmt: skip
    assert not guidance_acts(times(30)[3], 2 * one, torch.tensor([0.1]), one).any()


@pytest.mark.parametrize("prediction", ["x", "e", "v"])
def test_guidance_acts_on_velocities_in_every_prediction_space(prediction):
    flow = FlowConfig(prediction=prediction)
    model = lively(flow)
    z = start_noise(flow, SMALL, 1, torch.arange(2))
    t, y = torch.tensor([0.3, 0.5]), torch.tensor([4, 5])
    one, two = torch.ones(2), torch.tensor([2.0, 2.0])
    null = torch.full_like(y, 10)

    v_cond, _ = guided_velocity(model, z, t, y, one, 0 * one, one)
    v_uncond, _ = guided_velocity(model, z, t, null, one, 0 * one, one)
    v, _ = guided_velocity(model, z, t, y, two, 0 * one, one)

    torch.testing.assert_close(v, 2 * v_cond - v_uncond, rtol=1e-4, atol=1e-4)


def test_each_image_has_its_own_time_scale_and_interval():
    model = lively()
    z = start_noise(model.flow, SMALL, 1, torch.arange(4))
    t, y = torch.tensor([0.05, 0.3, 0.5, 0.0]), torch.tensor([1, 2, 3, 4])
    scale, low = torch.tensor([2.0, 3.0, 1.0, 2.5]), torch.tensor([0.1, 0.1, 0.1, 0.0])
    counted = Counted(model)

    together = guided_velocity(counted, z, t, y, scale, low, torch.ones(4))

    assert counted.images == 4 + 2  # guidance acts on the second and the fourth alone
    for i in range(4):
        s = slice(i, i + 1)
        alone = guided_velocity(model, z[s], t[s], y[s], scale[s], low[s], torch.ones(1))
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[s], b, rtol=1e-4, atol=1e-5)


def test_a_perfect_model_needs_one_step():
    x = torch.full((2, 3, 16, 16), 0.25)
    perfect = Counted(lambda z, t, y: x)

    drawn = sample(perfect, torch.tensor([0, 1]), torch.zeros_like(x), SamplerConfig(steps=1))

    torch.testing.assert_close(drawn, x)


def test_start_noise_has_the_flows_scale_and_an_address():
    flow = FlowConfig(noise_scale=2.0)
    e = start_noise(flow, SMALL, 3, torch.arange(200))

    assert abs(e.std() - 2.0) < 0.02
    assert torch.equal(e[17:18], start_noise(flow, SMALL, 3, torch.tensor([17])))


@pytest.mark.parametrize(
    ("y", "shape", "message"),
    [
        ([11], (1, 3, 16, 16), r"labels 11..11 leave 0..10"),
        ([-1], (1, 3, 16, 16), r"labels -1..-1 leave"),
        ([1, 2], (1, 3, 16, 16), r"shape \(1, 3, 16, 16\), the model needs \(2, 3, 16, 16\)"),
        ([1], (1, 3, 32, 32), r"the model needs \(1, 3, 16, 16\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(y, shape, message):
    with pytest.raises(ValueError, match=message):
        sample(lively(), torch.tensor(y), torch.zeros(shape), SamplerConfig(steps=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_type_draws_nearly_the_same(dtype):
    model, y = lively(), torch.tensor([0, 3])
    e = start_noise(model.flow, SMALL, 0, torch.arange(2))
    config = SamplerConfig(steps=3)
    expected = sample(model, y, e, config)

    drawn = sample(model.to(dtype), y, e, config)

    assert (drawn - expected).norm() / expected.norm() < (0.1 if dtype == torch.bfloat16 else 1e-5)


def test_images_of_another_size_are_refused_by_the_network():
    with pytest.raises(ValueError, match=r"z has shape \(1, 3, 8, 32\), the model needs"):
        lively()(torch.zeros(1, 3, 8, 32), torch.zeros(1), torch.tensor([1]))
