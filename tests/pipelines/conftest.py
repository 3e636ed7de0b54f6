"""What tests of the stages share: a store that fails, and an Inception with random weights."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import logging
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

DROPPED = ("content-length", "transfer-encoding", "connection")
AWAY_S = 2.0
ERROR = "<Error><Code>{code}</Code><Message>{code}, says the proxy</Message></Error>"


@contextlib.contextmanager
def replaced(folder: Path, moment: str) -> Iterator[Path]:
    """Let another writer take a folder over as soon as a line of the log begins like this, and go
    on once the first one's signs of life have met it; yields the other one's file."""
    file = folder / "00002.json"
    owner = {"command": "jit", "pid": 7, "host": "elsewhere", "since": "today", "released": False}

    class Successor(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith(moment) and not file.exists():
                file.write_text(json.dumps(owner), encoding="utf-8")
                time.sleep(1)

    watcher, logger = Successor(), logging.getLogger("pipelines")
    logger.addHandler(watcher)
    try:
        yield file
    finally:
        logger.removeHandler(watcher)


class FaultyStore(ThreadingHTTPServer):
    """Passes requests on to a store, but answers some with 503, resets some and cuts some short.

    A request that is reset may have been carried out before: its answer is what gets lost.
    """

    daemon_threads = True
    slow_down, reset, truncate = 0.20, 0.04, 0.04
    """Fractions of the requests."""

    def __init__(self, endpoint: str, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store = urlsplit(endpoint).netloc
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.seen: Counter[str] = Counter()
        self.code_after: tuple[int, str] | None = None
        """From this many requests on, all are refused with this code."""
        self.denied: str | None = None
        """What the paths of objects hold that may not be read."""
        self.denial = (403, "AccessDenied")
        self.away_after: int | None = None
        """From this many requests on, nobody listens for AWAY_S."""
        self.is_away = False

    @property
    def endpoint(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def go_away(self, seconds: float) -> None:
        """Close the port and all connections for a while."""
        self.is_away = True
        self.shutdown()
        self.server_close()
        time.sleep(seconds)
        self.socket = socket.socket(self.address_family, self.socket_type)
        self.server_bind()
        self.server_activate()
        self.is_away = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def fate(self) -> str:
        """What happens to the next request."""
        with self.lock:
            self.seen["requests"] += 1
            if self.seen["requests"] == self.away_after:
                threading.Thread(target=self.go_away, args=(AWAY_S,), daemon=True).start()
            if self.code_after and self.seen["requests"] > self.code_after[0]:
                kind = "refused"
            else:
                x, kind = self.random.random(), "passed"
                for name in ("slow_down", "reset", "truncate"):
                    if 0 <= x < getattr(self, name):
                        kind = name
                    x -= getattr(self, name)
            self.seen[kind] += 1
            return kind

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultyStore
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Expect"):
            assert not self.headers.get("Transfer-Encoding")
        fate = self.server.fate()
        if self.server.is_away:
            self.close_connection = True
            return
        if fate in ("slow_down", "refused"):
            status, code = 503, "SlowDown"
            if fate == "refused":
                assert self.server.code_after
                status, code = 400, self.server.code_after[1]
            text = b"" if self.command == "HEAD" else ERROR.format(code=code).encode()
            self._answer(status, [("Content-Type", "application/xml")], len(text), text)
            return
        if self.server.denied and self.server.denied in self.path and self.command == "GET":
            status, code = self.server.denial
            text = ERROR.format(code=code).encode()
            self._answer(status, [("Content-Type", "application/xml")], len(text), text)
            return
        store = http.client.HTTPConnection(self.server.store, timeout=60)
        headers = dict(self.headers.items())  # with the Host that was signed
        store.request(self.command, self.path, body, headers)
        answer = store.getresponse()
        data = answer.read()
        kept = [(k, v) for k, v in answer.getheaders()
                if k.lower() not in DROPPED]  # fmt: skip
        length = int(answer.getheader("Content-Length") or len(data))
        store.close()
        if fate == "reset":
            # Closed with nothing to linger: the client sees "connection reset by peer".
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        if fate == "truncate" and len(data) > 1:
            data = data[: len(data) // 2]
            self.close_connection = True
        self._answer(answer.status, kept, length, data)

    def _answer(
        self, status: int, headers: list[tuple[str, str]], length: int, data: bytes
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _serve

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def faulty_store(s3_environment: dict[str, str]) -> Iterator[FaultyStore]:
    """The S3 server behind a proxy that fails 28 % of the requests."""
    proxy = FaultyStore(s3_environment["AWS_ENDPOINT_URL"])
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield proxy
    proxy.shutdown()
    proxy.server_close()


@pytest.fixture
def faulty_environment(s3_environment: dict[str, str], faulty_store: FaultyStore) -> dict[str, str]:
    """What leads a process to the faulty store."""
    return s3_environment | {"AWS_ENDPOINT_URL": faulty_store.endpoint}


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the standard format with random weights that keep activations alive."""
    import torch
    from torch import Tensor, nn
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, state: dict[str, Tensor], *_: object, **__: object) -> None:
            assert state == {}

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    network = Blank("blank", ["2048"], nothing)
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.8, 1.2, generator=generator)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path
