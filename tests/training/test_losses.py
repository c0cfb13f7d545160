"""The loss of a step equals the plain formula over the whole vocabulary, and so does its gradient."""

import pytest
import torch

from planner.errors import BadInput
from planner.training.losses import FREQUENT, Candidates, Teacher, distilled

N, C, V, K = 7, 16, 53, 5


def teacher(seed: int = 0) -> tuple[Teacher, torch.Tensor]:
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(seed)) * 2
    log_p = logits.log_softmax(-1)
    best, ids = log_p.topk(K)
    return Teacher(ids, best), log_p


def plain(hidden, head, told, log_p, variant, temperature, weights):
    log_q = (hidden @ head.T / (1.0 if variant == "greedy" else temperature)).log_softmax(-1)
    if variant == "greedy":
        losses = -log_q.gather(1, log_p.argmax(-1, keepdim=True))[:, 0]
    else:
        p = told.log_probs.exp() if temperature == 1 else (told.log_probs / temperature).softmax(-1)
        q = log_q.gather(1, told.tokens)
        losses = 1 - torch.minimum(p, q.exp()).sum(-1) if variant == "sampling" else (p * (p.log() - q)).sum(-1)
    return (losses * weights).sum() / weights.sum()


@pytest.mark.parametrize("variant", ["greedy", "sampling", "kl"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_and_gradient_equal_the_plain_formula(variant, temperature):
    told, log_p = teacher()
    head = torch.randn(V, C, generator=torch.Generator().manual_seed(1))
    weights = torch.linspace(1, 0.1, N)
    hidden = torch.randn(N, C, generator=torch.Generator().manual_seed(2), requires_grad=True)
    other = hidden.detach().clone().requires_grad_(True)
    all_tokens = Candidates.draw(V, told.tokens, None, torch.Generator())
    ours = distilled(hidden, head, told, all_tokens, variant=variant, temperature=temperature, weights=weights)
    theirs = plain(other, head, told, log_p, variant, temperature, weights)
    (ours * 3).backward()
    (theirs * 3).backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(hidden.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_a_sampled_vocabulary_gives_the_same_loss_and_gradient_on_average():
    """Tokens that stand for several others keep the softmax's denominator what it is."""
    generator = torch.Generator().manual_seed(3)
    vocab_size, n = FREQUENT + 3000, 4
    head = torch.randn(vocab_size, C, generator=generator) * 0.15
    ids = torch.randint(vocab_size, (n, K), generator=generator)
    told = Teacher(ids, torch.full((n, K), 1 / K).log())
    start = torch.randn(n, C, generator=generator)

    def learnt(candidates: Candidates) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = start.clone().requires_grad_(True)
        loss = distilled(hidden, head, told, candidates, variant="kl")
        loss.backward()
        return loss.detach(), hidden.grad

    loss, gradient = learnt(Candidates.draw(vocab_size, ids, None, generator))
    few = [Candidates.draw(vocab_size, ids, 600, generator) for _ in range(60)]
    assert all(len(candidates.tokens) < vocab_size * 0.7 for candidates in few)
    losses, gradients = (torch.stack(parts) for parts in zip(*map(learnt, few), strict=True))
    torch.testing.assert_close(losses.mean(), loss, atol=0.01, rtol=0)  # without the weights it is 0.4 too small
    torch.testing.assert_close(gradients.mean(0), gradient, atol=0.01 * float(gradient.abs().max()), rtol=0.05)


def test_another_variant_is_refused():
    told, _ = teacher()
    with pytest.raises(BadInput, match="a variant is one of greedy, sampling, kl"):
        distilled(torch.zeros(N, C), torch.zeros(V, C), told, Candidates.draw(V, told.tokens, None, torch.Generator()), variant="topk")
