"""Arrivals have the law they were asked for, and traces are read or refused by file and line."""

import gzip

import numpy as np
import pytest

from planner.errors import BadInput
from planner.simulator.workload import HASHED_TOKENS, Request, generate, lognormal_lengths, read_trace, rescaled

MOONCAKE = '{"timestamp": 1500, "input_length": 1000, "output_length": 5, "hash_ids": [7, 8]}\n'
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
OURS = "arrival_s,input_len,output_len\n0.5,10,20\n0.25,30,40\n"


@pytest.mark.parametrize(("arrivals", "cv"), [("poisson", 1.0), ("gamma", 0.5), ("gamma", 1.0), ("gamma", 3.0)])
def test_times_between_arrivals_have_the_mean_and_variance_asked_for(arrivals, cv):
    rate, count = 4.0, 40_000
    requests = generate(rate=rate, lengths=[(1, 1)], count=count, seed=3, arrivals=arrivals, cv=cv)
    gaps = np.diff([0.0, *(request.arrival_s for request in requests)])
    kurtosis = 3 + 6 * cv**2  # of a gamma law
    assert gaps.mean() == pytest.approx(1 / rate, abs=4 * cv / rate / np.sqrt(count))
    assert gaps.var() == pytest.approx((cv / rate) ** 2, rel=4 * np.sqrt((kurtosis - 1) / count))


def test_counts_of_poisson_arrivals_vary_as_much_as_their_mean():
    at = [request.arrival_s for request in generate(rate=10, lengths=[(1, 1)], count=50_000, seed=0)]
    counts = np.histogram(at, np.arange(0, 4900, 1.0))[0]
    assert counts.mean() == pytest.approx(10, rel=0.02)
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.1)


def test_a_seed_draws_the_same_requests_at_every_rate():
    slow, fast = (generate(rate=rate, lengths=[(1, 2), (3, 4)], count=50, seed=5, arrivals="gamma", cv=2) for rate in (1, 4))
    assert [r.input_len for r in slow] == [r.input_len for r in fast]
    assert [r.arrival_s for r in rescaled(slow, 4)] == pytest.approx([r.arrival_s for r in fast])
    assert slow != generate(rate=1, lengths=[(1, 2), (3, 4)], count=50, seed=6, arrivals="gamma", cv=2)


def test_lengths_keep_their_means():
    pairs = np.array(lognormal_lengths(input_mean=2000, output_mean=300, cv=0.8, count=40_000, seed=0))
    assert pairs.mean(0) == pytest.approx([2000, 300], rel=0.02)
    assert (pairs.std(0) / pairs.mean(0)) == pytest.approx([0.8, 0.8], rel=0.05)
    assert set(lognormal_lengths(input_mean=7, output_mean=9, cv=0, count=3, seed=0)) == {(7, 9)}


@pytest.mark.parametrize("pack", [str.encode, lambda text: gzip.compress(text.encode())])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MOONCAKE, [Request(arrival_s=1.5, input_len=1000, output_len=5, blocks=(7, 8))]),
        (AZURE, [Request(arrival_s=0, input_len=374, output_len=44), Request(arrival_s=4.314579, input_len=396, output_len=109)]),
        (OURS, [Request(arrival_s=0.25, input_len=30, output_len=40), Request(arrival_s=0.5, input_len=10, output_len=20)]),
    ],
)
def test_a_trace_of_each_format_is_read(tmp_path, text, expected, pack):
    path = tmp_path / "trace"
    path.write_bytes(pack(text))
    assert read_trace(path) == expected


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "without arrival_s"),
        (b"arrival_s,input_len,output_len\n", "holds none"),
        (b"\xff\xfe\x00", "UTF-8"),
        (MOONCAKE.encode() + b"{", ":2:"),
        (MOONCAKE.replace("1500", "-1").encode(), ":1:"),
        (MOONCAKE.replace("1500", "1e400").encode(), ":1:"),
        (MOONCAKE.replace("1000", "0").encode(), "input_len"),
        (MOONCAKE.replace("1000", str(10**30)).encode(), ":1:"),
        (MOONCAKE.replace("[7, 8]", "[7, 8, 9]").encode(), f"one hash per {HASHED_TOKENS}"),
        (MOONCAKE.replace("[7, 8]", '"x"').encode(), ":1:"),
        (b"[" * 100_000, "columns"),
        (b'{"timestamp": ' + b"[" * 100_000, ":1:"),
        (b"a,b\n1,2\n", "without arrival_s"),
        (OURS.encode() + b"nan,1,1\n", ":4:"),
        (OURS.encode() + b"1,1\n", "3 fields"),
        (OURS.encode() + b"1,1,2.5\n", ":4:"),
        (AZURE.encode() + b"yesterday,1,1\n", ":4:"),
        (AZURE.encode() + b"2024-05-10 00:00:00+00:00,1,1\n", ":4:"),
        (AZURE.encode() + b"2023-11-15 00:00:00,1,1\n", "arrival_s"),
        (OURS.encode() + b'"' + b"x" * 200_000 + b'",1,1\n', "field larger"),
        (gzip.compress(OURS.encode(), mtime=0)[:-9], "gzipped"),  # a time would make every process its own name of the test
        (b"\x1f\x8bnothing", "cannot unpack"),
        (gzip.compress(OURS.encode(), mtime=0) * 2, "gzipped"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_place(tmp_path, content, says):
    path = tmp_path / "trace"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"(?s)" + says) as error:
        read_trace(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 500


def test_a_small_file_that_unpacks_to_a_huge_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("planner.simulator.workload.MAX_TRACE_BYTES", 1000)
    (tmp_path / "bomb").write_bytes(gzip.compress(b"0" * 100_000))
    with pytest.raises(BadInput, match="at most 1000 bytes"):
        read_trace(tmp_path / "bomb")


@pytest.mark.parametrize(
    "wrong",
    [{"rate": 0}, {"rate": float("nan")}, {"count": 0}, {"cv": 2.0}, {"arrivals": "gamma", "cv": 0.0}, {"lengths": []}],
)
def test_a_workload_that_cannot_be_is_refused(wrong):
    with pytest.raises(BadInput):
        generate(**{"rate": 1.0, "lengths": [(1, 1)], "count": 1, "seed": 0, **wrong})
