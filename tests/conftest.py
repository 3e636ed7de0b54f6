"""What tests share: one Ray cluster a session, small datasets, the real photographs."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from pipelines import ports
from tests.seaweed import serve_s3

# Set before anything imports ray or torch, and inherited by every worker process.
os.environ |= {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_TRAIN_ENABLE_V2": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipelines.proxy:middlewares",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "JIT_CACHE": tempfile.mkdtemp(prefix="jit-cache-"),
}
atexit.register(shutil.rmtree, os.environ["JIT_CACHE"], ignore_errors=True)

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("jit", deadline=None)
hypothesis.settings.load_profile("jit")

HEAD = """
import os, sys, ray
ray.init(num_cpus=1, include_dashboard=True, dashboard_host="127.0.0.1",
         dashboard_port=int(sys.argv[1]), object_store_memory=100 * 2**20, _temp_dir=sys.argv[2])
print("ready", flush=True)
sys.stdin.read()
"""
"""A cluster with a dashboard, which ends with its standard input."""

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def imagenet_sample() -> Path:
    """200 real ImageNet photographs, one a class, named wnid_name.JPEG."""
    folder = REPOSITORY.parent / "shared" / "imagenet-sample"
    if not folder.is_dir():
        pytest.skip(f"needs the real ImageNet photographs at {folder}, which are not there")
    return folder


def make_dataset(folder: Path, shards_of: tuple[int, ...]) -> Path:
    """A dataset folder of the first images of the demo: 28 px, 10 classes."""
    import pyarrow.parquet as pq

    from jitmodel.config import ClassInfo
    from pipelines import shards

    (folder / "data").mkdir()
    table = pq.read_table(REPOSITORY / "pipelines/embedded/fashion-mnist.parquet")
    classes = [ClassInfo(name=f"class {i}") for i in range(10)]
    rows = [
        shards.Row(r["image"]["bytes"], f"{r['id']}.png", r["label"], i)
        for i, r in enumerate(table.slice(0, sum(shards_of)).to_pylist())
    ]
    infos, first = [], 0
    for number, count in enumerate(shards_of):
        file = shards.shard_name(number, len(shards_of))
        part = rows[first : first + count]
        info = shards.write_shard(folder / file, part, classes, rows_per_group=16)
        infos.append(info.model_copy(update={"file": file}))
        first += count
    manifest = shards.Manifest(
        fingerprint=shards.fingerprint(classes, infos),
        image_size=28,
        encoding="png",
        num_rows=len(rows),
        source_sha256="",
        num_rejects=0,
        rows_per_class=[sum(row.label == c for row in rows) for c in range(10)],
        classes=classes,
        shards=infos,
        config={},
        versions={},
    )
    (folder / shards.MANIFEST).write_text(manifest.model_dump_json(), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder of 211 (a prime) real images, 28 px, 10 classes, in 3 uneven shards."""
    return make_dataset(tmp_path_factory.mktemp("dataset"), (80, 80, 51))


@pytest.fixture(scope="session")
def demo_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder of 4,096 of the demo's images."""
    return make_dataset(tmp_path_factory.mktemp("demo"), (1024, 1024, 1024, 1024))


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A folder with a path short enough for unix sockets; removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="jit", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    return ports.free_port()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray cluster of four logical CPUs for the whole session."""
    import ray

    folder = tempfile.mkdtemp(prefix="jr", dir="/tmp")
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=True,
        object_store_memory=400 * 2**20,
        _temp_dir=folder,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def head(short_tmp: Path, free_port: int) -> Iterator[tuple[str, dict[str, str]]]:
    """A cluster that asks for a token, its dashboard's address, and the owner's environment."""
    owner = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "HOME": str(short_tmp),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD, str(free_port), str(short_tmp / "ray")],
        env=owner | {"RAY_AUTH_MODE": "token"},  # as cluster.yaml does; writes the token to HOME
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    try:
        assert process.stdout.readline() == "ready\n"
        yield f"http://127.0.0.1:{free_port}", owner
    finally:
        process.stdin.close()  # the head shuts itself down
        process.wait(timeout=30)


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real S3 server (SeaweedFS) with the bucket s3://bucket; what leads a process to it."""
    with serve_s3(tmp_path_factory.mktemp("weed")) as environment:
        yield environment


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing:
        import torch

        if not torch.cuda.is_available():
            for item in needing:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
