"""Artifact -> HTTP, by Ray Serve.

One deployment: each replica holds the network, the engine's thread and the whole application.
A deployment of its own for HTTP in front of it would send every request, preview and image through
Ray a second time; the event loop of a replica only waits, so it needs none. Requests are never
queued by Ray: each is a coroutine that waits for the engine, whose own bounded queue says 429 at
once, so max_ongoing_requests is only a ceiling far above that queue. Ray Serve cancels the handler
of a client that left, which frees its slots.

The artifact is checked in full before Ray starts, and a replica counts as started once its engine
is warm: whoever gets an answer from /readyz can draw. Keys travel to the replicas as SHA-256.
SIGHUP reads the artifact and the keys again and changes them without losing a request.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is slow to import: `--help` shall not wait for it
    import sys

    from pipelines.cli import main

    raise SystemExit(main(["serve", *sys.argv[1:]]))

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

# Read when Ray is imported: a line of JSON on standard error for each request, all of them, as
# they were written. Ray would drop those that differ in digits only, and put a name before each.
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_DISABLE_WORKER_LOG_PREFIX", "1")

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from jitmodel.artifact import ArtifactInfo, load_artifact
from pipelines import runtime, scaling, storage
from pipelines.api import GRACE_S
from pipelines.classes import ClassIndex
from pipelines.config import ServeConfig, require
from pipelines.engine import Engine
from pipelines.guard import KEY_VARIABLE, is_loopback, read_keys
from pipelines.ports import free_port, try_to_bind
from pipelines.replica import Server, opened, try_out, wish

logger = logging.getLogger(__name__)

APP, DEPLOYMENT, VERSION = "jit", "server", "1"
MAX_ONGOING_REQUESTS = 10_000
MAX_QUEUED_REQUESTS = 1_000
"""Requests that wait in a proxy while no replica is there."""
ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipelines.proxy:middlewares",
}
"""Of Serve's controller, and so of the proxies that it starts, whose front is ours."""
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""Of Ray Serve's own loggers; ours say one line a request."""


def run(config: ServeConfig) -> None:
    """Serves until interrupted, by Ctrl-C or SIGTERM.

    Raises:
        ValueError, FileNotFoundError: the artifact, the address or the cluster does not fit; Serve
            was not started.
    """
    info = check(config)
    if config.dry_run:
        free_port_of(config)
        print(config.model_dump_json(indent=2))
        print(f"would serve {describe(info)} at {url_of(config)}")
        return
    again = threading.Event()
    is_main = threading.current_thread() is threading.main_thread()
    if is_main:  # before anybody can see that it is ready: untouched, SIGHUP ends the process
        signal.signal(signal.SIGHUP, lambda *_: again.set())
    with contextlib.suppress(KeyboardInterrupt), serving(config):
        if is_main:
            # Ray's own handler of SIGTERM exits with 15; a shell's `&` leaves SIGINT ignored
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler)
        while again.wait():
            again.clear()
            try:
                info = reload(config, info)
            except Exception as error:  # whatever it is, the server goes on
                logger.error("neither artifact nor keys were read again: %s", error)
    logger.info("stopped")


@contextlib.contextmanager
def serving(config: ServeConfig) -> Iterator[str]:
    """A running server; its URL. At the end it finishes what it draws, and is stopped.

    Raises:
        ValueError, FileNotFoundError: as `run`.
    """
    info = check(config)
    free = free_port_of(config)
    if not config.port:
        config = config.model_copy(update={"port": free})
    check_port(config.host, config.port, "--port")
    if config.metrics_port:
        check_port("", config.metrics_port, "--metrics-port")
    for variable in ENVIRONMENT.items():  # before Ray starts: its processes inherit it
        os.environ.setdefault(*variable)
    runtime.connect(metrics_port=config.metrics_port)
    check_cluster(config)
    if serve.status().proxies:
        raise ValueError(
            "Ray Serve already runs in this cluster, with an address of its own: stop it with "
            "`serve shutdown`, or name another cluster in RAY_ADDRESS"
        )
    url = url_of(config)
    logger.info("starting %s; metrics for Prometheus at %s", describe(info), metrics_url())
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(
            proxy_location="HeadOnly",
            controller_options=front_of_a_cluster(),
            http_options=HTTPOptions(**http_options(config)),
            logging_config=QUIET,
        )
        apply(config, info)
        logger.info(
            "serving at %s\n%s", url, example(url, info, keyed=bool(wanted(config, info)["keys"]))
        )
        try:
            yield url
        finally:
            finish(config.timeout_s)
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]


def finish(timeout_s: float) -> None:
    """Lets the replicas finish what they draw; who comes meanwhile hears 503.

    `serve.shutdown` alone ends the proxies first, and every client with them.
    """
    logger.info("finishing what is being drawn; Ctrl-C again stops at once")
    until = time.monotonic() + timeout_s
    try:
        serve.delete(APP, _blocking=False)
        while APP in serve.status().applications and time.monotonic() < until:
            time.sleep(0.1)
    except Exception as error:  # without its cluster it is stopped all the same
        logger.warning("what was being drawn is not finished: %s", error)


def front_of_a_cluster() -> dict[str, Any] | None:
    """Options that bring our front to the proxies of a cluster that was started by others.

    Processes of a cluster of our own inherit it, and start some seconds sooner without options.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return None
    return {"runtime_env": {"env_vars": ENVIRONMENT}}


def reload(config: ServeConfig, served: ArtifactInfo) -> ArtifactInfo:
    """Reads keys and artifact again and serves them.

    A refused artifact leaves the old one, and does not hold up the keys: one that leaked shall be
    shut out though the artifact's folder is gone.

    Args:
        served: of the artifact that is served.

    Returns:
        Of the artifact that is served from now on.

    Raises:
        ValueError, FileNotFoundError: the keys are refused; nothing changed.
    """
    check_keys(config)
    try:
        info = check(config)
    except Exception as error:  # whatever is wrong with it
        logger.error("the artifact is refused, the old one goes on with the keys of now: %s", error)
        info = served
    apply(config, info)
    return info


def apply(config: ServeConfig, info: ArtifactInfo) -> None:
    """Makes the running Serve serve the artifact that was checked, to the keys of now.

    Replicas that are there go on with it.
    """
    gpu = has_gpu()
    chosen = options(config, info, gpu=gpu)
    chosen["user_config"]["wish"] = wish()
    deployment = serve.deployment(**chosen)(serve.ingress()(Server))
    # The same version tells Ray to hand `user_config` to the replicas instead of replacing them.
    deployment = deployment.options(version=VERSION, _internal=True)
    serve.run(deployment.bind(config), name=APP, route_prefix="/")


def http_options(config: ServeConfig) -> dict[str, Any]:
    """How the proxies listen; the deadline is the engine's, Ray's own comes after it."""
    return {
        "host": config.host,
        "port": config.port,
        "request_timeout_s": config.timeout_s + 3 * GRACE_S,
    }


def options(config: ServeConfig, info: ArtifactInfo, *, gpu: bool) -> dict[str, Any]:
    """The deployment as Ray Serve wants it; everything but `user_config` is fixed at its start."""
    chosen: dict[str, Any] = {"num_replicas": config.replicas}
    if config.max_replicas > config.replicas:
        chosen = {
            "autoscaling_config": {
                "min_replicas": config.replicas,
                "max_replicas": config.max_replicas,
                "policy": {"policy_function": scaling.POLICY},
                "target_ongoing_requests": config.slots,  # images, with this policy
                "look_back_period_s": 15,
                "upscale_delay_s": config.upscale_delay_s,
                "downscale_delay_s": 300,
            }
        }
    return {
        "name": DEPLOYMENT,
        **chosen,
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "max_queued_requests": MAX_QUEUED_REQUESTS,
        "health_check_period_s": 2,
        "graceful_shutdown_timeout_s": config.timeout_s,  # what is being drawn is finished
        "graceful_shutdown_wait_loop_s": 0.5,  # how often a replica looks whether it is
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "ray_actor_options": {"num_cpus": config.cpus, "num_gpus": int(gpu)},
        "user_config": wanted(config, info),
    }


def wanted(config: ServeConfig, info: ArtifactInfo) -> dict[str, Any]:
    """What a replica shall serve, and whom."""
    keys = read_keys(config.keys_file, config.key_concurrency)
    return {
        "model": storage.absolute(config.model),
        "artifact_sha256": info.sha256,
        "keys": [[key.sha256, key.concurrent] for key in keys],
    }


def check(config: ServeConfig) -> ArtifactInfo:
    """Everything that can be wrong before Ray starts; what the artifact says about itself.

    Raises:
        FileNotFoundError: there is no artifact.
        ValueError: the artifact is damaged or cannot be served, or the address needs a key.
    """
    require(config, "model")
    check_keys(config)
    folder, info = opened(config.model)
    device = torch.device("cpu")
    try_out(Engine(load_artifact(folder, verify=False), device, slots=1), info, config.model)
    return info


def check_keys(config: ServeConfig) -> None:
    """Compares the keys of now with who reaches the address.

    Raises:
        FileNotFoundError, ValueError: the keys cannot be read, or the address needs one.
    """
    keys = read_keys(config.keys_file, config.key_concurrency)
    if not is_loopback(config.host) and not keys:
        raise ValueError(
            f"--host {config.host} can be reached by others, and there is no API key: set "
            f"{KEY_VARIABLE} to one or more keys, separated by commas, or name a --keys-file, or "
            "use --host 127.0.0.1"
        )
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" and not keys:
        raise ValueError(
            "RAY_SERVE_ENABLE_HA_PROXY=1 makes Ray listen on every interface whatever --host says: "
            f"unset it, or set {KEY_VARIABLE}"
        )


def has_gpu() -> bool:
    """Whether replicas get a GPU each."""
    return runtime.capacity()["GPU"] >= 1


def check_cluster(config: ServeConfig) -> None:
    """Compares what the replicas need with what the cluster has.

    Raises:
        ValueError: the cluster is too small for the replicas; Serve would wait for ever.
    """
    if config.metrics_port and os.environ.get("RAY_ADDRESS"):
        raise ValueError(
            f"--metrics-port {config.metrics_port} is for a Ray of this server's own: the cluster "
            "at RAY_ADDRESS has its ports already; leave it out"
        )
    found = runtime.capacity()
    needs = {"CPU": config.cpus * config.replicas, "GPU": config.replicas * has_gpu()}
    for kind, need in needs.items():
        if need > found[kind]:
            raise ValueError(
                f"{config.replicas} replicas of {config.cpus} CPUs need {need} {kind}s, but the "
                f"cluster has {found[kind]:.0f}: lower --replicas or --cpus"
            )


def check_port(host: str, port: int, option: str) -> None:
    """Refuses a port that somebody listens on.

    Raises:
        ValueError: naming the address.
    """
    try:
        try_to_bind(host, port)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another {option}, or 0 "
            "for a free one"
        ) from error


def free_port_of(config: ServeConfig) -> int:
    """A port of the config's host that nobody listens on.

    Raises:
        ValueError: the host is no address of this machine.
    """
    try:
        return free_port(config.host)
    except OSError as error:
        raise ValueError(
            f"cannot listen on --host {config.host} ({error.strerror}): name an address of this "
            "machine, such as 127.0.0.1"
        ) from error


def url_of(config: ServeConfig) -> str:
    """Where a person on this machine finds the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{config.port}"


def metrics_url() -> str:
    """Where Ray's agent of this node tells Prometheus the metrics of every process on it."""
    here = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    (node,) = (node for node in nodes if node["NodeID"] == here)
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def describe(info: ArtifactInfo) -> str:
    """The artifact in a few words."""
    m = info.model
    return (
        f"{info.run or 'artifact'} {info.sha256[:12]}: {m.image_size}x{m.image_size}, "
        f"{m.num_classes} classes, {info.images_seen} images seen"
    )


def example(url: str, info: ArtifactInfo, *, keyed: bool) -> str:
    """A curl line that draws an image; KEY stands where the environment holds no single key."""
    prompt = ClassIndex(info.classes, info.model.num_classes).prompt(0)
    body = json.dumps({"prompt": prompt, "n": 1, "seed": 0}).replace("'", "'\\''")
    own = os.environ.get(KEY_VARIABLE, "").strip()
    key = f'\'"${KEY_VARIABLE}"' if own and "," not in own else "KEY'"
    key = f"-H 'Authorization: Bearer {key} " if keyed else ""
    return (
        f"curl {url}/v1/images/generations {key}-H 'Content-Type: application/json' -d '{body}' "
        '| python -c \'import base64, json, sys; open("image.png", "wb").write('
        'base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))\''
    )
