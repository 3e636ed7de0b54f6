"""The HTTP face of the engine: routes, answers, streams, time-outs. No Ray.

The event loop only waits: the engine draws in its own thread, files are encoded in worker threads.
A request that ends early, because the client left or a time-out struck, cancels its future, and
the engine frees its slots at the next tick. A slow client holds no slot: drawing starts when its
body is there, and of previews that it does not fetch the newest replaces the older ones.
"""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Annotated, Any, TypeVar, get_args

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from torch import Tensor

from jitmodel.artifact import ArtifactInfo
from jitmodel.config import SamplerConfig
from pipelines import generation
from pipelines.classes import ClassIndex
from pipelines.config import ServeConfig
from pipelines.engine import DeadlineExceeded, Drawn, Engine, EngineFailed, QueueFull
from pipelines.front import ApiError, ErrorAnswer
from pipelines.generation import (
    BadRequest,
    ImageRequest,
    ImagesAnswer,
    OutputFormat,
    Plan,
    Redraw,
    Timings,
)
from pipelines.guard import Guard, Key, api_error, read_json
from pipelines.telemetry import CLIENT_LEFT, OPEN_ROUTES, Recorder, Report, RequestRecord, record_of

GRACE_S = 5.0
"""The engine keeps deadlines itself; this much later the request fails even if a tick hangs."""
IMAGES, REDRAW = "/v1/images/generations", "/v1/images/redraw"
KEPT_BYTES = 64 * 2**20
"""Of files that answers link to; what is older is drawn again when somebody asks for it."""
PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'none'"
)

STREAM_EXAMPLE = (
    "event: image_generation.partial_image\n"
    'data: {"type": "image_generation.partial_image", "b64_json": "iVBORw0KGgo...", '
    '"partial_image_index": 0, "image_index": 0, "step": 4, "seed": 7, "index": 0, '
    '"artifact_sha256": "9f2c..."}\n\n'
)
"""How the answer to `stream: true` begins."""


class ModelCard(BaseModel):
    """A model as `GET /v1/models` lists it."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "jit"
    artifact_sha256: str
    weights_sha256: str
    precision: str
    size: str
    num_classes: int
    images_seen: int
    sampler: SamplerConfig
    max_images: int
    max_steps: int
    key_required: bool


class ModelList(BaseModel):
    """Answer to `GET /v1/models`."""

    object: str = "list"
    data: list[ModelCard]


class ClassCard(BaseModel):
    """A class as `GET /v1/classes` lists it."""

    label: int
    name: str
    wnid: str | None
    prompt: str
    """What to send as the prompt of an image request."""


class ClassList(BaseModel):
    """Answer to `GET /v1/classes`."""

    object: str = "list"
    data: list[ClassCard]
    total: int
    """Classes that were found; data may hold fewer."""


class Health(BaseModel):
    """Answer to `GET /readyz`."""

    status: str = "ok"
    artifact_sha256: str
    refused: str | None = None
    """Why the artifact that should have taken over was refused."""
    wish: str
    """Name of the last wish of `user_config` that was granted or refused."""


@dataclass(frozen=True)
class Service:
    """What the routes need."""

    engine: Engine
    info: ArtifactInfo
    config: ServeConfig
    model: str
    """Name of the model."""
    created: int
    """Unix time of the artifact."""
    keys: tuple[Key, ...] = ()
    """Empty: no key is needed."""

    @cached_property
    def classes(self) -> ClassIndex:
        return ClassIndex(self.info.classes, self.info.model.num_classes)

    @property
    def card(self) -> ModelCard:
        side = self.info.model.image_size
        return ModelCard(
            id=self.model,
            created=self.created,
            artifact_sha256=self.info.sha256,
            weights_sha256=self.info.weights_sha256,
            precision=self.config.precision,
            size=f"{side}x{side}",
            num_classes=self.info.model.num_classes,
            images_seen=self.info.images_seen,
            sampler=self.info.sampler,
            max_images=self.config.max_images,
            max_steps=self.config.max_steps,
            key_required=bool(self.keys),
        )


class Kept:
    """The newest files that answers link to, by the query of the link."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.bytes = 0

    def put(self, query: str, file: bytes) -> None:
        """Keeps a file, and lets the oldest go."""
        self.bytes += len(file) - len(self.files.pop(query, b""))
        self.files[query] = file
        while self.bytes > KEPT_BYTES:
            self.bytes -= len(self.files.pop(next(iter(self.files))))


class Live:
    """What is served now; a request takes it once and keeps it to its end."""

    def __init__(self, service: Service | None = None) -> None:
        self.current = service
        self.refused: str | None = None
        """Why the last successor was refused."""
        self.wish = ""
        """Name of the last wish that was granted or refused."""
        self.kept = Kept()

    @property
    def service(self) -> Service:
        assert self.current is not None, "requests come once a service is there"
        return self.current


class Requested:
    """A planned request in the engine, and the newest preview of each of its images."""

    def __init__(self, service: Service, plan: Plan, record: RequestRecord) -> None:
        self.service, self.plan, self.record = service, plan, record
        record.artifact = service.info.sha256[:12]
        record.images, record.class_labels = len(plan.labels), sorted(set(plan.labels))
        record.seed, record.stream = plan.seed, plan.stream
        record.steps, record.solver = plan.sampler.steps, plan.sampler.solver
        record.guidance_scale = plan.sampler.cfg_scale
        self.previews: dict[int, tuple[int, Tensor]] = {}
        self.news = asyncio.Event()
        self.until = time.monotonic() + service.config.timeout_s + GRACE_S
        loop = asyncio.get_running_loop()

        def show(position: int, step: int, x_pred: Tensor) -> None:
            loop.call_soon_threadsafe(self._show, position, step, x_pred)

        self.future: Future[Drawn] = service.engine.submit(
            plan.drawings,
            timeout_s=service.config.timeout_s,
            on_preview=show if plan.stream else None,
            preview_steps=frozenset(plan.preview_steps),
        )
        self.future.add_done_callback(lambda _: loop.call_soon_threadsafe(self.news.set))

    def _show(self, position: int, step: int, x_pred: Tensor) -> None:
        self.previews[position] = step, x_pred
        self.news.set()

    async def wait(self) -> None:
        """Returns when there are previews or the images are done."""
        left = self.until - time.monotonic()
        try:
            await asyncio.wait_for(self.news.wait(), left)
        except TimeoutError:
            raise DeadlineExceeded("the engine does not answer") from None
        self.news.clear()

    async def files(self) -> list[bytes]:
        """The encoded images."""
        while not self.future.done():
            await self.wait()
        drawn = self.future.result()
        began = time.monotonic()
        service = self.service
        files = await asyncio.to_thread(
            generation.files, self.plan, drawn, service.model, service.info, service.classes
        )
        self.record.queued_s = round(drawn.queued_s, 6)
        self.record.drawing_s = round(drawn.drawing_s, 6)
        self.record.encoding_s = round(time.monotonic() - began, 6)
        return files

    async def answer(self, kept: Kept, url: str) -> ImagesAnswer:
        """The whole answer; `url` is where its links begin, and what they lead to is kept."""
        files, plan, service = await self.files(), self.plan, self.service
        if plan.linked:
            queries = [generation.query(plan, k, service.info) for k in range(len(files))]
            for query, file in zip(queries, files, strict=True):
                kept.put(query, file)
            shown = [{"url": f"{url}?{query}"} for query in queries]
        else:
            texts = await asyncio.to_thread(lambda: [generation.base64_of(file) for file in files])
            shown = [{"b64_json": text} for text in texts]
        return generation.answer(
            plan,
            shown,
            created=int(time.time()),
            timings=Timings(**{name: getattr(self.record, name) for name in Timings.model_fields}),
            model=service.model,
            info=service.info,
            classes=service.classes,
        )

    async def events(self, kept: Kept) -> AsyncIterator[str]:
        """Server-sent events: previews as they come, each finished image, or an error."""
        try:
            while not self.future.done():
                await self.wait()
                newest, self.previews = self.previews, {}
                for position, (step, x) in sorted(newest.items()):
                    file = await asyncio.to_thread(generation.picture, x, self.plan, {})
                    number = self.plan.preview_steps.index(step)
                    yield self._event(
                        "partial_image",
                        b64_json=generation.base64_of(file),
                        partial_image_index=number,
                        image_index=position,
                        step=step,
                        seed=self.plan.seed,
                        index=self.plan.index + position,
                        artifact_sha256=self.service.info.sha256,
                    )
            answer = await self.answer(kept, "")
            shared = answer.model_dump(mode="json", exclude={"data", "created"})
            for position, image in enumerate(answer.data):
                yield self._event(
                    "completed",
                    **{**shared, **image.model_dump(exclude_none=True), "image_index": position},
                )
        except Exception as error:
            told = api_error(error)
            self.record.code = told.detail.code
            yield f"event: error\ndata: {json.dumps(told.body())}\n\n"
        finally:
            self.future.cancel()

    def _event(self, kind: str, **fields: Any) -> str:
        side = self.plan.side
        name = f"image_generation.{kind}"
        content = {
            "type": name,
            "created_at": int(time.time()),
            "background": "opaque",
            "output_format": self.plan.output_format,
            "quality": "auto",
            "size": f"{side}x{side}",
            **fields,
        }
        return f"event: {name}\ndata: {json.dumps(content)}\n\n"


async def left(request: Request) -> None:
    """Returns when the client has hung up; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def draw(live: Live, request: Request) -> Response:
    """Answers one image request."""
    wanted = generation.parse(await read_json(request))
    # From here until the engine has it nothing waits, so no successor comes in between.
    service = live.service
    if wanted.model not in (None, service.model):
        raise unknown_model(service, wanted.model)
    plan = generation.plan(wanted, service.config, service.info, service.classes)
    requested = Requested(service, plan, record_of(request.scope))
    if plan.stream:
        return StreamingResponse(
            requested.events(live.kept),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
    url = str(request.base_url.replace(path=REDRAW))
    answer = await unless_left(request, requested, requested.answer(live.kept, url))
    if answer is None:
        return Response(status_code=CLIENT_LEFT)
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")


async def redraw(live: Live, request: Request, link: Redraw) -> Response:
    """Answers with the file behind a link: kept from the answer that held it, or drawn again."""
    if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise ApiError(403, "a page of another origin may not follow a link", code="cross_origin")
    file = live.kept.files.get(request.url.query)
    if file is None:
        service = live.service
        if link.artifact_sha256 != service.info.sha256:
            raise ApiError(
                404,
                f"the image was drawn with the artifact {link.artifact_sha256[:12]!r}, which is "
                f"no longer served: now it is {service.info.sha256[:12]}",
                param="artifact_sha256",
                code="artifact_not_served",
            )
        if link.precision != service.config.precision:
            raise ApiError(
                404,
                f"the image was drawn in {link.precision[:12]!r}: this server draws in "
                f"{service.config.precision}, which gives other pixels",
                param="precision",
                code="precision_not_served",
            )
        plan = generation.plan(link.request, service.config, service.info, service.classes)
        requested = Requested(service, plan, record_of(request.scope))
        files = await unless_left(request, requested, requested.files())
        if files is None:
            return Response(status_code=CLIENT_LEFT)
        (file,) = files
    headers = {
        "Cache-Control": "private, max-age=31536000, immutable",
        "X-Jit-Seed": str(link.seed),
        "X-Jit-Index": str(link.index),
        "X-Jit-Artifact-Sha256": link.artifact_sha256,
        "X-Jit-Precision": link.precision,
    }
    for phase in Timings.model_fields:  # null where the file was kept: nothing was drawn
        seconds = getattr(record_of(request.scope), phase)
        if seconds is not None:
            headers[f"X-Jit-{phase.replace('_', '-').title()}"] = str(seconds)
    return Response(file, media_type=f"image/{link.output_format}", headers=headers)


T = TypeVar("T")


async def unless_left(
    request: Request, requested: Requested, work: Coroutine[Any, Any, T]
) -> T | None:
    """What the work for a request comes to; None if the client leaves before, and slots are free.

    The body must have been read.
    """
    answer, gone = asyncio.ensure_future(work), asyncio.ensure_future(left(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:  # also when this very request is cancelled, which is how Ray Serve says it
        requested.future.cancel()
        answer.cancel()
        gone.cancel()


def unknown_model(service: Service, name: str) -> ApiError:
    """The error for a model that is not served here."""
    return ApiError(
        404,
        f"there is no model {name[:100]!r}: this server has {service.model!r}; leave model out, "
        "or name that",
        param="model",
        code="model_not_found",
    )


def create_app(live: Live, report: Report | None = None) -> FastAPI:
    """The application over a started engine; `report` hears of every request when it is over."""
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorAnswer}
        for status in (400, 401, 403, 404, 405, 408, 413, 415, 422, 429, 503, 504)
    }
    app = FastAPI(
        title="JiT on Ray",
        version="1",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=errors,
    )
    app.add_middleware(Guard, keys=lambda: live.service.keys)
    if report is not None:
        app.add_middleware(Recorder, report=report)

    def told(request: Request, error: ApiError) -> Response:
        record_of(request.scope).code = error.detail.code
        return error.response()

    @app.exception_handler(Exception)
    async def _ours(request: Request, error: Exception) -> Response:
        return told(request, api_error(error))

    for kind in (ApiError, BadRequest, QueueFull, TimeoutError, EngineFailed):
        app.add_exception_handler(kind, _ours)

    @app.exception_handler(ClientDisconnect)
    async def _gone(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_LEFT)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        method, path = request.method, request.url.path[:200]
        message = f"{method} {path}: {error.detail.lower()}; /openapi.json lists what there is"
        headers = dict(error.headers or {})
        found = ApiError(error.status_code, message, code="unknown_url", headers=headers)
        return told(request, found)

    @app.exception_handler(RequestValidationError)
    async def _query(request: Request, error: RequestValidationError) -> Response:
        problem = error.errors()[0]
        param = [part for part in problem["loc"] if isinstance(part, str)][-1]  # not its position
        message = f"{param} is {problem['input']!r:.60}: {problem['msg']}"
        return told(request, ApiError(422, message, param=param, code="invalid_value"))

    body = {"content": {"application/json": {"schema": ImageRequest.model_json_schema()}}}

    @app.post(
        IMAGES,
        response_model=ImagesAnswer,
        responses={200: {"content": {"text/event-stream": {"example": STREAM_EXAMPLE}}}},
        openapi_extra={"requestBody": {**body, "required": True}},
    )
    async def generate(request: Request) -> Response:
        """Draw images of a class."""
        return await draw(live, request)

    pictures: dict[str, Any] = {f"image/{kind}": {} for kind in get_args(OutputFormat)}

    @app.get(REDRAW, response_class=Response, responses={200: {"content": pictures}})
    async def redrawn(request: Request, link: Annotated[Redraw, Query()]) -> Response:
        """The image behind a url of an answer."""
        return await redraw(live, request, link)

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The model that is served."""
        return ModelList(data=[live.service.card])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        """One model."""
        if name != live.service.model:
            raise unknown_model(live.service, name)
        return live.service.card

    @app.get("/v1/classes")
    async def classes(
        q: Annotated[str, Query(max_length=200)] = "",
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    ) -> ClassList:
        """Search the classes by name or WordNet id."""
        known = live.service.classes
        labels, infos = known.search(q), known.infos
        cards = [
            ClassCard(
                label=label,
                name=infos[label].name,
                wnid=infos[label].wnid,
                prompt=known.prompt(label),
            )
            for label in labels[:limit]
        ]
        return ClassList(data=cards, total=len(labels))

    @app.head("/healthz", include_in_schema=False)
    @app.head("/readyz", include_in_schema=False)
    @app.get("/healthz")
    @app.get("/readyz")
    async def health() -> Health:
        """Whether the engine draws. The server listens only once it is warm, so both are one."""
        if not live.service.engine.healthy:
            raise EngineFailed("the engine does not draw: see the server's log")
        refused = live.refused
        if refused is not None and live.service.keys:  # this route needs none
            refused = "the server's log says why an artifact was refused"
        return Health(artifact_sha256=live.service.info.sha256, refused=refused, wish=live.wish)

    describe = app.openapi

    def openapi() -> dict[str, Any]:
        """FastAPI's document, with examples, and with the key where one is needed."""
        document = copy.deepcopy(describe())
        if live.service.keys:
            schemes = {"key": {"type": "http", "scheme": "bearer"}}
            document["components"]["securitySchemes"] = schemes
            document["security"] = [{"key": []}]
            for route in OPEN_ROUTES:
                document["paths"][route]["get"]["security"] = []
        content = document["paths"][IMAGES]["post"]["requestBody"]["content"]
        content["application/json"]["examples"] = {
            "by name": {"value": {"prompt": live.service.classes.prompt(0), "n": 4, "seed": 0}},
            "by index": {"value": {"prompt": "class:0", "num_inference_steps": 20}},
            "several classes": {"value": {"class_labels": [0, 0], "guidance_scale": 1.5}},
        }
        answered = document["paths"][IMAGES]["post"]["responses"]["200"]["content"]
        service = live.service
        wanted = ImageRequest(prompt=service.classes.prompt(0), seed=0)
        answered["application/json"]["example"] = generation.answer(
            generation.plan(wanted, service.config, service.info, service.classes),
            [{"b64_json": "iVBORw0KGgo..."}],
            created=service.created,
            timings=Timings(queued_s=0.0, drawing_s=0.34, encoding_s=0.001),
            model=service.model,
            info=service.info,
            classes=service.classes,
        ).model_dump(mode="json", exclude_none=True)
        return document

    app.openapi = openapi  # type: ignore[method-assign]

    page = (resources.files("pipelines") / "page.html").read_text("utf-8")

    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    return app
