"""A fleet of Ray actors that take one piece of work after the other. Imported by rooms only.

Plain actors, not Ray Data, where models are drawn from: which items come next depends on the ones
that are done, a fleet stays between them, and a worker says what device it has before it gets its
first. Who does an item does not matter: when an actor or its node dies, the item goes to another
one and the rest of the fleet goes on, while a replacement is placed if it can be.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from types import TracebackType
from typing import Any, Protocol, Self

import ray
from ray.exceptions import RayActorError, RayTaskError

from pipelines import runtime
from pipelines.config import StageFailed

logger = logging.getLogger(__name__)

MAX_DEATHS = 3
"""Workers in a row that may die without one finished item between them, for each worker."""


class Worker(Protocol):
    """What a pool runs: made cheaply, started once, then given one item after the other."""

    def start(self) -> Any:
        """Get ready; what it answers, the worker's card, is logged and kept in `started`."""
        ...

    def run(self, item: Any) -> Any: ...


class Pool:
    """Workers as Ray actors. Deaths of workers are survived; errors of the work itself are not.

    Use as a context; entering waits until the first worker has started.
    """

    def __init__(self, worker: type[Worker], *arguments: object, workers: int, gpu: bool) -> None:
        self.actor: Any = ray.remote(num_cpus=1, num_gpus=int(gpu))(worker)
        self.arguments = [ray.put(a) for a in arguments]
        self.workers = workers
        self.running: dict[Any, tuple[Any, Any]] = {}  # answer to come -> actor and its item
        self.idle: list[Any] = []
        self.started: list[Any] = []
        """What the workers answered when they started, the first one first."""
        self.deaths = 0

    def __enter__(self) -> Self:
        for _ in range(self.workers):
            self._hire()
        while not self.idle:
            self._next()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for actor in [*self.idle, *(actor for actor, _ in self.running.values())]:
            ray.kill(actor)

    def map(self, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """(item, result) for each item, as they are finished.

        Items are taken when a worker is free and one ahead, so a generator can leave some out.
        """
        source = iter(items)
        waiting = deque(islice(source, 1))
        while waiting or any(item is not None for _, item in self.running.values()):
            while self.idle and waiting:
                self._give(self.idle.pop(), waiting.popleft())
                waiting.extend(() if waiting else islice(source, 1))
            item, result, is_done = self._next()
            if is_done:
                yield item, result
            elif item is not None:
                waiting.appendleft(item)

    def _hire(self) -> None:
        actor = self.actor.remote(*self.arguments)
        self.running[actor.start.remote()] = (actor, None)

    def _give(self, actor: Any, item: Any) -> None:
        self.running[actor.run.remote(item)] = (actor, item)

    def _next(self) -> tuple[Any, Any, bool]:
        """Wait for one answer: (item, result, whether the item is done)."""
        ready: list[Any] = []
        while not ready:
            ready, _ = ray.wait(list(self.running), timeout=60)
            if not ready and all(item is None for _, item in self.running.values()):
                logger.warning("no worker could start for a minute: the cluster is busy or full")
        actor, item = self.running.pop(ready[0])
        try:
            result = ray.get(ready[0])
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            self.deaths += 1
            if self.deaths > MAX_DEATHS * self.workers:
                raise StageFailed(
                    f"{self.deaths} workers died without finishing anything; out of memory?"
                ) from error
            logger.warning("a worker died: %s", str(error).strip().splitlines()[0])
            self._hire()
            return item, None, False
        self.idle.append(actor)
        if item is None:
            logger.info("worker: %s", result)
            self.started.append(result)
            return None, None, False
        self.deaths = 0
        return item, result, True


def fleet(workers: int, items: int) -> tuple[int, bool]:
    """How many workers to start, and whether each takes a GPU.

    Raises:
        ValueError: more workers are asked for than the cluster has room for.
    """
    found = runtime.capacity()
    gpu = found["GPU"] >= 1
    kind = "GPU" if gpu else "CPU"
    room = int(found[kind])
    if workers > room:
        raise ValueError(
            f"--workers {workers} needs {workers} {kind}s, but the cluster has {room}: "
            f"ask for at most {room}, or 0 for one on each"
        )
    return max(1, min(workers or room, items)), gpu


class Progress:
    """One line for each finished item: how far, how fast, how long still."""

    def __init__(self, verb: str, total: int, done: int = 0) -> None:
        self.verb, self.total, self.done = verb, total, done
        self.fresh, self.start = 0, time.monotonic()

    def add(self, images: int) -> None:
        self.done += images
        self.fresh += images
        rate = self.fresh / (time.monotonic() - self.start)
        logger.info(
            "%s %d of %d images, %.1f images/s, %.0f s left",
            self.verb, self.done, self.total, rate, (self.total - self.done) / rate,
        )  # fmt: skip
