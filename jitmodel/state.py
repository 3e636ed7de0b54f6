"""TrainState: everything that a training run is made of, and one optimizer step.

The clock is images_seen. Time, noise, label drop, flip and dropout masks of an image are functions
of the seed and the image's place in the run (jitmodel.random), so they are the same for any number
of workers and any accumulation, and a resumed run needs no generator state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from jitmodel import random
from jitmodel.config import FlowConfig, OptimizerConfig
from jitmodel.ema import EMA
from jitmodel.flow import corrupt, flow_loss, sample_times
from jitmodel.model import JiT
from jitmodel.parallel import Precision, autocast
from jitmodel.pixels import to_x


@dataclass(frozen=True)
class Batch:
    """Images as the loader gives them, on the model's device."""

    pixels: Tensor
    """uint8 [B, C, H, W]."""
    y: Tensor
    """Class of each image, int64 [B]."""
    index: Tensor
    """Place of each image in the run, counted in images seen, int64 [B]."""


class StepResult(NamedTuple):
    """What one step reports; tensors stay on the device, so that reading them is the caller's."""

    loss: Tensor
    """Mean loss over the global batch, scalar."""
    losses: Tensor
    """Loss of each local image, [n]."""
    times: Tensor
    """Time of each local image, [n]."""
    grad_norm: Tensor
    """Global gradient norm before clipping, scalar."""
    learning_rate: float


def learning_rate(config: OptimizerConfig, images_seen: int, total_images: int) -> float:
    """Rate of the step after which `images_seen` images will have been seen.

    Linear from 0 over the warm-up, then constant or a cosine to 0 at total_images.
    """
    if images_seen < config.warmup_images:
        return config.learning_rate * images_seen / config.warmup_images
    if config.schedule == "constant":
        return config.learning_rate
    left = max(1, total_images - config.warmup_images)
    progress = min(1.0, (images_seen - config.warmup_images) / left)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def augment(pixels: Tensor, seed: int, index: Tensor) -> Tensor:
    """Flip horizontally the images whose address says so; half of them on average."""
    flipped = random.uniform(seed, index, "flip") <= 0.5
    return torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)


class TrainState:
    """Model, optimizer, EMAs and the clock.

    Args:
        model: parallelized already; its parameters are fp32.
        optimizer: AdamW, schedule and EMA decays.
        total_images: length of the run, for schedules that end.
        seed: seed of everything that is drawn.
        precision: compute type.
        flip: whether half of the images are flipped.
        ema_on_cpu: keep the EMAs in main memory.
    """

    def __init__(
        self,
        model: JiT,
        optimizer: OptimizerConfig,
        *,
        total_images: int,
        seed: int = 0,
        precision: Precision = "bf16",
        flip: bool = True,
        ema_on_cpu: bool = False,
    ) -> None:
        self.model = model
        self.config = optimizer
        self.total_images = total_images
        self.seed = seed
        self.precision = precision
        self.flip = flip
        self.images_seen = 0
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self.ema = EMA(model, optimizer.ema_decays, on_cpu=ema_on_cpu)

    @property
    def flow(self) -> FlowConfig:
        """Corruption and loss, as the model has it."""
        return self.model.flow

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss and time of each image of a micro-batch, both [B] (Algorithm 1)."""
        flow, seed, index = self.flow, self.seed, batch.index
        pixels = augment(batch.pixels, seed, index) if self.flip else batch.pixels
        x = to_x(pixels)
        t = sample_times(random.normal(seed, index, (), "time"), flow.p_mean, flow.p_std)
        e = flow.noise_scale * random.normal(seed, index, tuple(x.shape[1:]), "noise")
        dropped = random.uniform(seed, index, "label-drop") <= flow.label_drop
        y = torch.where(dropped, self.model.config.num_classes, batch.y)
        z = corrupt(x, e, t)
        words = random.words(seed, index, "dropout") if self.model.config.dropout else None
        with autocast(x.device, self.precision):
            net = self.model(z, t, y, words)
        return flow_loss(net.float(), x, e, z, t, flow), t

    def step(self, micro_batches: Sequence[Batch]) -> StepResult:
        """One optimizer step on this process's share of a global batch.

        Args:
            micro_batches: the share, in pieces that fit; every process has equally many images.
        """
        self.model.train()
        world = dist.get_world_size() if isinstance(self.model, FSDPModule) else 1
        images = sum(len(batch.y) for batch in micro_batches)
        rate = learning_rate(self.config, self.images_seen + images * world, self.total_images)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses, times = [], []
        for number, batch in enumerate(micro_batches):
            if isinstance(self.model, FSDPModule):
                # Gradients go to shards after each piece, so that none is ever whole; replicas
                # add theirs up once.
                self.model.set_requires_all_reduce(number + 1 == len(micro_batches))
            loss, t = self.losses(batch)
            (loss.sum() / images).backward()
            losses.append(loss.detach())
            times.append(t)
        clip = self.config.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        self.images_seen += images * world
        mean = torch.cat(losses).mean()
        if world > 1:
            dist.all_reduce(mean)
            mean = mean / world
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return StepResult(mean, torch.cat(losses), torch.cat(times), norm, rate)

    def state_dict(self) -> dict[str, Any]:
        """What torch.distributed.checkpoint saves; sharded where the model is."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "ema": self.ema.state_dict(),
            "images_seen": torch.tensor(self.images_seen),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what state_dict gave, at any number of processes."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.ema.load_state_dict(state["ema"])
        self.images_seen = int(state["images_seen"])
