"""Flow matching: corruption, time sampling, prediction and loss spaces, and the training loss.

Time runs from noise (t = 0) to image (t = 1), the reverse of most diffusion code. Nothing here
knows about networks, devices or Ray: tensors in, tensors out.
Source: Li & He, "Back to Basics", arXiv 2511.13720, Sec. 3, Table 1, App. B.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jitmodel.config import FlowConfig, Space

EDM_SIGMA_DATA = 0.5


def per_image(t: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1], so that it multiplies images."""
    return t[:, None, None, None]


def sample_times(s: Tensor, p_mean: float, p_std: float) -> Tensor:
    """t = sigmoid(p_mean + p_std s) for standard normal s; any shape (Sec. 3, Table 3)."""
    return torch.sigmoid(p_mean + p_std * s)


def corrupt(x: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """z = t x + (1 - t) e (Eq. 1).

    Args:
        x: clean images in -1..1, [B, C, H, W].
        e: noise, already multiplied by noise_scale, [B, C, H, W].
        t: time in 0..1, [B].

    Returns:
        Noisy images, [B, C, H, W].
    """
    t = per_image(t)
    return t * x + (1 - t) * e


def velocity(x: Tensor, z: Tensor, t: Tensor, t_eps: float) -> Tensor:
    """Velocity that carries z to x in the time that is left (v-loss, Sec. 3).

    v = (x - z) / max(1 - t, t_eps)

    Args:
        x: clean or predicted images in -1..1, [B, C, H, W].
        z: noisy images at time t, [B, C, H, W].
        t: time in 0..1, [B].
        t_eps: floor of the remaining time; keeps v finite as t nears 1.

    Returns:
        Velocity, [B, C, H, W], in units of x per unit of time.
    """
    return (x - z) / per_image(1 - t).clamp_min(t_eps)


def convert(
    output: Tensor, z: Tensor, t: Tensor, source: Space, target: Space, t_eps: float
) -> Tensor:
    """A prediction in one space as a prediction in another (Table 1).

    Every denominator, 1 - t or t, is clipped from below at t_eps.

    Args:
        output: the prediction in `source` space, [B, C, H, W].
        z: noisy images at time t, [B, C, H, W].
        t: time in 0..1, [B].
        source: space of `output`.
        target: space of the result.
        t_eps: floor of denominators.

    Returns:
        The prediction in `target` space, [B, C, H, W].
    """
    s = per_image(t)
    match source, target:
        case "x", "e":
            return (z - s * output) / (1 - s).clamp_min(t_eps)
        case "x", "v":
            return velocity(output, z, t, t_eps)
        case "e", "x":
            return (z - (1 - s) * output) / s.clamp_min(t_eps)
        case "e", "v":
            return (z - output) / s.clamp_min(t_eps)
        case "v", "x":
            return (1 - s) * output + z
        case "v", "e":
            return z - s * output
    return output


def precondition(net: Tensor, z: Tensor, t: Tensor, config: FlowConfig) -> Tensor:
    """x = c_skip z + c_out net (App. B.2); the plain prediction where none is chosen."""
    s = per_image(t)
    if config.preconditioner == "linear":
        return s * z + (1 - s) * net
    if config.preconditioner == "edm":
        clipped = s.clamp_min(config.t_eps)
        sigma2, data2 = ((1 - s) / clipped) ** 2, EDM_SIGMA_DATA**2
        c_skip = data2 / (data2 + sigma2) / clipped
        return c_skip * z + EDM_SIGMA_DATA * sigma2.sqrt() / (data2 + sigma2).sqrt() * net
    return net


def predict(net: Tensor, z: Tensor, t: Tensor, target: Space, config: FlowConfig) -> Tensor:
    """What the network's output says in `target` space; all images [B, C, H, W], t [B]."""
    output = precondition(net, z, t, config)
    return convert(output, z, t, config.prediction, target, config.t_eps)


def flow_loss(
    net: Tensor, x: Tensor, e: Tensor, z: Tensor, t: Tensor, config: FlowConfig
) -> Tensor:
    """Squared error in the loss space, one number for each image (Table 1).

    The target in x- and e-space is x and e themselves; the target velocity is taken from x and z
    with the clipped denominator, as the public code does, so that it stays finite at t = 1.

    Args:
        net: the network's output, [B, C, H, W].
        x: clean images in -1..1, [B, C, H, W].
        e: noise, already multiplied by noise_scale, [B, C, H, W].
        z: noisy images, [B, C, H, W].
        t: time in 0..1, [B].
        config: spaces and t_eps.

    Returns:
        Mean over pixels and channels, [B]; the loss of a batch is its mean.
    """
    target = {"x": x, "e": e}.get(config.loss)
    if target is None:
        target = velocity(x, z, t, config.t_eps)
    prediction = predict(net.to(x.dtype), z, t, config.loss, config)
    return (prediction - target).square().mean(dim=(1, 2, 3))
