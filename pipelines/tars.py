"""What a tar archive holds and where, from its headers alone: nothing is unpacked.

Each header names its member and says how long it is, which is where the next header lies; so an
archive, or one that lies inside another, is listed by reading some kilobytes a member. Python's
`tarfile` would do it too, but takes ten times as long, and an archive of ImageNet has 1.28
million headers.

Names are cleaned as tar does when it unpacks: a leading / is dropped. What is no plain file, or
leads out of the archive, is listed with the reason why it cannot be used.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import NamedTuple

from pipelines import storage

BLOCK = 512
WINDOW = 4096
"""Bytes that are read at once: a header, and often a small member and the next header."""
ZERO = bytes(BLOCK)
RECORD = 20 * BLOCK
"""Writers fill an archive up to a multiple of it."""
LONGEST_NAME = 2**16
LONGEST_PAX = 2**24
"""Bytes of a pax header; one attribute of a file may have 64 KiB."""
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
"""How gzip, bzip2, xz and Zstandard begin."""
KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device",
         b"6": "a pipe", b"S": "a sparse file"}  # fmt: skip


class Member(NamedTuple):
    """A file in an archive; directories are left out."""

    name: str
    """Its path; bytes that are not UTF-8 as surrogates."""
    first: int
    """Its first byte, counted from the start of the outermost file."""
    length: int
    problem: str | None
    """Why it cannot be used."""


def members(ranges: storage.Ranges, first: int = 0, length: int | None = None) -> Iterator[Member]:
    """Members of an archive, in the order in which they lie in it.

    Args:
        ranges: the file.
        first: where the archive starts, for one that is itself a member.
        length: its bytes; None for all of the file.

    Raises:
        ValueError: it is no tar archive, is damaged, ends without the empty blocks that end an
            archive, or goes on behind them.
    """
    end = ranges.size if length is None else first + length
    if end > ranges.size:
        raise ValueError(f"{ranges.uri} ends at byte {ranges.size}: it was not copied whole")
    window, start = b"", 0
    place, name, pax = first, b"", dict[bytes, bytes]()
    while place < end:
        if not start <= place <= start + len(window) - BLOCK:
            window, start = ranges.read(place, min(WINDOW, end - place)), place
        block = window[place - start : place - start + BLOCK]
        if block == ZERO:
            follows = window[place - start + BLOCK :][:BLOCK]
            if len(follows) < BLOCK:
                follows = ranges.read(place + BLOCK, min(BLOCK, end - place - BLOCK))
            behind = first + -(-(place + BLOCK - first) // RECORD) * RECORD
            if behind < end:
                follows += ranges.read(behind, min(BLOCK, end - behind))
            if follows.strip(b"\0"):
                raise ValueError(
                    f"{ranges.uri} goes on behind the empty block at byte {place}: it was not "
                    "copied whole, or is several archives in one file"
                )
            return
        size = _size(ranges.uri, place, block)
        kind, data = block[156:157], place + BLOCK
        if kind in b"\x001234567" and kind not in b"\x0007":
            size = 0  # links, directories and devices have no content, whatever they say
        if b"size" in pax and kind not in b"xgLK":
            size = _decimal(pax[b"size"])
        if size < 0:  # would lead back, for ever
            raise ValueError(f"{ranges.uri}: the header at byte {place} has no size: it is damaged")
        if kind == b"S":  # lists of its pieces, before its content and not counted in its size
            more = block[482:483]
            while more not in (b"", b"\0"):
                more = ranges.read(data, BLOCK)[504:505]
                data += BLOCK
        place = data + (size + BLOCK - 1) // BLOCK * BLOCK
        if data + size > end:
            raise ValueError(
                f"{ranges.uri} ends in the middle of a member, at byte {end}: it was not copied "
                "whole"
            )
        if kind in b"xgLK":
            if kind == b"L":
                name = ranges.read(data, min(size, LONGEST_NAME)).rstrip(b"\0")
            elif kind == b"x":
                if size > LONGEST_PAX:
                    raise ValueError(
                        f"{ranges.uri}: the pax header at byte {data - BLOCK} has {size} bytes, "
                        f"more than {LONGEST_PAX}: it is damaged"
                    )
                pax = _pax(ranges.read(data, size))
            continue
        raw = pax.get(b"path") or name or _name(block)
        name, pax = b"", {}
        if kind == b"5" or raw.endswith(b"/"):
            continue
        text = raw.decode("utf-8", "surrogateescape").lstrip("/")
        problem = f"{KINDS[kind]}, not a file" if kind in KINDS else None
        if ".." in text.split("/"):
            problem = "its name leads out of the archive"
        yield Member(posixpath.normpath(text), data, size, problem)
    if end > first:
        raise ValueError(
            f"{ranges.uri} lacks the empty blocks that end an archive, at byte {end}: it was not "
            "copied whole"
        )


def _size(uri: str, place: int, block: bytes) -> int:
    """Content bytes that a header announces, once its checksum is right."""
    try:
        total = int(block[148:156].rstrip(b"\0 ") or b"0", 8)
        field = block[124:136]
        if field[0] & 0x80:
            size = int.from_bytes(field, "big") & ~(0x80 << 88)
        else:
            size = int(field.rstrip(b"\0 ") or b"0", 8)
    except (ValueError, IndexError):
        total, size = -1, 0
    if len(block) < BLOCK or total != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        what = "no tar archive, or damaged"
        if block.startswith(COMPRESSED):
            what = "it is compressed there, so that nothing in it can be found: decompress it"
        raise ValueError(f"no tar header at byte {place} of {uri}: {what}")
    return size


def _name(block: bytes) -> bytes:
    name, prefix = block[:100].split(b"\0", 1)[0], b""
    if block[257:263] == b"ustar\0":  # GNU's own format keeps times there
        prefix = block[345:500].split(b"\0", 1)[0]
    return prefix + b"/" + name if prefix else name


def _pax(content: bytes) -> dict[bytes, bytes]:
    """Records of the form "25 path=some/long/name\\n", where 25 counts all of it."""
    found, place = {}, 0
    while place < len(content):
        digits, _, _ = content[place : place + 20].partition(b" ")
        length = _decimal(digits)
        if not len(digits) < length <= len(content) - place:
            break
        key, _, value = content[place + len(digits) + 1 : place + length - 1].partition(b"=")
        found[key] = value
        place += length
    return found


def _decimal(digits: bytes) -> int:
    """A number of at most 19 digits, 9 EB; -1 for what is none, or more than any file has."""
    return int(digits) if digits.isdigit() and len(digits) < 20 else -1
