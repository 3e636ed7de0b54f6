"""The model of an evaluation: an artifact, or one EMA of a run's checkpoint, shards and all.

Both are known by the same digest, that of the artifact's model.safetensors: a checkpoint has the
one that `jit export` would write, so evaluating the one or the other is the same evaluation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from jitmodel.artifact import (
    CONFIG,
    WEIGHTS,
    ArtifactInfo,
    build_model,
    check_artifact,
    load_artifact,
    read_info,
    sha256_file,
)
from jitmodel.model import JiT
from pipelines import checkpoints, storage
from pipelines.export import artifact_info, check_ema, read_weights

AGAIN_ELSEWHERE = "Run the evaluation again, into another --output."
DEFAULT_EMA = 0.9999
"""The one that the paper evaluates."""


class Source(NamedTuple):
    """Where the weights of a model are; cheap to send to a worker."""

    uri: str
    """Of an artifact, or of one checkpoint."""
    is_artifact: bool
    info: ArtifactInfo
    """With the digest of the weights and the EMA's decay."""


def find_model(uri: str, ema: float | None = None) -> Source:
    """What is at a URI: an artifact, a checkpoint, or a run folder, of which the newest one counts.

    Args:
        uri: of any of them.
        ema: decay of the EMA of a checkpoint, 0 for the raw weights; by default 0.9999, or the
            only one that there is. For an artifact, which has one only, it is checked.

    Raises:
        FileNotFoundError: there is none of them.
        ValueError: it is damaged, or has no such EMA.
    """
    uri = storage.absolute(uri)  # workers have another current folder
    if storage.exists(storage.join(uri, CONFIG)):
        folder = storage.fetch(uri)
        info = check_artifact(folder)
        if ema not in (None, info.ema_decay):
            raise ValueError(
                f"the artifact {uri} holds the EMA of decay {info.ema_decay:g}, not of {ema:g}: "
                "name the run folder to choose among its EMAs"
            )
        digest = info.weights_sha256 or sha256_file(folder / WEIGHTS)
        return Source(uri, True, info.model_copy(update={"weights_sha256": digest}))
    if not storage.exists(uri):
        raise FileNotFoundError(storage.NOTHING_THERE.format(uri=uri))
    try:
        found = checkpoints.find(uri)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no model at {uri}: neither an artifact, which has {CONFIG} and {WEIGHTS}, nor a run "
            "folder with a complete checkpoint. Name a folder that `jit train` or `jit export` "
            "wrote."
        ) from error
    if ema is None:
        decays = found.meta.config["optimizer"]["ema_decays"]
        ema = decays[0] if len(decays) == 1 else DEFAULT_EMA
    check_ema(found, ema)
    info = artifact_info(found, ema)
    digest = weights_sha256(read_weights(found, ema))
    return Source(found.uri, False, info.model_copy(update={"weights_sha256": digest}))


def find_models(uris: Sequence[str], emas: Sequence[float] = ()) -> dict[float, Source]:
    """The models of one run that differ in their EMA, by its decay.

    Args:
        uris: of a run folder or a checkpoint, or of artifacts.
        emas: which decays; none means all that there are.

    Raises:
        FileNotFoundError: there is no model at a URI.
        ValueError: an EMA is not there or comes twice, or the models differ in more than it.
    """
    found: list[Source] = []
    for uri in uris:
        if storage.exists(storage.join(uri, CONFIG)) or not storage.exists(uri):
            found.append(find_model(uri))
        else:
            # One checkpoint for all, though training may write another in between.
            checkpoint = checkpoints.find(uri)
            decays = emas or checkpoint.meta.config["optimizer"]["ema_decays"]
            found += [find_model(checkpoint.uri, ema) for ema in dict.fromkeys(decays)]
    models: dict[float, Source] = {}
    for source in found:
        ema, first = source.info.ema_decay, found[0]
        if ema in models:
            raise ValueError(
                f"{models[ema].uri} and {source.uri} both hold the EMA of decay {ema:g}"
            )
        for field in ("model", "flow", "classes", "run", "images_seen"):
            one, other = getattr(first.info, field), getattr(source.info, field)
            if one != other:
                raise ValueError(
                    f"{first.uri} and {source.uri} are not EMAs of one run: {field} is {one} in "
                    f"the first, {other} in the second"
                )
        models[ema] = source
    missing = [f"{ema:g}" for ema in emas if ema not in models]
    if missing:
        raise ValueError(
            f"no EMA of decay {', '.join(missing)}: the models given hold "
            f"{', '.join(f'{ema:g}' for ema in models)}"
        )
    return {ema: models[ema] for ema in dict.fromkeys(emas)} if emas else models


def load_model(source: Source, device: str | torch.device = "cpu") -> JiT:
    """The model of a source, ready to draw, once its digest is known to be the right one.

    Raises:
        ValueError: the weights are not those that the source was made from.
    """
    if source.is_artifact:
        folder = storage.fetch(source.uri)
        model = load_artifact(folder, device)
        info = read_info(folder)
        _check_same(source, info.weights_sha256 or sha256_file(folder / WEIGHTS))
        if (info.model, info.flow) != (source.info.model, source.info.flow):
            raise ValueError(f"{CONFIG} of {source.uri} has changed: {AGAIN_ELSEWHERE}")
        return model
    found = checkpoints.find(source.uri)
    weights = read_weights(found, source.info.ema_decay)
    _check_same(source, weights_sha256(weights))
    on_device = {name: tensor.to(device) for name, tensor in weights.items()}
    return build_model(source.info, on_device, device)


def _check_same(source: Source, digest: str) -> None:
    if digest != source.info.weights_sha256:
        raise ValueError(
            f"{source.uri} has changed: its weights had sha256 {source.info.weights_sha256}, now "
            f"it is {digest}. {AGAIN_ELSEWHERE}"
        )


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """Digest of the model.safetensors that these weights would be exported to."""
    whole = {name: tensor.contiguous() for name, tensor in weights.items()}
    return hashlib.sha256(save(whole, metadata={"format": "pt"})).hexdigest()
