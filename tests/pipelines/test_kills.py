"""`jit train demo`, two workers, killed at random ten times: the same images in the end."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

from jitmodel.pixels import to_pixels
from jitmodel.sampler import sample, start_noise
from pipelines import checkpoints, storage
from pipelines.config import TrainConfig
from pipelines.models import find_model, load_model
from tests.processes import descendants

WORKER = "ray::RayTrainWorker"
TOTAL = 12_800


class Run:
    """A run of the demo's model, by the command line."""

    def __init__(self, data: Path, store: Path, name: str, ray_folder: Path) -> None:
        self.folder, self.log = store / name, store / f"{name}.log"
        self.environment = os.environ | {"RAY_TMPDIR": str(ray_folder)}
        self.command = [
            str(Path(sys.executable).parent / "jit"), "train", "demo", "--data", str(data),
            "--storage", str(store), "--name", name, "--workers", "2", "--total-images", str(TOTAL),
            "--checkpoint-every-images", "256", "--grid-every-images", str(TOTAL),
        ]  # fmt: skip

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(self.command, env=self.environment, stdout=log, stderr=log)

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        assert process.wait(600) == 0, self.log.read_text()[-4000:]

    def newest_step(self) -> int:
        return max(checkpoints.complete(str(self.folder)), default=0)

    def wait_for_a_checkpoint(self, process: subprocess.Popen[bytes]) -> None:
        """Of its own workers: those of a command that was killed may end a save after it."""
        began = time.monotonic()

        def wait_until(condition: Callable[[], bool]) -> None:
            while not condition():
                assert process.poll() is None, self.log.read_text()[-4000:]
                assert time.monotonic() - began < 300, "no checkpoint within five minutes"
                time.sleep(0.02)

        wait_until(lambda: len(descendants(process.pid, WORKER)) == 2)
        before = self.newest_step()
        wait_until(lambda: self.newest_step() > before)


def kill_worker(process: subprocess.Popen[bytes], rng: random.Random) -> None:
    """One of the two; Ray Train starts both again."""
    workers = sorted(descendants(process.pid, WORKER))
    assert len(workers) == 2, descendants(process.pid)
    os.kill(rng.choice(workers), signal.SIGKILL)


def kill_all(pids: Iterable[int]) -> None:
    """A Ray cluster with all of its workers."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def drawn(run: Run) -> tuple[str, str]:
    """Digests of the grid that training drew, and of images of the best-known EMA."""
    config = TrainConfig.model_validate(yaml.safe_load((run.folder / "config.yaml").read_text()))
    grid = run.folder / f"samples/images_{TOTAL:010d}.png"
    model = load_model(find_model(str(run.folder), config.grid_ema))
    y = torch.arange(10)
    e = start_noise(model.flow, model.config, 7, torch.arange(10))
    pixels = to_pixels(sample(model, y, e, config.sampler))
    digests = [hashlib.sha256(part).hexdigest() for part in (grid.read_bytes(), pixels.numpy())]
    return digests[0], digests[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_killed_at_random_ten_times_draws_the_same_images(
    demo_images, tmp_path, short_tmp
):
    whole, broken = (Run(demo_images, tmp_path, name, short_tmp) for name in ("whole", "broken"))
    whole.finish(whole.start())

    rng = random.Random(0)
    kills = ["worker"] * 4 + ["command"] * 3 + ["machine"] * 3
    rng.shuffle(kills)
    process = broken.start()
    for kill in kills:
        broken.wait_for_a_checkpoint(process)
        time.sleep(rng.uniform(0, 1.5))  # in a step, or in the next save
        assert process.poll() is None, "the run ended before it was killed ten times"
        if kill == "worker":
            kill_worker(process, rng)
            continue
        if kill == "machine":
            kill_all(descendants(process.pid))
        process.kill()  # its Ray cluster and its workers go by themselves, some seconds later
        process.wait()
        process = broken.start()
    broken.finish(process)

    assert drawn(broken) == drawn(whole)
    there, here = (
        checkpoints.read(storage.join(str(run.folder), f"checkpoints/step_{TOTAL // 64:08d}"), "")
        for run in (whole, broken)
    )
    assert all(torch.equal(here[name], tensor) for name, tensor in there.items())
