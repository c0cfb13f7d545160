"""Starts and loads of a tuning: spread over the range, every load under several lengths, and staircases an engine accepts."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.exporters.vllm import check_schedule
from planner.search.design import SPREAD, draft_lens, loads_between, probes, staircase


@given(st.integers(1, 500), st.integers(0, 500))
def test_loads_cover_the_range_without_wide_gaps(first, more):
    loads = loads_between(first, first + more)
    assert loads[0] == first and loads[-1] == first + more and loads == sorted(set(loads))
    assert all(b / a <= SPREAD + 1 for a, b in itertools.pairwise(loads))
    assert len(loads) >= min(3, more + 1)


@pytest.mark.parametrize(
    ("longest", "yours", "lengths"),
    [(8, None, [8, 3, 1]), (8, 5, [8, 5, 1]), (5, 5, [5, 2, 1]), (2, None, [2, 1]), (1, None, [1]), (3, 9, [3, 2, 1])],
)
def test_the_users_own_length_is_measured(longest, yours, lengths):
    assert draft_lens(longest, yours) == lengths


def test_an_engine_without_schedules_starts_once_for_each_length():
    off, *drafting = probes([1, 2, 4], [8, 3, 1], scheduled=False)
    assert off.steps == () and off.draft_len(2) == 0
    assert [probe.draft_len(load) for probe in drafting for load in probe.loads] == [8] * 3 + [3] * 3 + [1] * 3


@given(st.integers(1, 64), st.integers(1, 500), st.integers(1, 15))
def test_staircases_give_each_load_as_many_lengths_as_there_are_starts_and_vllm_takes_them(first, more, longest):
    loads, lengths = loads_between(first, first + more), draft_lens(longest)
    _, *drafting = probes(loads, lengths, scheduled=True)
    assert len(drafting) == len(lengths)
    for load in loads:
        assert len({probe.draft_len(load) for probe in drafting}) == len(lengths)
    if len(loads) > 1:
        assert {K for probe in drafting for K in map(probe.draft_len, loads)} == {0, *lengths}
    for probe in drafting:
        check_schedule([[step.batch_from, step.batch_to, step.draft_len] for step in probe.steps], longest, loads[-1])


def test_a_load_lies_inside_its_step():
    probe = staircase([1, 4, 16, 64], [8, 3, 1, 0])
    assert [(step.batch_from, step.batch_to) for step in probe.steps] == [(1, 1), (2, 7), (8, 31), (32, 64)]
