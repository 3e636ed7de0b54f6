"""What goes wrong around a server: too many clients, clients that leave or dawdle, a dead replica.

Bounded, and on loopback only. The first tests have the whole application in this process; the slow
ones start `jit serve` as a person does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch

from jitmodel.artifact import ArtifactInfo, load_artifact, read_info, save_artifact
from jitmodel.config import ClassInfo, ModelConfig, SamplerConfig
from jitmodel.model import JiT
from pipelines.api import Live, Service, create_app
from pipelines.config import ServeConfig
from pipelines.engine import Engine
from pipelines.front import Front
from pipelines.ports import free_port
from tests.processes import descendants
from tests.servers import listening

PATH = "/v1/images/generations"
MODEL = ModelConfig(
    image_size=8, patch_size=4, hidden_size=32, depth=2, num_heads=2, bottleneck_dim=16,
    in_context_len=2, in_context_start=1, num_classes=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    model = JiT(MODEL, generator=torch.Generator().manual_seed(0))
    info = ArtifactInfo(model=MODEL, sampler=SamplerConfig(steps=10), run="tiny")
    save_artifact(folder, model.state_dict(), info)
    return folder


@contextlib.contextmanager
def served(
    artifact: Path, *, send_bytes: int = 0, **config: object
) -> Iterator[tuple[str, Engine]]:
    """The application behind its front on a real socket; its URL and its engine."""
    settings = ServeConfig(model=str(artifact), precision="fp32", **config)
    engine = Engine(
        load_artifact(artifact),
        torch.device("cpu"),
        slots=settings.slots,
        max_queue=settings.max_queue,
    )
    engine.warm_up()
    engine.start()
    app = Front(create_app(Live(Service(engine, read_info(artifact), settings, "tiny", 1))))
    try:
        options = {"log_level": "critical", "lifespan": "off"}
        with listening(app, send_bytes=send_bytes, **options) as url:
            yield url, engine
    finally:
        engine.close()


@dataclass
class Seen:
    """What one request met."""

    status: int
    seconds: float
    code: str | None


async def flood(url: str, rate: float, seconds: float, asked: dict[str, object]) -> list[Seen]:
    """Requests at an even rate, whatever comes back."""
    # A connection is not used again in the moment in which the server, after 5 s, closes it.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=2)
    seen: list[Seen] = []

    async def one(client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        answer = await client.post(url + PATH, json=asked)
        error = answer.json().get("error", {})
        seen.append(Seen(answer.status_code, time.monotonic() - began, error.get("code")))
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1

    async with httpx.AsyncClient(limits=limits, timeout=120) as client:
        start, tasks = time.monotonic(), []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, start + number / rate - time.monotonic()))
            tasks.append(asyncio.create_task(one(client)))
        await asyncio.gather(*tasks)
    return seen


def resident(pid: int) -> float:
    """Memory of a process in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def check_flood(seen: list[Seen], deadline_s: float) -> Counter[int]:
    """Accepted requests keep the deadline, the others hear 429 at once, nothing else happens."""
    met = Counter(s.status for s in seen)
    assert set(met) <= {200, 429}, met
    assert met[200] > 0
    assert met[429] > met[200], "it was no overload"
    assert max(s.seconds for s in seen if s.status == 200) < deadline_s + 1
    refused = sorted(s.seconds for s in seen if s.status == 429)
    assert refused[len(refused) // 2] < 0.5
    assert {s.code for s in seen if s.status == 429} == {"queue_full"}
    return met


def wait_until(claim: str, test: object, seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not test():  # type: ignore[operator]
        assert time.monotonic() < until, f"not within {seconds:g} s: {claim}"
        time.sleep(0.02)


def test_at_ten_times_capacity_some_are_served_in_time_and_the_rest_hear_429(artifact: Path):
    # A full queue takes 3 s, though the flood makes ticks three times as slow as at rest: no short
    # stall of the machine decides. A machine that is slower refuses for want of time as well.
    with served(artifact, slots=2, max_queue=14, timeout_s=8) as (url, engine):
        asked = {"prompt": "0", "num_inference_steps": 60, "guidance_scale": 1.0}

        seen = asyncio.run(flood(url, 150, 4, asked))

        met = check_flood(seen, 8)
        assert met.total() >= 10 * met[200], "it was no ten times what was served"
        wait_until("it is idle again", lambda: not engine.running + engine.waiting)
        assert httpx.post(url + PATH, json={"prompt": "0"}).status_code == 200


def test_slow_and_half_open_clients_hold_no_slot(artifact: Path):
    with (
        served(artifact, send_bytes=8192, slots=2, resize=True) as (url, engine),
        contextlib.ExitStack() as stack,
    ):
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        for number in range(30):
            s = stack.enter_context(socket.create_connection(address))
            match number % 3:
                case 0:  # nothing
                    pass
                case 1:  # half a head
                    s.sendall(head[:40].encode())
                case 2:  # half a body
                    s.sendall(f'{head}Content-Length: 99\r\n\r\n{{"prompt"'.encode())
        streams = []
        asked = {"prompt": "0", "stream": True, "n": 8, "partial_images": 10, "size": "256x256"}
        body = json.dumps(asked).encode()
        for _ in range(3):  # they ask for a stream that no buffer holds, and never read it
            s = stack.enter_context(socket.create_connection(address))
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            s.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            streams.append(s)

        began = time.monotonic()
        assert httpx.post(url + PATH, json={"prompt": "0"}, timeout=20).status_code == 200
        assert time.monotonic() - began < 10
        wait_until("those that do not read were drawn for", lambda: engine.images == 1 + 3 * 8)
        wait_until("their slots are free", lambda: not engine.running)
        for s in streams:
            assert s.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200"


@contextlib.contextmanager
def jit_serve(artifact: Path, log: Path, *argv: str) -> Iterator[tuple[str, int]]:
    """`jit serve` as a person starts it; its URL and process id."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    line = [sys.executable, "-m", "pipelines.cli", "serve", str(artifact), "--port", str(port)]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RAY_ADDRESS", "JIT_API_KEY") and not name.startswith("RAY_SERVE")
    }
    with (
        log.open("wb") as file,
        subprocess.Popen(
            [*line, "--precision", "fp32", *argv], stdout=file, stderr=file, env=environment
        ) as process,
    ):
        try:
            wait_until("it is ready", lambda: ready(url), 90)
            yield url, process.pid
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_a_replica_killed_under_load_costs_at_most_a_clear_503(artifact: Path, tmp_path: Path):
    log = tmp_path / "log"
    with jit_serve(artifact, log) as (url, pid):
        over, seen = threading.Event(), list[tuple[float, int, str]]()

        def client() -> None:
            while not over.is_set():
                asked = {"prompt": "0", "num_inference_steps": 50}
                answer = httpx.post(url + PATH, json=asked, timeout=90)
                seen.append((time.monotonic(), answer.status_code, answer.text[:300]))

        clients = [threading.Thread(target=client) for _ in range(4)]
        for thread in clients:
            thread.start()
        for _ in range(2):
            before = len(seen)
            wait_until("it draws", lambda before=before: len(seen) > before + 8, 60)
            (replica,) = descendants(pid, "ServeReplica:jit:server")
            killed = time.monotonic()
            os.kill(replica, signal.SIGKILL)
            wait_until(
                "it draws again",
                lambda killed=killed: any(t > killed + 1 and s == 200 for t, s, _ in seen),
                90,
            )
        over.set()
        for thread in clients:
            thread.join()

    met = Counter(status for _, status, _ in seen)
    print(f"answers with two kills: {dict(met)}")
    assert set(met) <= {200, 503}, [text for _, status, text in seen if status not in (200, 503)]
    for _, status, text in seen:
        if status == 503:
            assert json.loads(text)["error"]["code"] in ("unavailable", "engine_failed")
    lines = [s for s in log.read_text().splitlines() if '"path": "/v1/images/' in s]
    assert json.loads(lines[0][lines[0].index("{") :])["status"] == 200


@pytest.mark.slow
def test_a_server_that_is_stopped_finishes_what_it_draws(artifact: Path, tmp_path: Path):
    log, seen = tmp_path / "log", list[int]()
    with jit_serve(artifact, log, "--max-steps", "10000") as (url, pid):

        def client() -> None:
            asked = {"prompt": "0", "n": 4, "num_inference_steps": 1000}
            seen.append(httpx.post(url + PATH, json=asked, timeout=120).status_code)

        def late() -> int:
            return httpx.post(url + PATH, json={"prompt": "0"}, timeout=60).status_code

        thread = threading.Thread(target=client)
        thread.start()
        time.sleep(1)  # the request is in work
        os.kill(pid, signal.SIGINT)
        wait_until("who comes now is sent away", lambda: late() == 503)
        assert not seen, "it was still drawing"
        thread.join()
        assert seen == [200]
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        assert ended.si_status == 0
    assert "finishing what is being drawn" in log.read_text()


@pytest.mark.slow
def test_each_request_to_two_replicas_is_a_line_of_json_and_counted_at_the_port_of_the_log(
    artifact: Path, tmp_path: Path
):
    log = tmp_path / "log"
    with jit_serve(artifact, log, "--replicas", "2") as (url, _):
        asked = {"prompt": "0", "num_inference_steps": 2}
        for _ in range(40):
            assert httpx.post(url + PATH, json=asked, timeout=60).status_code == 200
        (metrics,) = re.findall(r"metrics .* at (http://\S+)", log.read_text())

        def drawn() -> list[dict[str, object]]:
            lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
            return [record for record in map(json.loads, lines) if record["path"] == PATH]

        def counted() -> float:
            text = httpx.get(metrics).text
            found = re.findall(r'^ray_jit_requests_total\{.*status="200".*\} (\S+)', text, re.M)
            return sum(map(float, found))

        wait_until("every request is logged", lambda: len(drawn()) == 40, 30)
        wait_until("every request is counted", lambda: counted() == 40, 30)
    assert {record["status"] for record in drawn()} == {200}


@pytest.mark.slow
def test_memory_is_flat_at_ten_times_capacity_through_ray(artifact: Path, tmp_path: Path):
    asked = {"prompt": "0", "num_inference_steps": 150}
    argv = ("--slots", "4", "--max-queue", "28", "--timeout-s", "5")
    with jit_serve(artifact, tmp_path / "log", *argv) as (url, pid):
        began = time.monotonic()
        seen = asyncio.run(flood(url, 1000, 0.032, asked))  # fills slots and queue, no more
        served = sum(s.status == 200 for s in seen)
        rate = min(10 * served / (time.monotonic() - began), 120)
        names = "ServeReplica:jit:server", "ProxyActor"
        processes = [found for name in names for found in descendants(pid, name)]
        assert len(processes) == 2

        asyncio.run(flood(url, rate, 5, asked))
        before = [resident(process) for process in processes]
        seen = asyncio.run(flood(url, rate, 20, asked))
        after = [resident(process) for process in processes]

        met = check_flood(seen, 5)
        print(f"{rate:.0f} requests/s for 20 s: {dict(met)}, memory {before} -> {after} MB")
        for grown in (b - a for a, b in zip(before, after, strict=True)):
            assert grown < 30, "MB in 20 s of overload"


@pytest.mark.slow
@pytest.mark.parametrize(("clients", "n"), [(12, 1), (2, 16)])
def test_a_long_queue_starts_a_second_replica_which_draws_too(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clients: int, n: int
):
    monkeypatch.setenv("RAY_DISABLE_WORKER_LOG_PREFIX", "0")  # the log tells which replica drew
    log = tmp_path / "log"
    argv = ("--slots", "2", "--max-replicas", "2", "--upscale-delay-s", "1")
    with jit_serve(artifact, log, *argv) as (url, _):
        over, seen = threading.Event(), list[int]()

        def client() -> None:
            while not over.is_set():
                asked = {"prompt": "0", "num_inference_steps": 60, "n": n}
                seen.append(httpx.post(url + PATH, json=asked, timeout=90).status_code)

        def drew() -> set[str]:
            drawn = r'pid=(\d+)\).*"path": "/v1/images/generations".*"status": 200'
            return set(re.findall(drawn, log.read_text()))

        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        wait_until("one replica draws", lambda: len(drew()) == 1, 30)
        wait_until("two replicas draw", lambda: len(drew()) == 2, 120)
        over.set()
        for thread in threads:
            thread.join()

    assert set(seen) == {200}, "and nobody noticed"


@pytest.mark.slow
def test_sighup_reads_artifact_and_keys_again_and_refuses_a_broken_one(
    artifact: Path, tmp_path: Path
):
    folder, keys = tmp_path / "artifact", tmp_path / "keys"
    info = read_info(shutil.copytree(artifact, folder))
    keys.write_text("first\n")
    with jit_serve(folder, tmp_path / "log", "--keys-file", str(keys)) as (url, pid):

        def status(key: str) -> int:
            header = {"Authorization": f"Bearer {key}"}
            return httpx.get(f"{url}/v1/models", headers=header).status_code

        assert (status("first"), status("second")) == (200, 401)
        keys.write_text("second\n")
        model = JiT(MODEL, generator=torch.Generator().manual_seed(1))
        successor = save_artifact(folder, model.state_dict(), info)
        os.kill(pid, signal.SIGHUP)
        wait_until("the new key opens", lambda: status("second") == 200, 60)
        assert status("first") == 401, "the old one does not"

        def digest() -> str:
            return str(httpx.get(f"{url}/readyz").json()["artifact_sha256"])

        assert successor.sha256 != info.sha256
        # the keys change at once, the artifact once it is loaded
        wait_until("the new artifact is served", lambda: digest() == successor.sha256, 60)

        names = tuple(ClassInfo(name=name) for name in ("boot", "bag", "shirt"))
        edited = save_artifact(
            folder, model.state_dict(), successor.model_copy(update={"classes": names})
        )
        assert edited.weights_sha256 == successor.weights_sha256
        os.kill(pid, signal.SIGHUP)

        def first_class() -> str:
            header = {"Authorization": "Bearer second"}
            answer = httpx.get(f"{url}/v1/classes", headers=header)
            return str(answer.json()["data"][0]["name"])

        wait_until("the new names are there", lambda: first_class() == "boot", 60)

        shutil.rmtree(folder)
        keys.write_text("third\n")
        os.kill(pid, signal.SIGHUP)
        wait_until("the third key opens", lambda: status("third") == 200, 60)
        assert status("second") == 401, "though there is no artifact any more"
        assert "the old one goes on with the keys of now" in (tmp_path / "log").read_text()
        keys.unlink()
        os.kill(pid, signal.SIGHUP)  # and that changes nothing
        asked = {"prompt": "0"}
        header = {"Authorization": "Bearer third"}
        drawn = httpx.post(url + PATH, json=asked, headers=header, timeout=60).json()
        assert drawn["artifact_sha256"] == edited.sha256
