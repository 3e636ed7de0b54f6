"""Checkpoints judged while training goes on: a distance to a reference, best ones, early stop.

A score is a small file in the run folder, `validations/step_00012500.json`, so whoever starts the
run again knows it. Who computes it, and where, is not decided here. Training asks for a verdict
after each checkpoint; rank 0 reads the scores, the others are told.
"""

from __future__ import annotations

import logging
import multiprocessing
import re
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np
import torch

from jitmodel.config import Config, FlowConfig, ModelConfig, SamplerConfig
from jitmodel.parallel import tune_cpu
from pipelines import checkpoints, storage
from pipelines.config import TrainConfig, ValidationConfig
from pipelines.drawing import Plan, code_sha256, draw
from pipelines.features import get_extractor
from pipelines.metrics import Moments, frechet_distance
from pipelines.models import find_model, load_model
from pipelines.reference import check_match, read_reference
from pipelines.shards import Manifest

logger = logging.getLogger(__name__)

FOLDER = checkpoints.VALIDATIONS
NAME = re.compile(r"step_(\d{8,})\.json")
JUDGED_NOW = "judging.json"


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


def identity(config: ValidationConfig, sampler: SamplerConfig) -> dict[str, Any]:
    """What decides a score besides the weights."""
    chosen = config.model_dump(mode="json", exclude={"keep_best", "patience"})
    return chosen | {"sampler": sampler.model_dump(mode="json")}


def check(config: TrainConfig, manifest: Manifest) -> None:
    """Refuse a validation that could not be carried out, before training starts.

    Raises:
        FileNotFoundError: reference or extractor are not there.
        ValueError: they do not fit each other, the model, or the number of images.
    """
    model = config.model
    plan = _plan(model, config.flow, config.sampler, config.validation, "", "cpu")
    plan.check("--validation.num-images")
    extractor = get_extractor(config.validation.extractor, config.validation.weights).identity
    reference = read_reference(config.validation.reference)
    check_match(reference, extractor, model.image_size, model.num_classes, tuple(manifest.classes))


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
        code=code_sha256(),
    )


def validate(uri: str, config: ValidationConfig, device: torch.device) -> Score:
    """Judge a checkpoint and write its score, unless it has one.

    For as long as that takes, the run folder says which one it is, and training keeps it.

    Raises:
        FileNotFoundError: the checkpoint, the reference or the extractor is not there.
        ValueError: an image is not finite.
    """
    run, _, name = uri.rpartition(f"/{checkpoints.FOLDER}/")
    step = int(name.removeprefix("step_"))
    sampler = SamplerConfig.model_validate(checkpoints.find(uri).meta.config["sampler"])
    known = [score for score in scores(run, config, sampler) if score.step == step]
    if known:
        return known[0]
    mark = storage.join(run, FOLDER, JUDGED_NOW)
    storage.write_json(mark, {"step": step})
    try:
        score = _judge(uri, step, config, device)
        storage.write_json(storage.join(run, FOLDER, f"{name}.json"), score.model_dump(mode="json"))
    finally:
        storage.delete(mark)
    return score


def _judge(uri: str, step: int, config: ValidationConfig, device: torch.device) -> Score:
    """The score of a checkpoint."""
    source = find_model(uri, config.ema)
    model = load_model(source, device)
    extractor = get_extractor(config.extractor, config.weights, device)
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    digest = source.info.weights_sha256 or ""
    plan = _plan(model.config, model.flow, source.info.sampler, config, digest, kind)
    parts = [draw(model, extractor, plan, chunk, device)[0] for chunk in range(plan.num_chunks)]
    drawn = Moments.of(np.concatenate([part.features for part in parts]))
    real = read_reference(config.reference).real.pooled
    return Score(
        step=step,
        images_seen=source.info.images_seen,
        metric=f"{extractor.identity.distance}-{config.num_images}",
        value=frechet_distance(drawn.mean, drawn.covariance, real.mean, real.covariance),
        identity=identity(config, source.info.sampler),
    )


def judged_now(run: str) -> set[int]:
    """Step of the checkpoint that is being judged, or was when its judge was killed."""
    try:
        return {int(storage.read_json(storage.join(run, FOLDER, JUDGED_NOW))["step"])}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return set()


class JudgeDied(RuntimeError):
    """The process that judged a checkpoint ended without a word."""


def validate_apart(uri: str, config: ValidationConfig) -> Score:
    """`validate` in a process of its own, whose death is an error here and no more.

    Raises:
        JudgeDied: it was killed, as the kernel does when memory runs out.
        FileNotFoundError, ValueError: as validate.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(there, uri, config))
    process.start()
    there.close()
    try:
        answer = here.recv()
    except EOFError:
        process.join()
        raise JudgeDied(
            f"its process ended with {process.exitcode}"
            + (", which is what happens when memory runs out" if process.exitcode == -9 else "")
        ) from None
    process.join()
    if isinstance(answer, Exception):
        raise answer
    assert isinstance(answer, Score)
    return answer


def _tell(there: Connection, uri: str, config: ValidationConfig) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        tune_cpu(threads=1)
    try:
        there.send(validate(uri, config, device))
    except Exception as error:  # for whoever waits
        there.send(error)


def scores(run: str, config: ValidationConfig, sampler: SamplerConfig) -> list[Score]:
    """Scores of a run that were computed so, in the order of images seen.

    A damaged one is left out, with a warning: its checkpoint counts as not judged.
    """
    try:
        names = [file.relative for file in storage.list_files(storage.join(run, FOLDER))]
    except FileNotFoundError:
        return []
    read = []
    for name in filter(NAME.fullmatch, names):
        uri = storage.join(run, FOLDER, name)
        try:
            read.append(Score.model_validate(storage.read_json(uri)))
        except ValueError as error:
            logger.warning("the score %s is damaged, and ignored: %s", uri, error)
    same = [score for score in read if score.identity == identity(config, sampler)]
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
