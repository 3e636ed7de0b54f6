"""JiT-B/16 at 256 pixels against the authors' network, both compiled, bf16 autocast, CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from jitmodel.benchmark import DECAYS, AuthorsStep, authors_network
from jitmodel.config import ModelConfig, OptimizerConfig
from jitmodel.model import JiT
from jitmodel.parallel import parallelize, store_as_computed, tune_cpu
from jitmodel.sampler import guided_velocity
from jitmodel.state import Batch, TrainState

BATCH, ROUNDS, THREADS = 8, 11, 2


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(what: str, ours: Callable[[], object], theirs: Callable[[], object]) -> dict:
    """Alternate the two sides; the first call of each compiles and does not count."""
    for call in (ours, theirs):
        call()
        call()
    rounds = [(seconds(ours), seconds(theirs)) for _ in range(ROUNDS)]
    return {
        "what": what,
        "ours s": statistics.median(a for a, _ in rounds),
        "authors s": statistics.median(b for _, b in rounds),
        "times as fast": statistics.median(b / a for a, b in rounds),
        "worst round": min(b / a for a, b in rounds),
    }


def run() -> dict:
    tune_cpu(THREADS)
    torch.manual_seed(0)
    config = ModelConfig.named("JiT-B/16", image_size=256)
    theirs, ours = authors_network(config), JiT(config)
    ours.load_state_dict(theirs.state_dict())
    parallelize(ours, compile=True)

    pixels = torch.randint(0, 256, (BATCH, 3, 256, 256), dtype=torch.uint8)
    y, index = torch.randint(0, 1000, (BATCH,)), torch.arange(BATCH)
    x, e, t = torch.randn(BATCH, 3, 256, 256), torch.randn(BATCH, 3, 256, 256), torch.rand(BATCH)
    null = torch.full_like(y, 1000)
    ones = torch.ones(BATCH)
    state = TrainState(ours, OptimizerConfig(ema_decays=DECAYS), total_images=10**9)
    authors_step = AuthorsStep(theirs)

    def both_passes() -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            theirs(x, t, y)
            theirs(x, t, null)

    def one_batched_pass() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            guided_velocity(ours, x, 0.5 * ones, y, 2.9 * ones, 0.1 * ones, ones)

    rows = [
        compare(
            "train step: noise, forward, backward, AdamW, 2 EMAs",
            lambda: state.step([Batch(pixels, y, index)]),
            lambda: authors_step(x, e, t, y),
        )
    ]
    ours.eval()
    theirs.eval()
    rows.append(
        compare("guided evaluation, fp32 weights on both sides", one_batched_pass, both_passes)
    )
    store_as_computed(ours, "bf16")
    rows.append(
        compare(
            "guided evaluation, ours in bf16 as evaluation draws", one_batched_pass, both_passes
        )
    )
    return {
        "title": f"JiT-B/16 at 256 px, {BATCH} images, bf16 autocast, both compiled, "
        f"{THREADS} threads, median of {ROUNDS} alternating rounds",
        "torch": torch.__version__,
        "rows": rows,
    }
