"""One value's journey: kv_budget, from the flag to the bytes."""

import shlex
import sys

import pytest
import torch
from made import GREEDY, NGRAM, SELF_SPARSE, made_profile
from msgspec.structs import replace
from tiny import prefilled, random_prompt, tiny_model

import planner
from planner.cli import main
from planner.commands.generate import Piece
from planner.commands.profile_settings import drafts, latency_cells
from planner.cost.memory import counted_bytes
from planner.measurements import save_profile
from planner.plans import load_plan
from planner.profiler.acceptance import write_texts
from planner.profiler.texts import Prompt
from planner.runtime.decode import cache_capacity, decode
from planner.runtime.drafters import make_drafter, self_sparse
from planner.runtime.drafters.self_sparse import SelfSparseDrafter
from planner.runtime.kv_cache import SparseKVCache
from planner.specs import NO_DRAFTER, DraftConfig, DrafterSpec, FullKV, SparseKV, Workload

BUDGET, DRAFT_LEN, CONTEXT, OUTPUT = 45, 3, 96, 20
CONFIG = DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=BUDGET), draft_len=DRAFT_LEN)


@pytest.fixture
def run(monkeypatch):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["planner", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code

    return call


@pytest.fixture(scope="module")
def model():
    return tiny_model(max_context_len=4096)


def test_the_flag_of_generate_becomes_a_policy(run, monkeypatch):
    seen = []

    def generate(model, prompt, *, config, **rest):
        seen.append(config)
        return iter([Piece("a", [1], 0, 0), Piece("", [], 0, 0)])

    monkeypatch.setattr(planner, "generate", generate, raising=False)
    run("generate", "--prompt", "x", "--drafter", "self_sparse", "--kv-budget", BUDGET, "--draft-len", DRAFT_LEN, "--quiet")
    assert seen == [CONFIG]


def test_the_flag_of_profile_becomes_policies(run, monkeypatch, tmp_path):
    seen = []

    def profile(model, dataset, *, settings, **rest):
        seen.extend(settings.policies)
        return made_profile()

    monkeypatch.setattr(planner, "profile", profile, raising=False)
    run("profile", "--dataset", "x.txt", "-o", tmp_path / "p.json", "--kv-budgets", f"{BUDGET},64,64", "--selections", "window", "--quiet")
    assert seen == [SparseKV(budget=BUDGET), SparseKV(budget=64)]


def test_the_flags_of_generate_name_a_draft_model(run, monkeypatch):
    seen = []

    def generate(model, prompt, *, config, **rest):
        seen.append(config)
        return iter([Piece("a", [1], 0, 0), Piece("", [], 0, 0)])

    monkeypatch.setattr(planner, "generate", generate, raising=False)
    words = ["generate", "--prompt", "x", "--drafter", "draft_model", "--draft-model", "a/small one", "--draft-len", DRAFT_LEN, "--quiet"]
    run(*words)
    run(*words, "--kv-budget", BUDGET, "--draft-dtype", "float16")
    run(*words, "--kv-budget", BUDGET, "--selection", "retrieval", "--refresh", 16, "--drafter-weights", "int8")
    own = DrafterSpec(kind="draft_model", path="a/small one")
    kvs = [FullKV(), SparseKV(budget=BUDGET, storage="evict"), SparseKV(budget=BUDGET, selection="retrieval", refresh=16)]
    drafters = [own, replace(own, dtype="float16"), replace(own, weights="int8")]
    assert seen == [DraftConfig(drafter=drafter, kv=kv, draft_len=DRAFT_LEN) for drafter, kv in zip(drafters, kvs, strict=True)]


def test_the_flags_of_profile_name_draft_models_and_heads(run, monkeypatch, tmp_path):
    seen = []

    def profile(model, dataset, *, settings, **rest):
        seen.append(settings)
        return made_profile()

    monkeypatch.setattr(planner, "profile", profile, raising=False)
    head = tmp_path / "head"
    head.mkdir()
    (head / "config.json").write_text('{"architectures": ["LlamaForCausalLMEagle3"]}')
    run(
        "profile", "--dataset", "x.txt", "-o", tmp_path / "p.json", "--kv-budgets", 64, "--selections", "window,chunk", "--refresh", 8,
        "--drafters", "ngram", "--draft-model", "a/small one", "--draft-model", head, "--quiet",
    )  # fmt: skip
    [settings] = seen
    small, eagle = DrafterSpec(kind="draft_model", path="a/small one"), DrafterSpec(kind="eagle3", path=str(head))
    assert settings.drafters == [NGRAM, small, eagle]
    window, chunk = SparseKV(budget=64, storage="evict"), SparseKV(budget=64, selection="chunk", refresh=8)
    assert settings.policies == [window, chunk]
    kvs = [(NGRAM, FullKV()), (small, window), (small, chunk), (small, FullKV()), (eagle, FullKV())]
    assert [(config.drafter, config.kv) for config in drafts(settings)] == kvs
    assert {cell.drafter for cell in latency_cells(settings)} == {NO_DRAFTER, NGRAM, small, eagle}


@pytest.mark.parametrize("selection", ["window", "chunk"])
def test_a_replayed_round_sees_as_many_committed_keys_as_the_budget_says(model, monkeypatch, selection):
    policy = SparseKV(budget=BUDGET, selection=selection)
    cache, logits = prefilled(model, [random_prompt(CONTEXT)], cache_capacity(CONTEXT, OUTPUT, 0))
    prompt = Prompt("prose", "made.txt", 0, CONTEXT, random_prompt(CONTEXT))
    [written] = write_texts(model, cache, [prompt], CONTEXT, logits, GREEDY, output_len=OUTPUT, stop_tokens=(), seeds=[0])
    seen, real = [], self_sparse.additive_mask

    def spy(visible, dtype):
        num_rows = len(visible)  # [rounds * K, committed + rounds * K]
        seen.append((visible[:, :-num_rows].sum(1), visible[:, -num_rows:].sum(1)))
        return real(visible, dtype)

    monkeypatch.setattr(self_sparse, "additive_mask", spy)
    drafter = SelfSparseDrafter(model, policy, draft_len=DRAFT_LEN, batch=1)
    drafter.replay(written.target_text, DRAFT_LEN)
    committed, own = (torch.cat(rows) for rows in zip(*seen, strict=True))
    assert len(committed) == (OUTPUT - 1) * DRAFT_LEN
    assert set(committed.tolist()) == {policy.read(CONTEXT)} == {BUDGET}
    assert own.tolist() == [1, 2, 3] * (OUTPUT - 1)  # and its own tokens of the round


def test_decoding_holds_the_budget_after_every_round(model):
    cache, logits = prefilled(model, [random_prompt(CONTEXT)], cache_capacity(CONTEXT, OUTPUT, DRAFT_LEN))
    drafter = make_drafter(CONFIG, model)
    rounds = decode(
        model, cache, [random_prompt(CONTEXT)], logits, drafter, draft_len=DRAFT_LEN, sampler=GREEDY, generators=[torch.Generator()],
        max_new_tokens=OUTPUT,
    )  # fmt: skip
    held = [drafter.cache.lengths[0] for _ in rounds]
    assert set(held) == {CONFIG.kv.resident(CONTEXT)} == {BUDGET}
    assert drafter.nbytes == drafter.cache.nbytes


def test_predicted_bytes_are_those_of_the_cache(model):
    profile = made_profile(target=model.spec, weights_bytes=model.nbytes, dtype="float32")
    workload = Workload(context_len=CONTEXT, output_len=OUTPUT, sampler=GREEDY)
    real = SparseKVCache(model.spec, CONFIG.kv, draft_len=DRAFT_LEN, batch=1, dtype=model.dtype, device=model.device)
    without = DraftConfig(drafter=NGRAM, kv=FullKV(), draft_len=DRAFT_LEN)
    assert counted_bytes(profile, CONFIG, workload) - counted_bytes(profile, without, workload) == real.nbytes == make_drafter(CONFIG, model).nbytes
    assert real.capacity == BUDGET + DRAFT_LEN + 1


def test_the_plan_spells_the_budget_it_chose(run, tmp_path, capsys):
    profile = made_profile(drafters=[(SELF_SPARSE, CONFIG.kv)], draft_lens=(1, 3), max_draft_len=3)
    save_profile(profile, tmp_path / "profile.json")
    run("plan", tmp_path / "profile.json", "--isl", 1024, "-o", tmp_path / "plan.json")
    plan = load_plan(tmp_path / "plan.json")
    assert plan.chosen.kv == CONFIG.kv
    words = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    assert words[words.index("--kv-budget") + 1] == str(BUDGET)
    assert " ".join(words) == plan.command
