"""What holds for every workload: requests conserved, causality, room, Little's law, and the waiting times that theory knows."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import BadInput
from planner.simulator.engine import Outcome, Policy, Record, Replica, Server, StepLoad, simulate
from planner.simulator.scheduler import Batching, KVRoom, Scheduler, Sequence, StepPlan
from planner.simulator.texts import Acceptance
from planner.simulator.workload import HASHED_TOKENS, Request, generate

ACCEPTANCE = Acceptance(tokens_per_round=((1.7, 2.2, 2.5, 2.7),), spread=0.7)


class Linear:
    """Times that grow with everything a step computes."""

    def step_s(self, load: StepLoad) -> np.ndarray:
        tokens = load.prefill_tokens + load.decode_requests * (1 + load.draft_len)
        return 0.01 + 1e-5 * tokens + 1e-7 * load.decode_context + 1e-9 * load.prefill_pairs + 0.001 * load.draft_len


class PerRequest:
    """A server that takes one second for each token of a lone request."""

    def step_s(self, load: StepLoad) -> np.ndarray:
        return 1.0 + 0.0 * load.decode_context


def columns(outcome: Outcome) -> dict[str, np.ndarray]:
    return {name: value for name, value in outcome._asdict().items() if name != "series"}


def assert_same(one: Outcome, other: Outcome, but: tuple[str, ...] = ()) -> None:
    for name, value in columns(one).items():
        if name not in but:
            np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)


@st.composite
def workloads(draw) -> list[Request]:
    """Bursts of prompts, some of which begin alike."""
    requests = []
    at = 0.0
    for _ in range(draw(st.integers(1, 25))):
        at += draw(st.sampled_from([0.0, 0.0, 0.003, 0.3, 5.0]))
        input_len = draw(st.integers(1, 3 * HASHED_TOKENS))
        whole = input_len // HASHED_TOKENS
        family = draw(st.integers(0, 2))
        repeated = draw(st.sampled_from([9, 9, 1]))  # a trace may hold one hash twice
        blocks = tuple(10 * family + i % repeated for i in range(draw(st.integers(0, whole))))
        requests.append(Request(arrival_s=at, input_len=input_len, output_len=draw(st.integers(1, 40)), blocks=blocks))
    return requests


servers = st.builds(
    Server,
    cost=st.just(Linear()),
    room=st.builds(KVRoom, blocks=st.integers(20, 200), block_tokens=st.sampled_from([16, 32]), blocks_per_request=st.integers(0, 3)),
    batching=st.builds(
        Batching, max_num_batched_tokens=st.sampled_from([5, 64, 700, 8192]), max_num_seqs=st.integers(1, 12), prefix_caching=st.booleans()
    ),
    policy=st.sampled_from(
        [
            Policy.fixed(0),
            Policy.fixed(1),
            Policy.fixed(4),
            Policy(draft_len=((4,), (2,), (0,)), batches=(1, 3, 6)),
            Policy(draft_len=((4, 0), (1, 3)), batches=(1, 4), contexts=(1, 700)),
        ]
    ),
    acceptance=st.just(ACCEPTANCE),
    replicas=st.integers(1, 3),
    router=st.sampled_from(["round_robin", "least_loaded"]),
)


@settings(max_examples=60, deadline=None)
@given(workloads(), servers, st.integers(0, 3))
def test_every_request_is_served_whole_or_refused_and_in_order_of_cause(requests, server, seed):
    outcome = simulate(requests, server, seed=seed)
    served = ~outcome.rejected
    assert (
        np.isfinite(outcome.finish_s[served]).all() and np.isnan(outcome.first_token_s[~served]).all() and np.isnan(outcome.finish_s[~served]).all()
    )
    least_s = Linear().step_s(StepLoad(1, 1, 1, 0, 0, 0)) - 1e-9
    assert (outcome.ttft_s[served] >= least_s).all()  # no first token before a step that began after the arrival
    gone_s = outcome.finish_s[served] - outcome.first_token_s[served]
    rounds = outcome.rounds[served]
    assert (gone_s >= 0.01 * rounds - 1e-9).all() and (rounds <= outcome.output_len[served] - 1).all()
    emitted = outcome.round_tokens + 1 + outcome.preemptions  # one more comes of every prompt, a repeated one too
    assert (emitted[served] >= outcome.output_len[served]).all() and (outcome.round_tokens[served] < outcome.output_len[served]).all()
    if not outcome.preemptions.any():
        assert (emitted[served] == outcome.output_len[served]).all()
    assert (outcome.rounds[~served] == 0).all() and (outcome.reused_tokens[served] >= 0).all()
    for i in np.flatnonzero(outcome.rejected):
        tokens = requests[i].input_len + requests[i].output_len + server.policy.max_draft_len
        assert -(-tokens // server.room.block_tokens) + server.room.blocks_per_request > server.room.blocks


@settings(max_examples=60, deadline=None)
@given(workloads(), servers)
def test_series_never_exceed_what_there_is_and_time_moves_on(requests, server):
    outcome = simulate(requests, server)
    series = outcome.series
    assert (series.kv_share <= 1).all() and (series.kv_share >= 0).all()
    assert (series.end_s > series.start_s).all() and (series.running <= server.batching.max_num_seqs).all()
    computed = series.prefill_tokens / series.steps + series.decoding * (1 + series.draft_len)
    assert (computed <= server.batching.max_num_batched_tokens).all() and (computed > 0).all()
    for replica in range(server.replicas):
        own = series.replica == replica
        assert (series.start_s[own][1:] >= series.end_s[own][:-1]).all()
    prompts = outcome.input_len[~outcome.rejected].sum() - outcome.reused_tokens.sum()
    assert series.prefill_tokens.sum() == prompts or outcome.preemptions.any()


@settings(max_examples=60, deadline=None)
@given(workloads(), servers)
def test_several_steps_at_once_are_the_same_as_one_by_one(requests, server):
    at_once, one_by_one = simulate(requests, server), simulate(requests, server, max_jump=1)
    assert_same(at_once, one_by_one)
    assert at_once.series.steps.sum() == one_by_one.series.steps.sum() == len(one_by_one.series.steps)


@settings(max_examples=40, deadline=None)
@given(workloads(), servers)
def test_the_time_average_in_the_system_is_the_rate_times_the_mean_time(requests, server):
    outcome = simulate(requests, server)
    series = outcome.series
    counted = float(((series.running + series.waiting) * (series.end_s - series.start_s)).sum())  # by the engine, step by step
    assert counted == pytest.approx(float(outcome.e2e_s[~outcome.rejected].sum()), rel=1e-6)


def check_admission(scheduler: Scheduler, plan: StepPlan, draft_len: int) -> None:
    """The head of the queue waits for nothing but tokens of the step, a place, blocks, or those whom it was just preempted for."""
    limits = scheduler.batching
    used = plan.num_decoding * (1 + draft_len) + sum(chunk.tokens for chunk in plan.chunks)
    assert 0 < used <= limits.max_num_batched_tokens
    running = len(scheduler.decoding.sequences) + max(len(plan.chunks), scheduler.partial is not None)
    if scheduler.waiting and not plan.preempted and used < limits.max_num_batched_tokens and running < limits.max_num_seqs:
        tokens = scheduler.waiting[0].length
        assert -(-tokens // scheduler.room.block_tokens) + scheduler.room.blocks_per_request > scheduler.available_blocks


@settings(max_examples=40, deadline=None)
@given(workloads(), servers)
def test_an_engine_never_idles_while_the_head_of_its_queue_has_room(requests, server):
    longest = server.policy.max_draft_len
    texts = ACCEPTANCE.draw(np.array([r.input_len for r in requests]), np.array([r.output_len for r in requests]), longest, 0)
    record = Record(len(requests))
    replica = Replica(server, texts, record)
    scheduler, schedule = replica.scheduler, replica.scheduler.schedule

    def checked(draft_len: int) -> StepPlan:
        plan = schedule(draft_len)
        check_admission(scheduler, plan, draft_len)
        return plan

    scheduler.schedule = checked
    arrived = []
    for i, request in enumerate(requests):
        if scheduler.fits(request.input_len, request.output_len, longest):
            replica.push(request.arrival_s, Sequence(i, request.input_len, request.output_len, request.blocks, int(texts.start[i])))
            arrived.append(i)
    before = 0.0
    while replica.step():
        assert replica.clock_s > before
        before = replica.clock_s
        assert 0 <= scheduler.used_blocks <= server.room.blocks
        held = sum(scheduler.decoding.blocks) + (scheduler.partial.blocks if scheduler.partial else 0)
        assert scheduler.used_blocks <= held + scheduler.num_running * server.room.blocks_per_request  # less where prefixes are shared
    assert scheduler.used_blocks == 0 and not scheduler.waiting and not scheduler.num_running
    series, arrival_s = replica.series(0), np.array([request.arrival_s for request in requests])[arrived]
    for end_s, start_s in zip(series.end_s[:-1], series.start_s[1:], strict=True):
        if start_s > end_s:  # idle
            assert not ((arrival_s < start_s) & (record.finish_s[arrived] > end_s)).any()


@settings(max_examples=30, deadline=None)
@given(workloads(), servers)
def test_a_prefix_cache_changes_times_and_not_what_is_generated(requests, server):
    server = replace(server, replicas=1, room=replace(server.room, blocks=5000))  # nobody is preempted
    with_cache, without = (
        simulate(requests, replace(server, batching=replace(server.batching, prefix_caching=caching)), seed=1) for caching in (True, False)
    )
    np.testing.assert_array_equal(with_cache.output_len, without.output_len)
    np.testing.assert_array_equal(with_cache.round_tokens, without.round_tokens)
    if len({k for row in server.policy.draft_len for k in row}) == 1:
        np.testing.assert_array_equal(with_cache.rounds, without.rounds)
    assert not without.reused_tokens.any()


def test_two_prompts_with_one_prefix_are_served_sooner_than_two_without():
    alike, apart = (
        [Request(arrival_s=float(i), input_len=2000, output_len=2, blocks=(0, 1 + different * i)) for i in range(2)] for different in (0, 1)
    )
    server = Server(cost=Linear(), room=KVRoom(blocks=1000))
    first, second = (simulate(requests, server) for requests in (alike, apart))
    assert first.ttft_s[0] == second.ttft_s[0] and first.ttft_s[1] < second.ttft_s[1]
    assert first.reused_tokens.tolist() == [0, 2 * HASHED_TOKENS] and second.reused_tokens.tolist() == [0, HASHED_TOKENS]


def test_a_seed_decides_everything_and_texts_are_the_same_whatever_the_load():
    requests = generate(rate=5, lengths=[(200, 300)], count=60, seed=0)
    server = Server(cost=Linear(), room=KVRoom(blocks=500), policy=Policy.fixed(3), acceptance=ACCEPTANCE)
    assert_same(simulate(requests, server, seed=4), simulate(requests, server, seed=4))
    assert (simulate(requests, server, seed=4).rounds != simulate(requests, server, seed=5).rounds).any()
    roomy, alone = replace(server, room=KVRoom(blocks=100_000)), replace(server, room=KVRoom(blocks=10**6), batching=Batching(max_num_seqs=1))
    np.testing.assert_array_equal(simulate(requests, roomy, seed=4).rounds, simulate(requests, alone, seed=4).rounds)


@pytest.mark.parametrize("draft_len", [1, 2, 4])
def test_served_texts_have_the_tokens_per_round_asked_for(draft_len):
    requests = generate(rate=50, lengths=[(100, 400)], count=1500, seed=0)
    outcome = simulate(requests, Server(cost=Linear(), room=KVRoom(blocks=10**6), policy=Policy.fixed(draft_len), acceptance=ACCEPTANCE), seed=0)
    assert outcome.tokens_per_round == pytest.approx(ACCEPTANCE.tokens_per_round[0][draft_len - 1], rel=0.02)
    assert (outcome.drafted == outcome.rounds * draft_len).all()


def test_the_last_round_stops_at_the_last_token():
    acceptance = Acceptance(tokens_per_round=((2.0, 3.0, 4.0),))  # all drafts are kept
    requests = [Request(arrival_s=0, input_len=10, output_len=n) for n in (1, 2, 5, 6, 9)]
    outcome = simulate(requests, Server(cost=Linear(), room=KVRoom(blocks=1000), policy=Policy.fixed(3), acceptance=acceptance))
    assert outcome.rounds.tolist() == [0, 1, 1, 2, 2] and outcome.round_tokens.tolist() == [0, 1, 4, 5, 8]
    assert np.isnan(outcome.tpot_s[0]) and outcome.e2e_s[0] == outcome.ttft_s[0]


def test_mean_waits_are_those_of_an_md1_queue():
    # One request at a time, one step of 1 s each: Pollaczek and Khinchine, wait = load / (2 (1 - load)).
    load, count, runs = 0.7, 2000, 8
    server = Server(cost=PerRequest(), room=KVRoom(blocks=100), batching=Batching(max_num_seqs=1))
    waits = [np.mean(simulate(generate(rate=load, lengths=[(10, 1)], count=count, seed=seed), server).ttft_s[200:] - 1.0) for seed in range(runs)]
    assert np.mean(waits) == pytest.approx(load / (2 * (1 - load)), abs=3.5 * np.std(waits, ddof=1) / np.sqrt(runs))
    assert np.std(waits, ddof=1) / np.sqrt(runs) < 0.15


def test_mean_waits_of_longer_service_are_those_of_an_md1_queue():
    # A prompt's step and 9 more: service of 10 s; steps that are taken at once must not delay anybody.
    load, runs = 0.5, 6
    server = Server(cost=PerRequest(), room=KVRoom(blocks=100), batching=Batching(max_num_seqs=1))
    runs = [simulate(generate(rate=load / 10, lengths=[(10, 10)], count=800, seed=100 + seed), server) for seed in range(runs)]
    waits = [np.mean(run.ttft_s[100:] - 1.0) for run in runs]
    assert np.mean(waits) == pytest.approx(10 * load / (2 * (1 - load)), abs=3.5 * np.std(waits, ddof=1) / np.sqrt(len(runs)))
    assert all(run.tpot_s == pytest.approx(1.0) for run in runs)


def test_preempted_requests_finish_and_lose_time():
    requests = [Request(arrival_s=0, input_len=100, output_len=200) for _ in range(8)]
    tight, roomy = (simulate(requests, Server(cost=Linear(), room=KVRoom(blocks=blocks))) for blocks in (60, 1000))
    assert tight.preemptions.sum() > 0 == roomy.preemptions.sum()
    assert tight.preemptions[0] == 0  # the oldest is not the one to go
    assert tight.finish_s.max() > roomy.finish_s.max() and not tight.rejected.any()


def test_a_request_that_cannot_fit_is_refused_and_holds_up_nobody():
    requests = [Request(arrival_s=0, input_len=n, output_len=10) for n in (100, 100_000, 100)]
    outcome = simulate(requests, Server(cost=Linear(), room=KVRoom(blocks=100)))
    assert outcome.rejected.tolist() == [False, True, False]
    assert np.isfinite(outcome.finish_s).tolist() == [True, False, True]


def test_a_policy_drafts_by_batch_and_by_context():
    policy = Policy(draft_len=((4, 2), (1, 0)), batches=(1, 3), contexts=(1, 500))
    assert [policy.choose(n, n * context)[0] for n, context in ((1, 499), (1, 500), (2, 600), (3, 10), (99, 500))] == [4, 2, 2, 1, 0]
    assert policy.choose(2, 200)[1] == 1000
    requests = [Request(arrival_s=0, input_len=400, output_len=300)]
    outcome = simulate(requests, Server(cost=Linear(), room=KVRoom(blocks=1000), policy=policy, acceptance=ACCEPTANCE))
    used = outcome.series.draft_len[outcome.series.decoding > 0]
    assert set(used) == {2, 4} and (np.diff(used) <= 0).all()


def test_a_least_loaded_router_spares_who_is_behind_a_long_request():
    requests = [Request(arrival_s=0, input_len=10, output_len=5000)] + [Request(arrival_s=1.0 + i, input_len=10, output_len=3) for i in range(6)]
    server = Server(cost=Linear(), room=KVRoom(blocks=10_000), batching=Batching(max_num_seqs=1), replicas=2, router="least_loaded")
    outcome = simulate(requests, server)
    assert outcome.replica.tolist() == [0] + 6 * [1]
    assert simulate(requests, replace(server, router="round_robin")).replica.tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_replicas_are_independent_servers():
    requests = generate(rate=3, lengths=[(300, 40), (50, 90)], count=40, seed=2)
    server = Server(cost=Linear(), room=KVRoom(blocks=200), replicas=2)
    both = simulate(requests, server)
    for replica in range(2):
        own = simulate(requests[replica::2], replace(server, replicas=1))
        np.testing.assert_array_equal(both.finish_s[replica::2], own.finish_s)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Policy(draft_len=((1,),), batches=(2,)),
        lambda: Policy(draft_len=((1, 2),)),
        lambda: Policy.fixed(-1),
        lambda: Server(cost=Linear(), room=KVRoom(blocks=1), policy=Policy.fixed(1)),
        lambda: Server(cost=Linear(), room=KVRoom(blocks=1), policy=Policy.fixed(5), acceptance=ACCEPTANCE),
        lambda: Server(
            cost=Linear(), room=KVRoom(blocks=1), policy=Policy.fixed(3), acceptance=ACCEPTANCE, batching=Batching(max_num_batched_tokens=3)
        ),
        lambda: Server(cost=Linear(), room=KVRoom(blocks=1), replicas=0),
        lambda: Server(cost=Linear(), room=KVRoom(blocks=1), router="fastest"),
        lambda: simulate([], Server(cost=Linear(), room=KVRoom(blocks=1))),
    ],
)
def test_what_no_server_is_is_refused(wrong):
    with pytest.raises(BadInput):
        wrong()
