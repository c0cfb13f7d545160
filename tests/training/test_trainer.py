"""A training that was stopped ends as one that was not, on one process as on two; and what may go wrong on the way."""

import math

import pytest
import torch
from checkpoints import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from ranks import run_on_ranks
from safetensors.torch import load_file, save_file
from taught import SETTINGS, TRAINING, Run, target, taught_folder, trained
from torch import nn

from planner.errors import Unfinished
from planner.training.trainer import Learnt, TrainSettings, train


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return taught_folder(tmp_path_factory.mktemp("texts") / "taught", target())


@pytest.fixture(scope="module")
def uninterrupted(texts, tmp_path_factory):
    return trained(texts, tmp_path_factory.mktemp("whole") / "checkpoint.safetensors")


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_training_that_was_killed_ends_with_the_weights_of_one_that_was_not(stop, texts, uninterrupted, tmp_path):
    """Killed behind any step: before the first checkpoint, at one, and between two."""

    def stepped(done):
        if done.step == stop:
            raise KeyboardInterrupt

    checkpoint, seen = tmp_path / "checkpoint.safetensors", []
    with pytest.raises(KeyboardInterrupt):
        trained(texts, checkpoint, stepped=stepped)
    assert same(trained(texts, checkpoint, stepped=lambda done: seen.append(done.step)), uninterrupted)
    assert seen == list(range(stop // TRAINING.save_every * TRAINING.save_every + 1, TRAINING.steps + 1))
    assert same(trained(texts, checkpoint, stepped=lambda done: seen.append("more")), uninterrupted) and "more" not in seen


def test_the_weights_depend_on_the_seed_and_the_texts_are_not_the_only_thing_learnt(texts, uninterrupted, tmp_path):
    shorter = trained(texts, tmp_path / "checkpoint.safetensors", replace(TRAINING, steps=4))
    assert not same(shorter, uninterrupted)


def test_two_processes_end_with_the_weights_of_one_with_twice_the_accumulation(texts, tmp_path):
    done = run_on_ranks(taught_script(), str(texts), str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert same(first, second)
    alone = trained(texts, tmp_path / "alone.checkpoint", replace(TRAINING, accumulation=2))
    for name, weight in alone.items():
        torch.testing.assert_close(first[name], weight, atol=1e-6, rtol=0)


def taught_script() -> str:
    import taught

    return taught.__file__


def one_weight(path, *, learn=None, header=Run(), **changes):
    weight = nn.Parameter(torch.ones(3))
    learn = learn or (lambda number: Learnt((weight * (number + 1)).sum(), 1, {"all": 1.0}))
    train({"weight": weight}, learn, replace(TrainSettings(steps=3, warmup=0, accumulation=1, autocast=False), **changes), path, header)
    return weight


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    one_weight(path)
    with refused("checkpoint.safetensors", "other settings", "--out"):
        one_weight(path, header=Run(replace(SETTINGS, continuation=16)))


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight.weight": torch.ones(3)},
        {"weight.weight": torch.ones(3), "first.weight": torch.ones(3), "second.weight": torch.ones(4)},
        {"weight.weight": torch.ones(3), "first.weight": torch.ones(3), "second.weight": torch.ones(3), "more": torch.ones(1)},
    ],
    ids=["missing", "shape", "more"],
)
def test_a_checkpoint_with_other_tensors_is_refused(tensors, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    one_weight(path)
    import msgspec

    save_file(tensors, path, {"step": "2", "header": msgspec.json.encode(Run()).decode()})
    with refused("not a checkpoint of this training"):
        one_weight(path)


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 64], ids=["empty", "text", "huge header"])
def test_what_is_no_safetensors_file_is_refused(content, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(content)
    with refused("checkpoint.safetensors"):
        one_weight(path)


def test_gradients_that_are_not_finite_end_the_training_and_leave_the_last_checkpoint(tmp_path):
    path, weights = tmp_path / "checkpoint.safetensors", []

    def learn(number):
        weights.append(nn.Parameter(torch.ones(3)))
        return Learnt(weight.sum() * (math.nan if number == 2 else 1), 1, {})

    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(Unfinished, match="step 3 are not finite; lower --learning-rate"):
        train({"weight": weight}, learn, TrainSettings(steps=3, save_every=1, accumulation=1, autocast=False), path, Run())
    assert torch.isfinite(load_file(path)["weight.weight"]).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(0, 250), st.floats(0, 1))
def test_the_rate_rises_to_its_peak_and_falls_to_its_end(steps, warmup, final):
    schedule = TrainSettings(steps=steps, warmup=warmup, final_rate=final, learning_rate=0.5)
    rates = [schedule.rate(step) for step in range(steps)]
    assert all(0 < rate <= 0.5 for rate in rates[:1]) and max(rates) <= 0.5
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    if warmup < steps:
        assert schedule.rate(warmup) == 0.5
        assert schedule.rate(steps) == pytest.approx(0.5 * final)
    if 0 < warmup <= steps:
        assert schedule.rate(0) == pytest.approx(0.5 / warmup) and schedule.rate(warmup - 1) == 0.5


@pytest.mark.parametrize(
    "changes",
    [{"steps": 0}, {"accumulation": 0}, {"save_every": 0}, {"learning_rate": 0.0}, {"learning_rate": math.inf}, {"clip": -1.0}, {"warmup": -1}],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        TrainSettings(**({"steps": 1} | changes))
