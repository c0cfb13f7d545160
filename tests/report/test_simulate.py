"""The report of a simulation, at any width."""

import pytest

from planner.plans import Interval
from planner.report.simulate import describe_steps, show_simulation
from planner.schedules import Limits
from planner.simulations import Arm, Change, Goodput, Latency, Load, Server, Simulation, Step, Studied, Tried, Use

LIMITS = [Limits(tpot_s=0.02, ttft_s=1.0), Limits(tpot_s=0.05)]


def of(value):
    return Interval(value=value, low=0.9 * value, high=1.1 * value) if value >= 0 else Interval(value=value, low=1.1 * value, high=0.9 * value)


def latency(mean):
    return Latency(mean=of(mean), p50=of(0.8 * mean), p90=of(1.9 * mean), p99=of(3.7 * mean))


def steps(**draft_lens):
    return [Step(batch_from=1, batch_to=2**30 - 1, context_from=1, context_to=2**30 - 1, draft_len=k) for k in draft_lens.values()]


def arm(name, against=None, **changes):
    fields = {
        "name": name, "steps": steps(k=0), "kv_tokens": 123_456, "served": 99, "rejected": 1, "ttft_s": latency(0.4), "tpot_s": latency(0.0123),
        "e2e_s": latency(4.5), "output_tokens_per_s": of(1234.0), "duration_s": 60.0, "running": 7.5, "tokens_per_round": 1.0, "preemptions": 3,
        "goodput": [Goodput(limits=one, share=of(0.8), requests_per_s=of(2.0), output_tokens_per_s=of(900.0)) for one in LIMITS],
        "busy": Use(mean=0.7, max=1.0, series=[0.5] * 48), "kv": Use(mean=0.3, max=0.9, series=[i / 48 for i in range(48)]), "prefix_hits": 0.25,
        "against_off": against,
    }  # fmt: skip
    return Arm(**(fields | changes))


def made(**changes):
    change = Change(ttft=of(0.05), tpot=of(-0.25), e2e=of(-0.2), goodput=[of(0.3), None])
    fields = {
        "planner_version": "0", "sha256": "ab" * 32, "source": "an engine\x1b[31m", "seed": 1, "limits": LIMITS, "seconds": 2.0,
        "load": Load(source="trace.jsonl", requests=100, duration_s=50.0, requests_per_s=2.0, input_len_mean=1000.0, input_len_max=4000, output_len_mean=120.0, output_len_max=400),
        "server": Server(model="made", system="h100", replicas=2, router="least_loaded", tensor_parallel=1, max_num_seqs=64, max_num_batched_tokens=2048, block_tokens=16, prefix_caching=True),
        "arms": [arm("off"), arm("by batch and context", change, tokens_per_round=2.5)], "notes": ["something is assumed"],
    }  # fmt: skip
    return Simulation(**(fields | changes))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_setting_stands_beside_off(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    show_simulation(made(), "out.json")
    out = capsys.readouterr().out
    words = " ".join(out.split())
    assert max(map(len, out.split("\n"))) <= width and "\x1b" not in out
    assert "against off %" in words and "-20.0 [-22.0, -18.0]" in words and "2 replicas of h100" in words
    assert "TPOT 20 TTFT 1000 ms" in words and "80.0 [72.0, 88.0]" in words and "12.3 [11.1, 13.5]" in words
    assert "something is assumed" in words and "router least_loaded" in words and "out.json" in words and "rejected" in words
    assert "......" not in out and ".....:::::-----" in out  # the pool fills up


def test_a_setting_that_served_nobody_is_shown_as_such(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    nobody = arm("off", ttft_s=None, tpot_s=None, e2e_s=None, served=0, rejected=100)
    show_simulation(made(arms=[nobody]), None)
    row = next(line for line in capsys.readouterr().out.split("\n") if line.startswith("off"))
    assert row.split()[1:4] == ["-", "-", "-"]


def test_a_study_shows_the_best_first_and_what_cannot_run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    tried = [
        Tried(setting=name, max_num_seqs=64, max_num_batched_tokens=2048, cost=cost, reason="too large" * (cost is None), worker=worker)
        for name, cost, worker in (("slow", 9.0, "a:1"), ("fast", 2.0, "b:1"), ("broken", None, "a:1"))
    ]
    show_simulation(made(study=Studied(minimised="mean end-to-end time, s", num_candidates=12, tried=tried, best=1)), None)
    out = capsys.readouterr().out
    assert "3 of 12 configurations" in out and out.index("\nfast") < out.index("\nslow") and "too large" in out and "2 processes took part" in out


def test_steps_are_described_in_a_few_words():
    def step(batch, context, k):
        return Step(batch_from=batch[0], batch_to=batch[1], context_from=context[0], context_to=context[1], draft_len=k)

    short, long = (1, 999), (1000, 2**30 - 1)
    by_batch = [step((1, 8), (1, 2**30 - 1), 3), step((9, 16), (1, 2**30 - 1), 3), step((17, 2**30 - 1), (1, 2**30 - 1), 0)]
    assert describe_steps(by_batch) == "by requests that decode: K=3 up to 16, K=0"
    both = [step((1, 8), short, 0), step((9, 2**30 - 1), short, 0), step((1, 8), long, 1), step((9, 2**30 - 1), long, 2)]
    assert describe_steps(both) == "by requests that decode; texts from 1 tokens: K=0; texts from 1000 tokens: K=1 up to 8, K=2"
