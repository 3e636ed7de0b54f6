"""What stands before Ray's proxy, over applications that behave as the proxy does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from pipelines import front
from pipelines.front import ATTEMPTS, MAX_BODY_BYTES, Front, read_body

Answer = Callable[[bytes], Any]


class Proxy:
    """Answers one request after the other as it is told; None is a replica that dies."""

    def __init__(self, *answers: Answer | None) -> None:
        self.answers, self.bodies = list(answers), list[bytes]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(front.pieces(receive))
        self.bodies.append(body)
        answer = self.answers.pop(0)
        if answer is not None:
            await answer(body)(scope, receive, send)


def says(status: int) -> Answer:
    """An error of Ray's own: plain text."""
    return lambda _: PlainTextResponse("Traceback (most recent call last): secret", status)


def echo(body: bytes) -> JSONResponse:
    return JSONResponse({"body": body.decode()})


def test_a_request_is_sent_again_when_its_replica_dies():
    proxy = Proxy(None, says(500), echo)

    answer = TestClient(Front(proxy)).post("/v1/images/generations", content=b"tench")

    assert answer.json() == {"body": "tench"}
    assert proxy.bodies == [b"tench"] * 3


def test_when_replicas_keep_dying_the_answer_is_a_clear_503():
    proxy = Proxy(*[None] * ATTEMPTS)

    answer = TestClient(Front(proxy)).post("/v1/images/generations", content=b"tench")

    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "2"
    assert answer.json()["error"]["code"] == "unavailable"
    assert "the replica that was drawing failed" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("of_ray", "ours"), [(404, 503), (408, 504), (429, 429), (503, 503)])
def test_errors_of_ray_get_our_shape_and_lose_their_text(of_ray: int, ours: int):
    proxy = Proxy(says(of_ray))

    answer = TestClient(Front(proxy)).get("/v1/models")

    assert (answer.status_code, answer.json()["error"]["type"]) == (ours, "server_error")
    assert "secret" not in answer.text


def test_errors_of_our_own_pass_as_they_are():
    ours = {"error": {"message": "the queue is full"}}
    proxy = Proxy(lambda _: JSONResponse(ours, 429, {"Retry-After": "7"}))

    answer = TestClient(Front(proxy)).post("/v1/images/generations", content=b"{}")

    assert (answer.status_code, answer.json(), answer.headers["retry-after"]) == (429, ours, "7")


def test_a_stream_that_breaks_off_ends_with_an_event_that_says_so():
    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        body = b"event: partial\ndata: {}\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": True})

    records: list[Any] = []
    answer = TestClient(Front(proxy, records.append)).post("/v1/images/generations", content=b"{}")

    assert [(record.status, record.code) for record in records] == [(200, "unavailable")]
    events = [part.split("\n")[0] for part in answer.text.strip().split("\n\n")]
    assert events == ["event: partial", "event: error"]


def test_whole_streams_are_not_touched():
    proxy = Proxy(lambda _: StreamingResponse(iter(["a", "b"]), media_type="text/event-stream"))

    assert TestClient(Front(proxy)).get("/").text == "ab"


def test_a_body_that_is_too_large_or_too_slow_never_reaches_a_replica(
    monkeypatch: pytest.MonkeyPatch,
):
    proxy = Proxy()
    client = TestClient(Front(proxy))

    assert client.post("/", content=b"x" * (MAX_BODY_BYTES + 1)).status_code == 413
    sent: list[Any] = []

    async def never() -> Any:
        await asyncio.sleep(60)

    async def keep(message: Any) -> None:
        sent.append(message)

    monkeypatch.setattr(front, "BODY_TIMEOUT_S", 0.05)
    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(Front(proxy)(scope, never, keep))

    assert sent[0]["status"] == 408
    assert proxy.bodies == []


def test_a_client_cannot_command_the_proxy_by_headers_nor_break_it():
    commands = [
        ("x-request-timeout-seconds", "0"),
        ("X_Request_Timeout_Seconds", "0"),
        ("x-request-disconnect-disabled", "?1"),
        ("x-session-id", "mine"),
        ("serve_multiplexed_model_id", "other"),
        ("x-request-id", b"\xff"),
        ("traceparent", b"\xff"),
    ]
    seen: list[Any] = []

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(scope["headers"])
        await JSONResponse({})(scope, receive, send)

    kept = [("x-request-id", "run-7"), ("authorization", "Bearer abc"), ("x-other", "kept")]
    TestClient(Front(proxy)).get("/", headers=[*commands, *kept])

    of_client = {name: value for name, value in seen if name.startswith((b"x", b"a", b"t", b"s"))}
    del of_client[b"accept"], of_client[b"accept-encoding"]
    assert of_client == {
        b"x-request-id": b"run-7",
        b"authorization": b"Bearer abc",
        b"x-other": b"kept",
    }


def test_a_client_that_left_is_not_served_again():
    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        calls.append(1)
        while (await receive())["type"] != "http.disconnect":
            pass  # Ray's proxy then cancels the request and answers nothing

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        raise AssertionError(f"nobody reads {message}")

    calls: list[int] = []
    messages = [{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(Front(proxy)(scope, receive, send))

    assert calls == [1]


def test_a_client_that_does_not_read_its_stream_is_let_go(monkeypatch: pytest.MonkeyPatch):
    """Ray puts no back-pressure on a replica: what is drawn meanwhile would pile up."""
    done: list[str] = []

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            for _ in range(100):
                await send({"type": "http.response.body", "body": b"preview", "more_body": True})
                await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            done.append("cancelled")
            raise

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message["type"])
        if len(sent) == 3:  # the socket is full from here on
            await asyncio.sleep(60)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}"}

    monkeypatch.setattr(front, "SEND_TIMEOUT_S", 0.05)
    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(Front(proxy)(scope, receive, send))

    assert done == ["cancelled"]
    assert len(sent) == 3, "and nothing more was sent"


def test_a_probe_hears_soon_that_no_replica_is_there(monkeypatch: pytest.MonkeyPatch):
    async def waits(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(front, "PROBE_TIMEOUT_S", 0.05)
    began = time.monotonic()
    answer = TestClient(Front(waits)).get("/readyz")

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert "no replica is there" in answer.json()["error"]["message"]
    assert time.monotonic() - began < 10


def test_a_request_leaves_a_record_here_only_if_no_replica_could_leave_one():
    records: list[tuple[str, int, str | None]] = []

    def ask(path: str, *answers: Answer | None, content: bytes = b"{}") -> None:
        app = Front(Proxy(*answers), lambda r: records.append((r.path, r.status, r.code)))
        TestClient(app).post(path, content=content)

    ask("/large", content=b"x" * (MAX_BODY_BYTES + 1))
    ask("/-/routes")
    ask("/died", *[None] * ATTEMPTS)
    ask("/full", says(429))
    ask("/drawn", None, echo)
    ask("/refused", lambda _: JSONResponse({"error": {}}, 429))
    ask("/readyz", says(503))

    assert records == [
        ("/large", 413, "request_too_large"),
        ("/-/routes", 404, "unknown_url"),
        ("/died", 503, "unavailable"),
        ("/full", 429, "unavailable"),
    ]


def test_rays_table_of_routes_is_closed_and_its_health_route_open():
    proxy = Proxy(echo)
    client = TestClient(Front(proxy))

    assert client.get("/-/routes").status_code == 404
    assert client.get("/-/healthz").status_code == 200
