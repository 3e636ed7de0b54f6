from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.order import Order

orders = st.builds(
    Order,
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    seed=st.integers(0, 2**63),
    lanes=st.integers(1, 16),
    window=st.integers(1, 4),
)
PRIME = Order([5, 5, 5, 2], seed=1, lanes=4, window=2)  # 17 rows
ONE_GROUP = Order([7], seed=1, lanes=4, window=2)
MORE_LANES_THAN_ROWS = Order([1, 1, 1], seed=1, lanes=8, window=3)


def pairs(order: Order, start: int, stop: int) -> list[tuple[int, int]]:
    group, row = order.rows(start, stop)
    return list(zip(group.tolist(), row.tolist(), strict=True))


@given(orders, st.integers(0, 5))
@example(PRIME, 3)
@example(ONE_GROUP, 3)
@example(MORE_LANES_THAN_ROWS, 3)
def test_every_row_comes_exactly_once_in_every_epoch(order: Order, epoch: int):
    n = order.num_rows
    everything = {(g, r) for g, rows in enumerate(order.group_rows) for r in range(rows)}

    drawn = pairs(order, epoch * n, (epoch + 1) * n)

    assert len(drawn) == n
    assert set(drawn) == everything


@given(orders, st.integers(0, 300), st.integers(0, 100))
@example(PRIME, 16, 20)
def test_the_stream_can_be_entered_anywhere(order: Order, start: int, length: int):
    from_the_beginning = pairs(order, 0, start + length)

    assert pairs(order, start, start + length) == from_the_beginning[start:]


@given(orders, st.integers(0, 300), st.integers(1, 4))
@example(PRIME, 13, 2)
def test_a_batch_anywhere_takes_equally_from_every_lane(order: Order, start: int, each: int):
    stop = start + each * order.lanes

    index = order.indices(start, stop, range(order.lanes))

    assert index.tolist() == list(range(start, stop))
    assert set(Counter((index % order.lanes).tolist()).values()) == {each}


@given(orders, st.data())
def test_workers_share_the_batch_without_overlap(order: Order, data):
    divisors = [w for w in range(1, order.lanes + 1) if order.lanes % w == 0]
    world = data.draw(st.sampled_from(divisors))
    start = data.draw(st.integers(0, 100))
    stop = start + order.lanes * 2

    shares = [order.indices(start, stop, order.owned(r, world)) for r in range(world)]

    assert sorted(np.concatenate(shares).tolist()) == list(range(start, stop))
    assert {len(share) for share in shares} == {2 * order.lanes // world}


@given(orders, st.integers(0, 300))
def test_a_window_holds_at_most_the_row_groups_that_memory_allows(order: Order, index: int):
    window = order.window(index)

    assert len(set(window.group.tolist())) <= order.window_groups
    assert (index - window.first) % order.lanes == 0
    assert 0 <= (index - window.first) // order.lanes < len(window.row)


def test_a_row_group_is_read_by_one_lane_except_at_the_cuts():
    order = Order([32] * 500, seed=0, lanes=8, window=4)
    reads = 0
    for lane in range(8):
        index, groups = lane, set()
        while index < order.num_rows:
            window = order.window(index)
            groups |= set(window.group.tolist())
            index = window.first + len(window.row) * order.lanes
        reads += len(groups)

    assert reads <= 500 + 7


def test_epochs_and_seeds_differ_and_neighbours_are_mixed():
    order = Order([32] * 64, seed=0, lanes=8, window=4)
    other = Order([32] * 64, seed=1, lanes=8, window=4)
    n = order.num_rows

    first, second = pairs(order, 0, n), pairs(order, n, 2 * n)

    assert first != second
    assert first != pairs(other, 0, n)
    assert pairs(Order([32] * 64, seed=0, lanes=8, window=4), 0, n) == first
    # 64 consecutive images come from nearly as many different places as the windows allow.
    assert len({g for g, _ in first[:64]}) >= 16


def test_batches_are_as_mixed_as_those_of_a_full_permutation():
    """12,800 images of 100 classes, permuted as `jit prepare` does it; batches of 128."""
    rows, classes, batch = 12_800, 100, 128
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(rows) % classes)
    group, row = Order([64] * 200, seed=0, lanes=16, window=4).rows(0, rows)

    def entropy(drawn: np.ndarray) -> float:
        counts = np.stack([np.bincount(b, minlength=classes) for b in drawn.reshape(-1, batch)])
        p = counts / batch
        return float(-(p * np.log2(p, where=p > 0, out=np.zeros_like(p))).sum(1).mean())

    def largest_autocorrelation(drawn: np.ndarray) -> float:
        x = drawn - drawn.mean()
        return max(abs(float(x[lag:] @ x[:-lag])) for lag in range(1, 2 * batch)) / float(x @ x)

    lanes, full = labels[group * 64 + row], labels[rng.permutation(rows)]
    assert abs(entropy(lanes) - entropy(full)) < 0.02  # of 6.1 bits
    assert largest_autocorrelation(lanes) < 0.04
    assert largest_autocorrelation(full) < 0.04  # what chance does


def test_the_order_of_a_run_never_changes():
    """Written down once: a run that was started with this order must be resumable."""
    order = Order([3, 2, 4], seed=7, lanes=2, window=2)

    assert pairs(order, 0, 9) == [
        (0, 0),
        (0, 1),
        (2, 3),
        (0, 2),
        (2, 2),
        (1, 0),
        (2, 1),
        (1, 1),
        (2, 0),
    ]


def test_lanes_that_cannot_be_dealt_evenly_are_refused():
    order = Order([10], seed=0, lanes=64, window=1)

    with pytest.raises(ValueError, match="64 lanes cannot be dealt evenly to 3 workers"):
        order.owned(0, 3)
