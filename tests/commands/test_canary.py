"""planner check against two servers: the ratio of their times is found, decides the exit code, and nothing else gets through."""

import itertools
import json
import sys
import threading
import time

import pytest
from fake_engine import FakeEngine, made_schedule, misbehave
from made import made_profile
from msgspec.structs import replace

import planner
from planner.canaries import Answer, Group
from planner.cli import main
from planner.commands.canary import _cell
from planner.commands.canary import complete as really_complete
from planner.engines.http import Bounds
from planner.errors import BadInput, ServerError
from planner.measurements import save_profile
from planner.plans import load_plan, save_plan
from planner.schedules import save_schedule

SECRET = "sk-unmistakable-0123456789"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("canary")
    save_schedule(replace(made_schedule(), output_len=24), folder / "schedule.json")
    save_profile(made_profile(contexts=(1024,)), folder / "profile.json")
    plan = planner.plan(folder / "profile.json")
    save_plan(replace(plan, workload=replace(plan.workload, output_len=12)), folder / "plan.json")
    chats = [{"messages": [{"role": "user", "content": f"tell me about {'x' * (i % 9)}"}]} for i in range(80)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "book.txt").write_text("the cat sat on the mat. " * 8000)
    return folder


@pytest.fixture
def servers():
    """With the plan, and without it: 1.5 times as long per token, on prompts that differ."""
    fast, slow = FakeEngine(draft_len=3), FakeEngine(draft_len=0)
    fast.tpot_s, slow.tpot_s = 0.002, 0.003
    fast.spread = slow.spread = 1.0
    with fast.running() as a, slow.running() as b:
        fast.url, slow.url = a, b
        yield fast, slow


def canary(files, servers, *, name="schedule", dataset="chats.jsonl", **asked):
    fast, slow = servers
    asked = {"min_speedup": 1.3, "concurrency": [1, 3], "num_texts": 6} | asked
    return planner.canary(files / f"{name}.json", [str(files / dataset)], base_url=fast.url, baseline_url=slow.url, **asked)


@pytest.mark.parametrize(("asked", "verdict"), [(1.2, "pass"), (1.9, "fail")])
def test_the_speedup_of_two_servers_is_found_and_judged(files, servers, asked, verdict):
    found = canary(files, servers, min_speedup=asked)
    assert {cell.verdict for cell in found.cells} == {verdict} and found.passed == (verdict == "pass") and found.decided
    for cell, load in zip(found.cells, (1, 3), strict=True):
        assert cell.concurrency == load and cell.tpot_speedup.value == pytest.approx(1.5, rel=0.12)
        assert cell.throughput_speedup.value == pytest.approx(1.5, rel=0.2) and cell.predicted_speedup > 2
        assert cell.num_prompts == sum(len(group.answers) for group in cell.groups) == sum(len(group.answers) for group in cell.baseline_groups)
        assert cell.tpot_s >= 0.0019
    assert found.cells[1].num_prompts == 12, "at least four groups"


def test_both_servers_get_the_same_prompts_in_turn(files, servers, monkeypatch):
    sent = []

    def spy(client, prompt, asked, total_s, real=really_complete):
        sent.append((client.name, prompt.messages))
        return real(client, prompt, asked, total_s)

    monkeypatch.setattr("planner.commands.canary.complete", spy)
    canary(files, servers, concurrency=[1], num_texts=6)
    sent = sent[2:]  # the first to each is not measured
    fast, slow = (server.url for server in servers)
    assert [prompt for name, prompt in sent if name == fast] == [prompt for name, prompt in sent if name == slow]
    assert [name == fast for name, _ in sent] == [True, False, False, True] * 3
    assert len({prompt for _, prompt in sent}) > 3


def test_what_is_too_close_is_undecided_and_says_how_much_more():
    def groups(times):
        return [
            Group(wall_s=t, answers=[Answer(ttft_s=0.1, decode_s=t, output_tokens=11, prompt_tokens=5, chunks=3, longest_gap_s=0.1)]) for t in times
        ]

    own, base = groups([1.0] * 8), groups([1.2, 1.5, 1.4, 1.3, 1.6, 1.2, 1.5, 1.3])
    cell = _cell(1, own, base, "tpot", 1.35, 0.9, None)
    assert cell.verdict == "undecided" and cell.tpot_speedup.low < 1.35 < cell.tpot_speedup.high and cell.more_prompts > 8
    assert _cell(1, own, base, "tpot", cell.tpot_speedup.value, 0.9, None).more_prompts is None
    many = groups([1.0] * 8 * 40), groups([1.2, 1.5, 1.4, 1.3, 1.6, 1.2, 1.5, 1.3] * 40)
    assert _cell(1, *many, "tpot", 1.35, 0.9, None).verdict == "pass" and cell.more_prompts < 8 * 40


def test_a_plan_sends_raw_text_through_completions(files, servers):
    found = canary(files, servers, name="plan", dataset="book.txt", concurrency=None)
    plan = load_plan(files / "plan.json")
    assert [cell.concurrency for cell in found.cells] == [plan.workload.batch] and found.temperature == plan.workload.sampler.temperature
    assert all(path in ("/v1/models", "/v1/completions") for path, _ in servers[0].seen) and found.output_len == 12
    assert found.cells[0].predicted_speedup == pytest.approx(plan.baseline.tpot_s.value / plan.estimate.tpot_s.value, rel=1e-6)


def test_a_server_that_breaks_off_ends_it_soon(files, servers):
    servers[0].cut = 5
    with pytest.raises(ServerError, match="ended before it was done"):
        canary(files, servers)
    servers[0].cut, servers[0].usage = None, False
    with pytest.raises(ServerError, match="counts no tokens"):
        canary(files, servers)
    with misbehave([], close=False) as (url, _):
        servers[1].url = url
        with pytest.raises(ServerError, match="did not answer in time"):
            canary(files, servers, bounds=Bounds(0.5, 0.3, 0.5))


def test_a_failure_does_not_wait_for_answers_under_way(files, servers):
    """One of three streams breaks off while the others would take ten seconds."""
    servers[0].tpot_s, began, sent = 0.5, time.perf_counter(), itertools.count(1)

    def breaks(client, prompt, asked, total_s):
        number = next(sent)  # each thread has one of its own
        if number == 4:  # two that are not measured come first
            raise ServerError("it broke off")
        return really_complete(client, prompt, asked._replace(output_len=3 if number < 3 else 24), total_s)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ServerError, match="it broke off"):
        patch.setattr("planner.commands.canary.complete", breaks)
        canary(files, servers, concurrency=[3])
    assert time.perf_counter() - began < 6


# ---- on the command line


@pytest.fixture
def run(files, monkeypatch, capsys):
    def call(line: str):
        monkeypatch.setattr(sys, "argv", ["planner", *(f"{files}/{word[1:]}" if word[0] == "@" else word for word in line.split())])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.mark.parametrize(("asked", "code"), [("1.2", 0), ("1.9", 1)])
def test_the_exit_code_is_the_verdict_and_the_key_is_nowhere(files, run, servers, tmp_path, monkeypatch, asked, code):
    for server in servers:
        server.key = SECRET
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    threads = threading.active_count()
    line = f"check @schedule.json --dataset @chats.jsonl --base-url {servers[0].url} --baseline-url {servers[1].url}/v1/ --min-speedup {asked} --max-concurrency 2 --texts 4"
    ended, out, err = run(f"{line} -o {tmp_path}/canary.json")
    assert ended == code and ("passes" in out) == (code == 0) and "speedup x" in out
    written = (tmp_path / "canary.json").read_text()
    assert json.loads(written)["passed"] == (code == 0) and SECRET not in out + err + written
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-one")
    ended, out, err = run(f"{line} --json -q")
    assert ended == 2 and not out and "not accepted" in err and "sk-wrong-one" not in err and len(err.splitlines()) == 1
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "set OPENAI_API_KEY, or give --api-key-file" in run(line)[2]
    assert threading.active_count() <= threads + 2


def test_an_undecided_canary_has_an_exit_code_of_its_own(run, servers, monkeypatch):
    monkeypatch.setattr("planner.commands.canary.paired_ratio", lambda a, b, confidence: planner.plans.Interval(value=0.3, low=0.1, high=0.5))
    line = f"check @schedule.json --dataset @chats.jsonl --base-url {servers[0].url} --baseline-url {servers[1].url} --max-concurrency 1 --texts 4"
    ended, out, _ = run(f"{line} --min-speedup 1.35")
    assert ended == 4 and "undecided" in out and "more prompts would tell" in " ".join(out.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--base-url http://a", "give --baseline-url"),
        ("--base-url http://a --baseline-url http://a", "needs two servers"),
        ("--base-url http://a --baseline-url http://b --epsilon 3%", "--epsilon is for a check in the own runtime"),
        ("--base-url http://a --baseline-url http://b --device cpu", "--device is for a check in the own runtime"),
        ("--base-url http://a --baseline-url http://b --min-speedup nan", "--min-speedup"),
        ("--base-url http://a --baseline-url http://b --min-speedup 0", "--min-speedup"),
        ("--base-url http://a --baseline-url http://b --max-concurrency 0", "--max-concurrency"),
        ("--base-url http://a --baseline-url http://b --max-concurrency 10000", "--max-concurrency"),
        ("--base-url http://a --baseline-url http://b --texts 0", "sends 1 to"),
        ("--base-url http://a --baseline-url http://b --texts 900", "prompts are needed, the dataset holds 80"),
        ("--base-url http://me:pass@a --baseline-url http://b", "holds no credentials"),
        ("--baseline-url http://b", "--baseline-url is for two servers"),
        ("--min-speedup 1.3", "--min-speedup is for two servers"),
        ("--max-concurrency 4", "--max-concurrency is for two servers"),
        ("--api-key-file @none", "--api-key-file is for two servers"),
    ],
)
def test_flags_that_do_not_apply_are_refused(run, flags, message):
    code, out, err = run(f"check @schedule.json --dataset @chats.jsonl {flags}")
    assert code == 2 and not out and len(err.splitlines()) == 1 and "pass@" not in err
    assert message in err, err


def test_servers_of_several_models_need_a_name(files, servers, monkeypatch):
    monkeypatch.setattr("planner.engines.completions.served_models", lambda client: ["one", "two"])
    with pytest.raises(ServerError, match="say with --served-model"):
        canary(files, servers)
    with pytest.raises(BadInput, match="choose one of them"):
        canary(files, servers, served_model="three")
    assert canary(files, servers, served_model="two", concurrency=[1], num_texts=4).passed
