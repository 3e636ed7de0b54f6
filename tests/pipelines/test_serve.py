"""The server as a person starts it: what is refused before Ray starts, and one real start."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import ray
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from jitmodel.artifact import ArtifactInfo, load_artifact, read_info, save_artifact
from jitmodel.config import ClassInfo, ModelConfig, SamplerConfig
from jitmodel.model import JiT
from jitmodel.pixels import to_pixels
from jitmodel.sampler import sample, start_noise
from pipelines import serve
from pipelines.cli import main
from pipelines.config import ServeConfig
from pipelines.guard import is_loopback
from tests.processes import descendants

MODEL = ModelConfig(
    image_size=8, patch_size=4, hidden_size=32, depth=2, num_heads=2, bottleneck_dim=16,
    in_context_len=2, in_context_start=1, num_classes=3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on the keys of whoever runs it."""
    monkeypatch.delenv("JIT_API_KEY", raising=False)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A tiny artifact whose images depend on z, t and y."""
    generator = torch.Generator().manual_seed(0)
    model = JiT(MODEL, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    info = ArtifactInfo(
        model=MODEL,
        sampler=SamplerConfig(steps=4, cfg_scale=1.5),
        classes=tuple(ClassInfo(name=name) for name in ("boot", "bag", "shirt")),
        run="tiny",
    )
    save_artifact(tmp_path / "artifact", model.state_dict(), info)
    return tmp_path / "artifact"


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What `jit serve` says about a bad command line."""
    assert main(["serve", *argv]) == 2
    return capsys.readouterr().err


def test_a_damaged_artifact_is_refused_before_anything_starts(
    artifact: Path, capsys: pytest.CaptureFixture[str]
):
    assert "--model is missing" in error_of(capsys)
    assert "no file or folder" in error_of(capsys, str(artifact / "nothing"))
    assert "no artifact at" in error_of(capsys, str(artifact.parent))

    weights, config = artifact / "model.safetensors", artifact / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "is damaged, it is no safetensors file" in error_of(capsys, str(artifact))

    weights.write_bytes(whole)
    config.write_text(text.replace('"hidden_size": 32', '"hidden_size": 64'))
    assert "has shape (192,), but config.json asks for (384,)" in error_of(capsys, str(artifact))

    config.write_text(text.replace('"name": "boot"', '"title": "boot"'))
    assert "is not the config of an artifact" in error_of(capsys, str(artifact))

    config.write_text(text.replace('"cfg_scale": 1.5', '"cfg_scale": 101.0'))
    assert "recommends guidance 101, but images are drawn with 100" in error_of(
        capsys, str(artifact)
    )

    config.write_text(re.sub('"weights_sha256": ".*?"', '"weights_sha256": ""', text))
    assert "holds no weights_sha256" in error_of(capsys, str(artifact))

    diverged = {name: w * math.nan for name, w in load_artifact(artifact).state_dict().items()}
    config.write_text(text)
    save_artifact(artifact, diverged, read_info(artifact))
    assert "nothing can be drawn with" in error_of(capsys, str(artifact))


def test_an_address_that_others_reach_needs_a_key(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    line = (str(artifact), "--host", "0.0.0.0", "--dry-run")
    assert "there is no API key: set JIT_API_KEY" in error_of(capsys, *line)

    monkeypatch.setenv("JIT_API_KEY", " , ")
    assert "there is no API key" in error_of(capsys, *line)

    monkeypatch.setenv("JIT_API_KEY", "one, two")
    assert main(["serve", *line]) == 0
    assert "http://127.0.0.1:8000" in capsys.readouterr().out

    monkeypatch.delenv("JIT_API_KEY")
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    assert "listen on every interface" in error_of(capsys, str(artifact), "--dry-run")


def test_a_dry_run_prints_the_config_and_the_artifact(
    artifact: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["serve", str(artifact), "--slots", "3", "--dry-run"]) == 0

    said = capsys.readouterr().out
    assert '"slots": 3' in said
    assert "would serve tiny" in said
    assert "8x8, 3 classes" in said


def test_an_address_in_use_and_a_request_that_never_fits_are_refused(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = str(s.getsockname()[1])
        assert f"cannot listen on 127.0.0.1:{port}" in error_of(
            capsys, str(artifact), "--port", port
        )
        assert "choose another --metrics-port" in error_of(
            capsys, str(artifact), "--port", "0", "--metrics-port", port
        )
    # an address that is no machine's
    line = (str(artifact), "--host", "192.0.2.77")
    monkeypatch.setenv("JIT_API_KEY", "one")
    for more in ((), ("--dry-run",), ("--port", "0")):
        assert "cannot listen on --host 192.0.2.77" in error_of(capsys, *line, *more)
    both = error_of(capsys, str(artifact), "--port", "8123", "--metrics-port", "8123")
    assert "port and metrics_port are both 8123" in both
    with pytest.raises(ValueError, match=r"max_steps\n.*less than or equal to 10000"):
        ServeConfig(model="x", max_steps=10_001)  # a sampler takes no more
    with pytest.raises(ValueError, match="max_images 16 exceeds slots 8 \\+ max_queue 4"):
        ServeConfig(max_queue=4)


def test_the_curl_line_of_the_log_names_one_class():
    for names, prompt in (("boot", "bag"), "boot"), (("crane", "crane"), "class:0"):
        classes = tuple(ClassInfo(name=name) for name in names)
        model = MODEL.model_copy(update={"num_classes": 2})
        info = ArtifactInfo(model=model, sampler=SamplerConfig(), classes=classes)
        assert f'"prompt": "{prompt}"' in serve.example("http://localhost", info, keyed=False)


@pytest.mark.parametrize(
    ("own", "sent"), [("one", "Bearer one"), ("one, two", "Bearer KEY"), ("", "Bearer KEY")]
)
def test_the_curl_line_sends_the_key_of_the_environment_if_it_is_the_only_one(
    own: str, sent: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JIT_API_KEY", own)
    info = ArtifactInfo(model=MODEL, sampler=SamplerConfig())

    line = serve.example("http://localhost", info, keyed=True)

    words = subprocess.run(
        ["bash", "-c", f"curl() {{ printf '%s\\n' \"$@\"; }}; {line.partition(' | ')[0]}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert f"Authorization: {sent}" in words


def test_loopback_is_recognised():
    hosts = ["127.0.0.1", "127.0.1.5", "localhost", "::1", "0.0.0.0", "::", "192.0.2.1", "example"]
    assert [is_loopback(host) for host in hosts] == [True] * 4 + [False] * 4
    assert serve.url_of(ServeConfig(host="::1", port=80)) == "http://[::1]:80"


def our_samples() -> list[Any]:
    """Every number of ours that Prometheus reads of this node."""
    node = ray.nodes()[0]
    text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}").text
    families = text_string_to_metric_families(text)
    return [s for family in families for s in family.samples if s.name.startswith("ray_jit_")]


def metrics(earlier: set[str]) -> dict[tuple[str, str], float]:
    """(name, its one label that matters) to the sum, without the workers of earlier servers."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    for sample_ in our_samples():
        if sample_.labels.get("WorkerId") not in earlier:
            ours = ("status", "reason", "phase", "result", "le")
            label = [sample_.labels[name] for name in ours if name in sample_.labels]
            found[sample_.name.removeprefix("ray_"), "/".join(label)] += sample_.value
    return found


def check_metrics(images: int, earlier: set[str]) -> None:
    """Waits until the metrics have caught up with `images` drawn images, and checks the others."""
    until = time.monotonic() + 30
    while (
        (found := metrics(earlier))["jit_images_total", ""] < images
        or not found["jit_requests_total", "413"]  # of the proxy, which exports by its own clock
    ):
        assert time.monotonic() < until, found
        time.sleep(0.5)
    assert found["jit_images_total", ""] == images
    assert found["jit_slots", ""] == 2
    assert found["jit_slots_used", ""] == found["jit_queue_images", ""] == 0
    # 5 answers, a client that left, a wrong prompt and a wrong n, 2 wrong keys, a large body
    assert found["jit_requests_total", "200"] >= 5
    assert found["jit_requests_total", "422"] == 2
    assert found["jit_requests_total", "401"] == 2
    assert found["jit_requests_total", "413"] == found["jit_requests_total", "404"] == 1
    assert found["jit_rejections_total", "request_too_large"] == 1, "counted by the proxy"
    assert found["jit_rejections_total", "invalid_value"] == 2
    assert found["jit_rejections_total", "invalid_api_key"] == 1, (
        "of images; the other asked for models"
    )
    assert found["jit_request_seconds_count", "drawing"] == 5
    assert 0 < found["jit_request_seconds_sum", "drawing"] < 60
    # images of 4 Heun steps drawn together take 7 evaluations, one of 20 takes 39
    assert found["jit_ticks_total", ""] >= 4 * 7 + 39
    assert 0 < found["jit_tick_seconds_total", ""] < 60


@pytest.mark.ray
@pytest.mark.slow
def test_a_started_server_draws_for_the_openai_client(
    artifact: Path,
    ray_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    repository: Path,
    tmp_path: Path,
):
    monkeypatch.setenv("JIT_API_KEY", "the key")
    config = ServeConfig(
        model=str(artifact), port=0, slots=2, max_steps=10_000, timeout_s=60, precision="fp32"
    )
    with (
        pytest.raises(ValueError, match="99 replicas of 1 CPUs need 99 CPUs, but the cluster has"),
        serve.serving(config.model_copy(update={"replicas": 99})),
    ):
        pass

    earlier = {s.labels.get("WorkerId", "") for s in our_samples()}
    # what tests without Serve drew in this very process may be exported late
    earlier.add(ray.get_runtime_context().get_worker_id())
    with serve.serving(config) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="the key", max_retries=0)
        drawn = client.images.generate(prompt="bag", n=3, extra_body={"seed": 5})
        assert drawn.data is not None
        model = load_artifact(artifact)
        e = start_noise(model.flow, model.config, 5, torch.arange(3))
        settings = SamplerConfig(steps=4, cfg_scale=1.5)
        expected = to_pixels(sample(model, torch.ones(3, dtype=torch.int64), e, settings))
        for image, pixels in zip(drawn.data, expected, strict=True):
            found = np.asarray(Image.open(io.BytesIO(base64.b64decode(image.b64_json or ""))))
            assert np.abs(found.astype(int) - pixels.permute(1, 2, 0).numpy()).max() <= 1

        text = (repository / "README.md").read_text("utf-8").partition("## Serving")[2]
        code = text.partition("```python\n")[2].partition("```")[0]
        here = code.replace("http://127.0.0.1:8000", url).replace("Ankle boot", "boot")
        monkeypatch.chdir(tmp_path)
        exec(here.replace('"none"', '"the key"'))
        assert Image.open("boot.png").size == (8, 8)

        events = client.images.generate(prompt="boot", stream=True, partial_images=2)
        assert [event.type for event in events][-1] == "image_generation.completed"

        # a client that leaves: eight images of 19,999 evaluations would hold both slots
        asked = {"prompt": "boot", "n": 8, "num_inference_steps": 10_000}
        header = {"Authorization": "Bearer the key"}
        with contextlib.suppress(httpx.ReadTimeout):
            commands = {"X-Request-Disconnect-Disabled": "?1", **header}
            httpx.post(f"{url}/v1/images/generations", json=asked, headers=commands, timeout=0.5)
        began = time.monotonic()
        client.images.generate(prompt="shirt", timeout=30)
        assert time.monotonic() - began < 10

        with pytest.raises(openai.UnprocessableEntityError, match="did you mean"):
            client.images.generate(prompt="shirts")
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            client.with_options(api_key="another").models.list()
        with pytest.raises(openai.APIStatusError) as large:
            client.images.generate(prompt="x" * 100_000)
        assert large.value.status_code == 413
        commands = {"X-Request-Timeout-Seconds": "0.000001", "X-Request-Id": b"\xff"}
        assert httpx.get(f"{url}/readyz", headers=commands).json()["status"] == "ok"
        assert httpx.get(f"{url}/-/routes").status_code == 404, "the front stands before the proxy"
        asked = {"prompt": "boot", "n": 17}
        refused = httpx.post(f"{url}/v1/images/generations", json=asked, headers=header)
        assert refused.status_code == 422
        asked = {"prompt": "boot", "response_format": "url"}
        linked = httpx.post(f"{url}/v1/images/generations", json=asked, headers=header).json()
        link = linked["data"][0]["url"]
        assert link.startswith(url), "the address that the client used, not the replica's"
        assert httpx.get(link).status_code == 401
        assert httpx.get(link, headers=header).content.startswith(b"\x89PNG")
        check_metrics(7, earlier)
        command = text.partition("```bash\n")[2].partition("```")[0]
        command = command.replace("http://127.0.0.1:8000", url).replace("Ankle boot", "boot")
        words = [*shlex.split(command.replace("\\\n", " ")), "-sH", "Authorization: Bearer the key"]
        if shutil.which("curl"):
            said = subprocess.run(words, capture_output=True, check=True, timeout=60)
            assert len(json.loads(said.stdout)["data"]) == 4
        assert "<title>" in httpx.get(url, auth=("me", "the key")).text
        with (
            pytest.raises(ValueError, match="Ray Serve already runs in this cluster"),
            serve.serving(config),
        ):
            pass
        assert httpx.get(f"{url}/readyz").status_code == 200  # the refused one stopped nothing

    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/readyz")


@pytest.mark.ray
@pytest.mark.slow
def test_ten_changes_of_artifact_under_load_lose_no_request(
    artifact: Path, tmp_path: Path, ray_cluster: None
):
    other = tmp_path / "other"
    model = JiT(MODEL, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3)
    save_artifact(other, model.state_dict(), read_info(artifact))
    expected = {}
    for folder in (artifact, other):
        model = load_artifact(folder)
        e = start_noise(model.flow, model.config, 5, torch.arange(2))
        settings = SamplerConfig(steps=30, cfg_scale=1.5)
        x = sample(model, torch.ones(2, dtype=torch.int64), e, settings)
        expected[read_info(folder).sha256] = to_pixels(x).permute(0, 2, 3, 1).numpy()
    digests = list(expected)
    assert np.abs(expected[digests[0]].astype(int) - expected[digests[1]]).max() > 10
    config = ServeConfig(model=str(artifact), port=0, slots=4, precision="fp32")
    answers: list[httpx.Response] = []
    over = threading.Event()

    with serve.serving(config) as url:

        def client() -> None:
            asked = {"prompt": "bag", "n": 2, "seed": 5, "num_inference_steps": 30}
            while not over.is_set():
                answers.append(httpx.post(f"{url}/v1/images/generations", json=asked, timeout=60))

        clients = [threading.Thread(target=client) for _ in range(3)]
        for thread in clients:
            thread.start()
        for change in range(10):
            folder, digest = (other, digests[1]) if change % 2 == 0 else (artifact, digests[0])
            changed = config.model_copy(update={"model": str(folder)})
            serve.apply(changed, serve.check(changed))
            until = time.monotonic() + 60
            while httpx.get(f"{url}/readyz").json()["artifact_sha256"] != digest:
                assert time.monotonic() < until, f"change {change} did not arrive"
                time.sleep(0.05)
        (other / "model.safetensors").write_bytes(b"broken")
        with pytest.raises(ValueError, match="damaged"):
            serve.check(config.model_copy(update={"model": str(other)}))
        seen = len(answers)
        while len(answers) < seen + 3:
            time.sleep(0.05)
        over.set()
        for thread in clients:
            thread.join()

    assert {answer.status_code for answer in answers} == {200}
    assert len(answers) > 20
    for answer in answers:
        said = answer.json()
        pixels = expected[said["artifact_sha256"]]
        for image, expected_pixels in zip(said["data"], pixels, strict=True):
            found = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))))
            assert np.abs(found.astype(int) - expected_pixels).max() <= 1
    assert {answer.json()["artifact_sha256"] for answer in answers} == set(digests)
    assert answers[-1].json()["artifact_sha256"] == digests[0]


@pytest.mark.ray
@pytest.mark.slow
def test_a_replica_killed_after_a_refusal_is_followed_by_one_with_the_artifact_before(
    artifact: Path, tmp_path: Path, ray_cluster: None
):
    good, broken = read_info(artifact), tmp_path / "broken"
    broken.mkdir()
    config = ServeConfig(model=str(artifact), port=0, slots=2, precision="fp32")
    with serve.serving(config) as url:

        def health() -> dict[str, Any]:
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.get(f"{url}/readyz")
                if answer.status_code == 200:
                    return answer.json()
            return {"refused": None}

        def refused() -> dict[str, Any]:
            until = time.monotonic() + 90
            while (found := health())["refused"] is None:
                assert time.monotonic() < until, found
                time.sleep(0.2)
            return found

        # as where the nodes of a cluster do not see the folder that its driver does
        bad = good.model_copy(update={"weights_sha256": "f" * 64})
        serve.apply(config.model_copy(update={"model": str(broken)}), bad)
        assert refused()["artifact_sha256"] == good.sha256
        (replica,) = descendants(os.getpid(), "ServeReplica:jit:server")
        os.kill(replica, signal.SIGKILL)
        while descendants(os.getpid(), "ServeReplica:jit:server").keys() == {replica}:
            time.sleep(0.1)
        assert refused()["artifact_sha256"] == good.sha256
        (successor,) = descendants(os.getpid(), "ServeReplica:jit:server")
        assert successor != replica
        drawn = httpx.post(f"{url}/v1/images/generations", json={"prompt": "bag"}, timeout=60)
        assert drawn.json()["artifact_sha256"] == good.sha256
