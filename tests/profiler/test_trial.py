"""Prompts decoded side by side: lossless stream by stream, and each stream charged for its own rounds."""

import math

import pytest
import torch
from made import NGRAM, SELF_SPARSE
from tiny import random_prompt, tiny_model

from planner.cost.memory import full_cache_bytes
from planner.profiler import trial
from planner.profiler.texts import Prompt
from planner.profiler.trial import run_trials
from planner.runtime.decode import cache_capacity
from planner.runtime.drafters import make_drafter
from planner.specs import PLAIN, DraftConfig, Sampler, SparseKV

GREEDY, WARM = Sampler(), Sampler(temperature=0.8, top_p=0.9, top_k=20)
WINDOW = DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=20, sink=4, recent=8), draft_len=3)
CHUNK = DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=24, recent=9, selection="chunk"), draft_len=2)
LOOKUP = DraftConfig(drafter=NGRAM, draft_len=5)
OUTPUT = 24


def prompts(count: int, length: int = 50) -> list[Prompt]:
    return [Prompt("prose", "made.txt", 1000 * i, length, random_prompt(length, seed=i)) for i in range(count)]


@pytest.fixture(scope="module")
def model():
    return tiny_model(sharpness=1.5)


@pytest.fixture
def run(model, monkeypatch):
    """Trials by (text, arm), and the tokens that each of them wrote."""

    def call(group, arms, *, batch, sampler=GREEDY, stop_tokens=(), seed=0):
        written, real = [], trial.decode

        def spy(model, cache, histories, *rest, **named):
            texts = [[] for _ in histories]
            written.append(texts)
            for round_ in real(model, cache, histories, *rest, **named):
                for text, tokens in zip(texts, round_.tokens, strict=True):
                    text += tokens
                yield round_

        monkeypatch.setattr(trial, "decode", spy)
        trials = list(run_trials(model, group, arms, sampler, output_len=OUTPUT, stop_tokens=stop_tokens, seed=seed, batch=batch, warm=False))
        monkeypatch.setattr(trial, "decode", real)
        texts = [text for group in written for text in group]
        return {(t.text, t.config): t for t in trials}, dict(zip([(t.text, t.config) for t in trials], texts, strict=True))

    return call


@pytest.mark.parametrize("batch", range(1, 9))
@pytest.mark.parametrize("lengths", ["one length", "ragged"])
def test_greedy_output_of_a_batch_is_plain_greedy_output_of_each_stream_alone(run, batch, lengths):
    group = prompts(batch)
    if lengths == "ragged":
        group = [prompt._replace(tokens=random_prompt(40 + 9 * i, seed=i)) for i, prompt in enumerate(group)]
    _, alone = run(group, [PLAIN], batch=1)
    trials, together = run(group, [PLAIN, WINDOW, CHUNK, LOOKUP], batch=batch)
    assert len(together) == 4 * batch
    for (text, config), tokens in together.items():
        assert tokens == alone[text, PLAIN], config
        assert trials[text, config].output_len == len(tokens) == OUTPUT
    assert {t.batch for t in trials.values()} == {batch}
    if batch > 3:  # or nothing is ragged here
        assert len({len(t.round_s) for t in trials.values() if t.config == WINDOW}) > 1


def test_a_test_of_losslessness_can_fail(run, monkeypatch):
    """Keeping one draft too many in the second stream alone is seen there, and there alone."""
    from planner.runtime import decode as decode_module

    real = decode_module.verify_chain

    def greedy_for_more(*arguments):
        verdict = real(*arguments)
        more = verdict.num_accepted.clone()
        more[1] = torch.minimum(more[1] + 1, arguments[2][1])
        return verdict._replace(num_accepted=more)

    group = prompts(3)
    _, alone = run(group, [PLAIN], batch=1)
    monkeypatch.setattr(decode_module, "verify_chain", greedy_for_more)
    _, together = run(group, [WINDOW], batch=3)
    assert [together[p.key, WINDOW] == alone[p.key, PLAIN] for p in group] == [True, False, True]


@pytest.mark.parametrize("config", [PLAIN, WINDOW, LOOKUP], ids=str)
def test_sampled_streams_draw_what_they_draw_alone(run, config):
    group = prompts(4)
    _, alone = run(group, [config], batch=1, sampler=WARM, seed=7)
    _, together = run(group, [config], batch=4, sampler=WARM, seed=7)
    assert together == alone


@pytest.mark.parametrize("config", [PLAIN, WINDOW, LOOKUP], ids=str)
def test_a_stream_pays_for_its_rounds_up_to_its_end(run, config):
    group = prompts(6)
    _, plain = run(group, [PLAIN], batch=6)
    stop = plain[group[2].key, PLAIN][5]  # ends some streams early
    trials, texts = run(group, [config], batch=6, stop_tokens=(stop,))
    longest = max(trials.values(), key=lambda t: len(t.round_s))
    assert len({len(t.round_s) for t in trials.values()}) > 1
    for key, found in trials.items():
        tokens, rounds = texts[key], len(found.round_s)
        expected = plain[key[0], PLAIN]
        assert tokens == (expected[: expected.index(stop) + 1] if stop in expected else expected)
        assert found.output_len == len(tokens)
        assert len(found.drafted) == len(found.accepted) == rounds
        assert sum(found.accepted) + rounds >= found.output_len - 1  # a stop token cuts a round
        assert found.round_s == longest.round_s[:rounds]  # the rounds of the batch are everybody's
        assert (found.decode_s == 0) == (rounds == 0)
        assert sum(found.round_s) <= found.decode_s * (1 + 1e-9)
        assert found.decode_s == pytest.approx(longest.decode_s * sum(found.round_s) / sum(longest.round_s))
        assert found.tpot_s == found.decode_s / max(1, found.output_len - 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_decode_is_charged_what_the_counter_moved_in_equal_shares(model, batch):
    class Counter:
        name, reads = "made", 0

        def read(self) -> float:
            self.reads += 1
            return 1000 + 12.0 * (self.reads // 2)  # 12 J between a reading and the next but one

    counter = Counter()
    found = list(
        run_trials(model, prompts(batch), [PLAIN, LOOKUP], GREEDY, output_len=4, stop_tokens=(), seed=0, batch=batch, warm=False, counter=counter)
    )
    assert counter.reads == 4  # before and after each arm
    for config in (PLAIN, LOOKUP):
        own = [t for t in found if t.config == config]
        shares = [sum(t.round_s) / max(sum(other.round_s) for other in own) for t in own]
        assert [t.decode_joules for t in own] == pytest.approx([12 * share / batch for share in shares])
    bare = run_trials(model, prompts(1), [PLAIN], GREEDY, output_len=4, stop_tokens=(), seed=0, warm=False)
    assert [t.decode_joules for t in bare] == [None]


def test_every_stream_has_a_prefill_of_its_own_and_its_share_of_the_start(run):
    trials, _ = run(prompts(4), [WINDOW], batch=4)
    assert len({t.prefill_s for t in trials.values()}) == 4
    assert len({t.start_s for t in trials.values()}) == 1
    assert all(t.e2e_s == t.prefill_s + t.start_s + t.decode_s for t in trials.values())


@pytest.mark.parametrize("config", [PLAIN, WINDOW, CHUNK, LOOKUP], ids=str)
def test_the_bytes_are_those_of_all_streams(run, model, config):
    trials, _ = run(prompts(3), [config], batch=3)
    capacity = cache_capacity(50, OUTPUT, config.draft_len)
    expected = full_cache_bytes(model.spec, "float32", capacity=capacity, batch=3) + make_drafter(config, model, batch=3).nbytes
    assert {t.cache_bytes for t in trials.values()} == {expected}


def test_groups_follow_each_other_and_begin_with_another_arm(model):
    arms = [PLAIN, WINDOW, LOOKUP]
    found = list(run_trials(model, prompts(6), arms, GREEDY, output_len=4, stop_tokens=(), seed=0, batch=2))
    assert [t.text for t in found[::2]] == [prompts(6)[i].key for i in (0, 0, 0, 2, 2, 2, 4, 4, 4)]
    assert [t.config for t in found[::2]] == [PLAIN, WINDOW, LOOKUP, WINDOW, LOOKUP, PLAIN, LOOKUP, PLAIN, WINDOW]


def test_a_group_that_is_known_in_part_runs_whole_and_yields_the_rest(model):
    group = prompts(4)
    known = {(group[0].key, PLAIN), (group[2].key, PLAIN), (group[3].key, PLAIN)}
    options = {"output_len": 4, "stop_tokens": (), "seed": 0, "batch": 2, "skip": known}
    found = list(run_trials(model, group, [PLAIN, LOOKUP], GREEDY, **options))
    keys = [(t.text, t.config) for t in found]
    assert len(keys) == len(set(keys)) == 5 and not set(keys) & known
    assert {t.batch for t in found} == {2}


def test_prompts_that_make_no_whole_groups_are_refused(model):
    with pytest.raises(ValueError, match="groups of 3, got 4"):
        next(run_trials(model, prompts(4), [PLAIN], GREEDY, output_len=4, stop_tokens=(), seed=0, batch=3))


def test_a_trial_survives_a_stream_that_ends_with_its_first_token(run):
    group = prompts(2)
    _, plain = run(group, [PLAIN], batch=1)
    first = plain[group[0].key, PLAIN][0]
    trials, _ = run(group, [WINDOW], batch=2, stop_tokens=(first,))
    assert trials[group[0].key, WINDOW].output_len == 1 and trials[group[0].key, WINDOW].decode_s == 0
    assert all(math.isfinite(t.tpot_s) for t in trials.values())
