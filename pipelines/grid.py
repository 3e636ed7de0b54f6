"""The cells of a sweep, and in which order they are computed. No Ray, no images.

A cell is one way to draw: an EMA and a sampler. Cells that differ in the guidance scale only lie on
one line. Settings that send the same images through the network at the same times - any interval
at scale 1, or two intervals with no time between their ends - are one cell, not two, and its name
depends on nothing else in the grid.

The exhaustive search computes every cell. The refined one computes each line coarsely, then halves
the gaps on both sides of the line's best cell until its neighbours are known. It ends in a local
minimum of the line. Where the metric falls and then rises along a line, that is the line's
minimum, so both searches find the same winner; elsewhere only the exhaustive one is sure to.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch

from jitmodel.config import SamplerConfig
from jitmodel.sampler import guidance_acts, times

Search = Literal["exhaustive", "refined"]
Interval = tuple[float, float]

COARSE_GAPS = 3
"""Least number of gaps between the cells that the refined search computes first on a line."""


def short(value: float) -> str:
    """A number in as few digits as tell it from every other one."""
    text = f"{value:g}"
    return text if float(text) == value else repr(value)


class Cell(NamedTuple):
    """One way to draw."""

    ema: float
    sampler: SamplerConfig

    @property
    def name(self) -> str:
        """What tells the cell from the others, fit for a folder."""
        s = self.sampler
        low, high = map(short, s.cfg_interval)
        interval = "" if s.cfg_scale == 1 else f"-in{low}to{high}"
        return f"ema{short(self.ema)}-{s.solver}{s.steps}-cfg{short(s.cfg_scale)}{interval}"


class Line(NamedTuple):
    """Cells that differ in the guidance scale only, by ascending scale."""

    ema: float
    solver: str
    steps: int
    interval: Interval
    scales: tuple[float, ...]
    cells: tuple[Cell, ...]
    """One for each scale; all that draw the same are one cell, with the plainest settings."""


def make_lines(
    emas: Iterable[float],
    solvers: Iterable[Literal["heun", "euler"]],
    steps: Iterable[int],
    intervals: Sequence[Interval],
    scales: Iterable[float],
) -> list[Line]:
    """Every combination, EMA by EMA; settings that draw the same images share one cell.

    Raises:
        ValueError: a value is none that a sampler can have.
    """
    scales = tuple(sorted(set(scales)))
    rows = [
        [
            SamplerConfig(steps=number, solver=solver, cfg_scale=scale, cfg_interval=interval)
            for scale in scales
        ]
        for solver, number, interval in dict.fromkeys(itertools.product(solvers, steps, intervals))
    ]
    plain = [tuple(map(plainest, row)) for row in rows]
    return [
        Line(
            ema, row[0].solver, row[0].steps, row[0].cfg_interval, scales,
            tuple(Cell(ema, sampler) for sampler in samplers),
        )
        for ema in dict.fromkeys(emas)
        for row, samplers in zip(rows, plain, strict=True)
    ]  # fmt: skip


def plainest(sampler: SamplerConfig) -> SamplerConfig:
    """The one sampler that stands for all that guide equally at the same times.

    A function of what is drawn alone, so that a cell keeps its name whatever else is in the grid:
    the ends of the interval have as few decimals as can be, and then lie as far apart as can be.
    """
    grid = times(sampler.steps)[:-1]
    scale = torch.tensor(sampler.cfg_scale)

    def acting(low: float, high: float) -> list[int]:
        acts = guidance_acts(grid, scale, torch.tensor(low), torch.tensor(high))
        return acts.nonzero()[:, 0].tolist()

    acts = acting(*sampler.cfg_interval)
    if not acts:
        return sampler.model_copy(update={"cfg_scale": 1.0, "cfg_interval": (0.0, 1.0)})
    before, after = max(acts[0] - 1, 0), acts[-1] + 1
    for low in _decimals(before, sampler.steps, 1):
        if acting(low, 1.0)[:1] == acts[:1]:
            break
    for high in _decimals(after, sampler.steps, -1):
        if acting(0.0, high)[-1:] == acts[-1:]:
            break
    return sampler.model_copy(update={"cfg_interval": (low, high)})


def _decimals(step: int, steps: int, way: Literal[1, -1]) -> Iterator[float]:
    """The two decimals nearest to step / steps, on that side of it or on it; with no digit after
    the point, then with one, and so on."""
    for digits in itertools.count():
        unit = 10**digits
        nearest = way * -(-way * step * unit // steps)
        yield nearest / unit
        yield (nearest + way) / unit


def all_cells(lines: Iterable[Line]) -> list[Cell]:
    """Each cell once, in order."""
    return list(dict.fromkeys(cell for line in lines for cell in line.cells))


def next_cells(lines: Iterable[Line], values: Mapping[Cell, float], search: Search) -> list[Cell]:
    """Cells to compute next; none when the search is over.

    Args:
        lines: the grid.
        values: what is minimised, of the cells that have been computed.
        search: whether to compute all cells.
    """
    if search == "exhaustive":
        return [cell for cell in all_cells(lines) if cell not in values]
    wanted: dict[Cell, None] = {}
    for line in lines:
        known = {i: values[cell] for i, cell in enumerate(line.cells) if cell in values}
        wanted |= dict.fromkeys(line.cells[i] for i in refine(len(line.cells), known))
    return list(wanted)


def coarse(num: int) -> list[int]:
    """Positions that the refined search computes first on a line of `num` cells, ends included."""
    gap = 1
    while 2 * gap * COARSE_GAPS < num:
        gap *= 2
    return sorted({*range(0, num, gap), num - 1})


def refine(num: int, known: Mapping[int, float]) -> list[int]:
    """Positions to compute next on a line of `num` cells; none when its minimum is known.

    Args:
        num: cells on the line.
        known: what is minimised, by position.
    """
    missing = [i for i in coarse(num) if i not in known]
    if missing:
        return missing
    places = sorted(known)
    best = min(places, key=lambda i: (known[i], i))
    at = places.index(best)
    ends = places[max(at - 1, 0)], places[min(at + 1, len(places) - 1)]
    return sorted({(best + end) // 2 for end in ends} - known.keys())


def most_cells(
    lines: Sequence[Line], search: Search, values: Mapping[Cell, float] | None = None
) -> int:
    """Cells that the search still computes at most, wherever the minimum of each line is.

    Args:
        lines: the grid.
        search: whether to compute all cells.
        values: what is minimised, of the cells that have been computed; none by default.
    """
    values = values or {}
    missing = set(all_cells(lines)) - values.keys()
    if search == "exhaustive":
        return len(missing)
    first, refined = set[Cell](), 0
    for line in lines:
        num = len(line.cells)
        known = {i: values[cell] for i, cell in enumerate(line.cells) if cell in values}
        if refine(num, known):
            first |= {line.cells[i] for i in coarse(num) if i not in known}
            refined += _most_refined(num)
    return min(len(missing), len(first) + refined)


def _most_refined(num: int) -> int:
    """Cells that follow the coarse ones on a line of `num` cells, at most."""
    most = 0
    for minimum in range(num):
        known: dict[int, float] = {}
        while positions := refine(num, known):
            known |= {i: abs(i - minimum) for i in positions}
        most = max(most, len(known))
    return most - len(coarse(num))
