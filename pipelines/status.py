"""`jit status`: what lies at a URI, and how far it is.

Every stage's folder says what it is by the names of its files, so nothing has to be running, and
nothing is written. A preparation, run, evaluation or sweep that goes on, or that was cut off, is
told by what it has published so far.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is slow to import: `--help` shall not wait for it
    import sys

    from pipelines.cli import main

    raise SystemExit(main(["status", *sys.argv[1:]]))

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import yaml

from pipelines import storage
from pipelines.config import StatusConfig, require
from pipelines.report import headline
from pipelines.shards import MANIFEST, dataset_folders, read_manifest


def run(config: StatusConfig) -> None:
    """Print what lies at a URI.

    Raises:
        FileNotFoundError: there is nothing, or nothing that a stage made.
        ValueError: a file of the folder is damaged.
    """
    require(config, "uri")
    print("\n".join(describe(storage.absolute(config.uri))))


def describe(uri: str) -> list[str]:
    """Lines about what lies at a URI; see `run`."""
    if not storage.exists(uri):
        raise FileNotFoundError(storage.NOTHING_THERE.format(uri=uri))
    for name, look in KINDS:
        if storage.exists(storage.join(uri, name)):
            try:
                return look(uri)
            except (KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
                what = " ".join(str(error).split())
                raise ValueError(
                    f"{storage.join(uri, name)}, or a file beside it, is damaged or of another "
                    f"version: {type(error).__name__} {what}"
                ) from error
    sizes = {f: storage.exists(storage.join(f, MANIFEST)) for f in dataset_folders(uri)}
    if any(sizes.values()):
        lines = []
        for folder, is_finished in sizes.items():
            told = describe(folder) if is_finished else ["not finished: it has no manifest"]
            lines += [f"{folder}:", *told]
        return lines
    folders, files = storage.list_folder(uri)
    there = [f"{folder}/" for folder in folders] + [file.relative for file in files]
    raise FileNotFoundError(
        f"{uri} is no folder of a stage, which holds one of "
        f"{', '.join(name for name, _ in KINDS)}. It holds {', '.join(there[:8]) or 'nothing'}"
        f"{' ...' if len(there) > 8 else ''}: name the folder that a stage wrote."
    )


def _json(uri: str, *parts: str) -> Any:
    """A JSON file of a folder; None where there is none."""
    place = storage.join(uri, *parts)
    return storage.read_json(place) if storage.exists(place) else None


def _files(uri: str, *parts: str) -> list[str]:
    """Names in a subfolder; none where there is none."""
    place = storage.join(uri, *parts)
    return [f.relative for f in storage.list_folder(place)[1]] if storage.exists(place) else []


def _dataset(uri: str) -> list[str]:
    manifest = read_manifest(uri)
    size = sum(shard.bytes for shard in manifest.shards)
    return [
        f"dataset folder, finished: {manifest.num_rows:,} images of {manifest.image_size} px in "
        f"{len(manifest.classes):,} classes, {manifest.num_rejects:,} rejects",
        f"  {len(manifest.shards):,} shards, {manifest.encoding}, {size / 1e6:,.1f} MB, "
        f"fingerprint {manifest.fingerprint}",
    ]


def _preparation(uri: str) -> list[str]:
    job = _json(uri, "_work", "job.json")
    if job is None:
        return ["preparation, not finished: the source is being listed"]
    entries = [name for name in _files(uri, "_work", "shards") if name.endswith(".json")]
    shards = -(-job["num_images"] // job["rows_per_shard"])
    return [
        f"preparation, not finished: {len(entries):,} of {shards:,} shards, "
        f"{job['num_images']:,} images",
        "  the same `jit prepare` line again goes on",
    ]


def _run(uri: str) -> list[str]:
    config = yaml.safe_load(storage.read_bytes(storage.join(uri, "config.yaml")))
    steps = [line for line in _metrics(uri) if "loss" in line]
    seen = steps[-1]["images_seen"] if steps else 0
    total = config["total_images"]
    lines = [f"run folder: {seen:,} of {total:,} images ({seen / total:.0%})"]
    if steps:
        shown = {
            name: steps[-1].get(name) for name in ("epoch", "loss", "learning_rate", "images_per_s")
        }
        lines.append("  " + "   ".join(f"{k} {v:.4g}" for k, v in shown.items() if v is not None))
    latest = _json(uri, "latest.json")
    if latest:
        where = f"{latest['checkpoint']} ({latest['images_seen']:,} images)"
        lines.append(f"  newest checkpoint: {where}")
    else:
        lines.append("  no checkpoint yet")
    scores = [name for name in _files(uri, "validations") if name.startswith("step_")]
    for name in sorted(scores)[-3:]:
        score = _json(uri, "validations", name)
        lines.append(f"  {score['metric']} {score['value']:.4g} at {score['images_seen']:,} images")
    return lines


def _metrics(uri: str) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl: a kill may have torn the last, a lost power any."""
    place = storage.join(uri, "metrics.jsonl")
    found: list[dict[str, Any]] = []
    for line in storage.read_bytes(place).splitlines() if storage.exists(place) else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def _checkpoint(uri: str) -> list[str]:
    meta = _json(uri, "meta.json")
    decays = ", ".join(f"{decay:g}" for decay in meta["config"]["optimizer"]["ema_decays"])
    return [f"checkpoint: {meta['images_seen']:,} images seen, EMAs {decays}"]


def _artifact(uri: str) -> list[str]:
    info = _json(uri, "config.json")
    model = info["model"]
    return [
        f"artifact: {model['image_size']} px, patch {model['patch_size']}, width "
        f"{model['hidden_size']}, depth {model['depth']}, {model['num_classes']:,} classes",
        f"  EMA {info['ema_decay']:g} of run {info['run'] or '(unknown)'} after "
        f"{info['images_seen']:,} images; weights {info['weights_sha256'] or '(not checked)'}",
    ]


def _evaluation(uri: str) -> list[str]:
    report = _json(uri, "report.json")
    if storage.exists(storage.join(uri, "cells")):
        cells = storage.list_folder(storage.join(uri, "cells"))[0]
        done = sum(storage.exists(storage.join(uri, "cells", c, "cell.json")) for c in cells)
        if report is None:
            return [f"sweep, not finished: {done:,} cells judged, {len(cells):,} begun"]
        winner = report["winner"]
        return [
            f"sweep, finished: {report['search']['cells']:,} of {report['search']['grid']:,} "
            f"cells; winner {winner['cell']} at {winner['num_images']:,} images",
            f"  {headline(winner['metrics'])}",
        ]
    plan = _json(uri, "plan.json")["plan"]
    if report is not None:
        return [
            f"evaluation folder, finished: {plan['num_images']:,} images",
            f"  {headline(report['metrics'])}",
        ]
    if "num_images" not in plan:
        return ["sweep, not finished: no cell begun"]
    chunks = -(-plan["num_images"] // (plan["batch"] * plan["chunk_batches"]))
    parts = [name for name in _files(uri, "features") if name.endswith(".parquet")]
    return [
        f"evaluation folder, not finished: {len(parts):,} of {chunks:,} chunks of "
        f"{plan['num_images']:,} images",
        "  the same `jit evaluate` line again goes on",
    ]


KINDS: tuple[tuple[str, Callable[[str], list[str]]], ...] = (
    ("manifest.json", _dataset),
    ("_work", _preparation),
    ("config.yaml", _run),
    ("meta.json", _checkpoint),
    ("config.json", _artifact),
    ("plan.json", _evaluation),
)
"""The file or folder by which a stage's folder is told, and who describes it."""
