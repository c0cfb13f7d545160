"""What a training step sees is what decoding will see, and it teaches the drafter's own layers alone."""

import pytest
import torch
from msgspec.structs import replace
from taught import BEGIN, LENGTH, SETTINGS, TRAINING, Run, target, taught_folder
from tiny import tiny_checkpoint

from planner.commands.configs import valid
from planner.errors import BadInput
from planner.runtime.drafters.draft_model import DraftModelDrafter
from planner.runtime.drafters.protocol import TargetText
from planner.specs import FullKV, Sampler, SparseKV
from planner.training.data import TaughtTexts
from planner.training.multi_view import MultiView, MultiViewSettings, cut, own_weights, scaled_budgets, trainable
from planner.training.trainer import train


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    model = target()
    return model, TaughtTexts(taught_folder(tmp_path_factory.mktemp("texts") / "taught", model), model)


def parts(made, **changes) -> MultiView:
    model, texts = made
    return MultiView(cut(model, SETTINGS.layers), texts, replace(SETTINGS, **changes), torch.float32)


def next_probs(view: MultiView, hidden: torch.Tensor, text: list[int], begin: int) -> torch.Tensor:  # [n]
    """The drafter's probability of what follows each position."""
    n = hidden.shape[1]
    probs = view.drafter.logits(hidden[0]).float().softmax(-1)
    return probs.gather(1, torch.tensor(text[begin + 1 : begin + 1 + n])[:, None])[:, 0]


@pytest.mark.parametrize("selection", ["chunk", "window", "snapkv", "retrieval"])
@pytest.mark.parametrize("prefix_len", [40, 117])
def test_a_step_sees_what_decoding_will_see(selection, prefix_len, made):
    """The replay is what decoding meets, exactly; with a target that is sure of everything, it gives the drafter's own probabilities."""
    view, n, budget = parts(made), 20, 48
    text, policy = made[1].text(0), SparseKV(budget=budget, selection=selection)
    with torch.no_grad():
        branches = dict(view._branches(text, slice(prefix_len, prefix_len + n), policy))
    tokens = text.tokens.tolist()
    sure = TargetText(tokens[:prefix_len], tokens[prefix_len : prefix_len + n + 1], torch.ones(n), None, Sampler(temperature=1.0), {})
    seen = {}
    for name, kv in (("full", FullKV()), ("sparse", policy)):
        drafter = DraftModelDrafter(view.drafter, kv, view.drafter.spec.vocab_size, draft_len=1, batch=1)
        seen[name] = torch.from_numpy(drafter.replay(sure, 1).accept_prob[:, 0])
        torch.testing.assert_close(next_probs(view, branches[name], tokens, prefix_len), seen[name], atol=1e-5, rtol=1e-4)
    if prefix_len > budget:
        assert not torch.allclose(seen["full"], seen["sparse"], atol=1e-3)


def test_gradients_reach_the_drafters_own_weights_and_nothing_else(made):
    view = parts(made, budgets=[(48, 1.0)])
    view.learn(0).loss.backward()
    assert view.drafter.embedding.grad is None and view.drafter.head.weights.grad is None
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in trainable(view.drafter).values())
    assert not any(parameter.requires_grad for parameter in made[0].parameters())


def test_without_budgets_the_loss_is_that_of_the_full_cache_and_consistency_weighs_the_other(made):
    alone, both = parts(made, budgets=[]).learn(3), parts(made).learn(3)
    assert alone.parts.keys() == {"full"} and both.parts.keys() == {"full", "sparse"}
    assert float(alone.loss.detach()) == pytest.approx(alone.parts["full"])
    assert float(both.loss.detach()) == pytest.approx(both.parts["full"] + SETTINGS.consistency * both.parts["sparse"])


def test_the_loss_falls(made, tmp_path):
    view, losses = parts(made), []
    schedule = replace(TRAINING, steps=24, save_every=24)
    train(trainable(view.drafter), view.learn, schedule, tmp_path / "checkpoint", Run(), stepped=lambda done: losses.append(done.loss))
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def test_every_text_comes_once_before_any_comes_again_and_budgets_as_often_as_was_asked(made):
    view = parts(made)
    examples = [view.example(number) for number in range(600)]
    assert all(sorted(e.text for e in examples[at : at + 3]) == [0, 1, 2] for at in range(0, 600, 3))
    assert {e.prefix_len for e in examples} <= set(range(BEGIN + 1, LENGTH - SETTINGS.continuation + 1))
    assert sum(e.policy.budget == 48 for e in examples) / 600 == pytest.approx(0.7, abs=0.06)  # three standard deviations
    again = parts(made)
    assert [again.example(number) for number in (599, 0, 7)] == [examples[599], examples[0], examples[7]]


def test_budgets_of_the_paper_scale_with_the_texts():
    assert dict(scaled_budgets(16384)) == {256: 0.4, 512: 0.3, 1024: 0.2, 2048: 0.1}
    assert scaled_budgets(4096) == [(64, 0.4), (128, 0.3), (256, 0.2), (512, 0.1)]
    assert [budget for budget, _ in scaled_budgets(256)] == [48] * 4  # the least that sinks and a window fit in


def test_what_was_left_open_is_filled():
    filled = MultiViewSettings().filled(30, 4096)
    assert filled.layers == [0, 1, 29] and filled.budgets == scaled_budgets(4096)
    assert [MultiViewSettings().filled(count, 4096).layers for count in (1, 2, 3)] == [[0], [0, 1], [0, 1, 2]]
    assert SETTINGS.filled(30, 4096) == SETTINGS and MultiViewSettings(budgets=[]).filled(30, 4096).budgets == []


@pytest.mark.parametrize("changes", [{}, {"architecture": "qwen2"}, {"architecture": "qwen3", "tie_embeddings": False}], ids=str)
def test_what_is_cut_out_is_the_targets(changes):
    tensors = tiny_checkpoint(num_layers=3, **changes).tensors
    found = own_weights(cut(target(sharpness=1.0, **changes), [2, 0]))
    assert len(found) == sum(name.startswith("model.layers.0.") for name in tensors) * 2 + 1
    for name, tensor in found.items():
        here = name.replace("layers.0.", "layers.2.") if "layers.0." in name else name.replace("layers.1.", "layers.0.")
        assert torch.equal(tensor, tensors[here]), name


@pytest.mark.parametrize("layers", [[], [0, 0], [3], [-1]], ids=str)
def test_layers_that_cannot_be_are_refused(layers):
    with pytest.raises(BadInput, match="layers are different ones of the target's 0 to 2"):
        cut(target(), layers)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"selection": "best"}, "selection is one of window, chunk, snapkv, retrieval, got 'best'; change --selection"),
        ({"variant": "l2"}, "variant is one of greedy, sampling, kl, got 'l2'; change --variant"),
        ({"temperature": 0.0}, "variant kl serves temperatures from 0.01 to 100, got 0; for 0 take --variant greedy"),
        ({"temperature": float("nan")}, "variant kl serves temperatures"),
        ({"variant": "greedy", "temperature": 0.7}, "variant greedy serves temperature 0, got 0.7; drop --temperature"),
        ({"consistency": -0.5}, "change --consistency"),
        ({"continuation": 0}, "continuation must be at least 1, got 0; change --continuation"),
        ({"sampled": -4}, "sampled must be at least 1, got -4"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"budgets": [(64, 0.0)]}, "weight above 0, got 64:0; change --budgets"),
        ({"budgets": [(8, 1.0)]}, "got 8; raise it in --budgets"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(BadInput) as caught:
        valid(MultiViewSettings, **changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)
