"""Drafters that survive a small cache: one continuation, read through the full cache and through a sparse one.

BudgetDraft (arXiv:2606.00144). The teacher is the target with its full cache. The branch with the full cache maximises what
verification would accept (L_A); the sparse branch reads the same tokens through a cache of a budget drawn for the step, chosen
by the code that decoding runs, and is tied to the same teacher (L_C). The prefix is read without gradient; the loss is
L_A + weight * L_C over the continuation.

P  tokens of the prefix     n  of the continuation     V  vocabulary size
"""

import math
from collections.abc import Iterator
from typing import NamedTuple, get_args

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from planner.errors import BadInput
from planner.runtime.drafters.self_sparse import queries_of
from planner.runtime.kernels import Kernels
from planner.runtime.kv_cache import KVCache, SparseKVCache, forced_mask
from planner.runtime.linear import Linear
from planner.runtime.model import Layer, Transformer, layer_tensors, read_prompts
from planner.specs import Selection, SparseKV
from planner.training.data import TaughtText, TaughtTexts
from planner.training.losses import Candidates, Teacher, Variant, check_variant, distilled
from planner.training.trainer import Learnt

PAPER_BUDGETS = {256: 0.4, 512: 0.3, 1024: 0.2, 2048: 0.1}  # at PAPER_LENGTH
PAPER_LENGTH = 16384


class MultiViewSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a step sees, and what it is asked for."""

    layers: list[int] | None = None  # of the target, that the drafter is cut from; None: the first two and the last
    budgets: list[tuple[int, float]] | None = None  # and how often each is drawn; empty: L_A alone; None: the paper's, scaled to the texts
    selection: Selection = "chunk"
    variant: Variant = "kl"
    temperature: float = 1.0
    consistency: float = 0.5  # weight of L_C
    continuation: int = 512  # tokens of a step's loss
    sampled: int | None = 4096  # tokens of the vocabulary that a step's softmax samples; None: all
    seed: int = 0

    def __post_init__(self):
        if self.selection not in get_args(Selection):
            raise ValueError(f"a selection is one of {', '.join(get_args(Selection))}, got {self.selection!r}; change --selection")
        check_variant(self.variant, self.temperature)
        if not 0 <= self.consistency <= 1e6:
            raise ValueError(f"the weight of the sparse branch must be at least 0, got {self.consistency:g}; change --consistency")
        for name, least in (("continuation", 1), ("sampled", 1), ("seed", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}; change --{name}")
        for budget, weight in self.budgets or []:
            if not 0 < weight <= 1e6:
                raise ValueError(f"a budget is drawn with a weight above 0, got {budget}:{weight:g}; change --budgets")
            try:
                SparseKV(budget=budget, selection=self.selection)
            except ValueError as error:
                raise ValueError(str(error).replace("--kv-budget", "it in --budgets")) from None

    def filled(self, num_layers: int, length: int) -> "MultiViewSettings":
        """With what was left open, for a target of so many layers and texts of this length."""
        layers = sorted({0, min(1, num_layers - 1), num_layers - 1}) if self.layers is None else self.layers
        return msgspec.structs.replace(self, layers=layers, budgets=scaled_budgets(length) if self.budgets is None else self.budgets)


class Example(NamedTuple):
    text: int
    prefix_len: int
    policy: SparseKV | None


class Prefix(KVCache):
    """Keys and values that are given, and those of one pass behind them, joined so that gradients reach the latter."""

    def __init__(self, keys: Tensor, values: Tensor):  # [layers, 1, G, S, D]
        self.keys, self.values, self.taps = keys, values, ()
        self.lengths = [keys.shape[3]]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys[layer], keys], 2), torch.cat([self.values[layer], values], 2)


def scaled_budgets(length: int) -> list[tuple[int, float]]:
    """The paper's budgets for texts of another length."""
    return [(max(48, budget * length // PAPER_LENGTH), weight) for budget, weight in PAPER_BUDGETS.items()]


def cut(target: Transformer, layers: list[int]) -> Transformer:
    """A trainable drafter of some layers of a target in float32; embedding and head stay the target's, and frozen."""
    spec = target.spec
    if not layers or len(set(layers)) < len(layers) or not all(0 <= layer < spec.num_layers for layer in layers):
        raise BadInput(f"layers are different ones of the target's 0 to {spec.num_layers - 1}, got {','.join(map(str, layers)) or 'none'}")
    kernels = Kernels()

    def matrix(name: str, layer: Layer) -> Linear:
        return Linear(getattr(layer, name).restored(torch.float32).clone(), kernels)

    own = []
    for index in layers:
        layer = target.layers[index]
        norms = (None if part is None else part.detach().float().clone() for part in (layer.qkv_bias, layer.q_norm, layer.k_norm))
        matrices = (matrix(name, layer) for name in ("qkv", "attention_out", "gate_up", "mlp_out"))
        own.append(Layer(layer.attention_norm.detach().float().clone(), layer.mlp_norm.detach().float().clone(), *matrices, *norms))
    head = Linear(target.head.restored(torch.float32), kernels)
    drafter = Transformer(
        msgspec.structs.replace(spec, num_layers=len(layers)), target.fingerprint, target.embedding.float(), target.norm.detach().float().clone(),
        head, own, kernels, target.special_tokens,
    )  # fmt: skip
    for parameter in trainable(drafter).values():
        parameter.requires_grad_(True)
    return drafter


def trainable(drafter: Transformer) -> dict[str, nn.Parameter]:
    """The drafter's own weights by name: its layers and the last norm."""
    return {name: parameter for name, parameter in drafter.named_parameters() if name == "norm" or name.startswith("layers.")}


def own_weights(drafter: Transformer) -> dict[str, Tensor]:
    """The same under Hugging Face names, as files hold them."""
    found = {"model.norm.weight": drafter.norm}
    for index, layer in enumerate(drafter.layers):
        found |= {f"model.layers.{index}.{name}": tensor for name, tensor in layer_tensors(drafter.spec, layer).items()}
    return {name: tensor.detach() for name, tensor in found.items()}


class MultiView:
    """What an example teaches a drafter."""

    def __init__(self, drafter: Transformer, texts: TaughtTexts, settings: MultiViewSettings, cache_dtype: torch.dtype):
        """settings  with nothing left open"""
        self.drafter, self.texts, self.settings, self._cache_dtype = drafter, texts, settings, cache_dtype
        self._head = drafter.head.weights.detach().to(cache_dtype)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def example(self, number: int) -> Example:
        """Text, prefix and budget of an example: every text once, in an order of its own, then again."""
        epoch, place = divmod(number, len(self.texts))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.settings.seed, 0, epoch]).permutation(len(self.texts))
        text, rng, settings = int(self._order[1][place]), np.random.default_rng([self.settings.seed, 1, number]), self.settings
        length, begin = self.texts.length(text), self.texts.manifest.begins[text]
        longest = max(begin + 1, length - settings.continuation)
        prefix_len = round(math.exp(rng.uniform(math.log(begin + 1), math.log(longest))))  # each doubling as often: long prefixes cost most
        if not settings.budgets:
            return Example(text, prefix_len, None)
        budgets, weights = zip(*settings.budgets, strict=True)
        budget = int(rng.choice(budgets, p=np.array(weights) / sum(weights)))
        return Example(text, prefix_len, SparseKV(budget=budget, selection=settings.selection))

    def learn(self, number: int) -> Learnt:
        settings, example = self.settings, self.example(number)
        text, P = self.texts.text(example.text), example.prefix_len
        part = slice(P, min(P + settings.continuation, len(text.tokens)))
        teacher = Teacher(*(told[part].to(self.drafter.device) for told in text.teacher))
        generator = torch.Generator().manual_seed(number * 1_000_003 + settings.seed)
        candidates = Candidates.draw(self.drafter.spec.vocab_size, teacher.tokens, settings.sampled, generator)
        parts, loss, n = {}, 0.0, part.stop - part.start
        for name, hidden in self._branches(text, part, example.policy):
            own = distilled(hidden[0], self._head, teacher, candidates, variant=settings.variant, temperature=settings.temperature)
            loss = loss + (own if name == "full" else settings.consistency * own)
            parts[name] = float(own.detach())
        return Learnt(loss, n, parts)

    def _branches(self, text: TaughtText, part: slice, policy: SparseKV | None) -> Iterator[tuple[str, Tensor]]:
        """Hidden states [1, n, C] of the continuation, by what it saw."""
        drafter, P, text = self.drafter, part.start, text.tokens.to(self.drafter.device)
        prefix = KVCache(drafter.spec, batch=1, capacity=P, dtype=self._cache_dtype, device=drafter.device)
        read_prompts(drafter, text[None, :P], prefix)
        tokens, positions = text[None, part], torch.arange(part.start, part.stop, device=drafter.device)
        yield "full", drafter(tokens, positions[None], Prefix(prefix.keys, prefix.values)).hidden
        if policy is not None:
            sparse = SparseKVCache(drafter.spec, policy, draft_len=0, batch=1, dtype=self._cache_dtype, device=drafter.device)
            with torch.no_grad():
                sparse.select(prefix, 0, P, queries_of(drafter, text.tolist(), prefix, 0, P))
            held = sparse.lengths[0]
            own = Prefix(sparse.keys[:, :, :, :held], sparse.values[:, :, :, :held])
            yield "sparse", drafter(tokens, positions[None], own, forced_mask(policy, P, positions, self._cache_dtype)).hidden
