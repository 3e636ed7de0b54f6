"""What an image request says, and what the answer to it holds, without HTTP.

The shape is that of OpenAI's `POST /v1/images/generations`, so that its clients work unchanged;
what a diffusion model needs besides (seed, steps, guidance, solver, class labels) stands at the
top level. Parameters of OpenAI that mean nothing here are read and ignored, unknown ones are
refused, as OpenAI does. Every image can be drawn again: the answer, and the metadata of a PNG,
hold its seed, its index below the seed, the settings and the digest of the weights.
"""

from __future__ import annotations

import base64
import io
import json
import secrets
from collections.abc import Sequence
from typing import Literal

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
SEED_LIMIT = 2**63
RANDOM_SEEDS = 2**32  # seeds that we pick: any JSON reader keeps them exact


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
    """"auto", or the model's own size, such as "256x256"."""
    response_format: Literal["b64_json", "url"] | None = None
    """Only b64_json: the server keeps no images."""
    output_format: OutputFormat | None = None
    """Format of the images; png by default, the only one with metadata."""
    output_compression: int | None = Field(None, ge=0, le=100)
    """Quality of jpeg and webp; 100 by default, which is lossless for webp."""
    seed: int | None = Field(None, ge=0, lt=SEED_LIMIT)
    """Seed of the start noise; a random one by default, which the answer tells."""
    index: int = Field(0, ge=0, lt=SEED_LIMIT // 2)
    """Index of the first image below the seed; image k of the request has index + k."""
    num_inference_steps: int | None = Field(None, ge=1)
    """Steps from noise to image; by default as the artifact recommends, like the next three."""
    guidance_scale: float | None = Field(None, ge=0, le=100)
    """Guidance weight; 1 turns guidance off."""
    guidance_interval: list[float] | None = Field(None, min_length=2, max_length=2)
    """Open interval of time, in 0..1, in which guidance applies; 0 is noise."""
    solver: Literal["heun", "euler"] | None = None
    """Heun evaluates the network twice a step."""
    class_labels: int | list[int] | None = None
    """Class indices, one for all images or one for each, instead of a prompt."""
    stream: bool | None = None
    """Send server-sent events: previews, then each finished image."""
    partial_images: int | None = Field(None, ge=0)
    """Previews of each image while streaming; 3 by default, at most one a step."""
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
    output_format: OutputFormat
    quality: int
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

    b64_json: str
    """The encoded image in base64."""
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
    """Digest of its weights."""
    sampler: SamplerConfig
    """How the images were drawn."""
    timings: Timings


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
    steps = request.num_inference_steps or info.sampler.steps
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
    side = info.model.image_size
    if request.size not in (None, "auto", f"{side}x{side}"):
        raise BadRequest(
            f"size is {request.size!r}: this model draws {side}x{side}; leave size out, or "
            'say "auto"',
            "size",
        )
    if request.response_format == "url":
        raise BadRequest(
            "response_format is 'url': this server keeps no images; ask for 'b64_json'",
            "response_format",
        )
    if request.background == "transparent":
        raise BadRequest(
            "background is 'transparent': images are opaque; leave it out", "background"
        )
    scale = request.guidance_scale
    previews = min(3 if request.partial_images is None else request.partial_images, steps)
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
        output_format=request.output_format or "png",
        quality=100 if request.output_compression is None else request.output_compression,
        stream=bool(request.stream),
        preview_steps=tuple(k * steps // previews for k in range(previews)),
    )


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


def picture(x: Tensor, output_format: OutputFormat, quality: int, metadata: dict[str, str]) -> str:
    """An encoded image in base64.

    Args:
        x: image in -1..1, [C, H, W].
        output_format: png carries `metadata` as text chunks, the others drop it.
        quality: 0 to 100, of jpeg and webp; webp is lossless at 100.
        metadata: texts by keyword.
    """
    pixels = to_pixels(x).permute(1, 2, 0).numpy()
    image = Image.fromarray(np.ascontiguousarray(pixels.squeeze(-1) if len(x) == 1 else pixels))
    file = io.BytesIO()
    if output_format == "png":
        texts = PngImagePlugin.PngInfo()
        for keyword, text in metadata.items():
            texts.add_text(keyword, text)
        image.save(file, "png", pnginfo=texts)
    elif output_format == "webp":
        image.save(file, "webp", quality=quality, lossless=quality == 100)
    else:
        image.save(file, "jpeg", quality=quality, subsampling=0)
    return base64.b64encode(file.getvalue()).decode()


def images(
    plan: Plan, drawn: Sequence[Tensor], model: str, info: ArtifactInfo, classes: ClassIndex
) -> list[ImageAnswer]:
    """The data of an answer: every image encoded, with what draws it again."""
    answers = []
    for k, (label, x) in enumerate(zip(plan.labels, drawn, strict=True)):
        again = {"seed": plan.seed, "index": plan.index + k, "class_label": label}
        name = classes.infos[label].name
        settings = {
            **again,
            "class_name": name,
            "model": model,
            "artifact_sha256": info.weights_sha256,
            "num_inference_steps": plan.sampler.steps,
            "solver": plan.sampler.solver,
            "guidance_scale": plan.sampler.cfg_scale,
            "guidance_interval": plan.sampler.cfg_interval,
        }
        metadata = {"Software": "JiT on Ray", "jit": json.dumps(settings)}
        encoded = picture(x, plan.output_format, plan.quality, metadata)
        answers.append(ImageAnswer(b64_json=encoded, class_name=name, **again))
    return answers


def preview(pixels_x: Tensor, plan: Plan) -> str:
    """A clean preview, encoded as the final image will be."""
    return picture(pixels_x, plan.output_format, plan.quality, {})


def answer(
    plan: Plan,
    drawn: Drawn,
    data: list[ImageAnswer],
    *,
    created: int,
    encoding_s: float,
    model: str,
    info: ArtifactInfo,
) -> ImagesAnswer:
    """The whole answer of a request that was not streamed."""
    return ImagesAnswer(
        created=created,
        data=data,
        output_format=plan.output_format,
        size=f"{info.model.image_size}x{info.model.image_size}",
        model=model,
        artifact_sha256=info.weights_sha256,
        sampler=plan.sampler,
        timings=Timings(
            queued_s=round(drawn.queued_s, 6),
            drawing_s=round(drawn.drawing_s, 6),
            encoding_s=round(encoding_s, 6),
        ),
    )
