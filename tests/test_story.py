"""The whole road in one go: prepare, train, a kill, resume, export, evaluate, serve."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from importlib import resources
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from jitmodel.artifact import read_info
from pipelines import cli
from pipelines.config import ServeConfig

CLASSES, IMAGES = 3, 32
TOTAL, BATCH = 64 * 16, 16
SMALL = [
    "--model.patch-size", "7", "--model.hidden-size", "32", "--model.depth", "3",
    "--model.num-heads", "2", "--model.num-classes", str(CLASSES), "--global-batch", str(BATCH),
    "--total-images", str(TOTAL), "--checkpoint-every-images", "128", "--log-every-steps", "4",
    "--grid-every-images", "512", "--sampler.steps", "4", "--parallel.precision", "fp32",
]  # fmt: skip


def photographs(folder: Path) -> None:
    """A tree of real photographs of clothes, one folder a class, and one file that is none."""
    parquet = resources.files("pipelines") / "embedded" / "fashion-mnist-test.parquet"
    rows = pq.read_table(parquet, columns=["image", "label"]).to_pylist()
    for label in range(CLASSES):
        (folder / f"class-{label}").mkdir(parents=True)
        some = [row["image"]["bytes"] for row in rows if row["label"] == label][:IMAGES]
        for i, image in enumerate(some):
            (folder / f"class-{label}" / f"{i:03d}.png").write_bytes(image)
    (folder / "class-1" / "broken.png").write_bytes(b"this is no picture")


def jit(*line: str) -> None:
    assert cli.main([str(word) for word in line]) == 0, line


def kill_when(line: list[str], newest: Path) -> None:
    """Start a command line in a process, and SIGKILL it once a file has appeared."""
    log = newest.parent.parent.with_suffix(".log")
    with log.open("wb") as out:
        command = [sys.executable, "-m", "pipelines.cli", *line]
        driver = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        deadline = time.monotonic() + 240
        while not newest.exists():
            assert driver.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.ray
def test_images_become_a_server_although_training_is_killed_on_the_way(
    ray_cluster, tmp_path, caplog
):
    caplog.set_level("INFO", logger="pipelines")
    raw, data, runs = tmp_path / "raw", tmp_path / "data", tmp_path / "runs"
    photographs(raw)

    jit("prepare", "demo", "--source", raw, "--output", data, "--rows-per-shard", "24",
        "--rows-per-group", "8", "--max-reject-fraction", "0.05")  # fmt: skip
    rejects = pq.read_table(data / "rejects.parquet").to_pylist()
    assert [row["path"] for row in rejects] == ["class-1/broken.png"]
    jit("prepare", "--verify", data)

    train = ["train", "demo", "--data", str(data), "--storage", str(runs), "--workers", "2", *SMALL]
    kill_when([*train, "--name", "broken"], runs / "broken" / "latest.json")
    assert metrics_of(runs / "broken")[-1]["images_seen"] < TOTAL
    jit(*train, "--name", "broken")
    jit(*train, "--name", "whole")
    assert f"going on from {runs / 'broken'}" in caplog.text

    loss = {
        name: [line["loss"] for line in metrics_of(runs / name)] for name in ("broken", "whole")
    }
    assert loss["broken"] == loss["whole"]
    assert len(loss["whole"]) == TOTAL // BATCH // 4
    assert min(loss["whole"][-3:]) < loss["whole"][0]

    for name in ("broken", "whole"):
        jit("export", runs / name, "demo", "--output", tmp_path / f"artifact-{name}")
    info, unbroken = (read_info(tmp_path / f"artifact-{name}") for name in ("broken", "whole"))
    assert info.weights_sha256 == unbroken.weights_sha256
    assert info.images_seen == TOTAL

    artifact = tmp_path / "artifact-broken"
    jit("reference", data, "--output", tmp_path / "reference.npz", "--workers", "1")
    jit("evaluate", "demo", "--model", artifact, "--reference", tmp_path / "reference.npz",
        "--output", tmp_path / "evaluation", "--num-images", "12", "--batch", "6",
        "--sampler.steps", "2", "--workers", "1")  # fmt: skip
    report = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    assert report["metrics"]["FD-efflite0"] > 0
    assert report["identity"]["weights_sha256"] == info.weights_sha256

    from pipelines.serve import serving

    with serving(ServeConfig(model=str(artifact), port=0, precision="fp32")) as url:
        body = {"prompt": "class-2", "n": 2, "seed": 5, "num_inference_steps": 3}
        request = urllib.request.Request(
            f"{url}/v1/images/generations",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            images = json.load(response)["data"]
    drawn = [Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))) for image in images]
    assert [image.size for image in drawn] == [(28, 28), (28, 28)]
    assert drawn[0].tobytes() != drawn[1].tobytes()
