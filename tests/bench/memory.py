"""Peak resident memory of each rank against `jit plan`'s arithmetic, in real steps on CPUs.

`run` starts one process a rank: this file again, with what to train. A rank first takes a step of
a tiny model, so that libraries and thread pools are there; what it holds then is its base, and
peaks are counted from there. glibc is told to give every freed block of 1 MiB back: holes in the
heap are the allocator's and not the model's. The plan's figure is without the reserve that it
assumes for a GPU's libraries.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from pipelines.ports import free_port

GLIBC = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
TINY = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 2,
        "in_context_start": 1, "num_classes": 10}  # fmt: skip
RUNS = (("JiT-B/16", 1, 8), ("JiT-L/16", 1, 4), ("JiT-L/16", 2, 4), ("JiT-L/16", 4, 4))
"""Model, ranks, images of a global batch."""


def measure(model: dict, *, world: int = 1, **options: object) -> list[dict]:
    """Train on `world` gloo processes; what each rank measured, in bytes.

    Args:
        model: fields of ModelConfig.
        world: number of processes.
        options: micro_batch, pieces, num_emas, precision, checkpointing, compile; folder, to store
            a checkpoint there.
    """
    where = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    line = [sys.executable, __file__, json.dumps({"model": model, **options})]
    ranks = [
        subprocess.Popen(
            line, env=os.environ | GLIBC | where | {"RANK": str(rank)}, stdout=subprocess.PIPE
        )
        for rank in range(world)
    ]
    outputs = [rank.communicate(timeout=900)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def run() -> dict:
    from jitmodel.config import ModelConfig

    rows = []
    for name, world, images in RUNS:
        config = ModelConfig.named(name)
        ranks = measure(config.model_dump(), world=world, micro_batch=images // world)
        worst = max(ranks, key=lambda rank: rank["peak"])
        rows.append(
            {
                "model": name,
                "ranks": world,
                "images a rank": images // world,
                "after building, GB": max(rank["built"] for rank in ranks) / 1e9,
                "peak, GB": worst["peak"] / 1e9,
                "plan, GB": worst["plan"] / 1e9,
                "peak / plan": worst["peak"] / worst["plan"],
                "libraries, GB": worst["base"] / 1e9,
            }
        )
    return {
        "title": "Memory of one rank in training (fp32 weights, gradients, AdamW, 3 EMAs; bf16), "
        "the largest rank, libraries apart",
        "rows": rows,
    }


def rank(plan: dict) -> None:
    """Train three steps as one of the processes, and print what they took.

    With a folder, a checkpoint is stored while one more step is trained.
    """
    import torch
    import torch.distributed as dist

    from jitmodel import cost
    from jitmodel.config import ModelConfig, OptimizerConfig
    from jitmodel.model import JiT
    from jitmodel.parallel import device_mesh, parallelize
    from jitmodel.state import Batch, TrainState

    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    if world > 1:
        dist.init_process_group("gloo")
    precision, num_emas = plan.get("precision", "bf16"), plan.get("num_emas", 3)
    checkpointing, compile = plan.get("checkpointing", "none"), plan.get("compile", False)
    pieces = plan.get("pieces", 1)

    def build(config: ModelConfig) -> TrainState:
        with torch.device("meta"):
            model = JiT(config)
        parallelize(
            model, device_mesh("cpu", world), checkpointing=checkpointing, compile=compile,
            precision=precision,
        )  # fmt: skip
        model.to_empty(device="cpu")
        model.init_weights(torch.Generator().manual_seed(0))
        decays = tuple(0.99 + i / 1000 for i in range(num_emas))
        return TrainState(
            model, OptimizerConfig(ema_decays=decays), total_images=10**6, precision=precision
        )

    def step(state: TrainState, images: int) -> None:
        size = state.model.config.image_size
        pixels = torch.zeros((images, 3, size, size), dtype=torch.uint8)
        index = torch.arange(images)
        state.step([Batch(pixels, index % 10, index)] * pieces)

    step(build(ModelConfig.model_validate(TINY)), 2)
    base = resident()
    config = ModelConfig.model_validate(plan["model"])
    state = build(config)
    built = most_resident()
    for _ in range(3):
        step(state, plan["micro_batch"])
    if plan.get("folder"):
        from pipelines.checkpoints import Meta, Saver

        meta = Meta(
            run="run", images_seen=3, identity={}, config={}, data="", classes=(),
            world_size=world, files={}, versions={},
        )  # fmt: skip
        rank = int(os.environ["RANK"])
        saver = Saver(plan["folder"], rank=rank, world_size=world, keep=set, check=lambda: None)
        saver.prepare(state)
        saver.start(3, state, meta)
        step(state, plan["micro_batch"])
        assert saver.wait()
    peak = most_resident()
    expected = cost.memory(
        config, micro_batch=plan["micro_batch"], accumulates=pieces > 1, shards=world,
        num_emas=num_emas, precision=precision, checkpointing=checkpointing, compile=compile,
        fused_attention=precision == "fp32",
    )  # fmt: skip
    found = {"base": base, "built": built - base, "peak": peak - base, "plan": expected.peak}
    found["plan"] += expected.host if plan.get("folder") else 0
    print(json.dumps(found | {"parts": expected._asdict()}))
    if world > 1:
        dist.destroy_process_group()


def resident() -> int:
    """Bytes of this process in memory now."""
    return status("VmRSS")


def most_resident() -> int:
    """Most bytes that it ever had. getrusage's maximum is no less than that of the process that
    started it, such as a test runner's."""
    return status("VmHWM")


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, field
    return int(found[1]) * 1024


if __name__ == "__main__":
    rank(json.loads(sys.argv[1]))
