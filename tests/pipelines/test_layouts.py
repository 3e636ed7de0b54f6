"""Every layout in which people keep images gives the same images, from a disk and from S3."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import cli, sources, storage, tars
from pipelines.index import ImageRef, Index, numbered_classes
from pipelines.labels import class_list, label_file
from pipelines.sources import open_source, read_images, write_index

Tar = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def photos(imagenet_sample: Path) -> dict[str, bytes]:
    """Eight real photographs, as wnid/name.JPEG of four classes."""
    files = sorted(imagenet_sample.glob("*.JPEG"))
    return {
        f"{files[4 * (i // 2)].name.split('_')[0]}/{files[i].name}": files[i].read_bytes()
        for i in range(0, 16, 2)
        for i in [4 * (i // 4) + i % 4 // 2]
    }


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URI below which nothing is yet."""
    if request.param == "local":
        return str(tmp_path / "root")
    for name, value in request.getfixturevalue("s3_environment").items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{uuid.uuid4().hex}"


def tar(members: Tar, kind: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar archive, in the order given."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def found(
    uri: str, folder: Path, classes: str = "", labels: str = ""
) -> tuple[list[ImageRef], dict[str, tuple[str, bytes | str]]]:
    """What a source lists, and by its paths the class names and bytes."""
    source = open_source(uri, classes, labels)
    write_index(source, folder / "index")
    index = Index(folder / "index")
    refs = index.refs(range(len(index)))
    infos = source.classes or numbered_classes(index)
    got = dict(read_images(source.root, refs))
    names = [infos[r.label].wnid or infos[r.label].name if r.label >= 0 else "" for r in refs]
    return refs, {ref.path: (names[i], got[i]) for i, ref in enumerate(refs)}


def by_class(photos: dict[str, bytes]) -> dict[str, Tar]:
    """The photographs of each class."""
    classes: dict[str, Tar] = {}
    for path, image in photos.items():
        wnid, _, name = path.partition("/")
        classes.setdefault(wnid, []).append((name, image))
    return classes


def test_a_tree_and_imagenets_tar_of_tars_and_one_tar_a_class_are_the_same(
    root: str, photos: dict[str, bytes], tmp_path: Path
) -> None:
    for path, image in photos.items():
        storage.write_bytes(storage.join(root, "a/b/c/train", path), image)
    inner = {f"{wnid}.tar": tar(members) for wnid, members in by_class(photos).items()}
    backwards = list(inner.items())[::-1]  # the order in the outer tar means nothing
    place = storage.join(root, "ILSVRC2012_img_train.tar")
    storage.write_bytes(place, tar([*backwards, ("readme.txt", b"no image")]))
    for name, content in inner.items():
        storage.write_bytes(storage.join(root, "classes", name), content)

    expected = {path: (path.partition("/")[0], image) for path, image in photos.items()}
    for uri in (storage.join(root, "a/b/c/train"), place, storage.join(root, "classes")):
        refs, got = found(uri, tmp_path)
        assert got == expected
        assert [ref.label for ref in refs] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_tar_on_s3_is_read_by_ranges_and_never_as_a_whole(
    photos: dict[str, bytes], tmp_path: Path, s3_environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    uri = f"s3://bucket/{uuid.uuid4().hex}/train.tar"
    outer = tar([(f"{wnid}.tar", tar(members)) for wnid, members in by_class(photos).items()])
    storage.write_bytes(uri, outer)
    reads: list[int] = []
    read_bytes = storage.read_bytes

    def counted(uri: str, first: int = 0, length: int | None = None) -> bytes:
        assert length is not None
        reads.append(length)
        return read_bytes(uri, first, length)

    monkeypatch.setattr(storage, "read_bytes", counted)
    write_index(open_source(uri), tmp_path / "index")
    assert len(Index(tmp_path / "index")) == 8
    assert max(reads) == 4096
    assert len(reads) <= 8 + 3 * 4 + 4  # a request a member, and few more a tar
    assert sum(reads) < len(outer) // 4


@pytest.mark.parametrize("order", [("jpg", "cls"), ("cls", "jpg"), ("json", "jpg", "txt")])
def test_a_webdataset_is_listed_by_one_request_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faulty_store: Any,
    faulty_environment: dict[str, str], order: tuple[str, ...],
) -> None:  # fmt: skip
    for name, value in faulty_environment.items():
        monkeypatch.setenv(name, value)
    faulty_store.slow_down = faulty_store.reset = faulty_store.truncate = 0.0
    contents = {"jpg": os.urandom(20_000), "cls": b"3", "json": b'{"label": 3}', "txt": b"a text"}
    place = f"s3://bucket/{uuid.uuid4().hex}.tar"
    members = [(f"{i:02d}.{ending}", contents[ending]) for i in range(20) for ending in order]
    storage.write_bytes(place, tar(members))
    source = open_source(place)
    before = faulty_store.seen["requests"]
    refs = list(source.refs(source.parts[0]))
    assert [(ref.label, ref.problem) for ref in refs] == [(3, None)] * 20
    assert faulty_store.seen["requests"] - before <= 20 + 3


def test_a_long_tar_says_how_far_its_list_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x.tar").write_bytes(tar([(f"{i}.png", b"1") for i in range(30)]))
    monkeypatch.setattr(sources, "LOG_MEMBERS", 10)
    source = open_source(str(tmp_path / "x.tar"), "one")
    with caplog.at_level("INFO"):
        assert len(list(source.refs(source.parts[0]))) == 30
        assert not caplog.records  # it was fast
        monkeypatch.setattr(sources, "LOG_S", 0.0)
        list(source.refs(source.parts[0]))
    assert [record.getMessage() for record in caplog.records][:2] == [
        "x.tar: 10 members listed, 24 % of its bytes", "x.tar: 20 members listed, 49 % of its bytes"
    ]  # fmt: skip


def test_the_validation_tar_is_labelled_by_the_package_or_by_a_file(
    root: str, photos: dict[str, bytes], tmp_path: Path
) -> None:
    images = list(photos.values())[:3]
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (15416, 3116, 2)]
    place = storage.join(root, "tar", "ILSVRC2012_img_val.tar")
    storage.write_bytes(place, tar(list(zip(names, images, strict=True))))
    _, got = found(place, tmp_path)
    assert [(wnid, image) for wnid, image in got.values()][:2] == [
        ("n01534433", images[0]), ("n01534433", images[1])
    ]  # fmt: skip
    assert len(open_source(place).classes) == 1000

    # Kaggle's file, for the tar and for a folder into which it was unpacked.
    solution = storage.join(root, "LOC_val_solution.csv")
    lines = ["ImageId,PredictionString", f"{names[0][:-5]},n01440764 1 2 3 4 n01440764 5 6 7 8",
             f"{names[1][:-5]},n01443537 1 2 3 4"]  # fmt: skip
    storage.write_bytes(solution, "\n".join(lines).encode())
    for name, image in zip(names, images, strict=True):
        storage.write_bytes(storage.join(root, "folder", name), image)
    for uri in (place, storage.join(root, "folder")):
        refs, got = found(uri, tmp_path, labels=solution)
        wnids = {ref.path.rpartition("/")[2]: got[ref.path][0] for ref in refs}
        assert wnids == {names[0]: "n01440764", names[1]: "n01443537", names[2]: ""}
        unlabelled = next(ref for ref in refs if ref.path.endswith(names[2]))
        assert unlabelled.problem == "it has no label"
        assert got[unlabelled.path][1] == "it has no label"


def test_webdataset_tars_bring_labels_in_cls_and_json(
    root: str, photos: dict[str, bytes], tmp_path: Path
) -> None:
    a, b, c, d, *_ = photos.values()
    first = [
        ("00/x.jpg", a), ("00/x.cls", b"3"), ("00/x.txt", b"a caption"),
        ("00/y.json", json.dumps({"label": 1, "caption": "y"}).encode()), ("00/y.png", b),
        ("00/bare.jpg", c), ("00/odd.jpg", c), ("00/odd.cls", b"tench"),
        ("00/nojson.jpg", c), ("00/nojson.json", b"{"), ("00/nokey.jpg", c),
        ("00/nokey.json", b"[1]"),
        ("00/null.jpg", d), ("00/null.json", b'{"label": null, "cls": 2}'),
        ("00/text.txt", b"no image here"), ("00/text.cls", b"1"),
    ]  # fmt: skip
    second = [("x.seg.v1.jpg", d), ("x.seg.v1.cls", b"0\n"), ("z.jpg", d), ("z.cls", b"0"),
              ("x.jpg", a), ("x.cls", b"2")]  # fmt: skip
    storage.write_bytes(storage.join(root, "train-000.tar"), tar(first))
    storage.write_bytes(storage.join(root, "train-001.tar"), tar(second, tarfile.PAX_FORMAT))

    for uri in (root, storage.join(root, "train-*.tar")):
        refs, got = found(uri, tmp_path)
        assert {p: v for p, v in got.items() if isinstance(v[1], bytes)} == {
            "train-000.tar/00/x.jpg": ("3", a),
            "train-000.tar/00/y.png": ("1", b),
            "train-000.tar/00/null.jpg": ("2", d),
            "train-001.tar/z.jpg": ("0", d),
        }
        assert {ref.path.rpartition("/")[2]: ref.problem for ref in refs if ref.problem} == {
            "bare.jpg": "it has no .cls and no .json beside it",
            "odd.jpg": "its label is no number and not in the class list: 'tench'",
            "nojson.jpg": "its .json cannot be read",
            "nokey.jpg": "its .json has none of label, cls, class, class_id",
            "x.seg.v1.jpg": "it has no .cls and no .json beside it",
            "x.jpg": "an earlier sample of the archive has the same name",
        }
    names = storage.join(root, "names.txt")
    storage.write_bytes(names, b"shark\ngoldfish\nwhite shark\ntench\n")
    _, got = found(root, tmp_path, classes=names)
    assert got["train-000.tar/00/odd.jpg"] == ("tench", c)
    assert got["train-000.tar/00/y.png"] == ("goldfish", b)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["cat/1.jpg", "dog/1.jpg", "backup.tar"], {},
         r"holds backup\.tar beside cat, .*--source '.*/\*\.tar', or move backup\.tar away"),
        (["data/1.jpg", "dog/1.jpg", "meta.parquet"], {}, r"holds meta\.parquet beside data"),
        (["a.parquet", "a.tar"], {}, r"holds a\.parquet beside a\.tar"),
        (["cat/1.jpg", "dog/1.jpg"], {"labels": "x 1"}, "--labels is for images that lie together"),
        (["n01440764.tar"], {"labels": "x 1"}, "--labels is for images that lie together"),
        (["1.jpg"], {"labels": "1 1", "classes": "one"}, "makes one class .* leave --labels out"),
    ],
)  # fmt: skip
def test_what_is_not_clear_is_refused_with_both_names(
    tmp_path: Path, names: list[str], options: dict[str, str], message: str
) -> None:
    for name in names:
        storage.write_bytes(str(tmp_path / "root" / name), tar([("x.jpg", b"1"), ("x.cls", b"1")]))
    if "labels" in options:
        (tmp_path / "labels").write_text(options["labels"])
        options = options | {"labels": str(tmp_path / "labels")}
    with pytest.raises(ValueError, match=message):
        found(str(tmp_path / "root"), tmp_path, **options)


@pytest.mark.parametrize(
    ("above", "train"),
    [("ILSVRC/Data/CLS-LOC/train", "ILSVRC/Data/CLS-LOC/train"), ("train_images", "train_images"),
     ("train/n01440764/n01443537", None), ("n01440764/x", None)],
)  # fmt: skip
def test_imagenet_that_is_given_too_high_is_refused_unless_that_is_meant(
    tmp_path: Path, above: str, train: str | None
) -> None:
    root = tmp_path / "root"
    for wnid in ("n01440764", "n01443537"):
        storage.write_bytes(str(root / above / wnid / "1.JPEG"), b"1")
    storage.write_bytes(str(root / "bnn01440764" / "1.JPEG"), b"1")
    folders = sorted(folder.name for folder in root.iterdir())
    if train:
        message = rf"give --source {root}/{train}, or name the classes"
        with pytest.raises(ValueError, match=message):
            found(str(root), tmp_path)
        assert len(found(f"{root}/{train}", tmp_path)[0]) == 2
        return
    names = tmp_path / "names.txt"
    names.write_text("\n".join(folders))
    for classes in ("one", str(names), *([""] if "n01440764" in folders else [])):
        assert len(found(str(root), tmp_path, classes)[0]) == 3


def test_labels_of_parquet_and_of_a_tar_of_tars_are_refused(tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("x 1")
    (tmp_path / "x.tar").write_bytes(tar([("a.tar", tar([("1.jpg", b"1")]))]))
    for uri in (sources.__file__.replace("sources.py", "embedded/fashion-mnist-test.parquet"),
                str(tmp_path / "x.tar")):  # fmt: skip
        with pytest.raises(ValueError, match="--labels is for images that lie together"):
            open_source(uri, labels=str(tmp_path / "labels"))


def test_odd_names_and_hidden_files_do_no_harm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inner = tar([("1.png", b"1")])
    mac = b"\0\5\26\7" + bytes(200)
    cases: dict[str, tuple[str, Tar, dict[str, str]]] = {
        "hidden": ("mac.tar", [("._n01440764.tar", mac), ("n01440764.tar", inner)],
                   {"n01440764/1.png": "n01440764"}),
        "licence": ("val.tar", [("LICENSE", b""), ("val/ILSVRC2012_val_00000001.JPEG", b"1")],
                    {"val.tar/val/ILSVRC2012_val_00000001.JPEG": "n01751748"}),
        "brackets": ("train[1].tar", [("a.tar", inner)], {"a/1.png": "a"}),
    }  # fmt: skip
    for name, members, expected in cases.values():
        (tmp_path / name).write_bytes(tar(members))
        _, got = found(str(tmp_path / name), tmp_path)
        assert {path: label for path, (label, _) in got.items()} == expected, name
    assert "left out 1 hidden tars, such as ._n01440764.tar" in caplog.text

    for name in ("tree/a.tar/1.png", "tree/b/1.png", "tars/.x.tar", "tars/n01440764.tar"):
        content = inner if name.endswith("4.tar") else mac
        storage.write_bytes(str(tmp_path / name), content)
    for uri, expected in (("tree", {"a.tar/1.png": "a.tar", "b/1.png": "b"}),
                          ("tars", {"n01440764/1.png": "n01440764"})):  # fmt: skip
        _, got = found(str(tmp_path / uri), tmp_path)
        assert {path: label for path, (label, _) in got.items()} == expected
    storage.write_bytes(str(tmp_path / "folder.tar" / "a" / "1.png"), b"1")
    _, got = found(str(tmp_path / "folder.tar"), tmp_path)
    assert list(got) == ["a/1.png"]


def test_classes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "classes").write_text("a\tcrane\nb\tcrane\nn02012849\tcrane\nd\n")
    names = [choice.info.name for choice in class_list(str(tmp_path / "classes"))]
    assert names == ["crane (a)", "crane (b)", "crane (n02012849)", "d"]


@pytest.mark.parametrize(
    ("ending", "text", "label"),
    [
        ("json", '{"label": 3.0}', 3), ("json", '{"label": "3"}', 3),
        ("json", '{"label": 3.5}', -1),
        ("json", '\ufeff{"label": 3}', 3), ("json", '{"label": true}', -1), ("cls", "\ufeff3", 3),
        ("json", '{"label": [3]}', -1), ("cls", "3\n", 3), ("cls", "3 4", -1),
        ("json", '{"label": 1e99}', -1), ("json", '{"label": NaN}', -1),
    ],
)  # fmt: skip
def test_labels_are_read_as_people_and_programs_write_them(
    tmp_path: Path, ending: str, text: str, label: int
) -> None:
    (tmp_path / "x.tar").write_bytes(tar([("a.jpg", b"a"), (f"a.{ending}", text.encode())]))
    source = open_source(str(tmp_path / "x.tar"))
    (ref,) = source.refs(source.parts[0])
    assert ref.label == label
    assert (ref.problem is None) == (label >= 0)


def test_a_sample_of_a_webdataset_has_one_image_and_nothing_is_lost(tmp_path: Path) -> None:
    members = [
        ("x.jpg", b"x"), ("x.depth.png", b"depth"), ("x.cls", b"0"),
        ("y.depth.png", b"depth"), ("y.JPG", b"y"), ("y.cls", b"0"),
        ("twice.jpg", b"1"), ("twice.cls", b"0"), ("twice.jpg", b"2"), ("twice.cls", b"1"),
        ("two.jpg", b"1"), ("two.png", b"2"), ("two.cls", b"0"),
        ("only.seg.png", b"seg"), ("only.cls", b"0"),
        ("other.tif", b"tif"), ("other.seg.png", b"seg"), ("other.cls", b"0"),
        ("both.jpg", b"both"), ("both.pgm", b"depth"), ("both.cls", b"0"),
    ]  # fmt: skip
    (tmp_path / "web.tar").write_bytes(tar(members))
    refs, _ = found(str(tmp_path / "web.tar"), tmp_path)
    contents = dict(read_images(str(tmp_path), refs))
    several = "it is one of several images of its name: jpg, png"
    assert [(ref.path.partition("/")[2], contents[i]) for i, ref in enumerate(refs)] == [
        ("x.jpg", b"x"), ("y.jpg", b"y"), ("twice.jpg", b"1"),
        ("twice.jpg", "an earlier sample of the archive has the same name"),
        ("two.jpg", several), ("two.png", several), ("only.seg.png", b"seg"),
        ("other.seg.png", b"seg"), ("both.jpg", b"both"),
    ]  # fmt: skip
    assert [ref.unit for ref in refs] == list(range(9))


def test_a_label_is_found_in_a_long_json_and_one_that_is_too_long_is_told(tmp_path: Path) -> None:
    embedding = json.dumps({"embedding": [0.123456] * 40_000, "label": 3}).encode()
    too_long = b" " * (sources.LABEL_BYTES + 1)
    members = [("x.jpg", b"1"), ("x.json", embedding), ("y.jpg", b"2"), ("y.json", too_long),
               ("z.jpg", b"3"), ("z.cls", b"2")]  # fmt: skip
    (tmp_path / "web.tar").write_bytes(tar(members))
    refs, _ = found(str(tmp_path / "web.tar"), tmp_path)
    assert [(ref.label, ref.problem) for ref in refs] == [
        (3, None), (-1, "its .json is longer than 1 MiB"), (2, None)
    ]  # fmt: skip


def test_endings_that_are_not_utf_8_are_told_as_names_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [("x.cls", b"0"), ("x.a.jpg", b"1"), ("x.\udcff.jpg", b"2"),
               ("y.jpg", b"3"), ("y.cls", b"0"), ("z.\udcfe", b""), ("z.cls", b"0")]  # fmt: skip
    (tmp_path / "web.tar").write_bytes(tar(members))
    refs, _ = found(str(tmp_path / "web.tar"), tmp_path)
    several = "it is one of several images of its name: a.jpg, \\udcff.jpg"
    assert [(ref.path, ref.problem) for ref in refs] == [
        ("web.tar/x.a.jpg", several), ("web.tar/x.\\udcff.jpg", several), ("web.tar/y.jpg", None),
    ]  # fmt: skip
    assert "1 .\\udcfe" in caplog.text


def test_what_is_named_like_an_image_is_judged_and_the_rest_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["1.jpg", "2.TIF", "3.ppm", "4.jfif", "5.psd", "6.heic", "7", "8.txt", "9.txt"]
    for name in names:
        storage.write_bytes(str(tmp_path / "tree" / "cat" / name), name.encode())
    inner = tar([(name, name.encode()) for name in names])
    (tmp_path / "x.tar").write_bytes(tar([("cat.tar", inner), ("dog.tar", inner)]))
    for uri, count in (("tree", 1), ("x.tar", 2)):
        caplog.clear()
        refs, _ = found(str(tmp_path / uri), tmp_path)
        assert [ref.path for ref in refs] == [
            f"{animal}/{name}" for animal in ["cat", "dog"][:count] for name in names[:6]
        ]
        assert f"{3 * count} files that are no images by their names: {2 * count} .txt, " \
            f"{count} without ending" in caplog.text  # fmt: skip


def test_what_lies_loose_in_a_tar_of_tars_or_has_no_image_in_a_webdataset_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inner = tar([("1.png", b"1")])
    members = [("loose.JPEG", b"1"), ("readme.txt", b""), ("a.tar", inner), ("B.TAR", inner)]
    (tmp_path / "x.tar").write_bytes(tar(members))
    refs, _ = found(str(tmp_path / "x.tar"), tmp_path)
    assert [ref.path for ref in refs] == ["B/1.png", "a/1.png"]
    assert "1 images lie in" in caplog.text
    assert "left out 1 files that are no images by their names: 1 .txt" in caplog.text

    caplog.clear()
    members = [("a.png", b"1"), ("a.cls", b"0"), ("a.txt", b"a caption"), ("b.img", b"2"),
               ("b.cls", b"1"), ("c.jpg.enc", b"x"), ("c.cls", b"1"), ("d.cls", b"1")]  # fmt: skip
    (tmp_path / "web.tar").write_bytes(tar(members))
    refs, _ = found(str(tmp_path / "web.tar"), tmp_path)
    assert [ref.path for ref in refs] == ["web.tar/a.png"]
    assert "left out 3 files that are no images by their names: 1 .img, 1 .enc, 1 .cls" in (
        caplog.text
    )


def test_a_class_list_orders_names_and_chooses(tmp_path: Path) -> None:
    for i, name in enumerate(["n01440764", "n01443537", "zebra", "dog"]):
        storage.write_bytes(str(tmp_path / "tree" / name / "1.png"), bytes([i]))
    listed = tmp_path / "classes.txt"
    listed.write_text(
        "# mine\nzebra\tStriped horse\nn01443537 goldfish, best of all\n\nn01440764\n"
    )
    _, got = found(str(tmp_path / "tree"), tmp_path, classes=str(listed))
    assert [c.info.name for c in class_list(str(listed))] == [
        "Striped horse", "goldfish, best of all", "tench, Tinca tinca"
    ]  # fmt: skip
    assert [(path, label) for path, (label, _) in got.items()] == [
        ("zebra/1.png", "Striped horse"), ("n01443537/1.png", "n01443537"),
        ("n01440764/1.png", "n01440764"),
    ]  # fmt: skip
    for text, message in (
        ("zebra\ngnu\n", "1 of 2 listed classes are not in .*'gnu'"),
        ("\n# nothing", "names no class"),
        ("a\nb\na\n", "names 'a' twice"),
        ("a\tx\nb\tx\nc\tx (a)\n", r"calls two classes 'x \(a\)'"),
    ):
        listed.write_text(text)
        with pytest.raises(ValueError, match=message):
            open_source(str(tmp_path / "tree"), str(listed))
    assert [c.key for c in class_list("imagenet")][:2] == ["n01440764", "n01443537"]
    assert len(class_list("imagenet")) == 1000


def test_one_class_takes_any_layout(tmp_path: Path, photos: dict[str, bytes]) -> None:
    images = sorted(photos.values())
    for i, image in enumerate(images):
        name = [f"{i}.jpg", f"a/{i}.jpg", f"a/b/{i}.jpg", f"val/{i}.jpg"][i % 4]
        storage.write_bytes(str(tmp_path / "tree" / name), image)
    (tmp_path / "flat.tar").write_bytes(tar([(f"x/{i}.jpg", im) for i, im in enumerate(images)]))
    nested = [(f"{w}.tar", tar(members)) for w, members in by_class(photos).items()]
    (tmp_path / "nested.tar").write_bytes(tar(nested))
    (tmp_path / "web.tar").write_bytes(tar([(f"{i}.{e}", c) for i, im in enumerate(images)
                                            for e, c in (("jpg", im), ("cls", b"7"))]))  # fmt: skip
    for name in ("tree", "flat.tar", "nested.tar", "web.tar"):
        _, got = found(str(tmp_path / name), tmp_path, classes="one")
        assert sorted(image for _, image in got.values()) == images, name  # type: ignore[type-var]
        assert {label for label, _ in got.values()} == {"image"}, name


def test_a_list_of_one_class_chooses_it_and_leaves_the_others(
    tmp_path: Path, photos: dict[str, bytes]
) -> None:
    classes = by_class(photos)
    wanted = sorted(classes)[1]
    listed = tmp_path / "classes.txt"
    listed.write_text(wanted)
    for path, image in photos.items():
        storage.write_bytes(str(tmp_path / "tree" / path), image)
    inner = {f"{wnid}.tar": tar(members) for wnid, members in classes.items()}
    (tmp_path / "nested.tar").write_bytes(tar(list(inner.items())))
    for name, content in inner.items():
        storage.write_bytes(str(tmp_path / "tars" / name), content)
    for name in ("tree", "nested.tar", "tars"):
        _, got = found(str(tmp_path / name), tmp_path, classes=str(listed))
        assert got == {f"{wanted}/{n}": (wanted, image) for n, image in classes[wanted]}, name

    labelled = [(f"{i}.{e}", c) for i, (wnid, members) in enumerate(classes.items())
                for e, c in (("jpg", members[0][1]), ("cls", wnid.encode()))]  # fmt: skip
    (tmp_path / "web.tar").write_bytes(tar(labelled))
    refs, got = found(str(tmp_path / "web.tar"), tmp_path, classes=str(listed))
    assert [ref.label for ref in refs if ref.problem is None] == [0]
    assert sum("no number and not in the class list" in str(ref.problem) for ref in refs) == 3


@pytest.mark.parametrize("layout", ["web.tar", "flat", "a.parquet"])
def test_a_class_list_of_numbers_chooses_by_these_and_not_by_their_places(
    tmp_path: Path, layout: str
) -> None:
    images = {f"{i}.png": bytes([i]) for i in range(6)}  # image i has the label i % 3
    labels = [i % 3 for i in range(6)]
    options = {"classes": str(tmp_path / "classes")}
    if layout == "web.tar":
        cls = [(f"{i}.cls", str(label).encode()) for i, label in enumerate(labels)]
        (tmp_path / layout).write_bytes(tar(sorted([*images.items(), *cls])))
    elif layout == "flat":
        for name, image in images.items():
            storage.write_bytes(str(tmp_path / layout / name), image)
        (tmp_path / "labels").write_text("".join(f"{i}.png {k}\n" for i, k in enumerate(labels)))
        options["labels"] = str(tmp_path / "labels")
    else:
        table = pa.table([list(images.values()), labels], names=["image", "label"])
        pq.write_table(table, tmp_path / layout)

    for listed, names in (
        ("2\tcat\n1\n", {1: "1", 2: "cat"}),
        ("zero\none\ntwo\n", {0: "zero", 1: "one", 2: "two"}),
        ("1\n2\nthird\n", {1: "1", 2: "2"}),
    ):
        (tmp_path / "classes").write_text(listed)
        refs, got = found(str(tmp_path / layout), tmp_path, **options)
        usable = [got[ref.path] for ref in refs if ref.problem is None]
        assert usable == [(names[i % 3], bytes([i])) for i in range(6) if i % 3 in names]
        problems = {ref.problem for ref in refs} - {None}
        assert problems <= {"its label is not in the class list: '0'"}
        assert bool(problems) == (layout == "web.tar" and 0 not in names)


def test_labels_of_which_a_list_of_numbers_has_none_are_refused(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "flat" / "a.png"), b"1")
    (tmp_path / "labels").write_text("a 0\n")
    (tmp_path / "classes").write_text("1\n2\n")
    with pytest.raises(ValueError, match=r"no label for .* is in the class list, such as '0'"):
        open_source(str(tmp_path / "flat"), str(tmp_path / "classes"), str(tmp_path / "labels"))


def test_label_files_come_in_several_shapes(tmp_path: Path) -> None:
    for text in (
        "a.png 0\nb.png 1\n", "a,0\nb,1\n", "x/a.png\t0 more\nx/b.png\t1\n",
        '\ufeff"name","label"\r\n"a.png","0"\r\n"b.png","1"\r\n', "a 0\na 0\nb 1\n",
    ):  # fmt: skip
        (tmp_path / "labels").write_text(text, encoding="utf-8")
        for name in "ab":
            storage.write_bytes(str(tmp_path / "flat" / f"{name}.png"), name.encode())
        refs, _ = found(str(tmp_path / "flat"), tmp_path, labels=str(tmp_path / "labels"))
        assert [(r.path, r.label) for r in refs] == [("a.png", 0), ("b.png", 1)], text
    (tmp_path / "labels").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="no line of the form: name label"):
        label_file(str(tmp_path / "labels"))
    (tmp_path / "labels").write_text("490\n361\n")
    with pytest.raises(ValueError, match=r"validation images leave --labels out"):
        label_file(str(tmp_path / "labels"))
    with pytest.raises(FileNotFoundError, match=r"no label file \(--labels\) at .*/missing: check"):
        open_source(str(tmp_path / "flat"), labels=str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match=r"no class list \(--classes\) at .*/missing"):
        open_source(str(tmp_path / "flat"), str(tmp_path / "missing"))
    (tmp_path / "labels").write_text("a cat\nb dog\n")
    with pytest.raises(ValueError, match=r"no label for .* is a number or a known class"):
        open_source(str(tmp_path / "flat"), labels=str(tmp_path / "labels"))
    (tmp_path / "labels").write_text("a.png 0\nb.png 1\na.png 1\n")
    with pytest.raises(ValueError, match=r"two labels for a\.png"):
        label_file(str(tmp_path / "labels"))
    (tmp_path / "labels").write_text("a.png 5000000\n")
    with pytest.raises(ValueError, match=r"lowest label is 5000000: .*name the classes"):
        open_source(str(tmp_path / "flat"), labels=str(tmp_path / "labels"))


def test_a_label_file_with_a_field_that_is_too_long_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage.write_bytes(str(tmp_path / "flat" / "a.png"), b"1")
    (tmp_path / "labels").write_text(f'a.png,"{"x" * 200_000}"\nb.png,1\n')
    options = ["--output", str(tmp_path / "dataset"), "--labels", str(tmp_path / "labels")]
    assert cli.main(["prepare", "--source", str(tmp_path / "flat"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"label file {tmp_path}/labels has a line that cannot be read, 'a.png,\"xx" in line
    assert "field larger than field limit" in line


VALIDATION = {f"ILSVRC2012_val_{i:08d}.JPEG": wnid for i, wnid in (
    (1, "n01751748"), (2, "n09193705"), (3, "n02105855"))}  # fmt: skip


@pytest.mark.parametrize(
    ("classes", "labels", "labelled"),
    [
        ("backwards", None, [1, 2, 3]), ("three", None, [1, 2, 3]), ("one", None, [2]),
        ("backwards", "wnid", [1, 2, 3]), ("three", "wnid", [1, 2, 3]), ("one", "wnid", [2]),
        ("", "wnid", [1, 2, 3]), ("", "number", [1, 2, 3]),  # as Caffe's val.txt
    ],
)  # fmt: skip
def test_validation_images_have_their_classes_whatever_the_list_and_the_labels(
    tmp_path: Path, classes: str, labels: str | None, labelled: list[int]
) -> None:
    every = [choice.key for choice in class_list("imagenet")]
    lists = {"backwards": every[::-1], "three": sorted(VALIDATION.values()),
             "one": list(VALIDATION.values())[1:2]}  # fmt: skip
    texts = {"wnid": VALIDATION, "number": {n: every.index(w) for n, w in VALIDATION.items()}}
    (tmp_path / "val.tar").write_bytes(tar([(name, b"1") for name in VALIDATION]))
    options = {}
    if classes:
        (tmp_path / "classes").write_text("\n".join(lists[classes]))
        options["classes"] = str(tmp_path / "classes")
    if labels:
        lines = [f"{name} {text}" for name, text in texts[labels].items()]
        (tmp_path / "labels").write_text("\n".join(lines))
        options["labels"] = str(tmp_path / "labels")
    _, got = found(str(tmp_path / "val.tar"), tmp_path, **options)
    assert {path.partition("/")[2]: wnid for path, (wnid, _) in got.items()} == {
        name: VALIDATION[name] for i, name in enumerate(VALIDATION, 1) if i in labelled
    }


def test_numbers_of_validation_images_in_another_order_are_not_taken_for_imagenets(
    tmp_path: Path,
) -> None:
    (tmp_path / "val.tar").write_bytes(tar([(name, b"1") for name in VALIDATION]))
    (tmp_path / "labels").write_text("".join(f"{n} {i}\n" for i, n in enumerate(VALIDATION)))
    source = open_source(str(tmp_path / "val.tar"), labels=str(tmp_path / "labels"))
    assert [info.wnid for info in source.classes] == [None] * 3


def test_a_listed_class_that_the_validation_images_lack_is_refused(tmp_path: Path) -> None:
    (tmp_path / "val.tar").write_bytes(tar([(name, b"1") for name in VALIDATION]))
    (tmp_path / "classes").write_text("n01751748\nn99999999\n")
    with pytest.raises(ValueError, match=r"1 of 2 listed classes are not in .*'n99999999'"):
        open_source(str(tmp_path / "val.tar"), str(tmp_path / "classes"))


@pytest.mark.parametrize(
    ("names", "text", "labels"),
    [
        (["a.png", "a.jpg"], "a.png 0\na.jpg 1", [1, 0]),
        (["a.png", "a.jpg"], "a 0\na.jpg 1", [1, 0]),
        (["a.webp"], "a.PNG 1\na.jpg 1", [1]),
        (["a.webp"], "a.png 0\na.jpg 1", r"label of a\.webp may be that of a\.jpg or of a\.png"),
        (["my cat.png", "my photo.png"], "my photo.png\t0\nmy cat.png\t1", [1, 0]),
        (["my cat.png", "my photo.png"], '"my photo.png",0\n"my cat.png", 1', [1, 0]),
        (["my cat.png", "my photo.png"], "my photo.png 0\nmy cat.png   1", [1, 0]),
        (["a, b.png"], '"a, b.png",1', [1]), (["a, b.png"], "a, b.png\t1", [1]),
        (["a.png"], 'a.png,"big, dog"', [3]), (["a.png"], "a.png\tgolden retriever", [2]),
    ],
)  # fmt: skip
def test_labels_are_found_by_the_whole_name_before_the_name_without_ending(
    tmp_path: Path, names: list[str], text: str, labels: list[int] | str
) -> None:
    for name in names:
        storage.write_bytes(str(tmp_path / "flat" / name), b"1")
    (tmp_path / "labels").write_text(text)
    (tmp_path / "classes").write_text("x\ny\ngolden retriever\nbig, dog")
    options = {"labels": str(tmp_path / "labels"), "classes": str(tmp_path / "classes")}
    if isinstance(labels, str):
        with pytest.raises(ValueError, match=labels):
            found(str(tmp_path / "flat"), tmp_path, **options)
    else:
        refs, _ = found(str(tmp_path / "flat"), tmp_path, **options)
        assert [ref.label for ref in refs] == labels


@pytest.mark.parametrize("kind", ["labels", "web"])
@pytest.mark.parametrize("typo", [999_999, 99_999_999, 1_005])
def test_one_number_far_above_the_others_makes_no_classes(
    tmp_path: Path, kind: str, typo: int
) -> None:
    labels = {"a": 0, "b": 3, "c": typo}
    if kind == "labels":
        uri, options = str(tmp_path / "flat"), {"labels": str(tmp_path / "labels")}
        (tmp_path / "labels").write_text("".join(f"{n}.png {v}\n" for n, v in labels.items()))
        for name in labels:
            storage.write_bytes(str(tmp_path / "flat" / f"{name}.png"), b"1")
    else:
        uri, options = str(tmp_path / "web.tar"), {}
        files = [(f"{n}.{e}", c) for n, v in labels.items()
                 for e, c in (("png", b"1"), ("cls", str(v).encode()))]  # fmt: skip
        (tmp_path / "web.tar").write_bytes(tar(files))
    source = open_source(uri, **options)
    write_index(source, tmp_path / "index")
    index = Index(tmp_path / "index")
    assert len(source.classes or numbered_classes(index)) == 4
    assert [ref.label for ref in index.refs(range(3))] == [0, 3, typo]  # out of 0..3: a reject


THREE = tar([(name, name.encode()) for name in ("1.jpg", "2.jpg", "3.jpg")])


def _with_size(size: bytes) -> bytes:
    """A tar whose one header says this for its size, and is right in all else."""
    archive = bytearray(tar([("a.jpg", b"1")]))
    archive[124:136] = size.ljust(12, b"\0")
    archive[148:156] = b" " * 8
    archive[148:156] = b"%06o\0 " % sum(archive[:512])
    return bytes(archive)


def _with_link(name: str, kind: bytes) -> bytes:
    """A tar of one good tar, and of another that is of this kind."""
    buffer = io.BytesIO(tar([("a.tar", tar([("1.jpg", b"1")]))]))
    with tarfile.open(fileobj=buffer, mode="a") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "a.tar" * (kind in (tarfile.LNKTYPE, tarfile.SYMTYPE))
        archive.addfile(info)
    return buffer.getvalue()


def _with_pax_size(size: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {"size": size}
        archive.addfile(info)
    return buffer.getvalue()


def _with_pax_record(record: bytes) -> bytes:
    archive = _with_pax_size("0" * len(record))
    return archive[:512] + record + archive[512 + len(record) :]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tar", _with_size(b"-0000001000"), "header at byte 0 has no size"),
        ("x.tar", _with_size(b"77777777777"), "ends in the middle of a member"),
        ("x.tar", _with_size(b"\xff" * 12), "ends in the middle of a member"),
        ("x.tar", _with_size(b"9"), "no tar header at byte 0"),
        ("x.tar", _with_pax_size("-1024"), "header at byte 1024 has no size"),
        ("x.tar", _with_pax_size("many"), "header at byte 1024 has no size"),
        ("x.tar", _with_pax_size("9" * 5000), r"x\.tar: the header at byte 5632 has no size"),
        (
            "x.tar",
            _with_pax_record(b"9" * 4999 + b" "),
            "has no labels: expected",
        ),  # it is passed over
        ("x.tar", _with_pax_size("9" * 19), "ends in the middle of a member"),
        ("x.tar", b"", "is an empty archive"),
        ("x.tar", bytes(10240), "is an empty archive"),
        ("x.tar", b"no tar at all" * 100, "no tar header at byte 0"),
        ("x.tar", gzip.compress(tar([("a.jpg", b"1")])), "is compressed there.*decompress it"),
        ("x.tar.gz", b"", "x.tar.gz is compressed"),
        ("x.tar", tar([("a.jpg", b"1" * 9000)])[:5000], "ends in the middle of a member"),
        ("x.tar", tar([("a/1.jpg", b"1"), ("b/1.jpg", b"1")]), "has no labels: expected"),
        ("x.tar", tar([("a.tar", tar([("1.txt", b"")]))]), "class tar .*a has no images"),
        ("x.tar", tar([("a.tar", tar([("1.jpg", b"1")])), ("b/a.tar", b"")]), "two tars of class"),
        (
            "x.tar",
            _with_link("b.tar", tarfile.LNKTYPE),
            r"b\.tar in .*x\.tar .* a hard link",
        ),
        ("x.tar", _with_link("b.tar", tarfile.SYMTYPE), r"b\.tar in .*x\.tar .* a symbolic link"),
        ("x.tar", _with_link("b.tar", tarfile.CHRTYPE), r"b\.tar in .*x\.tar cannot .* a device"),
        ("x.tar", _with_link("../b.tar", tarfile.REGTYPE), r"b\.tar .* leads out of the archive"),
    ],
)
def test_a_tar_that_is_no_source_says_what_is_wrong(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        found(str(tmp_path / name), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (THREE[:2048], "lacks the empty blocks that end an archive, at byte 2048"),
        (THREE[:1024] + bytes(512) + THREE[1536:], "goes on behind the empty block at byte 1024"),
        (THREE + THREE, "goes on behind the empty block at byte 3072: .* or is several archives"),
    ],
    ids=["cut between members", "a hole for a header", "one behind the other"],
)
def test_a_tar_that_was_not_copied_whole_loses_no_image_in_silence(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    (tmp_path / "outer.tar").write_bytes(tar([("b.tar", THREE), ("a.tar", content)]))

    for name in ("a.tar", "outer.tar"):
        with pytest.raises(ValueError, match=message.replace("at byte", r"at byte \d+|at byte")):
            found(str(tmp_path / name), tmp_path, "one" if name == "a.tar" else "")


@pytest.mark.skipif(not shutil.which("tar"), reason="needs GNU tar")
@pytest.mark.parametrize("kind", ["gnu", "oldgnu", "posix"])
def test_what_follows_a_sparse_file_of_many_pieces_is_found(tmp_path: Path, kind: str) -> None:
    for name in ("0.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(b"1")
    with (tmp_path / "1.jpg").open("wb") as file:
        for piece in range(60):
            file.seek(piece * 65536)
            file.write(b"1" * 4096)
    command = ["tar", "--sparse", f"--format={kind}", "-cf", "a.tar", "0.jpg", "1.jpg", "2.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)

    with storage.Ranges(str(tmp_path / "a.tar")) as ranges:
        listed = list(tars.members(ranges))
        assert [m.name.rpartition("/")[2] for m in listed] == ["0.jpg", "1.jpg", "2.jpg"]
        assert [ranges.read(m.first, m.length) for m in (listed[0], listed[2])] == [b"1", b"1"]
    assert (listed[1].problem == "a sparse file, not a file") == (kind != "posix")


def test_a_name_behind_a_long_attribute_is_found(tmp_path: Path) -> None:
    long = "y" * 120 + "/1.jpg"
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for size in (10, 70_000, 65_500):
            info = tarfile.TarInfo(f"{size}/{long}")
            info.pax_headers = {"SCHILY.xattr.user.a": "z" * size, "comment": "z" * 200}
            archive.addfile(info)

    with storage.Ranges(str(tmp_path / "a.tar")) as ranges:
        assert [m.name for m in tars.members(ranges)] == [
            f"{size}/{long}" for size in (10, 70_000, 65_500)
        ]


def test_a_pax_header_of_many_megabytes_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(_with_pax_size("1" * (tars.LONGEST_PAX + 1)))

    with (
        storage.Ranges(str(tmp_path / "a.tar")) as ranges,
        pytest.raises(ValueError, match=r"pax header at byte 0 has 167772\d\d bytes, more than"),
    ):
        list(tars.members(ranges))


def test_the_layout_of_a_tar_is_seen_behind_a_few_other_members(tmp_path: Path) -> None:
    inner = tar([("1.png", b"1")])
    (tmp_path / "nested.tar").write_bytes(tar([("README", b""), ("n01440764.tar", inner)]))
    assert [c.wnid for c in open_source(str(tmp_path / "nested.tar")).classes] == ["n01440764"]
    many = [(f"0.{ending}", b"") for ending in "abcdefghijkl"]
    (tmp_path / "web.tar").write_bytes(tar([*many, ("0.cls", b"1"), ("0.jpg", b"1")]))
    _, got = found(str(tmp_path / "web.tar"), tmp_path)
    assert got == {"web.tar/0.jpg": ("1", b"1")}


def test_a_file_that_changed_after_it_was_listed_is_a_reason_and_not_a_crash(
    root: str, tmp_path: Path
) -> None:
    for name in ("a/1.jpg", "a/2.jpg"):
        storage.write_bytes(storage.join(root, "tree", name), name.encode())
    place = storage.join(root, "x.tar")
    members = [(f"{i}.jpg", bytes([i]) * 600) for i in range(3)]
    storage.write_bytes(place, tar([("a.tar", tar(members))]))
    lists = {}
    for uri in (storage.join(root, "tree"), place):
        source = open_source(uri)
        count = write_index(source, tmp_path / "index")
        lists[source.root] = Index(tmp_path / "index").refs(range(count))
    storage.delete(storage.join(root, "tree/a/1.jpg"))
    storage.write_bytes(place, storage.read_bytes(place)[: lists[root][1].first + 100])

    tree, archive = (dict(read_images(at, refs)) for at, refs in lists.items())
    assert str(tree[0]).startswith("unreadable: ")
    assert "no such file" in str(tree[0]).lower()
    assert tree[1] == b"a/2.jpg"
    assert archive[0] == members[0][1]
    assert str(archive[1]).startswith("unreadable: ")  # its range is cut
    assert str(archive[2]).startswith("unreadable: ")  # its range is behind the end


def test_tars_of_several_kinds_in_a_folder_must_be_chosen(tmp_path: Path) -> None:
    for name in ("train-00.tar", "train-01.tar", "val-00.tar", "a.parquet"):
        (tmp_path / name).write_bytes(tar([("a.jpg", b"1"), ("a.cls", b"1")]))
    with pytest.raises(ValueError, match="both Parquet files and tars"):
        open_source(str(tmp_path / "*"))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(ValueError, match=r"tars of several kinds.*--source '.*/train-\*\.tar'"):
        open_source(str(tmp_path))
    assert len(open_source(str(tmp_path / "train*.tar")).parts) == 2


@pytest.mark.parametrize(
    "names",
    [
        [f"train-{i:05d}-of-00004" for i in range(4)], ["0-of-2", "1-of-2"], ["0", "1"],
        ["x_0of2-a1b2", "x_1of2-c3d4"], ["train", "train-1"],
    ],
)  # fmt: skip
def test_tars_that_are_numbered_are_of_one_kind(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / f"{name}.tar").write_bytes(tar([("a.jpg", b"1"), ("a.cls", b"1")]))
    assert len(open_source(str(tmp_path)).parts) == len(names)


@pytest.mark.parametrize(
    ("names", "pattern", "count"),
    [
        (["train-0-of-2", "train-1-of-2", "val-0-of-1"], "train-*.tar", 2),
        (["train0", "train1", "train_more0", "train_more1"], "train[0-9]*.tar", 2),
        (["a[1]-0", "a[1]-1", "b"], "a[[]1]-*.tar", 2),
        (["shard_0_a1b2", "shard_1_a1b2"], "shard_0_a1b2.tar", 1),
        (["0", "1", "2", "val-0"], "val-0.tar", 1),
    ],
)
def test_the_pattern_that_is_offered_for_tars_takes_all_of_a_kind_and_says_how_many(
    tmp_path: Path, names: list[str], pattern: str, count: int
) -> None:
    for name in names:
        (tmp_path / f"{name}.tar").write_bytes(tar([("a.jpg", b"1"), ("a.cls", b"1")]))
    with pytest.raises(ValueError, match=f"matches {count} of the {len(names)} files") as raised:
        open_source(str(tmp_path))
    _, offered, _, every, _ = str(raised.value).split("'")
    assert offered == str(tmp_path / pattern)
    assert len(open_source(offered).parts) == count
    assert len(open_source(every).parts) == len(names)


def test_the_list_of_a_part_does_not_depend_on_the_others(
    tmp_path: Path, photos: dict[str, bytes]
) -> None:
    nested = [(f"{w}.tar", tar(members)) for w, members in by_class(photos).items()]
    (tmp_path / "x.tar").write_bytes(tar(nested))
    source = open_source(str(tmp_path / "x.tar"))
    write_index(source, tmp_path / "whole")
    listed = [sources.list_part(source, part) for part in source.parts]
    write_index(source, tmp_path / "parts", listed)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    before = [part.key for part in source.parts]
    assert len(set(before)) == 4
    os.utime(tmp_path / "x.tar", (1, 1))
    assert not set(before) & {p.key for p in open_source(str(tmp_path / "x.tar")).parts}
