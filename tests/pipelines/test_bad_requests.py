"""Bad requests by hand, over a real socket: each is told what is wrong, none is a mistake of ours.

Two thirds are well-formed JSON that asks for what cannot be; the rest are bodies that cannot be
read, requests that are no HTTP, and keys that open nothing.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from jitmodel.artifact import ArtifactInfo, load_artifact, read_info, save_artifact
from jitmodel.config import ModelConfig, SamplerConfig
from jitmodel.model import JiT
from pipelines.api import Live, Service, create_app
from pipelines.config import ServeConfig
from pipelines.engine import Engine
from pipelines.front import Front
from pipelines.guard import Key, digest_of
from tests.servers import listening

PATH = "/v1/images/generations"
KEY, OLD = "of today", "of yesterday"
MODEL = ModelConfig(
    image_size=8, patch_size=4, hidden_size=32, depth=2, num_heads=2, bottleneck_dim=16,
    in_context_len=2, in_context_start=1, num_classes=3,
)  # fmt: skip


def known(key: str) -> tuple[Key, ...]:
    return (Key(digest_of(key.encode()), concurrent=4),)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Live]]:
    """Front and application on a port of loopback, behind a key; what is served."""
    folder = tmp_path_factory.mktemp("artifact")
    model = JiT(MODEL, generator=torch.Generator().manual_seed(0))
    info = ArtifactInfo(model=MODEL, sampler=SamplerConfig(steps=2), run="tiny")
    save_artifact(folder, model.state_dict(), info)
    engine = Engine(load_artifact(folder), torch.device("cpu"), slots=4)
    engine.warm_up()
    engine.start()
    config = ServeConfig(model=str(folder), slots=4)
    live = Live(Service(engine, read_info(folder), config, "tiny", 1, known(OLD)))
    live.current = dataclasses.replace(live.service, keys=known(KEY))  # as a reload does it
    with listening(Front(create_app(live)), log_level="info", lifespan="off") as url:
        yield int(url.rpartition(":")[2]), live
    engine.close()


def say(port: int, *parts: bytes) -> tuple[int, bytes]:
    """Sends bytes as they are; status and body of the answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as s:
        for part in parts:
            s.sendall(part)
        got = b""
        while b"\r\n\r\n" not in got:
            got += (piece := s.recv(65536))
            assert piece, f"the answer broke off: {got[:100]!r}"
        head, _, body = got.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        while length is None or len(body) < int(length[1]):
            body += (piece := s.recv(65536))
            if not piece:
                break
    return int(head.split()[1]), body


def request(method: str, path: str, body: bytes = b"", **headers: str | None) -> bytes:
    """A request with the key; a header that is None is left out."""
    said = {
        "Host": "here",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Authorization": f"Bearer {KEY}",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    lines = [f"{name}: {value}" for name, value in said.items() if value is not None]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1") + body


CANNOT_BE_MET: list[dict[str, Any]] = [
    {},
    {"prompt": ""},
    {"prompt": " "},
    {"prompt": None},
    {"prompt": 0},
    {"prompt": ["0"]},
    {"prompt": "\x00"},
    {"prompt": "\u202e\U0001f600"},
    {"prompt": "class:"},
    {"prompt": "class:-1"},
    {"prompt": "class:3"},
    {"prompt": "class:" + "9" * 900},
    {"prompt": "../../etc/passwd"},
    {"prompt": "{{7*7}} %s {0}"},
    {"prompt": "x" * 1001},
    {"class_labels": 3},
    {"class_labels": -1},
    {"class_labels": []},
    {"class_labels": [0, "x"]},
    {"class_labels": [[0]]},
    {"class_labels": [0] * 20_000},
    {"class_labels": 0, "prompt": "0"},
    *(
        {"prompt": "0", name: value}
        for name, values in {
            "n": (0, -1, 17, 10**30, 1.5, "2", True, [1], {}),
            "seed": (-1, 2**63, 1.5, "7"),
            "index": (-1, 2**62),
            "size": ("", "x", "16x16", "99999x99999", "8x8\n", "8x", 8),
            "num_inference_steps": (0, -1, 10**9, "9", 2.0),
            "guidance_scale": (-1, 1e308, "2", float("nan"), float("inf")),
            "guidance_interval": ([], [0.5], [0, 0], [0.5, 0.1], [-1, 2], [0, 1, 1], "0,1"),
            "solver": ("ddim", 7),
            "stream": ("true", 1),
            "partial_images": (-1, "3", 13, 10**9),
            "response_format": ("file", 1),
            "output_format": ("gif", "PNG"),
            "output_compression": (-1, 101),
            "background": ("transparent",),
            "user": ({},),
            "__proto__": (1,),
            "": (1,),
        }.items()
        for value in values
    ),
]

CANNOT_BE_READ: dict[str, tuple[int, bytes]] = {
    "an empty body": (400, request("POST", PATH)),
    "no object": (400, request("POST", PATH, b"[1]")),
    "half of it": (400, request("POST", PATH, b'{"prompt": "0"')),
    "two of it": (400, request("POST", PATH, b'{"prompt": "0"} {}')),
    "other quotes": (400, request("POST", PATH, b"{'prompt': '0'}")),
    "a deep list": (400, request("POST", PATH, b"[" * 60_000)),
    "a deep object": (400, request("POST", PATH, b'{"a":' * 10_000)),
    "a deep parameter": (400, request("POST", PATH, b'{"n":' + b"[" * 9999 + b"]" * 9999 + b"}")),
    "no UTF-8": (400, request("POST", PATH, b'{"prompt": "\xff"}')),
    "half a surrogate": (400, request("POST", PATH, b'{"prompt": "\\ud800"}')),
    "UTF-16": (400, request("POST", PATH, '{"prompt": "0"}'.encode("utf-16"))),
    "gzip": (400, request("POST", PATH, b"\x1f\x8b\x08", Content_Encoding="gzip")),
    "a form": (415, request("POST", PATH, b"prompt=0", Content_Type="text/plain")),
    "no type": (415, request("POST", PATH, b"{}", Content_Type=None)),
    "65,537 bytes": (413, request("POST", PATH, b" " * 65_537)),
    "100 MB": (413, request("POST", PATH, b'{"prompt": "' + b"x" * 100_000_000 + b'"}')),
    "another route": (404, request("GET", "/nothing")),
    "a path upwards": (404, request("GET", "/../../etc/passwd")),
    "another method": (405, request("DELETE", PATH)),
    "a line break in a path": (404, request("GET", "/v1/models/a%0d%0ab")),
    "a query that is no number": (422, request("GET", "/v1/classes?limit=1e9")),
    "a long query": (422, request("GET", "/v1/classes?q=" + "x" * 300)),
    "a link without its query": (422, request("GET", "/v1/images/redraw")),
    "a link with a wrong interval": (
        422,
        request(
            "GET",
            "/v1/images/redraw?artifact_sha256=a&precision=fp32&class_labels=0&seed=1&index=0"
            "&num_inference_steps=2&guidance_scale=1&guidance_interval=x&guidance_interval=1"
            "&solver=heun&size=8x8&output_format=png&output_compression=9",
        ),
    ),
    "no key": (401, request("GET", "/v1/models", Authorization=None)),
    "a wrong key": (401, request("POST", PATH, b"{}", Authorization="Bearer wrong")),
    "an old key": (401, request("POST", PATH, b"{}", Authorization=f"Bearer {OLD}")),
    "a digest for a key": (
        401,
        request("GET", "/", Authorization=f"Bearer {known(KEY)[0].sha256}"),
    ),
    "half a key": (401, request("GET", "/v1/models", Authorization=f"Bearer {KEY[:-1]}")),
    "no base64": (401, request("GET", "/", Authorization="Basic \xff")),
}

NO_HTTP: dict[str, bytes] = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "a negative length": request("POST", PATH, Content_Length="-5"),
    "two lengths": request("POST", PATH, b"{}", Transfer_Encoding="chunked"),
    "a bad chunk": request(
        "POST", PATH, b"ZZ\r\n", Content_Length=None, Transfer_Encoding="chunked"
    ),
    "an unknown method": request("FOO", PATH),
    "a line of 100 kB": request("GET", "/" + "x" * 100_000),
}


def test_more_than_a_hundred_bad_requests_are_told_what_is_wrong(
    server: tuple[int, Live], caplog: pytest.LogCaptureFixture
):
    port, live = server
    caplog.set_level(logging.INFO)
    seen: dict[str, tuple[int, int, bytes]] = {}

    for asked in CANNOT_BE_MET:
        seen[str(asked)[:80]] = (422, *say(port, request("POST", PATH, json.dumps(asked).encode())))
    for name, (status, sent) in CANNOT_BE_READ.items():
        seen[name] = (status, *say(port, sent))

    for name, (expected, status, body) in seen.items():
        assert status == expected, f"{name}: {body[:300]!r}"
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}, name
        assert error["type"] == "invalid_request_error", name
        assert len(error["message"]) > 10, name
        assert b"Traceback" not in body, name
        assert b".py" not in body, name
        assert (error["param"] is not None) == (status == 422), name
        assert not str(error["param"]).isdigit(), name
    for name, sent in NO_HTTP.items():
        status, body = say(port, sent)
        assert status == 400, name
        assert b"Traceback" not in body, name
    assert len(seen) + len(NO_HTTP) > 100
    assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []
    assert not live.service.engine.running + live.service.engine.waiting
    good = request("POST", PATH, b'{"prompt": "0"}')
    assert say(port, good)[0] == 200, "and it still draws"
