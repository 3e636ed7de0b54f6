"""Curves of a run in Weights & Biases and MLflow, where people have them (extra `trackers`).

A run has one id in each, kept in the run folder, so a run that is continued is continued there.
Where they are and who we are comes from their own environment: WANDB_API_KEY, WANDB_MODE,
MLFLOW_TRACKING_URI and so on. Curves are over images_seen; what is computed again after a kill is
told again, with the same numbers.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, Protocol

from pipelines import storage
from pipelines.config import TrainConfig

logger = logging.getLogger(__name__)

FILE = "trackers.json"
"""In the run folder: tracker -> id of the run in it."""
MOST_PENDING = 1_000
"""Points that wait for a tracker; what comes while so many do is lost to it."""
CLOSE_S = 10.0
"""How long the end of a run waits for points to be sent, and again for it to be told."""


class Tracker(Protocol):
    """Where curves go."""

    id: str

    def log(self, values: dict[str, float], images_seen: int) -> None:
        """Add a point to each curve."""

    def close(self) -> None:
        """All is said, for now."""


class Wandb:
    """A run of Weights & Biases."""

    def __init__(self, config: TrainConfig, known: str | None, folder: str) -> None:
        import wandb

        self.id = known or secrets.token_hex(8)
        self.run: Any = wandb.init(
            project=config.project,
            name=config.name,
            id=self.id,
            resume="allow",
            dir=folder,
            config=config.model_dump(mode="json"),
        )
        self.run.define_metric("images_seen")
        self.run.define_metric("*", step_metric="images_seen")

    def log(self, values: dict[str, float], images_seen: int) -> None:
        self.run.log({**values, "images_seen": images_seen})

    def close(self) -> None:
        self.run.finish()


class Mlflow:
    """A run of MLflow."""

    def __init__(self, config: TrainConfig, known: str | None, folder: str) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self.metric = Metric
        self.client = MlflowClient()
        if known is None:
            found = self.client.get_experiment_by_name(config.project)
            experiment = found.experiment_id if found else None
            experiment = experiment or self.client.create_experiment(config.project)
            known = self.client.create_run(experiment, run_name=config.name).info.run_id
            self.client.log_dict(known, config.model_dump(mode="json"), "config.json")
        self.id = known
        self.client.update_run(self.id, status="RUNNING")

    def log(self, values: dict[str, float], images_seen: int) -> None:
        now = round(1000 * time.time())
        points = [self.metric(name, value, now, images_seen) for name, value in values.items()]
        self.client.log_batch(self.id, metrics=points)  # one request, not one a number

    def close(self) -> None:
        self.client.set_terminated(self.id)


KINDS: dict[str, type[Wandb | Mlflow]] = {"wandb": Wandb, "mlflow": Mlflow}


def check_installed(config: TrainConfig) -> None:
    """Refuse trackers that cannot be had.

    Raises:
        ValueError: the package of one is not installed.
    """
    for name in config.trackers:
        if find_spec(name) is None:
            raise ValueError(
                f"--trackers {name} needs a package that is not installed: "
                'pip install "jit-on-ray[trackers]"'
            )


def open_trackers(run: str, config: TrainConfig, folder: str) -> list[Tracker]:
    """Begin or continue a run in every tracker of the config.

    A run that goes on goes on without a tracker that cannot be reached, with a warning.

    Args:
        run: URI of the run folder, which holds the ids.
        config: of the run.
        folder: local folder for their own files.

    Raises:
        ValueError: a tracker's package is not installed, or it cannot be reached to begin a run.
    """
    if not config.trackers:
        return []
    uri = storage.join(run, FILE)
    ids = storage.read_json(uri) if storage.exists(uri) else {}
    check_installed(config)
    opened: list[Tracker] = []
    for name in config.trackers:
        try:
            tracker = KINDS[name](config, ids.get(name), folder)
        except Exception as error:  # trackers raise whatever their networks lead them to
            if name not in ids:
                raise ValueError(
                    f"--trackers {name} could not begin a run: {error}. Training did not start"
                ) from error
            logger.warning("%s cannot be reached, training goes on without it: %s", name, error)
            continue
        opened.append(tracker)
        if name not in ids:
            ids[name] = tracker.id
            storage.write_json(uri, ids)
    return opened


class Outbox:
    """Tells trackers in a thread of its own: their networks may hang, and nothing waits for them.

    Args:
        trackers: those that are told.
    """

    def __init__(self, trackers: list[Tracker]) -> None:
        self.trackers = trackers
        self._points: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue(MOST_PENDING)
        self._thread = threading.Thread(target=self._send, name="jit-trackers", daemon=True)
        self._has_warned = False
        if trackers:
            self._thread.start()

    def log(self, values: dict[str, float], images_seen: int) -> None:
        """Add a point to each curve of each tracker, some time later."""
        if self.trackers:
            try:
                self._points.put_nowait((values, images_seen))
            except queue.Full:
                self._warn(f"{MOST_PENDING} points wait for a tracker already")

    def close(self) -> None:
        """Send what is left, as far as that takes no longer than a moment."""
        if not self.trackers:
            return
        with suppress(queue.Full):
            self._points.put(None, timeout=CLOSE_S)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._warn("a tracker does not answer, and lacks the newest points")

    def _send(self) -> None:
        while point := self._points.get():
            for tracker in self.trackers:
                self._try(tracker, *point)
        for tracker in self.trackers:
            with suppress(Exception):
                tracker.close()

    def _try(self, tracker: Tracker, values: dict[str, float], images_seen: int) -> None:
        try:
            tracker.log(values, images_seen)
        except Exception as error:  # trackers raise whatever their networks lead them to
            self._warn(str(error))

    def _warn(self, what: str) -> None:
        if not self._has_warned:
            logger.warning("metrics could not be sent, training goes on: %s", what)
        self._has_warned = True
