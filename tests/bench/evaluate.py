"""Evaluation: the job against a bare loop, features, metrics, and guided sampling.

Each part is a process of its own or has one: threads are a process's, and so is its peak of memory.
`PARTS="features metrics" make bench WHAT=evaluate` chooses some.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parts import chosen

from jitmodel.artifact import ArtifactInfo, save_artifact
from jitmodel.config import FlowConfig, ModelConfig, SamplerConfig
from jitmodel.model import JiT
from jitmodel.parallel import parallelize, store_as_computed, tune_cpu
from jitmodel.sampler import sample, start_noise

# 256 tokens as in the paper, but small enough to draw some images in a minute.
SMALL = ModelConfig(
    image_size=64, patch_size=4, hidden_size=384, depth=8, num_heads=6, bottleneck_dim=64,
    in_context_len=8, in_context_start=2, num_classes=10,
)  # fmt: skip
STEPS, BATCH, WARM, TIMED, ROUNDS = 10, 4, 1, 5, 5


def apart(function: Callable[..., Any], *arguments: object) -> Any:
    """What a function returns in a new process, which ends by itself: Ray's must not be killed."""
    with ProcessPoolExecutor(1, mp.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def save_small(folder: Path) -> None:
    torch.manual_seed(0)
    model = JiT(SMALL)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    save_artifact(folder, model.state_dict(), ArtifactInfo(model=SMALL))


def small_job(artifact: Path, output: Path) -> Any:
    """A job of chunks of one batch."""
    from pipelines.config import EvaluateConfig, SamplerChoice
    from pipelines.evaluation import Job, make_plan
    from pipelines.features import get_extractor
    from pipelines.models import find_model

    source = find_model(str(artifact))
    config = EvaluateConfig(
        num_images=1000, batch=BATCH, chunk_batches=1, sampler=SamplerChoice(steps=STEPS)
    )
    plan = make_plan(config, source, get_extractor("efflite0").identity)
    return Job(source, plan, str(output))


def bare_rate(artifact: Path) -> float:
    """Images a second of one thread that draws and does nothing else."""
    from pipelines.drawing import draw_batch
    from pipelines.models import load_model

    tune_cpu(threads=1)
    job = small_job(artifact, artifact)
    model = store_as_computed(load_model(job.source), "bf16")
    for i in range(WARM + TIMED):
        if i == WARM:
            start = time.perf_counter()
        draw_batch(model, job.plan, torch.arange(i * BATCH, (i + 1) * BATCH))
    return TIMED * BATCH / (time.perf_counter() - start)


def job_rate(artifact: Path, workers: int) -> float:
    """Images a second of the job: draw, quantise, extract features, publish."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    from pipelines import runtime
    from pipelines.evaluation import SampleWorker
    from pipelines.pool import Pool

    runtime.connect()
    with tempfile.TemporaryDirectory() as output:
        job = small_job(artifact, Path(output))
        with Pool(SampleWorker, "efflite0", "", workers=workers, gpu=False) as pool:
            while len(pool.idle) < workers:
                pool._next()
            list(pool.map((job, i) for i in range(WARM * workers)))
            start = time.perf_counter()
            chunks = range(WARM * workers, (WARM + TIMED) * workers)
            list(pool.map((job, i) for i in chunks))
            return TIMED * workers * BATCH / (time.perf_counter() - start)


def drawing() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "artifact"
        save_small(artifact)
        rounds = [
            (apart(bare_rate, artifact), apart(job_rate, artifact, 1), apart(job_rate, artifact, 2))
            for _ in range(ROUNDS)
        ]
    bare, one, two = (statistics.median(column) for column in zip(*rounds, strict=True))
    return {
        "title": f"drawing: {SMALL.depth} blocks of width {SMALL.hidden_size} at 64 px, {STEPS} "
        f"guided Heun steps, bf16, one thread a worker, medians of {ROUNDS} rounds",
        "rows": [
            {"what": "bare sampler loop", "images/s": bare, "ratio": 1.0, "of": ""},
            {"what": "job, one worker", "images/s": one,
             "ratio": statistics.median(b / a for a, b, _ in rounds), "of": "bare loop"},
            {"what": "job, two workers", "images/s": two,
             "ratio": statistics.median(c / b for _, b, c in rounds), "of": "one worker"},
        ],
    }  # fmt: skip


def inception_file(path: Path) -> None:
    """A file in the standard format with random weights that keep activations alive."""
    import io

    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object, **__: object) -> None:
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.manual_seed(0)
    network = Blank("blank", ["2048"], nothing)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    torch.save(network.state_dict(), path)


def extraction(images: int = 32, rounds: int = 5) -> dict:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from pipelines.features import get_extractor

    tune_cpu(threads=1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inception.pth"
        inception_file(file)
        ours = get_extractor("inception", str(file))
        theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(file))
    pixels = torch.randint(0, 256, (images, 3, 256, 256), dtype=torch.uint8)

    @torch.no_grad()
    def reference() -> torch.Tensor:
        # As its own command does it, but for the batch: 16 is the fastest of 4, 8, 16, 32, 64 here.
        return torch.cat([theirs(part)[0] for part in pixels.split(16)])

    expected, found = reference(), ours(pixels).pooled
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    times = []
    for _ in range(rounds):
        start = time.process_time()  # of one thread, so that a busy machine matters less
        ours(pixels)
        middle = time.process_time()
        reference()
        times.append((middle - start, time.process_time() - middle))
    ratio = statistics.median(b / a for a, b in times)
    return {
        "title": f"features: Inception, random weights, CPU time of one thread, {rounds} rounds; "
        f"largest difference {difference:.1e} of the largest feature",
        "rows": [
            {"what": "torch-fidelity 0.4.0", "ratio": 1.0,
             "images/s": images / statistics.median(b for _, b in times)},
            {"what": "jit (with spatial features)", "ratio": ratio,
             "images/s": images / statistics.median(a for a, _ in times)},
        ],
    }  # fmt: skip


def peak_gb() -> float:
    from pipelines.meter import peak_resident_bytes

    return peak_resident_bytes() / 1e9


def cost(call: Callable[[], object]) -> dict:
    """Time and memory of a call."""
    before, start, cpu = peak_gb(), time.perf_counter(), time.process_time()
    call()
    return {
        "seconds": time.perf_counter() - start,
        "CPU s": time.process_time() - cpu,
        "peak GB": peak_gb(),
        "GB before": before,
    }


def stored_job(folder: Path, num: int) -> tuple[Any, Any]:
    """An evaluation of that many images in the paper's chunks, and an extractor as wide as
    Inception."""
    from pipelines.drawing import Plan
    from pipelines.evaluation import Job
    from pipelines.features import Identity
    from pipelines.models import Source

    identity = Identity("bench", "0", 299, "none", 2048, 1008, 2023)
    plan = Plan(
        num_images=num, batch=100, chunk_batches=5, seed=0, precision="bf16", model=SMALL,
        sampler=SamplerConfig(), flow=FlowConfig(), weights_sha256="0", device="none",
        extractor=identity.as_dict(), torch="0", code="0",
    )  # fmt: skip
    return Job(Source("", True, ArtifactInfo(model=SMALL)), plan, str(folder)), identity


def store(folder: Path, num: int, real: int) -> None:
    """Publish random features as workers do, and a reference that keeps `real` of its own."""
    from pipelines.drawing import Part, part_uri, write_part
    from pipelines.metrics import Moments

    rng = np.random.default_rng(0)
    job, identity = stored_job(folder, num)

    def features(rows: int, width: int) -> np.ndarray:
        found = rng.standard_normal((rows, width), np.float32)
        return np.maximum(found, 0, out=found)

    for chunk in range(job.plan.num_chunks):
        rows = len(job.plan.rows(chunk))
        drawn = [
            features(rows, width)
            for width in (identity.num_features, identity.num_logits, identity.num_spatial)
        ]
        part = Part(np.zeros(rows, int), [bytes(32)] * rows, *drawn, shown={}, device="none")
        write_part(part_uri(job.output, chunk), part, job.plan, chunk)
    kept = features(real, identity.num_features)
    pooled, layer = Moments.of(kept), Moments.of(features(real, identity.num_spatial))
    np.savez(
        folder / "reference.npz", count=real, features=kept, mu=pooled.mean,
        sigma=pooled.covariance, mu_s=layer.mean, sigma_s=layer.covariance,
    )  # fmt: skip


def judging_cost(folder: Path, num: int, is_read_only: bool) -> dict:
    """What a second `jit evaluate` costs, which finds that nothing is left to draw."""
    from pipelines.evaluation import judge, missing_chunks, read_drawn
    from pipelines.reference import read_reference

    tune_cpu(threads=2)
    job, identity = stored_job(folder, num)

    def work() -> None:
        reference = read_reference(str(folder / "reference.npz"))
        assert missing_chunks(job) == []  # reads every part, as read_drawn does again
        drawn = read_drawn(job)
        if not is_read_only:
            judge(drawn, reference, identity)

    return cost(work)


def neighbours_cost(num: int, width: int) -> dict:
    """What precision and its kin cost."""
    from pipelines.metrics import neighbourhoods

    rng = np.random.default_rng(0)
    drawn, real = np.empty((2, num, width), np.float32)
    for array in (drawn, real):
        for i in range(0, num, 1000):
            array[i : i + 1000] = rng.standard_normal((len(array[i : i + 1000]), width))
    return cost(lambda: neighbourhoods(drawn, real, (3, 5)))


def judging(num: int = 50_000, real: int = 10_000) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        apart(store, Path(folder), num, real)
        rows = [
            {"what": what, **apart(judging_cost, Path(folder), num, is_read_only)}
            for what, is_read_only in (
                ("reference and all chunks are read and checked, the chunks twice", True),
                (f"the same, and all metrics against {real:,} kept features", False),
            )
        ]
    return {
        "title": f"a finished folder of {num:,} x 2048 features, 1008 logits, 2023 spatial, two "
        "threads, files in the page cache",
        "rows": rows,
    }


def neighbours() -> dict:
    row = {"what": "precision, recall, density, coverage, k = 3 and 5"}
    return {
        "title": "50,000 x 50,000 images of 2048 features, two threads",
        "rows": [row | apart(neighbours_cost, 50_000, 2048)],
    }


def guided(steps: int = 20, images: int = 2, rounds: int = 3) -> dict:
    """Both networks compiled; the authors' loop runs both passes at every time."""
    from azula.plugins.jit._src import model as authors

    tune_cpu(threads=1)
    torch.manual_seed(0)
    theirs = authors.JiT_models["JiT-B/16"](input_size=256).eval()
    ours = JiT(ModelConfig.named("JiT-B/16", image_size=256))
    ours.load_state_dict(theirs.state_dict())
    parallelize(store_as_computed(ours.eval().requires_grad_(False), "bf16"), compile=True)
    config = SamplerConfig(steps=steps, solver="heun", cfg_scale=2.9, cfg_interval=(0.1, 1.0))
    y = torch.arange(images)
    e = start_noise(ours.flow, ours.config, 0, torch.arange(images))
    grid = torch.linspace(0, 1, steps + 1)

    @torch.no_grad()
    def velocity(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        both = []
        for label in (y, torch.full_like(y, 1000)):
            x = theirs(z, t.expand(images), label).float()
            both.append((x - z) / (1 - t).clamp_min(0.05))
        scale = config.cfg_scale if 0.1 < t < 1.0 else 1.0
        return both[1] + scale * (both[0] - both[1])

    def their_loop(number: int) -> None:
        z = e
        for i in range(number):
            dt = grid[i + 1] - grid[i]
            v = velocity(z, grid[i])
            if i + 1 < steps:
                v = (v + velocity(z + dt * v, grid[i + 1])) / 2
            z = z + dt * v

    def timed(call: Callable[[], object]) -> float:
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            call()
        return time.process_time() - start

    timed(lambda: their_loop(1))
    timed(lambda: sample(ours, y, e, config.model_copy(update={"steps": 2})))
    times = [
        (timed(lambda: sample(ours, y, e, config)), timed(lambda: their_loop(steps)))
        for _ in range(rounds)
    ]
    return {
        "title": f"guided sampling: JiT-B/16 at 256 px, {images} images, {steps} Heun steps, "
        f"scale 2.9 in (0.1, 1), bf16, both compiled, CPU time of one thread, medians of {rounds} "
        "rounds",
        "rows": [
            {"what": "authors' network and loop, both passes always", "ratio": 1.0,
             "CPU s/image": statistics.median(b for _, b in times) / images},
            {"what": "jit", "ratio": statistics.median(b / a for a, b in times),
             "CPU s/image": statistics.median(a for a, _ in times) / images},
        ],
    }  # fmt: skip


PARTS = {
    "drawing": drawing,
    "features": lambda: apart(extraction),
    "metrics": judging,
    "neighbours": neighbours,
    "guided": lambda: apart(guided),
}


def run() -> dict:
    return {"torch": torch.__version__, "tables": [part() for part in chosen(PARTS)]}


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
