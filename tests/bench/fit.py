"""`fit` against a bare loop over the same TrainState.step, and what a JiT-B/16 step waits for.

The bare loop has its batches in memory; what `fit` adds is loading, metrics and the status line.
Both take the same number of steps in turn, in one process, with one worker. Then JiT-B/16 at
256 px, from lossless WebP as `jit prepare` stores it: how long a step waits for data, and how long
a checkpoint holds training up.
"""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from loader import PHOTOGRAPHS, SIZE, dataset  # a neighbour of this file

from jitmodel.config import ModelConfig
from jitmodel.parallel import tune_cpu
from pipelines import fit as fit_module
from pipelines import images
from pipelines.checkpoints import Saver
from pipelines.config import TrainConfig
from pipelines.fit import LocalContext, _on, build, fit
from pipelines.loader import Loader
from pipelines.shards import read_manifest

ROUNDS, STEPS = 12, 8
SMALL = {"hidden_size": 256, "depth": 6, "num_heads": 4, "in_context_start": 2}
SAVE_STEPS, SAVE_AT = 10, 4


class Clock(LocalContext):
    """Notes the time at the end of each step; fit asks about preemption just before it saves."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def preempted(self) -> bool:
        self.ends.append(time.perf_counter())
        return False

    def steps(self) -> list[float]:
        """Seconds of each step but the first, which starts the loader."""
        return [b - a for a, b in itertools.pairwise(self.ends)]


def run() -> dict:
    if not PHOTOGRAPHS.is_dir():
        sys.exit(f"needs the real photographs at {PHOTOGRAPHS}")
    tune_cpu(threads=2)
    folder = Path(tempfile.mkdtemp(prefix="jit-bench-"))
    try:
        files = sorted(PHOTOGRAPHS.glob("*.JPEG"))
        crops = [np.asarray(images.adm_crop(images.decode(f.read_bytes()), SIZE)) for f in files]
        dataset(folder / "data", crops, "webp", copies=4)
        return {"tables": [against_a_bare_loop(folder), waiting(folder)]}
    finally:
        shutil.rmtree(folder)


def config_for(folder: Path, name: str, model: ModelConfig, **changes: Any) -> TrainConfig:
    options = {
        "data": str(folder / "data"), "storage": str(folder / "runs"), "name": name,
        "model": model.model_copy(update={"num_classes": 200}).model_dump(),
        "loader": {"lanes": 8}, "grid_every_images": 0, "checkpoint_every_images": 10**9,
        "keep_checkpoints": 1, "log_every_steps": 5,
    }  # fmt: skip
    return TrainConfig.model_validate(options | changes)


def against_a_bare_loop(folder: Path) -> dict:
    config = config_for(
        folder, "small", ModelConfig.model_validate(SMALL), global_batch=32, micro_batch=32,
        total_images=32,
    )  # fmt: skip
    state = build(config, LocalContext())
    loader = Loader(config.data, read_manifest(config.data), config.loader, seed=0, global_batch=32)
    stream = loader.batches()
    ready = [_on(torch.device("cpu"), next(stream)) for _ in range(STEPS)]
    stream.close()

    def fitted(number: int) -> float:
        clock = Clock()
        longer = {"total_images": config.global_batch * (STEPS + 1) * (number + 1)}
        fit(config.model_copy(update=longer), clock)
        return statistics.fmean(clock.steps())  # the one with the status line costs more

    def bare(number: int) -> float:
        began = time.perf_counter()
        for batch in ready:
            state.step([batch])
        return (time.perf_counter() - began) / len(ready)

    rounds = []
    for number in range(ROUNDS):  # each side begins as often as the other
        sides = (fitted, bare) if number % 2 else (bare, fitted)
        took = {side: side(number) for side in sides}
        rounds.append((took[fitted], took[bare]))
    return {
        "title": f"fit with one worker against a bare loop, width 256, depth 6, {SIZE} px, 32 "
        f"images a step, two threads, median of {ROUNDS} alternating rounds of {STEPS} steps",
        "rows": [
            {
                "fit, s a step": statistics.median(a for a, _ in rounds),
                "bare loop, s a step": statistics.median(b for _, b in rounds),
                "speed of fit": statistics.median(b / a for a, b in rounds),
                "worst round": min(b / a for a, b in rounds),
            }
        ],
    }


def waiting(folder: Path) -> dict:
    """Data wait of each step, and the steps around a save, of JiT-B/16 with 8 images."""
    batch = 8
    config = config_for(
        folder, "b16", ModelConfig.named("JiT-B/16"), global_batch=batch, micro_batch=batch,
        total_images=batch * SAVE_STEPS, log_every_steps=1,
        checkpoint_every_images=batch * SAVE_AT,
    )  # fmt: skip
    clock, held_up = Clock(), []

    class Timed(Saver):
        def start(self, *arguments: Any, **options: Any) -> None:
            began = time.perf_counter()
            super().start(*arguments, **options)
            held_up.append(time.perf_counter() - began)

    with mock.patch.object(fit_module, "Saver", Timed):
        fit(config, clock)
    metrics = (folder / "runs/b16/metrics.jsonl").read_text().splitlines()
    waits = [json.loads(line)["data_wait"] for line in metrics][1:]
    steps = clock.steps()
    undisturbed = statistics.median(steps[1 : SAVE_AT - 1])
    following = steps[SAVE_AT : 2 * SAVE_AT - 1]
    return {
        "title": f"JiT-B/16 at {SIZE} px, {batch} images a step, two threads",
        "rows": [
            {
                "step, s": undisturbed,
                "data wait, median": statistics.median(waits),
                "data wait, largest": max(waits),
                "a save holds training up, s": held_up[0],
                "in steps": held_up[0] / undisturbed,
                "step while it is stored, s": statistics.median(following),
            }
        ],
    }
