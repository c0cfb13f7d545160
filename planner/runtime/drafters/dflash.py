"""DFlash (arXiv:2602.06036): one pass of a head over the last token and masks behind it drafts a whole block.

The cache holds the contexts of committed tokens, made of the target's hidden states; the block's own keys and values end
with the round. Positions of a block are drawn independently of each other, each from its own distribution, so
rejection sampling of a chain is exact, and every prefix of candidates has the product of its probabilities, which is
what a tree is made of (DDTree, arXiv:2604.12989). All follow from where the round began, which the replay goes through.

A block is always as long as the head was trained for, and a round drafts the first draft_len of it, at most
block_size - 1, so that a replay at one length serves all shorter ones. Published code shortens the block instead.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from planner.runtime.dflash_head import DFlashHead, blocks_mask
from planner.runtime.drafters.protocol import Draft, Replay, TargetText, TreeReplay, no_draft
from planner.runtime.drafters.trees import candidates, draft_tree, memberships
from planner.runtime.kv_cache import Ancestors, KVCache, OwnKVCache, OwnSparseKVCache
from planner.runtime.model import PREFILL_CHUNK
from planner.runtime.sampling import probabilities, probability_of, sample, uniforms
from planner.runtime.verify import accept_prob_of
from planner.specs import FullKV, KVPolicy, Sampler, SparseKV, Tree

STARTS_PER_PASS = 16  # rounds replayed in one forward pass, block_size rows each: bounds its mask and its logits


class DFlashDrafter:
    def __init__(self, head: DFlashHead, policy: KVPolicy, *, draft_len: int, batch: int, weights_bytes: int, tree: Tree | None = None):
        """weights_bytes: what the head does not share with the target."""
        self.head, self.policy, self.taps, self.draft_len, self._weights_bytes = head, policy, head.taps, draft_len, weights_bytes
        self._batch, self._tree = batch, tree
        self.cache: OwnKVCache | OwnSparseKVCache | None = None  # made at start, which knows how many tokens there may be
        self._target_cache: KVCache | None = None

    @property
    def nbytes(self) -> int:
        return self._weights_bytes + (0 if self.cache is None else self.cache.nbytes)

    def start(self, target_cache: KVCache, histories: list[list[int]]) -> None:
        target_cache.check_keeps(self.taps)
        head, options = self.head, {"batch": self._batch, "dtype": self.head.dtype, "device": self.head.device}
        if isinstance(self.policy, FullKV):
            self.cache = OwnKVCache(head.spec, capacity=target_cache.capacity + head.block_size, **options)
        else:
            self.cache = OwnSparseKVCache(head.spec, self.policy, draft_len=head.block_size - 1, **options)
        self._target_cache = target_cache
        for b, history in enumerate(histories):
            self._inject(self.cache.stream(b), target_cache.stream(b), self.cache.kept(len(history)))
            self.cache.started(b, len(history))

    def propose(self, histories: list[list[int]], draft_lens: list[int], sampler: Sampler, generators: list[torch.Generator]) -> Draft:
        B, K = len(histories), min(max(draft_lens), self.head.block_size - 1)
        levels = [min(K, n) for n in draft_lens]
        self._read(histories)
        if self._tree is not None and K:
            return draft_tree(*candidates(self._logits(histories, K), sampler, self._tree.max_size), levels, self._tree, "all")
        uniform = uniforms(generators, self.draft_len)  # as many whatever is drafted: neighbours must not change what a stream draws
        if K == 0:
            return no_draft(B, self.head.spec.vocab_size, self.head.device)
        probs = probabilities(self._logits(histories, K), sampler)
        tokens = sample(probs.flatten(0, 1), uniform[:, :K].flatten()).view(B, K)
        return Draft(tokens, probs, levels)

    def commit(self, target_cache: KVCache, histories: list[list[int]], counts: list[int]) -> None:
        pass  # the next proposal reads the histories, and the hidden states that the target has left in its cache

    @torch.inference_mode()
    def replay(self, text: TargetText, draft_len: int) -> Replay:
        """Every round of a text from the pass that would have drafted it: draft j behind token s is judged on token s+1+j."""
        T, K = len(text.tokens), min(draft_len, self.head.block_size - 1)
        accept_prob = np.zeros((T - 1, draft_len), dtype=np.float32)
        tokens = torch.tensor(text.tokens, device=self.head.device)
        for starts, logits in self._replayed(text, K):
            behind = starts[:, None] + 1 + torch.arange(K, device=starts.device)  # [S, K] index of the token that each is judged on
            inside = behind < T
            behind = behind.clamp(max=T - 1).flatten()
            q = probability_of(logits.flatten(0, 1), tokens[behind], text.sampler)
            w = accept_prob_of(text.token_probs[behind - 1], q).view(inside.shape) * inside
            accept_prob[starts.tolist(), :K] = w.cpu().numpy()
        return Replay(accept_prob, np.full(T - 1, K))

    @torch.inference_mode()
    def replay_trees(self, text: TargetText, draft_lens: Sequence[int], max_size: int) -> list[TreeReplay]:
        """The same rounds, as trees of the candidates at each position."""
        levels = [min(draft_len, self.head.block_size - 1) for draft_len in draft_lens]
        rolled = [tuple(part.cpu().numpy() for part in candidates(logits, text.sampler, max_size)) for _, logits in self._replayed(text, max(levels))]
        found = memberships(rolled, text.tokens, levels, max_size, "all")
        return [
            TreeReplay(np.pad(own.sizes, ((0, 0), (0, draft_len - own.sizes.shape[1]))), own.probs)
            for own, draft_len in zip(found, draft_lens, strict=True)
        ]

    def _logits(self, histories: list[list[int]], K: int) -> Tensor:
        """What the head says of the K tokens behind each history, all but its last read: [B, K, V]."""
        head, n, B = self.head, self.head.block_size, len(histories)
        last = torch.tensor([history[-1] for history in histories], device=head.device)
        first = torch.tensor([len(history) - 1 for history in histories], device=head.device)
        whole = Ancestors(torch.ones(B, n, n, dtype=torch.bool, device=head.device))
        hidden = head(head.blocks(last), first[:, None] + torch.arange(n, device=head.device), self.cache, whole)
        return head.logits(hidden[:, 1 : K + 1])

    def _read(self, histories: list[list[int]]) -> None:
        """Commit the contexts of what the target has committed since the last round."""
        cache, target_cache, device = self.cache, self._target_cache, self.head.device
        counts = [len(history) - 1 - end for history, end in zip(histories, cache.ends, strict=True)]  # 0 where a stream has ended
        if n := max(counts):
            positions = torch.tensor(cache.ends, device=device)[:, None] + torch.arange(n, device=device)
            positions = positions.clamp(max=target_cache.capacity - 1)  # of streams with fewer, which do not keep the rest
            self.head.inject(target_cache.features_at(positions, self.taps), positions, cache)
            cache.keep(counts)

    def _replayed(self, text: TargetText, K: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Starts [S] and the logits [S, K, V] of their rounds, some at a time."""
        T, L, n, device = len(text.tokens), len(text.prompt), self.head.block_size, self.head.device
        num_contexts = L + T - 2
        cache = KVCache(
            self.head.spec, batch=1, capacity=num_contexts + n * min(STARTS_PER_PASS, T - 1), dtype=self.head.dtype, device=device
        )  # fmt: skip
        slot = torch.arange(num_contexts, device=device)
        self._inject(cache, text.cache, slot)
        tokens = torch.tensor(text.tokens, device=device)
        for starts in torch.arange(T - 1, device=device).split(STARTS_PER_PASS):
            committed = (L + starts)[:, None]  # [S, 1]
            sees = slot < committed  # [S, num_contexts]
            if isinstance(self.policy, SparseKV):
                fixed = self.policy.num_fixed(L)
                sees = sees & ((slot < fixed) | (slot >= committed - (self.policy.budget - fixed)))
            mask = blocks_mask(sees, n, cache.keys.dtype)
            blocks, positions = self.head.blocks(tokens[starts]), committed + torch.arange(n, device=device)
            hidden = self.head(blocks.view(1, -1), positions.view(1, -1), cache, mask).view(len(starts), n, -1)
            yield starts, self.head.logits(hidden[:, 1 : K + 1])

    def _inject(self, cache: KVCache, target_cache: KVCache, positions: Tensor) -> None:
        """Commit contexts of one stream's tokens at these positions, in as many slots."""
        for part in positions.split(PREFILL_CHUNK):
            if len(part):  # an empty tensor splits into itself
                self.head.inject(target_cache.features_at(part[None], self.taps), part[None], cache)
                cache.commit([len(part)])
