"""Key-value caches: append drafts, commit what was accepted, forget the rest.

A forward pass writes its new tokens behind each stream's length and does not move it; `commit` does. What was not
committed is overwritten by the next pass, so rolling back costs nothing.

B  streams     H  KV heads     D  head_dim     n  new tokens of one pass     C  hidden_size
"""

import torch
from torch import Tensor

from planner.runtime import kv_select
from planner.specs import ModelSpec, SparseKV


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

    def select(self, target: KVCache, stream: int, end: int, queries: kv_select.Queries) -> None:
        """Choose and copy what to keep of the target's first `end` tokens, and take over the committed ones behind them."""
        b = stream
        fixed = kv_select.select(self.policy, target.keys[:, b, :, :end], queries)  # [layers, H, F]
        F = fixed.shape[-1]
        index = fixed[..., None].expand(-1, -1, -1, self.keys.shape[-1])
        recent = min(self.policy.budget - F, end - F)
        for own, theirs in ((self.keys, target.keys), (self.values, target.values)):
            own[:, b, :, :F] = theirs[:, b].gather(2, index)
            own[:, b, :, F : F + recent] = theirs[:, b, :, end - recent : end]
        self._num_fixed[b], self._ring_start[b] = F, end - recent
        self.lengths[b] = F + recent
        self.slide(target, stream, target.lengths[b] - end)

    def slide(self, target: KVCache, stream: int, count: int) -> None:
        """Take over the `count` tokens that the target committed last, with its exact keys and values."""
        b, F = stream, self._num_fixed[stream]
        ring = self.policy.budget - F
        end = target.lengths[b]
        begin = end - min(count, ring)
        slots = torch.tensor([F + (p - self._ring_start[b]) % ring for p in range(begin, end)], device=self.keys.device, dtype=torch.long)
        self.keys[:, b, :, slots] = target.keys[:, b, :, begin:end]
        self.values[:, b, :, slots] = target.values[:, b, :, begin:end]
        self.lengths[b] = F + min(ring, end - self._ring_start[b])


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
