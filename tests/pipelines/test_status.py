"""`jit status`: every stage's folder says what it is and how far it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines import cli, evaluation, export, storage
from pipelines.config import EvaluateConfig, ExportConfig
from pipelines.evaluation import Job, SampleWorker
from pipelines.features import get_extractor
from pipelines.fit import fit
from pipelines.models import find_model
from pipelines.status import describe
from tests.pipelines.runs import Killed, KilledAt, config_for


@pytest.fixture(scope="module")
def half(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of ten steps that died in the sixth."""
    config = config_for(tiny_dataset, tmp_path_factory.mktemp("runs"))
    with pytest.raises(Killed):
        fit(config, KilledAt(80))
    return storage.join(config.storage, config.name)


def test_a_run_that_was_cut_off_says_how_far_it_came_and_where_it_goes_on(half: str):
    first, *rest = describe(half)

    assert first == "run folder: 80 of 160 images (50%)"
    assert "  newest checkpoint: checkpoints/step_00000004 (64 images)" in rest
    for name in ("epoch ", "loss ", "learning_rate ", "images_per_s "):
        assert name in rest[0]
    assert describe(f"{half}/checkpoints/step_00000004") == [
        "checkpoint: 64 images seen, EMAs 0.5, 0.9"
    ]


def test_a_torn_last_line_of_metrics_is_no_news(half: str):
    with Path(half, "metrics.jsonl").open("a") as file:
        file.write('{"images_seen": 96, "lo')

    assert describe(half)[0] == "run folder: 80 of 160 images (50%)"


def test_a_dataset_folder_says_what_it_holds(tiny_dataset: Path, capsys):
    assert cli.main(["status", str(tiny_dataset)]) == 0

    assert "of 28 px in 10 classes, 0 rejects" in capsys.readouterr().out


def test_a_finished_preparation_of_several_sizes_says_what_each_folder_holds(
    tiny_dataset: Path, tmp_path: Path
):
    for size in ("512", "1024", "not one"):
        shutil.copytree(tiny_dataset, tmp_path / size)
    each = describe(str(tiny_dataset))
    lines = [f"{tmp_path}/512:", *each, f"{tmp_path}/1024:", *each]
    assert describe(str(tmp_path)) == lines

    (tmp_path / "512" / "manifest.json").unlink()
    lines[1:3] = ["not finished: it has no manifest"]
    assert describe(str(tmp_path)) == lines

    (tmp_path / "_work").mkdir()
    assert describe(str(tmp_path)) == ["preparation, not finished: the source is being listed"]


def test_an_artifact_and_a_half_done_evaluation_say_what_they_are(half: str, tmp_path: Path):
    artifact, output = str(tmp_path / "artifact"), str(tmp_path / "evaluation")
    export.run(ExportConfig(source=half, output=artifact, ema=0.5))
    config = EvaluateConfig(num_images=40, batch=10, chunk_batches=2, precision="fp32")
    source = find_model(artifact)
    plan = evaluation.make_plan(config, source, get_extractor("efflite0").identity, None)
    job = Job(source, plan, output)
    evaluation.write_plan(job, config.model_dump(mode="json"))
    worker = SampleWorker("efflite0", "")
    worker.start()
    worker.run((job, 1))

    assert describe(artifact)[0] == "artifact: 28 px, patch 14, width 32, depth 2, 10 classes"
    assert describe(output)[0] == "evaluation folder, not finished: 1 of 2 chunks of 40 images"


def test_damaged_files_of_a_run_are_left_out_or_named(half: str, tmp_path: Path, capsys):
    run = tmp_path / "run"
    shutil.copytree(half, run)
    before = describe(str(run))
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(bytes(7) + b"\n\n")
    (run / "validations").mkdir()
    (run / "validations" / "judging.json").write_text('{"step": 4}')
    assert describe(str(run)) == before

    for content in ("", "foo: 1", "[1", "- 1"):
        (run / "config.yaml").write_text(content)
        assert cli.main(["status", str(run)]) == 2
        assert f"error: {run}/config.yaml, or a file beside it, is dam" in capsys.readouterr().err


def test_what_no_stage_wrote_is_one_line_that_says_what_is_there(tmp_path: Path, capsys):
    (tmp_path / "notes.txt").write_text("hello")

    assert cli.main(["status", str(tmp_path)]) == 2
    assert "It holds notes.txt: name the folder that a stage wrote" in capsys.readouterr().err
    assert cli.main(["status", str(tmp_path / "gone")]) == 2
