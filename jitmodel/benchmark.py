"""`python -m jitmodel.benchmark`: speed of a training step on one device, without Ray or data.

Step time, images/s and MFU of B, L and H /16, with and without torch.compile and activation
checkpointing, and of the authors' network with their step where the azula package is installed.
MFU counts what a step needs (jitmodel.cost.train_flops), not what checkpointing computes again.
On a CPU use `--tiny`, which only shows that everything runs.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from jitmodel import cost
from jitmodel.config import FlowConfig, ModelConfig, OptimizerConfig
from jitmodel.flow import corrupt, flow_loss
from jitmodel.model import JiT
from jitmodel.parallel import Checkpointing, autocast, parallelize
from jitmodel.pixels import to_x
from jitmodel.state import Batch, TrainState

BATCHES = {"B": 128, "L": 64, "H": 32, "G": 16}
"""Images a step, where none are asked for: what 80 GB hold without checkpointing."""
DECAYS = (0.9996, 0.9999)
"""The averages that the public code keeps; both sides keep them."""
CHECKPOINTING: tuple[Checkpointing, ...] = get_args(Checkpointing)
TINY = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "depth": 2, "num_heads": 2,
        "bottleneck_dim": 16, "in_context_len": 4, "in_context_start": 1}  # fmt: skip


class AuthorsStep:
    """A step as the public code does it: AdamW, and a loop over the parameters for each average."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=2e-4, betas=(0.9, 0.95))
        self.averages = [[p.detach().clone() for p in self.parameters] for _ in DECAYS]

    def __call__(self, x: Tensor, e: Tensor, t: Tensor, y: Tensor) -> None:
        """Train on images x [B, C, H, W] with noise e, times t [B] and classes y [B]."""
        z = corrupt(x, e, t)
        with autocast(x.device, "bf16"):
            net = self.network(z, t, y)
        flow_loss(net.float(), x, e, z, t, FlowConfig()).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for decay, average in zip(DECAYS, self.averages, strict=True):
                for a, p in zip(average, self.parameters, strict=True):
                    a.mul_(decay).add_(p, alpha=1 - decay)


def authors_network(config: ModelConfig) -> nn.Module:
    """The authors' network of this shape with new weights, as the azula package carries it."""
    module = importlib.import_module("azula.plugins.jit._src.model")
    network: nn.Module = module.JiT(
        input_size=config.image_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        hidden_size=config.hidden_size,
        depth=config.depth,
        num_heads=config.num_heads,
        num_classes=config.num_classes,
        bottleneck_dim=config.bottleneck_dim,
        in_context_len=config.in_context_len,
        in_context_start=config.in_context_start,
        proj_drop=config.dropout,
    )
    return network


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser("python -m jitmodel.benchmark", description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["B", "L", "H"], choices=list(BATCHES))
    parser.add_argument("--batch", type=int, help="images a step; by default 128, 64, 32, 16")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each variant")
    parser.add_argument("--peak-tflops", type=float, help="of a device that is not in the table")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled ones out")
    parser.add_argument("--tiny", action="store_true", help="a toy model instead of the sizes")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args(argv)
    for option, number in (("--batch", options.batch), ("--steps", options.steps)):
        if number is not None and number < 1:
            parser.error(f"{option} {number} is too few: choose 1 or more")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    peak = options.peak_tflops * 1e12 if options.peak_tflops else cost.peak_flops(name)
    configs = {f"JiT-{s}/16": ModelConfig.named(f"JiT-{s}/16") for s in options.sizes}
    if options.tiny:
        configs = {"tiny": ModelConfig.model_validate(TINY)}
    whose = ("ours", "authors") if importlib.util.find_spec("azula") else ("ours",)
    rows: list[dict[str, Any]] = []
    for model, config in configs.items():
        batch = options.batch or BATCHES.get(model[4:5], 4)
        for network, compile in itertools.product(whose, (False, True)):
            if compile and options.no_compile:
                continue
            for checkpointing in CHECKPOINTING if network == "ours" else ("none",):
                row: dict[str, Any] = {
                    "model": model,
                    "network": network,
                    "compiled": compile,
                    "checkpointing": checkpointing,
                    "images": batch,
                }
                # The authors' blocks are compiled by a decorator.
                with torch.compiler.set_stance("default" if compile else "force_eager"):
                    try:
                        make = partial(authors_step, config, device)
                        if network == "ours":
                            make = partial(our_step, config, device, compile, checkpointing)
                        row |= measure(make, config, batch, device, options.steps)
                    except torch.OutOfMemoryError:
                        row |= {"step, s": math.nan, "images/s": 0.0, "peak, GB": math.nan}
                row["MFU"] = row["images/s"] * cost.train_flops(config) / (peak or math.nan)
                rows.append(row)
                gc.collect()
                torch.compiler.reset()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    title = f"Training step in bf16, AdamW, {len(DECAYS)} EMAs; {name}, torch {torch.__version__}"
    print(f"{title}\n\n{table(rows)}")
    if options.json:
        result = {"title": title, "device": name, "torch": torch.__version__, "rows": rows}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


Step = Callable[[Tensor, Tensor], None]
"""One optimizer step on pixels, uint8 [B, C, H, W], and classes, int64 [B]."""


def our_step(
    config: ModelConfig, device: torch.device, compile: bool, checkpointing: Checkpointing
) -> Step:
    """TrainState.step of a new model."""
    with torch.device("meta"):
        model = JiT(config)
    parallelize(model, checkpointing=checkpointing, compile=compile)
    model.to_empty(device=device)
    model.init_weights(torch.Generator().manual_seed(0))
    state = TrainState(model, OptimizerConfig(ema_decays=DECAYS), total_images=10**9)

    def step(pixels: Tensor, y: Tensor) -> None:
        state.step([Batch(pixels, y, torch.arange(len(y), device=device))])

    return step


def authors_step(config: ModelConfig, device: torch.device) -> Step:
    """A step of the authors' network; their noise comes from the device's generator."""
    train = AuthorsStep(authors_network(config).to(device).train())

    def step(pixels: Tensor, y: Tensor) -> None:
        x = to_x(pixels)
        train(x, torch.randn_like(x), torch.rand(len(y), device=device), y)

    return step


def measure(
    make: Callable[[], Step], config: ModelConfig, batch: int, device: torch.device, steps: int
) -> dict[str, float]:
    """Median time of a step that `make` gives, after three that compile and warm up."""
    shape = (batch, config.in_channels, config.image_size, config.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    y = torch.randint(0, config.num_classes, (batch,), device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = make()
    seconds = []
    for _ in range(3 + steps):
        began = time.perf_counter()
        step(pixels, y)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[3:])
    taken = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else math.nan
    return {"step, s": median, "images/s": batch / median, "peak, GB": taken}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a table in Markdown."""
    lines = [list[Any](rows[0]), *[list(row.values()) for row in rows]]
    cells = [[f"{c:.3g}" if isinstance(c, float) else str(c) for c in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    found = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    found.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(found)


if __name__ == "__main__":
    main()
