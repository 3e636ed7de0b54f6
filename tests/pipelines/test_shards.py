"""A dataset folder can be checked by whoever reads it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jitmodel.config import ClassInfo
from pipelines import shards, storage
from pipelines.images import encode, look
from pipelines.shards import Manifest, Row, ShardInfo

CLASSES = [ClassInfo(name="cat"), ClassInfo(name="tench, Tinca tinca", wnid="n01440764")]


def _rows(ids: range) -> list[Row]:
    return [
        Row(encode(np.full((4, 4, 3), i, np.uint8), "png"), f"cat/{i}.png", i % 2, i) for i in ids
    ]


def _shard(folder: Path, number: int, ids: range) -> ShardInfo:
    name = shards.shard_name(number, 2)
    (folder / "data").mkdir(exist_ok=True)
    info = shards.write_shard(folder / name, _rows(ids), CLASSES, rows_per_group=4)
    return info.model_copy(update={"file": name})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished dataset folder of two shards, 10 and 3 rows."""
    infos = [_shard(tmp_path, 0, range(10)), _shard(tmp_path, 1, range(10, 13))]
    _publish(tmp_path, infos)
    return tmp_path


def _publish(folder: Path, infos: list[ShardInfo], num_rows: int = 13) -> None:
    manifest = Manifest(
        fingerprint=shards.fingerprint(CLASSES, infos), image_size=4, encoding="png",
        num_rows=num_rows, num_rejects=0, rows_per_class=[7, 6], classes=CLASSES, shards=infos,
        source_sha256="", config={}, versions={},
    )  # fmt: skip
    storage.write_json(str(folder / "manifest.json"), manifest.model_dump())
    (folder / "rejects.parquet").write_bytes(shards.rejects_table([]))
    for name in (shards.CARD, shards.CONTACT_SHEET):
        (folder / name).touch()


def test_a_shard_says_what_was_written(folder: Path) -> None:
    first, last = shards.read_manifest(str(folder)).shards
    assert first.file == "data/train-00000-of-00002.parquet"
    assert (first.rows, first.row_groups) == (10, [4, 4, 2])
    assert (last.rows, last.row_groups) == (3, [3])
    stored = (folder / first.file).read_bytes()
    assert (first.bytes, first.sha256) == (len(stored), hashlib.sha256(stored).hexdigest())

    table = pq.read_table(folder / first.file)
    assert table.column_names == ["image", "label", "id"]
    assert table.to_pylist()[3]["image"]["path"] == "cat/3.png"
    assert table["id"].to_pylist() == list(range(10))
    assert shards.verify(str(folder)) == []


def test_a_row_group_ends_before_its_images_take_too_much_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row._replace(image=b"i" * n) for row, n in zip(_rows(range(7)), [9, 1, 2, 30, 4, 4, 4],
                                                         strict=True)]  # fmt: skip
    monkeypatch.setattr(shards, "GROUP_BYTES", 12)
    info = shards.write_shard(tmp_path / "x.parquet", iter(rows), CLASSES, rows_per_group=4)
    assert info.row_groups == [3, 1, 3]
    table = pq.read_table(tmp_path / "x.parquet")
    assert [r["bytes"] for r in table["image"].to_pylist()] == [row.image for row in rows]


def test_a_shard_may_be_empty(tmp_path: Path) -> None:
    info = shards.write_shard(tmp_path / "x.parquet", [], CLASSES, rows_per_group=4)
    assert (info.rows, info.row_groups) == (0, [])
    assert pq.read_table(tmp_path / "x.parquet").num_rows == 0


def test_a_shard_with_a_label_of_no_class_is_never_written(tmp_path: Path) -> None:
    row = _rows(range(1))[0]._replace(label=2)
    with pytest.raises(AssertionError, match=r"label 2 is outside 0\.\.1"):
        shards.write_shard(tmp_path / "x.parquet", [row], CLASSES, rows_per_group=4)


def test_verification_finds_a_flipped_byte_and_a_lost_and_a_foreign_file(folder: Path) -> None:
    first, last = (folder / s.file for s in shards.read_manifest(str(folder)).shards)
    stored = bytearray(first.read_bytes())
    stored[len(stored) // 2] ^= 1
    first.write_bytes(stored)
    last.rename(folder / "data" / "other.parquet")

    problems = shards.verify(str(folder))

    assert len(problems) == 3
    assert "00000-of-00002.parquet: sha256" in problems[0]
    assert "00001-of-00002.parquet" in problems[1]
    assert problems[2] == "data/other.parquet: not in the manifest"


def test_verification_finds_what_is_wrong_with_the_rejects(folder: Path) -> None:
    place = folder / "rejects.parquet"
    place.write_bytes(shards.rejects_table([shards.Reject(3, "cat/3.png", "empty file")]))
    assert shards.verify(str(folder)) == [
        "rejects.parquet: 1 rows, and manifest.json says 0",
    ]
    manifest = shards.read_manifest(str(folder)).model_copy(update={"num_rejects": 1})
    storage.write_json(str(folder / "manifest.json"), manifest.model_dump())
    assert shards.verify(str(folder)) == ["id 3 occurs 2 times"]  # it is also in a shard
    place.write_bytes(place.read_bytes()[:-9])
    assert "missing or damaged" in shards.verify(str(folder))[0]


def test_verification_of_a_folder_that_lost_everything_names_all_of_it(folder: Path) -> None:
    for file in folder.glob("*/*"):
        file.unlink()
    (folder / "data").rmdir()
    (folder / "rejects.parquet").unlink()
    problems = shards.verify(str(folder))
    assert len(problems) == 3
    assert "00001-of-00002.parquet: " in problems[1]


def test_verification_finds_rows_that_are_doubled_or_miscounted(folder: Path) -> None:
    infos = [_shard(folder, 0, range(10)), _shard(folder, 1, range(8, 11))]
    _publish(folder, infos, num_rows=14)
    problems = shards.verify(str(folder))
    assert any("num_rows is 14, not 13" in p for p in problems)
    assert {"id 8 occurs 2 times", "id 9 occurs 2 times"} <= set(problems)

    wrong = infos[0].model_copy(update={"row_groups": [5, 5], "rows": 9})
    _publish(folder, [wrong, infos[1]])
    assert "10 rows in row groups of [4, 4, 2], not 9 in [5, 5]" in shards.verify(str(folder))[0]


def test_a_folder_without_a_manifest_is_not_a_dataset(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no manifest at .*jit prepare --output"):
        shards.read_manifest(str(folder))


def test_a_manifest_of_another_version_is_refused(folder: Path) -> None:
    place = folder / "manifest.json"
    place.write_text(place.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest that this version"):
        shards.read_manifest(str(folder))


@pytest.mark.parametrize("harm", ["cut short", "lost", "no shards"])
def test_a_dataset_that_lacks_shards_is_told_without_reading_them(folder: Path, harm: str) -> None:
    manifest = shards.read_manifest(str(folder))
    shards.check_there(str(folder), manifest)
    shard = folder / manifest.shards[0].file
    if harm == "cut short":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif harm == "lost":
        shard.unlink()
    else:
        manifest = manifest.model_copy(update={"shards": []})

    with pytest.raises(ValueError, match=r"does not fit its manifest\.json: it names"):
        shards.check_there(str(folder), manifest)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_size": 8}, "an image is png of 4 x 4, and not png of 8 x 8"),
        ({"encoding": "webp"}, "an image is png of 4 x 4, and not webp of 4 x 4"),
        ({"encoding": "raw"}, "an image is png of 4 x 4, and not raw of 4 x 4"),
    ],
)
def test_verification_looks_whether_images_are_what_the_manifest_says(
    folder: Path, changed: dict[str, object], message: str
) -> None:
    manifest = shards.read_manifest(str(folder)).model_copy(update=changed)
    storage.write_json(str(folder / "manifest.json"), manifest.model_dump())
    problems = shards.verify(str(folder))
    assert len(problems) == 2  # shards
    assert message in problems[0]


@pytest.mark.parametrize("name", ["README.md", "contact.png"])
def test_verification_misses_what_people_look_at(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert shards.verify(str(folder)) == [f"{name}: it is missing"]


@pytest.mark.parametrize("encoding", ["png", "webp", "raw"])
def test_a_stored_image_says_how_it_is_stored(encoding: str) -> None:
    assert look(encode(np.zeros((3, 3, 3), np.uint8), encoding)) == (encoding, 3, 3)
    assert look(b"no image") == ("?", 0, 0)
