"""What does not add up is said, and what does is not."""

import pytest
from benches import PER_ROUND, table

from planner.importers.bench_table import read_table
from planner.importers.consistency import doubts
from planner.importers.contract import Given

GOOD = f"eagle3,3,8,1024,256,0.007,{0.007 * PER_ROUND},1100,0.2,{PER_ROUND},0.7,0.6,0.5,1"
OFF = ",0,8,1024,256,0.012,0.012,640,0.2,,,,,1"


def doubts_of(*rows: str) -> list[str]:
    return doubts(read_table(table(*rows).encode(), "t", Given()).cells)


def test_a_table_that_adds_up_raises_no_doubt():
    assert doubts_of() == doubts_of(OFF, GOOD, GOOD) == []


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (GOOD.replace("0.007,", "0.0075,"), "tpot_s is not itl_s / tokens_per_round in t:3 (0.0075 against 0.007 s)"),
        (",0,8,1024,256,0.012,0.014,640,0.2,,,,,1", "tpot_s is not itl_s / tokens_per_round in t:3"),
        ("eagle3,3,8,1024,256,0.007,0.020,1100,0.2,,0.7,0.6,0.5,1", "tpot_s is not itl_s / tokens_per_round in t:3"),  # per round from acceptance
        (GOOD.replace("0.7,0.6,0.5", "0.7,0.42,0.21"), "tokens_per_round is not what the acceptance gives in t:3"),  # unconditional
        (GOOD.replace("1100", "1300"), "the running batch, is above concurrency in t:3 (9.1 of 8)"),
        (GOOD.replace("1100", "500"), "fewer requests than concurrency were in the system in t:3"),
        (",0,4,1024,256,12,12,0.32,200,,,,,1", "tpot_s is above 1 s in t:3 (12 s): times are in seconds"),
        (OFF.replace("0.012,0.012", "0.0135,0.0135").replace("640", "570"), "repeated cells differ in tpot_s in t:3 and t:2"),
    ],
)  # fmt: skip
def test_a_contradiction_is_named_with_its_row(row, sentence):
    (found,) = doubts_of(OFF, row)
    assert sentence in found


def test_just_inside_the_tolerance_is_no_contradiction():
    assert doubts_of(OFF, GOOD.replace("0.007,", "0.00733,"), OFF.replace("0.012,0.012", "0.013,0.013").replace("640", "590")) == []


def test_a_table_without_off_lacks_its_baseline():
    (found,) = doubts_of(GOOD)
    assert "no row is off" in found and "measure it at the same loads" in found


def test_many_rows_make_one_sentence():
    (found,) = doubts_of(OFF, *[GOOD.replace("1100", "1300")] * 50)
    assert found.count("t:") == 3 and "and 47 more" in found
