"""CSV tables: what is written is read, and what is not a number, a column or a row is refused with its place."""

import csv
import io

import pytest
from benches import HEADER, PER_ROUND, table
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from planner.errors import BadInput
from planner.importers.bench_table import MAX_TABLE_BYTES, read_table
from planner.importers.contract import Given

NOTHING = Given()
ROW = "eagle3,3,8,1024,256,0.007,,,,,,,,"


def read(text: str | bytes, given: Given = NOTHING):
    return read_table(text.encode() if isinstance(text, str) else text, "t.csv", given)


def test_every_column_arrives():
    off, _, idle, drafting, _ = read(table()).cells
    assert (off.drafter, off.draft_len, off.tokens_per_round, off.acceptance) == ("none", 0, None, [])
    assert (idle.drafter, idle.draft_len) == ("eagle3", 0)
    assert (drafting.drafter, drafting.draft_len, drafting.concurrency, drafting.context_len, drafting.output_len) == ("eagle3", 3, 8, 1024, 256)
    assert (drafting.tpot_s, drafting.output_tokens_per_s, drafting.ttft_s, drafting.tensor_parallel) == (0.007, 1100, 0.2, 1)
    assert drafting.itl_s == pytest.approx(0.007 * PER_ROUND) and drafting.tokens_per_round == pytest.approx(PER_ROUND)
    assert drafting.acceptance == [0.7, 0.6, 0.5] and drafting.source == "t.csv:5"


@settings(max_examples=50, deadline=None)
@drawn(
    rows=st.lists(
        st.tuples(st.integers(1, 16), st.integers(1, 1024), st.floats(1e-6, 1e3), st.lists(st.floats(0, 1), max_size=3)), min_size=1, max_size=5
    ),
    newline=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    mark=st.booleans(),
    order=st.permutations(range(9)),
)
def test_a_table_means_the_same_however_it_is_written(rows, newline, quoting, mark, order):
    columns = ["drafter", "draft_len", "concurrency", "context_len", "output_len", "tpot_s", "acceptance_1", "acceptance_2", "acceptance_3"]
    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=quoting, lineterminator=newline)
    writer.writerow([columns[i] for i in order])
    for draft_len, concurrency, tpot_s, acceptance in rows:
        fields = [
            "a, b",
            draft_len,
            concurrency,
            100,
            10,
            repr(tpot_s),
            *map(repr, acceptance[:draft_len]),
            *[""] * (3 - len(acceptance[:draft_len])),
        ]
        writer.writerow([f" {fields[i]} " for i in order])
    cells = read(b"\xef\xbb\xbf" * mark + out.getvalue().encode()).cells
    assert [(c.drafter, c.draft_len, c.concurrency, c.tpot_s, c.acceptance) for c in cells] == [("a, b", k, n, t, a[:k]) for k, n, t, a in rows]


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("drafter,draft_len,concurrency,context_len,output_len,tpot_s,tokens_per_rond", ",0,1,1,1,1,", "unknown column 'tokens_per_rond'; known are drafter"),
        ("drafter,draft_len,concurrency,context_len,output_len,tpot_s,tpot_s", ",0,1,1,1,1,1", "column tpot_s must be there once, got it 2 times"),
        ("drafter,draft_len,concurrency,context_len,output_len", ",0,1,1,1", "tpot_s is missing"),
        ("drafter,draft_len,concurrency,context_len,output_len,tpot_s,acceptance_2", ",0,1,1,1,1,", "acceptance_1 is missing"),
        (HEADER, ROW[:-1], "line 2 must have a field for each of the 14 columns, got 13"),
        (HEADER, ROW.replace("0.007", "1e400"), "line 2, column tpot_s must be a finite number .* got '1e400'"),
        (HEADER, ROW.replace("0.007", "nan"), "column tpot_s must be a finite number"),
        (HEADER, ROW.replace("0.007", "1_0"), "column tpot_s must be a finite number"),
        (HEADER, ROW.replace("0.007", '"0,007"'), "column tpot_s must be a finite number with a decimal point, got '0,007'"),
        (HEADER, ROW.replace("0.007", "-1"), "line 2: tpot_s: expected `float` > 0"),
        (HEADER, ROW.replace("0.007", "0"), "line 2: tpot_s: .*got 0"),
        (HEADER, ROW.replace(",8,", ",8.5,"), "column concurrency must be a whole number, got '8.5'"),
        (HEADER, ROW.replace(",8,", ",0,"), "concurrency: expected `int` >= 1"),
        (HEADER, ROW.replace("1024", ""), "line 2 does not say context_len; give --isl"),
        (HEADER, ROW.replace("eagle3,3", "off,0"), "column drafter must be empty where no drafter is loaded, got 'off'"),
        (HEADER, ROW.replace("eagle3", ""), "draft_len must be 0 without a drafter, got 3"),
        (HEADER, ROW.replace(",3,", ",,"), "column draft_len must be given with a drafter"),
        (HEADER, "eagle3,3,8,1024,256,0.007,,,,,70,,,", r"column acceptance_1 must lie in \[0, 1\], got 70; write a share, not percent"),
        (HEADER, "eagle3,3,8,1024,256,0.007,,,,,0.7,,0.5,", "column acceptance_2 must be given, acceptance_3 is conditional on it"),
        (HEADER, "eagle3,1,8,1024,256,0.007,,,,,0.7,0.6,,", r"at most one entry per drafted token \(1\), got 2"),
        (HEADER, "eagle3,1,8,1024,256,0.007,,,,2.5,,,,", "tokens_per_round must be at most draft_len"),
        (HEADER, '"' + "a" * 200_000, "line 2 is not CSV: field larger than field limit"),
        (HEADER, 'eagle"3,"3', "line 2 is not CSV|got 2"),
        (HEADER, ROW.replace("0.007", ""), "must hold at least one row with tpot_s"),
        (HEADER, "", "must hold at least one row"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(header, row, message):
    with pytest.raises(BadInput, match=message) as error:
        read(f"{header}\n{row}\n")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_run_without_tpot_is_left_out_aloud():
    found = read(table(ROW, ROW.replace("0.007", ""), ROW, ROW.replace("0.007", "")))
    assert len(found.cells) == 2 and found.warnings == ["t.csv: left out for want of tpot_s: lines 3, 5"]


def test_flags_fill_in_what_a_table_lacks_and_never_contradict_it():
    short = "drafter,draft_len,concurrency,tpot_s\n,0,8,0.01\n"
    cell = read(short, Given(context_len=1024, output_len=256, tensor_parallel=2)).cells[0]
    assert (cell.context_len, cell.output_len, cell.tensor_parallel) == (1024, 256, 2)
    with pytest.raises(BadInput, match="context_len, output_len is missing"):
        read(short)
    with pytest.raises(BadInput, match="line 2: concurrency is 8 in the file, --max-concurrency says 9; drop the flag"):
        read(short, Given(concurrency=9, context_len=1024, output_len=256))


def test_what_is_no_text_or_too_large_is_refused():
    for content, message in (
        (table().encode("utf-16"), "looks like UTF-16; save it as UTF-8"),
        (table().encode() + b"\xff", "must be UTF-8 text, byte"),
        (table().encode() + b"\0", "zero bytes"),
        (b"," * (MAX_TABLE_BYTES + 1), "a table holds at most"),
        (b"drafter" + b"," * 1_000_000, "and 999997 more; known are"),
    ):
        with pytest.raises(BadInput, match=message):
            read(content)


def test_a_large_table_is_read_at_once():
    import time

    rows = table(*[f"eagle3,3,{n % 256 + 1},{1024 + n // 256},256,0.007,0.0163,1100,0.2,2.33,0.7,0.6,0.5,1" for n in range(10_000)])
    began = time.process_time()
    assert len(read(rows).cells) == 10_000
    assert time.process_time() - began < 2
