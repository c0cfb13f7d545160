"""Defects are found in data that has them, and none is in data that has none, whatever the noise."""

import json

import numpy as np
import pytest
from fake_server import launched

from planner.canaries import Answer
from planner.engines.completions import Asked, Prompt
from planner.engines.http import Client
from planner.engines.load import run_load
from planner.exports import Step
from planner.schedules import Setting
from planner.search.defects import collapsed, find_defects
from planner.tunings import Counted, Launch, Pool, Run

OFF = Setting()
LOADS = (1, 4, 16, 64)
STAIRS = [Step(batch_from=1, batch_to=4, draft_len=4), Step(batch_from=5, batch_to=16, draft_len=2), Step(batch_from=17, batch_to=256, draft_len=0)]
LAUNCHES = [
    Launch(),
    Launch(drafter="eagle3", steps=[Step(batch_from=1, batch_to=256, draft_len=3)]),
    Launch(drafter="eagle3", steps=STAIRS),
]


def told(launch, load):
    steps = LAUNCHES[launch].steps
    return Setting(drafter="eagle3", draft_len=next(s.draft_len for s in steps if s.batch_to >= load)) if steps else OFF


def made(rng, launch, load, *, setting=None, drafts=None, times=1.0, gain=0.8, idle=0.01, waits=0.0, noise=0.01, prompts=24):
    """A run by a law; drafts: what is drafted in truth; times, idle: relative; waits: share of a request before its first token."""
    setting = told(launch, load) if setting is None else setting
    k = setting.draft_len if drafts is None else drafts
    gains = np.cumprod(np.broadcast_to(gain, k)) if k else np.zeros(0)
    tokens = load * (k + 1)
    round_s = 0.02 * (max(1 + 0.01 * tokens, 0.02 * tokens) + 0.08 * k) * (1 + idle * (setting.idle and not k)) * times
    round_s *= np.exp(noise * rng.standard_normal())
    answers = []
    for _ in range(max(prompts, load)):
        tpot_s = round_s / (1 + gains.sum()) * np.exp(0.1 * (k > 0) * rng.standard_normal() + 0.01 * rng.standard_normal())
        ttft_s = 0.05 + round_s * rng.random() + waits / (1 - waits) * 127 * tpot_s
        answers.append(
            Answer(
                ttft_s=ttft_s,
                decode_s=127 * tpot_s,
                output_tokens=128,
                prompt_tokens=200,
                chunks=max(2, round(127 / (1 + gains.sum()))),
                longest_gap_s=1.0,
            )
        )
    rounds = round(127 * len(answers) / (1 + gains.sum()))
    survived, alive = [], rounds
    for share in np.broadcast_to(gain, k):
        alive = int(rng.binomial(alive, share))
        survived.append(float(alive))
    counted = Counted(tokens=rounds + sum(survived), drafts=rounds if k else 0, drafted=rounds * k, accepted=sum(survived), survived=survived)
    return Run(launch=launch, setting=setting, concurrency=load, answers=answers, wall_s=1.0, sent=len(answers) + load, counted=counted)


def all_of(rng, **changed):
    """Every launch at every load; `changed` maps (launch, load), as l1_c16, to what is made otherwise there."""
    return [made(rng, launch, load, **changed.get(f"l{launch}_c{load}", {})) for launch in range(3) for load in LOADS]


def names(defects):
    return [defect.name for defect in defects]


def test_an_engine_that_does_as_it_is_told_has_no_defect():
    for seed in range(100):
        rng = np.random.default_rng(seed)
        found = find_defects(all_of(rng), LAUNCHES, engine="vllm")
        assert not found, (seed, found)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("changed", "name", "says"),
    [
        (
            {"l2_c16": {"drafts": 4}, "l2_c64": {"drafts": 4}},
            "draft_len ignored",
            "told 2 at concurrency 16 it drafts 4 tokens; told 0 at concurrency 64",
        ),
        ({"l1_c4": {"drafts": 0}}, "draft_len ignored", "told 3 at concurrency 4 it drafts nothing"),
        ({"l1_c4": {"drafts": 2}}, "draft_len ignored", "told 3 at concurrency 4 it drafts 2 tokens"),
        ({"l2_c64": {"idle": 0.15}}, "idle drafter", "at concurrency 64"),
        ({"l2_c64": {"times": 3.0}}, "collapse", "at concurrency 64 eagle3 at 0 under a schedule takes"),
        ({"l1_c64": {"waits": 0.3}}, "starved", "of 64 requests in the system 4"),
    ],
)
def test_each_defect_is_found_alone(changed, name, says, seed):
    defects = find_defects(all_of(np.random.default_rng(seed), **changed), LAUNCHES, engine="vllm")
    assert names(defects) == [name]
    assert says in defects[0].what and defects[0].remedy


def test_an_idle_drafter_is_priced_by_its_interval():
    rng = np.random.default_rng(0)
    runs = [made(rng, 0, load, setting=OFF) for load in LOADS] + [made(rng, 2, load, setting=Setting(drafter="eagle3"), idle=0.12) for load in LOADS]
    launches = [LAUNCHES[0], LAUNCHES[0], Launch(drafter="eagle3", steps=[Step(batch_from=1, batch_to=64, draft_len=0)])]
    (defect,) = find_defects(runs, launches)
    low, high = (float(x) for x in defect.what.split("[")[1].split("]")[0].split(","))
    assert low < 12 < high < 20 and "1, 4, 16, 64" in defect.what


def test_a_length_beside_an_edge_may_be_that_of_the_step_below():
    """Of 17 requests one is being prefilled half of the time: half of the rounds draft as a batch of 16 is told."""
    rng = np.random.default_rng(0)
    run = made(rng, 2, 17, drafts=1)
    assert run.setting.draft_len == 0 and not find_defects([run], LAUNCHES)


def test_what_is_drafted_by_a_method_that_finds_its_drafts_is_told_by_more_alone():
    rng = np.random.default_rng(0)
    launches = [Launch(drafter="ngram", steps=[Step(batch_from=1, batch_to=256, draft_len=4)])]
    for drafts, found in ((1, []), (0, []), (6, ["draft_len ignored"])):
        run = made(rng, 0, 4, setting=Setting(drafter="ngram", draft_len=4), drafts=drafts)
        assert names(find_defects([run], launches)) == found


def test_tokens_per_round_show_it_where_drafts_are_not_counted():
    rng = np.random.default_rng(0)
    launches = [Launch(drafter="eagle", steps=[Step(batch_from=1, batch_to=64, draft_len=1)])]
    for per_round, found in ((1.8, []), (3.4, ["draft_len ignored"])):
        run = made(rng, 0, 4, setting=Setting(drafter="eagle", draft_len=1))
        counted = Counted(tokens=3000, accepted=3000 - 3000 / per_round)
        run = Run(launch=0, setting=run.setting, concurrency=4, answers=run.answers, wall_s=1.0, sent=24, counted=counted)
        (*defects,) = find_defects([run], launches, engine="sglang")
        assert names(defects) == found
        assert not found or "emits 3.4 tokens a round" in defects[0].what


@pytest.mark.parametrize(("gain", "says"), [((0.0, 0.0, 0.0), "none is accepted"), ((0.8, 0.7, 0.0), "draft 3 of eagle3 is never accepted")])
def test_a_position_that_is_never_accepted_is_named(gain, says):
    runs = all_of(np.random.default_rng(0), **{f"l1_c{load}": {"gain": gain} for load in LOADS})
    (defect,) = [own for own in find_defects(runs[4:8], LAUNCHES, engine="vllm")]
    assert defect.name == "never accepted" and says in defect.what and "max_model_len" in defect.known_as
    few = [made(np.random.default_rng(0), 1, 1, gain=(0.02, 0.0, 0.0), prompts=1)]
    assert "never accepted" not in names(find_defects(few, LAUNCHES)), "seldom tried is not never accepted"


def test_a_collapse_is_told_from_a_load_that_is_dear_by_nature():
    """By the law a token at 64 takes twice that at 16; at 3 times as much it is the server's doing, whatever speaks: larger loads, smaller ones."""
    for speaks in ([64], [128], [32]):
        for times, found in ((1.0, []), (3.0, [0])):
            rng = np.random.default_rng(1)
            runs = [made(rng, 2, 64, times=times), *(made(rng, 0, load) for load in speaks)]
            assert list(collapsed(runs, LAUNCHES)) == found, (speaks, times)
    alone = [made(np.random.default_rng(1), 2, 16, times=3.0)]
    assert not collapsed(alone, LAUNCHES), "nothing speaks"
    assert list(collapsed(alone, LAUNCHES, lambda run: run.tpot_s / 3)) == [0]


def test_a_starved_load_names_the_memory_that_starves_it():
    rng = np.random.default_rng(0)
    launches = [Launch(pool=Pool(tokens=16 * 328))]
    runs = [made(rng, 0, 4), made(rng, 0, 32, waits=0.5)]
    (defect,) = find_defects(runs, launches, engine="sglang")
    assert "of 32 requests" in defect.what and "holds 16 requests of 328" in defect.what and "48 requests" in defect.known_as
    assert "--max-running-requests" in defect.remedy


def test_each_warning_of_the_engine_is_said_once():
    launches = [Launch(warnings=["adaptive is disabled"]), Launch(warnings=["adaptive is disabled", "no effect"])]
    assert [defect.what for defect in find_defects([], launches)] == ["the engine says: adaptive is disabled", "the engine says: no effect"]


@pytest.mark.parametrize(
    ("switch", "found"),
    [("gain=0.8", []), ("ignore-schedule", ["draft_len ignored"]), ("never=0", ["never accepted"]), ("collapse=5", ["collapse"])],
)
def test_a_server_with_a_defect_is_found_out(switch, found):
    steps, runs = [(1, 2, 3), (3, 64, 0)], []
    config = {"method": "eagle3", "model": "d", "num_speculative_tokens": 3, "num_speculative_tokens_per_batch_size": steps}
    launches = [Launch(), Launch(drafter="eagle3", steps=[Step(batch_from=a, batch_to=b, draft_len=k) for a, b, k in steps])]
    prompts = [Prompt(text=f"prompt {i} " * 40) for i in range(8)]
    for launch, words in enumerate(([], ["--speculative-config", json.dumps(config)])):
        with launched("serve", "m", *words, "--fake", switch, "--fake", "step=0.003") as url:
            for load, setting in ((1, Setting(drafter="eagle3", draft_len=3)), (8, Setting(drafter="eagle3"))):
                own = run_load(Client(url), Asked("m", 48, 1.0), prompts, concurrency=load, metrics=True, total_s=20.0)
                runs.append(
                    Run(
                        launch=launch, setting=setting if launch else OFF, concurrency=load, answers=own.answers, wall_s=own.wall_s, sent=own.sent,
                        counted=own.counted,
                    )
                )  # fmt: skip
    # a machine that others use may slow one launch and not the next, which looks like an idle drafter
    assert [name for name in names(find_defects(runs, launches, engine="vllm")) if name != "idle drafter"] == found
