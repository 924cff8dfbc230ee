"""Numbers, plurals and names as people read them."""

import pytest

from jaxcoder.formatting import (
    did_you_mean,
    escape_control,
    format_bytes,
    format_count,
    format_duration,
    format_names,
    format_ranges,
    format_table,
    plural,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1:00"),
        (125, "2:05"),
        (3599.6, "1:00:00"),
        (180000, "2 d 02 h"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_sizes_and_counts():
    assert [format_bytes(n) for n in (812, 3500, 5 << 30, 7 << 50)] == [
        "812 bytes",
        "3.4 KiB",
        "5.0 GiB",
        "7168.0 TiB",
    ]
    assert [format_count(n) for n in (812, 41234, 3_410_000, 15.5e9)] == [
        "812",
        "41,234",
        "3.41 million",
        "15.5 billion",
    ]


def test_tables_align():
    table = format_table(["what", "loss", "tokens"], [["held out", 1.23456, 12345], ["xz", 0.5, 7]])
    assert table.splitlines() == [
        "what       loss  tokens",
        "--------  -----  ------",
        "held out  1.235  12,345",
        "xz          0.5       7",
    ]
    assert format_table(["a"], []).splitlines() == ["a", "-"]


def test_plurals_and_suggestions():
    assert plural(1, "device") == "1 device"
    assert plural(2048, "device") == "2,048 devices"
    assert plural(2, "process", "processes") == "2 processes"
    assert did_you_mean("tensr", ["data", "tensor"]) == " (did you mean `tensor`?)"
    assert did_you_mean("xyz", ["data", "tensor"]) == ""


def test_long_lists_of_names_are_shortened():
    assert format_names(["a", "b"]) == "a, b" and format_names([]) == ""
    assert format_names([str(i) for i in range(400)], 3) == "0, 1, 2 and 397 more"


def test_ranges_are_folded():
    assert format_ranges([3, 7, 8, 9, 20]) == "3, 7 to 9, 20" and format_ranges([]) == ""
    assert format_ranges(list(range(0, 40, 2)), most=3) == "0, 2, 4 and 17 more"
    assert format_ranges([5, 6, 1000, 1001]) == "5 to 6, 1,000 to 1,001"


def test_control_characters_of_data_are_escaped():
    hostile = "a\x1b[2Jb\nrow 9\r\t\u202ec\udc80\u4e2d"
    assert escape_control(hostile) == "a\\x1b[2Jb\\nrow 9\\r\\t\\u202ec\\udc80\u4e2d"
    assert escape_control("a\n\tb\x00", keep="\n\t") == "a\n\tb\\x00"
