"""A sweep is one job: killed anywhere it goes on, no cell is computed twice, its numbers hold."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest
import ray
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from pipelines import evaluate, export, lease, storage, sweep, sweep_report
from pipelines.cli import resolve
from pipelines.config import (
    EvaluateConfig,
    ExportConfig,
    GridConfig,
    ReferenceConfig,
    SamplerChoice,
    SweepConfig,
    load_preset,
)
from pipelines.drawing import code_sha256
from pipelines.features import get_extractor
from pipelines.fit import LocalContext, fit
from pipelines.report import command
from tests.pipelines.conftest import replaced
from tests.pipelines.runs import config_for

SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)


@pytest.fixture(scope="module")
def run_folder(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of eight steps with two checkpoints and two EMAs."""
    config = config_for(
        tiny_dataset, tmp_path_factory.mktemp("runs"), "tiny", total_images=128,
        checkpoint_every_images=64, sampler={"steps": 2, "cfg_scale": 1.5}, grid_ema=0.5,
        optimizer={"learning_rate": 1e-2, "warmup_images": 0, "ema_decays": (0.5, 0.9)},
    )  # fmt: skip
    fit(config, LocalContext())
    return storage.join(config.storage, config.name)


@pytest.fixture(scope="module")
def reference(
    ray_cluster: None, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    path = str(tmp_path_factory.mktemp("reference") / "reference.npz")
    evaluate.run_reference(ReferenceConfig(data=str(tiny_dataset), output=path, workers=2))
    return path


def config(model: str, reference: str, output: object, **changes: object) -> SweepConfig:
    """14 cells of 20 images in 4 chunks; a winner of 40 images."""
    fields = {
        "model": model, "reference": reference, "output": str(output), "num_images": 40,
        "cell_images": 20, "batch": 5, "chunk_batches": 1, "precision": "fp32", "workers": 2,
        "keep_images": "png", "grid": GridConfig(cfg_scale=SCALES, cfg_interval=((0.0, 1.0),)),
    }  # fmt: skip
    return SweepConfig(**{**fields, **changes})


def written(output: Path) -> dict[Path, int]:
    """What is published of cells and winner, with the time at which it was written."""
    return {
        path: path.stat().st_mtime_ns
        for pattern in ("*/*/features/part-*.parquet", "*/*/cell.json")
        for path in output.glob(pattern)
    }


class Story(NamedTuple):
    """A sweep whose driver and one of whose workers were killed, and what came after."""

    config: SweepConfig
    output: Path
    at_death: dict[Path, int]
    log: str
    """Of the driver that was killed."""
    drawn_later: int
    """Chunks that the second driver drew."""


@pytest.fixture(scope="module")
def story(run_folder: str, reference: str, tmp_path_factory: pytest.TempPathFactory) -> Story:
    output = tmp_path_factory.mktemp("sweep") / "output"
    wanted = config(run_folder, reference, output)
    log = output.parent / "log"
    line = [sys.executable, "-m", "pipelines.sweep", *_words(wanted), "--workers", "2"]
    address = ray.get_runtime_context().gcs_address
    with log.open("wb") as sink:
        driver = subprocess.Popen(line, stderr=sink, env={**os.environ, "RAY_ADDRESS": address})

    def wait(happens: object) -> None:
        while not happens():
            assert driver.poll() is None, log.read_text()
            time.sleep(0.02)

    wait(lambda: "drew 5 of" in log.read_text())
    victim = int(re.findall(r"worker: process (\d+)", log.read_text())[0])
    os.kill(victim, signal.SIGKILL)
    wait(lambda: len(list(output.glob("cells/*/cell.json"))) >= 3)
    workers = [int(pid) for pid in re.findall(r"worker: process (\d+)", log.read_text())]
    driver.kill()
    driver.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.02)
    at_death = written(output)

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("pipelines").addHandler(handler)
    logging.getLogger("pipelines").setLevel(logging.INFO)
    sweep.run(wanted)
    logging.getLogger("pipelines").removeHandler(handler)
    drawn = sum(message.startswith("drew ") for message in messages)
    return Story(wanted, output, at_death, log.read_text(), drawn)


def _words(wanted: SweepConfig) -> list[str]:
    """The command line that a report gives for a sweep."""
    return command("sweep", wanted.model_dump(mode="json")).replace("\\\n", "").split()[2:]


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


@pytest.mark.ray
def test_a_killed_sweep_goes_on_and_computes_nothing_twice(story: Story):
    now = written(story.output)

    assert "a worker died" in story.log
    cells = [path for path in story.at_death if path.name == "cell.json"]
    parts = [path for path in story.at_death if path.suffix == ".parquet"]
    assert len(cells) >= 3
    assert {path: now[path] for path in story.at_death} == story.at_death
    # What was there and what the second driver drew is all there is: nothing was drawn twice.
    assert len(parts) + story.drawn_later == sum(path.suffix == ".parquet" for path in now)
    found = report_of(story.output)
    assert (
        len(found["cells"]) == found["search"]["cells"] == len(list(story.output.glob("cells/*")))
    )


@pytest.mark.ray
def test_a_cell_is_what_evaluate_draws_with_its_settings(
    story: Story, run_folder: str, reference: str, tmp_path: Path
):
    found = report_of(story.output)
    name, cell = list(found["cells"].items())[1]
    assert cell["sampler"]["cfg_scale"] > 1

    evaluate.run(
        EvaluateConfig(
            model=run_folder, ema=cell["ema"], reference=reference, output=str(tmp_path),
            num_images=20, batch=5, chunk_batches=2, precision="fp32", workers=1,
            sampler=SamplerChoice(**cell["sampler"]),
        )
    )  # fmt: skip

    alone = report_of(tmp_path)
    assert alone["identity"]["pixels_sha256"] == cell["pixels_sha256"], name
    assert cell["metrics"].items() <= alone["metrics"].items()


@pytest.mark.ray
def test_cells_share_their_start_noise_with_the_winner(story: Story):
    winner = report_of(story.output)["winner"]

    def digests(folder: str, chunk: int) -> list[bytes]:
        part = story.output / folder / f"features/part-{chunk:05d}.parquet"
        return pq.read_table(part)["sha256"].to_pylist()

    for chunk in range(4):
        cell = digests(f"cells/{winner['cell']}", chunk)
        assert cell == digests(winner["folder"], chunk)


@pytest.mark.ray
def test_the_exhaustive_search_adds_the_other_cells_and_finds_the_same_winner(story: Story):
    refined = report_of(story.output)
    before = written(story.output)

    sweep.run(story.config.model_copy(update={"search": "exhaustive"}))

    whole = report_of(story.output)
    assert whole["winner"] == refined["winner"]
    assert whole["search"]["cells"] == whole["search"]["grid"] == 14
    assert whole["search"]["images_saved"] == 0
    saved = 14 - refined["search"]["cells"]
    assert saved >= 2
    assert refined["search"]["images_saved"] == saved * 20
    assert whole["cells"].keys() > refined["cells"].keys()
    now = written(story.output)
    assert {path: now[path] for path in before} == before
    distances = {n: c["metrics"]["FD-efflite0"] for n, c in whole["cells"].items()}
    assert min(distances, key=distances.__getitem__) == whole["winner"]["cell"]


@pytest.mark.ray
def test_a_finished_sweep_is_reported_again_without_a_cluster(
    story: Story, monkeypatch: pytest.MonkeyPatch
):
    before = report_of(story.output)
    for file in ("report.json", "report.md", "report.png"):
        (story.output / file).unlink()
    monkeypatch.delattr("pipelines.sweep.connect")

    sweep.run(story.config.model_copy(update={"search": before["search"]["kind"]}))

    assert report_of(story.output) == before


@pytest.mark.ray
def test_a_winner_of_another_size_is_drawn_from_the_cells_that_are_there(
    story: Story, tmp_path: Path
):
    shutil.copytree(story.output, tmp_path / "sweep")
    wanted = story.config.model_copy(update={"output": str(tmp_path / "sweep"), "num_images": 30})
    before = written(tmp_path / "sweep")

    sweep.run(wanted)

    now = written(tmp_path / "sweep")
    assert {path: now[path] for path in before} == before
    added = [path.relative_to(tmp_path / "sweep") for path in now.keys() - before.keys()]
    (folder,) = {Path(*path.parts[:2]) for path in added}
    assert folder.name.endswith("-30")
    assert json.loads((tmp_path / "sweep/report.json").read_text())["winner"]["num_images"] == 30
    assert len(list((tmp_path / "sweep" / folder / "images").rglob("*.png"))) == 30


@pytest.mark.ray
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("winner/*/report.json", ""),
        ("winner/*/report.json", "[]"),
        ("winner/*/report.json", '{"metrics": {}, "warnings": [], "identity": {}, "config": {}}'),
        (
            "winner/*/report.json",
            '{"metrics": {}, "warnings": [], "identity": null, "config": 1}',
        ),
        ("cells/*/cell.json", None),
    ],
)
def test_a_result_that_lacks_something_is_computed_again_from_what_was_drawn(
    story: Story, tmp_path: Path, file: str, content: str | None
):
    shutil.copytree(story.output, tmp_path / "sweep")
    damaged = next((tmp_path / "sweep").glob(file))
    whole = json.loads(damaged.read_text())
    if content is None:
        content = json.dumps({k: v for k, v in whole.items() if k != "metrics"})
    damaged.write_text(content)
    drawn = {p: t for p, t in written(tmp_path / "sweep").items() if p != damaged}

    sweep.run(story.config.model_copy(update={"output": str(tmp_path / "sweep")}))

    assert json.loads(damaged.read_text())["metrics"] == whole["metrics"]
    now = written(tmp_path / "sweep")
    assert {path: now[path] for path in drawn} == drawn


@pytest.mark.ray
def test_images_that_a_finished_winner_lacks_are_not_said_to_be_kept(story: Story, tmp_path: Path):
    shutil.copytree(story.output, tmp_path / "sweep")
    wanted = story.config.model_copy(update={"output": str(tmp_path / "sweep")})

    with pytest.raises(ValueError, match=r"keep_images is png there, tar here"):
        sweep.run(wanted.model_copy(update={"keep_images": "tar"}))

    gone = next((tmp_path / "sweep").glob("winner/*/images/**/*.png"))
    pixels = gone.read_bytes()
    gone.unlink()
    sweep.run(wanted)
    assert gone.read_bytes() == pixels


@pytest.mark.ray
def test_the_report_says_all_that_is_needed_to_do_it_again(story: Story):
    found = report_of(story.output)
    page = (story.output / "report.md").read_text()
    identity = found["identity"]

    assert found["minimised"] == "FD-efflite0"
    assert identity["weights_sha256"].keys() == {"0.5", "0.9"}
    for field in (
        "reference_sha256", "extractor", "seed", "plan_sha256", "winner_plan_sha256", "batch",
        "pixels_sha256", "versions", "devices", "precision", "models",
    ):  # fmt: skip
        assert identity[field] or field == "seed"
    assert identity["images"] == 20 * found["search"]["cells"] + 40
    assert identity["timed_images"] == identity["images"]  # kills and all
    assert identity["worker_hours"] > 0
    assert identity["code"] == code_sha256()
    for digest in (*identity["weights_sha256"].values(), identity["reference_sha256"]):
        assert digest in page
    assert sum(line.startswith(("| 0.5 |", "| 0.9 |")) for line in page.splitlines()) == len(
        found["cells"]
    )
    assert "1 (off)" in page
    assert f"]({found['winner']['folder']}/report.png)" in page
    with Image.open(story.output / "report.png") as figure:
        assert figure.width > 400
    with Image.open(story.output / found["winner"]["folder"] / "report.png") as samples:
        assert samples.width > 8 * 28

    words = page.split("Do it again:")[1].split("```")[1].replace("\\\n", "").split()
    again = resolve("sweep", words[2:])
    (drawn_from,) = set(identity["models"].values())  # a checkpoint; the run may get newer ones
    assert drawn_from.startswith(f"{story.config.model}/checkpoints/")
    changes = {"workers": 0, "search": found["search"]["kind"], "model": drawn_from}
    assert again == story.config.model_copy(update=changes)


@pytest.mark.ray
@pytest.mark.parametrize("way", ["dry_run", "plan", "search"])
def test_another_checkpoint_of_the_run_is_refused_by_the_name_of_the_one_that_was_swept(
    story: Story, run_folder: str, way: str
):
    older, newer = sorted(Path(run_folder).glob("checkpoints/step_*"))
    changes = {"model": str(older), way: "exhaustive" if way == "search" else True}

    with pytest.raises(ValueError, match=rf"EMA of decay 0\.5 of {newer} .* that of {older} has"):
        sweep.run(story.config.model_copy(update=changes))


@pytest.mark.ray
def test_a_cell_that_two_intervals_ask_for_is_shown_with_both(story: Story):
    found = report_of(story.output)
    asked_again = [{**line, "interval": [0.0, 0.9]} for line in found["lines"]]

    page = sweep_report.page({**found, "lines": [*found["lines"], *asked_again]})

    assert "| 1.5 in (0, 1) or (0, 0.9) | heun | 2 | 6 |" in page
    assert "| 1 (off) | heun | 2 | 3 |" in page


class EfficientNet(FeatureExtractorBase):
    """Our extractor as torch-fidelity takes one."""

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)
        self.extract = get_extractor("efflite0")

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("features", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = dict(zip(("features", "logits"), self.extract(pixels), strict=False))
        return tuple(found[name] for name in self.features_list)


@pytest.mark.ray
def test_torch_fidelity_says_the_same_of_the_winners_pngs(
    story: Story, tiny_dataset: Path, tmp_path: Path
):
    winner = report_of(story.output)["winner"]
    for file in sorted(tiny_dataset.glob("**/*.parquet")):
        for row in pq.read_table(file).to_pylist():
            (tmp_path / f"{row['id']:06d}.png").write_bytes(row["image"]["bytes"])
    torch_fidelity.register_feature_extractor("efflite0", EfficientNet)

    theirs = torch_fidelity.calculate_metrics(
        input1=str(story.output / winner["folder"] / "images"), input2=str(tmp_path),
        feature_extractor="efflite0", fid=True, isc=True, kid=True, kid_subset_size=40,
        batch_size=8, cuda=False, cache=False, verbose=False,
    )  # fmt: skip

    names = {
        "FD-efflite0": "frechet_inception_distance",
        "IS-efflite0": "inception_score_mean",
        "KID-efflite0": "kernel_inception_distance_mean",
    }
    for ours, name in names.items():
        assert winner["metrics"][ours] == pytest.approx(theirs[name], rel=1e-4), ours


@pytest.mark.ray
def test_what_does_not_fit_is_refused_before_an_image_is_drawn(
    story: Story, run_folder: str, reference: str, tmp_path: Path
):
    for ema in (0.5, 0.9):
        export.run(ExportConfig(source=run_folder, output=str(tmp_path / f"{ema:g}"), ema=ema))
    one, other = (str(tmp_path / name) for name in ("0.5", "0.9"))

    fixed = {"reference": reference, "output": tmp_path / "output"}

    def refused(match: str, **changes: object) -> None:
        with pytest.raises(ValueError, match=match):
            sweep.run(config(**{"model": run_folder, **fixed, **changes}))
        assert not (tmp_path / "output").exists()

    refused("has no EMA of decay 0.7: choose from 0.5, 0.9", ema=0.7)
    refused("both hold the EMA of decay 0.5", model="", models=(one, one))
    refused("no EMA of decay 0.7: the models given hold 0.5, 0.9", model="", models=(one, other),
            grid=GridConfig(ema=(0.7, 0.5)))  # fmt: skip
    refused("--model is missing", model="")
    refused("--cell-images: 15 images cannot be spread evenly over 10 classes: choose 10 or 20",
            cell_images=15)  # fmt: skip
    refused("--num-images: 45 images cannot be spread evenly over 10 classes", num_images=45)
    refused(r"steps is chosen twice: 3 for all cells, and \(2, 3\) .* by --sampler.steps None",
            grid=GridConfig(steps=(2, 3)), sampler=SamplerChoice(steps=3))  # fmt: skip
    refused("both model .* and models", models=(one,))
    refused(r"holds an artifact \(config.json\), which an evaluation would mix", output=one)
    # The folder of another sweep is left alone, and both values are said.
    before = written(story.output)
    for way in ({}, {"dry_run": True}):
        with pytest.raises(ValueError, match=r"holds another sweep: seed is 0 there, 7 here"):
            sweep.run(story.config.model_copy(update={"seed": 7, **way}))
    assert written(story.output) == before


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("moment", ["drew 5 ", "drew 20 of 20", "drew 40 of 40"])
def test_a_sweep_that_was_replaced_while_it_slept_stops_and_leaves_the_folder_to_its_successor(
    run_folder: str, reference: str, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch, moment: str,
):  # fmt: skip
    caplog.set_level(logging.INFO)  # lets the messages pass
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    grid = GridConfig(ema=(0.5,), cfg_scale=(1.0,), cfg_interval=((0.0, 1.0),))

    with (
        replaced(tmp_path / "output" / "writer", moment) as successor,
        pytest.raises(PermissionError, match="was replaced by `jit`, process 7 on elsewhere"),
    ):
        sweep.run(config(run_folder, reference, tmp_path / "output", grid=grid))

    assert successor.exists()
    assert not (tmp_path / "output" / "report.json").exists()


@pytest.mark.ray
def test_a_cell_that_diverges_is_reported_and_the_search_goes_on(
    run_folder: str, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    grid = GridConfig(ema=(0.5,), cfg_scale=(1.5, 1.5000001, 1e39), cfg_interval=((0.0, 1.0),))
    wanted = config(run_folder, reference, tmp_path / "output", grid=grid)

    sweep.run(wanted)

    found = report_of(tmp_path / "output")
    broken = found["cells"]["ema0.5-heun2-cfg1e+39-in0to1"]
    assert re.match(r"image \d+ of class \d is not finite", broken["failed"])
    assert broken["metrics"] == {}
    assert found["winner"]["cell"] in (
        "ema0.5-heun2-cfg1.5-in0to1", "ema0.5-heun2-cfg1.5000001-in0to1",
    )  # fmt: skip
    assert any("1 cells drew images that are not finite" in line for line in found["warnings"])
    page = (tmp_path / "output" / "report.md").read_text()
    assert f"failed: {broken['failed']}" in page
    with monkeypatch.context() as patch:  # what failed is not tried again
        patch.delattr("pipelines.sweep.connect")
        sweep.run(wanted)
    assert report_of(tmp_path / "output") == found

    hopeless = GridConfig(ema=(0.5,), cfg_scale=(1e39, 2e39), cfg_interval=((0.0, 1.0),))
    with pytest.raises(ValueError, match=r"all 2 cells failed, such as ema0.5-heun2-cfg1e\+39"):
        sweep.run(wanted.model_copy(update={"grid": hopeless}))


@pytest.mark.ray
def test_several_artifacts_are_swept_like_the_run_that_they_come_from(
    run_folder: str, reference: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    for ema in (0.5, 0.9):
        export.run(ExportConfig(source=run_folder, output=str(tmp_path / f"{ema:g}"), ema=ema))
    models = tuple(str(tmp_path / name) for name in ("0.5", "0.9"))

    run = sweep.prepare(config(run_folder, reference, tmp_path / "x"))
    artifacts = sweep.prepare(config("", reference, tmp_path / "x", models=models))

    assert artifacts.lines == run.lines
    for line in run.lines:
        for cell in line.cells:
            assert artifacts.cell_job(cell).plan == run.cell_job(cell).plan


@pytest.mark.ray
def test_a_plan_and_a_dry_run_say_what_would_be_done_and_touch_nothing(
    run_folder: str, reference: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    wanted = config(run_folder, reference, tmp_path / "output", sampler=SamplerChoice(steps=2))

    sweep.run(wanted.model_copy(update={"dry_run": True}))
    dry = capsys.readouterr().out
    sweep.run(wanted.model_copy(update={"plan": True}))
    planned = capsys.readouterr().out

    assert list(tmp_path.iterdir()) == []
    # Two Heun steps look at 0, 0.5 and 0.5: three evaluations without guidance, six with it.
    for printed in (dry, planned):
        assert (
            "grid: 14 cells of 20 images, 2 EMA x 1 solver x 1 steps x 1 interval x 7 scale"
            in printed
        )
        assert (
            "search: refined, at most 12 cells, 240 images, 1,440 network evaluations; saves at "
            "least 40 images (14% of the grid)" in printed
        )
        assert "winner: 40 images, at most 240 network evaluations" in printed
        assert "judged by FD-efflite0 against 211 images" in printed
        assert "  ema0.9-heun2-cfg1: 3 an image" in printed
        assert "  ema0.9-heun2-cfg4-in0to1: 6 an image" in printed
    assert "time: at most" not in dry
    assert re.search(
        r"time: at most \d.* by 2 workers, 0 cells .* ms a network evaluation", planned
    )


def test_a_preset_s_steps_and_solver_give_way_to_those_of_the_grid():
    line = ["fid-50k", "--grid.steps", "25", "50", "--grid.solver", "heun", "euler"]
    with pytest.raises(ValueError, match=r"--sampler.s\w+ None"):
        resolve("sweep", line)

    found = resolve("sweep", [*line, "--sampler.steps", "None", "--sampler.solver", "None"])

    assert isinstance(found, SweepConfig)
    assert (found.grid.steps, found.grid.solver) == ((25, 50), ("heun", "euler"))


@pytest.mark.ray
def test_a_sweep_has_as_many_workers_as_cells_keep_busy(run_folder: str, reference: str):
    wanted = config(run_folder, reference, "nowhere", num_images=20)

    assert sweep.most_chunks(sweep.prepare(wanted)) == 12 * 4  # cells that are refined, chunks
    alone = wanted.model_copy(update={"num_images": 4000})
    assert sweep.most_chunks(sweep.prepare(alone)) == 800


def test_the_paper_preset_is_the_papers_grid():
    preset = load_preset("sweep", "fid-50k", SweepConfig)

    assert preset.grid.cfg_scale == sweep.SCALES == tuple(round(1 + i / 10, 1) for i in range(31))
    assert preset.grid.cfg_interval == sweep.INTERVALS
    assert (preset.num_images, preset.cell_images, preset.extractor) == (50_000, 8000, "inception")
