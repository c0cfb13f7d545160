"""The profiles that ship: each is valid, says where it is from, and answers for every workload it was measured at."""

from pathlib import Path

import pytest

import planner
from planner.measurements import load_profile

PROFILES = sorted((Path(__file__).parents[1] / "profiles").rglob("*"))
FILES = [path for path in PROFILES if path.is_file()]


def test_there_is_one_and_the_folder_holds_nothing_else():
    assert FILES and all(path.suffix == ".json" for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_profile_makes_a_plan_for_each_of_its_workloads(path):
    profile = load_profile(path)
    assert profile.source and profile.environment.date and profile.device.name
    for context_len in profile.contexts:
        for sampler in profile.samplers:
            plan = planner.plan(
                path, context_len=context_len, temperature=sampler.temperature, top_p=sampler.top_p, top_k=sampler.top_k, objective="tpot"
            )
            assert plan.estimate.tpot_s.value <= plan.baseline.tpot_s.value
            assert plan.num_candidates > 1 and not plan.rejected
            counted = bool(profile.energy)
            assert all((e.joules_per_token is not None) == counted for e in (plan.estimate, plan.baseline, *plan.runners_up))


def test_a_profile_from_before_energy_was_counted_is_read_and_has_none():
    [old] = [path for path in FILES if path.parent.name == "intel-xeon-2-cores"]
    assert b'"energy"' not in old.read_bytes()
    profile = load_profile(old)
    assert profile.energy == [] and profile.energy_source is None
