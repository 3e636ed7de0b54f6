"""What a server tells about its requests: a record of each, written as one line of JSON.

A record holds no key (only the first digits of its SHA-256) and no prompt; what else came from a
client is cut and escaped by JSON, so a line stays a line.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLIENT_LEFT = 499
INTERNAL_ERROR = "internal_error"
"""Code of the error of a request that met a mistake of ours."""
OPEN_ROUTES = ("/healthz", "/readyz")
DRAWING_ROUTES = "/v1/images/"


@dataclass
class RequestRecord:
    """One request; what does not apply is None."""

    method: str
    path: str
    time: float = field(default_factory=lambda: round(time.time(), 3))
    """Unix time of its beginning."""
    status: int = CLIENT_LEFT
    code: str | None = None
    """Code of the error."""
    key: str | None = None
    """Beginning of the SHA-256 of the API key."""
    artifact: str | None = None
    """Beginning of the digest of the artifact that drew."""
    images: int | None = None
    """Images that were asked for; with status 200 and no code they were drawn."""
    class_labels: list[int] | None = None
    seed: int | None = None
    steps: int | None = None
    solver: str | None = None
    guidance_scale: float | None = None
    stream: bool | None = None
    queued_s: float | None = None
    drawing_s: float | None = None
    encoding_s: float | None = None
    total_s: float = 0.0

    def line(self) -> str:
        """JSON without what does not apply."""
        return json.dumps({k: v for k, v in asdict(self).items() if v is not None})


Report = Callable[[RequestRecord], None]


class Recorder:
    """Middleware that reports every request but those for health, when it is over."""

    def __init__(self, app: ASGIApp, report: Report) -> None:
        self.app, self.report = app, report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["path"] in OPEN_ROUTES:
            return await self.app(scope, receive, send)
        record = RequestRecord(method=scope["method"][:20], path=scope["path"][:200])
        scope["record"] = record
        began = time.monotonic()
        has_begun = is_whole = is_mistake = False

        async def noting(message: Message) -> None:
            nonlocal has_begun, is_whole
            if message["type"] == "http.response.start":
                record.status, has_begun = message["status"], True
            await send(message)
            is_whole = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await self.app(scope, receive, noting)
        except Exception:  # Starlette answers it with 500, outside of this
            is_mistake = not has_begun
            raise
        finally:
            if is_mistake:
                record.status, record.code = 500, INTERNAL_ERROR
            elif not is_whole:  # also where a stream had begun
                record.status = CLIENT_LEFT
            record.total_s = round(time.monotonic() - began, 6)
            self.report(record)
        return None


def record_of(scope: Scope) -> RequestRecord:
    """The record of a request; a loose one where nothing records."""
    record = scope.setdefault("record", RequestRecord(method="", path=""))
    assert isinstance(record, RequestRecord)
    return record


def request_logger() -> logging.Logger:
    """Writes records to standard error, a line each and nothing around it."""
    logger = logging.getLogger("pipelines.requests")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger
