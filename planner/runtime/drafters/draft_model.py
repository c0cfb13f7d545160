"""A smaller model with the target's vocabulary and a cache of its own, full or sparse.

Its keys are its own: those of the prompt come from its own prefill, those of later tokens from reading them under its
policy, as drafts or when they are chosen. A token at position p is read with the set that was chosen at
policy.chosen_at(prompt, p), the budget - F tokens before it, and itself, wherever rounds began: so a text is replayed
in one pass over it for each choice.

Where a refresh falls into a round, its drafts go on with the set that the round began with, and those accepted behind
the refresh are read again with the new one. A round thus depends on where it began through nothing but the set in
force there, and replay passes over draft_len - 1 tokens behind each refresh twice.

When all drafts were accepted, the last one has not been read: the next round's first pass reads it too. That pass is
as wide as the longest such rest of any stream (2 without a refresh) and, where the cache is sparse, masked.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from planner.runtime.drafters.protocol import Draft, Replay, TargetText, TreeReplay, no_draft
from planner.runtime.drafters.self_sparse import queries_of
from planner.runtime.drafters.trees import levels_for, memberships, rolled_out
from planner.runtime.kv_cache import KVCache, OwnKVCache, OwnSparseKVCache, SparseKVCache, additive_mask
from planner.runtime.model import Transformer, prefill
from planner.runtime.sampling import probability_of
from planner.runtime.verify import accept_prob_of
from planner.specs import FullKV, KVPolicy, Sampler, SparseKV, Tree

TOKENS_PER_PASS = 64  # of a replay: bounds its mask and its logits


class Stretch(NamedTuple):
    """Tokens of a text behind one choice of what to keep, read under the policy."""

    cache: KVCache  # with them committed
    num_fixed: int  # slots of the chosen set
    first: int  # position in the slot behind it, the others following
    hidden: Tensor  # [n, C] at the tokens that were read


class DraftModelDrafter:
    taps = ()

    def __init__(self, model: Transformer, policy: KVPolicy, vocab_size: int, *, draft_len: int, batch: int, tree: Tree | None = None):
        """vocab_size is the target's: published pairs pad theirs differently."""
        self.model, self.policy, self.vocab_size, self.draft_len, self._batch = model, policy, vocab_size, draft_len, batch
        self.cache: OwnKVCache | OwnSparseKVCache | None = None  # made at start, which knows how many tokens there may be
        self._tree = tree
        self._begins: list[int] = []  # position of the first draft of the round
        self._chain: Tensor | None = None  # [B, K], its drafts, those that have siblings included
        self._context_lens: list[int] = []
        self._chosen_at: list[int] = []

    @property
    def nbytes(self) -> int:
        return self.model.nbytes + (0 if self.cache is None else self.cache.nbytes)

    def start(self, target_cache: KVCache, histories: list[list[int]]) -> None:
        model, options = self.model, {"batch": self._batch, "dtype": self.model.dtype, "device": self.model.device}
        self._context_lens = [len(history) for history in histories]
        self._chosen_at = list(self._context_lens)
        if isinstance(self.policy, FullKV):
            self.cache = retained = OwnKVCache(model.spec, capacity=target_cache.capacity, **options)
        else:
            self.cache, retained = OwnSparseKVCache(model.spec, self.policy, draft_len=self.draft_len, **options), None
            if self.policy.storage == "retain":
                self.cache.all = retained = model.new_cache(target_cache.capacity, self._batch)
        for b, history in enumerate(histories):
            source = model.new_cache(len(history)) if retained is None else retained.stream(b)
            prefill(model, self._readable(torch.tensor([history], device=model.device)), source)
            if isinstance(self.policy, FullKV):
                self.cache.lengths[b] = len(history)
            else:
                self._choose(b, history, len(history), source)

    def propose(self, histories: list[list[int]], draft_lens: list[int], sampler: Sampler, generators: list[torch.Generator]) -> Draft:
        B, K = len(histories), max(draft_lens)
        device = self.model.device
        self._begins, self._chain = [len(history) for history in histories], torch.zeros(B, 0, dtype=torch.long, device=device)
        levels = levels_for(self._tree, sampler, generators, self.draft_len)
        if K == 0:
            return no_draft(B, self.vocab_size, device)
        position = torch.tensor([len(history) - 1 for history in histories], device=device)
        hidden = self._catch_up(histories)
        self.cache.expect_drafts(K - 1)
        drafted = []
        for i in range(K):
            drafted.append(levels.add(self._logits(hidden)))
            if i + 1 < K:
                hidden = self.model(self._readable(drafted[-1][:, None]), position[:, None] + i + 1, self.cache).hidden[:, 0]
                self.cache.keep_draft()
        self._chain = torch.stack(drafted, 1)
        return levels.draft(draft_lens)

    def commit(self, target_cache: KVCache, histories: list[list[int]], counts: list[int]) -> None:
        refresh = None if isinstance(self.policy, FullKV) else self.policy.refresh
        ends = [len(history) - 1 for history in histories]  # the last token of a history is the next round's first input
        if self._tree is not None:  # the history may have gone on with a sibling of what was read
            ends = [
                min(end, begin + _common(history[begin:], drafts))
                for end, history, begin, drafts in zip(ends, histories, self._begins, self._chain.tolist(), strict=True)
            ]
        if refresh is not None:
            ends = [min(end, chosen_at + refresh) for end, chosen_at in zip(ends, self._chosen_at, strict=True)]
        self.cache.rewind(ends)

    @torch.inference_mode()
    def replay(self, text: TargetText, draft_len: int) -> Replay:
        """Teacher-forced: reading token s judges the drafter on token s+1."""
        T, L, K = len(text.tokens), len(text.prompt), draft_len
        own, end = self._prompt_cache(text), len(text.prompt) + len(text.tokens) - 1  # the last token is read by nobody
        tokens = torch.tensor(text.prompt + text.tokens, device=self.model.device)
        accept_prob = np.zeros((T - 1, K), dtype=np.float32)
        for committed in self._stretches(L, end):
            read = range(committed[0], min(committed[-1] + K, end))
            hidden = self._read(text, own, read, len(committed)).hidden
            judged_on = torch.arange(read.start, read.stop, device=tokens.device) + 1
            parts = zip(hidden.split(TOKENS_PER_PASS), judged_on.split(TOKENS_PER_PASS), strict=True)
            q = torch.cat([probability_of(self._logits(part), tokens[on], text.sampler) for part, on in parts])
            w = np.pad(accept_prob_of(text.token_probs[judged_on - 1 - L], q).cpu().numpy(), (0, K))
            accept_prob[committed[0] - L : committed[-1] + 1 - L] = np.lib.stride_tricks.sliding_window_view(w, K)[: len(committed)]
        return Replay(accept_prob, np.full(T - 1, K))

    @torch.inference_mode()
    def replay_trees(self, text: TargetText, draft_lens: Sequence[int], max_size: int) -> list[TreeReplay]:
        """Level 0 comes from reading the text; the others from tokens of each round's own, all rounds of a pass side by side."""
        K, own, found = max(draft_lens), self._prompt_cache(text), []

        def rolled(stretch: Stretch, starts: Tensor, hidden: Tensor) -> tuple[np.ndarray, np.ndarray]:
            cache, length = stretch.cache, stretch.cache.lengths[0]

            def step(level: int, read: Tensor | None) -> Tensor:
                if level == 0:
                    return self._logits(hidden)
                mask = additive_mask(self._visible_to_drafts(stretch, starts, level), cache.keys.dtype)[None, None]
                drafted = self.model(self._readable(read)[None], (starts + level)[None], cache, mask).hidden[0]
                cache.commit([len(starts)])
                return self._logits(drafted)

            result = rolled_out(step, K, text.sampler, max_size)
            cache.truncate(length)
            return result

        for committed in self._stretches(len(text.prompt), len(text.prompt) + len(text.tokens) - 1):
            stretch = self._read(text, own, committed, len(committed), room=(K - 1) * min(TOKENS_PER_PASS, len(committed)))
            positions = torch.arange(committed.start, committed.stop, device=self.model.device)
            parts = zip(positions.split(TOKENS_PER_PASS), stretch.hidden.split(TOKENS_PER_PASS), strict=True)
            found += [rolled(stretch, starts, hidden) for starts, hidden in parts]
        return memberships(found, text.tokens, draft_lens, max_size, "chain")

    def _catch_up(self, histories: list[list[int]]) -> Tensor:  # [B, hidden_size]
        """Read what is new in the histories; the hidden states at their last tokens."""
        device, ends = self.model.device, self.cache.ends
        pieces = [self._pieces(b, range(ends[b], len(history))) for b, history in enumerate(histories)]
        for number in range(-max(1, *map(len, pieces)), 0):  # all streams end with the last pass
            work = [own[number] if len(own) >= -number else range(0) for own in pieces]  # a stream without work is padded, as one that has ended is
            for b, piece in enumerate(work):
                if piece and self._set_at(b, piece.start) != self._chosen_at[b]:
                    self._choose(b, histories[b], piece.start, self.cache.all.stream(b))
            n = max(1, *map(len, work))
            tokens = [[histories[b][p] for p in piece] + [0] * (n - len(piece)) for b, piece in enumerate(work)]
            positions = torch.tensor(self.cache.ends, device=device)[:, None] + torch.arange(n, device=device)
            tokens = self._readable(torch.tensor(tokens, device=device))
            hidden = self.model(tokens, positions, self.cache, self.cache.window_mask(n)).hidden
            self.cache.keep([len(piece) for piece in work])
        last = torch.tensor([max(0, len(piece) - 1) for piece in work], device=device)
        return hidden[torch.arange(len(work), device=device), last]

    def _pieces(self, b: int, positions: range) -> list[range]:
        """Positions by the set they are read with."""
        runs = [list(run) for _, run in groupby(positions, key=lambda position: self._set_at(b, position))]
        return [range(run[0], run[-1] + 1) for run in runs]

    def _set_at(self, b: int, position: int) -> int:
        return self._context_lens[b] if isinstance(self.policy, FullKV) else self.policy.chosen_at(self._context_lens[b], position)

    def _choose(self, b: int, history: list[int], end: int, source: KVCache) -> None:
        """source  one stream that holds the first `end` tokens"""
        self.cache.choose(source, b, end, queries_of(self.model, self._readable_ids(history), source, 0, end))
        self._chosen_at[b] = end

    def _stretches(self, begin: int, end: int) -> Iterator[range]:
        """Positions of a text by the set that rounds behind them draft with."""
        return iter([range(begin, end)]) if isinstance(self.policy, FullKV) else self.policy.choices(begin, end)

    def _read(self, text: TargetText, own: KVCache, read: range, num_committed: int, room: int = 0) -> Stretch:
        """Read tokens of a text, with room in the cache for others. Of their keys, `own` gets those of the first num_committed."""
        device, policy = self.model.device, self.policy
        history = text.prompt + text.tokens
        cache, num_fixed, first = own, 0, 0
        if isinstance(policy, SparseKV):
            cache = SparseKVCache(self.model.spec, policy, draft_len=len(read) + room, batch=1, dtype=self.model.dtype, device=device)
            cache.select(own, 0, read.start, queries_of(self.model, self._readable_ids(history), own, 0, read.start))
            num_fixed = policy.num_fixed(read.start)
            first = read.start - (cache.lengths[0] - num_fixed)
        elif room:
            cache = self.model.new_cache(own.capacity + room)
            cache.take(own, read.start)
        begin, tokens, outputs = cache.lengths[0], torch.tensor(history, device=device), []
        for positions in torch.arange(read.start, read.stop, device=device).split(TOKENS_PER_PASS):
            mask, n = None, len(positions)
            if isinstance(policy, SparseKV):
                held = first + torch.arange(cache.lengths[0] + n - num_fixed, device=device)
                window = (held <= positions[:, None]) & (held >= positions[:, None] - (policy.budget - num_fixed))  # [n, held]
                mask = additive_mask(torch.cat([window.new_ones(n, num_fixed), window], 1), cache.keys.dtype)[None, None]
            outputs.append(self.model(self._readable(tokens[positions])[None], positions[None], cache, mask).hidden[0])
            cache.commit([n])
        if isinstance(policy, SparseKV):
            committed = slice(read.start, read.start + num_committed)
            own.keys[:, 0, :, committed] = cache.keys[:, 0, :, begin : begin + num_committed]
            own.values[:, 0, :, committed] = cache.values[:, 0, :, begin : begin + num_committed]
            own.lengths = [committed.stop]
        return Stretch(cache, num_fixed, first, torch.cat(outputs))

    def _visible_to_drafts(self, stretch: Stretch, starts: Tensor, level: int) -> Tensor:  # [S, slots + S] bool
        """What rounds behind the tokens at `starts` [S] see at a level, their earlier drafts lying level by level behind the text."""
        S, num_fixed = len(starts), stretch.num_fixed
        ring = stretch.cache.capacity if isinstance(self.policy, FullKV) else self.policy.budget - num_fixed
        held = stretch.first + torch.arange(stretch.cache.lengths[0] - (level - 1) * S - num_fixed, device=starts.device)
        window = (held <= starts[:, None]) & (held >= starts[:, None] + level - ring)
        own = torch.eye(S, dtype=torch.bool, device=starts.device)
        drafts = [own if earlier >= level - ring else ~own & own for earlier in range(1, level + 1)]
        return torch.cat([window.new_ones(S, num_fixed), window, *drafts], 1)

    def _prompt_cache(self, text: TargetText) -> KVCache:
        """A full cache with the prompt committed and room for the text; what an earlier policy wrote behind it is overwritten."""
        prompt = text.prompt
        if self.model not in text.prompt_caches:
            cache = self.model.new_cache(len(prompt) + len(text.tokens) - 1)
            prefill(self.model, self._readable(torch.tensor([prompt], device=self.model.device)), cache)
            text.prompt_caches[self.model] = cache
        cache = text.prompt_caches[self.model]
        cache.truncate(len(prompt))
        return cache

    def _logits(self, hidden: Tensor) -> Tensor:
        """Over the target's vocabulary: padding is cut, or filled up with tokens that are never drafted."""
        logits = self.model.logits(hidden)
        return functional.pad(logits, (0, self.vocab_size - logits.shape[-1]), value=-torch.inf)

    def _readable(self, tokens: Tensor) -> Tensor:
        """A target may write an id of its padding that this model has no row for; what it reads instead costs acceptance only."""
        return tokens.clamp(max=self.model.spec.vocab_size - 1)

    def _readable_ids(self, history: list[int]) -> list[int]:
        return [min(token, self.model.spec.vocab_size - 1) for token in history]


def _common(tokens: list[int], others: list[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (one, other) in enumerate(zip(tokens, others)) if one != other), min(len(tokens), len(others)))
