"""The model of an evaluation: artifacts and checkpoints give the same network and digest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipelines import checkpoints, export, storage
from pipelines.config import ExportConfig
from pipelines.fit import LocalContext, fit
from pipelines.models import find_model, load_model
from tests.pipelines.runs import config_for


@pytest.fixture(scope="module")
def run_folder(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of four steps with two checkpoints and two EMAs."""
    config = config_for(
        tiny_dataset, tmp_path_factory.mktemp("runs"), "tiny", total_images=64,
        checkpoint_every_images=32, sampler={"steps": 7, "cfg_scale": 1.5}, grid_ema=0.5,
        optimizer={"learning_rate": 1e-2, "warmup_images": 0, "ema_decays": (0.5, 0.9999)},
    )  # fmt: skip
    fit(config, LocalContext())
    return storage.join(config.storage, config.name)


@pytest.mark.parametrize("ema", [0.5, 0.9999, 0])
def test_a_checkpoint_is_evaluated_as_the_artifact_that_it_would_be(
    run_folder: str, tmp_path: Path, ema: float
):
    export.run(ExportConfig(source=run_folder, output=str(tmp_path), ema=ema))

    checkpoint, artifact = find_model(run_folder, ema), find_model(str(tmp_path))

    assert checkpoint.info.weights_sha256 == artifact.info.weights_sha256
    assert checkpoint.info.model_copy(update={"versions": {}}) == artifact.info.model_copy(
        update={"versions": {}}
    )
    z, t, y = torch.randn(2, 3, 28, 28), torch.tensor([0.2, 0.7]), torch.tensor([3, 10])
    with torch.no_grad():
        assert torch.equal(load_model(checkpoint)(z, t, y), load_model(artifact)(z, t, y))


def test_a_run_folder_means_its_newest_checkpoint_and_the_papers_ema(run_folder: str):
    newest = checkpoints.newest(run_folder)
    assert newest is not None

    found = find_model(run_folder)

    assert found.uri == newest.uri
    assert found.info.ema_decay == 0.9999
    assert found.info.images_seen == 64
    older = storage.join(run_folder, "checkpoints", "step_00000002")
    assert find_model(older).info.images_seen == 32
    assert find_model(older).info.weights_sha256 != found.info.weights_sha256


def test_a_model_is_known_by_where_it_lies_and_not_by_where_somebody_stood(
    run_folder: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(Path(run_folder).parent)
    found = find_model(Path(run_folder).name)

    assert found.uri.startswith(run_folder)


def test_what_holds_no_such_model_is_named(run_folder: str, tmp_path: Path):
    export.run(ExportConfig(source=run_folder, output=str(tmp_path / "artifact"), ema=0.5))

    with pytest.raises(ValueError, match=r"has no EMA of decay 0.99: choose from 0.5, 0.9999"):
        find_model(run_folder, 0.99)
    with pytest.raises(ValueError, match=r"holds the EMA of decay 0.5, not of 0.9999"):
        find_model(str(tmp_path / "artifact"), 0.9999)
    with pytest.raises(FileNotFoundError, match=r"neither an artifact, which has config.json"):
        find_model(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no file or folder at"):
        find_model(str(tmp_path / "absent"))


def test_weights_that_change_after_the_plan_was_made_are_not_drawn_from(run_folder: str):
    found = find_model(run_folder, 0.5)
    changed = found._replace(info=found.info.model_copy(update={"ema_decay": 0.9999}))

    with pytest.raises(ValueError, match=r"has changed: its weights had sha256"):
        load_model(changed)


def test_an_artifact_that_is_replaced_after_the_plan_was_made_is_not_drawn_from(
    run_folder: str, tmp_path: Path
):
    output = tmp_path / "artifact"
    export.run(ExportConfig(source=run_folder, output=str(output), ema=0.5))
    found = find_model(str(output))

    config = output / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"noise_scale": 1.0', '"noise_scale": 2.0'))
    with pytest.raises(ValueError, match=r"config\.json of .* has changed: Run the evaluation"):
        load_model(found)
    export.run(ExportConfig(source=run_folder, output=str(output), ema=0.9999, overwrite=True))
    with pytest.raises(ValueError, match=r"has changed: its weights had sha256"):
        load_model(found)
