"""The whole way from a log to its report, on a tiny model: two roads to one number, and what a foreign log looks like."""

import json

import msgspec
import numpy as np
import pytest
import torch
from letters import LetterTokenizer
from made import DRAFT_MODEL, budgets, made_profile
from tiny import prefilled, random_prompt, tiny_model

from planner.commands.progress import Silent
from planner.commands.replay import run_replay
from planner.commands.session import Session
from planner.cost.renewal import expected_rounds
from planner.errors import BadInput
from planner.measurements import load_profile, save_profile
from planner.profiler.acceptance import replay as stored_replay
from planner.profiler.acceptance import write_texts
from planner.profiler.served import read_log
from planner.profiler.texts import Prompt
from planner.replays import ServedReplay, save_replay
from planner.runtime.model import prefill
from planner.runtime.ranks import Ranks
from planner.specs import DraftConfig, DrafterSpec, Sampler, SparseKV

K = 3
GREEDY, WARM, CUT = Sampler(), Sampler(temperature=0.8), Sampler(temperature=1.0, top_k=3)
CONFIGS = [
    DraftConfig(drafter=DrafterSpec(kind="self_sparse"), kv=SparseKV(budget=12, sink=2, recent=4), draft_len=K),
    DraftConfig(drafter=DrafterSpec(kind="self_sparse"), kv=SparseKV(budget=64, sink=2, recent=4), draft_len=K),
    DraftConfig(drafter=DrafterSpec(kind="ngram"), draft_len=K),
]  # fmt: skip
LENGTHS = [(30, 12), (41, 9), (25, 20), (60, 7), (33, 3)]  # of prompts and outputs


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=5, sharpness=1.1, max_context_len=100)


@pytest.fixture(scope="module")
def session(model):
    return Session(
        model=model, target=model.spec, ranks=Ranks(), tokenizer=LetterTokenizer(), base_bytes=0, weights="full", rope_theta=None,
        max_context_len=None, warnings=[],
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(model):
    """Texts of the model's own by sampler, as the profiler writes them."""
    found = {}
    for sampler in (GREEDY, WARM, CUT):
        found[sampler] = []
        for seed, (length, output_len) in enumerate(LENGTHS):
            prompt = random_prompt(length, seed=seed)
            cache = model.new_cache(length + output_len)
            logits = prefill(model, torch.tensor([prompt]), cache)
            (text,) = write_texts(
                model, cache, [Prompt("kind", "source", 0, length, prompt)], length, logits, sampler, output_len=output_len, stop_tokens=(),
                seeds=[seed],
            )  # fmt: skip
            found[sampler].append(text.target_text)
    return found


def logged(path, texts, **changes):
    lines = [
        {
            "prompt_tokens": text.prompt, "output_tokens": text.tokens, "temperature": text.sampler.temperature, "top_k": text.sampler.top_k, **changes
        }
        for text in texts
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(session, log, configs=CONFIGS, num_texts=64, default_sampler=None, costs_from=0.1, progress=Silent()) -> ServedReplay:
    served = read_log(log, default_sampler)
    return run_replay("tiny", session, served, configs=configs, num_texts=num_texts, costs_from=costs_from, seed=0, progress=progress)


@pytest.mark.parametrize("sampler", [GREEDY, WARM, CUT], ids=str)
def test_a_log_of_the_models_own_texts_gives_what_a_profile_stores(session, written, sampler, tmp_path):
    found = run(session, logged(tmp_path / "log.jsonl", written[sampler]))
    expected = [stored_replay(session.model, text, config, i) for i, text in enumerate(written[sampler]) for config in CONFIGS]
    assert found.acceptance == expected  # byte for byte
    assert [text.impossible for text in found.texts] == [0] * len(LENGTHS) and found.groups[0].impossible == 0
    assert [(text.line, text.context_len, text.output_len) for text in found.texts] == [(i + 1, *shape) for i, shape in enumerate(LENGTHS)]
    assert not found.warnings or all("repeat" in warning for warning in found.warnings)


def test_tokens_per_round_are_those_of_the_walk_pooled_over_lines(session, written, tmp_path):
    (group,) = run(session, logged(tmp_path / "log.jsonl", written[WARM])).groups
    assert (group.num_texts, group.num_tokens, group.samplers) == (len(LENGTHS), sum(n for _, n in LENGTHS), [WARM])
    for config, drafter in zip(CONFIGS, group.drafters, strict=True):
        assert (drafter.drafter, drafter.kv, [length.draft_len for length in drafter.lengths]) == (config.drafter, config.kv, [1, 2, 3])
        samples = [stored_replay(session.model, text, config, 0) for text in written[WARM]]
        for length in drafter.lengths:
            walks = [expected_rounds(s.accept_prob.unpack()[None] / 255, s.drafted.unpack()[None].astype(int), length.draft_len) for s in samples]
            rounds = sum(walk.rounds[0] for walk in walks)
            drafted = sum(walk.by_drafted[0] @ np.arange(length.draft_len + 1) for walk in walks)
            tokens = group.num_tokens - group.num_texts
            assert length.tokens_per_round.value == pytest.approx(tokens / rounds)
            assert length.cost.value == pytest.approx((rounds + 0.1 * drafted) / tokens)
            assert length.acceptance_rate.value == pytest.approx((tokens - rounds) / drafted)
            assert 1 <= length.tokens_per_round.low <= length.tokens_per_round.value <= length.tokens_per_round.high <= length.draft_len + 1
    assert group.drafters[group.best].headroom.fixed.value == min(drafter.headroom.fixed.value for drafter in group.drafters)


def test_nothing_costs_less_than_the_oracle_and_off_is_among_the_fixed(session, written, tmp_path):
    log = logged(tmp_path / "log.jsonl", written[WARM])
    for draft_cost in (0.0, 0.1, 5.0):
        for drafter in run(session, log, costs_from=draft_cost).groups[0].drafters:
            room = drafter.headroom
            assert room.oracle.value <= min(room.fixed.value, room.adaptive.value) + 1e-12
            assert room.fixed.value == pytest.approx(min([1.0, *(length.cost.value for length in drafter.lengths)]))
            assert room.oracle_over_fixed.value == pytest.approx(room.oracle.value / room.fixed.value - 1)
            assert room.adaptive_over_fixed.value == pytest.approx(room.adaptive.value / room.fixed.value - 1)
            if draft_cost == 5.0:
                assert (room.draft_len, room.fixed.value, room.oracle.value) == (0, 1.0, 1.0)


def test_samplers_get_groups_of_their_own_beside_the_mixture(session, written, tmp_path):
    texts = [*written[GREEDY], *written[WARM], *written[CUT][:2]]
    found = run(session, logged(tmp_path / "log.jsonl", texts))
    assert [group.num_texts for group in found.groups] == [12, 5, 5]
    assert set(found.groups[0].samplers) == {GREEDY, WARM, CUT} and {group.samplers[0] for group in found.groups[1:]} == {GREEDY, WARM}
    assert any("1 of 3 samplers have fewer than 4 lines" in warning for warning in found.warnings)
    alone = run(session, logged(tmp_path / "alone.jsonl", written[WARM]))
    assert next(group for group in found.groups[1:] if group.samplers == [WARM]) == alone.groups[0]


@pytest.mark.parametrize("claimed", [{"temperature": 0}, {"temperature": 1.0, "top_k": 1}], ids=str)
def test_a_log_of_another_sampler_is_found_out(session, written, claimed, tmp_path):
    """What was sampled is no argmax; every token that is not is counted, the first one too."""
    found = run(session, logged(tmp_path / "log.jsonl", written[WARM], **claimed))
    model, strange = session.model, 0
    for text in written[WARM]:
        for end in range(len(text.tokens)):
            _, logits = prefilled(model, [text.prompt + text.tokens[:end]], 120)
            strange += int(logits[0].argmax()) != text.tokens[end]
    assert found.groups[0].impossible == strange > 0.05 * found.groups[0].num_tokens
    assert any("does not seem to be of this model" in warning for warning in found.warnings)


def test_text_is_replayed_as_its_tokens_are(session, written, tmp_path):
    by_ids = run(session, logged(tmp_path / "ids.jsonl", written[WARM]))
    lines = [{"prompt": "".join(map(chr, text.prompt)), "output": "".join(map(chr, text.tokens))} for text in written[WARM]]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    by_text = run(session, tmp_path / "text.jsonl", default_sampler=WARM)
    assert by_text.acceptance == by_ids.acceptance and by_text.groups == by_ids.groups


def test_long_outputs_are_judged_in_passes_that_change_nothing(session, written, tmp_path, monkeypatch):
    log = logged(tmp_path / "log.jsonl", written[WARM])
    whole = run(session, log)
    monkeypatch.setattr("planner.profiler.acceptance.PREFILL_CHUNK", 4)
    parts = run(session, log)
    for a, b in zip(whole.acceptance, parts.acceptance, strict=True):
        assert np.abs(a.accept_prob.unpack().astype(int) - b.accept_prob.unpack()).max() <= 1


def timed_profile(path, **changes):
    """Rounds of self_sparse at budget 64: 10 ms to verify, 1 ms for each token more, 4 ms to draft one."""
    options = {"drafters": budgets(64), "contexts": (30, 40), "draft_lens": (1, 2, 3), "max_draft_len": K, "output_len": 9} | changes
    save_profile(made_profile(round_s=lambda kv, k, context_len: (4e-3 * k, 10e-3 + 1e-3 * k, 0.0), **options), path)
    return path


def test_with_a_profile_costs_are_its_seconds(session, written, tmp_path):
    profile, log = timed_profile(tmp_path / "profile.json"), logged(tmp_path / "log.jsonl", written[WARM])
    (drafter,) = run(session, log, CONFIGS[1:2], costs_from=profile).groups[0].drafters
    (in_units,) = run(session, log, CONFIGS[1:2], costs_from=0.5).groups[0].drafters
    for seconds, units in zip(drafter.lengths, in_units.lengths, strict=True):
        assert seconds.cost.value == pytest.approx(10e-3 * units.cost.value, rel=0.01)
    assert drafter.headroom.oracle.value == pytest.approx(10e-3 * in_units.headroom.oracle.value, rel=0.01)
    found = run(session, log, CONFIGS[1:2], costs_from=profile)
    assert found.groups[0].plain_cost == pytest.approx(10e-3, rel=0.01)
    assert any("2 of 5 lines have prompts outside the profiled contexts (30, 40)" in warning for warning in found.warnings)


class Refuses:
    """A session whose model must not run."""

    def __init__(self, session):
        self.spec, self.fingerprint, self.device = session.model.spec, session.model.fingerprint, session.model.device


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"configs": []}, "needs drafters"),
        ({"configs": [CONFIGS[0], DraftConfig(drafter=DrafterSpec(kind="ngram"), draft_len=2)]}, "one longest draft_len"),
        ({"num_texts": 3}, "at least 4 lines, got 3"),
        ({"costs_from": -0.5}, "draft_cost"),
        ({"costs_from": float("nan")}, "draft_cost"),
        ({"costs_from": "foreign.json", "configs": CONFIGS[1:2]}, "profile of the same model"),
        ({"costs_from": "timed.json"}, "timed no round of"),
        ({"costs_from": "missing.json"}, "cannot read the profile"),
    ],
)
def test_what_cannot_be_replayed_is_refused_before_the_model_runs(session, written, tmp_path, monkeypatch, changes, match):
    monkeypatch.chdir(tmp_path)
    timed_profile(tmp_path / "timed.json")
    timed_profile(tmp_path / "foreign.json", target_fingerprint="1" * 16)
    with pytest.raises(BadInput, match=match):
        run(session._replace(model=Refuses(session)), logged(tmp_path / "log.jsonl", written[WARM]), **changes)


def test_costs_are_those_of_the_draft_model_that_was_profiled(session, written, tmp_path):
    target = tiny_model(seed=5, sharpness=1.1, max_context_len=100)
    target.beside[DRAFT_MODEL.path, None] = tiny_model(num_layers=1, max_context_len=100)
    config, log = DraftConfig(drafter=DRAFT_MODEL, draft_len=K), logged(tmp_path / "log.jsonl", written[WARM])
    other = timed_profile(tmp_path / "other.json", drafters=[(DRAFT_MODEL, config.kv)])
    with pytest.raises(BadInput, match="small one was 1111.*this one is 0000"):
        run(session._replace(model=target), log, [config], costs_from=other)
    own = msgspec.structs.replace(load_profile(other).drafter_models[0], fingerprint="0" * 16)
    same = timed_profile(tmp_path / "same.json", drafters=[(DRAFT_MODEL, config.kv)], drafter_models=[own])
    assert run(session._replace(model=target), log, [config], costs_from=same).groups[0].drafters[0].drafter == DRAFT_MODEL


def test_a_log_with_too_few_lines_that_fit_says_why(session, written, tmp_path):
    long = [text._replace(prompt=text.prompt * 4) for text in written[WARM][:3]]
    with pytest.raises(BadInput, match=r"holds 2 that can be replayed \(3 prompt \+ output beyond the model's 100 tokens\)"):
        run(session, logged(tmp_path / "log.jsonl", [*long, *written[WARM][3:]]))


def test_a_replay_is_saved_whole_with_what_every_line_gave(session, written, tmp_path):
    class Listener(Silent):
        stages, done = {}, {}

        def stage(self, name, total):
            self.now, self.stages[name], self.done[name] = name, total, 0

        def advance(self, n=1):
            self.done[self.now] += n

    found = run(session, logged(tmp_path / "log.jsonl", written[WARM]), progress=Listener())
    assert Listener.done == Listener.stages == {"replay": 15, "rounds": 5, "headroom": 3}
    save_replay(found, tmp_path / "replay.json")
    assert msgspec.json.decode((tmp_path / "replay.json").read_bytes(), type=ServedReplay) == found
    assert found.environment.date and found.seed == 0 and len(found.acceptance) == len(found.texts) * len(CONFIGS)
