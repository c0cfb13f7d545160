"""A guard on benchmarks/validation.py: a GPU, two seeds. Skipped where its measurements are not."""

import numpy as np
import pytest
from common import SHARED
from validation import PARTS, TARGETS, judged
from validation_kernels import a800, accepted_by_size, attention

needs_data = pytest.mark.skipif(not (SHARED / "measured").is_dir(), reason=f"{SHARED / 'measured'} does not exist")


@needs_data
def test_attention_on_an_h200_is_predicted_from_few_rows():
    figures = attention(("h200_sxm",), seeds=2).figures
    rows = judged("decode_attention", figures)
    assert [row["figure"].rpartition("/")[2] for row in rows] == ["n20", "n50", "n20_chosen", "n50_chosen"]
    assert all(row[""] == "met" for row in rows)
    assert figures["decode_attention/rtx_pro_6000_outliers"] == 1  # batch 1 over 4,095 tokens: 186 us between 15 and 29


@needs_data
def test_a_tree_size_is_chosen_from_eight_cells():
    figures = a800().figures
    assert all(row[""] == "met" for row in judged("a800", figures))


def test_accepted_tokens_of_a_tree_grow_by_less_and_less():
    gains = np.diff(accepted_by_size(0.7, 60))
    assert gains[0] == pytest.approx(0.7)
    assert (gains > 0).all() and (np.diff(gains) <= 1e-12).all()


def test_every_target_belongs_to_a_part_and_a_miss_is_said():
    assert TARGETS.keys() <= PARTS.keys()
    assert [row[""] for row in judged("a800", {"a800/some_model/mape": 0.05})] == ["missed"]
