"""Trees the whole way on a real model: profiled, planned, and decoded in as many rounds as the replay says."""

import pydoc_data.topics

import pytest
from msgspec.structs import replace

import planner
from planner.commands.profile import measure
from planner.commands.profile_settings import Settings
from planner.commands.progress import Silent
from planner.commands.session import open_session
from planner.commands.trees import make_tree_config
from planner.cost.acceptance import fit_acceptance
from planner.cost.tree_rounds import nodes_of, walk_trees
from planner.datasets import expand
from planner.errors import BadInput, PlannerError
from planner.measurements import load_profile, save_profile
from planner.plans import save_plan
from planner.search.objective import fit_models
from planner.search.optimize import tree_candidates
from planner.specs import AdaptiveTree, DrafterSpec, Sampler, SparseKV, Workload

pytestmark = pytest.mark.model

SPARSE = SparseKV(budget=40, sink=4, recent=8)
SETTINGS = Settings(
    contexts=[96], samplers=[Sampler()], policies=[SPARSE], drafters=[DrafterSpec(kind="self_sparse", weights="int8")], max_draft_len=2,
    num_texts=4, output_len=24, tree_sizes=[6],
)  # fmt: skip
WORKLOAD = Workload(context_len=96, output_len=24, sampler=Sampler())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A file of prose that every Python carries."""
    pytest.importorskip("torch")
    from planner.runtime.weights import default_model_path

    try:
        default_model_path()
    except (PlannerError, ImportError, OSError) as error:
        pytest.skip(f"the default model is absent: {error}")
    path = tmp_path_factory.mktemp("texts") / "prose.txt"
    path.write_text("\n\n".join(pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics)[:8])[:16_000], encoding="utf-8")
    return [str(path)]


@pytest.fixture(scope="module")
def session(dataset):
    return open_session("smollm2", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def profiled(session, dataset, tmp_path_factory):
    profile = measure("smollm2", session, dataset, settings=SETTINGS, progress=Silent(), began=0.0)
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    save_profile(profile, path)
    return profile, path


def test_a_profile_holds_trees_and_survives_the_disk(profiled):
    profile, path = profiled
    assert load_profile(path) == profile
    assert [(sample.text, sample.draft_len, sample.max_size) for sample in profile.trees] == [(text, 2, 6) for text in range(4)]
    assert [x.tree_size for x in profile.rounds if x.tree_size] == [1, 2, 4, 6]
    assert all(x.drafted == [x.tree_size] * len(x.drafted) for x in profile.rounds if x.tree_size)


def test_decoding_takes_the_rounds_that_the_replay_says(session, dataset, profiled):
    from planner.profiler.texts import draw_prompts
    from planner.profiler.trial import run_trials

    models = fit_models(profiled[0])
    configs, unanswered = tree_candidates(models, WORKLOAD)
    assert not unanswered and isinstance(configs[-1].tree, AdaptiveTree)
    fixed, adaptive = configs[-2:]
    # Costs of the day would make a test of the day. Near a tie a stored probability, in steps of 4 %, decides otherwise than an exact one.
    costs = replace(adaptive.tree.costs, draft_s=0.01, verify_s=tuple(0.03 + 0.001 * n for n in range(7)), rate=None)
    configs = [fixed, replace(adaptive, tree=replace(adaptive.tree, costs=costs))]
    prompts = draw_prompts(session.tokenizer, expand(dataset), length=96, count=4, seed=SETTINGS.seed)
    trials = list(
        run_trials(session.model, prompts, configs, Sampler(), output_len=24, stop_tokens=session.tokenizer.stop_tokens, seed=0, warm=False)
    )
    texts = [text for _, text in fit_acceptance(profiled[0]).tree_texts(configs[0], WORKLOAD)]
    compared = 0
    for config in configs:
        for prompt, text in zip(prompts, texts, strict=True):
            (trial,) = [trial for trial in trials if trial.config == config and trial.text == prompt.key]
            walk = walk_trees(text, nodes_of(config.tree, text))
            if trial.output_len == 24:  # a stop token ends a text before its last round does
                assert sum(trial.accepted) + len(trial.accepted) == 23
                assert len(trial.drafted) == walk.starts.sum()
                replayed = [n for n, count in enumerate(walk.by_nodes) for _ in range(int(count))]
                assert max(abs(a - b) for a, b in zip(sorted(trial.drafted), replayed, strict=True)) <= isinstance(config.tree, AdaptiveTree)
                compared += 1
    assert compared


def test_a_plan_of_it_is_checked_and_its_command_writes_text(dataset, profiled, session, tmp_path, monkeypatch):
    plan = planner.plan(profiled[1], objective="tpot")
    assert plan.num_candidates == 1 + 2 + 4 + 2  # off, chains, trees of 1, 2, 4 and 6, adaptive ones up to 4 and 6
    save_plan(plan, tmp_path / "plan.json")
    monkeypatch.setattr("planner.commands.check.open_session", lambda *_, **__: session)
    found = planner.check(tmp_path / "plan.json", dataset, num_texts=2, device="cpu")
    assert {type(cell.config.tree).__name__ for cell in found.cells} == {"NoneType", "FixedTree", "AdaptiveTree"}
    sized = planner.Asked(drafter="self_sparse", drafter_weights="int8", draft_len=2, kv_budget=40, sink=4, recent=8, tree_size="6")
    monkeypatch.setattr("planner.commands.generate.open_session", lambda *_, **__: session)
    greedy = [
        [token for piece in planner.generate("smollm2", "A tree is", config=make_tree_config(asked), sampler=Sampler(), max_new_tokens=12) for token in piece.tokens]
        for asked in (sized, planner.Asked())
    ]  # fmt: skip
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tree_levels": [3]}, r"1 to --max-draft-len \(2\) levels, got --tree-levels 3"),
        ({"tree_sizes": [], "tree_levels": [2]}, "--tree-levels goes with --tree-sizes"),
        ({"drafters": [DrafterSpec(kind="ngram")]}, "got --tree-sizes without a drafter that has some"),
    ],
)
def test_trees_that_cannot_be_profiled_are_refused_before_anything_runs(session, dataset, changes, message):
    with pytest.raises(BadInput, match=message):
        measure("smollm2", session, dataset, settings=SETTINGS._replace(**changes), progress=Silent(), began=0.0)
