"""What a request meets at the door, and what it is told when it fails: keys, limits, errors.

Errors have OpenAI's shape, `{"error": {message, type, param, code}}`: 400 a body that is no JSON
object, 401 a missing or wrong key, 404 an unknown route or model, 408 a body that does not arrive,
413 one that is too large, 415 one that does not say it is JSON, 422 a parameter that cannot be met
(`param` names it), 429 with Retry-After no room, no time or a key's share, 503 a failure of the
engine, 504 a passed deadline.
POST needs `Content-Type: application/json`, and a link is not followed for a page of another
origin (403), so that no such page can make a browser spend the server's time; without keys, 403
too for a request whose Host is not this machine's.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from pipelines.engine import EngineFailed, QueueFull
from pipelines.front import ApiError, read_body
from pipelines.generation import BadRequest
from pipelines.telemetry import DRAWING_ROUTES, INTERNAL_ERROR, OPEN_ROUTES, record_of

logger = logging.getLogger(__name__)

KEY_VARIABLE = "JIT_API_KEY"
QUEUE_FULL = "queue_full"
"""Code of the error of a request for which an engine had no room, or no time."""


@dataclass(frozen=True)
class Key:
    """An API key, which is not kept: its digest, and its owner's share."""

    sha256: str
    concurrent: int
    """Image requests that it may have in work at once."""


def read_keys(file: str, concurrent: int) -> tuple[Key, ...]:
    """The keys of the environment and of a file, which holds `KEY [CONCURRENT]` a line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line does not hold a key, or one that has another limit elsewhere; the message
            does not hold it either.
    """
    given = [(key.strip(), concurrent) for key in os.environ.get(KEY_VARIABLE, "").split(",")]
    if file:
        before = len(given)
        try:
            lines = Path(file).read_text("utf-8-sig").splitlines()
        except FileNotFoundError:
            raise FileNotFoundError(
                f"there is no file of keys at {file}: see --keys-file"
            ) from None
        except OSError as error:
            raise ValueError(
                f"cannot read --keys-file {file} ({error.strerror}): name a file that holds "
                "`KEY [CONCURRENT]` a line"
            ) from error
        except UnicodeDecodeError:  # whose text would repeat a part of a key
            raise ValueError(
                f"--keys-file {file} is not UTF-8: keys are printable ASCII, save it as such"
            ) from None
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            limit = words[1] if words[1:] else str(concurrent)
            if len(words) > 2 or not limit.isdecimal() or int(limit) < 1:
                raise ValueError(
                    f"line {number} of {file} should be a key without spaces, and after it, if "
                    "you like, how many requests it may have in work at once"
                )
            if dict(given).get(words[0], int(limit)) != int(limit):
                raise ValueError(
                    f"line {number} of {file} gives a key {limit} requests at once, but "
                    f"{KEY_VARIABLE} or a line before gave it {dict(given)[words[0]]}: say it once"
                )
            given.append((words[0], int(limit)))
        if len(given) == before:
            raise ValueError(f"{file} holds no key: write one a line")
    if not all(key.isascii() and key.isprintable() for key, _ in given):
        raise ValueError("an API key holds other than printable ASCII: HTTP cannot carry it")
    return tuple(Key(digest_of(key.encode()), limit) for key, limit in given if key)


def digest_of(key: bytes) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key).hexdigest()


class Guard:
    """Lets only requests with a key through, apart from those for health.

    Where there are no keys, only requests that were sent to this machine by its own names.

    A key comes as a bearer token, or as the password of HTTP Basic, which is what a browser asks
    for when it opens the page.
    """

    def __init__(self, app: ASGIApp, keys: Callable[[], Sequence[Key]]) -> None:
        self.app, self.keys = app, keys
        self.in_work: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["path"] in OPEN_ROUTES:
            return await self.app(scope, receive, send)
        record, headers = record_of(scope), Headers(scope=scope)
        if not (keys := self.keys()):
            host = headers.get("host", "localhost")
            if names_this_machine(host):
                return await self.app(scope, receive, send)
            error = ApiError(
                403,
                f"the host {host[:100]!r} is not this machine, and a server without keys is for "
                f"it alone: ask for localhost, or start the server with {KEY_VARIABLE}",
                code="foreign_host",
            )
            record.code = error.detail.code
            return await error.response()(scope, receive, send)
        given = digest_of(key_of(headers))
        # all are compared, each in constant time
        known = [key for key in keys if hmac.compare_digest(given, key.sha256)]
        if not known:
            challenge = 'Basic realm="JiT"' if scope["path"] == "/" else "Bearer"
            error = ApiError(
                401,
                "the API key is missing or wrong: send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": challenge},
            )
            record.code = error.detail.code
            return await error.response()(scope, receive, send)
        record.key = given[:8]
        if not scope["path"].startswith(DRAWING_ROUTES):
            return await self.app(scope, receive, send)
        if self.in_work[given] >= known[0].concurrent:
            error = ApiError(
                429,
                f"this key has {self.in_work[given]} requests in work, which is all that it may: "
                "wait for one of them",
                type="rate_limit_error",
                code="key_limit",
                headers={"Retry-After": "1"},
            )
            record.code = error.detail.code
            return await error.response()(scope, receive, send)
        self.in_work[given] += 1
        try:
            return await self.app(scope, receive, send)
        finally:
            self.in_work[given] -= 1
            self.in_work += Counter()  # drops what is zero


def names_this_machine(host: str) -> bool:
    """Whether a Host header, `NAME[:PORT]`, names the loopback interface.

    A page whose own name was made to lead here (DNS rebinding) sends that name.
    """
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    return is_loopback(name or "")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def key_of(headers: Headers) -> bytes:
    """The key that a request carries; empty if none."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    value = value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return value.encode("latin-1") if scheme.lower() == "bearer" else b""


def api_error(error: Exception) -> ApiError:
    """What a client is told about an exception of ours."""
    match error:
        case ApiError():
            return error
        case BadRequest():
            status = 400 if error.param is None else 422
            return ApiError(status, str(error), param=error.param, code=error.code)
        case QueueFull():
            seconds = max(1, math.ceil(error.retry_after_s))
            return ApiError(
                429,
                f"the server is busy: {error}. Try again in {seconds} s",
                type="rate_limit_error",
                code=QUEUE_FULL,
                headers={"Retry-After": str(seconds)},
            )
        case TimeoutError():
            return ApiError(
                504,
                f"the deadline passed: {error}. Ask for fewer images or steps",
                type="timeout_error",
                code="deadline_exceeded",
            )
        case EngineFailed():
            return ApiError(
                503,
                str(error),
                type="server_error",
                code="engine_failed",
                headers={"Retry-After": "1"},
            )
    logger.error("an answer failed", exc_info=error)
    return ApiError(
        500,
        "the server made a mistake; its log has the details",
        type="server_error",
        code=INTERNAL_ERROR,
    )


async def read_json(request: Request) -> bytes:
    """The body of a request that says it is JSON, within limits of size and time."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415,
            f"the content type is {kind[:60]!r}: send JSON with `Content-Type: application/json`",
            code="unsupported_content_type",
        )
    return await read_body(request.stream())
