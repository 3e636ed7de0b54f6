"""How large the pages of a Parquet file are, told from their headers alone.

Who reads a page holds all of it, compressed and not, and of a dictionary one more copy; pyarrow
says how large a column of a row group is, but not its pages, which are as large as their writer
chose: pyarrow's own puts 1,024 rows into one at least, however long they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow.parquet as pq

from pipelines import storage

HEADER_BYTES = (2**16, 2**24)
"""What is read of a header, and again of one that is longer: some hold the least and the greatest
value. Parquet's readers take none above 16 MiB."""
MOST_DEPTH, MOST_SHIFT = 8, 63
# Kinds of a field in Thrift's compact protocol, in which headers are written.
_TRUE, _FALSE, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _STRUCT = 1, 2, 3, (4, 5, 6), 7, 8, 12


def page_sizes(ranges: storage.Ranges, column: pq.ColumnChunkMetaData) -> Iterator[int]:
    """Bytes of each page of a column of a row group: stored or unpacked, whichever is more.

    They end at a header that is damaged, which whoever reads the page will say.
    """
    at = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        at = min(at, column.dictionary_page_offset)
    end = at + column.total_compressed_size
    while at < end:
        for most in HEADER_BYTES:
            try:
                fields, used = _struct(ranges.read(at, most), 0)
                break
            except IndexError:
                continue
            except ValueError:
                return
        else:
            return
        unpacked, stored = fields.get(2, -1), fields.get(3, -1)
        if stored < 0:
            return
        yield max(unpacked, stored)
        at += used + stored


def _struct(text: bytes, at: int, depth: int = 0) -> tuple[dict[int, int], int]:
    """The whole numbers of a struct by field, and where it ends."""
    if depth == MOST_DEPTH:
        raise ValueError("structs in structs, more than a header has")
    fields, field = {}, 0
    while text[at]:
        step, kind = text[at] >> 4, text[at] & 15
        at += 1
        if not step:
            field, at = _integer(text, at)
        field += step
        if kind in _INTEGERS:
            fields[field], at = _integer(text, at)
        elif kind == _BINARY:
            length, at = _varint(text, at)
            at += length
        elif kind == _STRUCT:
            at = _struct(text, at, depth + 1)[1]
        elif kind in (_TRUE, _FALSE, _BYTE, _DOUBLE):
            at += {_BYTE: 1, _DOUBLE: 8}.get(kind, 0)
        else:
            raise ValueError(f"a field of kind {kind}, which no header has")
    return fields, at + 1


def _integer(text: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(text, at)
    return value >> 1 ^ -(value & 1), at


def _varint(text: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (text[at] & 127) << shift
        at += 1
        if text[at - 1] < 128:
            return value, at
        shift += 7
        if shift > MOST_SHIFT:
            raise ValueError("a number of more than 64 bits")
