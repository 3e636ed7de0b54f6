"""The batching engine: whatever shares the batch, an image is the one that `sample` draws."""

from __future__ import annotations

import re
import threading
from collections import Counter
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from jitmodel.config import FlowConfig, ModelConfig, SamplerConfig
from jitmodel.model import JiT
from jitmodel.pixels import to_pixels
from jitmodel.sampler import sample, start_noise
from pipelines.drawing import Plan, draw_batch
from pipelines.engine import (
    DeadlineExceeded,
    Drawing,
    Drawn,
    Engine,
    EngineFailed,
    QueueFull,
    _Request,
    few_sizes,
)

CONFIG = ModelConfig(
    image_size=8,
    patch_size=4,
    hidden_size=32,
    depth=2,
    num_heads=2,
    bottleneck_dim=16,
    in_context_len=2,
    in_context_start=1,
    num_classes=5,
)
QUICK = SamplerConfig(steps=2, solver="euler", cfg_scale=1.0)


@pytest.fixture(scope="module")
def model() -> JiT:
    """A network whose output depends on all of z, t and y."""
    generator = torch.Generator().manual_seed(0)
    model = JiT(CONFIG, generator=generator).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


class Watched:
    """The real network, which notes the size of each batch and fails when it is told to."""

    def __init__(self, model: JiT) -> None:
        self.model, self.config, self.flow = model, model.config, model.flow
        self.batches: list[int] = []
        self.broken = False

    def __call__(self, z: Tensor, t: Tensor, y: Tensor) -> Any:
        self.batches.append(len(z))
        if self.broken:
            raise RuntimeError("out of memory")
        return self.model(z, t, y)


def drawing(label: int = 0, seed: int = 0, index: int = 0, **sampler: Any) -> Drawing:
    return Drawing(label, seed, index, QUICK.model_copy(update=sampler))


def alone(model: JiT, d: Drawing) -> Tensor:
    """The image as the sampler draws it, in a batch of one."""
    e = start_noise(model.flow, model.config, d.seed, torch.tensor([d.index]))
    return sample(model, torch.tensor([d.label]), e, d.sampler)[0]


def run_dry(engine: Engine) -> int:
    """Ticks until nothing is left to do; the number of ticks that did something."""
    ticks = 0
    while engine.tick():
        ticks += 1
    return ticks


def assert_same(drawn: Tensor, expected: Tensor) -> None:
    assert (drawn - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("pad_to", [(), (4, 8)])
def test_an_image_does_not_depend_on_what_shares_the_batch(model: JiT, pad_to: tuple[int, ...]):
    mixed = [
        drawing(0, seed=1, steps=10, solver="heun", cfg_scale=2.9, cfg_interval=(0.1, 1.0)),
        drawing(1, seed=1, index=1, steps=3, solver="euler", cfg_scale=1.5, cfg_interval=(0, 0.5)),
        drawing(2, seed=2**62, steps=1, solver="heun", cfg_scale=4.0, cfg_interval=(0, 1)),
        drawing(3, seed=3, steps=7, solver="heun", cfg_scale=1.0),
        drawing(4, seed=4, steps=5, solver="heun", cfg_scale=0.0, cfg_interval=(0.3, 0.8)),
        drawing(0, seed=5, steps=4, solver="euler", cfg_scale=3.0, cfg_interval=(0.25, 0.75)),
    ]
    engine = Engine(model, torch.device("cpu"), slots=4, pad_to=pad_to)

    futures = []
    for d in mixed:  # each joins at another tick, when the others are on their way
        futures.append(engine.submit([d], timeout_s=60))
        engine.tick()
    run_dry(engine)

    for d, future in zip(mixed, futures, strict=True):
        assert_same(future.result(0).images[0], alone(model, d))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_image_is_the_evaluation_jobs_bit_for_bit_under_the_same_batch_shape(
    model: JiT, precision: Literal["fp32", "bf16"]
):
    sampler = SamplerConfig(steps=9, solver="heun", cfg_scale=2.9, cfg_interval=(0.1, 0.9))
    plan = Plan(
        num_images=20, batch=5, chunk_batches=1, seed=3, precision=precision, sampler=sampler,
        model=CONFIG, flow=model.flow, weights_sha256="", extractor={}, device="cpu", torch="",
        code="",
    )  # fmt: skip
    index = range(5, 10)

    evaluated = draw_batch(model, plan, torch.tensor(index))
    engine = Engine(model, torch.device("cpu"), slots=5, precision=precision)
    served = engine.submit(
        [Drawing(plan.label(i), plan.seed, i, sampler) for i in index], timeout_s=60
    )
    run_dry(engine)

    assert torch.equal(to_pixels(torch.stack(served.result(0).images)), evaluated)


def test_only_guided_slots_get_an_unconditional_row(model: JiT):
    network = Watched(model)
    engine = Engine(network, torch.device("cpu"), slots=3)

    engine.submit([drawing(steps=2, cfg_scale=1.0)], timeout_s=60)
    engine.submit([drawing(steps=2, cfg_scale=2.0, cfg_interval=(0.25, 0.75))], timeout_s=60)
    engine.submit([drawing(steps=4, cfg_scale=2.0, cfg_interval=(0.0, 0.5))], timeout_s=60)
    run_dry(engine)

    # times 0 and 0.5 for the first two, 0 to 0.75 for the third; guided: t = 0.5 of the second,
    # t = 0 and 0.25 of the third (its interval is open at 0.5 and holds t = 0)
    assert network.batches == [3 + 1, 3 + 2, 1, 1]


def test_padding_shows_the_network_few_shapes(model: JiT):
    network = Watched(model)
    engine = Engine(network, torch.device("cpu"), slots=3, pad_to=(2, 6))

    engine.submit([drawing(), drawing(cfg_scale=2.0, cfg_interval=(0, 1))], timeout_s=60)
    run_dry(engine)

    assert set(network.batches) <= {2, 6}
    with pytest.raises(ValueError, match="does not reach 2 \\* slots = 6"):
        Engine(network, torch.device("cpu"), slots=3, pad_to=(2, 4))


def test_few_sizes_reach_a_full_batch_of_guided_images():
    assert few_sizes(8) == [16, 8, 4, 2]
    assert few_sizes(1) == [2, 1]
    assert few_sizes(3) == [6, 3, 1]


def test_one_image_is_not_kept_waiting_by_a_request_for_many(model: JiT):
    engine = Engine(model, torch.device("cpu"), slots=2)
    many = engine.submit([drawing(index=k) for k in range(8)], timeout_s=60)
    engine.tick()
    one = engine.submit([drawing(seed=7)], timeout_s=60)

    ticks = 0
    while not one.done():
        engine.tick()
        ticks += 1

    assert ticks == 3  # one until a slot is free, two for its own steps
    run_dry(engine)
    assert len(many.result(0).images) == 8


def test_among_equals_the_earliest_deadline_is_first(model: JiT):
    engine = Engine(model, torch.device("cpu"), slots=1)
    engine.submit([drawing()], timeout_s=60)
    engine.tick()
    patient = engine.submit([drawing(seed=1)], timeout_s=60)
    pressed = engine.submit([drawing(seed=2)], timeout_s=30)

    while not pressed.done():
        engine.tick()

    assert not patient.done()


def test_a_cancelled_request_frees_its_slots_at_the_next_tick(model: JiT):
    network = Watched(model)
    engine = Engine(network, torch.device("cpu"), slots=2)
    gone = engine.submit([drawing(index=k, steps=10) for k in range(6)], timeout_s=60)
    next_ = engine.submit([drawing(seed=3)], timeout_s=60)
    engine.tick()
    assert engine.running == 2

    assert gone.cancel()
    run_dry(engine)

    assert_same(next_.result(0).images[0], alone(model, drawing(seed=3)))
    assert len(network.batches) <= 3, "nothing more was drawn for the cancelled request"
    with pytest.raises(CancelledError):
        gone.result(0)


def test_what_does_not_fit_the_queue_is_refused_with_a_time_to_come_back(model: JiT):
    engine = Engine(model, torch.device("cpu"), slots=2, max_queue=3)
    engine.warm_up()
    waiting = engine.submit([drawing(index=k) for k in range(5)], timeout_s=60)

    with pytest.raises(QueueFull, match="5 images are being drawn or wait") as refusal:
        engine.submit([drawing()], timeout_s=60)

    assert refusal.value.retry_after_s > 0
    assert waiting.cancel()
    engine.submit([drawing()], timeout_s=60)  # the room is there at once
    with pytest.raises(ValueError, match="1 to 5 images, not 6"):
        engine.submit([drawing()] * 6, timeout_s=60)


def test_what_cannot_be_done_in_time_is_refused_at_once(model: JiT):
    engine = Engine(model, torch.device("cpu"), slots=2)
    engine.tick_s = 0.5  # as if it had been measured

    engine.submit([drawing(steps=20)] * 2, timeout_s=5)  # 20 ticks: 10 s, but it is alone

    # 10 s of waiting and 1 s of its own, and half as much again in reserve
    with pytest.raises(QueueFull, match=r"take up to 16\.5 s \(15\.0 s of them waiting\)"):
        engine.submit([drawing(steps=2)], timeout_s=16)
    engine.submit([drawing(steps=2)], timeout_s=17)


class Clock:
    """Time that passes only in the network, whatever the machine does: 10 ms for eight images."""

    def __init__(self) -> None:
        self.now, self.slower = 0.0, 1.0
        self.config, self.flow = CONFIG, FlowConfig()

    def monotonic(self) -> float:
        return self.now

    def __call__(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.now += self.slower * (0.002 + 0.001 * len(z))
        return torch.zeros_like(z)


@pytest.mark.parametrize(("load", "steps"), [(1, 50), (2, 50), (1, 5)])
def test_nobody_who_was_accepted_is_late(monkeypatch: pytest.MonkeyPatch, load: int, steps: int):
    clock, timeout_s = Clock(), 10
    monkeypatch.setattr("pipelines.engine.time", clock)
    engine = Engine(clock, torch.device("cpu"), slots=8, max_queue=64)
    engine.tick_s = 0.01
    one = drawing(steps=steps, solver="heun")
    many = [drawing(index=k, steps=50, solver="heun") for k in range(16)]
    small: list[Future[Drawn]] = []
    large: list[Future[Drawn]] = []
    every_s = one.evaluations * 0.01 / 8 / load
    next_small, next_large = 0.0, 1.0

    while clock.now < 2.5 * timeout_s:  # one image at a time fills the slots; now and then come 16
        while next_small <= clock.now:
            with suppress(QueueFull):
                small.append(engine.submit([one], timeout_s=timeout_s))
            next_small += every_s
        if clock.now >= next_large:
            next_large += 0.05
            with suppress(QueueFull):
                large.append(engine.submit(many, timeout_s=timeout_s))
                next_large += timeout_s
        if not engine.tick():
            clock.now += 0.001
    run_dry(engine)

    late = [f for f in small + large if f.exception(0) is not None]
    assert not late, f"{len(late)} of {len(small)} small and {len(large)} large"
    assert len(small) > 0.6 * 2.5 * timeout_s / (every_s * load), "small ones still join"
    assert large, "and large ones are not shut out"


@pytest.mark.parametrize(("before", "images"), [(0, 1), (10, 1), (30, 1), (10, 8)])
def test_a_burst_after_light_traffic_is_not_taken_for_as_cheap(
    monkeypatch: pytest.MonkeyPatch, before: int, images: int
):
    """A tick of one image, or of eight without guidance, costs less than a full one."""
    clock = Clock()
    monkeypatch.setattr("pipelines.engine.time", clock)
    engine = Engine(clock, torch.device("cpu"), slots=8, max_queue=64)
    engine.warm_up()
    for _ in range(before):
        engine.submit([drawing(steps=50, solver="heun")] * images, timeout_s=60)
        run_dry(engine)

    taken: list[Future[Drawn]] = []
    for _ in range(72):
        with suppress(QueueFull):
            guided = drawing(steps=50, solver="heun", cfg_scale=2.0, cfg_interval=(0, 1))
            taken.append(engine.submit([guided], timeout_s=8))
    run_dry(engine)

    assert len(taken) > 8, "more than the slots hold have the time"
    assert not [f for f in taken if f.exception(0) is not None]


def full_of(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, list[Future[Drawn]]]:
    """An engine with eight images in slots and others waiting, as many as have time."""
    monkeypatch.setattr("pipelines.engine.time", clock)
    engine = Engine(clock, torch.device("cpu"), slots=8, max_queue=64)
    engine.warm_up()
    taken: list[Future[Drawn]] = []
    guided = drawing(steps=50, solver="heun", cfg_scale=2.0, cfg_interval=(0, 1))
    for _ in range(72):
        with suppress(QueueFull):
            taken.append(engine.submit([guided], timeout_s=10))
    engine.tick()
    assert engine.running == 8 < len(taken) - 8
    return engine, taken


@pytest.mark.parametrize("slower", [1.4, 2, 5])
def test_what_waits_in_vain_once_ticks_are_slower_is_told_so_and_leaves_the_others_their_time(
    monkeypatch: pytest.MonkeyPatch, slower: float
):
    clock = Clock()
    engine, taken = full_of(clock, monkeypatch)
    told: list[float] = []
    for future in taken:
        future.add_done_callback(lambda f: told.append(clock.now) if f.exception(0) else None)

    clock.slower = slower
    run_dry(engine)

    outcomes = Counter(type(f.exception(0)) for f in taken)
    assert set(outcomes) == ({type(None)} if slower == 1.4 else {type(None), QueueFull})
    assert outcomes[type(None)] >= 8, "those in slots are done"
    assert all(at < 10 for at in told), "before the deadline"
    if slower == 2:
        assert outcomes[type(None)] > 8, "and those that had the time"
        refused = next(f.exception(0) for f in taken if f.exception(0))
        assert re.fullmatch(r"the server .* 3\.6 s, and [23]\.\d s are left", str(refused))
        assert isinstance(refused, QueueFull)
        assert refused.retry_after_s > 0


@pytest.mark.parametrize(("ticks", "slower"), [(1, 100), (5, 5), (20, 3), (10_000, 1.49)])
def test_a_stall_or_a_spell_within_the_reserve_makes_nobody_give_way(
    monkeypatch: pytest.MonkeyPatch, ticks: int, slower: float
):
    clock = Clock()
    engine, taken = full_of(clock, monkeypatch)

    clock.slower = slower
    for _ in range(ticks):
        engine.tick()
    clock.slower = 1
    run_dry(engine)

    assert not [f for f in taken if f.exception(0) is not None]


def test_what_held_the_machine_up_is_forgotten_though_the_slots_are_never_full(
    monkeypatch: pytest.MonkeyPatch,
):
    clock = Clock()
    monkeypatch.setattr("pipelines.engine.time", clock)
    engine = Engine(clock, torch.device("cpu"), slots=8)
    engine.warm_up()
    one = drawing(steps=50, solver="heun")
    for held_up_s in [1.0] * 40 + [0.0] * 30:
        engine.submit([one], timeout_s=60)
        engine.tick()
        clock.now += held_up_s
        run_dry(engine)

    engine.submit([one], timeout_s=10)
    engine.tick()
    engine.submit([one], timeout_s=10)  # there is time for it: no QueueFull


def test_who_finds_a_free_slot_waits_for_nobody(monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    monkeypatch.setattr("pipelines.engine.time", clock)
    engine = Engine(clock, torch.device("cpu"), slots=8)
    engine.warm_up()
    one = drawing(steps=50, solver="heun")
    timeout_s = 1.6 * one.evaluations * engine.tick_s  # RESERVE is 1.5

    drawn = [engine.submit([one], timeout_s=timeout_s) for _ in range(8)]
    with pytest.raises(QueueFull, match="would take up to"):
        engine.submit([one], timeout_s=timeout_s)
    run_dry(engine)

    assert all(f.exception(0) is None for f in drawn)


def test_to_submit_is_not_to_look_through_the_queue_once_for_every_image_in_it(
    model: JiT, monkeypatch: pytest.MonkeyPatch
):
    looks = 0
    waiting = _Request.waiting.fget

    def looked(request: _Request) -> int:
        nonlocal looks
        looks += 1
        return waiting(request)

    engine = Engine(model, torch.device("cpu"), slots=4, max_queue=400)
    engine.tick_s = 0.001
    for _ in range(400):
        engine.submit([drawing()], timeout_s=60)
    monkeypatch.setattr(_Request, "waiting", property(looked))

    engine.submit([drawing()], timeout_s=60)  # plays the schedule through
    engine.tick()  # deals four slots

    assert looks < 10 * 400


def test_a_late_request_fails_and_frees_its_slots(model: JiT):
    engine = Engine(model, torch.device("cpu"), slots=1)
    late = engine.submit([drawing(steps=1000)], timeout_s=0.05)

    ticks = run_dry(engine)

    with pytest.raises(DeadlineExceeded, match=r"0 of 1 images were done after 0\.05 s"):
        late.result(0)
    assert 1 <= ticks < 1000
    assert engine.running == 0


def test_a_failed_tick_fails_the_images_in_it_and_the_engine_goes_on(model: JiT):
    network = Watched(model)
    engine = Engine(network, torch.device("cpu"), slots=1)
    drawn = engine.submit([drawing()], timeout_s=60)
    waits = engine.submit([drawing(seed=1)], timeout_s=60)

    network.broken = True
    engine.tick()
    assert engine.failures == 1
    network.broken = False
    run_dry(engine)

    with pytest.raises(EngineFailed, match="drawing failed: RuntimeError: out of memory"):
        drawn.result(0)
    assert_same(waits.result(0).images[0], alone(model, drawing(seed=1)))
    assert engine.failures == 0


def test_an_image_that_is_not_finite_fails_its_own_request_only(model: JiT):
    class Spoilt(Watched):
        def __call__(self, z: Tensor, t: Tensor, y: Tensor) -> Any:
            return torch.where(y.view(-1, 1, 1, 1) == 1, torch.nan, super().__call__(z, t, y))

    engine = Engine(Spoilt(model), torch.device("cpu"), slots=2)
    bad = engine.submit([drawing(0), drawing(1)], timeout_s=60)
    good = engine.submit([drawing(2)], timeout_s=60)
    run_dry(engine)

    with pytest.raises(EngineFailed, match=r"image 1 of the request .* not finite"):
        bad.result(0)
    assert_same(good.result(0).images[0], alone(model, drawing(2)))


def test_previews_become_the_image(model: JiT):
    engine = Engine(model, torch.device("cpu"), slots=2)
    previews: dict[tuple[int, int], Tensor] = {}

    def keep(position: int, step: int, x_pred: Tensor) -> None:
        previews[position, step] = x_pred

    drawings = [drawing(k, index=k, steps=6, solver="heun", cfg_scale=2.0) for k in range(2)]
    seen = engine.submit(drawings, timeout_s=60, on_preview=keep, preview_steps={0, 5})
    run_dry(engine)

    assert sorted(previews) == [(0, 0), (0, 5), (1, 0), (1, 5)]
    for position, x in enumerate(seen.result(0).images):
        # the last step goes from t = 5/6 all the way to where the network points
        assert_same(previews[position, 5], x)


def test_a_preview_that_raises_fails_its_own_request_only(model: JiT):
    def raises(*_: Any) -> None:
        raise RuntimeError("the reader is gone")

    engine = Engine(model, torch.device("cpu"), slots=2)
    bad = engine.submit([drawing()], timeout_s=60, on_preview=raises, preview_steps={1})
    good = engine.submit([drawing()], timeout_s=60)
    run_dry(engine)

    with pytest.raises(EngineFailed, match="the reader is gone"):
        bad.result(0)
    assert len(good.result(0).images) == 1


def test_the_thread_serves_many_clients_and_closing_fails_what_is_left(model: JiT):
    engine = Engine(model, torch.device("cpu"), slots=3, max_queue=100)
    engine.warm_up()
    assert engine.tick_s > 0
    engine.start()
    results: dict[int, Drawn] = {}

    def client(seed: int) -> None:
        drawings = [drawing(seed % 5, seed, k, steps=1 + seed % 3) for k in range(2)]
        results[seed] = engine.submit(drawings, timeout_s=60).result(60)

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(12)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()

    for seed, drawn in results.items():
        for k, x in enumerate(drawn.images):
            assert_same(x, alone(model, drawing(seed % 5, seed, k, steps=1 + seed % 3)))
    assert len(results) == 12

    endless = engine.submit([drawing(steps=10_000)], timeout_s=600)
    engine.close()
    with pytest.raises(EngineFailed, match="shutting down"):
        endless.result(0)
    with pytest.raises(EngineFailed, match="closed"):
        engine.submit([drawing()], timeout_s=60)
