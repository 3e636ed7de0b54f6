"""What tests share: one Ray cluster a session, small datasets, the real photographs."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def _dataset(folder: Path, shards_of: tuple[int, ...]) -> Path:
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
    return _dataset(tmp_path_factory.mktemp("dataset"), (80, 80, 51))


@pytest.fixture(scope="session")
def demo_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder of 4,096 of the demo's images."""
    return _dataset(tmp_path_factory.mktemp("demo"), (1024, 1024, 1024, 1024))


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A folder with a path short enough for unix sockets; removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="jit", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


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


def _ports(count: int) -> list[int]:
    """Free ports whose number plus 10,000, which SeaweedFS takes for gRPC, is a port as well."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        if port < 55_000 and port not in found:
            found.append(port)
    return found


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real S3 server (SeaweedFS) with the bucket s3://bucket; what leads a process to it."""
    import boto3

    folder = tmp_path_factory.mktemp("weed")
    key, secret = "tester", "a-secret-of-this-test"
    identity = {"name": "t", "credentials": [{"accessKey": key, "secretKey": secret}]}
    identity["actions"] = ["Admin", "Read", "List", "Tagging", "Write"]
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    s3, master, volume, filer = _ports(4)
    command = [
        str(Path(sys.executable).parent / "weed"), "server", "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1", f"-dir={folder}", "-s3", f"-s3.port={s3}",
        f"-s3.config={folder / 's3.json'}", f"-master.port={master}", f"-volume.port={volume}",
        f"-filer.port={filer}", "-volume.max=20", "-master.volumeSizeLimitMB=64",
        "-s3.port.lance=0", "-s3.port.iceberg=0",  # their ports are fixed ones
    ]  # fmt: skip
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        client = boto3.client(
            "s3", endpoint_url=environment["AWS_ENDPOINT_URL"], aws_access_key_id=key,
            aws_secret_access_key=secret, region_name="us-east-1",
        )  # fmt: skip
        for attempt in range(60):
            try:
                client.create_bucket(Bucket="bucket")
                break
            except Exception:
                assert process.poll() is None, (folder / "log").read_text()[-2000:]
                assert attempt < 59, "SeaweedFS did not start"
                time.sleep(0.5)
        yield environment
    finally:
        process.kill()  # asked to stop, it takes half a minute
        process.wait()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing:
        import torch

        if not torch.cuda.is_available():
            for item in needing:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
