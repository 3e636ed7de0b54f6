"""Checkpoints judged while training goes on: a distance to a reference, best ones, early stop.

A score is a small file in the run folder, `validations/step_00012500.json`, so whoever starts the
run again knows it. Who computes it, and where, is not decided here. Training asks for a verdict
after each checkpoint; rank 0 reads the scores, the others are told.
"""

from __future__ import annotations

import logging
import re
from typing import Any, Literal

import numpy as np
import torch

from jitmodel.config import Config, FlowConfig, ModelConfig, SamplerConfig
from jitmodel.model import JiT
from pipelines import checkpoints, storage
from pipelines.checkpoints import Checkpoint
from pipelines.config import TrainConfig, ValidationConfig
from pipelines.drawing import Plan, draw
from pipelines.export import read_weights
from pipelines.features import get_extractor
from pipelines.metrics import Moments, frechet_distance
from pipelines.reference import Reference, check_match, read_reference
from pipelines.shards import Manifest

logger = logging.getLogger(__name__)

FOLDER = "validations"
NAME = re.compile(r"step_(\d{8,})\.json")


class Score(Config):
    """What a validation says about a checkpoint."""

    format_version: Literal[1] = 1
    step: int
    images_seen: int
    metric: str
    """FID-N, or FD-<extractor>-N: a distance, so less is better."""
    value: float
    identity: dict[str, Any]
    """What two scores must share to be compared."""


def identity(config: ValidationConfig) -> dict[str, Any]:
    """What decides a score besides the checkpoint."""
    return config.model_dump(mode="json", exclude={"keep_best", "patience"})


def check(config: TrainConfig, manifest: Manifest) -> None:
    """Refuse a validation that could not be carried out, before training starts.

    Raises:
        FileNotFoundError: reference or extractor are not there.
        ValueError: they do not fit each other, the model, or the number of images.
    """
    _plan(config.model, config.flow, config.sampler, config.validation, "", "cpu").check()
    extractor = get_extractor(config.validation.extractor, config.validation.weights).identity
    check_match(
        read_reference(config.validation.reference).identity,
        extractor.as_dict(),
        config.model.image_size,
        config.model.num_classes,
        tuple(manifest.classes),
    )


def _plan(
    model: ModelConfig, flow: FlowConfig, sampler: SamplerConfig, config: ValidationConfig,
    weights: str, device: Literal["cpu", "cuda"],
) -> Plan:  # fmt: skip
    return Plan(
        num_images=config.num_images,
        batch=config.batch,
        chunk_batches=1,
        seed=config.seed,
        precision="bf16" if device == "cuda" else "fp32",
        sampler=sampler,
        model=model,
        flow=flow,
        weights_sha256=weights,
        extractor={},
        device=device,
        torch=torch.__version__,
    )


def validate(uri: str, config: ValidationConfig, device: torch.device) -> Score:
    """Judge a checkpoint and write its score, unless it has one.

    Raises:
        FileNotFoundError: the checkpoint, the reference or the extractor is not there.
        ValueError: an image is not finite.
    """
    found = checkpoints.find(uri)
    run, _, name = uri.rpartition(f"/{checkpoints.FOLDER}/")
    step = int(name.removeprefix("step_"))
    known = [score for score in scores(run, config) if score.step == step]
    if known:
        return known[0]
    reference = read_reference(config.reference)
    metric, value = distance(found, config, reference, device)
    score = Score(
        step=step,
        images_seen=found.meta.images_seen,
        metric=metric,
        value=value,
        identity=identity(config),
    )
    storage.write_json(storage.join(run, FOLDER, f"{name}.json"), score.model_dump(mode="json"))
    return score


def distance(
    found: Checkpoint, config: ValidationConfig, reference: Reference, device: torch.device
) -> tuple[str, float]:
    """Name and value of the distance between images of a checkpoint and the reference."""
    trained = found.meta.config
    with torch.device("meta"):
        model = JiT(
            ModelConfig.model_validate(trained["model"]), FlowConfig.model_validate(trained["flow"])
        )
    model.to_empty(device=device)
    model.load_state_dict(read_weights(found, config.ema))
    model.init_tables()
    model.eval().requires_grad_(False)
    extractor = get_extractor(config.extractor, config.weights, device)
    plan = _plan(
        model.config, model.flow, SamplerConfig.model_validate(trained["sampler"]), config,
        found.uri, "cuda" if device.type == "cuda" else "cpu",
    )  # fmt: skip
    parts = [draw(model, extractor, plan, chunk, device)[0] for chunk in range(plan.num_chunks)]
    moments = Moments.of(np.concatenate([part.features for part in parts]))
    value = frechet_distance(moments.mean, moments.covariance, reference.mean, reference.covariance)
    return f"{extractor.identity.distance}-{config.num_images}", value


def scores(run: str, config: ValidationConfig) -> list[Score]:
    """Scores of a run that were computed as this config says, in the order of images seen."""
    try:
        names = [file.relative for file in storage.list_files(storage.join(run, FOLDER))]
    except FileNotFoundError:
        return []
    read = [
        Score.model_validate(storage.read_json(storage.join(run, FOLDER, name)))
        for name in names
        if NAME.fullmatch(name)
    ]
    same = [score for score in read if score.identity == identity(config)]
    return sorted(same, key=lambda score: score.images_seen)


def best(found: list[Score], count: int) -> list[Score]:
    """The best scores, best first; of equal ones the earlier."""
    return sorted(found, key=lambda score: (score.value, score.images_seen))[:count]


def verdict(found: list[Score], patience: int) -> str:
    """Why training shall stop: the distance rises; empty if it shall go on."""
    if not patience or not found:
        return ""
    (least,) = best(found, 1)
    since = [score for score in found if score.images_seen > least.images_seen]
    if len(since) < patience:
        return ""
    rise = ", ".join(f"{score.value:.4g}" for score in since)
    return (
        f"{least.metric} was {least.value:.4g} at image {least.images_seen} and {rise} since: "
        f"{len(since)} validations without a better one (--validation.patience {patience})"
    )
