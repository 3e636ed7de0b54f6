"""Small training runs that several test files start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from jitmodel.config import ModelConfig
from pipelines import checkpoints, storage
from pipelines.config import TrainConfig
from pipelines.fit import LocalContext

MODEL = ModelConfig(
    image_size=28, patch_size=14, hidden_size=32, depth=2, num_heads=2, bottleneck_dim=16,
    in_context_len=2, in_context_start=1, num_classes=10,
)  # fmt: skip


def config_for(data: Path, store: Path, name: str = "run", **changes) -> TrainConfig:
    """Ten steps of 16 images; a checkpoint every second step."""
    options = {
        "data": str(data),
        "storage": str(store),
        "name": name,
        "model": MODEL,
        "optimizer": {"learning_rate": 1e-3, "warmup_images": 64, "ema_decays": (0.5, 0.9)},
        "loader": {"lanes": 4, "window": 2},
        "sampler": {"steps": 2},
        "parallel": {"precision": "fp32"},
        "global_batch": 16,
        "micro_batch": 4,
        "total_images": 160,
        "checkpoint_every_images": 32,
        "grid_every_images": 0,
        "grid_ema": 0.9,
        "log_every_steps": 1,
    }
    return TrainConfig.model_validate(options | changes)


class Killed(RuntimeError):
    pass


class KilledAt(LocalContext):
    """A process that ends in the middle of a step."""

    def __init__(self, images: int, batch: int = 16) -> None:
        super().__init__()
        self.steps_left = images // batch

    def preempted(self) -> bool:
        self.steps_left -= 1
        if self.steps_left < 0:
            raise Killed
        return False


def lines(config: TrainConfig) -> list[dict]:
    text = Path(config.storage, config.name, "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def tensors(config: TrainConfig) -> dict[str, torch.Tensor]:
    found = checkpoints.newest(storage.join(config.storage, config.name))
    assert found is not None
    return checkpoints.read(found.uri, "")


RANK = """
import os, sys, time
import torch, torch.distributed as dist
from pipelines.config import StageFailed, TrainConfig
from pipelines.fit import LocalContext, fit

torch.set_num_threads(1)
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo")
{prelude}
for text in sys.argv[1:]:
    config = TrainConfig.model_validate_json(text)
    try:
        fit(config, LocalContext(rank, world_size, torch.device("cpu")))
    except StageFailed as error:
        print("STOPPED", error)
        print("AT", time.time())
dist.destroy_process_group()
sys.stdout.flush()
# Gloo's thread drops the tensors of its last work when it comes to it: while the interpreter is
# torn down, that would be an abort (seen once in a hundred ends).
os._exit(0)
"""


def run_on_ranks(
    port: int, *configs: TrainConfig, world_size: int = 2, prelude: str = ""
) -> list[str]:
    """Fit on gloo processes, after some lines of Python in each; what each printed."""
    processes = start_ranks(port, *configs, world_size=world_size, prelude=prelude)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world_size, "\n".join(outputs)
    return outputs


def start_ranks(
    port: int, *configs: TrainConfig, world_size: int = 2, prelude: str = ""
) -> list[subprocess.Popen]:
    """The processes of run_on_ranks, at work."""
    world = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    texts = [config.model_dump_json() for config in configs]
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK.replace("{prelude}", prelude), *texts],
            env=os.environ | world | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]


def stopped(outputs: list[str]) -> set[str]:
    """The sentences with which ranks stopped."""
    return {out[out.index("STOPPED ") :].splitlines()[0] for out in outputs}
