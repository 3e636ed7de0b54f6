"""The demo's model and images, killed at random ten times: the same images in the end."""

import hashlib
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from jitmodel.pixels import to_pixels
from jitmodel.sampler import sample, start_noise
from pipelines import checkpoints, storage
from pipelines.config import TrainConfig, load_preset
from pipelines.models import find_model, load_model

FIT = """
import sys
from pipelines.config import TrainConfig
from pipelines.fit import LocalContext, fit
result = fit(TrainConfig.model_validate_json(sys.argv[1]), LocalContext())
print("ENDED", result.images_seen)
"""


def start(config: TrainConfig) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", FIT, config.model_dump_json()],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def newest_step(config: TrainConfig) -> int:
    return max(checkpoints.complete(storage.join(config.storage, config.name)), default=0)


def kill_somewhere(config: TrainConfig, process: subprocess.Popen, rng: random.Random) -> None:
    """SIGKILL, some time after the process has stored a checkpoint of its own."""
    before, began = newest_step(config), time.monotonic()
    while newest_step(config) == before:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() - began < 300, "no checkpoint within five minutes"
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 1.5))  # in a step, or in the next save
    process.kill()
    process.wait()


def drawn(config: TrainConfig) -> tuple[str, str]:
    """Digests of the grid that training drew, and of images of the best-known EMA."""
    run = Path(config.storage, config.name)
    grid = run / f"samples/images_{config.total_images:010d}.png"
    model = load_model(find_model(str(run), config.grid_ema))
    y = torch.arange(10)
    e = start_noise(model.flow, model.config, 7, torch.arange(10))
    pixels = to_pixels(sample(model, y, e, config.sampler))
    digests = [hashlib.sha256(part).hexdigest() for part in (grid.read_bytes(), pixels.numpy())]
    return digests[0], digests[1]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_killed_at_random_ten_times_draws_the_same_images(demo_images, tmp_path):
    preset = load_preset("train", "demo", TrainConfig)
    whole = preset.model_copy(
        update={
            "data": str(demo_images),
            "storage": str(tmp_path),
            "name": "whole",
            "workers": "1",
            "total_images": 6400,
            "checkpoint_every_images": 256,
            "grid_every_images": 6400,
        }
    )
    broken = whole.model_copy(update={"name": "broken"})
    rng = random.Random(0)

    unbroken = start(whole)
    assert "ENDED 6400" in unbroken.communicate(timeout=600)[0]
    for _ in range(10):
        kill_somewhere(broken, start(broken), rng)
    assert newest_step(broken) < 100, "the run ended before it was killed ten times"
    assert "ENDED 6400" in start(broken).communicate(timeout=600)[0]

    assert drawn(broken) == drawn(whole)
    there, here = (
        checkpoints.read(storage.join(str(tmp_path), name, "checkpoints/step_00000100"), "")
        for name in ("whole", "broken")
    )
    assert all(torch.equal(here[name], tensor) for name, tensor in there.items())
