"""Key-value caches: append drafts, commit what was accepted, forget the rest.

A forward pass writes its new tokens behind each stream's length and does not move it; `commit` does. What was not
committed is overwritten by the next pass, so rolling back costs nothing.

B  streams     H  KV heads     D  head_dim     n  new tokens of one pass     C  hidden_size
"""

from typing import NamedTuple

import torch
from torch import Tensor

from planner.runtime import kv_select
from planner.specs import ModelSpec, SparseKV


class Ancestors(NamedTuple):
    """The mask of a pass over a tree, or over one for each stream: committed tokens are seen by all, new ones by their descendants."""

    visible: Tensor  # [B, n, n] bool: whether new token i sees new token j, itself included

    @classmethod
    def of(
        cls,
        parents: Tensor,  # [B, N], -1: children of the root
        depth: int,  # levels at most, the root excluded
    ) -> "Ancestors":  # n = N + 1, the root first
        """Of trees whose nodes say which one they stand behind."""
        B, N = parents.shape
        reached = torch.eye(N + 1, device=parents.device).repeat(B, 1, 1)
        reached[:, 1:].scatter_(2, parents[..., None] + 1, 1.0)
        for _ in range(max(0, depth - 1).bit_length()):  # each step doubles how far back is seen
            reached = (reached @ reached).clamp(max=1.0)
        return cls(reached > 0)

    @property
    def depths(self) -> Tensor:  # [B, n]
        return self.visible.sum(-1) - 1


Mask = Tensor | Ancestors | None  # a tensor [1 or B, 1, n, S] is added to the scores; None: causal behind each stream's committed tokens


class KVCache:
    """Keys (after rotation) and values of B streams, each with a length of its own.

    Beside them, for drafters that read hidden states of the target, the output of some layers (`taps`), which passes
    that are asked for it write, and which is committed and rolled back with the keys.
    """

    def __init__(
        self, spec: ModelSpec, *, batch: int, capacity: int, dtype: torch.dtype, device: torch.device, taps: tuple[int, ...] = ()
    ):  # fmt: skip
        shape = (spec.num_layers, batch, spec.num_kv_heads, capacity, spec.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.taps, self.features = taps, torch.zeros(batch, capacity, len(taps), spec.hidden_size, dtype=dtype, device=device)
        self.lengths = [0] * batch  # committed tokens

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.features.nbytes

    def append(
        self,
        layer: int,
        keys: Tensor,  # [B, H, n, D]
        values: Tensor,  # [B, H, n, D]
    ) -> tuple[Tensor, Tensor]:  # [B, H, longest + n, D] each
        """Write the new tokens of one layer behind each stream's length; all that this layer may look at."""
        end = self.check_room(keys.shape[2])
        self._write(self.keys[layer], keys)
        self._write(self.values[layer], values)
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def append_features(self, tapped: dict[int, Tensor]) -> None:
        """Write what is kept of the new tokens' hidden states, by layer [B, n, C], behind each stream's length."""
        for index, layer in enumerate(self.taps):
            if layer in tapped:
                self._write(self.features[:, :, index], tapped[layer])

    def features_at(
        self,
        positions: Tensor,  # [B, n]
        taps: tuple[int, ...],
    ) -> Tensor:  # [B, n, len(taps) * C]
        """Hidden states of tokens, those of the layers side by side in the order of `taps`."""
        stream = torch.arange(len(positions), device=positions.device)[:, None]
        return torch.cat([self.features[:, :, self.taps.index(layer)][stream, positions] for layer in taps], -1)

    def check_room(self, n: int) -> int:
        """Where a pass over n new tokens ends. ValueError if the cache is too small."""
        end = max(self.lengths) + n
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {end} are needed; make it larger")
        return end

    def causal_mask(self, n: int) -> Tensor | None:  # [1 or B, 1, n, longest + n], 0 or -inf, added to scores
        """The mask of a pass over n new tokens; None where every key is visible."""
        if n == 1 and self._uniform:
            return None
        lengths = self.lengths[:1] if self._uniform else self.lengths
        slot = torch.arange(max(self.lengths) + n, device=self.keys.device)
        last_visible = torch.tensor(lengths, device=slot.device)[:, None] + torch.arange(n, device=slot.device)  # [1 or B, n]
        return additive_mask(slot <= last_visible[:, :, None], self.keys.dtype)[:, None]

    def tree_mask(self, ancestors: Ancestors) -> Tensor:  # [B, 1, n, longest + n]
        """The same with a tree among the new tokens."""
        B, n, _ = ancestors.visible.shape
        lengths = torch.tensor(self.lengths, device=self.keys.device)[:, None]
        new = torch.arange(max(self.lengths) + n, device=lengths.device) - lengths  # [B, S] which of the new tokens lies in a slot
        visible = ancestors.visible.gather(2, new.clamp(0, n - 1)[:, None].expand(B, n, -1))
        return additive_mask((new < 0)[:, None] | (visible & (new < n)[:, None]), self.keys.dtype)[:, None]

    def compact(self, paths: list[list[int]]) -> None:
        """Of the last pass over trees, move each stream's accepted nodes, in the order of the path, right behind the root.

        paths  numbers of nodes by stream, 0 being the first behind the root
        """
        slots = [(b, self.lengths[b] + 1) for b in range(len(paths))]
        moves = [(b, first + node, first + i) for (b, first), path in zip(slots, paths, strict=True) for i, node in enumerate(path) if node != i]
        if moves:
            b, here, there = torch.tensor(moves, device=self.keys.device).unbind(1)
            for own in (self.keys, self.values):
                own[:, b, :, there] = own[:, b, :, here]
            self.features[b, there] = self.features[b, here]

    def commit(self, counts: list[int]) -> None:
        """Keep the first counts[b] tokens of the last pass of each stream."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def truncate(self, length: int) -> None:
        """Forget everything behind the first `length` tokens of every stream."""
        self.lengths = [min(length, old) for old in self.lengths]

    def stream(self, index: int) -> "KVCache":
        """One stream as a cache of its own that shares the memory."""
        view = object.__new__(KVCache)
        view.keys, view.values = self.keys[:, index : index + 1], self.values[:, index : index + 1]
        view.taps, view.features = self.taps, self.features[index : index + 1]
        view.lengths = [self.lengths[index]]
        return view

    def take(self, other: "KVCache", length: int) -> None:
        """Hold, in every stream, the first `length` tokens of another cache's only one."""
        for own, theirs in ((self.keys, other.keys), (self.values, other.values)):
            own[:, :, :, :length] = theirs[:, :, :, :length]
        self.features[:, :length] = other.features[:, :length]
        self.lengths = [length] * len(self.lengths)

    def _write(self, own: Tensor, new: Tensor) -> None:
        """own [B, .., capacity, width] takes new [B, .., n, width] behind each stream's length."""
        n = new.shape[-2]
        if self._uniform:
            start = self.lengths[0]
            own[..., start : start + n, :] = new
        else:
            for stream, start in enumerate(self.lengths):
                own[stream, ..., start : start + n, :] = new[stream]

    @property
    def _uniform(self) -> bool:
        return len(set(self.lengths)) == 1


class SparseKVCache(KVCache):
    """A drafter's copy of the part of a target's cache that its policy keeps, and room for the drafts of a round.

    Slots: the fixed tokens, then a ring with the most recent committed ones, then the drafts of this round. Keys
    carry their rotation, so the order of slots does not matter to attention.
    """

    def __init__(self, spec: ModelSpec, policy: SparseKV, *, draft_len: int, batch: int, dtype: torch.dtype, device: torch.device):
        super().__init__(spec, batch=batch, capacity=policy.budget + draft_len + 1, dtype=dtype, device=device)
        self.policy = policy
        self._num_fixed = [0] * batch
        self._ring_start = [0] * batch  # position that lies in the first slot of the ring

    def select(self, source: KVCache, stream: int, end: int, queries: kv_select.Queries) -> None:
        """Choose and copy what to keep of the first `end` tokens of a source of one stream, and take over the committed ones behind them."""
        b = stream
        fixed = kv_select.select(self.policy, source.keys[:, 0, :, :end], queries)  # [layers, H, F]
        F = fixed.shape[-1]
        index = fixed[..., None].expand(-1, -1, -1, self.keys.shape[-1])
        recent = min(self.policy.budget - F, end - F)
        for own, theirs in ((self.keys, source.keys), (self.values, source.values)):
            own[:, b, :, :F] = theirs[:, 0].gather(2, index)
            own[:, b, :, F : F + recent] = theirs[:, 0, :, end - recent : end]
        self._num_fixed[b], self._ring_start[b] = F, end - recent
        self.lengths[b] = F + recent
        self.slide(source, stream, source.lengths[0] - end)

    def slide(self, source: KVCache, stream: int, count: int) -> None:
        """Take over the `count` tokens that a source of one stream committed last, with its exact keys and values."""
        b, end = stream, source.lengths[0]
        begin = end - min(count, self._ring(b))
        slots = torch.tensor([self._slot(b, position) for position in range(begin, end)], device=self.keys.device, dtype=torch.long)
        self.keys[:, b, :, slots] = source.keys[:, 0, :, begin:end]
        self.values[:, b, :, slots] = source.values[:, 0, :, begin:end]
        self.lengths[b] = self._length(b, end)

    def _ring(self, stream: int) -> int:
        """Slots of the ring."""
        return self.policy.budget - self._num_fixed[stream]

    def _slot(self, stream: int, position: int) -> int:
        """Where the ring holds a token."""
        return self._num_fixed[stream] + (position - self._ring_start[stream]) % self._ring(stream)

    def _length(self, stream: int, end: int) -> int:
        """Slots in use once the ring holds the tokens before `end`."""
        return self._num_fixed[stream] + min(self._ring(stream), end - self._ring_start[stream])


class OwnKVCache(KVCache):
    """All keys of a drafter that is a model of its own. What a pass writes is kept at once and can be taken back."""

    @property
    def ends(self) -> list[int]:
        """Tokens read so far, of each stream."""
        return self.lengths

    def window_mask(self, n: int) -> None:
        """The mask of a pass over n new tokens: none, they are causal."""

    def keep(self, counts: list[int]) -> None:
        """The first counts[b] tokens of the last pass, which the target has committed or just chosen."""
        self.commit(counts)

    def expect_drafts(self, count: int) -> None:
        """Up to `count` passes over one draft each follow."""

    def keep_draft(self) -> None:
        """The one token of the last pass, until `rewind`."""
        self.commit([1] * len(self.lengths))

    def rewind(self, ends: list[int]) -> None:
        """Forget the drafts that lie at ends[b] or behind it."""
        self.lengths = [min(pair) for pair in zip(self.lengths, ends, strict=True)]


class OwnSparseKVCache(SparseKVCache):
    """The same under a policy: a token sees the fixed set in force, the ring of budget - F tokens before it, and itself.

    A new token, draft or not, replaces the oldest of the ring. What a draft replaced waits in the last slots for `rewind`.
    So what a token sees depends on its position and not on where rounds began, and a pass over one token needs no mask.
    """

    def __init__(self, spec: ModelSpec, policy: SparseKV, *, draft_len: int, batch: int, dtype: torch.dtype, device: torch.device):
        super().__init__(spec, policy, draft_len=draft_len, batch=batch, dtype=dtype, device=device)
        self.ends = [0] * batch
        self.all: KVCache | None = None  # every token read, where the policy retains them
        self._num_drafts, self._first_drafts = 0, self.ends

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.all is None else self.all.nbytes)

    def choose(self, source: KVCache, stream: int, end: int, queries: kv_select.Queries) -> None:
        """Keep of the first `end` tokens of a source of one stream what the policy says."""
        source.lengths = [end]
        self.select(source, stream, end, queries)
        self.ends[stream] = end

    def window_mask(self, n: int) -> Tensor | None:  # [B, 1, n, S]
        if n == 1:
            return None
        state = torch.tensor([self.ends, self._num_fixed, self._ring_start, self.lengths], device=self.keys.device)
        first, fixed, ring_start, length = state[:, :, None, None]  # [B, 1, 1]
        ring = self.policy.budget - fixed
        slot = torch.arange(max(self.lengths) + n, device=state.device)
        in_ring = first - 1 - (first - 1 - ring_start - (slot - fixed)) % ring  # position that a slot of the ring holds
        position = torch.where(slot < length, in_ring, first + slot - length)
        own = first + torch.arange(n, device=state.device)[:, None]
        visible = (slot < fixed) | ((position <= own) & (position >= own - ring))  # [B, n, S]
        return additive_mask(visible, self.keys.dtype)[:, None]

    def keep(self, counts: list[int]) -> None:
        new = [(b, self.lengths[b] + i, self.ends[b] + i) for b, count in enumerate(counts) for i in range(count)]  # stream, slot, position
        if self.all is not None:
            self._copy(new, self.all)
        self.ends = [end + count for end, count in zip(self.ends, counts, strict=True)]
        self._copy([(b, slot, self._slot(b, p)) for b, slot, p in new if p >= self.ends[b] - self._ring(b)], self)
        self._set_lengths()

    def expect_drafts(self, count: int) -> None:
        self._num_drafts, self._first_drafts = 0, self.ends
        moves = []  # of each draft: where a pass writes it, where it goes, where to put what was there; its position
        for i in range(count):
            positions = [(b, end + i) for b, end in enumerate(self.ends)]
            moves.append([[self._length(b, p), self._slot(b, p), self.policy.budget + 1 + i, p] for b, p in positions])
        self._moves = torch.tensor(moves, device=self.keys.device, dtype=torch.long)  # [count, B, 4], in one upload
        self._streams = torch.arange(len(self.ends), device=self.keys.device)

    def keep_draft(self) -> None:
        b = self._streams
        written, slot, aside, position = self._moves[self._num_drafts].unbind(1)
        for own, retained in zip((self.keys, self.values), (self.all.keys, self.all.values) if self.all else (None, None), strict=True):
            new = own[:, b, :, written]
            own[:, b, :, aside] = own[:, b, :, slot]
            own[:, b, :, slot] = new
            if retained is not None:
                retained[:, b, :, position] = new
        self._num_drafts += 1
        self.ends = [end + 1 for end in self.ends]
        self._set_lengths()

    def rewind(self, ends: list[int]) -> None:
        kept = [min(max(end, first), now) for end, first, now in zip(ends, self._first_drafts, self.ends, strict=True)]
        back = {}  # a slot that several drafts replaced gets what the first of them found there
        for b, (first, end) in enumerate(zip(self._first_drafts, kept, strict=True)):
            for i in range(end - first, self._num_drafts):
                back.setdefault((b, self._slot(b, first + i)), self.policy.budget + 1 + i)
        self._copy([(b, aside, slot) for (b, slot), aside in back.items()], self)
        self.ends, self._num_drafts, self._first_drafts = kept, 0, kept
        self._set_lengths()

    def _copy(self, moves: list[tuple[int, int, int]], to: KVCache) -> None:
        """stream, slot here, slot there"""
        if moves:
            b, here, there = torch.tensor(moves, device=self.keys.device).unbind(1)
            to.keys[:, b, :, there] = self.keys[:, b, :, here]
            to.values[:, b, :, there] = self.values[:, b, :, here]

    def _set_lengths(self) -> None:
        self.lengths = [self._length(b, end) for b, end in enumerate(self.ends)]


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
