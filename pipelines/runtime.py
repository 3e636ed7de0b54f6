"""The one place that connects to Ray: join the cluster that was named, or start a local one.

A leaf by its size, yet the exception among the leaves: it imports Ray, because every room needs
the same answer to "which cluster?". It is imported by rooms only.

Ray 2.60 listens on every interface even where a loopback address is asked for, so authentication
stays on: a cluster that we start gets a token of its own, which lives as long as this process
and is written to no file. Set RAY_AUTH_MODE=disabled to do without.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import yaml

if TYPE_CHECKING:
    import ray.data

logger = logging.getLogger(__name__)

START_ATTEMPTS = 3
CLUSTER_FILE = Path.home() / "ray_bootstrap_config.yaml"
"""Where Ray's cluster launcher leaves the cluster's file on the head node."""
OBJECT_STORE_BYTES = 2 * 2**30
"""Most shared memory that a local cluster may take: the rooms hand each other files."""


def connect(*, metrics_port: int = 0) -> None:
    """Connect this process to Ray, once; calling it again changes nothing.

    A cluster that is joined already stays. Otherwise RAY_ADDRESS names one: a submitted job has
    it, and on a head node it is `auto`. Without it, a local cluster of all CPUs and GPUs starts,
    and ends with this process.

    Args:
        metrics_port: where a local cluster tells Prometheus its metrics; 0: on a free port.

    Raises:
        ConnectionError: RAY_ADDRESS names a cluster that does not answer.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, logging_level=logging.WARNING)
        logger.info("joined the Ray cluster at %s: %s", address, resources())
        return
    # Ray turns authentication on by itself; without this it would leave a token in the home folder.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    start_local(metrics_port)
    logger.info("started a local Ray cluster: %s", resources())


def start_local(metrics_port: int) -> None:
    """Start a cluster of this machine, and try again where it was too busy to answer.

    A node gives up when one of its own processes takes more than 15 seconds to say its port, which
    was seen here while another program was being installed; Ray then raises a bare Exception.
    """
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                _metrics_export_port=metrics_port,
                logging_level=logging.WARNING,
                object_store_memory=min(OBJECT_STORE_BYTES, _memory_bytes() * 3 // 10),
            )
            return
        except Exception as error:
            if attempt == START_ATTEMPTS or "timed out during startup" not in str(error):
                raise
            logger.warning("Ray did not start in time (busy machine?), trying again")
            ray.shutdown()


def quiet_data() -> None:
    """Turn off Ray Data's own progress bars and reports: a stage logs its own lines."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


class Stop:
    """Lets a job of Ray Data end early without cancelling a task.

    Leaving a loop over the rows of a Dataset cancels what runs, and Ray 2.60 aborts the whole
    process where it cancels a task in the moment in which it is dispatched ("Tried to complete
    task that was not pending"). So whoever leaves early lets what runs end, and what has not begun
    asks `is_set` and does nothing. The sign is a named actor, which exists only once it is needed.
    """

    def __init__(self) -> None:
        self.name = f"stop-{secrets.token_hex(8)}"

    def is_set(self) -> bool:
        """Whether a task that has not begun shall do nothing."""
        try:
            ray.get_actor(self.name)
        except ValueError:
            return False
        return True

    def rows(self, dataset: ray.data.Dataset) -> Generator[dict[str, Any], None, None]:
        """The rows of a dataset; closing it, or a failure, waits for the tasks that run."""
        rows = iter(dataset.iter_rows())
        try:
            yield from rows
        except GeneratorExit:
            with contextlib.suppress(ray.exceptions.RayError):  # a lost cluster is news already
                sign: Any = ray.remote(num_cpus=0)(_Sign).options(name=self.name).remote()
                ray.get(sign.__ray_ready__.remote())
                for _ in rows:
                    pass
                ray.kill(sign)
            raise


class _Sign:
    """Is there, or is not."""


def capacity() -> dict[str, float]:
    """CPUs and GPUs that the cluster has, or that its autoscaler may still start.

    A cluster of `ray up` begins without workers, and Ray has no call that tells what may come; the
    head node, where the drivers of jobs run, keeps the cluster's file. Elsewhere an autoscaler
    cannot be seen, and only what is there counts.
    """
    now: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    grown = launchable(CLUSTER_FILE) if os.environ.get("RAY_ADDRESS") else {}
    return {kind: max(now.get(kind, 0), grown.get(kind, 0)) for kind in ("CPU", "GPU")}


def launchable(cluster_file: Path) -> dict[str, float]:
    """Most CPUs and GPUs that the workers of a `ray up` file can have; empty without the file."""
    if not cluster_file.is_file():
        return {}
    config = yaml.safe_load(cluster_file.read_text("utf-8"))
    most = config.get("max_workers", 0)
    found = {"CPU": 0.0, "GPU": 0.0}
    for name, node in config.get("available_node_types", {}).items():
        if name != config.get("head_node_type"):
            nodes = min(node.get("max_workers", most), most)
            for kind in found:
                found[kind] += nodes * node.get("resources", {}).get(kind, 0)
    return found


def resources() -> str:
    """CPUs and GPUs of the cluster, in words."""
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    text = f"{found.get('CPU', 0):.0f} CPUs"
    return text + (f", {found['GPU']:.0f} GPUs" if found.get("GPU") else "")


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
