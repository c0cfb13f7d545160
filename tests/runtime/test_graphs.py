"""What a CUDA graph would hold, without one: the same static shapes run op by op, and replayed by a recorder that repeats
every operation with the arguments of the first time, as a graph does."""

import gc
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import prefilled, random_prompt, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from planner.commands.session import _kernels, open_session
from planner.errors import BadInput
from planner.profiler.acceptance import replay, write_texts
from planner.profiler.texts import Prompt
from planner.runtime import graphs
from planner.runtime.decode import cache_capacity, decode
from planner.runtime.drafters import make_drafter
from planner.runtime.graphs import MAX_ROWS, GraphKernels
from planner.runtime.kv_cache import KVCache
from planner.specs import PLAIN, DraftConfig, DrafterSpec, Sampler, SparseKV

NEW_TOKENS, K = 40, 3
CONFIGS = {
    "none": PLAIN,
    "ngram": DraftConfig(drafter=DrafterSpec(kind="ngram"), draft_len=K),
    "window": DraftConfig(drafter=DrafterSpec(kind="self_sparse"), kv=SparseKV(budget=20, sink=4, recent=8), draft_len=K),
    "chunk": DraftConfig(drafter=DrafterSpec(kind="self_sparse"), kv=SparseKV(budget=21, recent=9, selection="chunk"), draft_len=K),
    "all": DraftConfig(drafter=DrafterSpec(kind="self_sparse"), kv=SparseKV(budget=500), draft_len=K),
}  # fmt: skip


class Recording(TorchDispatchMode):
    """The operations inside the block; `replay` repeats them on the same memory, with the same Python numbers."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            given = {leaf.untyped_storage().data_ptr() for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)}
            new = func(*args, **kwargs)
            for old, value in zip(tree_flatten(out)[0], tree_flatten(new)[0], strict=True):
                if old.untyped_storage().data_ptr() not in given:  # neither a view nor written in place
                    old.copy_(value)

    def pool(self):
        return None


class Recorded(GraphKernels):
    """Everything that GraphKernels does on CUDA, except CUDA."""

    def warm_up(self, work, device):
        return work()

    def captured(self, work):
        recording = Recording()
        with recording:
            hidden = work()
        hidden.fill_(torch.nan)  # capture computes nothing
        return recording, hidden


def uncaptured() -> GraphKernels:
    return GraphKernels(capture=False)


KERNELS = pytest.mark.parametrize("kernels", [uncaptured, Recorded], ids=["uncaptured", "recorded"])


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(graphs, "BUCKET", 16)  # so that short texts cross several


def models(kernels, **changes):
    return tiny_model(sharpness=1.5, **changes), tiny_model(sharpness=1.5, kernels=kernels, **changes)


def one_pass(model, cache, n, seed, mask=None, taps=()):
    tokens = torch.randint(61, (len(cache.lengths), n), generator=torch.Generator().manual_seed(seed))
    positions = torch.tensor(cache.lengths)[:, None] + torch.arange(n)
    return model(tokens, positions, cache, mask, taps)


def run(model, prompts, config):
    """Greedy texts."""
    cache, logits = prefilled(model, prompts, cache_capacity(max(map(len, prompts)), NEW_TOKENS, K))
    generators = [torch.Generator().manual_seed(b) for b in range(len(prompts))]
    rounds = list(
        decode(model, cache, prompts, logits, make_drafter(config, model, batch=len(prompts)), draft_len=config.draft_len, sampler=Sampler(),
               generators=generators, max_new_tokens=NEW_TOKENS)
    )  # fmt: skip
    return [[token for r in rounds for token in r.tokens[b]] for b in range(len(prompts))]


@KERNELS
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
@torch.inference_mode()
def test_biases_and_norms_of_heads_are_recorded_too(kernels, architecture):
    found = []
    for model in models(kernels(), architecture=architecture):
        cache, hidden = prefilled(model, [random_prompt(length, seed=length) for length in (30, 7)], 50)[0], []
        for step, n in enumerate([1, 1, 1, 4, 4, 4]):  # warm-up, capture, replay of each
            hidden.append(one_pass(model, cache, n, step).hidden)
            cache.commit([1, n])
        found.append(torch.cat(hidden, 1))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@KERNELS
@pytest.mark.parametrize("lengths", [[5], [12, 12], [30, 7, 19]], ids=str)
@torch.inference_mode()
def test_passes_equal_eager_ones_and_write_the_same_keys(kernels, lengths):
    """Over several passes, widths and buckets, with junk behind the tokens; the last bucket is cut by the capacity."""
    caches = []
    for model in models(kernels()):
        cache = model.new_cache(75, batch=len(lengths))
        for part, seed in ((cache.keys, 1), (cache.values, 2)):
            part.normal_(generator=torch.Generator().manual_seed(seed)).mul_(30)
        cache.lengths = list(lengths)
        hidden = []
        for step, n in enumerate([1, 1, 1, 4, 1, 4, 4, 1, 4, 2, 2, 2, 2, 4, 4]):
            hidden.append(one_pass(model, cache, n, step).hidden)
            cache.commit([step % n + 1] * len(lengths) if step % 2 else [(step + b) % n + 1 for b in range(len(lengths))])
        caches.append((cache, hidden, model.kernels))
    (eager, expected, _), (ours, got, used) = caches
    for e, g in zip(expected, got, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.keys, eager.keys, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.values, eager.values, rtol=1e-5, atol=1e-5)
    assert used.num_graphs == 0 if kernels is uncaptured else used.num_graphs > 1


@KERNELS
@pytest.mark.parametrize("streams", [1, 3])
@torch.inference_mode()
def test_a_mask_of_the_caller_is_obeyed(kernels, streams):
    """One for all streams or one each, and never the previous pass's."""
    outputs = []
    for model in models(kernels()):
        cache = model.new_cache(40, batch=3)
        cache.keys.normal_(generator=torch.Generator().manual_seed(1))
        cache.lengths = [9, 20, 14]
        outputs.append([])
        for step in range(4):
            visible = torch.rand(streams, 1, 5, 25 + step, generator=torch.Generator().manual_seed(step)) < 0.5
            visible[..., 0] = True
            mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
            outputs[-1].append(one_pass(model, cache, 5, step, mask).hidden)
            cache.commit([1, 1, 1])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)


@KERNELS
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("lengths", [[15], [40, 40], [90, 33, 61]], ids=str)
def test_greedy_output_is_plain_eager_greedy_output(kernels, config, lengths):
    eager, ours = models(kernels())
    prompts = [random_prompt(length, seed=length) for length in lengths]
    assert run(ours, prompts, config) == run(eager, prompts, PLAIN)
    assert ours.kernels.num_graphs == 0 if kernels is uncaptured else ours.kernels.num_graphs > 1


def test_a_drafter_with_cheaper_weights_has_graphs_of_its_own():
    eager, ours = models(Recorded())
    prompt = random_prompt(50)
    config = DraftConfig(drafter=DrafterSpec(kind="self_sparse", weights="int8"), kv=SparseKV(budget=20, sink=4, recent=8), draft_len=K)
    assert run(ours, [prompt], config) == run(eager, [prompt], PLAIN)


@KERNELS
@pytest.mark.parametrize("config", [config for config in CONFIGS.values() if config is not PLAIN], ids=[name for name in CONFIGS if name != "none"])
def test_replay_judges_as_it_does_eagerly(kernels, config):
    prompt, output_len = random_prompt(50), 12  # few rounds: their masked pass is narrow

    def accept_prob(model):
        cache, logits = prefilled(model, [prompt], 50 + output_len)
        (text,) = write_texts(
            model, cache, [Prompt("kind", "source", 0, 50, prompt)], 50, logits, Sampler(temperature=0.8), output_len=output_len, stop_tokens=(),
            seeds=[0],
        )  # fmt: skip
        return replay(model, text.target_text, config, 0).accept_prob.unpack()

    eager, ours = models(kernels())
    np.testing.assert_allclose(accept_prob(ours), accept_prob(eager), atol=1e-5)
    if config.drafter.kind == "self_sparse":
        assert any(shape.mask is not None for shape in ours.kernels._shapes.values())


def test_a_length_that_stays_in_a_graph_is_caught_by_the_recorder(monkeypatch):
    """Wrong: tokens are written where they went when the graph was captured."""

    def slots(cache, slots, visible):
        def append(layer, keys, values):
            KVCache.append(cache, layer, keys, values)
            return cache.keys[layer, :, :, :visible], cache.values[layer, :, :, :visible]

        return SimpleNamespace(keys=cache.keys, values=cache.values, append=append)

    monkeypatch.setattr(graphs, "_Slots", slots)
    prompts = [random_prompt(40)]
    eager, uncaptured_model = models(uncaptured())
    assert run(uncaptured_model, prompts, PLAIN) == run(eager, prompts, PLAIN)
    assert run(models(Recorded())[1], prompts, PLAIN) != run(eager, prompts, PLAIN)


@torch.inference_mode()
def test_a_result_outlives_the_next_replay():
    model = models(Recorded())[1]
    cache = model.new_cache(40)
    held = [one_pass(model, cache, 2, seed).hidden for seed in range(4)]
    assert model.kernels.num_graphs == 1
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(held))
    assert torch.equal(held[2], one_pass(model, cache, 2, 2).hidden)


@KERNELS
def test_wide_passes_taps_and_gradients_run_eagerly(kernels):
    eager, ours = models(kernels())

    def output(model, n, taps=()):
        return one_pass(model, model.new_cache(MAX_ROWS + 1), n, 0, taps=taps)

    with torch.inference_mode():
        assert torch.equal(output(ours, MAX_ROWS + 1).hidden, output(eager, MAX_ROWS + 1).hidden)
        tapped = output(ours, 3, taps=(0, 1))
        assert torch.equal(tapped.taps[1], output(eager, 3, taps=(1,)).taps[1])
    ours.norm.requires_grad_()
    output(ours, 3).hidden.sum().backward()
    assert ours.norm.grad.abs().sum() > 0
    assert not ours.kernels._shapes


@KERNELS
@torch.inference_mode()
def test_a_cache_that_is_too_small_is_refused(kernels):
    model = models(kernels())[1]
    cache = model.new_cache(10)
    cache.lengths = [8]
    with pytest.raises(ValueError, match="holds 10 tokens, 11 are needed"):
        one_pass(model, cache, 3, 0)


@torch.inference_mode()
def test_graphs_of_caches_that_are_gone_are_dropped_with_the_next_new_shape():
    model = models(Recorded())[1]
    kept, gone = model.new_cache(40), model.new_cache(40)
    for seed in range(3):
        one_pass(model, kept, 1, seed)
        one_pass(model, gone, 1, seed)
    assert model.kernels.num_graphs == 2
    del gone
    gc.collect()
    one_pass(model, kept, 2, 0)  # all graphs go: one stream captured them
    assert model.kernels.num_graphs == 0 and len(model.kernels._shapes) == 1


@torch.inference_mode()
def test_caches_that_were_never_captured_go_alone():
    model = models(Recorded())[1]
    kept = model.new_cache(40)
    for seed in range(3):
        one_pass(model, kept, 1, seed)
        one_pass(model, model.new_cache(40), 1, seed)
    assert model.kernels.num_graphs == 1 and len(model.kernels._shapes) == 2


@torch.inference_mode()
def test_the_number_of_graphs_has_a_limit(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 3)
    eager, ours = models(Recorded())
    for n in range(1, 9):
        for seed in range(3):
            expected, got = (one_pass(model, model.new_cache(40), n, seed).hidden for model in (eager, ours))
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    cache = ours.new_cache(40)
    for n in range(1, 9):
        for seed in range(3):
            one_pass(ours, cache, n, seed)
            assert len(ours.kernels._shapes) <= 3


def test_kernels_do_not_keep_a_cache_or_a_model_alive():
    kernels = Recorded()
    model = models(kernels)[1]
    run(model, [random_prompt(20)], CONFIGS["window"])
    assert kernels.num_graphs > 0
    del model
    gc.collect()
    assert all(layers() is None and cache() is None for layers, cache, *_ in kernels._shapes)


def test_sessions_take_graphs_on_cuda_alone():
    with pytest.raises(BadInput, match="cuda_graphs is for a CUDA device, the device is cpu; use eager or native"):
        open_session("smollm2", device="cpu", execution="cuda_graphs")
    kernels, warnings = _kernels("cuda_graphs", torch.device("cuda"), torch.bfloat16)
    assert isinstance(kernels, GraphKernels) and kernels.execution == "cuda_graphs" and not warnings
    assert type(_kernels(None, torch.device("cuda"), torch.bfloat16)[0]).__name__ == "Kernels"
