"""Serving profiles on disk, and which kind of profile a file is."""

import json

import pytest
from benches import MODEL, SYSTEM, table
from made import made_profile

import planner
from planner.errors import BadInput
from planner.measurements import load_profile, save_profile
from planner.plans import load_plan
from planner.serving import ServingProfile, load_any_profile, load_serving_profile, save_serving_profile


@pytest.fixture
def serving(tmp_path):
    (tmp_path / "t.csv").write_text(table())
    profile = planner.import_bench([tmp_path / "t.csv"], model=MODEL, system=SYSTEM)
    save_serving_profile(profile, tmp_path / "serving.json")
    return profile


@pytest.fixture
def own():
    return made_profile(contexts=(1024,))


def test_each_kind_is_read_as_what_it_says_it_is(tmp_path, serving, own):
    save_profile(own, tmp_path / "own.json")
    assert load_any_profile(tmp_path / "serving.json") == load_serving_profile(tmp_path / "serving.json") == serving
    assert load_any_profile(tmp_path / "own.json") == load_profile(tmp_path / "own.json") == own


def test_the_wrong_kind_is_named_with_what_reads_it(tmp_path, serving, own):
    save_profile(own, tmp_path / "own.json")
    for load in (load_profile, load_plan):
        with pytest.raises(BadInput, match="serving.json is a serving profile .`planner import bench`.; this needs a p"):
            load(tmp_path / "serving.json")
    with pytest.raises(BadInput, match=r"own.json is a profile .`planner profile`.; this needs a serving profile \(`planner import bench`\)"):
        load_serving_profile(tmp_path / "own.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda profile: profile.update(kind="sieve"), "of an unknown kind, 'sieve'"),
        (lambda profile: profile.update(kind=3), "is not valid: Expected `str | null`, got `int` - at `\\$.kind`"),
        (lambda profile: profile.update(schema_version=9), "has schema_version 9, this planner reads 1"),
        (lambda profile: profile.update(cells=[]), "cells"),
        (lambda profile: profile["cells"][0].update(tpot_s=-1), r"\$.cells\[0\].tpot_s"),
        (lambda profile: profile["cells"][0].update(surprise=1), "unknown field `surprise`"),
        (lambda profile: profile["cells"][0].update(draft_len=3), "draft_len must be 0 without a drafter"),
    ],
)
def test_a_damaged_profile_is_refused_by_field(tmp_path, serving, change, message):
    fields = json.loads((tmp_path / "serving.json").read_text())
    change(fields)
    (tmp_path / "serving.json").write_text(json.dumps(fields))
    with pytest.raises(BadInput, match=message):
        load_any_profile(tmp_path / "serving.json")
    assert isinstance(serving, ServingProfile)


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "[" * 100_000])
def test_what_is_no_profile_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(BadInput, match="profile .*p.json is not valid") as error:
        load_any_profile(tmp_path / "p.json")
    assert "\n" not in str(error.value)
