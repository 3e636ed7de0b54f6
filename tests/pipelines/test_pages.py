"""Headers of Parquet pages that are damaged end the search for large pages."""

import pytest

from pipelines import pages


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"\x1c" * 2**16, "structs in structs"),
        (b"\x15" + b"\xff" * 2**24, "more than 64 bits"),
        (b"\x1f", "a field of kind 15"),
    ],
)
def test_a_header_of_nonsense_is_refused_at_once(header: bytes, why: str):
    with pytest.raises(ValueError, match=why):
        pages._struct(header, 0)


def test_the_numbers_of_a_header_are_read():
    # field 1: 0; field 2: 300; field 3: a struct with field 1: -2; end
    header = b"\x15\x00" + b"\x15\xd8\x04" + b"\x1c" + b"\x15\x03\x00" + b"\x00"
    assert pages._struct(header, 0) == ({1: 0, 2: 300}, len(header))
