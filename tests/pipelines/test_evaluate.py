"""An evaluation is the same for any fleet, survives deaths, and refuses what does not fit."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from jitmodel.artifact import ArtifactInfo, save_artifact
from jitmodel.config import ClassInfo, FlowConfig, ModelConfig, SamplerConfig
from jitmodel.model import JiT
from jitmodel.sampler import guidance_acts, times
from pipelines import evaluate, lease, shards, storage
from pipelines.config import EvaluateConfig, ReferenceConfig, SamplerChoice
from pipelines.drawing import NotFinite, Plan, device_name, draw_batch, part_uri, read_part
from pipelines.evaluate import run, run_reference
from pipelines.evaluation import Card, Job, SampleWorker
from pipelines.features import standard_inception
from pipelines.images import encode
from pipelines.models import find_model
from pipelines.reference import is_kept, read_reference
from tests.pipelines.conftest import FaultyStore, replaced

MODEL = ModelConfig(
    image_size=16, patch_size=4, hidden_size=32, depth=2, num_heads=2, bottleneck_dim=8,
    in_context_len=2, in_context_start=1, num_classes=4,
)  # fmt: skip
CLASSES = tuple(ClassInfo(name=name) for name in ("cat", "dog", "fox", "owl"))


def make_artifact(
    folder: Path, shape: ModelConfig = MODEL, broken_class: int | None = None, **changes: object
) -> Path:
    """A small untrained model whose output depends on every weight."""
    model = JiT(shape)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    if broken_class is not None:
        model.y_embedder.embedding_table.weight.data[broken_class] = torch.nan
    info = ArtifactInfo(
        model=shape, sampler=SamplerConfig(steps=3), classes=CLASSES, ema_decay=0.9999
    )
    save_artifact(folder, model.state_dict(), info.model_copy(update=changes))
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("model") / "artifact")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder of 3 shards with 14, 14 and 12 images of 16 pixels."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    infos = []
    for shard, rows in enumerate((14, 14, 12)):
        images = rng.integers(0, 256, (rows, 4, 4, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
        path = folder / shards.shard_name(shard, 3)
        info = shards.write_shard(
            path,
            [
                shards.Row(encode(im, "png"), "", i % 4, 14 * shard + i)
                for i, im in enumerate(images)
            ],
            CLASSES,
            rows_per_group=5,
        )
        infos.append(info.model_copy(update={"file": f"data/{path.name}"}))
    manifest = shards.Manifest(
        fingerprint=shards.fingerprint(CLASSES, infos), image_size=16, encoding="png",
        num_rows=40, num_rejects=0, rows_per_class=[11, 11, 9, 9], classes=list(CLASSES),
        shards=infos, config={}, versions={}, source_sha256="",
    )  # fmt: skip
    (folder / shards.MANIFEST).write_text(manifest.model_dump_json())
    return folder


@pytest.fixture(scope="module")
def reference(ray_cluster: None, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    run_reference(ReferenceConfig(data=str(dataset), output=str(path), workers=2))
    return path


def config(artifact: object, reference: object, output: Path, **changes: object) -> EvaluateConfig:
    """24 images in 6 parts of two batches of two."""
    fields = {
        "model": str(artifact), "reference": str(reference), "output": str(output),
        "num_images": 24, "batch": 2, "chunk_batches": 2, "precision": "fp32", "workers": 1,
    }  # fmt: skip
    return EvaluateConfig(**{**fields, **changes})


def a_plan(**changes: object) -> Plan:
    fields = {
        "num_images": 24, "batch": 5, "chunk_batches": 2, "seed": 0, "precision": "fp32",
        "sampler": SamplerConfig(steps=2), "model": MODEL, "flow": FlowConfig(),
        "weights_sha256": "0", "extractor": {"name": "none"}, "device": "cpu", "torch": "2",
        "code": "0",
    }  # fmt: skip
    return Plan(**{**fields, **changes})


def test_a_plan_covers_every_image_once_and_spreads_the_classes():
    plan = a_plan()

    rows = [index for chunk in range(plan.num_chunks) for index in plan.rows(chunk)]

    assert [len(plan.rows(chunk)) for chunk in range(plan.num_chunks)] == [10, 10, 4]
    assert rows == list(range(24))
    assert np.bincount([plan.label(i) for i in rows]).tolist() == [6, 6, 6, 6]
    assert a_plan(num_images=4000).is_shown(31)  # eight of each class
    assert not a_plan(num_images=4000).is_shown(32)
    many = a_plan(num_images=50_000, model=MODEL.model_copy(update={"num_classes": 1000}))
    shown = [i for i in range(50_000) if many.is_shown(i)]
    assert sorted({many.label(i) for i in shown}) == list(range(0, 1000, 100))
    assert len(shown) == 80


def test_a_plan_counts_the_network_evaluations_of_an_image():
    # Two Heun steps: t = 0 alone, then 0.5 guided; the last step is Euler at 0.5, guided.
    assert a_plan().network_evaluations() == 1 + 2 + 2
    # 50 Heun steps are 99 times; 0.0 (once) and 0.02 .. 0.1 (twice each) are not guided.
    paper = SamplerConfig(steps=50, solver="heun", cfg_scale=2.9, cfg_interval=(0.1, 1.0))
    assert a_plan(sampler=paper).network_evaluations() == 2 * 99 - 11
    one, low = torch.ones(1), torch.tensor([0.1])
    assert not guidance_acts(times(50)[5:6], 2.9 * one, low, one).any()  # 5/50 is not above 0.1
    assert guidance_acts(times(50)[6:7], 2.9 * one, low, one).all()
    off = SamplerConfig(steps=50, solver="euler", cfg_scale=1.0)
    assert a_plan(sampler=off).network_evaluations() == 50


def test_a_plan_that_cannot_be_carried_out_is_refused():
    with pytest.raises(ValueError, match=r"23 images cannot be spread evenly over 4 .* 20 or 24"):
        a_plan(num_images=23).check()
    with pytest.raises(ValueError, match="the model draws 1 channels"):
        a_plan(model=MODEL.model_copy(update={"in_channels": 1})).check()


def test_a_kind_of_cpu_is_told_by_what_decides_how_it_multiplies(monkeypatch: pytest.MonkeyPatch):
    cpu = torch.device("cpu")
    here = device_name(cpu)
    can = torch.cpu.get_capabilities()

    for flag in ("avx512_bf16", "amx_bf16"):
        assert (flag in here.split()) == can.get(flag, False)
    if can["architecture"] == "x86_64":  # MKL multiplies fp32 by vendor
        assert here.split()[1] in ("GenuineIntel", "AuthenticAMD")
    of_one_processor = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_CPU_ISA_HINTS")
    for variable in (*of_one_processor, "ONEDNN_DEFAULT_FPMATH_MODE", "MKL_CBWR"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "AVX2")
            assert device_name(cpu) == f"{here} {variable}=AVX2"


def test_an_image_that_is_not_finite_is_named():
    model = JiT(MODEL).eval()
    with torch.no_grad():
        model.y_embedder.embedding_table.weight[2] = torch.nan  # class 2 is broken

    with pytest.raises(ValueError, match="image 6 of class 2 is not finite"):
        draw_batch(model, a_plan(), torch.arange(4, 8))


def test_the_subset_of_a_reference_is_spread_evenly():
    kept = is_kept(np.arange(25_000), 25_000)
    assert kept.sum() == 10_000
    assert kept.reshape(5, -1).sum(1).tolist() == [2000] * 5
    assert is_kept(np.arange(40), 40).all()
    assert is_kept(np.arange(40), 40, most=8).reshape(8, 5).sum(1).tolist() == [1] * 8
    assert not is_kept(np.arange(40), 40, most=0).any()


@pytest.mark.ray
def test_a_reference_is_the_same_file_for_any_fleet(dataset: Path, reference: Path, tmp_path: Path):
    alone = tmp_path / "alone.npz"
    run_reference(ReferenceConfig(data=str(dataset), output=str(alone), workers=1, num_images=40))

    assert alone.read_bytes() == reference.read_bytes()
    found = read_reference(str(reference))
    assert found.identity is not None
    assert found.real.features is not None
    assert found.identity.num_images == found.count == len(found.real.features) == 40
    features = found.real.features.astype(np.float64)
    np.testing.assert_allclose(found.real.pooled.mean, features.mean(0))
    np.testing.assert_allclose(
        found.real.pooled.covariance, np.cov(features, rowvar=False), atol=1e-9
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.npz"]  # no pieces are left


class KillOne(logging.Handler):
    """Kills the first worker that started, as soon as the first chunk is drawn."""

    victim: int | None = None
    killed = False

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith("worker: process ") and self.victim is None:
            self.victim = int(text.split()[2])
        if text.startswith("drew ") and self.victim and not self.killed:
            self.killed = True
            os.kill(self.victim, signal.SIGKILL)


@pytest.mark.ray
def test_a_chunk_whose_worker_died_before_it_answered_is_not_drawn_again(
    artifact: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output, victim = tmp_path / "output", tmp_path / "victim"

    class DiesOnce(SampleWorker):
        def run(self, item: tuple[Job, int]) -> int:
            images = super().run(item)
            if not victim.exists():
                part = Path(part_uri(item[0].output, item[1]))
                victim.write_text(f"{part.name} {part.stat().st_mtime_ns}")
                os.kill(os.getpid(), signal.SIGKILL)
            return images

    monkeypatch.setattr("pipelines.evaluate.SampleWorker", DiesOnce)
    run(config(artifact, reference, output, workers=1))

    name, written = victim.read_text().split()
    assert (output / "features" / name).stat().st_mtime_ns == int(written)
    assert (output / "report.json").exists()


@pytest.mark.ray
def test_any_fleet_draws_the_same_bytes_whoever_dies_and_a_second_run_draws_what_is_missing(
    artifact: Path,
    reference: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    caplog.set_level(logging.INFO)
    one, three = tmp_path / "one", tmp_path / "three"

    run(config(artifact, reference, one, workers=1))
    killer = KillOne()
    logging.getLogger("pipelines").addHandler(killer)
    run(config(artifact, reference, three, workers=3, keep_images="parquet"))
    logging.getLogger("pipelines").removeHandler(killer)

    assert killer.killed
    assert "a worker died" in caplog.text
    parts = sorted(path.name for path in (one / "features").iterdir())
    assert len(parts) == 6
    for name in parts:
        assert (one / "features" / name).read_bytes() == (three / "features" / name).read_bytes()
    report = json.loads((one / "report.json").read_text())
    assert (
        report["identity"]["pixels_sha256"]
        == (json.loads((three / "report.json").read_text())["identity"]["pixels_sha256"])
    )
    assert report["identity"]["devices"] == [device_name(torch.device("cpu"))]

    # The numbers carry the extractor's name, and the bias of few images is said.
    assert {"FD-efflite0", "IS-efflite0_std", "KID-efflite0", "recall-efflite0_k5"} <= set(
        report["metrics"]
    )
    assert "24 drawn images in 1280 dimensions" in report["warnings"][0]
    page = (one / "report.md").read_text()
    assert f"--model {artifact}" in page
    assert report["identity"]["pixels_sha256"] in page
    with Image.open(one / "report.png") as picture:
        assert picture.width > 6 * 64

    # Kept images are the ones that were judged, in the Hub's convention.
    kept = pq.read_table(three / "images" / "part-00003.parquet").to_pylist()
    assert [row["id"] for row in kept] == [12, 13, 14, 15]
    with Image.open(io.BytesIO(kept[0]["image"]["bytes"])) as image:
        assert image.size == (16, 16)

    # One part is lost, one is damaged: only these two are drawn again, to the same bytes.
    before = {name: (one / "features" / name).read_bytes() for name in parts}
    times = {name: (one / "features" / name).stat().st_mtime_ns for name in parts}
    assert not (one / "writer").exists()
    (one / "features" / parts[1]).unlink()
    damaged = bytearray(before[parts[4]])
    damaged[len(damaged) // 2] ^= 1
    (one / "features" / parts[4]).write_bytes(damaged)
    caplog.clear()

    run(config(artifact, reference, one, workers=2))

    assert {name: (one / "features" / name).read_bytes() for name in parts} == before
    again = {name for name in parts if (one / "features" / name).stat().st_mtime_ns != times[name]}
    assert again == {parts[1], parts[4]}
    assert "16 of 24 images are there already" in caplog.text
    assert "part-00004.parquet is damaged" in caplog.text

    # What has been drawn is judged again without a cluster, and keeps its hours.
    report = json.loads((one / "report.json").read_text())
    (one / "report.json").unlink()
    with monkeypatch.context() as patch:
        patch.delattr("pipelines.evaluate.connect")
        run(config(artifact, reference, one))
    assert json.loads((one / "report.json").read_text())["metrics"] == report["metrics"]

    again = json.loads((one / "report.json").read_text())
    assert again["identity"] == report["identity"]
    assert report["identity"]["timed_images"] == 24
    assert report["identity"]["worker_hours"] > 0

    # Another form of images is refused: what is drawn already would have to be drawn again.
    with pytest.raises(ValueError, match="keep_images is none there, png here"):
        run(config(artifact, reference, one, keep_images="png"))
    with pytest.raises(ValueError, match="keep_images is parquet there, tar here"):
        run(config(artifact, reference, three, keep_images="tar"))

    # Another plan in the same folder is refused, with both values of each difference.
    changes = {"sampler": SamplerChoice(cfg_scale=1.5), "seed": 7}
    for way in ({}, {"dry_run": True}):
        with pytest.raises(ValueError, match=r"sampler.cfg_scale is 2.9 there, 1.5 here; seed is"):
            run(config(artifact, reference, one, **changes, **way))

    # So is going on with other sources, which may round differently; judging needs none.
    plan = json.loads((one / "plan.json").read_text())
    plan["plan"]["code"] = "another"
    (one / "plan.json").write_text(json.dumps(plan))
    for way in ({}, {"dry_run": True}):
        with pytest.raises(ValueError, match=r"code is another there, [0-9a-f]{16} here"):
            run(config(artifact, reference, one, **way))
    assert read_part(str(one / "features" / parts[0]), a_plan(), 0) is None


@pytest.mark.ray
def test_what_does_not_fit_is_refused_before_an_image_is_drawn(
    artifact: Path, reference: Path, dataset: Path, tmp_path: Path
):
    output = tmp_path / "output"
    owls = (*CLASSES[:3], ClassInfo(name="eagle owl"))
    renamed = make_artifact(tmp_path / "renamed", classes=owls)
    truncated = make_artifact(tmp_path / "truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    def refused(error: type[Exception], match: str, **changes: object) -> None:
        fields = {"artifact": artifact, "reference": reference, "output": output, **changes}
        with pytest.raises(error, match=match):
            run(config(**fields))
        assert not output.exists()

    refused(ValueError, "--model is missing", artifact="")
    refused(FileNotFoundError, "absent", artifact=tmp_path / "absent")
    refused(FileNotFoundError, r"no model at .*: neither an artifact", artifact=tmp_path)
    refused(ValueError, r"model.safetensors is damaged", artifact=truncated)
    refused(FileNotFoundError, r"no reference at absent.npz: make one", reference="absent.npz")
    refused(ValueError, r"config.json is not a reference", reference=artifact / "config.json")
    refused(FileNotFoundError, "needs its weights as a file", extractor="inception")
    refused(ValueError, "class 3 is 'owl' in the reference and 'eagle owl'", artifact=renamed)
    refused(ValueError, "25 images cannot be spread evenly over 4 classes", num_images=25)
    refused(ValueError, "--workers 99 needs 99 CPUs, but the cluster has", workers=99)
    before = sorted(path.name for path in dataset.iterdir())
    for folder, what in ((artifact, "an artifact"), (dataset, "a dataset")):
        with pytest.raises(ValueError, match=rf"holds {what} .*choose another --output"):
            run(config(artifact, reference, folder))
    assert sorted(path.name for path in dataset.iterdir()) == before
    with pytest.raises(ValueError, match="seed"):
        config(artifact, reference, output, seed=2**63)
    with pytest.raises(NotADirectoryError, match="is a file"):
        run(config(artifact, reference, artifact / "config.json" / "x"))


@pytest.mark.ray
def test_a_dry_run_prints_the_plan_and_touches_nothing(
    artifact: Path, reference: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    run(config(artifact, reference, tmp_path / "output", dry_run=True))
    run_reference(ReferenceConfig(data=str(dataset), output=str(tmp_path / "x.npz"), dry_run=True))

    printed = capsys.readouterr().out
    assert "24 images, 4 classes, 6 chunks of 4" in printed
    assert "FD-efflite0 against 40 images" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
def test_images_of_another_size_are_judged_at_the_references_and_agree_with_the_kept_files(
    reference: Path, tmp_path: Path
):
    large = make_artifact(tmp_path / "large", MODEL.model_copy(update={"image_size": 32}))
    output = tmp_path / "output"
    with pytest.raises(
        ValueError, match=r"images of 16 pixels, those to be judged have 32: .*-res"
    ):
        run(config(large, reference, output))

    with pytest.raises(ValueError, match=r"about images of 16 pixels, those to be judged have 24"):
        run(config(large, reference, output, resize_to=24))

    run(config(large, reference, output, resize=True, keep_images="png"))

    report = json.loads((output / "report.json").read_text())
    assert report["identity"]["resize"] == "32 to 16, Pillow bicubic"
    images = [np.asarray(Image.open(f)) for f in sorted((output / "images").iterdir())]
    assert {image.shape for image in images} == {(16, 16, 3)}
    digests = [hashlib.sha256(image.transpose(2, 0, 1).tobytes()).digest() for image in images]
    assert hashlib.sha256(b"".join(digests)).hexdigest() == report["identity"]["pixels_sha256"]
    command = (output / "report.md").read_text().partition("Do it again:")[2]
    assert "--resize" in command
    assert "--keep-images png" in command


@pytest.mark.ray
def test_a_foreign_reference_gives_what_its_moments_suffice_for(
    ray_cluster: None, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    features = np.random.default_rng(0).normal(size=(100, 1280))
    mu, sigma = features.mean(0), np.cov(features, rowvar=False)
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma, features=features[:1])
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match=r"about 2048 features .* efflite0 has 1280"):
        run(config(artifact, tmp_path / "inception.npz", tmp_path / "output"))
    with pytest.raises(ValueError, match=r"tells its image size; .* add --resize-to SIZE"):
        run(config(artifact, tmp_path / "ref.npz", tmp_path / "output", resize=True))

    run(config(artifact, tmp_path / "ref.npz", tmp_path / "output", resize_to=24, dry_run=True))
    assert "the features of 1 images, too few for precision" in caplog.text  # and none is drawn

    run(config(artifact, tmp_path / "ref.npz", tmp_path / "output", resize_to=24))

    report = json.loads((tmp_path / "output" / "report.json").read_text())
    assert report["identity"]["resize"] == "16 to 24, Pillow bicubic"
    assert report["identity"]["image_size"] == 24
    assert "FD-efflite0_high" in report["metrics"]
    assert "KID-efflite0" not in report["metrics"]
    assert "was taken on trust" in caplog.text


@pytest.mark.ray
def test_weights_that_only_the_drivers_machine_has_reach_the_workers(
    artifact: Path, dataset: Path, inception_file: Path, tmp_path: Path,
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setenv("JIT_CACHE", str(tmp_path))  # the cluster runs already, and has another
    shutil.copy(inception_file, standard_inception())
    reference, output = tmp_path / "r.npz", tmp_path / "output"

    run_reference(
        ReferenceConfig(
            data=str(dataset), output=str(reference), workers=1, extractor="inception",
            num_images=14,
        )
    )  # fmt: skip
    run(config(artifact, reference, output, extractor="inception", num_images=12))

    metrics = json.loads((output / "report.json").read_text())["metrics"]
    assert any(name.startswith("sFD-inception-") for name in metrics)


@pytest.mark.ray
def test_a_folder_that_another_process_draws_into_is_left_to_it(
    artifact: Path, reference: Path, tmp_path: Path
):
    with (
        lease.claim(str(tmp_path / "output" / "writer")),
        pytest.raises(PermissionError, match=r"is being written by .*, process \d+ on"),
    ):
        run(config(artifact, reference, tmp_path / "output"))

    assert not (tmp_path / "output" / "features").exists()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("stage", "moment"),
    [
        ("evaluate", "drew 24 of 24"),
        pytest.param("evaluate", "drew ", marks=pytest.mark.slow),
        pytest.param("reference", "extracted ", marks=pytest.mark.slow),
        pytest.param("reference", "extracted 40 of 40", marks=pytest.mark.slow),
    ],
)
def test_who_was_replaced_while_it_slept_stops_and_leaves_the_folder_to_its_successor(
    artifact: Path,
    reference: Path,
    dataset: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,  # its level lets the messages pass
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    moment: str,
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    output = tmp_path / ("output" if stage == "evaluate" else "r.npz")
    pieces = tmp_path / "r.npz.pieces"
    folder = (output if stage == "evaluate" else pieces) / "writer"
    work = {
        "evaluate": partial(run, config(artifact, reference, output)),
        "reference": partial(
            run_reference, ReferenceConfig(data=str(dataset), output=str(output), workers=1)
        ),
    }[stage]

    with (
        replaced(folder, moment) as successor,
        pytest.raises(PermissionError, match="was replaced by `jit`, process 7 on elsewhere"),
    ):
        work()

    assert successor.exists()
    assert not (output / "report.json").exists()
    if stage == "reference":
        assert not output.exists()


@pytest.mark.ray
def test_a_model_that_diverges_is_named_by_its_image_and_leaves_no_report(
    reference: Path, tmp_path: Path
):
    broken = make_artifact(tmp_path / "broken", broken_class=2)

    with pytest.raises(ValueError, match="image 2 of class 2 is not finite: the model diverged"):
        run(config(broken, reference, tmp_path / "output", workers=2))

    assert not (tmp_path / "output" / "report.json").exists()


class LastFirst:
    """A pool of two workers who find images that are not finite, the later chunk's first."""

    def __init__(self, *_: object, **__: object) -> None:
        self.started = [Card(0, "here", "cpu", "2", "0")]
        self.given: list[int] = []

    def __call__(self, *_: object, **__: object) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, items: Iterable[tuple[Job, int]]) -> Iterator[tuple[tuple[Job, int], NotFinite]]:
        source = iter(items)
        while two := list(islice(source, 2)):
            self.given += [chunk for _, chunk in two]
            for item in reversed(two):
                yield item, NotFinite(f"chunk {item[1]}")


def test_the_first_image_that_is_not_finite_is_named_whichever_worker_answers_first(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pool = LastFirst()
    monkeypatch.setattr(evaluate, "Pool", pool)
    job = Job(find_model(str(artifact)), a_plan(batch=2), str(tmp_path))
    chosen = config(artifact, "", tmp_path)

    with lease.claim(str(tmp_path / "writer")) as held, pytest.raises(NotFinite, match="chunk 1"):
        evaluate.draw_chunks(chosen, job, None, [1, 2, 3, 4], 2, gpu=False, held=held)

    assert pool.given == [1, 2]  # and all that was given was waited for


DRIVER = """
import sys, ray
ray.init(
    num_cpus=8, include_dashboard=False, object_store_memory=100 * 2**20, _temp_dir=sys.argv[1]
)
from pipelines.cli import main
sys.exit(main(sys.argv[2:]))
"""


def evaluate_command(
    short_tmp: Path, artifact: Path, reference: Path, output: Path, workers: int
) -> list[str]:
    """240 images in 60 chunks, drawn by a driver with a cluster of eight logical CPUs."""
    return [
        sys.executable, "-c", DRIVER, str(short_tmp), "evaluate", "--model", str(artifact),
        "--reference", str(reference), "--output", str(output), "--num-images", "240",
        "--batch", "2", "--chunk-batches", "2", "--precision", "fp32", "--sampler.steps", "12",
        "--workers", str(workers),
    ]  # fmt: skip


def digest_of(output: Path) -> str:
    return json.loads((output / "report.json").read_text())["identity"]["pixels_sha256"]


@pytest.fixture(scope="module")
def drawn_alone(
    artifact: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Digest of the 240 images as one worker draws them."""
    output, short = tmp_path_factory.mktemp("alone"), Path(tempfile.mkdtemp(dir="/tmp"))
    command = evaluate_command(short, artifact, reference, output, 1)
    subprocess.run(command, check=True, capture_output=True)
    yield digest_of(output)
    shutil.rmtree(short, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("workers", [2, 3, 8])
def test_any_number_of_workers_draws_the_same_pixels(
    artifact: Path, reference: Path, drawn_alone: str, tmp_path: Path, short_tmp: Path, workers: int
):
    command = evaluate_command(short_tmp, artifact, reference, tmp_path, workers)

    finished = subprocess.run(command, check=True, capture_output=True, text=True)

    assert finished.stderr.count("worker: process ") >= min(workers, 2)
    assert digest_of(tmp_path) == drawn_alone


@pytest.mark.slow
@pytest.mark.ray
def test_after_twenty_random_kills_the_pixels_are_the_same_and_no_chunk_was_published_twice(
    artifact: Path, reference: Path, drawn_alone: str, tmp_path: Path, short_tmp: Path
):
    rng = random.Random(0)
    output, log = tmp_path / "killed", tmp_path / "log"
    command = evaluate_command(short_tmp, artifact, reference, output, 3)
    published: dict[str, int] = {}
    kills: Counter[str] = Counter()

    def look() -> int:
        """Chunks that are there; each must stay what it was."""
        for path in (output / "features").glob("part-*"):
            written = path.stat().st_mtime_ns
            assert published.setdefault(path.name, written) == written, f"{path.name}: twice"
        return len(published)

    driver = None
    while kills.total() < 20:
        if driver is None:
            with log.open("w") as file:
                driver = subprocess.Popen(command, stderr=file, stdout=file)
        before = look()
        while look() == before:  # at least one chunk between two kills, so that it must end
            assert driver.poll() is None, log.read_text()[-3000:]
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))
        workers = [int(n) for n in re.findall(r"worker: process (\d+)", log.read_text())]
        alive = [pid for pid in workers if Path(f"/proc/{pid}/stat").exists()]
        if kills.total() % 5 == 4 or not alive:
            driver.kill()
            driver.wait()
            driver = None
            kills["driver"] += 1
        else:
            os.kill(rng.choice(alive), signal.SIGKILL)
            kills["worker"] += 1
    if driver is not None:
        driver.wait()
    finished = subprocess.run(command, check=True, capture_output=True, text=True)

    assert look() == 60
    assert kills["driver"] >= 4
    assert "images are there already" in finished.stderr
    assert digest_of(output) == drawn_alone


@pytest.mark.slow
@pytest.mark.ray
def test_a_disk_that_fills_up_is_said_in_one_sentence_and_what_is_finished_is_kept(
    artifact: Path, reference: Path, tmp_path: Path, short_tmp: Path
):
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("needs `unshare -rm` for a small disk")
    output = tmp_path / "output"
    output.mkdir()
    command = evaluate_command(short_tmp, artifact, reference, output, 2)
    script = f"""
        mount -t tmpfs -o size=400k none {output}
        {shlex.join(command)} 2> {tmp_path}/first; echo $? > {tmp_path}/code
        mount -o remount,size=100m {output}
        {shlex.join(command)} 2> {tmp_path}/second && cp {output}/report.json {tmp_path}
    """

    subprocess.run(["unshare", "-rm", "sh", "-c", script], check=True)

    said = [s for s in (tmp_path / "first").read_text().splitlines() if s.startswith("error:")]
    assert len(said) == 1
    assert "No space left on device): make room and run the same command again" in said[0]
    assert (tmp_path / "code").read_text().strip() == "1"
    there = re.search(r"(\d+) of 240 images are there already", (tmp_path / "second").read_text())
    assert there
    assert int(there[1]) > 0


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("limit", ["ATEN_CPU_CAPABILITY=default", "ONEDNN_MAX_CPU_ISA=AVX2"])
def test_other_instructions_of_the_processor_are_another_device(
    artifact: Path, reference: Path, tmp_path: Path, short_tmp: Path, limit: str
):
    command = evaluate_command(short_tmp, artifact, reference, tmp_path, 2)
    subprocess.run(command, check=True, capture_output=True)
    for lost in sorted((tmp_path / "features").iterdir())[10:20]:
        lost.unlink()
    name, _, value = limit.partition("=")
    plain = {**os.environ, name: value}

    refused = subprocess.run(command, check=False, capture_output=True, text=True, env=plain)

    here = device_name(torch.device("cpu"))
    if name == "ATEN_CPU_CAPABILITY":
        other = here.replace(torch.backends.cpu.get_cpu_capability(), "DEFAULT")
    else:
        other = f"{here} {limit}"
    assert refused.returncode == 2
    assert f"device is {here} there, {other} here" in refused.stderr
    assert "or --mix-devices, which the report will tell" in refused.stderr
    assert len(list((tmp_path / "features").iterdir())) == 50

    subprocess.run([*command, "--mix-devices"], check=True, capture_output=True, env=plain)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["identity"]["devices"] == sorted([here, other])
    assert any("drawn on different devices" in warning for warning in report["warnings"])


@pytest.mark.slow
@pytest.mark.ray
def test_an_evaluation_into_a_store_that_fails_has_the_same_pixels(
    artifact: Path,
    reference: Path,
    drawn_alone: str,
    tmp_path: Path,
    short_tmp: Path,
    faulty_store: FaultyStore,
    faulty_environment: dict[str, str],
):
    command = evaluate_command(short_tmp, artifact, reference, Path("OUT"), 2)
    command[command.index("OUT")] = "s3://bucket/evaluation"
    environment = {**os.environ, **faulty_environment, "JIT_CACHE": str(tmp_path)}

    subprocess.run(command, check=True, capture_output=True, env=environment)
    faulty_store.code_after = (0, "AccessDenied")
    refused = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)

    assert faulty_store.seen["reset"] + faulty_store.seen["slow_down"] > 20
    assert refused.returncode == 2
    said = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "the store refuses the credentials (AccessDenied)" in said[0]
    faulty_store.code_after = None
    with pytest.MonkeyPatch.context() as patch:
        for name, value in faulty_environment.items():
            patch.setenv(name, value)
        report = storage.read_json("s3://bucket/evaluation/report.json")
    assert report["identity"]["pixels_sha256"] == drawn_alone


@pytest.mark.ray
def test_a_damaged_image_ends_a_reference_with_its_row_and_what_was_extracted_is_kept(
    dataset: Path, tmp_path: Path
):
    data, output = tmp_path / "data", tmp_path / "r.npz"
    shutil.copytree(dataset, data)
    shard = data / shards.read_manifest(str(data)).shards[2].file
    content = bytearray(shard.read_bytes())
    middle = content.index(b"IDAT", len(content) // 2)
    content[middle : middle + 4] = b"XXXX"
    shard.write_bytes(content)

    with pytest.raises(ValueError, match=r"00002-of-00003.parquet is damaged: row \d+ cannot be"):
        run_reference(ReferenceConfig(data=str(data), output=str(output), workers=1))

    assert not output.exists()
    assert len(list(Path(f"{output}.pieces").glob("*.npz"))) == 2


def reference_command(dataset: Path, output: Path, short_tmp: Path) -> list[str]:
    """A driver with a cluster of its own that makes a reference with one worker."""
    return [
        sys.executable, "-c", DRIVER, str(short_tmp), "reference", str(dataset), "--output",
        str(output), "--workers", "1",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.ray
def test_a_reference_survives_its_workers(
    dataset: Path, reference: Path, tmp_path: Path, short_tmp: Path
):
    output = tmp_path / "killed.npz"
    command = reference_command(dataset, output, short_tmp)

    def line(pid: str) -> str:
        try:
            return Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            return ""

    def workers() -> Iterator[int]:
        for place in Path("/proc").glob("[0-9]*"):
            if "FeatureWorker" in line(place.name):
                parent = (place / "stat").read_text().rpartition(")")[2].split()[1]
                if str(short_tmp) in line(parent):
                    yield int(place.name)

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as driver:
        while not list(Path(f"{output}.pieces").glob("*.npz")):
            assert driver.poll() is None, "it ended before a worker could be killed"
            time.sleep(0.005)
        (victim,) = workers()
        os.kill(victim, signal.SIGKILL)
        said = driver.communicate()[1]

    assert driver.returncode == 0, said
    assert output.read_bytes() == reference.read_bytes()


@pytest.mark.slow
@pytest.mark.ray
def test_a_reference_that_is_killed_goes_on_and_ends_as_the_same_file(
    dataset: Path, reference: Path, tmp_path: Path, short_tmp: Path
):
    output = tmp_path / "killed.npz"
    command = reference_command(dataset, output, short_tmp)
    pieces = Path(f"{output}.pieces")

    with subprocess.Popen(command, stderr=subprocess.PIPE) as first:
        while not list(pieces.glob("*.npz")):
            assert first.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        first.kill()
    finished = subprocess.run(command, check=True, capture_output=True, text=True)

    extracted = re.findall(r"extracted (\d+) of 40 images", finished.stderr)
    assert len(extracted) < 3  # of three pieces
    assert output.read_bytes() == reference.read_bytes()
    assert not pieces.exists()
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "is finished already" in again.stderr
    command[command.index("--workers") :] = ["--num-images", "20"]
    other = subprocess.run(command, check=False, capture_output=True, text=True)
    assert "num_images is 40 there, 20 here" in other.stderr
    assert other.returncode == 2
