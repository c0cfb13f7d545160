"""The closed loop, against servers in this process and against tests/fake_server.py in its own."""

import json
import threading
import time
import urllib.request

import pytest
from fake_engine import FakeEngine, misbehave
from fake_server import launched

from planner.engines.completions import Asked, Prompt
from planner.engines.http import Client
from planner.engines.load import run_load
from planner.errors import BadInput, ServerError
from planner.schedules import Setting
from planner.tunings import Run

PROMPTS = [Prompt(text=f"prompt {i} " * 40) for i in range(8)] + [Prompt(messages=(("user", f"question {i} " * 40),)) for i in range(8)]


def drafting(k, *steps):
    config = {"method": "eagle3", "model": "d", "num_speculative_tokens": k}
    return "--speculative-config", json.dumps(config | ({"num_speculative_tokens_per_batch_size": steps} if steps else {}))


def loaded(url, concurrency, prompts=PROMPTS, *, osl=32, metrics=True, **values):
    return run_load(Client(url), Asked("m", osl, 1.0), prompts, concurrency=concurrency, metrics=metrics, total_s=20.0, **values)


def as_run(load, concurrency, setting=Setting()):
    return Run(
        launch=0, setting=setting, concurrency=concurrency, answers=load.answers, wall_s=load.wall_s, sent=load.sent,
        degenerate=load.degenerate, short=load.short, counted=load.counted, prompts=load.prompts,
    )  # fmt: skip


def law_tpot_s(load, concurrency, k, step=0.004):
    tokens = concurrency * (k + 1)
    return step * (max(1 + 0.01 * tokens, 0.02 * tokens) + 0.08 * k) * load.counted.rounds / load.counted.tokens


def test_what_is_measured_is_the_law_it_was_made_by():
    with launched("serve", "m", *drafting(3)) as url:
        load = loaded(url, 4, osl=64)
    run = as_run(load, 4)
    assert len(load.answers) == len(PROMPTS) and load.prompts == list(range(16)) and load.sent >= 16
    assert 1.0 <= run.tpot_s / law_tpot_s(load, 4, 3) < 1.25, "a shared machine may be late, never early"
    assert run.output_tokens_per_s * run.tpot_s == pytest.approx(4, rel=0.1), "all of the load decodes"
    counted = load.counted
    assert counted.rounds == counted.drafts == counted.drafted / 3 and sum(counted.survived) == counted.accepted
    assert counted.accepted / counted.drafts == pytest.approx(sum(0.8 ** (i + 1) for i in range(3)), rel=0.12)


def test_a_server_drafts_by_the_requests_that_run_while_the_load_is_kept_up_to_the_end():
    """A load of 8 is told K = 1 and loads below it K = 4: rounds of 4 drafts are those of the first moment alone."""
    with launched("serve", "m", *drafting(4, (1, 5, 4), (6, 64, 1))) as url:
        load = loaded(url, 8, PROMPTS[:9], osl=96)
    assert load.counted.drafted / load.counted.drafts < 1.1
    assert load.sent >= 16, "one prompt is left for the second wave: seven that are not counted run beside it"


def test_the_load_is_whole_where_there_are_fewer_prompts_than_it_has_requests():
    with launched("serve", "m") as url:
        load = loaded(url, 8, PROMPTS[:2])
        assert len(load.answers) == 2 and load.sent >= 8 and load.counted.rounds > 2 * 31
        time.sleep(0.1)
        with urllib.request.urlopen(f"{url}/metrics") as answer:
            assert 'num_requests_running{engine="0",model_name="m"} 0' in answer.read().decode(), "what is not counted is dropped at the end"


def test_as_much_is_accepted_by_what_the_server_counts_as_by_what_it_says_with_each_answer():
    with launched("-m", "m", "--spec-type", "draft-simple", "--metrics") as url:
        both, told = loaded(url, 2, PROMPTS[:8], osl=48), loaded(url, 2, PROMPTS[:8], osl=48, metrics=False)
    assert told.counted.tokens == both.counted.tokens == 8 * 47
    assert both.counted.rounds == told.counted.rounds, "the same prompts and seeds"
    assert sum(both.counted.survived) == pytest.approx(both.counted.accepted)
    assert both.counted.drafts == pytest.approx(both.counted.rounds, rel=0.1) and not told.counted.survived


def test_answers_that_repeat_themselves_or_end_at_once_are_left_out_and_said():
    with launched("serve", "m", "--fake", "degenerate=0.4", "--fake", "short=0.3") as url:
        load = loaded(url, 4, osl=48)
        again = loaded(url, 4, osl=48)
    assert load.degenerate > 0 and load.short > 0 and len(load.answers) + load.degenerate + load.short == 16
    assert load.prompts == again.prompts and (load.degenerate, load.short) == (again.degenerate, again.short)
    assert all(answer.output_tokens == 48 for answer in load.answers)


@pytest.mark.parametrize("switch", ["degenerate=1", "short=1"])
def test_a_load_with_nothing_to_go_by_says_what_to_change(switch):
    with launched("serve", "m", "--fake", switch) as url, pytest.raises(BadInput, match=r"of 4 there are .*use other prompts"):
        loaded(url, 2, PROMPTS[:4], osl=48)


def test_a_server_that_dies_ends_the_load_at_once():
    with launched("serve", "m", "--fake", "die-after=3") as url:
        began = time.perf_counter()
        with pytest.raises(ServerError, match="http://127"):
            loaded(url, 4, osl=200)
        assert time.perf_counter() - began < 5
    assert_no_worker_is_left()


def test_a_load_that_is_stopped_leaves_no_thread_behind():
    def stop():
        raise KeyboardInterrupt  # where Ctrl-C meets the thread that waits

    with launched("serve", "m") as url:
        with pytest.raises(KeyboardInterrupt):
            loaded(url, 4, osl=64, advance=stop)
        assert_no_worker_is_left()
        assert loaded(url, 1, PROMPTS[:1]).answers, "the server is none the worse for it"


def assert_no_worker_is_left():
    end = time.monotonic() + 3
    while any("ThreadPool" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < end, threading.enumerate()
        time.sleep(0.01)


def test_after_the_deadline_only_what_has_begun_is_finished():
    with launched("serve", "m") as url:
        load = loaded(url, 2, deadline=time.monotonic() - 1)
    assert load.prompts == [0, 1]


def test_sglang_says_tokens_per_round_and_no_drafts():
    engine = FakeEngine(engine="sglang", draft_len=3)
    engine.tpot_s = 0.002

    def serve():
        engine.serve(0.5)

    with engine.running() as url:
        engine.serve(1.0)
        load = loaded(url, 2, PROMPTS[:4], osl=16, advance=serve)
    counted = load.counted
    assert counted.tokens / counted.rounds == pytest.approx(engine.accept_length) and counted.drafts == 0


def test_an_answer_that_came_as_one_round_is_short_and_one_that_was_held_back_is_an_error():
    def said(tokens):
        events = [{"choices": [{"text": "a b c d e"}]}, {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": tokens}}]
        body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"
        return [b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + body]

    for tokens, error, says in ((6, BadInput, "there are 1 too short"), (60, ServerError, "came in one piece")):
        with misbehave(said(tokens)) as (url, _), pytest.raises(error, match=says):
            loaded(url, 1, PROMPTS[:1], osl=64, metrics=False)


def test_the_same_seeds_give_the_same_answers_at_a_fixed_length():
    """What the end-to-end tests build on."""
    with launched("serve", "m", *drafting(3)) as url:
        first, again = (loaded(url, 1, PROMPTS[:4], osl=48, metrics=False) for _ in range(2))
    assert [answer.chunks for answer in first.answers] == [answer.chunks for answer in again.answers]
