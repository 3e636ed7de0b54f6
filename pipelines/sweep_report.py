"""The report of a sweep: report.json for machines, report.md for papers, report.png for the eye.

The picture is the paper's Figure 6 for this model: the distance against the guidance scale, one
colour an EMA, solid where guidance keeps to an interval and dashed where it acts all the time.
Takes the dictionary that sweep.report makes; draws no images and computes no metrics.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines import storage
from pipelines.grid import short
from pipelines.report import command, flat, number

WHOLE = (0.0, 1.0)
"""The interval of guidance that always acts."""
STYLES = ("-", "-.", ":")


def write(output: str, report: Mapping[str, Any]) -> None:
    """Publish report.png, report.md and, last, report.json.

    Args:
        output: URI of the sweep's folder.
        report: what report.json holds; see sweep.report.
    """
    storage.write_bytes(storage.join(output, "report.png"), figure(report))
    storage.write_bytes(storage.join(output, "report.md"), page(report).encode())
    storage.write_json(storage.join(output, "report.json"), report)


def figure(report: Mapping[str, Any]) -> bytes:
    """The PNG of all lines, one panel for each solver and number of steps."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    name, cells, winner = report["minimised"], report["cells"], report["winner"]["cell"]
    panels = list(dict.fromkeys((line["solver"], line["steps"]) for line in report["lines"]))
    emas = list(dict.fromkeys(line["ema"] for line in report["lines"]))
    narrow = [
        i for i in dict.fromkeys(tuple(line["interval"]) for line in report["lines"]) if i != WHOLE
    ]
    drawn, axes_of = plt.subplots(
        1, len(panels), figsize=(2 + 4.5 * len(panels), 4.2), layout="constrained",
        sharey=True, squeeze=False,
    )  # fmt: skip
    for line in report["lines"]:
        interval = tuple(line["interval"])
        points = [
            (scale, cells[cell]["metrics"][name], cell)
            for scale, cell in zip(line["scales"], line["cells"], strict=True)
            if name in cells.get(cell, {"metrics": {}})["metrics"]
        ]
        style = "--" if interval == WHOLE else STYLES[narrow.index(interval) % len(STYLES)]
        axes = axes_of[0, panels.index((line["solver"], line["steps"]))]
        colour = f"C{emas.index(line['ema'])}"
        label = f"EMA {short(line['ema'])}, " + (
            "always" if interval == WHOLE else f"in {_interval(interval)}"
        )
        axes.plot(
            [x for x, _, _ in points], [y for _, y, _ in points], style, color=colour, label=label,
            marker="o", markersize=3, linewidth=1.3,
        )  # fmt: skip
        for x, y, cell in points:
            if cell == winner:
                axes.plot(x, y, "*", color="black", markersize=13, zorder=3)
    for (solver, steps), axes in zip(panels, axes_of[0], strict=True):
        axes.set(title=f"{solver}, {steps} steps", xlabel="guidance scale")
        axes.grid(alpha=0.3)
    axes_of[0, 0].set_ylabel(f"{name}, {report['search']['cell_images']:,} images")
    axes_of[0, -1].legend(fontsize="small")
    buffer = io.BytesIO()
    drawn.savefig(buffer, dpi=110, format="png")
    plt.close(drawn)
    return buffer.getvalue()


def page(report: Mapping[str, Any]) -> str:
    """The report as Markdown: the winner, the figure, every cell, and how to do it again."""
    name, search, winner = report["minimised"], report["search"], report["winner"]
    sampler, metrics = winner["sampler"], winner["metrics"]
    config, identity = report["config"], report["identity"]
    saved = (
        f"; the {search['grid'] - search['cells']} others, {search['images_saved']:,} images, were "
        "not needed"
        if search["images_saved"]
        else ""
    )
    lines = [
        "# Sweep",
        "",
        f"**{name} {number(metrics[name])}** over {winner['num_images']:,} images, with the EMA of "
        f"decay {short(winner['ema'])}, guidance {_guidance(report, winner['cell'])}, "
        f"{sampler['solver']}, {sampler['steps']} steps.",
        "",
        f"The best of {search['cells']} cells of {search['cell_images']:,} images each, out of a "
        f"grid of {search['grid']} ({search['kind']} search{saved}). All cells share their start "
        "noise.",
        "",
        *(f"> {warning}\n" for warning in report["warnings"]),
        "![the distance against the guidance scale](report.png)",
        "",
        f"![samples of the winner]({winner['folder']}/report.png)",
        "",
        f"| the winner, {winner['num_images']:,} images | |",
        "| --- | --- |",
        *(f"| {metric} | {number(value)} |" for metric, value in metrics.items()),
        "",
        *_table(report),
        "",
        "| identity | |",
        "| --- | --- |",
        *(f"| {key} | {_plain(value)} |" for key, value in flat(identity)),
        "",
        f"Drawing took {identity['worker_hours']:.3g} hours of one worker on "
        f"{', '.join(identity['devices'])}, for {identity['timed_images']:,} of "
        f"{identity['images']:,} images.",
        "",
        "Do it again:",
        "",
        "```",
        command("sweep", config),
        "```",
        "",
    ]
    return "\n".join(lines)


def _table(report: Mapping[str, Any]) -> list[str]:
    """Every cell, the best first."""
    name, winner = report["minimised"], report["winner"]["cell"]
    cells = sorted(report["cells"].items(), key=lambda cell: cell[1]["metrics"].get(name, math.inf))
    columns = list(cells[0][1]["metrics"])
    lines = [
        "| EMA | guidance | solver | steps | evaluations an image | " + " | ".join(columns) + " |",
        "| --- " * (5 + len(columns)) + "|",
    ]
    for cell, found in cells:
        sampler = found["sampler"]
        values = [number(v) for v in found["metrics"].values()]
        if "failed" in found:
            values = [f"failed: {found['failed']}"] + [""] * (len(columns) - 1)
        if cell == winner:
            values[0] = f"**{values[0]}**"
        words = (
            short(found["ema"]), _guidance(report, cell), sampler["solver"],
            str(sampler["steps"]), str(found["network_evaluations"]), *values,
        )  # fmt: skip
        lines.append("| " + " | ".join(words) + " |")
    return lines


def _guidance(report: Mapping[str, Any], cell: str) -> str:
    """A cell's guidance in the words of the grid, which may have asked for it in several ways."""
    scale = report["cells"][cell]["sampler"]["cfg_scale"]
    if scale == 1:
        return "1 (off)"
    asked = [_interval(line["interval"]) for line in report["lines"] if cell in line["cells"]]
    return f"{short(scale)} in {' or '.join(dict.fromkeys(asked))}"


def _interval(ends: Sequence[float]) -> str:
    low, high = map(short, ends)
    return f"({low}, {high})"


def _plain(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value
