"""Artifact -> a Serve config, applied to a cluster that runs.

What is applied is a file of Ray Serve's own kind, so `--output` keeps it for `serve deploy`, for
the `serveConfigV2` of a KubeRay RayService, or for another `jit deploy --file`. Ray drops the keys
of such a file that it does not know, so a misspelt limit would be no limit; here they are refused.
Another artifact at the same address reaches the replicas as `user_config`, and none is restarted.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is slow to import: `--help` shall not wait for it
    import sys

    from pipelines.cli import main

    raise SystemExit(main(["deploy", *sys.argv[1:]]))

import copy
import difflib
import json
import logging
import math
import os
import time
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import yaml
from pydantic import BaseModel, ValidationError

from cluster.submit import auth_mode, token_refused

os.environ.update(auth_mode())  # read when Ray is imported

from ray import serve
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.exceptions import AuthenticationError
from ray.runtime_env import RuntimeEnv
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import HTTPOptionsSchema, ServeDeploySchema
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from pipelines.api import GRACE_S
from pipelines.config import DeployConfig, ServeConfig, StageFailed
from pipelines.guard import is_loopback
from pipelines.replica import Server, Wanted, opened, wish
from pipelines.serve import (
    APP,
    DEPLOYMENT,
    ENVIRONMENT,
    MAX_ONGOING_REQUESTS,
    MAX_QUEUED_REQUESTS,
    check,
    http_options,
    options,
)

logger = logging.getLogger(__name__)

OF_A_REPLICA = {
    "slots", "max_queue", "max_images", "max_steps", "resize", "timeout_s", "precision",
    "compile", "cpus",
}  # fmt: skip
"""Fields of the config that a replica cannot change while it runs."""
BESIDE_A_FILE = {"file", "address", "output", "deploy_timeout_s", "dry_run"}
"""Fields of the config that say something about a --file."""
IMPORT_PATH = "pipelines.deploy:build"
POLL_S = 1.0
UNREACHED_S = 10.0
"""Longest wait for the port of the server to open, which may be closed from here."""
ANSWERS = 20
"""That have to say the same before all replicas are taken to do so."""


def run(config: DeployConfig) -> None:
    """Writes the Serve config and applies it; returns once the application runs.

    Raises:
        ValueError, FileNotFoundError: the artifact or the file cannot be served.
        ConnectionError: no cluster answers at the address.
        PermissionError: it does not accept our token.
        StageFailed: the cluster could not deploy it.
    """
    if config.metrics_port:
        raise ValueError("--metrics-port is for `jit serve`: a cluster that runs has its own")
    if config.file:
        given, left_out = (c.model_dump(exclude=BESIDE_A_FILE) for c in (config, DeployConfig()))
        both = [name.replace("_", "-") for name in given if given[name] != left_out[name]]
        if both:
            raise ValueError(
                f"--{' and --'.join(both)} cannot be said beside --file {config.file}, which says "
                "what is served and how: leave one of them out, or change the file"
            )
        try:
            text = Path(config.file).read_text("utf-8")
        except OSError as error:
            raise FileNotFoundError(
                f"cannot read --file {config.file} ({error.strerror}): `jit deploy URI --output "
                "FILE --dry-run` shows what it should hold"
            ) from error
        try:
            document = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{config.file} is not YAML: {error}") from error
        check_document(document, config.file)
    else:
        document = document_of(config)
    text = yaml.safe_dump(document, sort_keys=False)
    if config.output and not config.dry_run:
        try:
            Path(config.output).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"cannot write --output {config.output} ({error.strerror}): name a file in a "
                "folder that is there"
            ) from error
        logger.info("written to %s", config.output)
    if config.dry_run:
        print(text)
        return
    apply(document, config)


def document_of(config: DeployConfig) -> dict[str, Any]:
    """The Serve config of an artifact.

    Raises:
        ValueError, FileNotFoundError: as `serve.check`.
    """
    info = check(config)
    chosen = options(config, info, gpu=config.gpus > 0)
    chosen["ray_actor_options"]["num_gpus"] = config.gpus
    everywhere = not is_loopback(config.host)
    return {
        "proxy_location": "EveryNode" if everywhere else "HeadOnly",
        "controller_options": {"runtime_env": {"env_vars": ENVIRONMENT}},
        "http_options": http_options(config),
        "logging_config": chosen["logging_config"],
        "applications": [
            {
                "name": APP,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": config.model_dump(mode="json", include=OF_A_REPLICA),
                "deployments": [chosen],
            }
        ],
    }


def build(args: dict[str, Any]) -> Application:
    """The application, as the cluster builds it from the `args` of the Serve config."""
    config = ServeConfig.model_validate(args)
    return serve.deployment(name=DEPLOYMENT)(serve.ingress()(Server)).bind(config)


def check_document(document: Any, where: str) -> None:
    """Refuses a Serve config that Ray would misread, or that opens what `jit deploy` keeps shut.

    Raises:
        ValueError, FileNotFoundError: naming the first key that nobody knows, or the value that
            does not fit.
    """
    if not isinstance(document, dict):
        raise ValueError(f"{where} does not hold a Serve config: {str(document)[:60]!r}")
    check_keys(document, ServeDeploySchema, where)
    try:
        found = ServeDeploySchema.model_validate(document)
        for application in found.applications:
            for deployment in application.deployments:
                if isinstance(deployment.autoscaling_config, dict):
                    AutoscalingConfig.model_validate(deployment.autoscaling_config)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"])
        raise ValueError(f"{where}, {place}: {first['msg']}") from error
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{where} names a function that cannot be imported: {error}") from error
    controller = found.controller_options
    said = ((controller and controller.runtime_env) or {}).get("env_vars") or {}
    for name, value in ENVIRONMENT.items():
        if said.get(name) != value:
            raise ValueError(
                f"{where}: controller_options.runtime_env.env_vars has {name} "
                f"{said.get(name)!r}: it must be {value!r}"
            )
    applications = [(a.name, a.import_path) for a in found.applications]
    if applications != [(APP, IMPORT_PATH)]:
        raise ValueError(
            f"{where} holds the applications {applications}: there must be one, named {APP!r}, "
            f"with import_path {IMPORT_PATH!r}; `serve deploy` is for others"
        )
    (application,) = found.applications
    if (application.route_prefix, found.http_options.root_path) != ("/", ""):
        raise ValueError(
            f"{where}: route_prefix is {application.route_prefix!r} and http_options.root_path "
            f"{found.http_options.root_path!r}: they must be '/' and '', because keys and limits "
            "go by whole paths"
        )
    if found.grpc_options.grpc_servicer_functions:
        raise ValueError(f"{where}: grpc_options opens a port that asks for no key: leave it out")
    for key in application.args:
        if key in ServeConfig.model_fields and key not in OF_A_REPLICA:
            raise ValueError(
                f"{where}: {key} does nothing in args: http_options says where it listens, the "
                "deployment how many replicas there are, user_config what is served, and to whom"
            )
    config = ServeConfig.model_validate(application.args)
    names = [deployment.name for deployment in application.deployments]
    if names != [DEPLOYMENT]:
        raise ValueError(
            f"{where}: application {APP!r} has deployments {names}: there must be one, named "
            f"{DEPLOYMENT!r}, whose user_config says what is served"
        )
    (deployment,) = application.deployments
    known = config.slots + config.max_queue
    if "max_queued_requests" not in deployment.model_fields_set or (
        deployment.max_queued_requests < 1
    ):
        raise ValueError(
            f"{where}: max_queued_requests must be 1 or more, or any number of requests waits "
            f"while no replica is there: `jit deploy` writes {MAX_QUEUED_REQUESTS}"
        )
    if not 0 < (found.http_options.request_timeout_s or 0) < math.inf:
        raise ValueError(
            f"{where}: http_options.request_timeout_s is {found.http_options.request_timeout_s}: "
            "a request that hangs would wait for ever; `jit deploy` writes "
            f"{config.timeout_s + 3 * GRACE_S:g}"
        )
    # left out, it is Ray's own default, which is less than any queue
    if "max_ongoing_requests" not in deployment.model_fields_set or (
        deployment.max_ongoing_requests < known
    ):
        raise ValueError(
            f"{where}: max_ongoing_requests must be {known} or more, the slots and the queue of a "
            f"replica, or its queue is never full: `jit deploy` writes {MAX_ONGOING_REQUESTS}"
        )
    wanted = Wanted.model_validate(deployment.user_config)
    host = found.http_options.host
    if not wanted.keys and not is_loopback(host):
        raise ValueError(
            f"{where}: http_options.host {host} can be reached by others, and user_config "
            "holds no keys: let `jit deploy URI --keys-file FILE` write it"
        )
    opened(wanted.model, wanted.artifact_sha256)


def check_keys(found: Any, schema: type[BaseModel], where: str) -> None:
    """Compares the keys of a document with the fields of its schema, all the way down.

    Raises:
        ValueError: naming the first unknown key, and the known one that is most like it.
    """
    if not isinstance(found, dict):
        return  # the schema itself will say so
    for key, value in found.items():
        check_key(key, schema.model_fields, where)
        if key == "runtime_env" and isinstance(value, dict):
            for inner_key in value:
                check_key(inner_key, RuntimeEnv.known_fields, f"{where}, runtime_env")
        models = models_in(schema.model_fields[key].annotation)
        if key == "autoscaling_policy":  # an application's is any dict to Ray's schema
            models = [AutoscalingPolicy]
        for inner in models:
            for number, item in enumerate(value if isinstance(value, list) else [value]):
                place = f"{key}[{number}]" if isinstance(value, list) else key
                check_keys(item, inner, f"{where}, {place}")


def check_key(key: Any, known: Collection[str], where: str) -> None:
    """Refuses a key that is not among the known ones.

    Raises:
        ValueError: naming it, and the known one that is most like it.
    """
    if key not in known:
        like = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean {like[0]!r}?" if like else "Ray would drop it without a word"
        raise ValueError(f"{where}: unknown key {key!r}: {hint}")


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The first pydantic model that a type holds, in a list of its own; empty: none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in typing.get_args(annotation) for m in models_in(part)][:1]


def apply(document: dict[str, Any], config: DeployConfig) -> None:
    """Hands the Serve config to the cluster and waits until it is carried out.

    Raises:
        ValueError: Serve listens elsewhere, or no node has room, so that the config cannot be
            carried out.
        PermissionError: the cluster does not accept our token, or we have none.
        StageFailed: the cluster refuses it, or as `wait`.
    """
    try:
        client = ServeSubmissionClient(config.address)
    except AuthenticationError as error:
        raise token_refused(config.address) from error
    found = ServeDeploySchema.model_validate(document)  # with what Ray takes for left-out keys
    check_running(client.get_serve_details(), found)
    check_room(found, *nodes_of(client, config.address))
    document, name = copy.deepcopy(document), wish()
    document["applications"][0]["deployments"][0]["user_config"]["wish"] = name
    try:
        client.deploy_applications(document)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise StageFailed(f"the cluster refuses the config: {' '.join(lines)[-1000:]}") from error
    until = time.monotonic() + config.deploy_timeout_s
    wait(lambda: client.get_serve_details()["applications"], until)
    host, port = found.http_options.host, found.http_options.port
    if not is_loopback(host):  # the dashboard's is the head node's, where a proxy listens too
        host = urlsplit(config.address).hostname or host
    served = wait_for_replicas(f"http://{f'[{host}]' if ':' in host else host}:{port}", name, until)
    logger.info(
        "deployed: it listens on %s:%s of %s%s",
        found.http_options.host,
        port,
        "every node" if found.proxy_location == "EveryNode" else "the head node",
        f", and serves {served[:12]}" if served else "",
    )


def nodes_of(client: ServeSubmissionClient, address: str) -> tuple[list[dict[str, float]], bool]:
    """Resources of each node of a cluster, and whether it may start others."""
    status = client._do_request("GET", "/api/cluster_status")
    try:
        found = list_nodes(address, filters=[("state", "=", "ALIVE")], detail=True, limit=10_000)
    except RayStateApiException as error:
        logger.warning("the cluster does not tell its nodes: %s", error)
        return [], True
    return (
        [node.resources_total or {} for node in found],
        has_autoscaler(status.json() if status.ok else {}),
    )


def has_autoscaler(status: dict[str, Any]) -> bool:
    """Whether a cluster may start nodes, by what its dashboard says at /api/cluster_status.

    Without an autoscaler of its own each node is its own type, named after it. What says nothing
    is taken for one: it is no reason to refuse.
    """
    report = ((status.get("data") or {}).get("clusterStatus") or {}).get("autoscalerReport") or {}
    types = report.get("nodeTypeMapping") or {}
    return not types or any(name != f"node_{node}" for node, name in types.items())


def check_room(wanted: ServeDeploySchema, nodes: list[dict[str, float]], may_grow: bool) -> None:
    """Compares what replicas need with what the nodes have; Ray would stop those that run first.

    Args:
        wanted: a config that is right in itself.
        nodes: resources of each node.
        may_grow: an autoscaler may start larger nodes: a warning is all.

    Raises:
        ValueError: no node has room for a replica, or all together for as many as are wanted.
    """
    deployment = wanted.applications[0].deployments[0]
    told = deployment.model_dump(exclude_unset=True)
    actor, scaling = told.get("ray_actor_options") or {}, told.get("autoscaling_config") or {}
    replicas = told.get("num_replicas") or scaling.get("min_replicas") or 1
    replicas = replicas if isinstance(replicas, int) else 1  # or "auto"
    for kind, need in (("CPU", actor.get("num_cpus") or 0), ("GPU", actor.get("num_gpus") or 0)):
        largest = max((node.get(kind, 0) for node in nodes), default=0)
        each = in_units(need)
        room = sum(in_units(node.get(kind, 0)) // each for node in nodes) if each else replicas
        if room >= replicas:
            continue
        problem = (
            f"{replicas} replicas of {need:g} {kind}s do not fit: the cluster has {len(nodes)} "
            f"nodes, the largest with {largest:g}, and room for {room:g} replicas"
        )
        if not may_grow:
            raise ValueError(f"{problem}. Lower --replicas, --cpus or --gpus; what runs goes on")
        logger.warning("%s until its autoscaler starts more", problem)


def in_units(amount: float) -> int:
    """An amount of a resource as Ray counts it, by the 1/10,000: 1.0 // 0.2 would be 4."""
    return round(amount * 10_000)


def check_running(details: dict[str, Any], wanted: ServeDeploySchema) -> None:
    """Compares how the Serve that runs listens with what is wanted; Ray would keep the former.

    The keys of the config would be taken over all the same: meant for loopback, none at all may
    open an address that others reach.

    Args:
        details: what the cluster says about its Serve.
        wanted: a config that is right in itself.

    Raises:
        ValueError: they differ; naming both.
    """
    if not details.get("http_options"):
        return  # none runs
    runs = HTTPOptionsSchema.model_validate(details["http_options"])
    pairs = {"proxy_location": (details.get("proxy_location"), wanted.proxy_location.value)}
    for name in ("host", "port", "root_path", "request_timeout_s"):
        pairs[name] = getattr(runs, name), getattr(wanted.http_options, name)
    different = [
        f"{name} {now} instead of {new}" for name, (now, new) in pairs.items() if now != new
    ]
    if different:
        raise ValueError(
            f"Serve already runs there, with {', '.join(different)}, which Ray changes in no Serve "
            f"that runs: say --host {runs.host} --port {runs.port} and the --timeout-s of before, "
            "or stop it with `serve shutdown` first"
        )


def wait(applications: Callable[[], dict[str, Any]], until: float) -> None:
    """Waits until our application runs.

    Args:
        applications: asks Ray about them.
        until: end of the wait, by the monotonic clock.

    Raises:
        StageFailed: it failed, or the time is over; with what Ray says about it.
    """
    while True:
        found = applications().get(APP, {"status": "NOT_STARTED", "message": ""})
        if found["status"] == "RUNNING":
            return
        late = time.monotonic() > until
        if late or found["status"] in ("DEPLOY_FAILED", "UNHEALTHY"):
            why = found["message"] or "replicas may wait for room: see its dashboard"
            raise StageFailed(
                f"the cluster says {found['status']}: {why}. `jit deploy` with the artifact and "
                "the options of before returns to what ran"
            )
        time.sleep(POLL_S)


def wait_for_replicas(url: str, name: str, until: float) -> str | None:
    """Waits until the replicas that answer have granted or refused a wish, which Ray knows not.

    Args:
        url: where they are asked.
        name: name of the wish.
        until: end of the wait, by the monotonic clock.

    Returns:
        Digest of the artifact that is served; None where nobody is reached from here.

    Raises:
        StageFailed: the artifact was refused, or the time is over.
    """
    granted, reached = 0, False
    unreached = time.monotonic() + UNREACHED_S
    while granted < ANSWERS:  # each comes from any of the replicas
        try:
            with urlopen(f"{url}/readyz", timeout=POLL_S) as answer:
                said, reached = json.load(answer), True
        except (OSError, ValueError) as error:
            said, reached = {}, reached or isinstance(error, HTTPError)
            if not reached and time.monotonic() > unreached:
                logger.warning(
                    "%s is not reached from here: GET /readyz there says whether the artifact was "
                    "refused",
                    url,
                )
                return None
        if said.get("wish") == name:
            if said["refused"] is not None:
                raise StageFailed(
                    f"the artifact was refused and {said['artifact_sha256'][:12]} goes on: "
                    f"{said['refused']}"
                )
            granted += 1
            continue
        granted = 0
        if time.monotonic() > until:
            raise StageFailed(
                f"the replicas at {url} have not answered within --deploy-timeout-s whether they "
                f"serve it; /readyz said last: {said or 'nothing'}; if another server listens at "
                "that port of this machine, ask the cluster's own"
            )
        time.sleep(POLL_S)
    return str(said["artifact_sha256"])
