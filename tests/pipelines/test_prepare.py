"""Preparation ends in the same bytes whatever happens to it, and refuses what cannot be right."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pipelines import images, job, lease, prepare, shards, sources, storage
from pipelines.config import PrepareConfig, StageFailed, load_preset, preset_names
from pipelines.deal import ids_at, permutation, permuted
from pipelines.index import Index
from pipelines.job import Job

COLOURS = ["blue", "green", "red"]
BROKEN = {
    "blue/empty.png": b"",
    "green/text.JPEG": b"this is no image",
    "red/half.JPEG": b"\xff\xd8\xff\xe0\x00\x10JFIF",
}


def _photo(seed: int, size: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size + seed % 9, 3), np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _tree(root: Path, per_class: int, broken: bool = False) -> Path:
    for label, colour in enumerate(COLOURS):
        (root / colour).mkdir(parents=True)
        for i in range(per_class):
            (root / colour / f"{i:03d}.png").write_bytes(_photo(label * 1000 + i))
    for name, content in BROKEN.items() if broken else ():
        (root / name).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder tree of 3 classes with 40 images each, and 3 files that are none."""
    return _tree(tmp_path_factory.mktemp("tree") / "root", 40, broken=True)


def _config(source: Path, output: Path, **fields: object) -> PrepareConfig:
    small = {"image_size": 32, "rows_per_shard": 16, "rows_per_group": 5, "seed": 3}
    small |= {"max_reject_fraction": 0.1, "encoding": "png"}
    return PrepareConfig.model_validate({"source": str(source), "output": str(output), **small}
                                        | fields)  # fmt: skip


@pytest.fixture(scope="module")
def prepared(ray_cluster: None, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as a dataset folder."""
    output = tmp_path_factory.mktemp("prepared") / "dataset"
    prepare.run(_config(tree, output))
    return output


def _digests(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def _rows(folder: Path) -> list[dict[str, object]]:
    files = [s.file for s in shards.read_manifest(str(folder)).shards]
    return [row for file in files for row in pq.read_table(folder / file).to_pylist()]


# What comes out.


@pytest.mark.ray
def test_every_image_is_in_one_shard_or_among_the_rejects(prepared: Path, tree: Path) -> None:
    manifest = shards.read_manifest(str(prepared))
    assert (manifest.num_rows, manifest.num_rejects) == (120, 3)
    assert manifest.rows_per_class == [40, 40, 40]
    assert len(manifest.shards) == 8  # 123 references in specs of 16
    assert all(s.row_groups[:2] == [5, 5] for s in manifest.shards[:-1])
    assert shards.verify(str(prepared)) == []

    rows, rejects = _rows(prepared), pq.read_table(prepared / "rejects.parquet").to_pylist()
    listed = sorted(file.relative_to(tree).as_posix() for file in tree.rglob("*.*"))
    where = {int(r["id"]): r["image"]["path"] for r in rows}  # type: ignore[call-overload, index]
    where |= {r["id"]: r["path"] for r in rejects}
    assert [where[i] for i in range(123)] == listed  # the id is the place in the sorted source
    assert {r["path"]: r["reason"] for r in rejects} == {
        "blue/empty.png": "empty file",
        "green/text.JPEG": "not an image of JPEG, PNG, WEBP, GIF, BMP, or a broken header",
        "red/half.JPEG": "OSError: Truncated File Read",
    }


@pytest.mark.ray
def test_the_pixels_are_the_cropped_ones_and_the_order_is_shuffled(
    prepared: Path, tree: Path
) -> None:
    rows = _rows(prepared)
    for row in rows[::10]:
        image = row["image"]
        assert isinstance(image, dict)
        wanted = images.adm_crop(images.decode((tree / image["path"]).read_bytes()), 32)
        assert np.array_equal(images.decode_pixels(image["bytes"]), np.asarray(wanted))
        assert image["path"].split("/")[0] == COLOURS[row["label"]]  # type: ignore[call-overload]
    labels = [row["label"] for row in rows]
    assert all(len(set(labels[i : i + 16])) == 3 for i in range(0, 112, 16))


@pytest.mark.ray
def test_the_hubs_library_shows_pictures_and_class_names(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    found = datasets.load_dataset(
        "parquet", data_files=str(prepared / "data" / "*.parquet"), cache_dir=str(tmp_path)
    )["train"]
    assert len(found) == 120
    assert found.features["label"].names == COLOURS
    assert found[0]["image"].size == (32, 32)

    _, front, text = (prepared / "README.md").read_text().split("---\n", 2)
    info = yaml.safe_load(front)
    assert info["dataset_info"]["splits"][0]["num_examples"] == 120
    assert info["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*"}]
    assert "3 images of the source could not be used" in text


@pytest.mark.ray
def test_the_contact_sheet_shows_each_class_in_a_row(prepared: Path) -> None:
    with Image.open(prepared / "contact.png") as sheet:
        assert sheet.width > 8 * 64
        assert sheet.height > 3 * 64
        colours = sheet.convert("RGB").getcolors(sheet.width * sheet.height)
    assert colours is not None
    assert len(colours) > 1000


def test_the_contact_sheet_needs_no_source(tmp_path: Path) -> None:
    sheets = {}
    for name in ("kept", "gone"):
        tree, output = _tree(tmp_path / name, 20), tmp_path / f"{name}-dataset"
        asked = _interrupted(tree, output, 4)
        classes = sources.open_source(str(tree)).classes
        if name == "gone":
            shutil.rmtree(tree)
        job.publish({32: str(output)}, classes, asked, _config(tree, output))
        sheets[name] = (output / "contact.png").read_bytes()
    assert sheets["gone"] == sheets["kept"]
    with Image.open(BytesIO(sheets["kept"])) as sheet:
        assert sheet.width > 8 * 64  # eight of each class


# The same bytes.


@pytest.mark.ray
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    prepared: Path, tree: Path, tmp_path: Path
) -> None:
    prepare.run(_config(tree, tmp_path / "one", workers=1))
    assert _digests(tmp_path / "one") == _digests(prepared)


@pytest.mark.ray
def test_more_workers_than_cpus_are_refused_and_nothing_is_written(
    ray_cluster: None, tree: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"--workers 999 needs 999 CPUs, but the cluster has \d+:"):
        prepare.run(_config(tree, tmp_path / "many", workers=999))

    assert not (tmp_path / "many").exists()


@pytest.mark.ray
def test_parquet_as_a_source_gives_the_same_images(prepared: Path, tmp_path: Path) -> None:
    prepare.run(_config(prepared, tmp_path / "again", rows_per_shard=50))
    manifest = shards.read_manifest(str(tmp_path / "again"))
    assert (manifest.num_rows, len(manifest.shards)) == (120, 3)
    assert [c.name for c in manifest.classes] == COLOURS
    before = sorted(row["image"]["bytes"] for row in _rows(prepared))  # type: ignore[index]
    assert sorted(r["image"]["bytes"] for r in _rows(tmp_path / "again")) == before  # type: ignore[index]


@pytest.mark.ray
def test_real_photographs_become_a_dataset_with_imagenets_names(
    ray_cluster: None, imagenet_sample: Path, tmp_path: Path
) -> None:
    photos = sorted(imagenet_sample.glob("*.JPEG"))[:12]
    for photo in photos:
        folder = tmp_path / "train" / photo.name.split("_")[0]
        folder.mkdir(parents=True)
        (folder / photo.name).symlink_to(photo)
    prepare.run(_config(tmp_path / "train", tmp_path / "dataset", image_size=64, encoding="webp"))

    manifest = shards.read_manifest(str(tmp_path / "dataset"))
    assert manifest.classes[0].name == "tench, Tinca tinca"
    assert [c.wnid for c in manifest.classes] == [photo.name.split("_")[0] for photo in photos]
    for row in _rows(tmp_path / "dataset"):
        photo = photos[row["label"]]  # type: ignore[call-overload]
        wanted = np.asarray(images.adm_crop(images.decode(photo.read_bytes()), 64))
        assert np.array_equal(images.decode_pixels(row["image"]["bytes"]), wanted)  # type: ignore[index]


@pytest.mark.ray
def test_a_finished_folder_is_left_alone(
    prepared: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {f: f.stat().st_mtime_ns for f in prepared.rglob("*")}
    monkeypatch.setattr(prepare, "write_shards", None)  # would fail if it were called
    prepare.run(_config(tree, prepared))
    assert {f: f.stat().st_mtime_ns for f in prepared.rglob("*")} == before


def _interrupted(tree: Path, output: Path, shards_done: int, classes: str = "") -> Job:
    """A folder as a killed run leaves it: some shards published, one half written."""
    config = _config(tree, output, classes=classes)
    source = sources.open_source(str(tree), classes)
    index = output.parent / "index.arrow"
    sources.write_index(source, index)
    asked = job.describe(config, source, index)
    folders = job.folders_of(str(output), config.image_size)
    with lease.claim(str(output / "_work" / "writer")):
        job.begin(str(output), folders, asked, index)
    for number in range(shards_done):
        job.write_shard(number, folders, source.root, source.classes, asked)
    (output / "data" / f"{storage.TEMPORARY}0123").write_bytes(b"half a shard")
    (output / f"{storage.TEMPORARY}4567").write_bytes(b"half a manifest")
    return asked


@pytest.mark.ray
def test_going_on_keeps_what_is_valid_and_writes_the_rest(
    prepared: Path, tree: Path, tmp_path: Path
) -> None:
    output = tmp_path / "dataset"
    _interrupted(tree, output, 3)
    (output / shards.shard_name(1, 8)).write_bytes(b"cut short")  # its entry says otherwise
    kept = output / shards.shard_name(0, 8)
    before = kept.stat().st_mtime_ns

    prepare.run(_config(tree, output))

    assert kept.stat().st_mtime_ns == before
    assert _digests(output) == _digests(prepared)


@pytest.mark.ray
def test_going_on_writes_anew_what_was_deleted(prepared: Path, tree: Path, tmp_path: Path) -> None:
    output = tmp_path / "dataset"
    _interrupted(tree, output, 3)
    shutil.rmtree(output / "data")

    prepare.run(_config(tree, output))

    assert _digests(output) == _digests(prepared)


@pytest.mark.ray
def test_a_worker_with_other_tools_stops_the_job_with_its_own_words(
    ray_cluster: None, tree: Path, tmp_path: Path
) -> None:
    asked = _interrupted(tree, tmp_path / "dataset", 1)
    other = asked.model_copy(update={"versions": asked.versions | {"pillow": "1.0"}})
    output, source = tmp_path / "dataset", sources.open_source(str(tree))
    message = r"shard . was not written: .*install the same versions"
    with (
        lease.claim(str(output / "_work" / "writer")) as held,
        pytest.raises(RuntimeError, match=message),
    ):
        prepare.write_shards(
            {32: str(output)}, source.root, source.classes, other, _config(tree, output), [held]
        )


# What is refused, and writes nothing.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 64}, "was started with image_size 32, and this is image_size 64"),
        ({"encoding": "raw"}, "was started with encoding png, and this is encoding raw"),
        ({"seed": 4}, "was started with seed 3, and this is seed 4"),
        ({"rows_per_shard": 17}, "was started with rows_per_shard 16, and this is"),
    ],
)
def test_going_on_with_another_config_is_refused_with_both_values(
    tree: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    output = tmp_path / "dataset"
    _interrupted(tree, output, 1)
    before = _digests(output)
    with pytest.raises(ValueError, match=message):
        prepare.run(_config(tree, output, **change))
    assert _digests(output) == before


def _replaceable(tmp_path: Path, layout: str) -> tuple[Path, Path, bytes]:
    """A source, a file of it, and as many bytes that hold other pictures."""
    if layout == "tree":
        source = _tree(tmp_path / "tree", 8)
        changed = source / "red" / "000.png"
        size = changed.stat().st_size
        return source, changed, _photo(7)[:size].ljust(size, b"\0")
    if layout == "tar":
        place = tmp_path / "a.tar"
        with tarfile.open(tmp_path / "cat.tar", "w") as inner, tarfile.open(place, "w") as outer:
            inner.add(_tree(tmp_path / "tree", 8))
            inner.close()
            outer.add(tmp_path / "cat.tar", "cat.tar")
        return place, place, place.read_bytes()
    place = tmp_path / "a.parquet"
    found = []
    for k in (0, 18):
        photos = [_photo(k).ljust(6000, b"\0"), _photo(k + 9).ljust(6000, b"\0")] * 20
        table = pa.table([photos, [0, 1] * 20], names=["image", "label"])
        pq.write_table(table, place, compression="none", use_dictionary=False)
        found.append(place.read_bytes())
    assert len(found[0]) == len(found[1])
    place.write_bytes(found[0])
    return place, place, found[1]


@pytest.mark.parametrize("layout", ["tree", "parquet"])
def test_going_on_with_pictures_that_changed_is_refused(tmp_path: Path, layout: str) -> None:
    output = tmp_path / "dataset"
    source, changed, content = _replaceable(tmp_path, layout)
    _interrupted(source, output, 1)
    before = _digests(output)
    changed.write_bytes(content)
    message = "files of the source have other sizes or times of change"
    with pytest.raises(ValueError, match=message):
        prepare.run(_config(source, output))
    assert _digests(output) == before


@pytest.mark.parametrize("layout", ["tree", "parquet", pytest.param("tar", marks=pytest.mark.ray)])
def test_pictures_that_change_while_they_are_read_make_no_dataset(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if layout == "tar":
        request.getfixturevalue("ray_cluster")
    source, changed, content = _replaceable(tmp_path, layout)
    monkeypatch.setattr(prepare, "write_shards", lambda *_: changed.write_bytes(content))
    with pytest.raises(ValueError, match="have changed while they were read"):
        prepare.run(_config(source, tmp_path / "dataset"))
    assert not (tmp_path / "dataset" / "manifest.json").exists()


def _finished(source: Path, output: Path) -> None:
    """A finished folder, made without Ray."""
    asked = _interrupted(source, output, 1)
    opened = sources.open_source(str(source))
    config, folders = _config(source, output), {32: str(output)}
    classes = job.classes_of(opened, Index(output / "_work" / "index.arrow"))
    for number in range(asked.num_shards):
        job.write_shard(number, folders, opened.root, classes, asked)
    job.publish(folders, classes, asked, config)
    storage.delete(str(output / "_work"))


@pytest.mark.parametrize("layout", ["tree", "parquet"])
def test_what_is_finished_of_pictures_that_changed_is_not_called_finished(
    tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    output, copied = tmp_path / "dataset", tmp_path / "elsewhere"
    source, changed, content = _replaceable(tmp_path, layout)
    _finished(source, output)
    copied.mkdir()
    copy = copied / source.name
    if layout == "tree":
        shutil.copytree(source, copy, copy_function=shutil.copyfile)
    else:
        shutil.copyfile(source, copy)
    before = _digests(output)
    with caplog.at_level("INFO"):
        prepare.run(_config(copy, output))
    assert "have other times of change, but the same names, sizes and" in caplog.text
    assert "is finished already" in caplog.text

    changed.write_bytes(content)
    for dry_run in (False, True):
        message = r"was made when .* had files_sha256 \w+, and this is files_sha256 \w+ \(files of"
        with pytest.raises(ValueError, match=message):
            prepare.run(_config(source, output, dry_run=dry_run))
    assert _digests(output) == before


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (1, r"was made with source_sha256 .*\(the list of images differs\)"),  # of other lengths
        (18, r"was made from .*a\.parquet, and .*b/a\.parquet holds other pictures, such as a\."),
    ],
)
def test_parquet_of_other_pictures_with_the_same_labels_is_another_source(
    tmp_path: Path, seed: int, message: str
) -> None:
    source, output, other = tmp_path / "a.parquet", tmp_path / "dataset", tmp_path / "b"
    other.mkdir()
    for k, place in ((0, source), (seed, other / "a.parquet")):
        photos = [_photo(k + i) for i in range(8)]
        pq.write_table(pa.table([photos, [0, 1] * 4], names=["image", "label"]), place)
    _finished(source, output)
    with pytest.raises(ValueError, match=message):
        prepare.run(_config(other / "a.parquet", output))


@pytest.mark.parametrize("change", [{}, {"seed": 4}, {"encoding": "raw"}, {"image_size": 16}])
def test_a_second_writer_hears_of_the_first_whatever_it_asks_for(
    tree: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    output = tmp_path / "dataset"
    _interrupted(tree, output, 1)
    with lease.claim(str(output / "_work" / "writer")):
        before = _digests(output)
        message = rf"is being written by .*, process {os.getpid()} on "
        with pytest.raises(PermissionError, match=message):
            prepare.run(_config(tree, output, **change))
        assert _digests(output) == before


@pytest.mark.ray
def test_a_writer_of_several_sizes_and_one_of_a_single_size_hear_of_each_other(
    tree: Path, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, heard = tmp_path / "dataset", list[str]()
    begin = job.begin

    def begun(*args: Any) -> None:
        begin(*args)
        with pytest.raises(PermissionError, match=f"process {os.getpid()} on ") as refusal:
            prepare.run(_config(tree, output / "16", image_size=16, encoding="raw"))
        heard.append(str(refusal.value))

    monkeypatch.setattr(prepare, "begin", begun)
    prepare.run(_config(tree, output, image_size=(8, 16)))
    assert len(heard) == 1
    assert {f.name for f in output.iterdir()} == {"8", "16"}
    assert not (output / "16" / "_work").exists()

    with (
        lease.claim(str(tmp_path / "another" / "16" / "_work" / "writer")),
        pytest.raises(PermissionError, match=f"process {os.getpid()} on "),
    ):
        prepare.run(_config(tree, tmp_path / "another", image_size=(8, 16)))


def test_a_second_writer_of_another_source_hears_of_the_first(tree: Path, tmp_path: Path) -> None:
    output = tmp_path / "dataset"
    _interrupted(tree, output, 1)
    with (
        lease.claim(str(output / "_work" / "writer")),
        pytest.raises(PermissionError, match=f"process {os.getpid()} on "),
    ):
        prepare.run(_config(_tree(tmp_path / "other", 2), output))


def test_a_dry_run_refuses_what_the_run_would_refuse(tree: Path, tmp_path: Path) -> None:
    other, output = _tree(tmp_path / "other", 2), tmp_path / "dataset"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    _interrupted(tree, output, 1)
    before = _digests(tmp_path)
    for source, place, change, message in (
        (other, output, {}, "was started with num_images 123, and this is num_images 6"),
        (tree, output, {"seed": 4}, "was started with seed 3, and this is seed 4"),
        (tree, tmp_path / "full", {}, "is not empty, and no preparation was started there"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare.run(_config(source, place, dry_run=True, **change))
    prepare.run(_config(tree, output, dry_run=True))
    assert _digests(tmp_path) == before


def test_going_on_with_other_class_names_is_refused(tree: Path, tmp_path: Path) -> None:
    listed, output = tmp_path / "classes", tmp_path / "dataset"
    listed.write_text("blue\tSky\ngreen\tGras\nred\tBlood")
    _interrupted(tree, output, 1, classes=str(listed))
    listed.write_text("blue\tSky\ngreen\tGrass\nred\tBlood")
    before = _digests(output)
    with pytest.raises(ValueError, match="was started with class_names_sha256"):
        prepare.run(_config(tree, output, classes=str(listed)))
    assert _digests(output) == before


@pytest.mark.ray
def test_a_finished_folder_of_another_config_or_source_is_refused(
    prepared: Path, tree: Path, tmp_path: Path
) -> None:
    before = _digests(prepared)
    with pytest.raises(ValueError, match="was made with image_size 32"):
        prepare.run(_config(tree, prepared, image_size=16))
    other = _tree(tmp_path / "other", 2)
    with pytest.raises(ValueError, match="was made with num_images 123, and this is num_images"):
        prepare.run(_config(other, prepared))
    assert _digests(prepared) == before


def test_a_bad_source_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    half = _tree(tmp_path / "half", 1)
    (half / "yellow").mkdir()
    (tmp_path / "textual" / "a").mkdir(parents=True)
    (tmp_path / "textual" / "a" / "readme.txt").touch()
    cases = {
        "missing": (FileNotFoundError, "no folder at .*/missing"),
        "empty": (ValueError, "no class folders in .*/empty"),
        "half": (ValueError, "class folder .*/half/yellow has no images"),
        "textual": (ValueError, "class folder .*/textual/a has no images"),
    }
    for name, (kind, message) in cases.items():
        with pytest.raises(kind, match=message):
            prepare.run(_config(tmp_path / name, tmp_path / "out" / "dataset"))
    with pytest.raises(ValueError, match="--source is missing"):
        prepare.run(PrepareConfig(output=str(tmp_path / "out")))
    with pytest.raises(ValueError, match="--output is missing"):
        prepare.run(PrepareConfig(source=str(half)))
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_used_is_refused_before_any_work(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "write_shards", None)  # would fail if it were called
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"cannot write to .*/file/below"):
        prepare.run(_config(tree, tmp_path / "file" / "below"))
    with pytest.raises(PermissionError, match="cannot write to /proc/below"):
        prepare.run(_config(tree, Path("/proc/below")))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"home is not empty.*'letter\.txt'"):
        prepare.run(_config(tree, tmp_path / "home"))
    assert [f.name for f in tmp_path.rglob("*")] == ["file", "home", "letter.txt"]


def test_an_output_inside_of_the_source_is_refused_for_it_would_become_images(
    tree: Path, tmp_path: Path
) -> None:
    before = sorted(tree.rglob("*"))
    (tmp_path / "link").symlink_to(tree)
    for output in (tree / "dataset", tree / "blue" / ".." / "x", tmp_path / "link" / "dataset"):
        with pytest.raises(ValueError, match=r"lies inside of --source .*choose a folder beside"):
            prepare.run(_config(tree, output))
    with pytest.raises(ValueError, match="lies inside of"):
        prepare.refuse_inside("s3://bucket/raw/dataset", "s3://bucket/raw/")
    prepare.refuse_inside("s3://bucket/raw-prepared", "s3://bucket/raw")
    assert sorted(tree.rglob("*")) == before


@pytest.mark.ray
def test_a_task_can_name_a_tar_whose_name_is_not_utf_8(ray_cluster: None, tmp_path: Path) -> None:
    place = tmp_path / "a.tar"
    with tarfile.open(place, "w") as archive:
        archive.addfile(tarfile.TarInfo("\udcff.tar"))
    with pytest.raises(ValueError, match=r"class tar .*\\udcff has no images"):
        prepare.run(_config(place, tmp_path / "dataset"))


def test_shards_and_rejects_that_do_not_add_up_to_the_source_get_no_manifest(
    tmp_path: Path,
) -> None:
    source, output = _tree(tmp_path / "tree", 4, broken=True), tmp_path / "dataset"
    asked = _interrupted(source, output, 1)
    place = output / "_work" / "shards" / "00000.json"
    entry = json.loads(place.read_text())
    classes = sources.open_source(str(source)).classes

    def publish() -> None:
        place.write_text(json.dumps(entry))
        job.publish({32: str(output)}, classes, asked, _config(source, output))

    lost = entry["sizes"][0]["rejects"].pop()
    message = "hold 12 images, with 2 rejects beside them, but the source has 15"
    with pytest.raises(StageFailed, match=message):
        publish()
    assert not (output / "manifest.json").exists()
    entry["sizes"][0]["rejects"].append(lost)
    publish()
    assert (output / "manifest.json").exists()


@pytest.mark.ray
def test_too_many_rejects_stop_before_the_manifest_and_can_be_allowed(
    prepared: Path, tree: Path, tmp_path: Path, ray_cluster: None
) -> None:
    output = tmp_path / "dataset"
    message = r"of 123 images cannot be used, more than --max-reject-fraction 0\.001"
    with pytest.raises(ValueError, match=message):
        prepare.run(_config(tree, output, max_reject_fraction=0.001))
    with pytest.raises(FileNotFoundError, match="no manifest"):
        shards.read_manifest(str(output))

    prepare.run(_config(tree, output, max_reject_fraction=0.1))
    assert _digests(output) == _digests(prepared)


def test_who_mends_a_source_after_too_many_rejects_is_told_to_begin_anew(tmp_path: Path) -> None:
    source, output = _tree(tmp_path / "tree", 4, broken=True), tmp_path / "dataset"
    asked = _interrupted(source, output, 1)
    ((_, entry),) = job.entries({32: str(output)}, asked)
    message = r"mend the source and choose another --output \(or empty this one\), or run the same"
    with pytest.raises(ValueError, match=message):
        prepare.Progress(asked, 0.1).add(entry)

    for name in BROKEN:
        (source / name).write_bytes(_photo(1))
    with pytest.raises(ValueError, match="the list of images differs"):
        prepare.run(_config(source, output, dry_run=True))
    shutil.rmtree(output)
    output.mkdir()
    prepare.run(_config(source, output, dry_run=True))


@pytest.mark.parametrize(("rejects", "of", "fraction"), [(29, 100, 0.29), (57, 100, 0.57)])
def test_as_many_rejects_as_are_allowed_stop_nothing(
    tree: Path, tmp_path: Path, rejects: int, of: int, fraction: float
) -> None:
    asked = _interrupted(tree, tmp_path / "dataset", 1).model_copy(update={"num_images": of})
    progress = prepare.Progress(asked, fraction)
    info = shards.ShardInfo(file="", rows=0, bytes=0, sha256="", row_groups=[])

    def entry(*ids: int) -> job.ShardEntry:
        found = [shards.Reject(i, "a.png", "empty file") for i in ids]
        return job.ShardEntry(sizes=[job.SizeEntry(info=info, rejects=found, labels={})])

    progress.add(entry(*range(rejects)))
    with pytest.raises(ValueError, match=f"{rejects + 1} of {of} images cannot be used"):
        progress.add(entry(rejects))


def test_a_dry_run_says_what_it_would_do_and_touches_nothing(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        prepare.run(_config(tree, tmp_path / "dataset", dry_run=True))
    assert "123 images of 3 classes -> 8 shards of 16" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_reads_no_more_row_groups_than_tasks_do_and_waiting_is_no_core_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    columns = pa.table([[_photo(0)] * 1200, [0, 1] * 600], names=["image", "label"])
    pq.write_table(columns, tmp_path / "a.parquet", row_group_size=20)
    groups, really = [], sources._read_rows

    def slowly(uri: str, group: int, rows: set[int]) -> Iterator[tuple[int, bytes | str]]:
        groups.append(group)
        time.sleep(0.3)
        return really(uri, group, rows)

    monkeypatch.setattr(sources, "_read_rows", slowly)
    config = _config(tmp_path / "a.parquet", tmp_path / "dataset", dry_run=True, workers=1)
    with caplog.at_level("INFO"):
        prepare.run(config)
    told = re.search(r"64 images tried, .* about (\S+) core-hours, (\S+) hours", caplog.text)
    assert told
    assert len(groups) == 4  # 64 images are three whole groups and a piece
    assert float(told[2]) > 4 * 0.3 / 64 * 1200 / 3600 * 0.9
    assert float(told[1]) < float(told[2]) / 2


@pytest.mark.ray
def test_the_verify_option_fails_on_a_flipped_byte(prepared: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for file in prepared.rglob("*.*"):
        (copy / file.relative_to(prepared)).parent.mkdir(parents=True, exist_ok=True)
        (copy / file.relative_to(prepared)).write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pipelines.prepare", "--verify", str(copy)]
    sound = subprocess.run(command, capture_output=True, text=True, check=False)
    assert sound.returncode == 0, sound.stderr
    assert "is sound: 120 images in 8 shards" in sound.stderr

    shard = copy / shards.shard_name(5, 8)
    stored = bytearray(shard.read_bytes())
    stored[1000] ^= 1
    shard.write_bytes(stored)
    damaged = subprocess.run(command, capture_output=True, text=True, check=False)
    assert damaged.returncode == 1
    assert "train-00005-of-00008.parquet: sha256" in damaged.stderr


# Arithmetic.


def test_a_permutation_is_the_same_for_ever_and_every_number_comes_once() -> None:
    assert permutation(8, 0).tolist() == permutation(8, 0).tolist()
    assert sorted(permutation(1000, 7, 1).tolist()) == list(range(1000))
    assert permutation(1000, 7, 1).tolist() != permutation(1000, 7, 2).tolist()
    assert permutation(8, 3).tolist() == PINNED


PINNED = [0, 1, 2, 7, 5, 6, 4, 3]


def test_a_permutation_needs_not_be_made_to_be_used() -> None:
    for n in (1, 2, 3, 17, 123, 4096, 5000):
        assert sorted(permuted(np.arange(n), n, 3).tolist()) == list(range(n))
    n = 10_000_019
    some = permuted(np.arange(5_000_000, 5_001_000), n, 1)
    assert len(set(some.tolist())) == 1000
    assert abs(some.mean() / n - 0.5) < 0.05  # spread over all of them
    assert permuted(np.arange(8), 8, 3).tolist() == PINNED_WALK


PINNED_WALK = [3, 2, 4, 5, 6, 7, 1, 0]


def test_images_of_a_row_group_stay_together(tmp_path: Path) -> None:
    embedded = Path(sources.__file__).parent / "embedded" / "fashion-mnist.parquet"
    sources.write_index(sources.open_source(str(embedded)), tmp_path / "index")
    order = ids_at(np.arange(20_000), tmp_path / "index", 0)
    assert sorted(order.tolist()) == list(range(20_000))
    groups = order.reshape(40, 500) // 500
    assert (groups == groups[:, :1]).all()
    assert groups[:, 0].tolist() != list(range(40))


def test_another_index_at_the_same_path_is_dealt_anew(tmp_path: Path) -> None:
    for rows, group in ((100, 10), (130, 13), (90, 15)):
        table = pa.table([[b"x"] * rows, [0] * rows], names=["image", "label"])
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=group)
        source = sources.open_source(str(tmp_path / "a.parquet"))
        sources.write_index(source, tmp_path / "new")
        storage.copy_in(tmp_path / "new", str(tmp_path / "index"))
        order = ids_at(np.arange(rows), tmp_path / "index", 0)
        assert sorted(order.tolist()) == list(range(rows))


def test_the_presets_exist_and_fit() -> None:
    assert preset_names("prepare") == ["demo", "imagenet-256", "imagenet-512"]
    sizes = [load_preset("prepare", n, PrepareConfig).image_size for n in preset_names("prepare")]
    assert sizes == [(28,), (256,), (512,)]


def test_the_presets_of_imagenet_take_the_time_that_the_readme_says(repository: Path) -> None:
    readme = (repository / "README.md").read_text("utf-8")
    told = re.search(r"for each request \| (\S+) core-hours \| (\S+) core-hours \|", readme)
    assert told
    for hours, size in zip(told.groups(), (256, 512), strict=True):
        preset = repository / "pipelines" / "presets" / "prepare" / f"imagenet-{size}.yaml"
        assert f"projected {hours} core-hours" in preset.read_text("utf-8")


@pytest.mark.ray
def test_the_manifest_holds_no_trace_of_where_it_was_written(prepared: Path) -> None:
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert str(prepared) not in json.dumps(manifest)
    assert set(manifest["versions"]) == {"pillow", "pyarrow", "libjpeg_turbo", "zlib", "webp"}
