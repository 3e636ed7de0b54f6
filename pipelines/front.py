"""What stands before Ray's proxy: whole bodies only, another try, and errors in one shape.

Ray's proxy passes bodies on piece by piece, cuts the connection when a replica dies under a request
and tells its own troubles as plain text. As a middleware of the proxy (`pipelines.proxy`) this
module reads a body to its end, within limits of size and time, before any replica hears of the
request; sends a request again when the replica died before it answered, which is safe because
drawing changes nothing; lets go a client that reads no answer, because Ray would keep all that is
drawn for it; gives errors OpenAI's shape; and reports what no replica could report.
Without it the server works, but says such things less kindly.

It lives in the proxy's process, so it imports no torch.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.telemetry import OPEN_ROUTES, Report, RequestRecord

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 * 1024
MAX_DRAINED_BYTES = 256 * 2**20
BODY_TIMEOUT_S = 30.0
SEND_TIMEOUT_S = 30.0
"""A client has this time to read a piece of an answer: a preview, or a finished image."""
ATTEMPTS = 3
PROBE_TIMEOUT_S = 3.0
"""A probe is answered within this time; other requests wait for a replica as Ray lets them."""
HEALTH = "/-/healthz"
OBEYED = {
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"x-session-id",
    b"serve-multiplexed-model-id",
}
"""Headers by which a client could tell Ray's proxy what to do: how long to wait, whom to ask."""
NOTED = {b"x-request-id", b"traceparent"}
"""Headers that Ray notes down; its proxy fails at one that is not text."""
OF_RAY = {  # status of Ray's -> ours, with what it means
    404: (503, "the server is starting, or is being replaced"),
    408: (504, "the server did not answer in time"),
    429: (429, "too many requests wait for a replica"),
    500: (503, "the replica that was drawing failed"),
    503: (503, "no replica is there to answer"),
}


class ErrorDetail(BaseModel):
    """What went wrong, for a person and for a program."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """Body of every error."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {
                        "message": "n is 0: it should be greater than or equal to 1",
                        "type": "invalid_request_error",
                        "param": "n",
                        "code": "invalid_value",
                    }
                }
            ]
        }
    )

    error: ErrorDetail


class ApiError(Exception):
    """An error with its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.detail = ErrorDetail(message=message, type=type, param=param, code=code)

    def body(self) -> dict[str, Any]:
        return ErrorAnswer(error=self.detail).model_dump()

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


async def pieces(receive: Receive) -> AsyncIterator[bytes]:
    """The body of a request; it ends early where the client hangs up."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError("the client hung up")
        yield message.get("body", b"")
        more = message.get("more_body", False)


async def read_body(body: AsyncIterator[bytes]) -> bytes:
    """A whole body.

    Raises:
        ApiError: it is too large (it was read and dropped, so that the client comes to read the
            answer), or does not arrive in time.
    """
    read, total = b"", 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in body:
                total += len(piece)
                read = read + piece if total <= MAX_BODY_BYTES else b""
                if total > MAX_DRAINED_BYTES:
                    break
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {BODY_TIMEOUT_S:g} s", code="request_timeout"
        ) from None
    if total > MAX_BODY_BYTES:
        raise ApiError(413, f"the body exceeds {MAX_BODY_BYTES} bytes", code="request_too_large")
    return read


def harmless(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers without those by which a client commands Ray's proxy, or breaks it."""

    def passes(name: bytes, value: bytes) -> bool:
        plain = name.lower().replace(b"_", b"-")  # as Ray compares them
        noted = plain not in NOTED or re.fullmatch(rb"[!-~]{1,128}", value) is not None
        return plain not in OBEYED and noted

    return [(name, value) for name, value in headers if passes(name, value)]


class Front:
    """The middleware."""

    def __init__(self, app: ASGIApp, report: Report | None = None) -> None:
        self.app, self.report = app, report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; it is reported here unless a replica answered, which does so itself."""
        if scope["type"] != "http" or scope["path"] == HEALTH:
            return await self.app(scope, receive, send)
        scope = {**scope, "headers": harmless(scope["headers"])}
        record = RequestRecord(method=scope["method"][:20], path=scope["path"][:200])
        began = time.monotonic()
        answered = await self._answer(scope, receive, send, record)
        if self.report is not None and not answered and scope["path"] not in OPEN_ROUTES:
            record.total_s = round(time.monotonic() - began, 6)
            self.report(record)

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, record: RequestRecord
    ) -> bool:
        """Whether a replica heard of the request to its end; if not, the record says how it was."""

        async def refuse(error: ApiError) -> bool:
            record.status, record.code = error.status, error.detail.code
            await error.response()(scope, receive, send)
            return False

        if scope["path"].startswith("/-/"):  # Ray's table of routes is nobody's business
            closed = ApiError(404, f"there is nothing at {scope['path'][:200]}", code="unknown_url")
            return await refuse(closed)
        try:
            body = await read_body(pieces(receive))
        except ApiError as error:
            return await refuse(error)
        except ConnectionResetError:
            return False
        limit = PROBE_TIMEOUT_S if scope["path"] in OPEN_ROUTES else None
        for attempt in range(1, ATTEMPTS + 1):
            clock = asyncio.timeout(limit)
            trial = _Trial(body, receive, send, clock)
            try:
                async with clock:
                    await self.app(scope, trial.receive, trial.send)
            except Exception:
                if not clock.expired():
                    logger.exception("the proxy failed")
            if clock.expired() and not trial.started:
                trial.status = 503
            if trial.client_left:
                return True
            if trial.started:
                record.status, record.code = 200, "unavailable"  # if it broke off
                return await trial.finish()
            if trial.status not in (None, 500) or attempt == ATTEMPTS:
                break
            logger.warning("a replica died under a request: trying again (%d)", attempt)
        status, reason = OF_RAY[trial.status or 500]
        failure = ApiError(
            status,
            f"{reason}: try again in a moment",
            type="server_error",
            code="unavailable",
            headers=None if status == 504 else {"Retry-After": "2"},
        )
        return await refuse(failure)


class _Trial:
    """One attempt at a request: hands in the body, lets an answer of ours through."""

    def __init__(self, body: bytes, receive: Receive, send: Send, clock: asyncio.Timeout) -> None:
        self._body: bytes | None = body
        self._receive, self._send, self._clock = receive, send, clock
        self.client_left = False
        self.started = False
        """Whether the client has the beginning of an answer."""
        self.status: int | None = None
        """Status of an answer that was Ray's own and was kept back."""
        self._streams = self._ended = False

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        message = await self._receive()
        self.client_left = self.client_left or message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message.get("headers", [])).get(b"content-type", b"")
            if message["status"] in OF_RAY and not kind.startswith(b"application/json"):
                self.status = message["status"]
                return
            self.started, self._streams = True, kind.startswith(b"text/event-stream")
        if self.status is None and not self.client_left:
            self._ended = message["type"] == "http.response.body" and not message.get("more_body")
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await self._send(message)
            except TimeoutError:
                self.client_left = True
                self._clock.reschedule(0)  # cancels the proxy's work, and so the replica's

    async def finish(self) -> bool:
        """Ends a stream that broke off with an event that says so; whether it was whole."""
        if self._ended or not self._streams:
            return True
        error = ApiError(
            503, "the replica that was drawing failed", type="server_error", code="unavailable"
        )
        event = f"event: error\ndata: {json.dumps(error.body())}\n\n".encode()
        await self._send({"type": "http.response.body", "body": event, "more_body": False})
        return False
