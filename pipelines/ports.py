"""TCP ports of this machine that nobody listens on, for servers that start seconds later."""

from __future__ import annotations

import errno
import itertools
import random
import socket

QUIET = range(20_000, 32_768)
"""Ports that nobody is given unasked: Linux deals out 32768 to 60999 to whoever connects or binds
to port 0, other systems those from 49152 (RFC 6335); Ray gives its workers 10002 to 19999. A port
of theirs that is free now may be taken once a server that has to start Ray first comes to it."""

_turn = itertools.cycle(random.sample(QUIET, len(QUIET)))


def free_port(host: str = "127.0.0.1") -> int:
    """A port of the host that nobody listens on, and a different one at each call.

    Raises:
        OSError: the host is no address of this machine, or every port is taken.
    """
    for port in itertools.islice(_turn, len(QUIET)):
        try:
            try_to_bind(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return port
    raise OSError(errno.EADDRINUSE, f"every port from {QUIET[0]} to {QUIET[-1]} is taken")


def try_to_bind(host: str, port: int) -> None:
    """Binds to a port and lets it go again.

    Raises:
        OSError: the host is no address of this machine, or somebody listens on the port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((host, port))
