"""`jit weights`: a real download from a real server, a wrong file, no network at all."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines import weights
from pipelines.config import StageFailed, WeightsConfig

CONTENT = b"weights" * 1000


class Server(ThreadingHTTPServer):
    """Serves CONTENT, or what is left of it when the connection breaks."""

    daemon_threads = True
    served, status = len(CONTENT), 200
    requests = 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: self.server.served])

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that has the standard file, as far as `weights` knows."""
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(weights, "INCEPTION_URL", f"http://127.0.0.1:{server.server_address[1]}/w")
    monkeypatch.setattr(weights, "INCEPTION_SHA256", hashlib.sha256(CONTENT).hexdigest())
    yield server
    server.shutdown()
    server.server_close()


def test_the_file_is_fetched_once_to_the_place_where_this_machine_looks_for_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JIT_CACHE", str(tmp_path))

    weights.run(WeightsConfig(dry_run=True))
    assert server.requests == 0
    weights.run(WeightsConfig())
    weights.run(WeightsConfig())

    place = weights.standard_inception()
    assert place.parent == tmp_path
    assert place.read_bytes() == CONTENT
    assert server.requests == 1


@pytest.mark.parametrize("served", [0, 3000])
def test_a_download_that_breaks_is_not_kept(server: Server, tmp_path: Path, served: int):
    server.served = served

    with pytest.raises(StageFailed, match=r"cannot fetch|was cut short or is another file"):
        weights.run(WeightsConfig(output=str(tmp_path / "w.pth")))

    assert list(tmp_path.iterdir()) == []


def test_another_file_is_neither_kept_nor_replaced(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mine = tmp_path / "mine.pth"
    mine.write_text("mine")
    with pytest.raises(FileExistsError, match=r"mine.pth is another file"):
        weights.run(WeightsConfig(output=str(mine)))
    assert mine.read_text() == "mine"

    monkeypatch.setattr(weights, "INCEPTION_SHA256", "0" * 64)
    with pytest.raises(StageFailed, match=r"has sha256 .* instead of 0000.*: it was cut short"):
        weights.run(WeightsConfig(output=str(tmp_path / "w.pth")))
    server.status = 404
    with pytest.raises(StageFailed, match=r"cannot fetch http.*Not Found.*--weights FILE"):
        weights.run(WeightsConfig(output=str(tmp_path / "w.pth")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.pth"]


def test_without_a_network_one_sentence_says_so(tmp_path: Path):
    if subprocess.run(["unshare", "-rn", "true"], check=False).returncode:
        pytest.skip("needs `unshare -rn` for a machine without a network")
    command = [sys.executable, "-m", "pipelines.weights", "--output", str(tmp_path / "w.pth")]

    found = subprocess.run(
        ["unshare", "-rn", *command], check=False, capture_output=True, text=True
    )

    assert found.returncode == 1
    assert found.stderr.count("\n") == 1
    assert "error: cannot fetch https://github.com/toshas/torch-fidelity/" in found.stderr
    assert "--weights FILE" in found.stderr
    assert list(tmp_path.iterdir()) == []
