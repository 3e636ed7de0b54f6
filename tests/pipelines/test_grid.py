"""A grid has no cell twice, and the refined search finds the winner of the exhaustive one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given

from jitmodel.sampler import guidance_acts, times
from pipelines.grid import (
    Cell,
    Interval,
    Line,
    all_cells,
    coarse,
    make_lines,
    most_cells,
    next_cells,
)

PAPER = [round(1 + 0.1 * i, 1) for i in range(31)]
BOTH = [(0.0, 1.0), (0.1, 1.0)]


def search(
    lines: list[Line],
    kind: str,
    surface: Callable[[Cell], float],
    known: Iterable[tuple[Cell, float]] = (),
) -> dict[Cell, float]:
    """What is known of a surface when a search is over, in the order of computing."""
    values = dict(known)
    while cells := next_cells(lines, values, kind):
        assert not set(cells) & values.keys(), "a cell is computed twice"
        assert len(set(cells)) == len(cells)
        values |= {cell: surface(cell) for cell in cells}
    return values


def winner(values: dict[Cell, float]) -> Cell:
    return min(values, key=lambda cell: (values[cell], cell.name))


def test_without_guidance_an_interval_makes_no_second_cell():
    lines = make_lines([0.9, 0.99], ["heun"], [50], BOTH, [2.0, 1.0])

    assert [line.cells[0].sampler.cfg_scale for line in lines] == [1.0] * 4
    assert [cell.name for cell in all_cells(lines)] == [
        "ema0.9-heun50-cfg1", "ema0.9-heun50-cfg2-in0to1", "ema0.9-heun50-cfg2-in0.1to1",
        "ema0.99-heun50-cfg1", "ema0.99-heun50-cfg2-in0to1", "ema0.99-heun50-cfg2-in0.1to1",
    ]  # fmt: skip


def test_intervals_with_no_time_between_their_ends_are_one_cell():
    # 50 steps have times 0.10 and 0.12, and 5/50 does not count as above 0.1.
    near = make_lines([0.9], ["heun"], [50], [(0.11, 1.0), (0.1, 1.0), (0.12, 1.0)], [2.0])
    assert [line.cells[0].sampler.cfg_interval for line in near] == [
        (0.1, 1.0), (0.1, 1.0), (0.12, 1.0),
    ]  # fmt: skip
    assert [line.interval for line in near] == [(0.11, 1.0), (0.1, 1.0), (0.12, 1.0)]
    # One Euler step looks at t = 0 only, where an interval from 0.1 guides nothing.
    (line,) = make_lines([0.9], ["euler"], [1], [(0.1, 1.0)], [2.0, 3.0])
    assert [cell.name for cell in line.cells] == ["ema0.9-euler1-cfg1"] * 2


INTERVALS = st.tuples(st.floats(0, 1, width=32), st.floats(0, 1, width=32)).filter(
    lambda ends: ends[0] < ends[1]
)


@given(st.integers(1, 300), INTERVALS, INTERVALS)
@example(3, (0.2, 1.0), (0.1, 1.0))
@example(50, (0.11, 1.0), (0.1, 1.0))
def test_a_cell_is_named_after_what_it_draws_and_not_after_its_neighbours_in_the_grid(
    steps: int, one: Interval, other: Interval
):
    def acts(interval: Interval) -> list[bool]:
        low, high = map(torch.tensor, interval)
        return guidance_acts(times(steps)[:-1], torch.tensor(2.0), low, high).tolist()

    (alone,) = make_lines([0.9], ["heun"], [steps], [one], [2.0])
    lines = make_lines([0.9], ["heun"], [steps], [other, one], [2.0])
    (cell,), first = lines[-1].cells, lines[0].cells[0]

    assert alone.cells == (cell,)
    assert (cell.name == first.name) == (cell == first) == (acts(one) == acts(other))
    assert acts(cell.sampler.cfg_interval) == acts(one) or cell.sampler.cfg_scale == 1


def test_the_papers_grid_counts_as_many_cells_as_its_axes_say():
    lines = make_lines([0.9996, 0.9998, 0.9999], ["heun"], [50], BOTH, PAPER)

    assert len(all_cells(lines)) == 3 * (2 * 31 - 1)
    assert len({cell.name for cell in all_cells(lines)}) == 183
    assert most_cells(lines, "exhaustive") == 183
    assert most_cells(lines, "refined") == 3 * (2 * 5 - 1) + 6 * 6


def test_cells_that_differ_in_a_far_digit_have_names_of_their_own():
    lines = make_lines(
        [0.9999, 0.99990001],
        ["heun"],
        [50],
        [(0.1, 1.0), (0.10000001, 1.0)],
        [1.5, 1.5000001, 1e39],
    )
    cells = all_cells(lines)

    assert len({cell.name for cell in cells}) == len(cells) == 6
    assert cells[0].name == "ema0.9999-heun50-cfg1.5-in0.1to1"
    assert cells[1].name == "ema0.9999-heun50-cfg1.5000001-in0.1to1"


def test_a_value_that_no_sampler_has_is_refused():
    with pytest.raises(ValueError, match="is not 0 <= low < high <= 1"):
        make_lines([0.9], ["heun"], [50], [(0.5, 0.1)], [2.0])


@pytest.mark.parametrize(("num", "first"), [
    (1, [0]), (2, [0, 1]), (6, [0, 1, 2, 3, 4, 5]), (7, [0, 2, 4, 6]), (31, [0, 8, 16, 24, 30]),
])  # fmt: skip
def test_a_line_begins_with_few_cells_and_both_ends(num: int, first: list[int]):
    assert coarse(num) == first


@given(
    num=st.integers(1, 60),
    curve=st.floats(0.01, 10),
    best_scale=st.floats(0.5, 8),
    best_ema=st.floats(0.9, 1),
    mixed=st.floats(-0.9, 0.9),
    shift=st.floats(0, 2),
)
def test_the_refined_search_finds_the_winner_of_the_exhaustive_one_on_a_convex_surface(
    num: int, curve: float, best_scale: float, best_ema: float, mixed: float, shift: float
):
    lines = make_lines([0.9, 0.95, 0.99], ["heun"], [10], BOTH, [1 + 0.1 * i for i in range(num)])

    def surface(cell: Cell) -> float:
        a, b = cell.sampler.cfg_scale - best_scale, 20 * (cell.ema - best_ema)
        interval = shift * (cell.sampler.cfg_interval[0] == 0)
        return curve * (a * a + 2 * mixed * a * b + b * b) + interval

    whole = search(lines, "exhaustive", surface)
    refined = search(lines, "refined", surface)

    assert len(whole) == len(all_cells(lines))
    assert refined[winner(refined)] == whole[winner(whole)]
    assert len(refined) <= most_cells(lines, "refined") <= len(whole)
    # What a line has been searched for says nothing of the others.
    first = search(lines[:2], "exhaustive", surface)
    left = most_cells(lines, "refined", first)
    asked = search(lines, "refined", surface, first.items())
    assert len(asked) - len(first) <= left <= len(whole) - len(first)


@given(st.lists(st.floats(0.01, 5), min_size=30, max_size=30), st.integers(0, 30))
def test_it_is_enough_that_a_line_falls_and_then_rises(slopes: list[float], bottom: int):
    (line,) = make_lines([0.9], ["heun"], [10], [(0.0, 1.0)], PAPER)
    heights = {
        cell: sum(slopes[min(i, bottom) : max(i, bottom)]) for i, cell in enumerate(line.cells)
    }

    refined = search([line], "refined", heights.__getitem__)

    assert winner(refined) == line.cells[bottom]
    assert len(refined) <= 11


def test_where_a_line_has_two_valleys_the_refined_search_may_miss_the_deeper_one():
    (line,) = make_lines([0.9], ["heun"], [10], [(0.0, 1.0)], PAPER)
    heights = {cell: abs(i - 8) for i, cell in enumerate(line.cells)}
    heights[line.cells[20]] = -1

    assert min(search([line], "refined", heights.__getitem__).values()) == 0
    assert min(search([line], "exhaustive", heights.__getitem__).values()) == -1
