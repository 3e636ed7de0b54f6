"""W&B and MLflow continue the same run after a restart."""

import json
import socket
import sys

import pytest

from pipelines import trackers
from pipelines.fit import LocalContext, fit
from tests.pipelines.runs import Killed, KilledAt, config_for


def test_mlflow_has_one_run_of_a_run_that_was_killed(tiny_dataset, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = config_for(tiny_dataset, tmp_path, trackers=("mlflow",), total_images=96)

    with pytest.raises(Killed):
        fit(config, KilledAt(48))
    fit(config, LocalContext())

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("jit-on-ray")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    points = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted({point.step for point in points}) == list(range(16, 97, 16))
    ids = json.loads((tmp_path / "run/trackers.json").read_text())
    assert ids == {"mlflow": run.info.run_id}


def test_wandb_continues_under_the_same_id(tiny_dataset, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = config_for(tiny_dataset, tmp_path, trackers=("wandb",), total_images=64)

    fit(config.model_copy(update={"total_images": 32}), LocalContext())
    fit(config, LocalContext())

    id = json.loads((tmp_path / "run/trackers.json").read_text())["wandb"]
    started = sorted(p.name for p in (tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(started) >= 1
    assert {name.rpartition("-")[2] for name in started} == {id}


def test_a_tracker_that_is_not_installed_is_named_with_the_remedy(
    tiny_dataset, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python does for a missing package
    config = config_for(tiny_dataset, tmp_path, trackers=("wandb",))

    with pytest.raises(ValueError, match=r"--trackers wandb .*jit-on-ray\[trackers\]"):
        fit(config, LocalContext())


def test_a_tracker_that_fails_does_not_stop_training(tiny_dataset, tmp_path, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = config_for(tiny_dataset, tmp_path, trackers=("mlflow",), total_images=64)

    class Lost(LocalContext):
        """The tracker's files become unreadable while training goes on."""

        def preempted(self) -> bool:
            if not (tmp_path / "gone").exists():
                (tmp_path / "mlruns").rename(tmp_path / "gone")
            return False

    assert fit(config, Lost()).images_seen == 64
    assert "metrics could not be sent, training goes on" in caplog.text


def test_a_tracker_that_hangs_holds_up_neither_a_save_nor_the_end(
    tiny_dataset, tmp_path, monkeypatch, caplog
):
    """Its server takes connections and never answers."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setattr(trackers, "CLOSE_S", 1.0)
    config = config_for(tiny_dataset, tmp_path, trackers=("mlflow",), total_images=64)

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()

        def hangs(self, values, images_seen):
            with socket.create_connection(silent.getsockname()) as connection:
                connection.recv(1)

        monkeypatch.setattr(trackers.Mlflow, "log", hangs)
        assert fit(config, LocalContext()).images_seen == 64

    assert (tmp_path / "run/checkpoints/step_00000004/meta.json").exists()
    assert "a tracker does not answer, and lacks the newest points" in caplog.text


def test_a_tracker_that_is_not_there_stops_a_new_run_and_not_one_that_goes_on(
    tiny_dataset, tmp_path, monkeypatch, caplog, free_port
):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    nowhere = f"http://127.0.0.1:{free_port}"
    config = config_for(tiny_dataset, tmp_path, trackers=("mlflow",), total_images=64)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", nowhere)
    with pytest.raises(ValueError, match=r"--trackers mlflow could not begin a run: .*did not"):
        fit(config, LocalContext())

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    fit(config.model_copy(update={"total_images": 32}), LocalContext())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nowhere)
    assert fit(config, LocalContext()).images_seen == 64
    assert "mlflow cannot be reached, training goes on without it" in caplog.text
