"""`jit plan`: parameters, memory of a GPU, days and price of a training run, before it starts.

Arithmetic (jitmodel/cost.py) and a price list that people edit (prices.yaml): neither torch nor
Ray nor a GPU is needed. What is assumed, above all the share of a GPU's peak that training
reaches, is printed with the result.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is slow to import: `--help` shall not wait for it
    import sys

    from pipelines.cli import main

    raise SystemExit(main(["plan", *sys.argv[1:]]))

from importlib import resources
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import PositiveFloat, PositiveInt, ValidationError

from jitmodel import cost
from jitmodel.config import Config
from jitmodel.cost import Memory
from pipelines.config import PlanConfig

RESERVE_GB = 3.0
"""Assumed for the driver, libraries, communication buffers and holes between tensors."""
RECOMPUTED = {"none": 0.0, "selective": 0.03, "full": 1 / 3}
"""Assumed work that activation checkpointing adds to a step."""


class Instance(Config):
    """One kind of machine."""

    gpus: PositiveInt
    """GPUs of a machine."""
    device: str
    """Their name, as in jitmodel.cost.PEAK_BF16."""
    memory_gb: PositiveFloat
    """Memory of each, in 10^9 bytes."""
    per_hour: PositiveFloat
    """Price of one hour of the machine."""


class Prices(Config):
    """A price list."""

    as_of: str
    """When the prices were true."""
    source: str
    """Where they are from."""
    currency: str
    """What they are in."""
    instances: dict[str, Instance]
    """Machines by name."""


class Plan(NamedTuple):
    """What a run needs."""

    instance: Instance
    machines: int
    micro_batch: int
    accumulation: int
    memory: Memory
    steps: int
    images_per_s: float
    """Of all GPUs together."""
    days: float
    price: float
    currency: str
    largest_micro_batch: int
    """Images that a GPU could take at once and still share the batch evenly; 0 if it cannot even
    hold one."""

    @property
    def gb_per_gpu(self) -> float:
        """Peak memory of a GPU, with the reserve."""
        return self.memory.peak / 1e9 + RESERVE_GB


def run(config: PlanConfig) -> None:
    """Print the plan of a run.

    Raises:
        ValueError: an unknown instance, a price list that does not parse, or GPUs among which the
            batch cannot be dealt.
        FileNotFoundError: there is no such price list.
    """
    prices = read_prices(config.prices)
    print(describe(config, plan(config, prices), prices))


def read_prices(path: str) -> Prices:
    """A price list, the package's own by default.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no price list.
    """
    file = Path(path) if path else resources.files("pipelines") / "prices.yaml"
    try:
        return Prices.model_validate(yaml.safe_load(file.read_text("utf-8")))
    except (yaml.YAMLError, ValidationError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"{file} is no price list like pipelines/prices.yaml: {error}") from error


def plan(config: PlanConfig, prices: Prices) -> Plan:
    """What the run needs on `config.gpus` GPUs of `config.instance`.

    Raises:
        ValueError: an unknown instance or device, or GPUs among which the batch cannot be dealt.
    """
    instance = prices.instances.get(config.instance)
    if instance is None:
        raise ValueError(
            f"no price for --instance {config.instance!r}: choose from "
            f"{', '.join(prices.instances)}, or add it to a copy of pipelines/prices.yaml and "
            "name that with --prices"
        )
    peak = cost.peak_flops(instance.device)
    if peak is None:
        raise ValueError(
            f"the speed of {instance.device!r}, the device of {config.instance}, is not known: "
            f"choose from {', '.join(cost.PEAK_BF16)}"
        )
    micro_batch, accumulation = config.split(config.gpus)
    share = config.global_batch // config.gpus
    even = (n for n in range(1, share + 1) if not share % n)  # no other would be accepted
    largest = max((n for n in even if _fits(config, n, instance)), default=0)
    machines = -(-config.gpus // instance.gpus)
    operations = cost.train_flops(config.model) * (1 + RECOMPUTED[config.parallel.checkpointing])
    images_per_s = config.gpus * peak * config.mfu / operations
    hours = config.total_images / images_per_s / 3600
    return Plan(
        instance=instance,
        machines=machines,
        micro_batch=micro_batch,
        accumulation=accumulation,
        memory=memory(config, micro_batch),
        steps=-(-config.total_images // config.global_batch),
        images_per_s=images_per_s,
        days=hours / 24,
        price=hours * machines * instance.per_hour,
        currency=prices.currency,
        largest_micro_batch=largest,
    )


def memory(config: PlanConfig, micro_batch: int) -> Memory:
    """Memory of each GPU at a micro-batch."""
    parallel = config.parallel
    return cost.memory(
        config.model,
        micro_batch=micro_batch,
        accumulates=micro_batch < config.global_batch // config.gpus,
        shards=parallel.shard_size or config.gpus,
        num_emas=len(config.optimizer.ema_decays),
        ema_on_cpu=parallel.ema_on_cpu,
        precision=parallel.precision,
        checkpointing=parallel.checkpointing,
        compile=parallel.compile,
        reshard_after_forward=parallel.reshard_after_forward,
    )


def _fits(config: PlanConfig, micro_batch: int, instance: Instance) -> bool:
    return memory(config, micro_batch).peak / 1e9 + RESERVE_GB <= instance.memory_gb


def describe(config: PlanConfig, found: Plan, prices: Prices) -> str:
    """A plan in words."""
    model, parallel, gpu = config.model, config.parallel, found.instance
    shards = parallel.shard_size or config.gpus
    parts = {
        f"weights, fp32, 1/{shards}": found.memory.weights,
        f"gradients, fp32, 1/{shards}": found.memory.gradients,
        f"AdamW, fp32, 1/{shards}": found.memory.optimizer,
        f"{len(config.optimizer.ema_decays)} EMAs, fp32, "
        + ("on the CPU" if parallel.ema_on_cpu else f"1/{shards}"): found.memory.averages,
        f"gathered for a while, {parallel.precision}": found.memory.gathered,
        f"activations of {found.micro_batch} images, checkpointing "
        f"{parallel.checkpointing}": found.memory.activations,
    }
    lines = [f"  {name:<52} {size / 1e9:7.2f} GB" for name, size in parts.items()]
    fits = "fits" if found.gb_per_gpu <= gpu.memory_gb else "DOES NOT FIT"
    epochs = config.total_images / 1_281_167
    return "\n".join(
        [
            f"model       {cost.num_parameters(model) / 1e6:,.1f} M parameters; one image costs "
            f"{cost.forward_flops(model) / 1e9:,.1f} GFLOP forward, "
            f"{cost.train_flops(model) / 1e9:,.1f} GFLOP in training",
            '            (2 FLOPs a multiply-add; the paper\'s "Gflops" are multiply-adds: '
            f"{cost.forward_flops(model) / 2e9:,.1f})",
            f"machines    {found.machines} x {config.instance} = "
            f"{found.machines * gpu.gpus} x {gpu.device}, of which {config.gpus} are used",
            f"batch       {config.global_batch} = {config.gpus} GPUs x {found.micro_batch} images "
            f"x {found.accumulation}",
            f"memory      {found.gb_per_gpu:.1f} GB of the {gpu.memory_gb:g} GB of a GPU: {fits}; "
            f"up to {found.largest_micro_batch} images at once would",
            *lines,
            f"  {'libraries, buffers, holes (assumed)':<52} {RESERVE_GB:7.2f} GB",
            "            gradients and activations "
            + (
                "add up, because micro-batches accumulate"
                if found.memory.accumulates
                else "come one after the other: the larger counts"
            ),
            f"main memory {found.memory.host / 1e9:.1f} GB for each GPU, "
            f"{found.memory.host * min(gpu.gpus, config.gpus) / 1e9:.1f} GB a machine: the copy "
            "that checkpoints are stored from" + (", and EMAs" if parallel.ema_on_cpu else ""),
            f"time        {found.steps:,} steps, {config.total_images:,} images "
            f"({epochs:,.0f} epochs of ImageNet) at {found.images_per_s:,.0f} images/s: "
            f"{found.days:.2f} days",
            f"            assumes {config.mfu:.0%} of the GPU's dense bf16 peak (--mfu); "
            "`python -m jitmodel.benchmark` measures it",
            *judging(config, found),
            f"price       {found.price:,.0f} {prices.currency} at {gpu.per_hour:g} an hour and "
            f"machine, training alone ({prices.source}; as of {prices.as_of})",
        ]
    )


def judging(config: PlanConfig, found: Plan) -> list[str]:
    """What it takes to judge a checkpoint while training goes on; nothing where none is judged."""
    if not config.validation.reference:
        return []
    peak = cost.peak_flops(found.instance.device)
    assert peak is not None, "the plan was made with it"
    passes = 2 * (2 if config.sampler.solver == "heun" else 1) * config.sampler.steps
    operations = config.validation.num_images * passes * cost.forward_flops(config.model)
    takes = operations / (peak * config.mfu) / 60
    every = config.checkpoint_every_images / found.images_per_s / 60
    slow = "; MORE than that, so some go unjudged and an early stop comes late" * (takes > every)
    return [
        f"judging     at most {takes:,.1f} min a checkpoint on one {found.instance.device} more "
        f"({config.validation.num_images:,} images); there is one every {every:,.1f} min{slow}"
    ]
