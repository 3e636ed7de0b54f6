"""A folder has one writer at a time; a dead one is replaced, a living one is named."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from pipelines import lease, storage


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URI below which nothing is yet."""
    if request.param == "local":
        return str(tmp_path / "writer")
    for name, value in request.getfixturevalue("s3_environment").items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{uuid.uuid4().hex}/writer"


def _owner(folder: str, number: int) -> dict[str, Any]:
    return storage.read_json(storage.join(folder, f"{number:05d}.json"))


def test_the_second_writer_is_refused_and_told_who_is_first(folder: str) -> None:
    with lease.claim(folder):
        first = _owner(folder, 1)
        assert (first["pid"] > 0, first["released"]) == (True, False)
        with (
            pytest.raises(PermissionError, match=rf"process {first['pid']} on {first['host']}"),
            lease.claim(folder),
        ):
            pass
    with lease.claim(folder) as second:
        assert second.number == 2


def test_of_many_at_once_one_wins(folder: str) -> None:
    won, refused, barrier = [], [], threading.Barrier(8)
    done = threading.Event()

    def try_it() -> None:
        barrier.wait()
        try:
            with lease.claim(folder):
                won.append(1)
                done.wait(20)
        except PermissionError:
            refused.append(1)
            if len(refused) == 7:
                done.set()

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 7)


def test_a_writer_of_this_machine_that_was_killed_is_replaced_at_once(folder: str) -> None:
    text = "import sys\nfrom pipelines import lease\n"
    text += "with lease.claim(sys.argv[1]):\n    print('at work', flush=True)\n    sys.stdin.read()"
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", text, folder], stdin=pipe, stdout=pipe)
    assert process.stdout is not None
    assert process.stdout.readline() == b"at work\n"
    with pytest.raises(PermissionError, match=f"process {process.pid} "), lease.claim(folder):
        pass
    process.kill()
    process.wait()
    started = time.monotonic()
    with lease.claim(folder) as held:
        assert held.number == 2
    assert time.monotonic() - started < 5


def _of_another_machine(folder: str) -> dict[str, Any]:
    """Note a writer that runs elsewhere."""
    owner = {"host": "node-7", "machine": "another", "pid": 12, "born": "1", "since": "noon",
             "command": "jit prepare", "token": "x", "beat": 0, "released": False}  # fmt: skip
    storage.write_json(storage.join(folder, "00001.json"), owner)
    return owner


def test_a_silent_writer_of_another_machine_is_waited_for_and_then_replaced(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "PATIENCE_S", 1.0)
    _of_another_machine(folder)
    started = time.monotonic()
    with lease.claim(folder) as held:
        assert held.number == 2
    assert time.monotonic() - started >= 1


def test_a_writer_of_another_machine_that_gives_signs_of_life_stays(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "PATIENCE_S", 20.0)
    owner = _of_another_machine(folder)
    beating = storage.join(folder, "00001.json")
    later = threading.Timer(1, storage.write_json, (beating, owner | {"beat": 1}))
    later.start()
    started = time.monotonic()
    message = "`jit prepare`, process 12 on node-7, since noon"
    with pytest.raises(PermissionError, match=message), lease.claim(folder):
        pass
    assert time.monotonic() - started < 15
    later.join()


def test_a_writer_that_was_replaced_notices_and_stops(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    with lease.claim(folder) as held:
        held.check()
        time.sleep(0.3)
        assert _owner(folder, 1)["beat"] >= 2
        other = _owner(folder, 1) | {"pid": 99, "host": "node-9"}
        storage.write_bytes(storage.join(folder, "00002.json"), json.dumps(other).encode())
        end = time.monotonic() + 10
        with pytest.raises(PermissionError, match=r"replaced by .*process 99 on node-9"):  # noqa: PT012
            while time.monotonic() < end:
                held.check()
                time.sleep(0.05)
