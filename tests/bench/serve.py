"""The engine against whole-request batching (`@serve.batch`): latency at 70 % load, and throughput.

Both draw the same requests, one image each with 5, 10, 20 or 40 steps, with the same network and
the same sampler arithmetic, each in a Ray Serve deployment of one replica and one thread. The other
side is Ray Serve's own decorator around a function that draws requests of equal settings together,
which is how a server does without an engine: a batch is done when the last of its images is, and
who comes meanwhile waits. Arrivals are Poisson, at 70 % of what the slower side can do; both sides
get the same ones, round after round.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable

import ray
import torch
from ray import serve
from ray.serve.schema import LoggingConfig

from jitmodel.config import ModelConfig, SamplerConfig
from jitmodel.model import JiT
from jitmodel.sampler import sample, start_noise
from pipelines.engine import Drawing, Engine

SLOTS, REQUESTS, ROUNDS, LOAD = 8, 150, 3, 0.7
STEPS = (5, 10, 20, 40)
MODEL = ModelConfig(
    image_size=16, patch_size=4, hidden_size=96, depth=4, num_heads=4, bottleneck_dim=32,
    in_context_len=4, in_context_start=1, num_classes=10,
)  # fmt: skip

QUIET = LoggingConfig(log_level="ERROR", enable_access_log=False)

Draw = Callable[[Drawing], Awaitable[None]]


def requests(seed: int) -> list[Drawing]:
    """What is asked for, the same on both sides."""
    chance = random.Random(seed)
    return [
        Drawing(i % 10, i, 0, SamplerConfig(steps=chance.choice(STEPS), cfg_scale=2.0))
        for i in range(REQUESTS)
    ]


def draw_together(model: JiT, drawings: list[Drawing]) -> None:
    """Whole requests: those with equal settings are one batch of the sampler."""
    for config in {d.sampler for d in drawings}:
        equal = [d for d in drawings if d.sampler == config]
        seeds = torch.tensor([d.seed for d in equal])
        e = start_noise(model.flow, model.config, seeds, torch.zeros_like(seeds))
        with torch.inference_mode():
            sample(model, torch.tensor([d.label for d in equal]), e, config)


async def arrive(draw: Draw, drawings: list[Drawing], rate: float, seed: int) -> list[float]:
    """Seconds from arrival to image of each request; rate 0: all arrive at once."""
    chance = random.Random(seed)
    start = time.perf_counter()
    due = 0.0
    latencies = []

    async def one(drawing: Drawing, due: float) -> None:
        await asyncio.sleep(start + due - time.perf_counter())
        await draw(drawing)
        latencies.append(time.perf_counter() - start - due)

    tasks = []
    for drawing in drawings:
        due += chance.expovariate(rate) if rate else 0.0
        tasks.append(asyncio.create_task(one(drawing, due)))
    await asyncio.gather(*tasks)
    return latencies


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(int(part * len(values)), len(values) - 1)]


class StepLevel:
    """A replica that holds an engine."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        model = JiT(MODEL).eval()
        self.engine = Engine(model, torch.device("cpu"), slots=SLOTS, max_queue=10 * REQUESTS)
        self.engine.warm_up()
        self.engine.start()

    async def __call__(self, drawing: Drawing) -> None:
        await asyncio.wrap_future(self.engine.submit([drawing], timeout_s=600))


class WholeRequests:
    """A replica that draws a batch to its end before it takes the next one."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model = JiT(MODEL).eval()

    @serve.batch(max_batch_size=SLOTS, batch_wait_timeout_s=0.01)
    async def __call__(self, drawings: list[Drawing]) -> list[None]:
        await asyncio.to_thread(draw_together, self.model, drawings)
        return [None] * len(drawings)


def deployed(side: type) -> Draw:
    """Starts a side; what sends it a request."""
    deployment = serve.deployment(side, max_ongoing_requests=10 * REQUESTS, logging_config=QUIET)
    handle = serve.run(deployment.bind(), name=side.__name__, route_prefix=None)

    async def draw(drawing: Drawing) -> None:
        await handle.remote(drawing)

    return draw


async def measure(sides: dict[str, Draw]) -> dict:
    for draw in sides.values():
        await arrive(draw, requests(0)[: 2 * SLOTS], 0, 0)
    longest = [Drawing(0, 0, 0, SamplerConfig(steps=max(STEPS), cfg_scale=2.0))]
    alone = {side: [] for side in sides}
    for _ in range(5):
        for side, draw in sides.items():
            alone[side] += await arrive(draw, longest, 0, 0)
    full = {side: [] for side in sides}
    for number in range(ROUNDS):
        for side, draw in sides.items():
            full[side].append(REQUESTS / max(await arrive(draw, requests(number), 0, number)))
    rate = LOAD * min(statistics.median(values) for values in full.values())
    seen = {side: [] for side in sides}
    for number in range(ROUNDS):
        for side, draw in sides.items():
            seen[side].append(await arrive(draw, requests(number), rate, number))

    rows = []
    for what, part in (("p50 latency s", 0.5), ("p95 latency s", 0.95)):
        values = {s: [percentile(latencies, part) for latencies in seen[s]] for s in sides}
        rows.append(row(f"{what} at {rate:.1f} images/s", values))
    rows.append(row("images/s when full", full))
    rows.append(row(f"latency s of {max(STEPS)} steps alone", alone))
    return {"rows": rows, "rate": rate, "load": LOAD, "slots": SLOTS, "requests": REQUESTS}


def row(what: str, values: dict[str, list[float]]) -> dict:
    """Medians of the rounds, and the median of their ratios."""
    mine, other = values["engine"], values["whole requests"]
    return {
        "what": what,
        "engine": statistics.median(mine),
        "whole requests": statistics.median(other),
        "engine / whole": statistics.median(a / b for a, b in zip(mine, other, strict=True)),
    }


def run() -> dict:
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no replica can import it
    try:
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        sides = {"engine": deployed(StepLevel), "whole requests": deployed(WholeRequests)}
        result = asyncio.run(measure(sides))
    finally:
        serve.shutdown()
        ray.shutdown()
    steps = ", ".join(map(str, STEPS))
    title = f"Step-level against whole-request batching: {SLOTS} slots, {steps} Heun steps, one CPU"
    return {"title": title, **result}
