"""One writer at a time for a folder, locally or on S3, without clocks that must agree.

A writer creates <folder>/00001.json, which only one can (a conditional write), and writes it anew
every few seconds. Who comes second is refused while the file changes. If it does not change for a
while, or names a process of this machine that is gone, its writer is dead, and the next one
creates 00002.json, which again only one can. The file with the highest number counts: a writer
that finds a higher one than its own has been taken for dead and must stop.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines import storage

logger = logging.getLogger(__name__)

BEAT_S = 10.0
"""Seconds between signs of life."""
PATIENCE_S = 45.0
"""Silence after which a writer counts as dead."""


class Lease:
    """The right to write; check() it before anything that another writer must not see."""

    def __init__(self, folder: str, number: int, owner: dict[str, Any]) -> None:
        self.folder, self.number, self.owner = folder, number, owner
        self._problem = ""
        self._ended = threading.Event()

    def check(self) -> None:
        """Fail if the right is lost.

        Raises:
            PermissionError: another writer took over.
        """
        if self._problem:
            raise PermissionError(self._problem)

    def look(self) -> None:
        """Look whether another writer took over."""
        try:
            check_newest(self.folder, self.number)
        except PermissionError as error:
            self._problem = str(error)

    def beat(self) -> None:
        """Give a sign of life."""
        self.look()
        if not self._problem:
            self.owner["beat"] += 1
            storage.write_json(_place(self.folder, self.number), self.owner)

    def _keep_alive(self) -> None:
        while not self._ended.wait(BEAT_S) and not self._problem:
            try:
                self.beat()
            except PermissionError:  # the work will be refused too, and tell it
                continue
            except OSError as error:
                logger.warning("no sign of life could be given in %s: %s", self.folder, error)


@contextlib.contextmanager
def claim(folder: str) -> Iterator[Lease]:
    """Be the one writer for as long as the block lasts.

    Args:
        folder: URI of a folder for the writers' files, which may be deleted inside the block.

    Raises:
        PermissionError: another writer is at work; names it.
    """
    owner = {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]]),
        "token": uuid.uuid4().hex,
        "beat": 0,
        "released": False,
    }
    newest = _refuse_second(folder)
    lease = Lease(folder, newest[0] + 1 if newest else 1, owner)
    try:
        storage.write_json(_place(folder, lease.number), owner, if_absent=True)
    except FileExistsError:
        found = storage.read_json(_place(folder, lease.number))
        raise PermissionError(
            f"{folder} is being written by {describe(found)}, who was quicker"
        ) from None
    beats = threading.Thread(target=lease._keep_alive, daemon=True)
    beats.start()
    try:
        yield lease
    finally:
        lease._ended.set()
        beats.join()
        with contextlib.suppress(OSError):
            if storage.exists(_place(folder, lease.number)):
                owner["released"] = True
                storage.write_json(_place(folder, lease.number), owner)


@contextlib.contextmanager
def told_first(folder: str) -> Iterator[None]:
    """Where the block refuses what was asked for, name a writer that is at work instead.

    Args:
        folder: as for claim().

    Raises:
        PermissionError: another writer is at work; names it.
    """
    try:
        yield
    except ValueError:
        _refuse_second(folder)
        raise


def check_newest(folder: str, number: int) -> None:
    """Look, from any process, whether a writer's right still holds.

    Raises:
        PermissionError: another writer took over.
    """
    newest = _newest(folder)
    if newest is None or newest[0] > number:
        who = describe(newest[1]) if newest else "somebody who finished or emptied it"
        raise PermissionError(
            f"{folder}: this process fell silent for too long, and was replaced by {who}"
        )


def _refuse_second(folder: str) -> tuple[int, dict[str, Any]] | None:
    """The writer that counts, which is dead; None if there was none."""
    newest = _newest(folder)
    if newest and not _is_over(folder, newest[1]):
        raise PermissionError(
            f"{folder} is being written by {describe(newest[1])}: wait for it, stop it, or choose "
            "another output. Once it is dead, the same command goes on"
        )
    return newest


def describe(owner: dict[str, Any]) -> str:
    """A writer, in words."""
    command, pid, host, since = (owner[k] for k in ("command", "pid", "host", "since"))
    return f"`{command}`, process {pid} on {host}, since {since}"


def _is_over(folder: str, owner: dict[str, Any]) -> bool:
    """Whether a writer has ended; waits for a sign of life if that cannot be told otherwise."""
    if owner["released"]:
        return True
    if owner["machine"] == _machine():
        return _born(owner["pid"]) != owner["born"]
    logger.info(
        "waiting for %.0f s to see whether %s is still at work", PATIENCE_S, describe(owner)
    )
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE_S / 10))
        newest = _newest(folder)
        if newest and newest[1] != owner:
            return bool(newest[1]["released"])
    logger.info("it is not: going on in its place")
    return True


def _place(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:05d}.json")


def _newest(folder: str) -> tuple[int, dict[str, Any]] | None:
    """The writer that counts, if there was one."""
    try:
        names = [entry.relative for entry in storage.list_folder(folder)[1]]
        numbers = [int(Path(name).stem) for name in names if name.endswith(".json")]
        return (max(numbers), storage.read_json(_place(folder, max(numbers)))) if numbers else None
    except FileNotFoundError:
        return None


def _machine() -> str:
    """What tells whether a process number means the same here and there."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _born(pid: int) -> str:
    """When a process of this machine began; empty if it is gone."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    except FileNotFoundError:
        pass
    if Path("/proc/self").exists():
        return ""
    try:  # where there is no /proc
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "alive"
