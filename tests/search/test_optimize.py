"""The choice: off when nothing is accepted, the best draft_len by hand, caps that are held, ties that are named."""

import re
import shlex

import msgspec
import numpy as np
import pytest
from made import DRAFT_MODEL, FIFTH, GREEDY, NGRAM, SELF_SPARSE, WARM, budgets, linear_round_s, made_profile
from msgspec.structs import replace

from planner.commands.configs import make_config
from planner.commands.flags import Asked
from planner.cost.memory import resident_bytes
from planner.errors import BadInput
from planner.plans import Plan
from planner.search.optimize import make_plan
from planner.specs import PLAIN, DraftConfig, FullKV, Sampler, SparseKV, Workload, describe

WORKLOAD = Workload(context_len=1024, output_len=33, sampler=GREEDY)
CHUNK = (SELF_SPARSE, SparseKV(budget=64, selection="chunk"))


def planned(profile, workload=WORKLOAD, objective="tpot", cap=None, price=None) -> Plan:
    return make_plan(profile, "0" * 64, workload, objective=objective, memory_cap_bytes=cap, price_per_hour=price)


def always(accept):
    return lambda kv, context_len, number: accept


def sparse(draft_len, budget=64):
    return DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=budget), draft_len=draft_len)


def needed(profile, config) -> int:
    return int(resident_bytes(profile, config, WORKLOAD).value)


def test_not_drafting_wins_when_nothing_is_accepted():
    plan = planned(made_profile(accept=always(0.0)))
    assert plan.chosen == PLAIN and plan.estimate == plan.baseline and plan.speedup.value == 1
    assert "--drafter none" in plan.command and "--kv-budget" not in plan.command
    assert plan.best_speculative is not None and plan.break_even_tokens_per_round > 1


def test_the_longest_draft_wins_when_all_is_accepted_and_drafts_are_cheap():
    plan = planned(made_profile(accept=always(1.0), drafters=[(NGRAM, FullKV())]))
    assert plan.chosen == DraftConfig(drafter=NGRAM, draft_len=4)


@pytest.mark.parametrize("fifths", [0, 1, 2, 3, 4, 5])
def test_the_best_draft_len_is_the_one_found_by_hand(fifths):
    """Long texts, constant acceptance a: seconds per token are round(K) (1 - a) / (1 - a^(K+1))."""
    accept, context_len, output_len = fifths * FIFTH, 1024, 257
    kv = SparseKV(budget=64)
    by_hand = [sum(linear_round_s(FullKV(), 0, context_len))]
    for k in range(1, 5):
        tokens = sum(accept**i for i in range(k + 1))
        by_hand.append(sum(linear_round_s(kv, k, context_len)) / tokens)
    best, second = np.argsort(by_hand)[:2]
    assert by_hand[second] / by_hand[best] > 1.02  # far enough apart for an end of text not to matter
    profile = made_profile(accept=always(accept), drafters=budgets(64), output_len=output_len, texts_per_cell=2, contexts=(1024, 2048))
    plan = planned(profile, Workload(context_len=context_len, output_len=output_len, sampler=GREEDY))
    assert plan.chosen.draft_len == best
    assert plan.estimate.tpot_s.value == pytest.approx(by_hand[best], rel=0.02)


def test_the_choice_is_the_best_of_what_is_listed():
    plan = planned(made_profile())
    values = [plan.estimate.tpot_s.value, *(estimate.tpot_s.value for estimate in plan.runners_up)]
    assert values == sorted(values) and plan.estimate.tpot_s.value <= plan.baseline.tpot_s.value
    assert plan.num_candidates == 1 + 2 * 4
    assert plan.speedup == plan.estimate.speedup


def test_a_smaller_budget_of_the_same_acceptance_is_chosen_for_being_faster():
    assert planned(made_profile(drafters=budgets(64, 256))).chosen.kv == SparseKV(budget=64)


def test_a_larger_budget_is_chosen_where_it_is_accepted_far_more():
    def accept(kv, context_len, number):
        return 4 * FIFTH if kv.budget == 256 else 1 * FIFTH

    assert planned(made_profile(accept=accept)).chosen.kv == SparseKV(budget=256)


def test_objectives_can_disagree():
    """A drafter that starts slowly but drafts well: best per token, worse per request."""
    profile = made_profile(drafters=budgets(64))
    slow = [msgspec.structs.replace(s, start_s=[60.0]) if s.drafter == SELF_SPARSE else s for s in profile.rounds]
    profile = msgspec.structs.replace(profile, rounds=slow)
    assert planned(profile, objective="tpot").chosen.drafter == SELF_SPARSE
    plan = planned(profile, objective="e2e")
    assert plan.chosen == PLAIN and plan.objective == "e2e"


def test_the_cheapest_is_chosen_by_price_with_ties_and_runners_up():
    profile = made_profile(noise=0.03)
    plan, e2e = planned(profile, objective="price", price=3.0), planned(profile, objective="e2e", price=3.0)
    assert plan.objective == "price" and plan.price_per_hour == 3.0
    prices = [estimate.price_per_million_tokens.value for estimate in [plan.estimate, *plan.runners_up]]
    assert prices == sorted(prices) and prices[0] <= plan.baseline.price_per_million_tokens.value
    assert plan.speedup.value == pytest.approx(plan.baseline.price_per_million_tokens.value / prices[0])
    assert (plan.chosen, [e.config for e in plan.runners_up]) == (e2e.chosen, [e.config for e in e2e.runners_up])  # one stream
    assert plan.ties and [tie.config for tie in plan.ties] == [tie.config for tie in e2e.ties]
    for tie, same in zip(plan.ties, e2e.ties, strict=True):
        assert tie.difference.value == pytest.approx(same.difference.value)


def test_in_a_batch_a_slow_start_weighs_more_in_the_price_than_in_the_time_of_a_request():
    """A start of its own for each request, and rounds for all: 50 ms are won back by one request's rounds, not by an eighth of them."""
    profile = made_profile(batches={1: linear_round_s, 8: linear_round_s}, drafters=budgets(64))
    slow = [msgspec.structs.replace(s, start_s=[0.05]) if s.drafter == SELF_SPARSE else s for s in profile.rounds]
    profile = msgspec.structs.replace(profile, rounds=slow)
    batch = msgspec.structs.replace(WORKLOAD, batch=8)
    assert planned(profile, batch, objective="e2e").chosen.drafter == SELF_SPARSE
    assert planned(profile, batch, objective="price", price=1.0).chosen == PLAIN


# Memory caps


def test_a_cap_refuses_with_the_largest_budget_that_fits_and_that_one_really_does():
    profile = made_profile(drafters=budgets(64, 256, 1024))
    cap = needed(profile, sparse(2, 700))
    plan = planned(profile, cap=cap)
    refused = {reject.config: reject.reason for reject in plan.rejected}
    assert set(refused) == {sparse(k, 1024) for k in (1, 2, 3, 4)}
    for config, reason in refused.items():
        largest = int(re.search(r"largest kv_budget that fits is (\d+)", reason)[1])
        assert needed(profile, sparse(config.draft_len, largest)) <= cap < needed(profile, sparse(config.draft_len, largest + 1))
    assert plan.memory_cap_bytes == cap and needed(profile, plan.chosen) <= cap


def test_a_choice_under_a_cap_is_the_best_of_those_that_fit():
    def accept(kv, context_len, number):
        return 4 * FIFTH if kv.budget == 256 else 2 * FIFTH

    profile = made_profile(accept=accept)
    assert planned(profile).chosen.kv.budget == 256
    tight = planned(profile, cap=needed(profile, sparse(1, 256)) - 1)
    assert all(reject.config.kv.budget == 256 for reject in tight.rejected)
    assert tight.chosen == PLAIN or tight.chosen.kv.budget == 64


def test_a_cap_that_nothing_fits_under_is_bad_input():
    profile = made_profile()
    with pytest.raises(BadInput, match="plain decoding alone needs .* raise --memory-cap"):
        planned(profile, cap=needed(profile, PLAIN) - 1)


@pytest.mark.parametrize("drafters", [budgets(64), [*budgets(64), (NGRAM, FullKV())]], ids=["one budget", "and n-gram"])
def test_a_cap_that_only_plain_decoding_fits_under_chooses_it(drafters):
    profile = made_profile(drafters=drafters)
    plan = planned(profile, cap=needed(profile, PLAIN))
    assert plan.chosen == PLAIN and plan.best_speculative is None


def test_a_cap_that_everything_fits_under_refuses_nothing():
    assert planned(made_profile(), cap=2**40).rejected == []


def test_a_refusal_shows_two_different_sizes():
    profile = made_profile(drafters=budgets(64, 1024))
    reason = planned(profile, cap=needed(profile, sparse(2, 256))).rejected[0].reason
    size, cap = re.match(r"needs ([\d.]+ \w+) of ([\d.]+ \w+)", reason).groups()
    assert size != cap


# Workloads outside of the profile


@pytest.mark.parametrize(
    "change", [{"context_len": 512}, {"context_len": 5000}, {"sampler": WARM}, {"sampler": Sampler(temperature=0.5)}, {"context_len": 4080}], ids=str
)
def test_a_workload_outside_the_profile_is_bad_input(change):
    with pytest.raises(BadInput):
        planned(made_profile(), msgspec.structs.replace(WORKLOAD, **change))


def test_a_workload_between_contexts_lies_between_them():
    profile = made_profile(contexts=(1024, 2048))
    low, middle, high = (
        planned(profile, Workload(context_len=c, output_len=33, sampler=GREEDY)).baseline.tpot_s.value for c in (1024, 1536, 2048)
    )  # fmt: skip
    assert middle == pytest.approx((low + high) / 2, rel=1e-6)


# Ties


def test_a_configuration_with_identical_numbers_is_a_tie():
    profile = made_profile(drafters=[*budgets(64), CHUNK], noise=0.005, rounds_per_cell=12, accept=lambda kv, c, number: (2 + number % 3) * FIFTH)
    timed = [s for s in profile.rounds if s.kv != CHUNK[1]]  # one selection stands for both
    plan = planned(msgspec.structs.replace(profile, rounds=timed))
    twin = next(tie for tie in plan.ties if tie.config.draft_len == plan.chosen.draft_len and tie.config.kv != plan.chosen.kv)
    assert twin.difference.value == pytest.approx(0) and twin.difference.low <= 0 <= twin.difference.high
    assert twin.cost_of_being_wrong >= 0 and twin.settle


def test_a_clearly_worse_configuration_is_no_tie():
    def accept(kv, context_len, number):
        return (0.75 + 0.01 * (number % 3)) if kv.budget == 64 else 0.05

    plan = planned(made_profile(accept=accept, noise=0.003, rounds_per_cell=12))
    assert plan.chosen.kv.budget == 64
    assert not [describe(tie.config) for tie in plan.ties if tie.config != PLAIN and tie.config.kv.budget == 256]
    assert PLAIN not in [tie.config for tie in plan.ties]


def test_the_cost_of_being_wrong_is_what_the_choice_could_lose():
    plan = planned(made_profile(noise=0.1, accept=lambda kv, c, number: (1 + number % 4) * FIFTH))
    assert plan.ties
    for tie in plan.ties:
        assert tie.difference.low <= 0
        assert tie.cost_of_being_wrong == pytest.approx(1 / (1 + tie.difference.low) - 1)


# The line to paste


def parsed(line: str) -> dict:
    """What the real command line makes of it."""
    from typer.main import get_command

    from planner.cli import app

    program, verb, *words = shlex.split(line)
    assert program == "planner"
    return get_command(app).commands[verb].make_context(verb, words).params


@pytest.mark.parametrize(
    ("drafters", "sampler"),
    [
        (budgets(64), GREEDY),
        ([CHUNK], Sampler(temperature=0.7, top_p=0.95, top_k=40)),
        ([(SELF_SPARSE, SparseKV(budget=96, sink=8, recent=16))], WARM),
        ([(SELF_SPARSE, SparseKV(budget=96, selection="snapkv", refresh=16))], GREEDY),
        ([(NGRAM, FullKV())], GREEDY),
        ([(DRAFT_MODEL, FullKV())], GREEDY),
        ([(DRAFT_MODEL, SparseKV(budget=96, storage="evict"))], GREEDY),
        ([(DRAFT_MODEL, SparseKV(budget=96))], GREEDY),
        ([(replace(DRAFT_MODEL, dtype="float16", weights="int8"), SparseKV(budget=96, selection="retrieval", refresh=16))], GREEDY),
    ],
    ids=["window", "chunk", "sinks", "refresh", "ngram", "draft model", "evict", "retain", "draft model refresh"],
)
@pytest.mark.parametrize("accept", [0.0, 4 * FIFTH], ids=["off", "on"])
def test_the_command_of_a_plan_parses_to_its_choice(drafters, sampler, accept):
    workload = Workload(context_len=1024, output_len=33, sampler=sampler)
    plan = planned(made_profile(drafters=drafters, samplers=[sampler], accept=always(accept)), workload)
    assert (plan.chosen == PLAIN) == (accept == 0)
    flags = parsed(plan.command)
    config = make_config(Asked(**{name: flags[name] for name in Asked._fields}))
    assert config == plan.chosen
    assert Sampler(temperature=flags["temperature"], top_p=flags["top_p"], top_k=flags["top_k"]) == sampler
    assert flags["max_new_tokens"] == 33 and flags["model"] == plan.model


def test_a_model_path_with_a_space_survives_the_shell():
    assert parsed(planned(made_profile(model="my models/a b.gguf")).command)["model"] == "my models/a b.gguf"


def test_the_command_runs_the_dtype_that_was_profiled():
    assert parsed(planned(made_profile(dtype="float32")).command)["dtype"] == "float32"


def test_the_command_and_the_plan_open_the_model_as_the_profile_did():
    plan = planned(made_profile(rope_theta=205_000.5, max_context_len=16_384))
    assert (plan.rope_theta, plan.max_context_len) == (205_000.5, 16_384)
    assert (parsed(plan.command)["rope_theta"], parsed(plan.command)["max_context"]) == (205_000.5, 16_384)
    usual = planned(made_profile())
    assert (usual.rope_theta, usual.max_context_len) == (None, None)
    assert "--rope-theta" not in usual.command and "--max-context" not in usual.command


def test_the_command_keeps_every_digit_of_a_temperature():
    sampler = Sampler(temperature=0.12345678)
    plan = planned(made_profile(samplers=[sampler]), Workload(context_len=1024, output_len=33, sampler=sampler))
    assert parsed(plan.command)["temperature"] == sampler.temperature
