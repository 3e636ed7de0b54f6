"""Which class a person means: "tench", "n01440764", "class:0" or "0".

A name may hold several, separated by commas, as ImageNet's do ("tench, Tinca tinca"). Names go
before numbers, so that a class that is called "7" is found whatever its index. A name that two
classes bear (ImageNet has two cranes) is refused with both.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from jitmodel.config import ClassInfo

SUGGESTIONS = 3


class ClassIndex:
    """Finds classes by what people call them."""

    def __init__(self, classes: Sequence[ClassInfo], num_classes: int) -> None:
        """Of `num_classes` classes, named or not.

        Raises:
            ValueError: there are names, but not one for each class.
        """
        if classes and len(classes) != num_classes:
            raise ValueError(
                f"config.json: the model has {num_classes} classes, but {len(classes)} are named: "
                "name all of them, or none"
            )
        self.infos = tuple(classes) or tuple(ClassInfo(name=str(i)) for i in range(num_classes))
        self._labels: dict[str, list[int]] = {}
        for label, info in enumerate(self.infos):
            for name in {_plain(name) for name in (info.name, *info.name.split(","))}:
                self._labels.setdefault(name, []).append(label)
            if info.wnid:
                self._labels.setdefault(_plain(info.wnid), []).append(label)

    def find(self, text: str) -> int:
        """The label that `text` stands for.

        Raises:
            ValueError: it stands for none, with close names, or for several, with all of them.
        """
        wanted = _plain(text)
        found = self._labels.get(wanted, [])
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"{len(found)} classes are called {text!r}: say {self._describe(found, 'or')}"
            )
        digits = wanted.removeprefix("class:").strip()
        if digits.isascii() and digits.isdecimal():
            if len(digits) < 10 and int(digits) < len(self.infos):
                return int(digits)
            raise ValueError(
                f"there is no class {digits[:20]}: the model has classes 0 to {len(self.infos) - 1}"
            )
        raise ValueError(f"no class is called {text[:100]!r}{self._suggest(wanted)}")

    def prompt(self, label: int) -> str:
        """A text that finds this class alone: its name where no other class bears it."""
        name = self.infos[label].name.split(",")[0].strip()
        return name if self._labels.get(_plain(name)) == [label] else f"class:{label}"

    def search(self, text: str) -> list[int]:
        """Labels whose name or wnid holds `text`, those that begin with it first."""
        wanted = _plain(text)
        keys = [f"{_plain(info.name)}, {_plain(info.wnid or '')}" for info in self.infos]
        found = [label for label, key in enumerate(keys) if wanted in key]
        return sorted(found, key=lambda label: f", {wanted}" not in f", {keys[label]}")

    def _suggest(self, wanted: str) -> str:
        names = difflib.get_close_matches(wanted, self._labels, n=SUGGESTIONS)
        labels = list(dict.fromkeys(label for name in names for label in self._labels[name]))
        labels = labels or self.search(wanted)
        if not wanted or not labels:
            return ""
        return f": did you mean {self._describe(labels[:SUGGESTIONS], 'or')}?"

    def _describe(self, labels: Sequence[int], word: str) -> str:
        parts = [f'"class:{label}" ({self.infos[label].name})' for label in labels]
        return f" {word} ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


def _plain(text: str) -> str:
    """Lower case, with single spaces for runs of spaces and underscores."""
    return " ".join(text.replace("_", " ").casefold().split())
