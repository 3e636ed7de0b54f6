"""A replica without Ray Serve around it: what it serves after each wish, and what it refuses."""

from __future__ import annotations

import asyncio
import math
import re
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from jitmodel.artifact import WEIGHTS, ArtifactInfo, load_artifact, save_artifact
from jitmodel.config import FlowConfig, ModelConfig, SamplerConfig
from jitmodel.model import JiT
from pipelines import replica
from pipelines.config import ServeConfig
from pipelines.engine import Engine
from pipelines.replica import Server

MODEL = ModelConfig(
    image_size=8, patch_size=4, hidden_size=32, depth=2, num_heads=2, bottleneck_dim=16,
    in_context_len=2, in_context_start=1, num_classes=3,
)  # fmt: skip
CONFIG = ServeConfig(slots=2, max_steps=10_000, timeout_s=100_000, precision="fp32")
"""No image is refused for want of time, however slow the machine."""


def make_artifact(folder: Path, seed: int, scale: float = 1.0) -> ArtifactInfo:
    model = JiT(MODEL, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    info = ArtifactInfo(model=MODEL, sampler=SamplerConfig(steps=4), run=f"run-{seed}")
    return save_artifact(folder, model.state_dict(), info)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another one served."""
    monkeypatch.setenv("JIT_CACHE", str(tmp_path / "cache"))


async def settled(server: Server) -> None:
    """Waits until the replica has done what it was told."""
    while server._tasks:
        await asyncio.gather(*server._tasks)


@asynccontextmanager
async def client_of(server: Server, wish: dict[str, Any]) -> AsyncIterator[httpx.AsyncClient]:
    """Who asks a server that has been told what to serve."""
    app = server.__serve_build_asgi_app__()
    await server.reconfigure(wish)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@pytest.fixture
def pause(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds before every tick, so that what is long outlives the loading of an artifact, for
    which the processor is free meanwhile."""
    seconds, tick = [0.01], Engine.tick

    def slow(engine: Engine) -> bool:
        time.sleep(seconds[0])
        return tick(engine)

    monkeypatch.setattr(Engine, "tick", slow)
    return seconds


def test_a_successor_takes_over_and_what_is_being_drawn_stays_with_the_old(
    tmp_path: Path, pause: list[float]
):
    first, second = make_artifact(tmp_path / "a", 1), make_artifact(tmp_path / "b", 2)

    async def story() -> None:
        server = Server(CONFIG)
        async with client_of(server, {"model": str(tmp_path / "a")}) as client:

            async def draw(**asked: Any) -> str:
                body = {"prompt": "0", **asked}
                answer = await client.post("/v1/images/generations", json=body, timeout=60)
                assert answer.status_code == 200, answer.text
                return answer.json()["artifact_sha256"]

            long = asyncio.create_task(draw(num_inference_steps=400))
            while not server.live.service.engine.running:
                await asyncio.sleep(0.01)
            old = server.live.service.engine
            await server.reconfigure({"model": str(tmp_path / "b")})
            while server.live.service.engine is old:
                assert await draw() == first.sha256
            assert not long.done()
            pause[0] = 0.0
            assert await draw() == second.sha256
            assert await long == first.sha256
            await settled(server)
            assert not old.healthy, "it was closed"
            assert server.live.service.engine.healthy

            keys = [[16 * "abcd", 3]]  # of nobody: the door is closed from now on
            await server.reconfigure({"model": str(tmp_path / "b"), "keys": keys})
            await settled(server)
            assert (await client.get("/v1/models")).status_code == 401
        server.live.service.engine.close()

    asyncio.run(story())


def test_the_images_of_every_engine_count_while_old_ones_drain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause: list[float]
):
    monkeypatch.setattr(replica, "GAUGE_PERIOD_S", 0.02)
    for seed, name in enumerate("ab"):
        make_artifact(tmp_path / name, seed)
    seen = Counter[str]()

    async def story() -> None:
        server = Server(CONFIG)
        meter, live = server.meter, server.live
        monkeypatch.setattr(meter.images, "inc", lambda more: seen.update(images=more))
        monkeypatch.setattr(meter.used, "set", lambda now: seen.update({f"{now} used": 1}))
        async with client_of(server, {"model": str(tmp_path / "a")}) as client:

            async def draw(steps: int) -> None:
                body = {"prompt": "0", "num_inference_steps": steps}
                answer = await client.post("/v1/images/generations", json=body, timeout=60)
                assert answer.status_code == 200, answer.text

            async def drawing_until(test: Callable[[], bool]) -> None:
                while not test():
                    ended = [task for task in long if task.done()]
                    assert not ended, f"it was to outlive the test: {ended[0].exception()}"
                    await asyncio.sleep(0.01)

            long = [asyncio.create_task(draw(10_000)), asyncio.create_task(draw(10_000))]
            await drawing_until(lambda: live.service.engine.running == 2)
            await server.reconfigure({"model": str(tmp_path / "b")})
            await drawing_until(lambda: len(meter.engines) == 2)
            long.append(asyncio.create_task(draw(10_000)))  # beside the two of the old engine
            await drawing_until(lambda: seen["3 used"] > 0)
            assert await server.record_autoscaling_stats() == {"images": 3}
            await server.reconfigure({"model": str(tmp_path / "a")})
            await drawing_until(lambda: len(meter.engines) == 3)
            for _ in range(5):
                await draw(2)
            for task in long:
                task.cancel()
            await settled(server)
            while len(meter.engines) > 1:
                await asyncio.sleep(0.01)
        live.service.engine.close()
        assert seen["images"] == 5

    asyncio.run(story())


def test_replicas_of_one_machine_keep_an_artifact_together(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    info = make_artifact(tmp_path / "a", 1)
    (tmp_path / "a" / WEIGHTS).write_bytes(bytes(2**23))  # so that nobody is done before all begin
    together = threading.Barrier(4)

    def one() -> None:
        together.wait()
        replica.keep(tmp_path / "a", info)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert replica.kept(info.sha256).is_dir()
    assert caplog.text == ""


def test_a_replica_that_refuses_for_want_of_time_asks_for_another(tmp_path: Path):
    make_artifact(tmp_path / "a", 1)

    async def story() -> None:
        server = Server(CONFIG.model_copy(update={"timeout_s": 30.0}))
        async with client_of(server, {"model": str(tmp_path / "a")}) as client:
            engine = server.live.service.engine
            body = {"prompt": "0", "num_inference_steps": 10_000}
            endless = asyncio.create_task(client.post("/v1/images/generations", json=body))
            while not engine.running:
                await asyncio.sleep(0.01)
            assert await server.record_autoscaling_stats() == {"images": 1}

            engine.tick_s = 60.0  # as if it had been measured
            refused = await client.post("/v1/images/generations", json={"prompt": "0"})

            assert refused.status_code == 429
            assert await server.record_autoscaling_stats() == {"images": CONFIG.slots + 1}
            assert await server.record_autoscaling_stats() == {"images": 1}, "once"
            endless.cancel()
        engine.close()

    asyncio.run(story())


def test_a_broken_artifact_is_refused_and_the_old_one_goes_on(tmp_path: Path):
    good = make_artifact(tmp_path / "good", 1)
    make_artifact(tmp_path / "bad", 2)
    weights = tmp_path / "bad" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    make_artifact(tmp_path / "diverged", 3, scale=math.nan)
    make_artifact(tmp_path / "unsigned", 4)
    config = tmp_path / "unsigned" / "config.json"
    config.write_text(re.sub('"weights_sha256": ".*?"', '"weights_sha256": ""', config.read_text()))

    async def story() -> None:
        server = Server(CONFIG)
        app = server.__serve_build_asgi_app__()
        await server.reconfigure({"model": str(tmp_path / "good")})
        refused = [
            ({"model": str(tmp_path / "bad")}, "damaged"),
            ({"model": str(tmp_path / "diverged")}, "nothing can be drawn with"),
            ({"model": str(tmp_path / "unsigned")}, "holds no weights_sha256"),
            ({"model": str(tmp_path / "nothing")}, "there is no file or folder"),
            ({"model": str(tmp_path / "good"), "artifact_sha256": "f" * 64}, "it was replaced"),
        ]
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for wish, reason in refused:
                await server.reconfigure(wish)
                await settled(server)
                health = (await client.get("/readyz")).json()
                assert health["artifact_sha256"] == good.sha256
                assert reason in health["refused"]
                answer = await client.post("/v1/images/generations", json={"prompt": "1"})
                assert answer.json()["artifact_sha256"] == good.sha256
            await server.reconfigure({"model": str(tmp_path / "good")})
            await settled(server)
            assert (await client.get("/readyz")).json()["refused"] is None

            # keys do not wait for an artifact; health needs none of them, and tells no path
            keys = [[16 * "abcd", 3]]
            await server.reconfigure({"model": str(tmp_path / "bad"), "keys": keys})
            assert (await client.get("/v1/models")).status_code == 401, "at once"
            await settled(server)
            assert (await client.get("/v1/models")).status_code == 401, "and with the old artifact"
            health = (await client.get("/readyz")).json()
            assert "log says why" in health["refused"]
            assert str(tmp_path) not in str(health)
        server.check_health()
        server.live.service.engine.close()
        with pytest.raises(RuntimeError, match="the engine does not draw"):
            server.check_health()

    asyncio.run(story())


def test_a_replica_starts_again_though_its_artifact_was_damaged_meanwhile(tmp_path: Path):
    good = make_artifact(tmp_path / "a", 1)
    wish = {"model": str(tmp_path / "a"), "artifact_sha256": good.sha256}

    async def served() -> str:
        server = Server(CONFIG)
        await server.reconfigure(wish)
        server.live.service.engine.close()
        return server.live.service.info.sha256

    assert asyncio.run(served()) == good.sha256
    (tmp_path / "a" / "model.safetensors").write_bytes(b"")
    assert asyncio.run(served()) == good.sha256
    for seed in range(2, 5):  # the copies are few, and of what was served last
        make_artifact(tmp_path / "b", seed)
        asyncio.run(Server(CONFIG).reconfigure({"model": str(tmp_path / "b")}))
    replica.last_served().unlink()  # those were other servers
    with pytest.raises(ValueError, match="is damaged"):
        asyncio.run(served())


def test_an_edited_config_is_another_artifact_with_names_links_and_a_copy_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    first = make_artifact(tmp_path / "a", 1)
    wish = {"model": str(tmp_path / "a"), "artifact_sha256": first.sha256}

    async def story() -> None:
        server = Server(CONFIG)
        async with client_of(server, wish) as client:
            body = {"prompt": "0", "response_format": "url"}
            link = (await client.post("/v1/images/generations", json=body)).json()["data"][0]["url"]
            server.live.kept.files.clear()
            assert (await client.get(link)).status_code == 200

            edited = first.model_copy(update={"flow": FlowConfig(noise_scale=2.0)})
            weights = load_artifact(tmp_path / "a").state_dict()
            second = save_artifact(tmp_path / "a", weights, edited)
            assert second.weights_sha256 == first.weights_sha256
            server.live.kept.files.clear()
            # the same wish again, which the copy grants, and then the other one
            engine = server.live.service.engine
            with caplog.at_level("INFO"):
                await server.reconfigure({**wish, "wish": "again"})
                await settled(server)
            assert "as before: the artifact is the same" in caplog.text
            assert server.live.service.engine is engine, "nothing was loaded"
            await server.reconfigure({**wish, "artifact_sha256": second.sha256})
            await settled(server)
            assert (await client.get("/readyz")).json()["artifact_sha256"] == second.sha256
            gone = await client.get(link)
            assert (gone.status_code, gone.json()["error"]["code"]) == (404, "artifact_not_served")
            card = (await client.get("/v1/models")).json()["data"][0]
            assert card["weights_sha256"] == first.weights_sha256, "as an evaluation names them"
        server.live.service.engine.close()

        again = Server(CONFIG)  # what was edited is no reason to draw otherwise under one digest
        await again.reconfigure(wish)
        assert again.live.service.info.flow.noise_scale == 1.0
        again.live.service.engine.close()

    asyncio.run(story())


def test_a_wish_that_was_refused_once_is_granted_when_it_is_said_again(tmp_path: Path):
    make_artifact(tmp_path / "a", 1)
    second = make_artifact(tmp_path / "b", 2)
    (tmp_path / "b").rename(tmp_path / "away")  # a store that is down for a moment
    wish = {"model": str(tmp_path / "b"), "artifact_sha256": second.sha256}

    async def story() -> None:
        server = Server(CONFIG)
        await server.reconfigure({"model": str(tmp_path / "a")})
        await server.reconfigure({**wish, "wish": replica.wish()})
        await settled(server)
        assert server.live.refused is not None
        (tmp_path / "away").rename(tmp_path / "b")
        await server.reconfigure({**wish, "wish": replica.wish()})
        await settled(server)
        assert server.live.refused is None
        assert server.live.service.info.sha256 == second.sha256
        server.live.service.engine.close()

    asyncio.run(story())


def test_a_replica_that_dies_after_a_refusal_is_followed_by_one_with_the_artifact_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    good = make_artifact(tmp_path / "good", 1)
    make_artifact(tmp_path / "bad", 2)
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"")
    keys = [[16 * "abcd", 3]]
    wish = {"model": str(tmp_path / "bad"), "artifact_sha256": "f" * 64, "keys": keys}

    async def begun(*wishes: dict[str, Any]) -> Server:
        server = Server(CONFIG)
        for each in wishes:
            await server.reconfigure(each)
            await settled(server)
        server.live.service.engine.close()
        return server

    asyncio.run(begun({"model": str(tmp_path / "good")}, wish))
    live = asyncio.run(begun(wish)).live

    assert live.service.info.sha256 == good.sha256
    assert live.refused is not None
    assert live.refused.startswith(f"{tmp_path / 'bad'}: ")
    assert [key.concurrent for key in live.service.keys] == [3], "the keys are those of now"

    other = tmp_path / "cache" / "served" / ".last-of-another-server"
    monkeypatch.setattr(replica, "last_served", lambda: other)
    with pytest.raises(ValueError, match="is damaged"):  # what others served is not taken
        asyncio.run(begun(wish))


def test_a_replica_that_has_nothing_else_fails_on_a_broken_artifact(tmp_path: Path):
    make_artifact(tmp_path / "bad", 1)
    (tmp_path / "bad" / "config.json").write_text("{}")

    with pytest.raises(ValueError, match="is not the config of an artifact"):
        asyncio.run(Server(CONFIG).reconfigure({"model": str(tmp_path / "bad")}))
    with pytest.raises(ValueError, match="modle"):
        asyncio.run(Server(CONFIG).reconfigure({"modle": "x"}))


@pytest.mark.slow
def test_a_compiled_replica_compiles_nothing_once_it_is_ready(tmp_path: Path):
    from torch._dynamo.utils import counters

    first, second = make_artifact(tmp_path / "a", 1), make_artifact(tmp_path / "b", 2)
    config = CONFIG.model_copy(update={"compile": True, "slots": 1})

    async def story() -> None:
        server = Server(config)
        app = server.__serve_build_asgi_app__()
        await server.reconfigure({"model": str(tmp_path / "a")})
        compiled = counters["stats"]["unique_graphs"]
        assert compiled == 4, "two kinds of blocks, for 2 rows and for 1"
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:

            async def draw(**asked: Any) -> dict[str, Any]:
                body = {"class_labels": 0, "seed": 1, **asked}
                answer = await client.post("/v1/images/generations", json=body)
                assert answer.status_code == 200, answer.text
                return answer.json()

            for scale, n in ((1.0, 1), (3.0, 1), (3.0, 2), (1.0, 5)):
                said = await draw(guidance_scale=scale, n=n)
                assert said["artifact_sha256"] == first.sha256
            await server.reconfigure({"model": str(tmp_path / "b")})
            await settled(server)
            assert (await draw(n=3))["artifact_sha256"] == second.sha256
        assert counters["stats"]["unique_graphs"] == compiled
        server.live.service.engine.close()

    asyncio.run(story())
