"""A real S3 server for tests and benchmarks."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pipelines.ports import free_port


@contextlib.contextmanager
def serve_s3(folder: Path) -> Iterator[dict[str, str]]:
    """A real S3 server (SeaweedFS) with the bucket s3://bucket; what leads a process to it."""
    import boto3

    key, secret = "tester", "a-secret-of-this-test"
    identity = {"name": "t", "credentials": [{"accessKey": key, "secretKey": secret}]}
    identity["actions"] = ["Admin", "Read", "List", "Tagging", "Write"]
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    s3 = free_port()
    command = [
        str(Path(sys.executable).parent / "weed"), "server", "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1", f"-dir={folder}", "-s3", f"-s3.port={s3}",
        f"-s3.config={folder / 's3.json'}", "-volume.max=20", "-master.volumeSizeLimitMB=64",
        "-s3.port.lance=0", "-s3.port.iceberg=0",  # their ports are fixed ones
        *(f"-{part}.port={free_port()}" for part in ("master", "volume", "filer")),
        *(f"-{part}.port.grpc={free_port()}" for part in ("s3", "master", "volume", "filer")),
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
