"""Model -> the guidance scale, interval, EMA, steps and solver that suit it, in one Ray job.

Every cell of the grid is a small evaluation folder of its own, OUTPUT/cells/<name>, all of them
drawn by one fleet; the winner is then evaluated like any model, in OUTPUT/winner/<name>-<images>.
Cells share their start noise, because image i is addressed by (seed, i): what differs between two
cells is what the settings do, not luck.

Run the same line again to go on: a cell whose result is there is never computed again, and of one
that was cut off only the missing chunks are drawn. The grid itself may change in between: cells
that both grids have are kept. Which cells come next is decided in grid, without Ray.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is slow to import: `--help` shall not wait for it
    import sys

    from pipelines.cli import main

    raise SystemExit(main(["sweep", *sys.argv[1:]]))

import hashlib
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from jitmodel.config import SamplerConfig
from pipelines import evaluation, lease, storage, sweep_report
from pipelines.config import EvaluateConfig, SamplerChoice, SweepConfig, require
from pipelines.drawing import NotFinite, Plan, differences, draw_batch, warn_of_slow_bf16
from pipelines.evaluation import (
    DRAWN_BY,
    PLAN,
    WRITER,
    Card,
    Job,
    SampleWorker,
    explained,
    foreseen,
    make_plan,
    missing_chunks,
    or_mix,
    read_times,
    refuse_another,
    refuse_strangers,
    resize_to,
    stored_plan,
    write_evaluation,
    write_plan,
)
from pipelines.features import Identity, get_extractor, portable_weights
from pipelines.grid import Cell, Line, all_cells, make_lines, most_cells, next_cells, short
from pipelines.meter import duration
from pipelines.models import Source, find_models
from pipelines.pool import Pool, Progress, fleet
from pipelines.reference import Reference, check_match, read_reference
from pipelines.runtime import connect
from pipelines.versions import tool_versions

logger = logging.getLogger(__name__)

RESULT, REPORT = "cell.json", "report.json"
RESULT_FIELDS = frozenset(
    ["metrics", "network_evaluations", "devices", "warnings", "timed_images", "worker_seconds"]
)
REPORT_FIELDS = frozenset(["metrics", "warnings", "identity", "config"])
IDENTITY_FIELDS = frozenset(["plan_sha256", "devices", "timed_images", "worker_hours"])
SCALES = tuple(round(1 + 0.1 * i, 1) for i in range(31))
INTERVALS = ((0.0, 1.0), (0.1, 1.0))
PROBE_IMAGES = 8
"""Images that a CPU draws to tell its speed; a GPU draws a batch."""


class Speed(NamedTuple):
    """What one worker takes, in seconds."""

    evaluation: float
    """To send one image through the network once."""
    features: float
    """To judge one image."""
    device: str


class SweepWorker:
    """A SampleWorker for many cells, which also says how fast it is."""

    def __init__(self, extractor: str, weights: str | bytes) -> None:
        self.worker = SampleWorker(extractor, weights)

    def start(self) -> Card:
        return self.worker.start()

    def run(self, item: tuple[Job, int | None]) -> int | NotFinite | Speed:
        """Images of a chunk; without a chunk, the worker's speed at the job."""
        job, chunk = item
        if chunk is None:
            self.worker.hold(job)
            return measure(self.worker, job.plan)
        return self.worker.run((job, chunk))


def measure(worker: SampleWorker, plan: Plan) -> Speed:
    """How fast a worker draws and judges; the second of two equal tries counts."""
    # Two Euler steps without guidance are two evaluations an image.
    sampler = SamplerConfig(steps=2, solver="euler", cfg_scale=1)
    size = plan.batch if worker.device.type == "cuda" else min(plan.batch, PROBE_IMAGES)
    index = torch.arange(size, device=worker.device)
    for _ in range(2):
        start = time.monotonic()
        pixels = draw_batch(worker.model, plan.model_copy(update={"sampler": sampler}), index)
        pixels.cpu()
        drawn = time.monotonic()
        worker.extractor(pixels)[0].cpu()
        judged = time.monotonic()
    return Speed((drawn - start) / (2 * size), (judged - drawn) / size, worker.card.device)


class Sweep(NamedTuple):
    """All that is known before the first image is drawn."""

    config: SweepConfig
    """With absolute URIs."""
    sources: dict[float, Source]
    lines: list[Line]
    extractor: Identity
    reference: Reference
    drawn_by: dict[str, str]
    """The fields of the plans that say on what and by which programs the cells are drawn, where
    that is not here."""

    def cell_config(self, cell: Cell, output: str, num_images: int) -> EvaluateConfig:
        """The evaluation that a cell is; `jit evaluate` with it draws the same images."""
        shared = {name: getattr(self.config, name) for name in EvaluateConfig.model_fields}
        source = self.sources[cell.ema]
        changes = {
            "model": source.uri,
            "ema": None if source.is_artifact else cell.ema,
            "sampler": SamplerChoice(**cell.sampler.model_dump()),
            "output": output,
            "num_images": num_images,
        }
        return EvaluateConfig(**{**shared, **changes})

    def plan(self, config: EvaluateConfig, cell: Cell, option: str) -> Plan:
        """What a cell draws; the option is the one that chose how many images.

        Raises:
            ValueError: it cannot be carried out.
        """
        source = self.sources[cell.ema]
        resize = resize_to(config, self.reference, source.info.model.image_size)
        plan = make_plan(config, source, self.extractor, resize, option=option)
        return plan.model_copy(update=self.drawn_by)

    def cell_job(self, cell: Cell) -> Job:
        """A cell's folder, and what it shall hold."""
        output = storage.join(self.config.output, "cells", cell.name)
        config = self.cell_config(cell, output, self.config.cell_images)
        plan = self.plan(config, cell, "--cell-images")
        return Job(self.sources[cell.ema], plan, output, mix_devices=config.mix_devices)

    def winner_folder(self, cell: Cell) -> str:
        """Where the winner's evaluation lies if this cell is it, below the output."""
        return f"winner/{cell.name}-{self.config.num_images}"

    def winner_job(self, cell: Cell) -> tuple[Job, EvaluateConfig]:
        """The winner's evaluation, if this cell is it."""
        output = storage.join(self.config.output, self.winner_folder(cell))
        config = self.cell_config(cell, output, self.config.num_images)
        plan = self.plan(config, cell, "--num-images")
        source = self.sources[cell.ema]
        return Job(source, plan, output, config.keep_images, config.mix_devices), config

    def models(self) -> dict[str, dict[str, str]]:
        """URI and digest of the weights of each EMA, by its decay."""
        return {
            short(ema): {"uri": source.uri, "weights_sha256": source.info.weights_sha256}
            for ema, source in self.sources.items()
        }

    def shared(self) -> dict[str, Any]:
        """What must stay as it is for the cells of a folder to be comparable."""
        plan = self.cell_job(self.lines[0].cells[0]).plan
        return plan.model_dump(mode="json", exclude={"sampler", "weights_sha256"})


def run(config: SweepConfig) -> None:
    """Find the best cell of the grid, evaluate it, and report all of it.

    Raises:
        FileNotFoundError: model, reference or extractor weights are not there.
        ValueError: they do not fit each other, or the folder holds another sweep.
        PermissionError: another process writes to the folder.
        StageFailed: the disk is full.
    """
    if config.dry_run:
        print(config.model_dump_json(indent=2))
    sweep = prepare(config)
    stored = stored_sweep(sweep.config.output)
    if stored:
        # What has been drawn is judged anywhere, so what draws matters only for drawing.
        sweep = sweep._replace(drawn_by={field: stored.plan[field] for field in DRAWN_BY})
        refuse_another_sweep(sweep, stored.plan)
        refuse_other_weights(sweep, stored.models)
    if config.dry_run:
        print("\n".join(plan_lines(sweep)))
        return
    if config.plan:
        print("\n".join([*plan_lines(sweep), *time_lines(sweep)]))
        return
    for line in plan_lines(sweep)[:5]:
        logger.info("%s", line)
    output = sweep.config.output
    if not stored:
        connect()
        fleet(config.workers, 1)
    storage.check_writable(output)
    place = storage.join(output, WRITER)
    with explained(output), lease.claim(place) as held:
        with ExitStack() as stack:
            crew = Crew(sweep, stack, held)
            if not stored:
                sweep = sweep._replace(drawn_by={"device": crew.device})
            content = {
                "plan": sweep.shared(),
                "models": {**(stored.models if stored else {}), **sweep.models()},
                "config": config.model_dump(mode="json"),
                "versions": tool_versions(),
            }
            storage.write_json(storage.join(output, PLAN), content)
            results = search(sweep, crew)
            winner = best(results, sweep.extractor.distance)
            logger.info("winner: %s, evaluated at %d images", winner.name, config.num_images)
            judged = evaluate_winner(sweep, winner, crew)
        held.check()
        sweep_report.write(output, report(sweep, results, winner, judged))
        storage.delete(place)
    logger.info("report: %s", storage.join(output, "report.md"))


def prepare(config: SweepConfig) -> Sweep:
    """Look at everything that the sweep needs; nothing is drawn.

    Raises:
        FileNotFoundError: something is not there.
        ValueError: something does not fit.
    """
    require(config, "models" if config.models else "model", "reference", "output")
    refuse_strangers(config.output)
    extractor = get_extractor(config.extractor, config.weights).identity
    reference = read_reference(config.reference)
    grid, fixed = config.grid, config.sampler
    emas = grid.ema or (() if config.ema is None else (config.ema,))
    sources = find_models(config.models or (config.model,), emas)
    info = next(iter(sources.values())).info
    recommended = fixed.over(info.sampler)
    lines = make_lines(
        sources,
        grid.solver or (recommended.solver,),
        grid.steps or (recommended.steps,),
        grid.cfg_interval or ((fixed.cfg_interval,) if fixed.cfg_interval else INTERVALS),
        grid.cfg_scale or (SCALES if fixed.cfg_scale is None else (fixed.cfg_scale,)),
    )
    config = config.model_copy(update={"output": storage.absolute(config.output)})
    sweep = Sweep(config, sources, lines, extractor, reference, {})
    plan = sweep.cell_job(lines[0].cells[0]).plan
    sweep.winner_job(lines[0].cells[0])
    check_match(reference, extractor, plan.image_size, info.model.num_classes, info.classes)
    for warning in foreseen(config.num_images, info.classes, reference, extractor):
        logger.warning("%s", warning)
    return sweep


def plan_lines(sweep: Sweep) -> list[str]:
    """Cells, images and network evaluations of a sweep, in words; then the cells themselves."""
    config, lines = sweep.config, sweep.lines
    cells = all_cells(lines)
    most = most_cells(lines, config.search)
    axes: dict[str, set[Any]] = {
        "EMA": {line.ema for line in lines},
        "solver": {line.solver for line in lines},
        "steps": {line.steps for line in lines},
        "interval": {line.interval for line in lines},
        "scale": {scale for line in lines for scale in line.scales},
    }
    shared = sum(len(line.cells) for line in lines) - len(cells)
    evaluations = {cell: sweep.cell_job(cell).plan.network_evaluations() for cell in cells}
    costly = sum(sorted(evaluations.values())[-most:]) * config.cell_images
    at_most = "" if most == len(cells) else "at most "
    saved = len(cells) - most
    found = [
        f"grid: {len(cells)} cells of {config.cell_images:,} images, "
        + " x ".join(f"{len(values)} {name}" for name, values in axes.items())
        + (f", less {shared} that draw what another one draws" if shared else ""),
        f"search: {config.search}, {at_most}{most} cells, {most * config.cell_images:,} images, "
        f"{costly:,} network evaluations"
        + (
            f"; saves at least {saved * config.cell_images:,} images "
            f"({saved / len(cells):.0%} of the grid)"
            if saved
            else ""
        ),
        f"winner: {config.num_images:,} images, at most "
        f"{max(evaluations.values()) * config.num_images:,} network evaluations",
        f"judged by {sweep.extractor.distance} against {sweep.reference.count or 'unknown'} images",
    ]
    extractor = sweep.extractor
    numbers = extractor.num_features + extractor.num_logits + extractor.num_spatial
    images = most * config.cell_images + config.num_images
    found.append(f"kept: {at_most}{4 * numbers * images / 1e9:.3g} GB of features")
    return [*found, *(f"  {cell.name}: {evaluations[cell]} an image" for cell in cells)]


def time_lines(sweep: Sweep) -> list[str]:
    """How long the sweep will take, by the measured speed of one worker of the cluster."""
    connect()
    config = sweep.config
    cells = all_cells(sweep.lines)
    workers, gpu = fleet(config.workers, most_chunks(sweep))
    weights = portable_weights(config.extractor, config.weights)
    with Pool(SweepWorker, config.extractor, weights, workers=1, gpu=gpu) as pool:
        job = sweep._replace(drawn_by={}).cell_job(cells[0])._replace(mix_devices=True)
        (_, speed), *_ = pool.map([(job, None)])
    each = sorted(sweep.cell_job(cell).plan.network_evaluations() for cell in cells)
    found = {cell: stored_result(sweep, sweep.cell_job(cell)) for cell in cells}
    name = sweep.extractor.distance
    there = {cell: value(result, name) for cell, result in found.items() if result}
    left = most_cells(sweep.lines, config.search, there)
    images = left * config.cell_images + config.num_images
    evaluations = sum(each[-left:] if left else []) * config.cell_images
    evaluations += each[-1] * config.num_images
    seconds = (evaluations * speed.evaluation + images * speed.features) / workers
    return [
        f"time: at most {duration(seconds)} of drawing by {workers} workers, {len(there)} cells "
        f"being there already (measured on {speed.device}: {1e3 * speed.evaluation:.3g} ms a "
        f"network evaluation, {1e3 * speed.features:.3g} ms to judge an image)"
    ]


def most_chunks(sweep: Sweep) -> int:
    """Chunks that can be drawn side by side, at most: those of the winner, or of all cells."""
    config = sweep.config
    images = config.batch * config.chunk_batches
    cells = most_cells(sweep.lines, config.search) * -(-config.cell_images // images)
    return max(cells, -(-config.num_images // images))


class Stored(NamedTuple):
    """What a sweep's folder was begun for."""

    plan: dict[str, Any]
    """What its cells share."""
    models: dict[str, dict[str, str]]
    """As Sweep.models gives them, of all grids that the folder has had."""


def stored_sweep(output: str) -> Stored | None:
    """What a folder was begun for; None if no sweep began there.

    Raises:
        ValueError: there is something else in its place.
    """
    uri = storage.join(output, PLAN)
    if not storage.exists(uri):
        return None
    try:
        content = storage.read_json(uri)
        plan, models = content["plan"], dict(content["models"])
        return Stored(
            {**plan, **{field: plan[field] for field in DRAWN_BY}},
            {ema: {key: models[ema][key] for key in ("uri", "weights_sha256")} for ema in models},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{uri} is not a plan that this version reads: choose another --output"
        ) from error


def refuse_another_sweep(sweep: Sweep, stored: dict[str, Any]) -> None:
    """Refuse to mix cells that cannot be compared.

    Raises:
        ValueError: naming each field that differs, with both values.
    """
    lines = differences(stored, sweep.shared())
    if lines:
        raise ValueError(
            f"{storage.join(sweep.config.output, PLAN)} holds another sweep: {'; '.join(lines)}. "
            f"Choose another --output, or the same settings{or_mix(lines)}."
        )


def refuse_other_weights(sweep: Sweep, stored: dict[str, dict[str, str]]) -> None:
    """Refuse other weights under the name of an EMA: a run that still trains has a newer checkpoint
    now.

    Raises:
        ValueError: naming the model that the cells were drawn with.
    """
    for ema, here in sweep.models().items():
        there = stored.get(ema, here)
        if there["weights_sha256"] != here["weights_sha256"]:
            raise ValueError(
                f"{sweep.config.output} was begun with the EMA of decay {ema} of {there['uri']} "
                f"(weights {there['weights_sha256'][:16]}), and that of {here['uri']} has other "
                f"weights ({here['weights_sha256'][:16]}): name the first as --model, or choose "
                "another --output"
            )


class Crew:
    """The workers of a sweep, started when they are first needed and then kept."""

    def __init__(self, sweep: Sweep, stack: ExitStack, held: lease.Lease) -> None:
        self.config, self.stack, self.held = sweep.config, stack, held
        self.most = most_chunks(sweep)

    @cached_property
    def pool(self) -> Pool:
        """The workers, the first of which has started."""
        config = self.config
        connect()
        workers, gpu = fleet(config.workers, self.most)
        if not gpu:
            warn_of_slow_bf16(config.precision)
        weights = portable_weights(config.extractor, config.weights)
        pool = Pool(SweepWorker, config.extractor, weights, workers=workers, gpu=gpu)
        return self.stack.enter_context(pool)

    @property
    def device(self) -> str:
        """Kind of device that the first worker has."""
        device: str = self.pool.started[0].device
        return device

    def check(self, sweep: Sweep) -> None:
        """Refuse to go on with programs or devices that round differently.

        Raises:
            ValueError: naming both.
        """
        device = sweep.drawn_by["device"] if self.config.mix_devices else self.device
        refuse_another_sweep(sweep._replace(drawn_by={"device": device}), sweep.shared())

    def draw(self, sweep: Sweep, jobs: Iterable[Job]) -> Iterator[tuple[Job, str]]:
        """Draw what is missing of these jobs.

        Yields:
            Each job once it is complete, or given up with the reason why.
        """
        missing = {}
        for job in jobs:
            stored = stored_plan(job.output)
            if stored:
                refuse_another(job, stored)
            missing[job.output] = (
                job,
                missing_chunks(job) if stored else list(range(job.plan.num_chunks)),
            )
        items = [(job, chunk) for job, chunks in missing.values() for chunk in chunks]
        left = Counter(job.output for job, _ in items)
        yield from ((job, "") for job, chunks in missing.values() if not chunks)
        if not items:
            return
        self.check(sweep)
        for job, chunks in missing.values():
            if chunks:
                write_plan(job, {})
        total = sum(job.plan.num_images for job, _ in missing.values())
        to_draw = sum(len(job.plan.rows(chunk)) for job, chunk in items)
        progress = Progress("drew", total, total - to_draw)
        failed: set[str] = set()
        for (job, _), found in self.pool.map(i for i in items if i[0].output not in failed):
            if isinstance(found, NotFinite):  # which shall not end the search
                if job.output not in failed:
                    failed.add(job.output)
                    yield job, str(found)
                continue
            self.held.check()
            progress.add(found)
            left[job.output] -= 1
            if not left[job.output]:
                yield job, ""


def search(sweep: Sweep, crew: Crew) -> dict[Cell, dict[str, Any]]:
    """Results of the cells that the search looks at, in the order of computing."""
    name = sweep.extractor.distance
    results: dict[Cell, dict[str, Any]] = {}
    rounds = 0
    while cells := next_cells(
        sweep.lines, {c: value(r, name) for c, r in results.items()}, sweep.config.search
    ):
        rounds += 1
        logger.info("round %d: %d cells", rounds, len(cells))
        results |= compute(sweep, cells, crew)
    return results


def value(result: Mapping[str, Any], name: str) -> float:
    """What the search minimises; infinite for a cell that failed."""
    found: float = result["metrics"].get(name, math.inf)
    return found


def compute(sweep: Sweep, cells: list[Cell], crew: Crew) -> dict[Cell, dict[str, Any]]:
    """Results of these cells: those that are stored, and the others once they are drawn.

    A cell is judged in a thread, while the workers draw the next one.
    """
    jobs = {cell: sweep.cell_job(cell) for cell in cells}
    found = {cell: stored_result(sweep, job) for cell, job in jobs.items()}
    by_output = {jobs[cell].output: cell for cell, result in found.items() if not result}
    if len(by_output) < len(cells):
        logger.info("%d of %d cells are there already", len(cells) - len(by_output), len(cells))
    judged: dict[Cell, Future[dict[str, Any]]] = {}
    with ThreadPoolExecutor(1) as thread:
        for job, failure in crew.draw(sweep, (jobs[cell] for cell in by_output.values())):
            cell = by_output[job.output]
            judged[cell] = thread.submit(judge_cell, sweep, cell, job, failure)
    return {cell: result or judged[cell].result() for cell, result in found.items()}


def stored_result(sweep: Sweep, job: Job) -> dict[str, Any] | None:
    """The result of a cell, if it is whole, and about this plan and reference."""
    found = _whole(storage.join(job.output, RESULT), RESULT_FIELDS)
    return found if found and _wanted(sweep, job).items() <= found.items() else None


def _whole(uri: str, fields: frozenset[str]) -> dict[str, Any] | None:
    """A JSON file with these fields; torn or damaged is as good as missing."""
    try:
        found = storage.read_json(uri)
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and fields <= found.keys() else None


def _wanted(sweep: Sweep, job: Job) -> dict[str, str]:
    """What a result must be about to be the one of this job."""
    return {"plan_sha256": job.plan.sha256, "reference_sha256": sweep.reference.sha256}


def judge_cell(sweep: Sweep, cell: Cell, job: Job, failure: str) -> dict[str, Any]:
    """Judge and publish a cell in which no chunk is missing, or that it failed.

    Only what guides the search and is cheap: distance, its interval, and the Inception score. The
    winner gets every metric.
    """
    timed_images, worker_seconds = read_times(job)
    result: dict[str, Any] = {
        "format_version": 1,
        "ema": cell.ema,
        "sampler": cell.sampler.model_dump(mode="json"),
        "metrics": {},
        "network_evaluations": job.plan.network_evaluations(),
        "plan_sha256": job.plan.sha256,
        "weights_sha256": job.plan.weights_sha256,
        "reference_sha256": sweep.reference.sha256,
        "devices": [],
        "warnings": [],
        "timed_images": timed_images,
        "worker_seconds": worker_seconds,
    }
    if failure:
        result["failed"] = failure
        logger.warning("%s failed: %s", cell.name, failure)
    else:
        drawn = evaluation.read_drawn(job)
        real = sweep.reference.real._replace(features=None, spatial=None)
        reference = replace(sweep.reference, real=real)
        result["metrics"] = evaluation.judge(drawn, reference, sweep.extractor)
        result["pixels_sha256"] = drawn.pixels_sha256
        result["devices"] = drawn.devices
        result["warnings"] = evaluation.warnings(job, drawn, sweep.reference, sweep.extractor)
        name = sweep.extractor.distance
        logger.info("%s: %s %.4g", cell.name, name, value(result, name))
    storage.write_json(storage.join(job.output, RESULT), result)
    return result


def best(results: dict[Cell, dict[str, Any]], name: str) -> Cell:
    """The cell with the least distance; of equals, the one that costs least.

    Raises:
        ValueError: all cells failed.
    """

    def rank(cell: Cell) -> tuple[float, int, str]:
        found = results[cell]
        return value(found, name), found["network_evaluations"], cell.name

    winner = min(results, key=rank)
    if "failed" in results[winner]:
        raise ValueError(
            f"all {len(results)} cells failed, such as {winner.name}: {results[winner]['failed']}. "
            "Look at the model, or choose another --grid"
        )
    return winner


def evaluate_winner(sweep: Sweep, cell: Cell, crew: Crew) -> dict[str, Any]:
    """The report of the winner's evaluation; what is there is kept.

    Raises:
        ValueError: an image is not finite, though none of the cell's was.
    """
    job, config = sweep.winner_job(cell)
    found = _whole(storage.join(job.output, REPORT), REPORT_FIELDS)
    about, asked = ((found or {}).get(name) for name in ("identity", "config"))
    if found and isinstance(about, dict) and isinstance(asked, dict):
        is_same = about.keys() >= IDENTITY_FIELDS and (_wanted(sweep, job).items() <= about.items())
        is_kept = asked.get("keep_images") == config.keep_images
        if is_same and is_kept and not missing_chunks(job):
            return found
    for _, failure in crew.draw(sweep, [job]):
        if failure:
            raise ValueError(
                f"the winner {cell.name} failed beyond its first {sweep.config.cell_images} "
                f"images: {failure}. Leave its scale out of the grid"
            )
    return write_evaluation(job, config, sweep.reference, sweep.extractor)


def report(
    sweep: Sweep,
    results: dict[Cell, dict[str, Any]],
    winner: Cell,
    judged: dict[str, Any],
) -> dict[str, Any]:
    """What report.json holds: all that the figure, a quotation and a repetition need."""
    config, name = sweep.config, sweep.extractor.distance
    if not config.models:  # the checkpoint, not the run, which training may give a newer one
        (uri,) = {source.uri for source in sweep.sources.values()}
        config = config.model_copy(update={"model": uri})
    cells = all_cells(sweep.lines)
    about, drawn = judged["identity"], results.values()
    failed = [cell.name for cell, found in results.items() if "failed" in found]
    warnings = [w for found in (*drawn, judged) for w in found["warnings"]]
    if failed:
        warnings.append(
            f"{len(failed)} cells drew images that are not finite, and count as infinitely far: "
            f"{', '.join(failed)}"
        )
    plans = "".join(sweep.cell_job(cell).plan.sha256 for cell in cells)
    shared = {k: v for k, v in about.items() if k not in ("sampler", "ema_decay", "model")}
    return {
        "format_version": 1,
        "minimised": name,
        "winner": {
            "cell": winner.name,
            "ema": winner.ema,
            "sampler": winner.sampler.model_dump(mode="json"),
            "num_images": config.num_images,
            "metrics": judged["metrics"],
            "folder": sweep.winner_folder(winner),
        },
        "search": {
            "kind": config.search,
            "cells": len(results),
            "grid": len(cells),
            "cell_images": config.cell_images,
            "images_saved": (len(cells) - len(results)) * config.cell_images,
        },
        "cells": {cell.name: results[cell] for cell in cells if cell in results},
        "lines": [
            {
                "ema": line.ema,
                "solver": line.solver,
                "steps": line.steps,
                "interval": line.interval,
                "scales": line.scales,
                "cells": [cell.name for cell in line.cells],
            }
            for line in sweep.lines
        ],
        "warnings": list(dict.fromkeys(warnings)),
        "identity": {
            **shared,
            "plan_sha256": hashlib.sha256(plans.encode()).hexdigest(),
            "winner_plan_sha256": about["plan_sha256"],
            "weights_sha256": {
                short(ema): source.info.weights_sha256 for ema, source in sweep.sources.items()
            },
            "models": {short(ema): source.uri for ema, source in sweep.sources.items()},
            "devices": sorted({d for found in (*drawn, about) for d in found["devices"]}),
            "images": len(results) * config.cell_images + config.num_images,
            "timed_images": sum(found["timed_images"] for found in (*drawn, about)),
            "worker_hours": about["worker_hours"]
            + sum(found["worker_seconds"] for found in drawn) / 3600,
        },
        "config": config.model_dump(mode="json"),
    }
