"""Drawing images: start noise, guided velocity, Euler and Heun. Time is per image.

Source: arXiv 2511.13720, Sec. 4 and Table 9. Guidance costs a second pass only for the images at
a time at which it acts; both passes are one batched call. Times are fp32 throughout, because
t = 0.1 sits on the edge of the paper's interval and another rounding of it would flip guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from jitmodel.config import FlowConfig, ModelConfig, SamplerConfig
from jitmodel.flow import per_image, predict
from jitmodel.random import normal

START_NOISE = "start-noise"


class Network(Protocol):
    """What sampling needs of a model; JiT is one."""

    config: ModelConfig
    flow: FlowConfig

    def __call__(self, z: Tensor, t: Tensor, y: Tensor) -> Any: ...


def start_noise(flow: FlowConfig, model: ModelConfig, seed: int | Tensor, index: Tensor) -> Tensor:
    """Noise at t = 0 for each address, whatever the batch: e = noise_scale N(0, I).

    Args:
        flow: holds noise_scale.
        model: holds the shape of an image.
        seed: one seed, or one for each image, int64 [B].
        index: number of each image under its seed, int64 [B]; the result lives on its device.

    Returns:
        float32 [B, C, H, W].
    """
    shape = (model.in_channels, model.image_size, model.image_size)
    return flow.noise_scale * normal(seed, index, shape, START_NOISE)


def times(steps: int) -> Tensor:
    """The steps + 1 times from 0 to 1, float32, on the CPU.

    Each is i / steps, rounded once, so that 3/30 is as large as an interval's end of 0.1. To
    torch.linspace, which rounds twice, it is larger.
    """
    return (torch.arange(steps + 1, dtype=torch.float64) / steps).float()


def guidance_acts(t: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Whether guidance changes the velocity of each image; all [B], result bool [B].

    The interval is open, but a minimum of 0 includes t = 0; a scale of 1 changes nothing.
    """
    return (t < high) & ((t > low) | (low == 0)) & (scale != 1)


@torch.no_grad()
def guided_velocity(
    model: Network, z: Tensor, t: Tensor, y: Tensor, scale: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """v = v_uncond + scale (v_cond - v_uncond) inside the interval, v_cond outside of it.

    The network's output is guided and then turned into v: at one z and t that map is affine, so
    the order does not matter, and the guided x_pred comes for free.

    Args:
        model: the network.
        z: noisy images, [B, C, H, W].
        t: time of each image, float32 [B]. This and the next arguments may live on the CPU,
            which spares a GPU a synchronisation.
        y: class of each image, int64 [B], on z's device.
        scale: guidance scale of each image, [B].
        low, high: ends of each image's guidance interval, [B].

    Returns:
        Velocity and guided x_pred, both float32 [B, C, H, W].
    """
    rows = guidance_acts(t, scale, low, high).nonzero()[:, 0].to(z.device)
    t, scale = t.to(z.device), scale.to(z.device)
    if len(rows) == 0:
        net = model(z, t, y).float()
    else:
        null = torch.full_like(rows, model.config.num_classes)
        both = model(torch.cat((z, z[rows])), torch.cat((t, t[rows])), torch.cat((y, null))).float()
        net, uncond = both[: len(z)], both[len(z) :]
        guided = uncond + per_image(scale[rows]) * (net[rows] - uncond)
        net = net.index_copy(0, rows, guided)
    return predict(net, z, t, "v", model.flow), predict(net, z, t, "x", model.flow)


@torch.no_grad()
def sample(
    model: Network,
    y: Tensor,
    e: Tensor,
    config: SamplerConfig,
    *,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw images by solving dz/dt = v from noise to image (Sec. 4).

    Args:
        model: the network, in the mode (eval, autocast) in which it shall run.
        y: class of each image, int64 [B], on e's device.
        e: start noise, already multiplied by noise_scale, float32 [B, C, H, W].
        config: steps, solver, guidance.
        on_step: called after each step with its number and the clean preview x_pred.

    Returns:
        x, float32 [B, C, H, W], not clipped.

    Raises:
        ValueError: shapes, types or labels do not fit the model.
    """
    check_inputs(model.config, y, e)
    ones = torch.ones(len(y))
    scale = config.cfg_scale * ones
    low, high = (end * ones for end in config.cfg_interval)
    grid = times(config.steps)
    z = e.float()
    for i in range(config.steps):
        dt = (grid[i + 1] - grid[i]).item()
        v, x_pred = guided_velocity(model, z, grid[i] * ones, y, scale, low, high)
        if config.solver == "heun" and i + 1 < config.steps:
            ahead, _ = guided_velocity(model, z + dt * v, grid[i + 1] * ones, y, scale, low, high)
            v = (v + ahead) / 2
        z = z + dt * v
        if on_step:
            on_step(i, x_pred)
    return z


def check_inputs(config: ModelConfig, y: Tensor, e: Tensor) -> None:
    """Refuse noise and labels that do not fit a model.

    Raises:
        ValueError: naming what was found and what was expected.
    """
    shape = (len(y), config.in_channels, config.image_size, config.image_size)
    if tuple(e.shape) != shape:
        raise ValueError(f"start noise has shape {tuple(e.shape)}, the model needs {shape}")
    if len(y) and (int(y.min()) < 0 or int(y.max()) > config.num_classes):
        raise ValueError(
            f"labels {int(y.min())}..{int(y.max())} leave 0..{config.num_classes} "
            f"(the last one means no class)"
        )
