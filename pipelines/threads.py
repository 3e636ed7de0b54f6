"""Threads that work beside training, and shall not hold it up."""

from __future__ import annotations

import contextlib
import os
import threading

NICENESS = 10


def step_back() -> None:
    """Let the calling thread run where others leave a CPU free; for the rest of its life.

    A training step on a CPU waits for the slowest of its threads, so one that is interrupted by a
    loader's or a saver's thread costs all of them that time. Linux only: elsewhere niceness belongs
    to the whole process, and nothing is done.
    """
    if hasattr(os, "sched_setaffinity"):  # Linux
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
