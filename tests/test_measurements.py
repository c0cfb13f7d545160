"""A profile comes back from disk as it was; a damaged one is refused with the field that is wrong."""

import base64
import json

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays
from made import made_profile

from planner.errors import BadInput
from planner.files import MAX_JSON_BYTES
from planner.measurements import Packed, Profile, encode, fingerprint, load_profile, save_profile


@pytest.fixture(scope="module")
def profile() -> Profile:
    return made_profile(contexts=(64,), texts_per_cell=1, noise=0.1, warnings=["a \u2028 b"], failures=[])


@pytest.fixture
def damaged(profile, tmp_path):
    """Save a changed profile and load it: change(fields) edits the decoded JSON."""

    def load(change):
        fields = json.loads(encode(profile))
        change(fields)
        path = tmp_path / "profile.json"
        path.write_text(json.dumps(fields))  # writes NaN and Infinity as Python does
        return load_profile(path)

    return load


def put(value, *path):
    def change(fields):
        for key in path[:-1]:
            fields = fields[key]
        fields[path[-1]] = value

    return change


def drop(*path):
    def change(fields):
        for key in path[:-1]:
            fields = fields[key]
        del fields[path[-1]]

    return change


# ---- what is sound


@pytest.mark.parametrize("size", ["small", "large"])
def test_a_profile_comes_back_as_it_was(tmp_path, size):
    profile = made_profile(
        noise=0.3, **({} if size == "small" else {"output_len": 257, "texts_per_cell": 16, "max_draft_len": 8, "draft_lens": (1, 8)})
    )
    save_profile(profile, tmp_path / "p.json")
    assert ((tmp_path / "p.json").stat().st_size > 200_000) == (size == "large")  # the two layouts
    assert load_profile(tmp_path / "p.json") == profile
    assert json.loads((tmp_path / "p.json").read_text())["schema_version"] == 1


def test_a_large_profile_is_written_an_entry_a_line():
    profile = made_profile(output_len=257, texts_per_cell=16, max_draft_len=8)
    lines = encode(profile).decode().splitlines()
    assert sum(line.startswith('{"text":') for line in lines) == len(profile.acceptance)


def test_a_file_that_is_written_again_keeps_its_fingerprint(tmp_path, profile):
    save_profile(profile, tmp_path / "a.json")
    save_profile(load_profile(tmp_path / "a.json"), tmp_path / "b.json")
    assert fingerprint(tmp_path / "a.json") == fingerprint(tmp_path / "b.json")
    save_profile(msgspec.structs.replace(profile, seed=1), tmp_path / "b.json")
    assert fingerprint(tmp_path / "a.json") != fingerprint(tmp_path / "b.json")


def test_an_unchanged_profile_passes(damaged, profile):
    assert damaged(lambda fields: None) == profile


@settings(derandomize=True, deadline=None, max_examples=50)
@given(arrays(np.uint8, array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=9)))
def test_packed_arrays_come_back_as_they_were(array):
    packed = msgspec.json.decode(msgspec.json.encode(Packed.pack(array)), type=Packed)
    assert packed.unpack().dtype == np.uint8
    assert np.array_equal(packed.unpack(), array)


def test_a_round_is_the_sum_of_its_parts(profile):
    sample = profile.rounds[1]
    assert sample.round_s.tolist() == pytest.approx([sum(parts) for parts in zip(sample.draft_s, sample.verify_s, sample.commit_s, strict=True)])


# ---- what is not


@pytest.mark.parametrize(
    "change, words",
    [
        (put(2, "schema_version"), "schema_version 2, this planner reads 1; make it again"),
        (put("1", "schema_version"), "schema_version"),
        (drop("schema_version"), "schema_version"),
        (drop("model"), "missing required field `model`"),
        (drop("texts", 0, "sampler"), r"missing required field `sampler`.*texts\[0\]"),
        (put(1, "surprise"), "unknown field `surprise`"),
        (put(1, "texts", 0, "surprise"), r"unknown field `surprise`.*texts"),
        (put(float("nan"), "rounds", 0, "verify_s", 0), "malformed|not valid"),
        (put(float("inf"), "minutes", "latency"), "malformed|not valid"),
        (put(-1e-3, "rounds", 0, "verify_s", 0), r">= 0.*rounds\[0\]\.verify_s\[0\]"),
        (put(1e7, "prefill", 0, "seconds", 0), r"<= 1000000.*prefill"),
        (put([], "prefill"), r"length >= 1.*prefill"),
        (put("fast", "rounds", 0, "draft_s", 0), r"Expected `float`.*draft_s"),
        (put([0.1], "rounds", 0, "draft_s"), r"one entry per round.*rounds\[0\]"),
        (put(1.5, "texts", 0, "distinct_4grams"), r"<= 1.*distinct_4grams"),
        (put(0, "contexts", 0), r">= 1.*contexts"),
        (put([], "samplers"), "length >= 1.*samplers"),
        (put(-1.0, "samplers", 0, "temperature"), r">= 0.*samplers\[0\]\.temperature"),
        (put(2000, "max_draft_len"), "<= 255.*max_draft_len"),
        (put(2, "max_draft_len"), r"acceptance\[0\] must hold 32 starts x 2 drafts, got \[32, 4\]"),
        (put("gguf", "dtype"), "dtype"),
        (put(3, "target", "num_kv_heads"), r"multiple of num_kv_heads.*target"),
        (put(10, "acceptance", 0, "kv", "budget"), r"kv budget must hold.*acceptance\[0\]\.kv"),
        (put("quantum", "acceptance", 0, "drafter", "kind"), r"acceptance\[0\]\.drafter\.kind"),
        (put(1, "acceptance", 1, "text"), r"acceptance\[1\]\.text must be below 1, the number of texts, got 1"),
        (put(-1, "acceptance", 1, "text"), r">= 0.*acceptance\[1\].text"),
        (put(10, "texts", 0, "output_len"), r"acceptance\[0\] must hold 9 starts"),
        (put("AAAA", "acceptance", 0, "accept_prob", "u8"), r"u8 must hold 128 bytes.*acceptance\[0\]\.accept_prob"),
        (put([64, 4], "acceptance", 0, "accept_prob", "shape"), r"u8 must hold 256 bytes.*acceptance\[0\]\.accept_prob"),
        (put([2**20, 2**20], "acceptance", 0, "accept_prob", "shape"), "u8 must hold"),
        (put([2**21, 1], "acceptance", 0, "accept_prob", "shape"), r"<= 1048576.*accept_prob\.shape"),
        (put([-32, -4], "acceptance", 0, "accept_prob", "shape"), r">= 0.*accept_prob\.shape"),
        (put([4, 4, 8], "acceptance", 0, "accept_prob", "shape"), r"length <= 2.*accept_prob\.shape"),
        (lambda fields: fields["rounds"].__delitem__(slice(None)), "must hold plain decoding"),
        (lambda fields: [sample.update(draft_len=1) for sample in fields["rounds"]], "must hold plain decoding"),
        (put("x" * 501, "model"), "length <= 500.*model"),
    ],
)
def test_a_damaged_field_is_named(damaged, change, words):
    with pytest.raises(BadInput, match=words) as caught:
        damaged(change)
    assert "profile.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("u8", ["!" * 44, base64.b64encode(b"\0" * 33).decode()])
def test_packed_bytes_that_do_not_unpack_are_refused_on_reading(damaged, u8):
    assert len(u8) == 44  # as many characters as 32 bytes take
    with pytest.raises(BadInput, match="acceptance"):
        damaged(put(u8, "acceptance", 0, "drafted", "u8"))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{", b"\xff\xfe", b'{"schema_version": 1}', b"[" * 200_000, b'{"schema_version": 1' + b"0" * 5000 + b"}"]
)
def test_what_is_no_profile_is_refused(tmp_path, content):
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(BadInput, match="p.json"):
        load_profile(tmp_path / "p.json")


def test_a_profile_cut_off_anywhere_is_refused(tmp_path, profile):
    content = encode(profile).rstrip()
    for end in range(0, len(content), max(1, len(content) // 60)):
        (tmp_path / "p.json").write_bytes(content[:end])
        with pytest.raises(BadInput):
            load_profile(tmp_path / "p.json")


def test_a_measurement_that_is_not_a_number_does_not_come_back_as_one(tmp_path, profile):
    sample = msgspec.structs.replace(profile.prefill[0], seconds=[float("nan")])
    save_profile(msgspec.structs.replace(profile, prefill=[sample]), tmp_path / "p.json")
    with pytest.raises(BadInput, match=r"prefill\[0\]\.seconds"):
        load_profile(tmp_path / "p.json")


def test_a_huge_file_is_refused_unread(tmp_path):
    with open(tmp_path / "p.json", "wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(BadInput, match="at most"):
        load_profile(tmp_path / "p.json")


def test_the_number_of_rounds_must_agree_where_a_sample_is_made(profile):
    with pytest.raises(ValueError, match="one entry per round"):
        msgspec.structs.replace(profile.rounds[0], drafted=[0])
