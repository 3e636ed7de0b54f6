"""Artifact: a folder to use - model.safetensors, config.json. One EMA, never a pickle.

config.json says what the weights mean (shape, flow, classes) and where they come from; loading
checks the weights against it before a tensor is copied.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from jitmodel.config import ClassInfo, Config, FlowConfig, ModelConfig, SamplerConfig
from jitmodel.model import JiT

WEIGHTS, CONFIG = "model.safetensors", "config.json"
AGAIN = "Export it again with `jit export RUN --output FOLDER`, or name another artifact."


class ArtifactInfo(Config):
    """What config.json holds."""

    format_version: Literal[1] = 1
    model: ModelConfig
    flow: FlowConfig = FlowConfig()
    sampler: SamplerConfig = SamplerConfig()
    """How its maker recommends to draw."""
    classes: tuple[ClassInfo, ...] = ()
    """Names of the classes, by label; empty if unknown."""
    ema_decay: float = 0.0
    """Decay of the average that the weights are; 0 for the raw weights."""
    images_seen: int = 0
    """Images that the weights were trained on."""
    run: str = ""
    """Name of the run that trained them."""
    dataset_fingerprint: str = ""
    """Fingerprint of the dataset that they were trained on."""
    weights_sha256: str = ""
    """Digest of model.safetensors."""
    versions: dict[str, str] = {}
    """Versions of the tools that wrote it."""

    @model_validator(mode="after")
    def _classes_are_named_all_or_none(self) -> Self:
        if len(self.classes) not in (0, self.model.num_classes):
            raise ValueError(
                f"the model has {self.model.num_classes} classes, but {len(self.classes)} are "
                "named: name all of them, or none"
            )
        return self

    @property
    def sha256(self) -> str:
        """Digest of the whole artifact: of its weights, and of all that this says but versions."""
        said = self.model_dump(mode="json", exclude={"versions"})
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_artifact(folder: Path, weights: dict[str, Tensor], info: ArtifactInfo) -> ArtifactInfo:
    """Write an artifact folder; config.json last.

    Args:
        folder: made if it is not there.
        weights: state_dict of a JiT of shape info.model, whole tensors.
        info: its digest and versions are filled in here.

    Returns:
        info as written.

    Raises:
        ValueError: a weight is missing, unknown, or of another shape.
    """
    check_shapes({k: tuple(v.shape) for k, v in weights.items()}, info.model, str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    # One key alone: safetensors writes several in an order that differs from call to call.
    save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    info = info.model_copy(
        update={
            "weights_sha256": sha256_file(folder / WEIGHTS),
            "versions": {**versions, **info.versions},
        }
    )
    text = json.dumps(info.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    return info


def read_info(folder: Path) -> ArtifactInfo:
    """config.json of an artifact.

    Raises:
        FileNotFoundError: the folder is no artifact.
        ValueError: config.json does not parse.
    """
    path = folder / CONFIG
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"no artifact at {folder}: it needs {CONFIG} and {WEIGHTS}. "
            f"Run `jit export RUN --output {folder}`, or name another folder."
        )
    try:
        return ArtifactInfo.model_validate_json(path.read_text("utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(
            f"{path} is not the config of an artifact that this version reads: {field}: "
            f"{first['msg']}. {AGAIN}"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged, it is no text: {error}. {AGAIN}") from error


def check_shapes(found: dict[str, tuple[int, ...]], config: ModelConfig, where: str) -> None:
    """Compare names and shapes of weights with what a model of this shape needs.

    Raises:
        ValueError: naming the first tensor that does not fit, and both shapes.
    """
    with torch.device("meta"):
        needed = {k: tuple(v.shape) for k, v in JiT(config).state_dict().items()}
    for name in sorted(needed.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{where}: tensor {name} of shape {needed[name]} is missing. {AGAIN}")
        if name not in needed:
            raise ValueError(
                f"{where}: tensor {name} of shape {found[name]} is not of this model. {AGAIN}"
            )
        if needed[name] != found[name]:
            raise ValueError(
                f"{where}: tensor {name} has shape {found[name]}, "
                f"but {CONFIG} asks for {needed[name]}. {AGAIN}"
            )


def check_artifact(folder: Path) -> ArtifactInfo:
    """config.json of an artifact, after a look at the header of its weights; reads no weight.

    Raises:
        FileNotFoundError: the folder is no artifact.
        ValueError: a file is damaged, or the weights do not fit the config.
    """
    info, path = read_info(folder), folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged, it is no safetensors file: {error}. {AGAIN}"
        ) from error
    check_shapes(shapes, info.model, str(path))
    return info


def load_artifact(
    folder: Path | str, device: str | torch.device = "cpu", *, verify: bool = True
) -> JiT:
    """The model of an artifact, ready to draw: eval mode, no gradients.

    Args:
        folder: artifact folder on a local disk.
        device: where the weights shall live.
        verify: compare the digest of the weights with config.json.

    Raises:
        FileNotFoundError: the folder is no artifact.
        ValueError: a file is damaged, or the weights do not fit the config.
    """
    folder = Path(folder)
    info, path = check_artifact(folder), folder / WEIGHTS
    if verify and info.weights_sha256 and sha256_file(path) != info.weights_sha256:
        raise ValueError(
            f"{path} has sha256 {sha256_file(path)}, but {CONFIG} says {info.weights_sha256}: "
            f"the file is damaged or was replaced. {AGAIN}"
        )
    with safe_open(path, framework="pt", device=str(device)) as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    return build_model(info, weights, device)


def build_model(info: ArtifactInfo, weights: dict[str, Tensor], device: str | torch.device) -> JiT:
    """A model of these weights, ready to draw: eval mode, no gradients."""
    with torch.device("meta"):
        model = JiT(info.model, info.flow)
    model.to_empty(device=device)
    model.load_state_dict(weights)
    model.init_tables()
    return model.eval().requires_grad_(False)
