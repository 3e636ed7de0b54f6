"""A web application on a port of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn


@contextlib.contextmanager
def listening(app: Any, *, send_bytes: int = 0, **options: Any) -> Iterator[str]:
    """The application on a free port of loopback, in a thread that ends with the block, however
    that ends; its URL. Options are those of `uvicorn.Config`; `send_bytes` is what the system keeps
    of an answer that is not read, 0: as much as it likes, which is megabytes."""
    with socket.socket() as s:
        if send_bytes:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)  # connections inherit it
        s.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, **options))
        # A daemon: one that does not stop must not keep the interpreter from ending.
        thread = threading.Thread(target=server.run, kwargs={"sockets": [s]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.01)
            yield f"http://127.0.0.1:{s.getsockname()[1]}"
        finally:
            server.force_exit = server.should_exit = True
            thread.join(30)
        assert not thread.is_alive(), "the server did not stop"
