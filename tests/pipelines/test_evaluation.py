"""Chunks as a worker publishes them, without Ray: order, resizing, kept images, bad stores."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from jitmodel.artifact import ArtifactInfo, save_artifact
from jitmodel.config import ClassInfo, ModelConfig, SamplerConfig
from jitmodel.model import JiT
from jitmodel.parallel import store_as_computed
from pipelines import evaluation, metrics, storage
from pipelines.config import EvaluateConfig, KeepImages
from pipelines.drawing import (
    NotFinite,
    draw_batch,
    part_uri,
    pixels_sha256,
    read_part,
    time_uri,
)
from pipelines.evaluation import Job, SampleWorker, missing_chunks, read_drawn, read_times
from pipelines.features import get_extractor, portable_weights
from pipelines.models import find_model, load_model
from pipelines.reference import Reference, ReferenceIdentity, real_images
from tests.pipelines.conftest import FaultyStore

MODEL = ModelConfig(
    image_size=16, patch_size=4, hidden_size=32, depth=2, num_heads=2, bottleneck_dim=8,
    in_context_len=2, in_context_start=1, num_classes=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "artifact"
    model = JiT(MODEL)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    classes = tuple(ClassInfo(name=name) for name in ("cat", "dog", "fox", "owl"))
    save_artifact(
        folder,
        model.state_dict(),
        ArtifactInfo(model=MODEL, sampler=SamplerConfig(steps=2), classes=classes),
    )
    return folder


@pytest.fixture(scope="module")
def worker() -> SampleWorker:
    worker = SampleWorker("efflite0", "")
    worker.start()
    return worker


def make_job(
    artifact: Path, output: object, resize: int | None = None, keep_images: KeepImages = "none"
) -> Job:
    """24 images in 6 chunks of two batches of two."""
    config = EvaluateConfig(num_images=24, batch=2, chunk_batches=2, precision="fp32")
    source = find_model(str(artifact))
    plan = evaluation.make_plan(config, source, get_extractor("efflite0").identity, resize)
    return Job(source, plan, str(output), keep_images)


def carry_out(job: Job, worker: SampleWorker, chunks: list[int] | None = None) -> None:
    for chunk in missing_chunks(job) if chunks is None else chunks:
        worker.run((job, chunk))


def pixels_digest(images: list[np.ndarray]) -> str:
    """What anybody can compute from exported images [H, W, 3], in the order of their names."""
    channels_first = [image.transpose(2, 0, 1).tobytes() for image in images]
    return pixels_sha256(hashlib.sha256(image).digest() for image in channels_first)


def test_chunks_are_the_same_bytes_in_whatever_order_they_are_drawn(
    artifact: Path, worker: SampleWorker, tmp_path: Path
):
    orders = [list(range(6)), list(range(5, -1, -1)), random.Random(0).sample(range(6), 6)]
    jobs = [make_job(artifact, tmp_path / str(i)) for i in range(3)]

    for job, order in zip(jobs, orders, strict=True):
        carry_out(job, worker, order)

    for chunk in range(6):
        assert len({Path(part_uri(job.output, chunk)).read_bytes() for job in jobs}) == 1
    assert len({read_drawn(job).pixels_sha256 for job in jobs}) == 1


def test_a_chunk_whose_worker_died_after_it_was_stored_is_not_computed_again(
    artifact: Path, worker: SampleWorker, tmp_path: Path
):
    job = make_job(artifact, tmp_path, keep_images="png")
    part, image = Path(part_uri(job.output, 3)), tmp_path / "images" / "000013.png"
    carry_out(job, worker, [3])
    written, content = part.stat().st_mtime_ns, image.read_bytes()

    assert worker.run((job, 3)) == 4
    assert part.stat().st_mtime_ns == written

    image.unlink()
    assert worker.run((job, 3)) == 4
    assert image.read_bytes() == content


def test_a_part_tells_the_digest_of_its_pixels_and_all_parts_together_that_of_the_whole(
    artifact: Path, worker: SampleWorker, tmp_path: Path
):
    job = make_job(artifact, tmp_path, keep_images="png")
    carry_out(job, worker)

    files = sorted((tmp_path / "images").iterdir())
    images = [np.asarray(Image.open(file)) for file in files]
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(24)]
    assert read_drawn(job).pixels_sha256 == pixels_digest(images)
    told = pq.read_schema(part_uri(job.output, 2)).metadata[b"pixels_sha256"].decode()
    assert told == pixels_digest(images[8:12])


@pytest.mark.parametrize("size", [8, 40])
def test_resized_images_are_judged_and_kept_as_pillow_resizes_them(
    artifact: Path, worker: SampleWorker, tmp_path: Path, size: int
):
    plain = make_job(artifact, tmp_path / "plain", keep_images="png")
    job = make_job(artifact, tmp_path / "resized", resize=size, keep_images="png")

    carry_out(plain, worker)
    carry_out(job, worker)

    found = read_drawn(job)
    assert job.plan.image_size == size
    extractor = get_extractor("efflite0")
    for i in (0, 23):
        drawn = Image.open(tmp_path / "plain" / "images" / f"{i:06d}.png")
        expected = np.asarray(drawn.resize((size, size), Image.Resampling.BICUBIC))
        kept = np.asarray(Image.open(tmp_path / "resized" / "images" / f"{i:06d}.png"))
        assert (kept == expected).all()
        again = extractor(torch.from_numpy(expected.transpose(2, 0, 1).copy())[None])
        np.testing.assert_allclose(found.features[i], again.pooled[0], rtol=1e-4, atol=1e-4)
    assert found.pixels_sha256 != read_drawn(plain).pixels_sha256


def test_kept_images_are_the_same_in_every_form(
    artifact: Path, worker: SampleWorker, tmp_path: Path
):
    jobs = {
        form: make_job(artifact, tmp_path / form, keep_images=form)
        for form in ("png", "tar", "parquet")
    }
    for job in jobs.values():
        carry_out(job, worker)
    pngs = [path.read_bytes() for path in sorted((tmp_path / "png" / "images").iterdir())]

    tarred, labels, rows = [], [], []
    for path in sorted((tmp_path / "tar" / "images").iterdir()):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                (tarred if member.name.endswith(".png") else labels).append(content.read())
                assert member.mtime == 0  # or its bytes would differ from run to run
    for path in sorted((tmp_path / "parquet" / "images").iterdir()):
        rows += pq.read_table(path).to_pylist()

    assert tarred == pngs
    assert [int(label) for label in labels] == [i % 4 for i in range(24)]
    assert [row["image"]["bytes"] for row in rows] == pngs
    assert [(row["label"], row["id"]) for row in rows] == [(i % 4, i) for i in range(24)]


@pytest.mark.parametrize("form", ["png", "tar", "parquet"])
def test_images_that_were_lost_are_drawn_again_and_no_others(
    artifact: Path, worker: SampleWorker, tmp_path: Path, form: KeepImages
):
    job = make_job(artifact, tmp_path, keep_images=form)
    carry_out(job, worker)
    assert missing_chunks(job) == []

    victim = sorted((tmp_path / "images").iterdir())[-1]
    content = victim.read_bytes()
    victim.unlink()

    assert missing_chunks(job) == [5]
    carry_out(job, worker)
    assert victim.read_bytes() == content


def test_a_part_with_a_flipped_bit_in_its_footer_is_whole_or_drawn_again(
    artifact: Path, worker: SampleWorker, tmp_path: Path
):
    """Names, types and metadata lie there, of which no checksum of Parquet says anything."""
    job = make_job(artifact, tmp_path)
    worker.run((job, 1))
    place = Path(part_uri(job.output, 1))
    content = place.read_bytes()
    part = read_part(str(place), job.plan, 1)
    assert part is not None
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    names = [content.index(name, footer) for name in (b"index", b"label", b"features", b"device")]
    whole = again = 0
    for at in [*names, *range(footer, len(content), 5)]:
        place.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        found = read_part(str(place), job.plan, 1)
        again += found is None
        if found is not None:
            whole += 1
            for field in dataclasses.fields(part):
                was, now = getattr(part, field.name), getattr(found, field.name)
                assert np.array_equal(was, now) if isinstance(was, np.ndarray) else was == now
    assert whole > 20
    assert again > 200

    place.write_bytes(content.replace(b"index", b"inde8"))
    assert missing_chunks(job) == [0, *range(1, job.plan.num_chunks)]
    worker.run((job, 1))
    assert place.read_bytes() == content


def test_a_worker_takes_up_jobs_of_different_plans_in_turn(
    artifact: Path, worker: SampleWorker, tmp_path: Path
):
    first = make_job(artifact, tmp_path / "a")
    guided = first.plan.sampler.model_copy(update={"cfg_scale": 1.5})
    second = first._replace(
        plan=first.plan.model_copy(update={"sampler": guided}), output=str(tmp_path / "b")
    )

    for item in ((first, 0), (second, 0), (first, 1)):
        worker.run(item)

    a, b = (read_part(part_uri(job.output, 0), job.plan, 0) for job in (first, second))
    assert a is not None
    assert b is not None
    assert a.sha256 != b.sha256
    assert read_part(part_uri(first.output, 0), second.plan, 0) is None  # of another plan


def test_an_image_that_is_not_finite_is_a_workers_answer_and_nothing_is_stored(
    worker: SampleWorker, tmp_path: Path
):
    model = JiT(MODEL)
    model.y_embedder.embedding_table.weight.data[2] = torch.nan
    info = ArtifactInfo(model=MODEL, sampler=SamplerConfig(steps=2))
    save_artifact(tmp_path / "broken", model.state_dict(), info)
    job = make_job(tmp_path / "broken", tmp_path / "output")

    answer = worker.run((job, 1))

    assert isinstance(answer, NotFinite)
    assert "image 6 of class 2 is not finite" in str(answer)
    assert not (tmp_path / "output").exists()


def test_a_device_that_rounds_differently_draws_only_where_mixing_is_allowed(
    artifact: Path, worker: SampleWorker, tmp_path: Path
):
    job = make_job(artifact, tmp_path)
    elsewhere = job._replace(plan=job.plan.model_copy(update={"device": "riscv64 RVV"}))

    with pytest.raises(
        ValueError, match=rf"{worker.card.device} would draw what riscv64 RVV .* --m"
    ):
        worker.run((elsewhere, 0))
    assert not (tmp_path / "features").exists()

    worker.run((elsewhere._replace(mix_devices=True), 0))
    part = read_part(part_uri(job.output, 0), elsewhere.plan, 0)
    assert part is not None
    assert part.device == worker.card.device


@pytest.mark.parametrize("field", ["torch", "code"])
def test_a_worker_with_other_programs_than_the_plans_draws_nothing(
    artifact: Path, worker: SampleWorker, tmp_path: Path, field: str
):
    job = make_job(artifact, tmp_path)
    elsewhere = job._replace(plan=job.plan.model_copy(update={field: "another"}), mix_devices=True)

    here = re.escape(getattr(job.plan, field))
    with pytest.raises(ValueError, match=f"has .* {here}, the plan of .* another, which may round"):
        worker.run((elsewhere, 0))
    assert not (tmp_path / "features").exists()


def test_a_store_that_refuses_us_is_no_reason_to_draw_again(
    artifact: Path,
    worker: SampleWorker,
    faulty_store: FaultyStore,
    faulty_environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
):
    for name, value in faulty_environment.items():
        monkeypatch.setenv(name, value)
    job = make_job(artifact, "s3://bucket/refused")
    worker.run((job, 0))  # a quarter of the requests fail, and are made again
    assert read_part(part_uri(job.output, 0), job.plan, 0) is not None

    faulty_store.code_after = (0, "ExpiredToken")

    with pytest.raises(PermissionError, match=r"s3://bucket/refused.* have expired .*: renew them"):
        missing_chunks(job)


def test_what_a_reader_must_know_is_said(artifact: Path, worker: SampleWorker, tmp_path: Path):
    job = make_job(artifact, tmp_path)
    carry_out(job, worker)
    drawn, extractor = read_drawn(job), get_extractor("efflite0").identity
    real = metrics.Real(metrics.Statistics(np.zeros(1280), np.eye(1280)))

    said = evaluation.warnings(job, drawn, Reference(None, "0", None, real), extractor)
    counted = evaluation.warnings(job, drawn, Reference(None, "0", 1000, real), extractor)

    assert "24 drawn images in 1280 dimensions: the covariance is singular" in said[0]
    assert "FD-efflite0 is biased upwards" in said[0]
    assert "taken on trust" in said[1]
    assert "no KID, precision" in said[2]
    assert "1000 reference images in 1280 dimensions" in counted[1]
    for kept in (0, 1, 2, 5):
        few = Reference(None, "0", 5, real._replace(features=np.zeros((kept, 1280), np.float32)))
        (line,) = [s for s in evaluation.warnings(job, drawn, few, extractor) if "keeps" in s]
        assert f"the features of {kept} images, too few for precision" in line
        assert ("and for KID, which needs 2" in line) == (kept < 2)
    assert "KID-efflite0" in evaluation.judge(drawn, few, extractor)
    found = evaluation.judge(drawn, Reference(None, "0", None, real), extractor)
    assert set(found) == {
        "FD-efflite0", "FD-efflite0_low", "FD-efflite0_high", "IS-efflite0", "IS-efflite0_std"
    }  # fmt: skip


def test_what_workers_are_told_to_read_does_not_depend_on_where_the_driver_stands(
    artifact: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "model").symlink_to(artifact)
    (tmp_path / "data").symlink_to(tiny_dataset)
    monkeypatch.chdir(tmp_path)

    found = (
        make_job(Path("model"), "nowhere").source.uri,
        real_images("data").data,  # type: ignore[attr-defined]
        portable_weights("efflite0", "weights.pth"),
    )

    assert found == tuple(str(tmp_path / name) for name in ("model", "data", "weights.pth"))
    assert portable_weights("efflite0", "") == ""  # the package's own, wherever that lies


def test_class_names_that_one_side_does_not_know_are_said_to_be_taken_on_trust():
    extractor = get_extractor("efflite0").identity
    named = tuple(ClassInfo(name=name) for name in "ab")
    real = metrics.Real(metrics.Statistics(np.zeros(1280), np.eye(1280)))

    def said(there: tuple[ClassInfo, ...], here: tuple[ClassInfo, ...]) -> list[str]:
        about = ReferenceIdentity(
            extractor=extractor.as_dict(), image_size=16, classes=there, num_images=5000,
            dataset_fingerprint="", versions={},
        )  # fmt: skip
        reference = Reference(about, "0", 5000, real)
        found = evaluation.foreseen(5000, here, reference, extractor)
        return [line for line in found if "class names are unknown" in line]

    assert said(named, named) == []
    assert "the model's: that both are about the same classes was taken on" in said(named, ())[0]
    assert "the reference's: that both" in said((), named)[0]


def test_a_damaged_statistic_costs_its_hours_and_not_the_evaluation(artifact: Path, tmp_path: Path):
    job = make_job(artifact, tmp_path)
    (tmp_path / "times").mkdir()
    contents = ['{"images": 4, "seconds": 2.5}', '{"images": 4, "sec', "", "null", "{}", "[1, 2]"]
    for chunk, content in enumerate(contents):
        Path(time_uri(job.output, chunk)).write_text(content)

    assert read_times(job) == (4, 2.5)


def test_pages_of_missing_parts_cannot_be_judged(artifact: Path, tmp_path: Path):
    job = make_job(artifact, tmp_path)

    with pytest.raises(evaluation.StageFailed, match=r"part-00000.parquet cannot be read back"):
        read_drawn(job)
    assert storage.list_files(str(tmp_path)) == []


def test_weights_in_the_compute_type_draw_the_same_pixels_bit_by_bit(artifact: Path):
    job = make_job(artifact, "nowhere")
    plan = job.plan.model_copy(update={"precision": "bf16"})
    index = torch.arange(8)

    cast = draw_batch(store_as_computed(load_model(job.source), "bf16"), plan, index)
    whole = draw_batch(load_model(job.source), plan, index)

    assert torch.equal(cast, whole)
    assert not torch.equal(whole, draw_batch(load_model(job.source), job.plan, index))  # of fp32


@pytest.mark.slow
def test_a_compiled_network_draws_the_same_images_but_for_rounding_and_has_another_plan(
    artifact: Path, worker: SampleWorker, tmp_path: Path
):
    plain = make_job(artifact, tmp_path / "plain", keep_images="png")
    compiled = plain._replace(
        plan=plain.plan.model_copy(update={"compile": True}), output=str(tmp_path / "compiled")
    )

    worker.run((plain, 0))
    worker.run((compiled, 0))

    a, b = (
        np.stack(
            [np.asarray(Image.open(file)) for file in sorted((tmp_path / name).rglob("*.png"))]
        )
        for name in ("plain", "compiled")
    )
    assert np.abs(a.astype(int) - b).max() <= 1
    assert read_part(part_uri(compiled.output, 0), plain.plan, 0) is None
