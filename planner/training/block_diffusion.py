"""Heads that draft a block in one pass (DFlash, arXiv:2602.06036): masks behind random tokens of a text, each block with its own contexts.

A step takes a stretch of a text and draws anchors in it: tokens that are real, with masks behind them as at run time. All
blocks go through the head in one pass, each seeing the contexts before its anchor, or of them what a kv budget drawn for
the step leaves, and itself. The target's hidden states were written with the texts. What a mask is to say is the target's
distribution at its place, given what the text says before it; on text that the target wrote this is, on average, what
follows from the anchor alone. Errors early in a block cost what lies behind them, so their loss weighs more.

A  anchors     n  block_size     S  contexts     C  hidden_size
"""

import math
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from planner.errors import BadInput
from planner.runtime.dflash_head import MAX_BLOCK, DFlashHead, blocks_mask
from planner.runtime.kv_cache import KVCache
from planner.runtime.linear import Linear
from planner.runtime.model import Transformer
from planner.specs import ModelSpec, SparseKV
from planner.training.data import TaughtTexts
from planner.training.losses import Candidates, Teacher, Variant, check_variant, distilled
from planner.training.multi_view import cut
from planner.training.trainer import Learnt

PAPER_DECAY = {8: 4.0, 10: 5.0, 16: 7.0}  # places of a block over which the weight of its loss falls to 1/e, by block_size


class BlockSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a step sees, and what it is asked for."""

    layers: list[int] | None = None  # of the target, that the head's layers begin as; None: the first and the last two
    mask_token: int | None = None  # None: the target's last special token
    block_size: int = 8
    anchors: int = 64  # of a step's text
    span: int = 512  # tokens of the stretch that they are drawn from
    # Contexts that a block sees, and how often each number is drawn; None: all of them.
    budgets: list[tuple[int | None, float]] = msgspec.field(default_factory=lambda: [(None, 1.0)])
    decay: float | None = None  # places; None: the paper's for this block_size
    variant: Variant = "kl"
    temperature: float = 1.0
    sampled: int | None = 4096  # tokens of the vocabulary that a step's softmax samples; None: all
    seed: int = 0

    def __post_init__(self):
        if not 2 <= self.block_size <= MAX_BLOCK:
            raise ValueError(f"a block has 2 to {MAX_BLOCK} tokens, got {self.block_size}; change --block-size")
        if min(self.anchors, self.span) < 1:
            raise ValueError(f"anchors and span must be at least 1, got {self.anchors} and {self.span}")
        check_variant(self.variant, self.temperature)
        for name, least in (("sampled", 1), ("seed", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}; change --{name}")
        if self.decay is not None and not 0 < self.decay < math.inf:
            raise ValueError(f"decay must be positive, got {self.decay}; change --decay")
        if not self.budgets or not all(weight > 0 for _, weight in self.budgets):
            raise ValueError(f"budgets need weights above 0, got {self.budgets}; change --budgets")
        for budget, _ in self.budgets:
            if budget is not None:
                _policy(budget)  # which has rules of its own

    def filled(self, target: Transformer) -> "BlockSettings":
        """With what was left open."""
        num_layers, size = target.spec.num_layers, target.spec.vocab_size
        layers = sorted({0, max(0, num_layers - 2), num_layers - 1}) if self.layers is None else self.layers
        special = max((token for token in target.special_tokens if token < size), default=size - 1)
        return msgspec.structs.replace(self, layers=layers, mask_token=special if self.mask_token is None else self.mask_token)

    def weights(self) -> Tensor:  # [n - 1]
        """Of the masks of a block: exp(-(k - 1) / decay) for k = 1, 2, .. (equation 4 of the paper)."""
        decay = self.decay or PAPER_DECAY.get(self.block_size, self.block_size / 2)
        return torch.exp(-torch.arange(self.block_size - 1) / decay)


class Example(NamedTuple):
    text: int
    anchors: np.ndarray  # [A] positions, rising
    policy: SparseKV | None


class Contexts(KVCache):
    """Keys and values of contexts, and those of one pass over blocks behind them, joined so that gradients reach both."""

    def __init__(self, spec: ModelSpec, device: torch.device):
        self.keys = self.values = torch.empty(spec.num_layers, 1, spec.num_kv_heads, 0, spec.head_dim, device=device)
        self.taps, self.lengths = (), [0]
        self._contexts: dict[int, tuple[Tensor, Tensor]] = {}  # by layer

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._contexts:
            self._contexts[layer] = keys, values
            return keys, values
        before = self._contexts[layer]
        return torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)


def begun(target: Transformer, settings: BlockSettings, taps: tuple[int, ...]) -> DFlashHead:
    """A trainable head in float32 that begins as layers of its target, which read the last tap as it is; embedding and head are frozen."""
    if not taps:
        raise BadInput("a head reads hidden states of its target, these texts hold none; write them with `planner train texts --taps 1,8,..`")
    settings = settings.filled(target)
    if not 0 <= settings.mask_token < target.spec.vocab_size:
        raise BadInput(f"the mask must be a token from 0 to {target.spec.vocab_size - 1}, got {settings.mask_token}; change --mask-token")
    parts, C = cut(target, settings.layers), target.spec.hidden_size
    fc = torch.zeros(C, len(taps) * C, device=target.device)
    at = taps.index(max(taps)) * C
    fc[:, at : at + C] = torch.eye(C, device=target.device)
    head = DFlashHead(
        parts.spec, taps, settings.block_size, settings.mask_token, "training", Linear(fc, parts.kernels),
        parts.layers[-1].attention_norm.detach().clone(), list(parts.layers), parts.norm, parts,
    )  # fmt: skip
    for parameter in trainable(head).values():
        parameter.requires_grad_(True)
    return head


def trainable(head: DFlashHead) -> dict[str, nn.Parameter]:
    """The head's own weights by name; embedding and head are the target's."""
    return {name: parameter for name, parameter in head.named_parameters() if name.startswith(("fc.", "layers.")) or name in ("norm", "hidden_norm")}


def drafted(
    head: DFlashHead,
    features: Tensor,  # [S, taps * C]
    seen_at: Tensor,  # [S] positions of the contexts
    sees: Tensor,  # [A, S] bool
    anchors: Tensor,  # [A] tokens
    positions: Tensor,  # [A] of the anchors
    dtype: torch.dtype,  # that attention is computed in
) -> Tensor:  # [A, n - 1, C]
    """Hidden states at the masks of all blocks, in one pass that gradients go through."""
    A, n, cache = len(anchors), head.block_size, Contexts(head.spec, anchors.device)
    head.inject(features[None], seen_at[None], cache)
    places = positions[:, None] + torch.arange(n, device=anchors.device)
    hidden = head(head.blocks(anchors).view(1, -1), places.view(1, -1), cache, blocks_mask(sees, n, dtype))
    return hidden.view(A, n, -1)[:, 1:]


class BlockDiffusion:
    """What an example teaches a head."""

    def __init__(self, head: DFlashHead, texts: TaughtTexts, settings: BlockSettings, dtype: torch.dtype):
        """dtype  that attention and the head are computed in"""
        self.head, self.texts, self.settings, self._dtype = head, texts, settings, dtype
        self._rows = head.head.weights.detach().to(dtype)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))
        for text in range(len(texts)):
            if texts.length(text) - settings.block_size <= texts.manifest.begins[text]:
                raise BadInput(f"a text must go on for more than a block ({settings.block_size} tokens) where training begins; lower --block-size")

    def example(self, number: int) -> Example:
        """Text, anchors and budget of an example: every text once, in an order of its own, then again."""
        epoch, place = divmod(number, len(self.texts))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.settings.seed, 0, epoch]).permutation(len(self.texts))
        text, rng, settings = int(self._order[1][place]), np.random.default_rng([self.settings.seed, 1, number]), self.settings
        first, end = self.texts.manifest.begins[text], self.texts.length(text) - settings.block_size
        begin = int(rng.integers(first, max(first, end - settings.span) + 1))
        among = np.arange(begin, min(end, begin + settings.span))
        anchors = np.sort(rng.choice(among, min(settings.anchors, len(among)), replace=False))
        budgets, weights = zip(*settings.budgets, strict=True)
        budget = budgets[int(rng.choice(len(budgets), p=np.array(weights) / sum(weights)))]
        return Example(text, anchors, None if budget is None else _policy(budget))

    def learn(self, number: int) -> Learnt:
        settings, example, device = self.settings, self.example(number), self.head.device
        text = self.texts.text(example.text, features=True)
        anchors = torch.from_numpy(example.anchors)
        seen_at, sees = seen_contexts(anchors, example.policy)
        hidden = drafted(
            self.head, text.features[seen_at].flatten(1).to(device), seen_at.to(device), sees.to(device), text.tokens[anchors].to(device),
            anchors.to(device), self._dtype,
        )  # fmt: skip
        rows = (anchors[:, None] + torch.arange(settings.block_size - 1)).flatten()  # what is drafted at a place follows the one before
        teacher = Teacher(*(told[rows].to(device) for told in text.teacher))
        generator = torch.Generator().manual_seed(number * 1_000_003 + settings.seed)
        candidates = Candidates.draw(self.head.spec.vocab_size, teacher.tokens, settings.sampled, generator)
        loss = distilled(
            hidden.flatten(0, 1), self._rows, teacher, candidates, variant=settings.variant, temperature=settings.temperature,
            weights=settings.weights().to(device).repeat(len(anchors)),
        )  # fmt: skip
        return Learnt(loss, len(rows), {"blocks": float(loss.detach())})


def _policy(budget: int) -> SparseKV:
    return SparseKV(budget=budget, storage="evict")


def seen_contexts(anchors: Tensor, policy: SparseKV | None) -> tuple[Tensor, Tensor]:
    """Positions [S] of the contexts that any block sees, and which of them each does [A, S], as a drafter with such a cache would have it."""
    end = int(anchors[-1])
    if policy is None:
        seen_at = torch.arange(end)
        return seen_at, seen_at < anchors[:, None]
    fixed = policy.num_fixed(int(anchors[0]))
    window = policy.budget - fixed
    seen_at = torch.cat([torch.arange(fixed), torch.arange(max(fixed, int(anchors[0]) - window), end)])
    return seen_at, (seen_at < anchors[:, None]) & ((seen_at < fixed) | (seen_at >= anchors[:, None] - window))
