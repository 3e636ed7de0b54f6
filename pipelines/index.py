"""The index of a source: an Arrow file of image references, mapped and never loaded.

It is written part after part, whoever listed them, in batches of one length, so that reference
number i is found by arithmetic and neither driver nor worker holds more than a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jitmodel.config import ClassInfo
from pipelines.labels import name_classes

INDEX_SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # what people call it, below the source's root
        ("file", pa.binary()),  # the file to open, below the root; its name may not be UTF-8
        ("row_group", pa.int32()),  # of a Parquet file; -1: a range of bytes
        ("first", pa.int64()),  # first byte, -1: the whole file; in Parquet the row in its group
        ("length", pa.int64()),  # bytes; in Parquet those of all images of the row group
        ("label", pa.int64()),  # as the source has it; whoever reads checks its range
        ("unit", pa.int64()),  # rising number of what is read together
        ("problem", pa.string()),  # why it cannot be used, where the list shows that already
    ]
)
INDEX_ROWS = 65_536
"""References in a record batch of an index."""
MOST_CLASSES = 2**20
MOST_EMPTY = 1000
"""Classes without an image that may follow each other; a label behind more is out of range."""


class ImageRef(NamedTuple):
    """One row of an index."""

    path: str
    file: bytes
    row_group: int
    first: int
    length: int
    label: int
    unit: int
    problem: str | None = None


def record_batches(
    rows: Iterator[tuple[Any, ...]], schema: pa.Schema = INDEX_SCHEMA
) -> Iterator[pa.RecordBatch]:
    """References as they are stored, or other rows as compactly."""
    while some := list(islice(rows, INDEX_ROWS)):
        columns = zip(*some, strict=True)
        arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
        yield pa.record_batch(arrays, schema=schema)


def write(path: Path, listed: Iterable[Iterable[pa.RecordBatch]]) -> int:
    """Write the references of the parts of a source, in order; the number of images."""
    count = unit = 0
    left = INDEX_SCHEMA.empty_table()
    with pa.ipc.new_file(path, INDEX_SCHEMA) as writer:
        for batches in listed:
            before = unit
            for batch in batches:
                part = pa.Table.from_batches([batch])
                place = INDEX_SCHEMA.get_field_index("unit")
                units = part["unit"].to_numpy() + before
                unit = int(units[-1]) + 1
                part = part.set_column(place, INDEX_SCHEMA.field(place), [units])
                count += len(part)
                left = pa.concat_tables([left, part])
                while len(left) >= INDEX_ROWS:
                    writer.write_table(left.slice(0, INDEX_ROWS).combine_chunks(), INDEX_ROWS)
                    left = left.slice(INDEX_ROWS)
        if len(left):
            writer.write_table(left.combine_chunks(), INDEX_ROWS)
    return count


class Index:
    """An index file, mapped into memory: reference i without loading the others."""

    def __init__(self, path: Path) -> None:
        self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        last = self._file.num_record_batches - 1
        self.rows = last * INDEX_ROWS + self._file.get_batch(last).num_rows
        self.units = int(self._file.get_batch(last)["unit"][-1].as_py()) + 1
        """What is read together, from 0 on."""

    def __len__(self) -> int:
        return self.rows

    def column(self, name: str) -> Iterator[NDArray[np.int64]]:
        """A column of numbers, some rows at a time."""
        for i in range(self._file.num_record_batches):
            yield self._file.get_batch(i)[name].to_numpy()

    def unit_starts(self) -> NDArray[np.int64]:
        """The first reference of each unit."""
        found, before, row = [], -1, 0
        for unit in self.column("unit"):
            found.append(np.flatnonzero(np.diff(unit, prepend=before)) + row)
            before, row = unit[-1], row + len(unit)
        return np.concatenate(found)

    def refs(self, ids: Sequence[int] | NDArray[np.int64]) -> list[ImageRef]:
        """References by their position in the sorted source."""
        found = []
        for i in np.asarray(ids).tolist():
            batch = self._file.get_batch(i // INDEX_ROWS)
            found.append(ImageRef(*(column[i % INDEX_ROWS].as_py() for column in batch.columns)))
        return found


def numbered_classes(index: Index) -> list[ClassInfo]:
    """Classes for a source that has numbers only: as many as its labels need."""
    found: set[int] = set()
    for batch in index.column("label"):
        found.update(np.unique(batch).tolist())
    return count_classes(found)


def count_classes(labels: Iterable[int]) -> list[ClassInfo]:
    """Classes that are called by their number, up to the highest label that is no outlier.

    Raises:
        ValueError: they would be more than anybody has, or all labels are outliers.
    """
    highest, outlier = -1, None
    for label in sorted(labels):
        if label - highest > MOST_EMPTY + 1:
            outlier = label
            break
        highest = max(highest, label)
    if highest >= MOST_CLASSES:
        raise ValueError(f"label {highest} is above {MOST_CLASSES}: name the classes (--classes)")
    if outlier is not None and highest < 0:
        raise ValueError(
            f"the lowest label is {outlier}: expected numbers from 0 on, or name the classes "
            "(--classes)"
        )
    return name_classes([str(i) for i in range(highest + 1)])
