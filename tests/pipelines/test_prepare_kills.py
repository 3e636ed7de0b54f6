"""Kill the driver, a worker or the whole node, at any moment: the bytes come out the same."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from pipelines import storage
from tests.processes import descendants

NUM_FILES = 8 + 5  # shards, manifest, rejects, card, sheet and what tells the source's files


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of 3 classes with 40 images each, and one file that is none."""
    root = tmp_path_factory.mktemp("tree") / "root"
    for label, colour in enumerate(["blue", "green", "red"]):
        (root / colour).mkdir(parents=True)
        for i in range(40):
            pixels = np.random.default_rng([label, i]).integers(0, 256, (40, 44, 3), np.uint8)
            Image.fromarray(pixels).save(root / colour / f"{i:03d}.png")
    (root / "red" / "text.png").write_text("this is no image")
    return root


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URI for the output."""
    if request.param == "local":
        return str(tmp_path / "dataset")
    for name, value in request.getfixturevalue("s3_environment").items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{uuid.uuid4().hex}/dataset"


def _command(source: Path | str, output: str) -> list[str]:
    command = [sys.executable, "-m", "pipelines.prepare", "--source", str(source)]
    command += ["--output", output, "--image-size", "32", "--rows-per-shard", "16"]
    command += ["--rows-per-group", "5", "--max-reject-fraction", "0.1", "--encoding", "png"]
    return command


def _environment() -> dict[str, str]:
    """What sends a command to the cluster of the tests, its workers with our credentials."""
    ours = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    job = {"runtime_env": {"env_vars": ours | {"JIT_CACHE": os.environ.get("JIT_CACHE", "")}}}
    address = ray.get_runtime_context().gcs_address
    return os.environ | {"RAY_ADDRESS": address, "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)}


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
    process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
    process.said = said  # type: ignore[attr-defined]
    return process


def _finish(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _digests(output: str) -> dict[str, str]:
    files = storage.list_files(output)
    return {f.relative: hashlib.sha256(storage.read_bytes(f.uri)).hexdigest() for f in files}


def _state(output: str) -> set[tuple[str, int, str]]:
    """Files below the output, as far as they can be seen while they come and go."""
    found = set()
    for entry in storage.list_files(output) if storage.exists(output) else ():
        try:
            mark = storage.version(entry.uri).mark if storage.local_path(output) else ""
            found.add((entry.relative, entry.bytes, mark))
        except OSError:
            continue
    return found


def _wait_for_changes(process: subprocess.Popen[bytes], output: str, pick: random.Random) -> bool:
    """Wait until a random number of files appeared or changed; whether the process goes on."""
    changes, seen = pick.randint(1, 10), _state(output)
    while process.poll() is None and changes > 0:
        time.sleep(0.002)
        try:
            now = _state(output)
        except OSError:  # a folder went while it was listed
            continue
        if now != seen:
            changes, seen = changes - 1, now
    time.sleep(pick.random() * 0.02)
    return process.poll() is None


def _again(process: subprocess.Popen[bytes], output: str) -> None:
    """The command ended before its moment came: make room for another try."""
    assert process.wait() == 0, _said(process)
    storage.delete(output)


def _said(process: subprocess.Popen[bytes]) -> str:
    """What a command of `_start` has printed."""
    process.said.seek(0)  # type: ignore[attr-defined]
    return str(process.said.read())  # type: ignore[attr-defined]


def _kill_drivers(source: Path | str, output: str, kills: int, seed: int) -> None:
    """Start the command and kill it at a random moment, so many times; then let it end."""
    pick = random.Random(seed)
    while kills:
        process = _start(_command(source, output), _environment())
        if _wait_for_changes(process, output, pick):
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills -= 1
        else:
            _again(process, output)
    _finish(_command(source, output), _environment())


def _kill_workers(source: Path | str, output: str, kills: int, seed: int) -> None:
    """Start the command, kill so many workers that write its shards, and let it end."""
    pick = random.Random(seed)
    before = set(descendants(os.getpid()))
    while kills:
        process = _start([*_command(source, output), "--workers", "2"], _environment())
        while kills and _wait_for_changes(process, output, pick):
            new = {p: c for p, c in descendants(os.getpid()).items() if p not in before}
            writing = [p for p, c in new.items() if c.startswith("ray::") and "IDLE" not in c]
            if writing:
                os.kill(pick.choice(writing), signal.SIGKILL)
                kills -= 1
        if kills:
            _again(process, output)
    assert process.wait() == 0, _said(process)


def _kill_nodes(source: Path | str, output: str, kills: int, seed: int) -> None:
    """Start the command with a cluster of its own and kill all of its processes, so many times."""
    pick = random.Random(seed)
    while kills:
        process = _start(_command(source, output), dict(os.environ))
        if _wait_for_changes(process, output, pick):
            for pid in (process.pid, *descendants(process.pid)):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            process.wait()
            kills -= 1
        else:
            _again(process, output)
    _finish(_command(source, output), _environment())


@pytest.fixture(scope="module")
def unbroken(
    ray_cluster: None, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Digests of a folder that nobody disturbed."""
    output = str(tmp_path_factory.mktemp("unbroken") / "dataset")
    _finish(_command(source, output), _environment())
    digests = _digests(output)
    assert len(digests) == NUM_FILES
    return digests


@pytest.mark.ray
def test_a_driver_that_is_killed_again_and_again_ends_in_the_same_bytes(
    unbroken: dict[str, str], source: Path, place: str
) -> None:
    _kill_drivers(source, place, kills=2, seed=0)
    assert _digests(place) == unbroken


@pytest.mark.ray
def test_workers_that_are_killed_do_not_change_the_bytes(
    unbroken: dict[str, str], source: Path, tmp_path: Path
) -> None:
    _kill_workers(source, str(tmp_path / "dataset"), kills=2, seed=0)
    assert _digests(str(tmp_path / "dataset")) == unbroken


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(1, 5))
def test_a_hundred_kills_end_in_the_same_bytes(
    unbroken: dict[str, str], source: Path, place: str, seed: int
) -> None:
    """Thirteen of them; four seeds at two places make a hundred and four.

    Half of those on S3 read a tar of tars from there.
    """
    root: Path | str = source
    if place.startswith("s3://") and seed % 2:
        root = f"{place}.tar"
        storage.write_bytes(root, _tar_of_tars(source))
        _finish(_command(root, f"{place}-u"), _environment())
        unbroken = _digests(f"{place}-u")
        assert len(unbroken) == NUM_FILES
    _kill_drivers(root, place, kills=8, seed=seed)
    assert _digests(place) == unbroken
    _kill_workers(root, f"{place}-w", kills=3, seed=seed)
    assert _digests(f"{place}-w") == unbroken
    _kill_nodes(root, f"{place}-n", kills=2, seed=seed)
    assert _digests(f"{place}-n") == unbroken


def _tar_of_tars(tree: Path) -> bytes:
    """ImageNet's layout of a tree of classes."""
    outer = io.BytesIO()
    with tarfile.open(fileobj=outer, mode="w") as archive:
        for folder in sorted(tree.iterdir()):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as one:
                for file in sorted(folder.iterdir()):
                    one.add(file, file.name)
            info = tarfile.TarInfo(f"{folder.name}.tar")
            info.size = len(inner.getvalue())
            archive.addfile(info, io.BytesIO(inner.getvalue()))
    return outer.getvalue()
