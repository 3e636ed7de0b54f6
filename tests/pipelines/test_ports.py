"""A free port stays free until a slow server comes to it."""

from __future__ import annotations

import errno
import itertools
import socket
from pathlib import Path

import pytest

from pipelines import ports


def test_a_free_port_is_new_each_time_and_nobodys_by_chance():
    found = [ports.free_port() for _ in range(1_000)]

    assert len(set(found)) == 1_000
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:  # the two ways to be given a port
        asked.append(server.getsockname()[1])
        with socket.create_connection(server.getsockname()) as client:
            asked.append(client.getsockname()[1])
    system = Path("/proc/sys/net/ipv4/ip_local_port_range")
    low, high = map(int, system.read_text().split()) if system.exists() else (49_152, 65_535)
    assert all(low <= port <= high for port in asked)
    ray_workers = range(10_002, 20_000)  # unless `ray start` is told otherwise
    assert not any(low <= port <= high or port in ray_workers for port in found)


def test_a_port_that_somebody_listens_on_is_not_free(monkeypatch: pytest.MonkeyPatch):
    free = ports.free_port()
    with socket.create_server(("127.0.0.1", ports.free_port())) as server:
        taken = server.getsockname()[1]
        monkeypatch.setattr(ports, "_turn", itertools.cycle([taken, free]))
        assert [ports.free_port(), ports.free_port()] == [free, free]
        monkeypatch.setattr(ports, "_turn", itertools.cycle([taken]))
        with pytest.raises(OSError, match="every port from 20000 to 32767 is taken") as found:
            ports.free_port()
    assert found.value.errno == errno.EADDRINUSE


def test_an_address_of_another_machine_is_not_searched_for_a_free_port():
    with pytest.raises(OSError, match="assign requested address") as found:
        ports.free_port("192.0.2.77")
    assert found.value.errno == errno.EADDRNOTAVAIL
