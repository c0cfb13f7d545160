"""What only a GPU can show (marked `gpu`), and how far bfloat16 may lead two equal texts apart, there and on the CPU."""

import pytest
import torch
from tiny import prefilled, random_prompt, tiny_model

from planner.profiler.timer import PhaseTimer
from planner.runtime.decode import cache_capacity, decode
from planner.runtime.drafters import make_drafter
from planner.runtime.graphs import GraphKernels
from planner.runtime.kernels import Kernels
from planner.specs import PLAIN, DraftConfig, DrafterSpec, Sampler, SparseKV

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")])
K, NEW_TOKENS = 4, 40
DRAFTED = [
    DraftConfig(drafter=DrafterSpec(kind="ngram"), draft_len=K),
    DraftConfig(drafter=DrafterSpec(kind="self_sparse"), kv=SparseKV(budget=20, sink=4, recent=8), draft_len=K),
    DraftConfig(drafter=DrafterSpec(kind="self_sparse"), kv=SparseKV(budget=21, recent=9, selection="chunk"), draft_len=K),
]
# Wide and narrow passes round differently. bfloat16 keeps 8 bits, so a logit of up to 16 is off by 2**-5 from its own
# rounding; four such steps leave room for what two layers add. The median gap of the model below is 0.3.
NEAR_TIE = 4 * 2**-5


def greedy_text(model, prompt: list[int], config: DraftConfig, mark=lambda phase: None) -> list[int]:
    cache, logits = prefilled(model, [prompt], cache_capacity(len(prompt), NEW_TOKENS, K))
    rounds = decode(
        model, cache, [prompt], logits, make_drafter(config, model), draft_len=config.draft_len, sampler=Sampler(),
        generators=[torch.Generator(device=model.device).manual_seed(0)], max_new_tokens=NEW_TOKENS, mark=mark,
    )  # fmt: skip
    return [token for round_ in rounds for token in round_.tokens[0]]


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("config", DRAFTED, ids=str)
def test_greedy_output_is_plain_greedy_output_in_float32(device, config):
    model = tiny_model(sharpness=1.5, device=device)
    for length in (15, 100):
        prompt = random_prompt(length, seed=length)
        assert greedy_text(model, prompt, config) == greedy_text(model, prompt, PLAIN)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("lengths", [[105], [130, 7, 119]], ids=str)
@torch.inference_mode()
def test_captured_passes_equal_eager_ones(device, lengths):
    """Widths by turns, so that graphs which share memory run in any order, and across a bucket's end."""
    passes = []
    for kernels in (Kernels(), GraphKernels()):
        model = tiny_model(device=device, kernels=kernels)
        cache = model.new_cache(400, batch=len(lengths))
        cache.lengths = list(lengths)
        hidden = []
        for step in range(60):
            n = (1, 5, 1, 8)[step % 4]
            tokens = torch.randint(61, (len(lengths), n), generator=torch.Generator().manual_seed(step)).to(device)
            positions = torch.tensor(cache.lengths, device=device)[:, None] + torch.arange(n, device=device)
            hidden.append(model(tokens, positions, cache).hidden)
            cache.commit([n] * len(lengths))
        passes.append((hidden, cache, kernels))
    (expected, eager, _), (got, ours, kernels) = passes
    assert kernels.num_graphs == 6  # three widths in two buckets
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.keys, eager.keys, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("config", [PLAIN, *DRAFTED], ids=str)
def test_greedy_output_with_graphs_is_plain_greedy_output_in_float32(device, config):
    """The second text has a cache of its own: the first one's graphs are dropped meanwhile."""
    eager, ours = (tiny_model(sharpness=1.5, device=device, kernels=kernels) for kernels in (Kernels(), GraphKernels()))
    for length in (15, 100):
        prompt = random_prompt(length, seed=length)
        assert greedy_text(ours, prompt, config) == greedy_text(eager, prompt, PLAIN)
        assert ours.kernels.num_graphs > 0


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_every_phase_takes_time(device):
    timer = PhaseTimer(torch.device(device))
    greedy_text(tiny_model(device=device), random_prompt(50), DRAFTED[1], mark=timer.mark)
    times = timer.seconds()
    assert set(times) == {"select", "draft", "verify", "commit"}
    assert len(times["select"]) == 1 and len(times["draft"]) == len(times["verify"]) == len(times["commit"]) > 1
    assert all(seconds > 0 for phase in times.values() for seconds in phase)


def gap_at_divergence(model, prompt: list[int], one: list[int], other: list[int]) -> float:
    """How far below the largest logit the lesser of the two tokens lies where two texts part; 0 where they never do."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
    if at is None:
        return 0.0
    _, logits = prefilled(model, [prompt + one[:at]], len(prompt) + at)
    logits = logits[0].float()
    return float(logits.max() - torch.minimum(logits[one[at]], logits[other[at]]))


def bfloat16_model(device: str):
    """Many tokens to choose from, so that near-ties occur."""
    return tiny_model(sharpness=0.5, device=device, vocab_size=2000).to(torch.bfloat16)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_bfloat16_texts_part_at_near_ties_only(device):
    model = bfloat16_model(device)
    for seed in range(2):
        prompt = random_prompt(40, seed=seed)
        plain = greedy_text(model, prompt, PLAIN)
        for config in DRAFTED:
            assert gap_at_divergence(model, prompt, plain, greedy_text(model, prompt, config)) <= NEAR_TIE


@pytest.mark.parametrize("device", ["cpu", CUDA])
@torch.inference_mode()
def test_bfloat16_passes_of_different_widths_disagree_at_near_ties_only(device):
    """The same rule where it has more to say: at every place of a given text, verification by 300 tokens against one by one."""
    model = bfloat16_model(device)
    for seed in range(3):
        tokens = torch.tensor([random_prompt(300, seed=seed)], device=device)

        def logits(width, tokens=tokens):
            cache = model.new_cache(300)
            rows = []
            for chunk in tokens.split(width, dim=1):
                n, start = chunk.shape[1], cache.lengths[0]
                rows.append(model.logits(model(chunk, torch.arange(start, start + n, device=device)[None], cache, cache.causal_mask(n)).hidden[0]))
                cache.commit([n])
            return torch.cat(rows).float()

        narrow = logits(1)
        gap = narrow.max(-1).values - narrow.gather(-1, logits(300).argmax(-1, keepdim=True))[:, 0]
        assert gap.max() <= NEAR_TIE


def test_a_text_that_parts_elsewhere_is_no_near_tie():
    model = tiny_model().to(torch.bfloat16)
    prompt = random_prompt(40)
    plain = greedy_text(model, prompt, PLAIN)
    wrong = [*plain[:10], (plain[10] + 1) % 61, *plain[11:]]
    assert gap_at_divergence(model, prompt, plain, wrong) > NEAR_TIE
