"""The server's batching engine: requests join and leave the batch between network evaluations.

Time is per image in `jitmodel.sampler`, so images at different points of their way, with different
labels, guidance, solvers and numbers of steps, share one network call. An engine has a fixed number
of slots; a slot holds one image. One tick is one guided evaluation of every occupied slot: finished
images leave, waiting ones take their place at the next tick. An image is the one that
`jitmodel.sampler.sample` draws for the same seed and settings, whatever else was in the batch.

Who is next: the waiting request with the fewest images in slots, then the earliest deadline, so
that one request for sixteen images does not keep sixteen requests for one image waiting; but a
request whose time runs short goes first, so that they do not starve it either. What will not fit
the queue, or not be done in time at the measured speed, or make an accepted request late, is
refused at once (`QueueFull`): the schedule is played through to know it. Ticks may become slower
after that: a request that waits and would be late even at the speed of the fastest recent tick, or
whose turn comes too late for the usual one, is refused then; it would only take time from others.

Rows are gathered from the occupied slots, and the unconditional pass adds rows only for slots whose
guidance is active, so the network's batch changes from tick to tick. On a CPU time grows with the
rows (a demo-size network at 28 px, one core, fp32: 11 ms for 1 row, 16 for 2, 63 for 8, 122 for
16), so filling one guided image up to the 16 rows of 8 slots would cost seven times its price.
Where shapes must be static, because the network is compiled, `pad_to` names the batch sizes that
it ever sees (`few_sizes`); unused rows are zeros and their output is dropped.

One thread runs the ticks (`start`); `submit` and `Future.cancel` may be called from any thread.
Tests call `tick` themselves. Nothing here knows about HTTP or Ray.
"""

from __future__ import annotations

import heapq
import logging
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from jitmodel.config import SamplerConfig
from jitmodel.flow import per_image
from jitmodel.sampler import Network, guidance_acts, guided_velocity, start_noise, times

logger = logging.getLogger(__name__)

UNHEALTHY_FAILURES = 3
RESERVE = 1.5
"""A request is accepted if it would be in time even if all took this many times as long."""
RECENT_TICKS = 31
"""The usual one is their median: no stall or short spell of slow ticks moves it."""
_UNSEEN = torch.empty(0)  # an image of a schedule that is only played through
Preview = Callable[[int, int, Tensor], None]
"""Called as (position in the request, step, x_pred [C, H, W] on the CPU) by the engine's thread."""


class QueueFull(RuntimeError):
    """There is no room for the request, or no time; or none any more, since ticks became slower."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(TimeoutError):
    """The request's time ran out before its images were done."""


class EngineFailed(RuntimeError):
    """A tick raised, or the engine was closed, while the request was being drawn."""


@dataclass(frozen=True)
class Drawing:
    """One image to draw: what the sampler needs, and nothing else."""

    label: int
    seed: int
    index: int
    """Address of the start noise below the seed; image k of a request usually has index k."""
    sampler: SamplerConfig

    @property
    def evaluations(self) -> int:
        """Guided evaluations on the way from noise to image."""
        steps = self.sampler.steps
        return steps if self.sampler.solver == "euler" else 2 * steps - 1


@dataclass(frozen=True)
class Drawn:
    """A finished request."""

    images: list[Tensor]
    """x of each drawing, [C, H, W] fp32 on the CPU."""
    queued_s: float
    """From submission until the first image had a slot."""
    drawing_s: float
    """From then until the last image was done."""


@dataclass(eq=False)
class _Request:
    """A submitted request; its drawings are dealt to slots from the first to the last."""

    number: int
    drawings: Sequence[Drawing]
    submitted: float
    deadline: float
    future: Future[Drawn]
    on_preview: Preview | None
    preview_steps: Collection[int]
    ticks: float
    """That its images take once they have the slots."""
    is_tried: bool
    """Whether an idle engine took it, which looks at no time."""
    started: float = math.nan
    dealt: int = 0
    """Drawings that have, or had, a slot."""
    images: dict[int, Tensor] = field(default_factory=dict)
    """Finished drawings."""

    @property
    def running(self) -> int:
        return self.dealt - len(self.images)

    @property
    def waiting(self) -> int:
        return len(self.drawings) - self.dealt


class _Line:
    """Requests that wait for slots: whose turn it is, without a look at all of them.

    First what is short of time, then what has fewest images in slots, then the earliest deadline.
    Entries of the heaps that the request has outgrown stay until they come up.
    """

    def __init__(self, requests: Sequence[_Request], slots: int, tick_s: float) -> None:
        self._slots, self._tick_s = slots, tick_s
        self._requests = {request.number: request for request in requests}
        self._calm: list[tuple[int, float, int]] = []  # (running, deadline, number)
        self._soon: list[tuple[float, float, float, int, int]] = []
        """(urgent from, deadline, urgent until, number, dealt)"""
        self._urgent: list[tuple[float, float, int, int]] = []  # the same without the first
        for request in requests:
            self.join(request)

    def join(self, request: _Request) -> None:
        """Gives a request its place, also when another of its images has a slot or is done."""
        if not request.waiting:
            return
        image_s = request.drawings[request.dealt].evaluations * self._tick_s
        rounds, deadline = math.ceil(request.waiting / self._slots), request.deadline
        # One round more, since slots are not free at once; who cannot be in time is not helped.
        since, until = deadline - RESERVE * (rounds + 1) * image_s, deadline - rounds * image_s
        heapq.heappush(self._soon, (since, deadline, until, request.number, request.dealt))
        heapq.heappush(self._calm, (request.running, deadline, request.number))

    def first(self, now: float) -> _Request | None:
        """Whose turn it is; None if nobody waits. Time does not go back from call to call."""
        while self._soon and self._soon[0][0] <= now:
            heapq.heappush(self._urgent, heapq.heappop(self._soon)[1:])
        while self._urgent:
            _, until, number, dealt = self._urgent[0]
            request = self._requests[number]
            if now <= until and dealt == request.dealt and not request.future.done():
                return request
            heapq.heappop(self._urgent)
        while self._calm:
            running, _, number = self._calm[0]
            request = self._requests[number]
            if request.waiting and running == request.running and not request.future.done():
                return request
            heapq.heappop(self._calm)
        return None


@dataclass(eq=False)
class _Slot:
    """An image on its way."""

    request: _Request
    position: int
    """Which of the request's drawings."""
    times: Tensor
    """The times of its steps, float32, on the CPU."""
    step: int = 0
    corrects: bool = False
    """Whether the next evaluation is the second one of a Heun step."""

    @property
    def drawing(self) -> Drawing:
        return self.request.drawings[self.position]

    @property
    def evaluations_left(self) -> int:
        left = self.drawing.sampler.steps - self.step
        if self.drawing.sampler.solver == "heun":
            left = 2 * left - 1
        return left - self.corrects

    def advance(self) -> None:
        """Moves on by one evaluation; Heun's last step is an Euler step."""
        sampler = self.drawing.sampler
        predicted = not self.corrects and sampler.solver == "heun"
        if predicted and self.step < sampler.steps - 1:
            self.corrects = True
        else:
            self.corrects = False
            self.step += 1

    @property
    def done(self) -> bool:
        return self.step == self.drawing.sampler.steps


class PaddedNetwork:
    """A network that sees few batch sizes: rows of zeros fill a batch up to the next one."""

    def __init__(self, network: Network, sizes: Sequence[int]) -> None:
        self.network, self.sizes = network, sorted(sizes)
        self.config, self.flow = network.config, network.flow

    def __call__(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        more = next((size for size in self.sizes if size >= len(z)), len(z)) - len(z)
        padded = (torch.cat((rows, rows.new_zeros(more, *rows.shape[1:]))) for rows in (z, t, y))
        output: Tensor = self.network(*padded)
        return output[: len(z)]


def few_sizes(slots: int) -> list[int]:
    """Batch sizes to compile for: the largest, and its half, quarter and eighth.

    Padding then costs less than half of a batch, unless that has fewer rows than the smallest size.
    """
    return [2 * slots >> k for k in range(4) if 2 * slots >> k]


class Engine:
    """Draws images in a batch that they join and leave one by one."""

    def __init__(
        self,
        network: Network,
        device: torch.device,
        *,
        slots: int = 8,
        max_queue: int = 64,
        pad_to: Sequence[int] = (),
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        """An engine without a thread yet.

        Args:
            network: the network, in evaluation mode, on `device`.
            device: where it runs.
            slots: images in the running batch.
            max_queue: images that may wait beyond those that run.
            pad_to: batch sizes that the network may see, up to 2 * slots; empty: any.
            precision: compute type of the network; z, times and velocities stay fp32.
        """
        if pad_to and max(pad_to) < 2 * slots:
            raise ValueError(f"pad_to {list(pad_to)} does not reach 2 * slots = {2 * slots}")
        self.network = PaddedNetwork(network, pad_to) if pad_to else network
        self.max_queue = max_queue
        self.tick_s = 0.0
        """Measured seconds of a tick with every slot occupied, and guided."""
        self.failures = 0
        """Ticks that raised since the last that did not."""
        self.ticks, self.ticking_s, self.images = 0, 0.0, 0
        """Ticks that drew, the seconds they took, and images that were finished, since ever."""
        self._recent: deque[float] = deque(maxlen=RECENT_TICKS)  # seconds of each
        self._usual_s = self._fastest_s = 0.0  # the median of them, and the least
        self._ended: float | None = None  # when the last tick ended, if images were on their way
        self._rows = 0  # that the network saw in the last tick, without padding
        self._pad_to = sorted(pad_to)
        self._precision = precision
        self._slots: list[_Slot | None] = [None] * slots
        self._requests: list[_Request] = []  # neither finished nor refused
        self._numbers = 0
        self._changed = threading.Condition()  # guards the two lists and their entries
        self._closed = False
        self._thread: threading.Thread | None = None

        c = network.config
        self._device = device
        self._z = torch.zeros(slots, c.in_channels, c.image_size, c.image_size, device=device)
        self._z0 = torch.zeros_like(self._z)  # z at the start of the step
        self._v0 = torch.zeros_like(self._z)  # velocity there

    @property
    def healthy(self) -> bool:
        """Whether the thread runs and ticks do not fail one after the other."""
        alive = self._thread is not None and self._thread.is_alive()
        return alive and self.failures < UNHEALTHY_FAILURES

    # -- what other threads call ---------------------------------------------------------------

    @property
    def running(self) -> int:
        """Occupied slots."""
        return sum(slot is not None for slot in self._slots)

    @property
    def waiting(self) -> int:
        """Images without a slot."""
        with self._changed:
            return sum(r.waiting for r in self._requests if not r.future.done())

    def submit(
        self,
        drawings: Sequence[Drawing],
        *,
        timeout_s: float,
        on_preview: Preview | None = None,
        preview_steps: Collection[int] = (),
    ) -> Future[Drawn]:
        """Queues a request; cancelling the future frees its slots at the next tick.

        Args:
            drawings: the images; they are drawn together as far as slots allow.
            timeout_s: seconds until the request fails with `DeadlineExceeded`. One that found the
                engine at work fails with `QueueFull` once it waited for so long, because ticks
                became slower, that less than its own time is left.
            on_preview: called with x_pred of every image at each of `preview_steps`; it must be
                quick, the whole batch waits for it.
            preview_steps: numbers of steps, from 0.

        Raises:
            QueueFull: no room, or no time at the measured speed for this and what was accepted.
            EngineFailed: the engine is closed.
        """
        capacity = len(self._slots) + self.max_queue
        if not 1 <= len(drawings) <= capacity:
            raise ValueError(f"a request holds 1 to {capacity} images, not {len(drawings)}")
        now = time.monotonic()
        future: Future[Drawn] = Future()
        with self._changed:
            if self._closed:
                raise EngineFailed("the engine is closed: the server is shutting down")
            self._forget(now)
            images = sum(r.running + r.waiting for r in self._requests)
            backlog_s = self._backlog() / len(self._slots) * self.tick_s
            if images + len(drawings) > capacity:
                raise QueueFull(
                    f"{images} images are being drawn or wait, and {len(drawings)} more exceed "
                    f"{len(self._slots)} slots and a queue of {self.max_queue}",
                    backlog_s,
                )
            # Under overload every accepted request is the last one that fits, so an estimate
            # without a reserve would let half of them come late.
            waiting_s = backlog_s if images + len(drawings) > len(self._slots) else 0.0
            longest = max(d.evaluations for d in drawings)
            ticks = max(longest, sum(d.evaluations for d in drawings) / len(self._slots))
            needed_s = RESERVE * (waiting_s + ticks * self.tick_s)
            if backlog_s > 0 and needed_s > timeout_s:  # an idle engine always tries
                raise QueueFull(
                    f"the images would take up to {needed_s:.1f} s ({RESERVE * waiting_s:.1f} s "
                    f"of them waiting) and the deadline is {timeout_s:g} s",
                    needed_s - timeout_s,
                )
            self._numbers += 1
            request = _Request(
                number=self._numbers,
                drawings=tuple(drawings),
                submitted=now,
                deadline=now + timeout_s,
                future=future,
                on_preview=on_preview,
                preview_steps=preview_steps,
                ticks=ticks,
                is_tried=backlog_s == 0,
            )
            late = self._late([*self._requests, request], now) if backlog_s > 0 else set()
            if late and late - self._late(self._requests, now):
                raise QueueFull(
                    f"with {len(drawings)} more images, some of the {images + len(drawings)} "
                    "would be late",
                    backlog_s,
                )
            self._requests.append(request)
            self._changed.notify_all()
        return future

    def start(self) -> None:
        """Starts the thread that ticks while there is work."""
        self._thread = threading.Thread(target=self._run, name="jit-engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops the thread and fails what is unfinished; a closed engine stays closed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._fail(EngineFailed("the server is shutting down: send the request again"))

    # -- what the engine's thread does -----------------------------------------------------------

    def warm_up(self) -> None:
        """Runs every batch size of `pad_to` (else the smallest and the largest), so that the first
        request pays for no compilation, and measures a full tick."""
        slots = len(self._slots)
        for rows in [*self._pad_to, 1, 2 * slots]:
            z = torch.zeros(rows, *self._z.shape[1:], device=self._device)
            t = torch.zeros(rows, device=self._device)
            y = torch.full((rows,), self.network.config.num_classes, device=self._device)
            with self._computing():
                self.network(z, t, y)
                began = time.monotonic()
                self.network(z, t, y).sum().item()  # waits for the device
            self.tick_s = time.monotonic() - began  # of the last size, which is a full tick's

    def tick(self) -> bool:
        """One guided evaluation of every occupied slot; False when there was nothing to do.

        What raises here fails the requests that are being drawn, and the engine goes on.
        """
        began = time.monotonic()
        try:
            with self._changed:
                self._forget(began)
                joined = self._admit(began)
                batch = [(i, slot) for i, slot in enumerate(self._slots) if slot is not None]
            if not batch:
                self._ended = None
                return False
            with self._computing():
                self._draw_noise(joined)
                x_pred = self._evaluate(batch)
                self._show(batch, x_pred)
                self._advance(batch)
        except Exception as error:
            self.failures += 1
            self._ended = None
            logger.exception("a tick failed (%d in a row)", self.failures)
            self._fail(
                EngineFailed(f"drawing failed: {type(error).__name__}: {error}"), waiting=False
            )
            return True
        self.failures = 0
        now = time.monotonic()
        # With what other threads took between two ticks of ongoing work, which delays images too.
        seconds = now - (began if self._ended is None else self._ended)
        self._ended = now if any(slot is not None for slot in self._slots) else None
        self.ticks, self.ticking_s = self.ticks + 1, self.ticking_s + seconds
        self._recent.append(seconds)
        self._usual_s, self._fastest_s = statistics.median_low(self._recent), min(self._recent)
        # Quick to see that ticks got slower, slow to believe that they got faster: what is
        # accepted in a short lull would be late after it. Fewer rows say no more of a full tick
        # than that it takes at least as long, and at most as much longer as it has more rows.
        weight = len(batch) / len(self._slots)
        most_s = seconds * 2 * len(self._slots) / self._rows
        if seconds > self.tick_s:
            self.tick_s += 0.2 * weight * (seconds - self.tick_s)
        elif most_s < self.tick_s:
            self.tick_s += 0.02 * weight * (most_s - self.tick_s)
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not self._requests:
                    self._changed.wait()
                if self._closed:
                    return
            self.tick()

    def _forget(self, now: float) -> None:
        """Fails late requests, and waiting ones that will be; drops what is done or cancelled."""
        for request in self._requests:
            self._refuse_if_too_late(request, now, self._fastest_s)
            if now >= request.deadline and not request.future.done():
                done, all_ = len(request.images), len(request.drawings)
                seconds = request.deadline - request.submitted
                _settle(
                    request.future,
                    DeadlineExceeded(f"{done} of {all_} images were done after {seconds:g} s"),
                )
        self._requests = [r for r in self._requests if not r.future.done()]

    def _admit(self, now: float) -> list[tuple[int, _Slot]]:
        """Frees the slots of dropped requests and deals waiting drawings to free slots."""
        free = [
            i for i, slot in enumerate(self._slots) if slot is None or slot.request.future.done()
        ]
        joined: list[tuple[int, _Slot]] = []
        line = _Line(self._requests if free else (), len(self._slots), self.tick_s)
        for i in free:
            self._slots[i] = None
        for i in free:
            request = line.first(now)
            while request and self._refuse_if_too_late(request, now, self._usual_s):
                request = line.first(now)
            if request is None:
                continue
            if request.dealt == 0:
                request.started = now
            steps = request.drawings[request.dealt].sampler.steps
            slot = _Slot(request, request.dealt, times(steps))
            self._slots[i] = slot
            request.dealt += 1
            line.join(request)
            joined.append((i, slot))
        return joined

    def _refuse_if_too_late(self, request: _Request, now: float, tick_s: float) -> bool:
        """Refuses one that never had a slot and, at this speed, cannot be in time; says whether."""
        left_s, needed_s = request.deadline - now, request.ticks * tick_s
        if request.dealt or request.is_tried or request.future.done() or left_s >= needed_s:
            return False
        why = (
            f"the server became slower while the request waited: its images take {needed_s:.1f} s, "
            f"and {max(0.0, left_s):.1f} s are left"
        )
        _settle(request.future, QueueFull(why, self._backlog() / len(self._slots) * self._usual_s))
        return True

    def _draw_noise(self, joined: list[tuple[int, _Slot]]) -> None:
        if not joined:
            return
        drawings = [slot.drawing for _, slot in joined]
        seed = torch.tensor([d.seed for d in drawings], device=self._device)
        index = torch.tensor([d.index for d in drawings], device=self._device)
        e = start_noise(self.network.flow, self.network.config, seed, index)
        self._z[[i for i, _ in joined]] = e

    def _evaluate(self, batch: list[tuple[int, _Slot]]) -> Tensor:
        """Moves z of every slot of the batch by one evaluation; x_pred of each."""
        rows, slots = [i for i, _ in batch], [slot for _, slot in batch]
        here = torch.stack([s.times[s.step] for s in slots])
        next_ = torch.stack([s.times[s.step + 1] for s in slots])
        again = torch.tensor([s.corrects for s in slots])
        configs = [s.drawing.sampler for s in slots]
        scale = torch.tensor([c.cfg_scale for c in configs])
        low, high = torch.tensor([c.cfg_interval for c in configs]).T
        y = torch.tensor([s.drawing.label for s in slots]).to(self._device)

        z = self._z[rows]
        t = torch.where(again, next_, here)
        self._rows = len(batch) + int(guidance_acts(t, scale, low, high).sum())
        v, x_pred = guided_velocity(self.network, z, t, y, scale, low, high)
        # Where the step begins, z0 = z and v0 = v, so that the mean below is v itself: one formula
        # for Euler, Heun's prediction and Heun's correction.
        again, dt = per_image(again.to(self._device)), per_image((next_ - here).to(self._device))
        z0 = torch.where(again, self._z0[rows], z)
        v0 = torch.where(again, self._v0[rows], v)
        self._z[rows] = z0 + dt * ((v0 + v) / 2)
        self._z0[rows], self._v0[rows] = z0, v0
        return x_pred

    def _computing(self) -> ExitStack:
        """Contexts of every network call."""
        stack = ExitStack()
        stack.enter_context(torch.inference_mode())
        bf16 = self._precision == "bf16"
        stack.enter_context(torch.autocast(self._device.type, torch.bfloat16, enabled=bf16))
        return stack

    def _show(self, batch: list[tuple[int, _Slot]], x_pred: Tensor) -> None:
        """Hands x_pred to the requests that asked for previews."""
        for (_, slot), x in zip(batch, x_pred, strict=True):
            request = slot.request
            if request.on_preview is None or slot.corrects:
                continue
            if slot.step not in request.preview_steps:
                continue
            try:
                request.on_preview(slot.position, slot.step, x.float().cpu())
            except Exception as error:  # of this request only, not of its neighbours
                logger.exception("a preview callback failed")
                with self._changed:
                    _settle(request.future, EngineFailed(f"the preview failed: {error}"))

    def _advance(self, batch: list[tuple[int, _Slot]]) -> None:
        """Moves every slot on; finished images leave."""
        for i, slot in batch:
            slot.advance()
            if not slot.done:
                continue
            x = self._z[i].to("cpu", copy=True)  # waits for the device
            request = slot.request
            with self._changed:
                self._slots[i] = None
                if not x.isfinite().all():
                    what = f"image {slot.position} of the request has values that are not finite"
                    _settle(request.future, EngineFailed(what))
                    continue
                self.images += 1
                request.images[slot.position] = x
                if len(request.images) == len(request.drawings):
                    images = [request.images[k] for k in range(len(request.drawings))]
                    queued_s = request.started - request.submitted
                    drawing_s = time.monotonic() - request.started
                    _settle(request.future, Drawn(images, queued_s, drawing_s))

    def _fail(self, error: Exception, *, waiting: bool = True) -> None:
        """Fails the requests that are being drawn, and with `waiting` also those that wait."""
        with self._changed:
            for request in self._requests:
                if waiting or request.dealt:
                    _settle(request.future, error)
            self._requests = [r for r in self._requests if not r.future.done()]
            self._slots = [None] * len(self._slots)

    def _backlog(self) -> int:
        """Evaluations that running and waiting images still need."""
        waiting = (d.evaluations for r in self._requests for d in r.drawings[r.dealt :])
        return sum(waiting) + sum(s.evaluations_left for s in self._slots if s is not None)

    def _late(self, requests: Sequence[_Request], now: float) -> set[int]:
        """Numbers of the requests that would be late at `RESERVE` times the measured tick, if
        nothing else came: plays on copies what `_admit` will do."""
        tick_s, slots = RESERVE * self.tick_s, len(self._slots)
        copies = {r.number: replace(r, images=dict(r.images)) for r in requests}
        line = _Line([*copies.values()], slots, tick_s)
        ends = [  # (tick, request, position) of the images in slots
            (slot.evaluations_left, slot.request.number, slot.position)
            for slot in self._slots
            if slot is not None and slot.request.number in copies
        ]
        heapq.heapify(ends)
        late: set[int] = set()
        tick = 0
        while True:
            while len(ends) < slots and (request := line.first(now + tick * tick_s)):
                end = tick + request.drawings[request.dealt].evaluations
                heapq.heappush(ends, (end, request.number, request.dealt))
                request.dealt += 1
                line.join(request)
            if not ends:
                return late
            tick = ends[0][0]
            while ends and ends[0][0] == tick:
                _, number, position = heapq.heappop(ends)
                request = copies[number]
                request.images[position] = _UNSEEN
                line.join(request)
                done = len(request.images) == len(request.drawings)
                if done and now + tick * tick_s > request.deadline:
                    late.add(number)


def _settle(future: Future[Drawn], outcome: Drawn | Exception) -> None:
    """Gives a future its outcome, unless it has one or was cancelled in the meantime."""
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
