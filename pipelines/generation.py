"""What an image request says, and what the answer to it holds, without HTTP.

The shape is that of OpenAI's `POST /v1/images/generations`, so that its clients work unchanged;
what a diffusion model needs besides (seed, steps, guidance, solver, class labels) stands at the
top level. Parameters of OpenAI that mean nothing here are read and ignored, unknown ones are
refused, as OpenAI does. Every image can be drawn again: the answer, and the metadata of a PNG,
hold its seed, its index below the seed, the settings, the compute type and the artifact's digest.
"""

from __future__ import annotations

import base64
import io
import json
import re
import secrets
from collections.abc import Sequence
from typing import Literal
from urllib.parse import urlencode

import numpy as np
from PIL import Image, PngImagePlugin
from pydantic import ConfigDict, Field, ValidationError
from torch import Tensor

from jitmodel.artifact import ArtifactInfo
from jitmodel.config import Config, SamplerConfig
from jitmodel.pixels import to_pixels
from pipelines.classes import ClassIndex
from pipelines.config import ServeConfig
from pipelines.engine import Drawing, Drawn

OutputFormat = Literal["png", "jpeg", "webp"]
SEED_LIMIT, INDEX_LIMIT = 2**63, 2**62
RANDOM_SEEDS = 2**32  # seeds that we pick: any JSON reader keeps them exact
MAX_GUIDANCE = 100.0
MAX_SIDE = 1024
"""Pixels; largest size that images are resized to."""
MAX_PREVIEWS = 12
"""Of one image; Ray keeps those that a client is slow to read."""
MAX_PREVIEW_PIXELS = 2**26
"""Of all previews of a request together."""


class BadRequest(ValueError):
    """A parameter that cannot be met, which `param` names; without it, a body that says nothing."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param, self.code = param, code


class ImageRequest(Config):
    """Body of `POST /v1/images/generations`."""

    model_config = ConfigDict(strict=True)

    prompt: str = Field("", max_length=1000, examples=["tench", "n01440764", "class:0"])
    """The class: its name, its WordNet id, "class:N", or N. GET /v1/classes lists them."""
    model: str | None = None
    """Name of the model; GET /v1/models lists it."""
    n: int | None = Field(None, ge=1)
    """Number of images; 1, or the number of class_labels."""
    size: str | None = Field(None, max_length=20)
    """"auto", the model's own size, such as "256x256", or another square if the server resizes."""
    response_format: Literal["b64_json", "url"] | None = None
    """The images themselves, which is the default, or links to them."""
    output_format: OutputFormat | None = None
    """Format of the images; png by default, the only one with metadata."""
    output_compression: int | None = Field(None, ge=0, le=100)
    """Quality of jpeg and webp; 100 by default, which is lossless for webp."""
    seed: int | None = Field(None, ge=0, lt=SEED_LIMIT)
    """Seed of the start noise; a random one by default, which the answer tells."""
    index: int = Field(0, ge=0, lt=INDEX_LIMIT)
    """Index of the first image below the seed; image k of the request has index + k."""
    num_inference_steps: int | None = Field(None, ge=1)
    """Steps from noise to image; by default as the artifact recommends, like the next three, or
    the most that the server allows."""
    guidance_scale: float | None = Field(None, ge=0, le=MAX_GUIDANCE)
    """Guidance weight; 1 turns guidance off."""
    guidance_interval: list[float] | None = Field(None, min_length=2, max_length=2)
    """Open interval of time, in 0..1, in which guidance applies; 0 is noise."""
    solver: Literal["heun", "euler"] | None = None
    """Heun evaluates the network twice a step."""
    class_labels: int | list[int] | None = None
    """Class indices, one for all images or one for each, instead of a prompt."""
    stream: bool | None = None
    """Send server-sent events: previews, then each finished image."""
    partial_images: int | None = Field(None, ge=0, le=MAX_PREVIEWS)
    """Previews of each image while streaming; 3 by default, at most one a step, and fewer where
    those of the whole request have more than 67 million pixels."""
    background: Literal["auto", "opaque", "transparent"] | None = None
    """Images are opaque."""
    moderation: str | None = None
    """Ignored."""
    quality: str | None = None
    """Ignored; see num_inference_steps."""
    safety_identifier: str | None = None
    """Ignored."""
    style: str | None = None
    """Ignored."""
    user: str | None = None
    """Ignored."""


class Plan(Config):
    """A request that can be met."""

    labels: tuple[int, ...]
    seed: int
    index: int
    sampler: SamplerConfig
    side: int
    """Pixels of the files; the network draws in its own size."""
    output_format: OutputFormat
    quality: int
    precision: str
    """Compute type of the network."""
    linked: bool
    """Whether the answer holds links instead of images."""
    stream: bool
    preview_steps: tuple[int, ...]

    @property
    def drawings(self) -> list[Drawing]:
        """What the engine shall draw."""
        return [
            Drawing(label, self.seed, self.index + k, self.sampler)
            for k, label in enumerate(self.labels)
        ]


class ImageAnswer(Config):
    """One image, and what draws it again."""

    b64_json: str | None = None
    """The encoded image in base64."""
    url: str | None = None
    """Where it is, if links were asked for."""
    seed: int
    """Its seed."""
    index: int
    """Its index below the seed."""
    class_label: int
    """Its class."""
    class_name: str
    """What people call the class."""


class Timings(Config):
    """Where the time went, in seconds."""

    queued_s: float
    """Waiting for a slot."""
    drawing_s: float
    """In the running batch."""
    encoding_s: float
    """Making files of pixels."""


class ImagesAnswer(Config):
    """Answer to `POST /v1/images/generations`."""

    created: int
    """Unix time."""
    data: list[ImageAnswer]
    """The images, in the order of the request."""
    background: Literal["opaque"] = "opaque"
    """Images have no transparency."""
    output_format: OutputFormat
    """Format of the images."""
    size: str
    """WIDTHxHEIGHT."""
    model: str
    """Name of the model."""
    artifact_sha256: str
    """Digest of the artifact, its weights and its config."""
    weights_sha256: str
    """Digest of the weights alone, which an evaluation's report names."""
    seed: int
    """Seed of all images."""
    precision: str
    """Compute type of the network, fp32 or bf16."""
    sampler: SamplerConfig
    """How the images were drawn."""
    timings: Timings


class Redraw(Config):
    """Query of `GET /v1/images/redraw`: all that makes one image, so that nobody must keep it."""

    artifact_sha256: str
    """Digest of the artifact that drew it."""
    precision: str
    """Compute type of the network that drew it."""
    class_labels: int
    seed: int
    index: int
    num_inference_steps: int
    solver: str
    guidance_scale: float
    guidance_interval: list[float]
    """Given twice: its beginning and its end."""
    size: str
    output_format: str
    output_compression: int

    @property
    def request(self) -> ImageRequest:
        """The request that draws it again.

        Raises:
            BadRequest: as `parse`.
        """
        return parse(json.dumps(self.model_dump(exclude={"artifact_sha256", "precision"})).encode())


def parse(body: bytes) -> ImageRequest:
    """The request in a body of JSON.

    Raises:
        BadRequest: naming the first parameter that is not as it should be.
    """
    try:
        return ImageRequest.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    problem, place = problems[0], problems[0]["loc"]
    param = str(place[0]) if place else None
    if param is not None:  # of what may be one or a list, the reading that got furthest
        same = [p for p in problems if p["loc"][0] == place[0]]
        problem = max(same, key=lambda p: len(p["loc"]))
        place = problem["loc"]
    message, found = problem["msg"], f"{problem['input']!r:.60}"
    match problem["type"]:
        case "json_invalid":
            reason = message.removeprefix("Invalid JSON: ")
            raise BadRequest(f"the body is not JSON: {reason}", code="invalid_json")
        case "extra_forbidden":
            known = ", ".join(ImageRequest.model_fields)
            raise BadRequest(
                f"unknown parameter {param!r:.60}: known are {known}", param, "unknown_parameter"
            )
    if param is None:
        raise BadRequest("the body is not a JSON object", code="invalid_json")
    item = "".join(f"[{step}]" for step in place if isinstance(step, int))
    raise BadRequest(f"{param}{item} is {found}: {message.replace('Input', 'it', 1)}", param)


def plan(
    request: ImageRequest, config: ServeConfig, info: ArtifactInfo, classes: ClassIndex
) -> Plan:
    """What to draw for a request, or why not.

    Raises:
        BadRequest: naming the parameter, what it is, and what it should be.
    """
    labels = _labels(request, config, classes)
    steps = request.num_inference_steps or min(info.sampler.steps, config.max_steps)
    if steps > config.max_steps:
        raise BadRequest(
            f"num_inference_steps is {steps}: this server draws with 1 to {config.max_steps}",
            "num_inference_steps",
        )
    low, high = request.guidance_interval or info.sampler.cfg_interval
    if not 0 <= low < high <= 1:
        raise BadRequest(
            f"guidance_interval is [{low:g}, {high:g}]: it should be two times with "
            "0 <= first < second <= 1",
            "guidance_interval",
        )
    linked = request.response_format == "url"
    if linked and request.stream:
        raise BadRequest(
            "response_format is 'url': a stream carries the images themselves; leave it out, "
            "or stream",
            "response_format",
        )
    if request.background == "transparent":
        raise BadRequest(
            "background is 'transparent': images are opaque; leave it out", "background"
        )
    scale = request.guidance_scale
    if request.index + len(labels) > INDEX_LIMIT:
        raise BadRequest(
            f"index is {request.index}: with n {len(labels)} it should be at most "
            f"{INDEX_LIMIT - len(labels)}",
            "index",
        )
    side = _side(request.size, info.model.image_size, resize=config.resize)
    asked = 3 if request.partial_images is None else request.partial_images
    previews = min(asked, steps, MAX_PREVIEW_PIXELS // (len(labels) * side**2))
    return Plan(
        labels=tuple(labels),
        seed=secrets.randbelow(RANDOM_SEEDS) if request.seed is None else request.seed,
        index=request.index,
        sampler=SamplerConfig(
            steps=steps,
            solver=request.solver or info.sampler.solver,
            cfg_scale=info.sampler.cfg_scale if scale is None else scale,
            cfg_interval=(low, high),
        ),
        side=side,
        precision=config.precision,
        linked=linked,
        output_format=request.output_format or "png",
        quality=100 if request.output_compression is None else request.output_compression,
        stream=bool(request.stream),
        preview_steps=tuple(k * steps // previews for k in range(previews)),
    )


def _side(size: str | None, own: int, *, resize: bool) -> int:
    """Pixels of a file's side, for an image of `own` pixels."""
    if size in (None, "auto", f"{own}x{own}"):
        return own
    if not resize:
        raise BadRequest(
            f'size is {size!r}: this model draws {own}x{own}; leave size out, or say "auto"',
            "size",
        )
    sides = re.fullmatch(r"([1-9][0-9]{0,3})x\1", size or "", re.ASCII)
    if sides is None or int(sides[1]) > MAX_SIDE:
        raise BadRequest(
            f"size is {size!r}: this server draws {own}x{own} and resizes it to squares up to "
            f"{MAX_SIDE}x{MAX_SIDE}",
            "size",
        )
    return int(sides[1])


def _labels(request: ImageRequest, config: ServeConfig, classes: ClassIndex) -> list[int]:
    """The class of each image of a request."""
    given = request.class_labels
    if given is None:
        if not request.prompt:
            raise BadRequest(
                "prompt is missing: name a class, such as "
                f'"{classes.infos[0].name}" or "class:0"; GET /v1/classes?q= searches them',
                "prompt",
            )
        try:
            labels = [classes.find(request.prompt)]
        except ValueError as error:
            raise BadRequest(
                f"prompt: {error} (GET /v1/classes?q= searches the classes)", "prompt"
            ) from None
    else:
        if request.prompt:
            raise BadRequest("give prompt or class_labels, not both", "class_labels")
        labels = [given] if isinstance(given, int) else given
        if not labels:
            raise BadRequest("class_labels is []: name one class at least", "class_labels")
        for label in labels:
            if not 0 <= label < len(classes.infos):
                raise BadRequest(
                    f"class_labels holds {label}: the model has classes 0 to "
                    f"{len(classes.infos) - 1}",
                    "class_labels",
                )
    n = len(labels) if request.n is None else request.n
    if len(labels) == 1:
        labels = labels * min(n, config.max_images + 1)
    if not 1 <= n <= config.max_images:
        raise BadRequest(f"n is {n}: this server draws 1 to {config.max_images} at once", "n")
    if len(labels) != n:
        raise BadRequest(
            f"class_labels holds {len(labels)} classes, but n is {n}: give one class, or n of them",
            "class_labels",
        )
    return labels


def picture(x: Tensor, plan: Plan, metadata: dict[str, str]) -> bytes:
    """An encoded image, in the format, quality (webp is lossless at 100) and size of the plan.

    Args:
        x: image in -1..1, [C, H, W].
        plan: says how.
        metadata: texts by keyword; png carries them as text chunks, the others drop them.
    """
    pixels = to_pixels(x).permute(1, 2, 0).numpy()
    image = Image.fromarray(np.ascontiguousarray(pixels.squeeze(-1) if len(x) == 1 else pixels))
    if image.width != plan.side:
        image = image.resize((plan.side, plan.side), Image.Resampling.LANCZOS)
    file, quality = io.BytesIO(), plan.quality
    if plan.output_format == "png":
        texts = PngImagePlugin.PngInfo()
        for keyword, text in metadata.items():
            texts.add_text(keyword, text)
        image.save(file, "png", pnginfo=texts)
    elif plan.output_format == "webp":
        image.save(file, "webp", quality=quality, lossless=quality == 100)
    else:
        image.save(file, "jpeg", quality=quality, subsampling=0)
    return file.getvalue()


def files(
    plan: Plan, drawn: Drawn, model: str, info: ArtifactInfo, classes: ClassIndex
) -> list[bytes]:
    """Every image encoded; a PNG with what draws it again, and how long that took."""
    encoded = []
    timings = {
        "queued_s": round(drawn.queued_s, 6),
        "drawing_s": round(drawn.drawing_s, 6),
    }  # its own encoding is not over when the texts are written
    for k, (label, x) in enumerate(zip(plan.labels, drawn.images, strict=True)):
        settings = {
            "seed": plan.seed,
            "index": plan.index + k,
            "class_label": label,
            "class_name": classes.infos[label].name,
            "model": model,
            "artifact_sha256": info.sha256,
            "weights_sha256": info.weights_sha256,
            "precision": plan.precision,
            "num_inference_steps": plan.sampler.steps,
            "solver": plan.sampler.solver,
            "guidance_scale": plan.sampler.cfg_scale,
            "guidance_interval": plan.sampler.cfg_interval,
            "size": f"{plan.side}x{plan.side}",
        }
        metadata = {
            "Software": "JiT on Ray",
            "jit": json.dumps(settings),
            "jit-timings": json.dumps(timings),
        }
        encoded.append(picture(x, plan, metadata))
    return encoded


def base64_of(file: bytes) -> str:
    """A file as JSON carries it."""
    return base64.b64encode(file).decode()


def query(plan: Plan, k: int, info: ArtifactInfo) -> str:
    """What a link to image k of a plan says after its question mark, a `Redraw`."""
    link = Redraw(
        artifact_sha256=info.sha256,
        precision=plan.precision,
        class_labels=plan.labels[k],
        seed=plan.seed,
        index=plan.index + k,
        num_inference_steps=plan.sampler.steps,
        solver=plan.sampler.solver,
        guidance_scale=plan.sampler.cfg_scale,
        guidance_interval=list(plan.sampler.cfg_interval),
        size=f"{plan.side}x{plan.side}",
        output_format=plan.output_format,
        output_compression=plan.quality,
    )
    return urlencode(link.model_dump(), doseq=True)


def answer(
    plan: Plan,
    shown: Sequence[dict[str, str]],
    *,
    created: int,
    timings: Timings,
    model: str,
    info: ArtifactInfo,
    classes: ClassIndex,
) -> ImagesAnswer:
    """The whole answer of a request; `shown` holds what shows each image, b64_json or url."""
    return ImagesAnswer(
        created=created,
        data=[
            ImageAnswer(
                **how,
                seed=plan.seed,
                index=plan.index + k,
                class_label=label,
                class_name=classes.infos[label].name,
            )
            for k, (label, how) in enumerate(zip(plan.labels, shown, strict=True))
        ],
        output_format=plan.output_format,
        size=f"{plan.side}x{plan.side}",
        model=model,
        artifact_sha256=info.sha256,
        weights_sha256=info.weights_sha256,
        seed=plan.seed,
        precision=plan.precision,
        sampler=plan.sampler,
        timings=timings,
    )
