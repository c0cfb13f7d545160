"""Who computes what in the next engine step: continuous batching with chunked prefill over paged KV. No clock, no randomness.

As vLLM's V1 scheduler does it (vllm/v1/core/sched/scheduler.py): a step has a token budget. Requests that decode come first, with
draft_len + 1 tokens each; what is left goes to prompts in the order they came, the last one cut where the budget ends. A prompt is
admitted when blocks for all of it are free (scheduler_reserve_full_isl). A decode that finds no block takes those of the youngest
request, which goes back to the head of the queue and is computed again; a step that preempts admits nobody. Blocks that are given
back keep what they hold until they are needed, least recently used first, and within a request its end first.

Unlike there, shared prefixes are kept and evicted in whole hashes (512 tokens), and a request that could not run to its end alone is
refused at once; vLLM does not start with such a model length.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from planner.errors import BadInput
from planner.simulator.workload import HASHED_TOKENS


@dataclass(frozen=True, kw_only=True)
class KVRoom:
    """The paged memory of keys and values."""

    blocks: int
    block_tokens: int = 16
    blocks_per_request: int = 0  # a request's own, whatever its length: a drafter's cache of fixed size, recurrent state

    def __post_init__(self):
        if not (1 <= self.block_tokens <= 2**20 and 1 <= self.blocks <= 2**40 and 0 <= self.blocks_per_request <= self.blocks):
            raise BadInput(f"a KV pool has 1 or more blocks of 1 or more tokens, got {self}")

    @classmethod
    def of_bytes(cls, memory_bytes: float, *, bytes_per_token: float, bytes_per_request: float = 0.0, block_tokens: int = 16) -> "KVRoom":
        """What fits into memory.

        bytes_per_token    of the target's KV, and of the drafter's where that grows with the text
        bytes_per_request  of a drafter's KV of fixed size (its kv budget and draft slots)
        """
        if not (0 < bytes_per_token < np.inf and 0 <= bytes_per_request < np.inf and memory_bytes < np.inf):
            raise BadInput(f"KV bytes per token must be above 0, got {bytes_per_token} and {bytes_per_request} per request")
        block_bytes = block_tokens * bytes_per_token
        if memory_bytes < block_bytes:
            raise BadInput(f"a KV pool must hold a block ({block_bytes:.0f} bytes), got {memory_bytes:.0f} bytes")
        return cls(
            blocks=int(memory_bytes // block_bytes), block_tokens=block_tokens, blocks_per_request=int(np.ceil(bytes_per_request / block_bytes))
        )

    @property
    def tokens(self) -> int:
        return self.blocks * self.block_tokens


@dataclass(frozen=True, kw_only=True)
class Batching:
    """An engine's limits of a step. The defaults are vLLM's on a large GPU."""

    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256  # requests that run at once
    prefix_caching: bool = True

    def __post_init__(self):
        if not (1 <= self.max_num_batched_tokens <= 2**30 and 1 <= self.max_num_seqs <= 2**20):
            raise BadInput(f"a step holds 1 or more tokens and requests, got {self}")


class Sequence:
    """A request's place in the scheduler."""

    __slots__ = ("blocks", "computed", "drafted", "goal", "hashes", "held", "index", "input_len", "length", "own_full", "preemptions", "reused",
                 "round_tokens", "rounds", "text", "whole")  # fmt: skip

    def __init__(self, index: int, input_len: int, output_len: int, hashes: tuple[int, ...] = (), text: int = 0):
        """text  where the request's output begins among those of all requests"""
        self.index, self.input_len, self.text = index, input_len, text
        self.length = input_len  # tokens that are known: the prompt and what was generated; current while it does not decode
        self.goal = input_len + output_len  # its length at the end
        self.hashes = hashes
        self.whole = min(len(hashes), input_len // HASHED_TOKENS)  # hashes that stand for HASHED_TOKENS of the prompt
        self.computed = 0  # tokens of which keys and values are there; while it is prefilled
        self.blocks = 0  # held, those of shared prefixes included; current while it does not decode
        self.held: list[int] = []  # hashes whose blocks it uses
        self.own_full = 0  # whole blocks behind the hashed ones that it gave back when it was preempted
        self.preemptions = 0
        self.reused = 0  # tokens that it found in the cache
        self.rounds = self.round_tokens = self.drafted = 0  # rounds it took, what came of them, what was drafted in them; while it does not decode


class Chunk(NamedTuple):
    sequence: Sequence
    tokens: int  # computed in this step
    before: int  # computed earlier


class StepPlan(NamedTuple):
    num_decoding: int  # the first so many of those that decode
    chunks: list[Chunk]
    preempted: bool  # somebody was, and nobody admitted


class Decoding:
    """Those that decode, oldest first, as columns."""

    def __init__(self):
        self.sequences: list[Sequence] = []
        self._set(np.zeros((8, 0), dtype=np.int64))

    def _set(self, columns: np.ndarray) -> None:
        self._columns = columns
        self.index, self.length, self.goal, self.blocks, self.rounds, self.drafted, self._joined = columns[:7]
        self.text = columns[7]  # where position 0 of the prompt would stand among all requests' outputs

    def join(self, arrived: list[Sequence]) -> None:
        rows = np.array([(s.index, s.length, s.goal, s.blocks, 0, 0, s.length, s.text - s.input_len) for s in arrived], dtype=np.int64)
        self._set(np.concatenate([self._columns, rows.T], axis=1))
        self.sequences += arrived

    def leave(self, which: np.ndarray) -> list[Sequence]:
        """Take out those of a mask [n]."""
        gone = np.flatnonzero(which)
        left = [self.sequences[i] for i in gone]
        for sequence, (_, length, _, blocks, rounds, drafted, joined, _) in zip(left, self._columns[:, gone].T.tolist(), strict=True):
            sequence.length, sequence.blocks = length, blocks
            sequence.rounds += rounds
            sequence.drafted += drafted
            sequence.round_tokens += length - joined
        for i in gone[::-1].tolist():
            del self.sequences[i]
        self._set(self._columns[:, ~which])
        return left


class Scheduler:
    """One engine's queue, running requests and blocks."""

    def __init__(self, room: KVRoom, batching: Batching):
        if batching.prefix_caching and HASHED_TOKENS % room.block_tokens:
            raise BadInput(f"with prefix caching the tokens of a block must divide {HASHED_TOKENS}, got {room.block_tokens}")
        self.room, self.batching = room, batching
        self.waiting: deque[Sequence] = deque()
        self.partial: Sequence | None = None  # whose prompt is partly computed: at most one, and the youngest
        self.decoding = Decoding()
        self._free = room.blocks  # that hold nothing of use
        self._kept: OrderedDict[int, int] = (
            OrderedDict()
        )  # unused blocks that keep their content: how many by hash, or by -1 - index of their request
        self._num_kept = 0
        self._users: dict[int, int] = {}  # by hash whose blocks are there: requests that use them
        self._hash_blocks = HASHED_TOKENS // room.block_tokens

    @property
    def num_running(self) -> int:
        return len(self.decoding.sequences) + (self.partial is not None)

    @property
    def available_blocks(self) -> int:
        return self._free + self._num_kept

    @property
    def used_blocks(self) -> int:
        return self.room.blocks - self.available_blocks

    def fits(self, input_len: int, output_len: int, max_draft_len: int) -> bool:
        """Whether a request could run to its end alone."""
        return self._blocks_of(input_len + output_len + max_draft_len) + self.room.blocks_per_request <= self.room.blocks

    def add(self, sequence: Sequence) -> None:
        """Queue a request that fits()."""
        self.waiting.append(sequence)

    def schedule(self, draft_len: int) -> StepPlan:
        """What the next step computes; takes the blocks for it. A chunk counts as computed from here on."""
        budget = self.batching.max_num_batched_tokens
        running = self.num_running
        num_decoding = self._make_room(min(len(self.decoding.sequences), budget // (1 + draft_len)), draft_len)
        preempted = self.num_running < running
        budget -= num_decoding * (1 + draft_len)
        chunks = []
        if self.partial is not None and budget > 0:
            budget -= self._extend(self.partial, budget, chunks)
        running = self.num_running
        while budget > 0 and self.waiting and not preempted and running < self.batching.max_num_seqs and self._admit(self.waiting[0]):
            self.partial = self.waiting.popleft()
            running += 1
            budget -= self._extend(self.partial, budget, chunks)
        return StepPlan(num_decoding, chunks, preempted)

    def complete(self, plan: StepPlan) -> list[Sequence]:
        """The step is over: those whose last chunk it was have one more token and decode from now on, finished ones excepted, which are returned."""
        done = [chunk.sequence for chunk in plan.chunks if chunk.sequence.computed == chunk.sequence.length]
        for sequence in done:
            sequence.length += 1
        if done and done[-1] is self.partial:
            self.partial = None
        if arrived := [s for s in done if s.length < s.goal]:
            self.decoding.join(arrived)
        finished = [s for s in done if s.length == s.goal]
        for sequence in finished:
            self._release(sequence)
        return finished

    def finish(self) -> list[Sequence]:
        """Those that decode and have reached their goal leave."""
        left = self.decoding.leave(self.decoding.length >= self.decoding.goal)
        for sequence in left:
            self._release(sequence)
        return left

    def growth(self, length: np.ndarray, draft_len: int) -> np.ndarray:
        """[n] blocks that the first n of those that decode lack for a step from these lengths."""
        return np.maximum(-(-(length + draft_len) // self.room.block_tokens) - self.decoding.blocks[: len(length)], 0)

    def grow(self, more: np.ndarray) -> None:
        """Give the first n of those that decode as many blocks each; they must be available."""
        total = int(more.sum())
        if total:
            self.decoding.blocks[: len(more)] += more
            self._take(total)

    def _make_room(self, num_decoding: int, draft_len: int) -> int:
        """Blocks for a step of the first so many; returns how many are left of them after preemption."""
        if not num_decoding:
            return 0
        more = self.growth(self.decoding.length[:num_decoding], draft_len)
        if more.sum() <= self.available_blocks:
            self.grow(more)
            return num_decoding
        i = 0
        while i < min(num_decoding, len(self.decoding.sequences)):
            if more[i] <= self.available_blocks:
                self.decoding.blocks[i] += more[i]
                self._take(int(more[i]))
                i += 1
            else:
                self._preempt_youngest()
        return i

    def _preempt_youngest(self) -> None:
        if self.partial is not None:
            youngest, self.partial = self.partial, None
        else:
            last = np.zeros(len(self.decoding.sequences), dtype=bool)
            last[-1] = True
            [youngest] = self.decoding.leave(last)
            youngest.computed = youngest.length - 1
        youngest.own_full = max(0, youngest.computed // self.room.block_tokens - youngest.whole * self._hash_blocks)
        youngest.preemptions += 1
        self._release(youngest)
        self.waiting.appendleft(youngest)

    def _extend(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Compute more of a prompt; returns the tokens."""
        tokens, before = min(budget, sequence.length - sequence.computed), sequence.computed
        chunks.append(Chunk(sequence, tokens, before))
        sequence.computed += tokens
        if self.batching.prefix_caching:
            for key in sequence.hashes[before // HASHED_TOKENS : min(sequence.computed // HASHED_TOKENS, sequence.whole)]:
                if key not in self._users:  # else another request computed the same meanwhile, and this one keeps its own
                    self._users[key] = 1
                    sequence.held.append(key)
        return tokens

    def _admit(self, sequence: Sequence) -> bool:
        """Take the blocks for all known tokens of a request, found ones first, if that many are available."""
        found, own = self._find(sequence)
        unused = own + self._hash_blocks * sum(self._users[key] == 0 for key in set(found))
        total = self._blocks_of(sequence.length)
        lacking = total - self._hash_blocks * len(found) - own + self.room.blocks_per_request
        if lacking > self.available_blocks - unused:
            return False
        for key in found:
            if self._users[key] == 0:
                self._num_kept -= self._kept.pop(key)
            self._users[key] += 1
        if kept := self._kept.pop(-1 - sequence.index, 0):
            self._num_kept -= kept
            self._free += kept - own
        self._take(lacking)
        sequence.held, sequence.blocks = found, total
        sequence.computed = len(found) * HASHED_TOKENS + own * self.room.block_tokens
        sequence.reused += sequence.computed
        return True

    def _find(self, sequence: Sequence) -> tuple[list[int], int]:
        """Hashes from the start of the prompt whose blocks are there, and the whole blocks behind them that are still its own.

        One token at least is left to compute: its logits are needed.
        """
        found = []
        for key in sequence.hashes[: min(sequence.whole, (sequence.length - 1) // HASHED_TOKENS)] if self.batching.prefix_caching else ():
            if key not in self._users:
                break
            found.append(key)
        if len(found) < sequence.whole:
            return found, 0
        left = (sequence.length - 1) // self.room.block_tokens - len(found) * self._hash_blocks
        return found, min(self._kept.get(-1 - sequence.index, 0), sequence.own_full, left)

    def _release(self, sequence: Sequence) -> None:
        """Give all blocks back."""
        own = sequence.blocks - len(sequence.held) * self._hash_blocks
        self._free += self.room.blocks_per_request
        if not self.batching.prefix_caching:
            self._free += own
        elif own:
            self._keep(-1 - sequence.index, own)
        for key in reversed(sequence.held):
            self._users[key] -= 1
            if self._users[key] == 0:
                self._keep(key, self._hash_blocks)
        sequence.blocks, sequence.held = 0, []

    def _keep(self, key: int, blocks: int) -> None:
        self._kept[key] = self._kept.pop(key, 0) + blocks
        self._num_kept += blocks

    def _take(self, blocks: int) -> None:
        """Use so many blocks, those that hold nothing first."""
        while self._free < blocks:
            key, kept = self._kept.popitem(last=False)
            if key < 0 and kept > blocks - self._free:  # a request's own go from its end, one by one
                self._kept[key] = kept - (blocks - self._free)
                self._kept.move_to_end(key, last=False)
                kept = blocks - self._free
            elif key >= 0:
                del self._users[key]
            self._num_kept -= kept
            self._free += kept
        self._free -= blocks

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.room.block_tokens)
