"""Sizes, shares and lists as people write them."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import BadInput
from planner.units import BYTES_PER_UNIT, GIB, MAX_NUMBER, format_bytes, parse_bytes, parse_numbers, parse_seconds, parse_share

seeded = settings(derandomize=True, deadline=None)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("800 MB", 800 * 10**6),
        ("1e9B", 10**9),
        ("1E3MiB", 1000 * 2**20),
        ("1.5GiB", 3 * 2**29),
        (".5KiB", 512),
        ("2TiB", 2**41),
        ("  1 B\t", 1),
        ("3.3GB", 3_300_000_000),
        ("1.9B", 1),  # a part of a byte is dropped
    ],
)
def test_a_size_is_a_number_and_a_unit(text, size):
    assert parse_bytes(text) == size
    assert isinstance(parse_bytes(text), int)


@seeded
@given(st.integers(1, 2**20), st.sampled_from(sorted(BYTES_PER_UNIT)))
def test_whole_numbers_of_any_unit_are_exact(number, unit):
    assert parse_bytes(f"{number}{unit}") == parse_bytes(f"{number} {unit}") == number * BYTES_PER_UNIT[unit]


def test_binary_and_decimal_units_differ():
    for power, letter in enumerate("KMGT", 1):
        assert BYTES_PER_UNIT[f"{letter}iB"] == 1024**power
        assert BYTES_PER_UNIT[f"{letter}B"] == 1000**power
    assert GIB == 2**30


@pytest.mark.parametrize(
    "text", ["", "24", "1e9", "GiB", "24 gib", "24G", "24kB", "1EB", "-1GiB", "24GiB of", "nan GiB", "inf GiB", "1,5GiB", "0x10GiB", "٣GiB"]
)
def test_a_size_without_a_known_unit_is_refused_with_the_units_and_the_text(text):
    with pytest.raises(BadInput, match=r"needs a number and a unit \(B, KB, .*TiB\)") as refused:
        parse_bytes(text)
    assert repr(text) in str(refused.value)
    assert "24GiB" in str(refused.value)


@pytest.mark.parametrize("text", ["0GiB", "0.5B", "1.2.3GB", "..GB", "1e400B", "1e300TB"])
def test_a_size_that_is_no_positive_number_of_bytes_is_refused(text):
    with pytest.raises(BadInput, match="positive number of bytes") as refused:
        parse_bytes(text)
    assert repr(text) in str(refused.value)


@seeded
@given(st.text("0123456789.+-eE KMGTiBb\n٣", max_size=12))
def test_any_text_is_a_size_or_refused(text):
    try:
        assert parse_bytes(text) >= 1
    except BadInput:
        pass


@seeded
@given(st.integers(2**20, 2**45))
def test_a_size_shown_reads_back_within_its_last_digit(size):
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.051)


@pytest.mark.parametrize(
    ("size", "text"),
    [(24 * GIB, "24.00 GiB"), (GIB / 10, "0.10 GiB"), (GIB // 10, "102.4 MiB"), (2**20, "1.0 MiB"), (0, "0.0 MiB"), (int(1.5 * GIB), "1.50 GiB")],
)
def test_sizes_are_shown_in_gib_or_below_a_tenth_in_mib(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize(("text", "share"), [("3%", 0.03), ("0.03", 0.03), (" 3 % ", 0.03), ("99.9%", 0.999), ("1e-3", 0.001), (".5", 0.5)])
def test_a_share_is_a_percentage_or_a_fraction(text, share):
    assert parse_share(text) == pytest.approx(share, rel=1e-15)


@seeded
@given(st.integers(1, 9999))
def test_both_ways_to_write_a_share_agree(basis_points):
    assert parse_share(f"{basis_points / 100}%") == pytest.approx(parse_share(f"{basis_points / 10_000}"), rel=1e-12)


@pytest.mark.parametrize("text", ["", "%", "0", "0%", "1", "100%", "3", "-3%", "nan", "nan%", "inf", "three", "3%%", "%3", "1e400"])
def test_a_share_outside_0_to_1_is_refused(text):
    with pytest.raises(BadInput, match="between 0 and 100 %") as refused:
        parse_share(text)
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "kind", "values"),
    [
        ("64,256", int, [64, 256]),
        ("256, 64", int, [256, 64]),  # the order given
        ("4,4,2,4", int, [4, 2]),  # each once
        ("7", int, [7]),
        ("1,2,", int, [1, 2]),
        ("0,-3", int, [0, -3]),  # signs and ranges are for the caller to judge
        ("0.5,1e-3, 2", float, [0.5, 0.001, 2.0]),
    ],
)
def test_numbers_keep_their_order_and_come_once(text, kind, values):
    parsed = parse_numbers(text, kind, "--kv-budget")
    assert parsed == values
    assert all(type(value) is kind for value in parsed)


@pytest.mark.parametrize(
    ("text", "kind", "wanted"),
    [
        ("", int, "whole numbers"),
        (" , ,", int, "whole numbers"),
        ("64;256", int, "whole numbers"),
        ("64 256", int, "whole numbers"),
        ("1.5", int, "whole numbers"),
        ("1e3", int, "whole numbers"),
        ("64,many", int, "whole numbers"),
        ("", float, "numbers"),
        ("nan", float, "numbers"),
        ("1,inf", float, "numbers"),
        ("1e400", float, "numbers"),
    ],
)
def test_other_lists_are_refused_with_the_flag_and_the_text(text, kind, wanted):
    with pytest.raises(BadInput) as refused:
        parse_numbers(text, kind, "--kv-budget")
    example = "1024,4096" if kind is int else "0,0.7"
    assert str(refused.value) == f"--kv-budget takes comma-separated {wanted}, got {text!r}; write for example {example}"


@seeded
@given(st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=20))
def test_a_list_of_numbers_reads_back(values):
    parsed = parse_numbers(",".join(map(str, values)), int, "--draft-len")
    assert set(parsed) == set(values)
    assert len(parsed) == len(set(values))
    assert [values.index(value) for value in parsed] == sorted(values.index(value) for value in parsed)


@seeded
@given(st.lists(st.floats(-MAX_NUMBER, MAX_NUMBER), min_size=1, max_size=20))
def test_a_list_of_floats_reads_back_finite_and_exact(values):
    parsed = parse_numbers(",".join(map(repr, values)), float, "--rate")
    assert parsed == list(dict.fromkeys(values))
    assert all(map(math.isfinite, parsed))


def test_bad_input_is_a_value_error_too():
    with pytest.raises(ValueError, match="100 %"):
        parse_share("three")


@pytest.mark.parametrize(("text", "seconds"), [("500ms", 0.5), ("15s", 15), (" 10 m ", 600), ("1.5h", 5400)])
def test_times_have_a_unit(text, seconds):
    assert parse_seconds(text, "--window") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "10", "0s", "-1s", "1e9s", "nan s", "10d", "10m5s", "٣s", "9" * 20 + "h"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(BadInput, match="--window takes a time above 0 with its unit"):
        parse_seconds(text, "--window")
