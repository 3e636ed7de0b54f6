from pathlib import Path

import pytest
import torch
import yaml

from jitmodel.artifact import load_artifact, read_info
from jitmodel.pixels import to_pixels
from pipelines import checkpoints, cli, export, storage
from pipelines.config import ExportConfig, TrainConfig
from pipelines.fit import LocalContext, averaged, build, fit
from tests.pipelines.runs import config_for


@pytest.fixture(scope="module")
def trained(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of four steps."""
    config = config_for(
        tiny_dataset, tmp_path_factory.mktemp("runs"), "tiny", total_images=64,
        checkpoint_every_images=32, sampler={"steps": 7, "cfg_scale": 1.5}, grid_ema=0.5,
        optimizer={"learning_rate": 1e-2, "warmup_images": 0, "ema_decays": (0.5, 0.99999)},
    )  # fmt: skip
    fit(config, LocalContext())
    return config


def run_folder(config: TrainConfig) -> str:
    return storage.join(config.storage, config.name)


@pytest.mark.parametrize("ema", [0.5, 0.99999, 0])
def test_an_artifact_is_the_network_that_trained(trained: TrainConfig, tmp_path: Path, ema: float):
    export.run(ExportConfig(source=run_folder(trained), output=str(tmp_path), ema=ema))

    model = load_artifact(tmp_path)
    state = build(trained, LocalContext())
    found = checkpoints.newest(run_folder(trained))
    assert found is not None
    checkpoints.load(found.uri, state)
    z, t, y = torch.randn(2, 3, 28, 28), torch.tensor([0.2, 0.7]), torch.tensor([3, 10])
    with averaged(state, ema), torch.no_grad():
        assert torch.equal(model(z, t, y), state.model.eval()(z, t, y))
    info = read_info(tmp_path)
    assert (info.ema_decay, info.images_seen, info.run) == (ema, 64, "tiny")
    assert info.sampler.steps == 7
    assert info.classes[9].name == "class 9"
    assert info.dataset_fingerprint == found.meta.data


def test_the_model_card_has_front_matter_and_code_that_runs(
    trained: TrainConfig, tmp_path: Path, monkeypatch
):
    export.run(ExportConfig(source=run_folder(trained), output=str(tmp_path), ema=0.5))

    card = (tmp_path / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "unconditional-image-generation"
    assert "decay 0.5, after 64 images" in body
    code = body.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    scope: dict = {"to_pixels": to_pixels}
    exec(code, scope)
    assert scope["pixels"].shape == (1, 3, 28, 28)
    assert scope["sampler"].steps == 7


def test_only_the_bytes_of_the_one_ema_are_read(trained: TrainConfig, tmp_path: Path, monkeypatch):
    read = []
    slice_file = checkpoints.Reader._slice_file

    def counted(self, file, info):
        read.append(info.length)
        return slice_file(self, file, info)

    monkeypatch.setattr(checkpoints.Reader, "_slice_file", counted)
    export.run(ExportConfig(source=run_folder(trained), output=str(tmp_path), ema=0.5))

    found = checkpoints.newest(run_folder(trained))
    assert found is not None
    # Weights, two moments and two EMAs are stored; one of the five is wanted.
    assert sum(read) < 0.3 * sum(found.meta.files.values())


def test_a_single_checkpoint_can_be_exported(trained: TrainConfig, tmp_path: Path):
    older = storage.join(run_folder(trained), "checkpoints", "step_00000002")

    export.run(ExportConfig(source=older, output=str(tmp_path), ema=0.5))

    assert read_info(tmp_path).images_seen == 32


def test_an_unknown_ema_or_source_is_refused_and_nothing_is_written(
    trained: TrainConfig, tmp_path: Path
):
    output = str(tmp_path / "artifact")

    with pytest.raises(ValueError, match=r"no EMA of decay 0.7: choose from 0.5, 0.99999, or 0"):
        export.run(ExportConfig(source=run_folder(trained), output=output, ema=0.7))
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint at .*nowhere"):
        export.run(ExportConfig(source=str(tmp_path / "nowhere"), output=output))
    with pytest.raises(ValueError, match="--output is missing"):
        export.run(ExportConfig(source=run_folder(trained)))
    export.run(ExportConfig(source=run_folder(trained), output=output, ema=0.5, dry_run=True))

    assert list(tmp_path.iterdir()) == []


def test_an_artifact_is_replaced_only_by_itself_or_on_request(trained: TrainConfig, tmp_path: Path):
    def exported(ema: float, **options) -> float:
        source = run_folder(trained)
        export.run(ExportConfig(source=source, output=str(tmp_path), ema=ema, **options))
        return read_info(tmp_path).ema_decay

    assert exported(0.5) == exported(0.5) == 0.5
    with pytest.raises(
        ValueError, match=r"has other weights, sha256 \w{12}, after 64 images of tiny"
    ):
        exported(0.99999)
    assert read_info(tmp_path).ema_decay == 0.5
    assert exported(0.99999, overwrite=True) == 0.99999
    load_artifact(tmp_path)


@pytest.mark.parametrize("name", ["README.md", "manifest.json", "metrics.jsonl", "train.py"])
def test_a_folder_with_other_files_is_left_as_it_is(
    trained: TrainConfig, tmp_path: Path, name: str
):
    (tmp_path / name).write_text("precious")

    with pytest.raises(ValueError, match=f"is no artifact, it holds {name}"):
        export.run(
            ExportConfig(source=run_folder(trained), output=str(tmp_path), ema=0.5, overwrite=True)
        )

    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.parametrize("text", ["[]", "not json"])
def test_a_damaged_artifact_is_not_replaced_in_silence(
    trained: TrainConfig, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "config.json").write_text(text)

    line = ["export", run_folder(trained), "--output", str(tmp_path), "--ema", "0.5"]
    assert cli.main(line) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == text
