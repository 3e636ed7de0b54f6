"""Every pair of prediction and loss space against numpy in float64, written from the paper."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from jitmodel.config import FlowConfig
from jitmodel.flow import convert, corrupt, flow_loss, precondition, predict, sample_times, velocity

EPS = 0.05
SPACES = ("x", "e", "v")


def paper_table(net, z, t, source, target):
    """Table 1 of the paper with clipped denominators, in float64."""
    left, done = np.maximum(1 - t, EPS), np.maximum(t, EPS)
    rows = {
        "x": {"x": net, "e": (z - t * net) / left, "v": (net - z) / left},
        "e": {"x": (z - (1 - t) * net) / done, "e": net, "v": (z - net) / done},
        "v": {"x": (1 - t) * net + z, "e": z - t * net, "v": net},
    }
    return rows[source][target]


def images(seed, count=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 4, 4, generator=generator, dtype=torch.float64)


TIMES = torch.tensor([0.0, 0.02, 0.3, 0.7, 0.98, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("target", SPACES)
@pytest.mark.parametrize("source", SPACES)
def test_loss_of_each_pair_of_spaces_equals_the_paper(source, target):
    x, e, net = images(0), images(1), images(2)
    z = corrupt(x, e, TIMES)
    config = FlowConfig(prediction=source, loss=target, t_eps=EPS)

    loss = flow_loss(net, x, e, z, TIMES, config)

    t = TIMES.numpy()[:, None, None, None]
    zn = t * x.numpy() + (1 - t) * e.numpy()
    truth = {"x": x.numpy(), "e": e.numpy(), "v": (x.numpy() - zn) / np.maximum(1 - t, EPS)}
    error = paper_table(net.numpy(), zn, t, source, target) - truth[target]
    np.testing.assert_allclose(loss.numpy(), (error**2).mean(axis=(1, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("target", SPACES)
@pytest.mark.parametrize("source", SPACES)
def test_a_perfect_prediction_is_perfect_in_every_space_away_from_the_ends(source, target):
    x, e = images(0, 3), images(1, 3)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    z = corrupt(x, e, t)
    truth = {"x": x, "e": e, "v": x - e}

    torch.testing.assert_close(convert(truth[source], z, t, source, target, EPS), truth[target])


def test_a_perfect_prediction_costs_nothing_even_at_the_last_instant():
    x, e = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    t = torch.tensor([0.5, 1.0])  # at t=1 the remaining time is zero

    loss = flow_loss(x, x, e, corrupt(x, e, t), t, FlowConfig())

    assert loss.tolist() == [0.0, 0.0]


def test_v_loss_of_x_prediction_is_the_x_error_over_the_remaining_time_squared():
    x, e = images(0, 1), images(1, 1)
    t = torch.tensor([0.75], dtype=torch.float64)
    x_pred = x + 0.5

    loss = flow_loss(x_pred, x, e, corrupt(x, e, t), t, FlowConfig())

    assert loss.item() == pytest.approx(0.25 / 0.25**2)


@pytest.mark.parametrize("kind", ["edm", "linear"])
def test_preconditioners_are_those_of_appendix_b2(kind):
    z, net = images(0), images(1)
    t = TIMES.numpy()[:, None, None, None]
    if kind == "linear":
        skip, out = t, 1 - t
    else:
        clipped = np.maximum(t, EPS)
        sigma = (1 - t) / clipped
        skip = 0.25 / (0.25 + sigma**2) / clipped
        out = 0.5 * sigma / np.sqrt(0.25 + sigma**2)

    config = FlowConfig(preconditioner=kind, t_eps=EPS)
    x = precondition(net, z, TIMES, config)
    v = predict(net, z, TIMES, "v", config)

    np.testing.assert_allclose(x.numpy(), skip * z.numpy() + out * net.numpy(), rtol=1e-12)
    torch.testing.assert_close(v, velocity(x, z, TIMES, EPS))


def test_a_preconditioner_of_another_prediction_is_refused():
    with pytest.raises(ValidationError, match=r"preconditioner 'edm'.*prediction is 'v'"):
        FlowConfig(preconditioner="edm", prediction="v")


def test_times_are_a_logistic_normal():
    s = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    expected = 1 / (1 + np.exp(0.8 - 0.8 * s.numpy()))
    np.testing.assert_allclose(sample_times(s, -0.8, 0.8).numpy(), expected, rtol=1e-12)
