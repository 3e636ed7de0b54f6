"""The Serve config of an artifact: what is written, what is refused, and one real deployment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from ray.serve.schema import ServeDeploySchema

from jitmodel.artifact import ArtifactInfo, save_artifact
from jitmodel.config import ModelConfig, SamplerConfig
from jitmodel.model import JiT
from pipelines import deploy
from pipelines.cli import main
from pipelines.config import DeployConfig
from pipelines.ports import free_port

MODEL = ModelConfig(
    image_size=8, patch_size=4, hidden_size=32, depth=2, num_heads=2, bottleneck_dim=16,
    in_context_len=2, in_context_start=1, num_classes=3,
)  # fmt: skip


def make_artifact(folder: Path, run: str) -> ArtifactInfo:
    model = JiT(MODEL, generator=torch.Generator().manual_seed(len(run)))
    info = ArtifactInfo(model=MODEL, sampler=SamplerConfig(steps=4), run=run)
    return save_artifact(folder, model.state_dict(), info)


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("JIT_API_KEY", raising=False)
    make_artifact(tmp_path / "artifact", "first")
    return tmp_path / "artifact"


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """The Serve config that a dry run prints."""
    assert main(["deploy", *argv, "--dry-run"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["deploy", *argv]) == 2
    return capsys.readouterr().err


def test_the_serve_config_is_valid_holds_no_key_and_keeps_haproxy_off(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    keys = tmp_path / "keys"
    keys.write_text("# of the gallery\nopen-sesame 3\n")

    line = (str(artifact), "--host", "0.0.0.0", "--keys-file", str(keys))
    found = printed(capsys, *line, "--replicas", "2", "--max-replicas", "5", "--gpus", "0.5")

    ServeDeploySchema.model_validate(found)
    deployment = found["applications"][0]["deployments"][0]
    assert deployment["autoscaling_config"]["max_replicas"] == 5
    assert deployment["ray_actor_options"]["num_gpus"] == 0.5
    assert deployment["user_config"]["model"] == str(artifact)
    assert deployment["graceful_shutdown_timeout_s"] == 120, "the longest that a request may take"
    ((digest, limit),) = deployment["user_config"]["keys"]
    assert (len(digest), limit) == (64, 3)
    assert "sesame" not in str(found)
    environment = found["controller_options"]["runtime_env"]["env_vars"]
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "0"


def test_a_config_that_ray_would_misread_is_refused(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    found = printed(capsys, str(artifact))
    file = tmp_path / "serve.yaml"

    def error(*path: Any, value: Any) -> str:
        document = yaml.safe_load(yaml.safe_dump(found))
        place = document
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        file.write_text(yaml.safe_dump(document))
        return error_of(capsys, "--file", str(file))

    deployment = ("applications", 0, "deployments", 0)
    assert "did you mean 'num_replicas'?" in error(*deployment, "num_replica", value=3)
    assert "unknown key 'num_cpu'" in error(*deployment, "ray_actor_options", "num_cpu", value=1)
    assert "did you mean 'http_options'" in error("http_option", value={})
    assert "slots" in error("applications", 0, "args", "slots", value=0)
    assert "slot\n" in error("applications", 0, "args", "slot", value=4)
    for name, value in (("port", 1), ("host", "::"), ("replicas", 2), ("keys_file", "x")):
        assert f"{name} does nothing in args" in error("applications", 0, "args", name, value=value)
    assert "modle" in error(*deployment, "user_config", "modle", value="x")
    assert "can be reached by others" in error("http_options", "host", value="0.0.0.0")
    variables = ("controller_options", "runtime_env", "env_vars")
    assert "has RAY_SERVE_ENABLE_HA_PROXY '1': it must be '0'" in error(
        *variables, "RAY_SERVE_ENABLE_HA_PROXY", value="1"
    )
    assert "has RAY_SERVE_ENABLE_HA_PROXY None" in error("controller_options", value=None)
    assert "did you mean 'env_vars'?" in error(
        *deployment, "ray_actor_options", "runtime_env", value={"env_varz": {}}
    )
    assert "import_path 'pipelines.deploy:build'" in error(
        "applications", 0, "import_path", value="pipelines.deploy.build"
    )
    assert "there must be one, named 'jit'" in error("applications", value=[])
    assert "has deployments []" in error("applications", 0, "deployments", value=[])
    keys = (*deployment, "user_config", "keys")
    said = error(*keys, value=[["my-secret-key", 5]])
    assert "keys" in said
    assert "my-secret" not in said, "a key in the place of its digest is not repeated"
    assert "greater than 0" in error(*keys, value=[["a" * 64, -1]])
    for limit in (1, 71):
        assert "max_ongoing_requests must be 72 or more" in error(
            *deployment, "max_ongoing_requests", value=limit
        )
    assert "max_queued_requests must be 1 or more" in error(
        *deployment, "max_queued_requests", value=-1
    )
    assert "`jit deploy` writes 135" in error("http_options", "request_timeout_s", value=None)
    nowhere = str(tmp_path / "none" / "serve.yaml")
    said = error_of(capsys, str(artifact), "--output", nowhere)
    assert f"cannot write --output {nowhere} (No such file or directory)" in said
    assert "go by whole paths" in error("applications", 0, "route_prefix", value="/api")
    assert "go by whole paths" in error("http_options", "root_path", value="/api")
    functions = {"port": 9000, "grpc_servicer_functions": ["a.b"]}
    policy = {"policy_functionn": "a:b"}
    assert "did you mean 'policy_function'?" in error(
        "applications", 0, "autoscaling_policy", value=policy
    )
    scales = found["applications"][0]["deployments"][0] | {"num_replicas": None}
    scaling = {"min_replicas": 1, "max_replicas": 3, "policy": {"policy_function": "nope:no"}}
    assert "cannot be imported: No module named 'nope'" in error(
        *deployment, value=scales | {"autoscaling_config": scaling}
    )
    assert "max_replicas: Input should be greater than 0\n" in error(
        *deployment, value=scales | {"autoscaling_config": {"max_replicas": 0}}
    )
    assert "asks for no key" in error("grpc_options", value=functions)
    assert "/nowhere" in error(*deployment, "user_config", "model", value="/nowhere")
    file.write_text("- 1")
    assert "does not hold a Serve config" in error_of(capsys, "--file", str(file))
    assert "leave one of them out" in error_of(capsys, str(artifact), "--file", str(file))
    both = ("--file", str(file), "--slots", "3", "--host", "127.0.0.2")
    assert "--host and --slots cannot be said beside --file" in error_of(capsys, *both)
    assert "is for `jit serve`" in error_of(capsys, str(artifact), "--metrics-port", "9000")
    assert "cannot read --file /nowhere.yaml" in error_of(capsys, "--file", "/nowhere.yaml")


def test_keys_that_ray_has_defaults_for_may_be_left_out(
    artifact: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: Any,
    monkeypatch: Any,
):
    found = printed(capsys, str(artifact))
    del found["proxy_location"]
    del found["http_options"]["port"]

    said: list[str] = []

    def replicas(url: str, name: str, until: float) -> str:
        assert (url, name) == ("http://127.0.0.1:8000", said[-1])
        return "f" * 64

    class Client:
        """A cluster at which it runs at once."""

        def __init__(self, address: str) -> None: ...

        def deploy_applications(self, document: dict[str, Any]) -> None:
            chosen = document["applications"][0]["deployments"][0]["user_config"]
            said.append(chosen.pop("wish"))
            assert document == found

        def get_serve_details(self) -> dict[str, Any]:
            return {"applications": {"jit": {"status": "RUNNING"}}}

    monkeypatch.setattr(deploy, "ServeSubmissionClient", Client)
    monkeypatch.setattr(deploy, "nodes_of", lambda *_: ([{"CPU": 1.0}], False))
    monkeypatch.setattr(deploy, "wait_for_replicas", replicas)
    with caplog.at_level("INFO"):
        deploy.apply(found, DeployConfig())
        deploy.apply(found, DeployConfig())

    assert len(set(said)) == 2, "Ray passes on what is new only"
    assert "127.0.0.1:8000 of every node" in caplog.text


def test_a_deployment_is_done_when_replicas_say_so_and_failed_when_one_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(deploy, "POLL_S", 0.05)
    monkeypatch.setattr(deploy, "UNREACHED_S", 0.1)
    health = {"status": "ok", "artifact_sha256": "a" * 64, "refused": None, "wish": "mine"}
    before = health | {"wish": "another", "refused": "that was another one"}
    answers: list[dict[str, Any]] = []

    class Readyz(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(200 if said else 503)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    def waited(*said: dict[str, Any]) -> str | None:
        answers[:] = said
        return deploy.wait_for_replicas(url, "mine", time.monotonic() + 1)

    with ThreadingHTTPServer(("127.0.0.1", 0), Readyz) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert waited({}, before, health, before, health) == "a" * 64
        with pytest.raises(RuntimeError, match="refused and aaaaaaaaaaaa goes on: it is damaged"):
            waited(before, health, health | {"refused": "it is damaged"})
        with pytest.raises(RuntimeError, match=r"that was another one.*if another server"):
            waited(before)
        server.shutdown()
    with caplog.at_level("WARNING"):
        assert waited() is None
    assert "is not reached from here" in caplog.text


def test_replicas_that_no_node_has_room_for_are_refused_before_those_that_run_are_stopped(
    artifact: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    found = printed(capsys, str(artifact), "--cpus", "3", "--replicas", "2")
    wanted = ServeDeploySchema.model_validate(found)

    deploy.check_room(wanted, [{"CPU": 2.0}, {"CPU": 6.0}], False)
    with pytest.raises(ValueError, match=r"2 replicas of 3 CPUs .* largest with 4, and room for 1"):
        deploy.check_room(wanted, [{"CPU": 4.0}, {"CPU": 2.0}], False)
    with pytest.raises(ValueError, match="0 nodes, the largest with 0"):
        deploy.check_room(wanted, [], False)
    deploy.check_room(wanted, [{"CPU": 2.0}], True)
    assert "room for 0 replicas until its autoscaler" in caplog.text
    scaled = yaml.safe_load(yaml.safe_dump(found))
    scaled["applications"][0]["deployments"][0] |= {
        "num_replicas": None,
        "autoscaling_config": {"min_replicas": 4, "max_replicas": 8},
    }
    with pytest.raises(ValueError, match="4 replicas of 3 CPUs"):
        deploy.check_room(ServeDeploySchema.model_validate(scaled), [{"CPU": 9.0}], False)
    with_gpu = ServeDeploySchema.model_validate(printed(capsys, str(artifact), "--gpus", "1"))
    with pytest.raises(ValueError, match="1 replicas of 1 GPUs"):
        deploy.check_room(with_gpu, [{"CPU": 64.0}], False)
    for share, replicas in (("0.2", 5), ("0.1", 10), ("0.05", 20)):
        for wanted_replicas, fits in ((replicas, True), (replicas + 1, False)):
            line = (str(artifact), "--gpus", share, "--replicas", str(wanted_replicas))
            shared = ServeDeploySchema.model_validate(printed(capsys, *line))
            with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="GPUs"):
                deploy.check_room(shared, [{"CPU": 64.0, "GPU": 1.0}], False)


@pytest.mark.parametrize(
    ("types", "grows"),
    [({"0a1b": "node_0a1b"}, False), ({"0a1b": "head", "2c3d": "gpu-worker"}, True), ({}, True)],
    ids=["ray start", "ray up", "nothing is said"],
)
def test_a_cluster_with_types_of_nodes_may_grow(types: dict[str, str], grows: bool):
    report = {"nodeTypeMapping": types}
    said = {"data": {"clusterStatus": {"autoscalerReport": report}}}

    assert deploy.has_autoscaler(said) == grows
    assert deploy.has_autoscaler({})


def test_a_serve_that_listens_elsewhere_is_not_given_the_keys_of_another_address(
    artifact: Path, capsys: pytest.CaptureFixture[str]
):
    found = printed(capsys, str(artifact))
    wanted = ServeDeploySchema.model_validate(found)
    runs = {"proxy_location": "HeadOnly", "http_options": found["http_options"]}
    open_to_all = {"proxy_location": "EveryNode", "http_options": {"host": "0.0.0.0"}}

    deploy.check_running({"applications": {}}, wanted)  # no Serve runs
    deploy.check_running(runs, wanted)
    for change, said in (
        ({"host": "127.0.0.2"}, "host 127.0.0.2 instead of 127.0.0.1"),
        ({"port": 18942}, "say --host 127.0.0.1 --port 18942"),
        ({"request_timeout_s": 9.0}, "request_timeout_s 9.0 instead of 135.0"),
    ):
        with pytest.raises(ValueError, match=said):
            deploy.check_running(runs | {"http_options": found["http_options"] | change}, wanted)
    with pytest.raises(ValueError, match="EveryNode instead of HeadOnly, host 0"):
        deploy.check_running(open_to_all, wanted)


def test_an_open_address_without_keys_and_a_damaged_artifact_are_refused(
    artifact: Path, capsys: pytest.CaptureFixture[str]
):
    assert "no API key" in error_of(capsys, str(artifact), "--host", "0.0.0.0")
    (artifact / "model.safetensors").write_bytes(b"")
    assert "damaged" in error_of(capsys, str(artifact))


def check_that_a_server_which_joins_has_its_front(artifact: Path, cluster: str, port: str) -> None:
    """`jit serve` on a cluster of others, with a key: Ray's table of routes is closed."""
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
    with contextlib.suppress(httpx.TransportError):
        while httpx.get(f"{url}/readyz") is not None:  # of the server before
            assert time.monotonic() < until
            time.sleep(0.5)
    server = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "serve", str(artifact), "--port", port],
        env=os.environ | {"RAY_ADDRESS": cluster, "JIT_API_KEY": "secret"},
    )
    try:
        status = 0
        while status != 200:
            assert server.poll() is None
            assert time.monotonic() < until
            with contextlib.suppress(httpx.TransportError):
                status = httpx.get(f"{url}/readyz").status_code
            time.sleep(0.5)
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/-/routes").status_code == 404
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_that_asks_for_a_token_is_given_the_one_at_home(
    artifact: Path, head: tuple[str, dict[str, str]], repository: Path, tmp_path: Path
):
    address, owner = head
    line = ["deploy", str(artifact), "--address", address, "--cpus", "99"]

    def said(**changes: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", *line],
            cwd=repository,
            env=owner | changes,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert "1 replicas of 99 CPUs do not fit: the cluster has 1 nodes" in said()
    stranger = said(HOME=str(tmp_path), RAY_AUTH_MODE="token")
    assert "refuses our token" in stranger
    assert "Traceback" not in stranger


@pytest.mark.slow
def test_a_cluster_serves_what_is_deployed_and_changes_it_without_a_pause(
    artifact: Path, short_tmp: Path, capsys: pytest.CaptureFixture[str]
):
    """A head node of its own, in a process of its own, as `ray start` makes it."""
    gcs, dashboard, port = (str(free_port()) for _ in range(3))
    head = subprocess.Popen(
        [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--num-cpus=2",
         "--node-ip-address=127.0.1.7", f"--port={gcs}", f"--dashboard-port={dashboard}",
         "--dashboard-host=127.0.0.1", "--include-dashboard=true", f"--temp-dir={short_tmp}",
         "--object-store-memory=100000000"],
        env={name: value for name, value in os.environ.items() if "PROXY_CALLBACK" not in name}
        | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{dashboard}"
        until = time.monotonic() + 60
        while True:
            try:
                assert httpx.get(f"{address}/api/version").status_code == 200
                break
            except (httpx.TransportError, AssertionError):
                assert time.monotonic() < until, "the cluster did not start"
                time.sleep(0.5)
        line = ("--address", address, "--port", port, "--precision", "fp32")
        url = f"http://127.0.0.1:{port}"
        first = printed(capsys, str(artifact), *line)["applications"][0]["deployments"][0]
        assert main(["deploy", str(artifact), *line]) == 0
        digest = httpx.get(f"{url}/readyz").json()["artifact_sha256"]
        assert digest == first["user_config"]["artifact_sha256"]
        # the front stands before the proxy: Ray's own table of routes is closed
        assert httpx.get(f"{url}/-/routes").status_code == 404

        second = make_artifact(artifact.parent / "second", "second one")
        statuses, over = set(), threading.Event()

        def probe() -> None:
            while not over.wait(0.05):
                statuses.add(httpx.get(f"{url}/readyz").status_code)

        prober = threading.Thread(target=probe)
        prober.start()
        assert main(["deploy", str(artifact.parent / "second"), *line]) == 0
        over.set()
        prober.join()
        assert httpx.get(f"{url}/readyz").json()["artifact_sha256"] == second.sha256
        assert statuses == {200}, "it answered all the time"

        assert main(["deploy", str(artifact), *line, "--cpus", "8"]) == 2
        assert "1 replicas of 8 CPUs do not fit: the cluster has 1 nodes" in capsys.readouterr().err
        assert httpx.get(f"{url}/readyz").status_code == 200
        assert main(["deploy", str(artifact), *line[:2], "--port", "1"]) == 2
        assert f"port {port} instead of 1" in capsys.readouterr().err
        subprocess.run(
            [Path(sys.executable).parent / "serve", "shutdown", "-y", "--address", address],
            check=True,
        )
        check_that_a_server_which_joins_has_its_front(artifact, f"127.0.1.7:{gcs}", port)
    finally:
        head.terminate()
        head.wait(60)  # Ray drains a node for half a minute
