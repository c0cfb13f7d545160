"""What can be planned, as values: models, devices, KV policies, drafters, configurations, workloads.

Frozen and checked once, where they are made. Sizes are bytes, times are seconds, lengths are tokens.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from planner.errors import BadInput

Count = Annotated[int, Meta(ge=1, le=2**40)]
Size = Annotated[int, Meta(ge=0, le=2**60)]  # bytes
DraftLen = Annotated[int, Meta(ge=0, le=1024)]
MAX_TREE_SIZE = 1024
TreeSize = Annotated[int, Meta(ge=1, le=MAX_TREE_SIZE)]  # nodes, the root excluded
Probability = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0, le=1e15)]
Factor = Annotated[float, Meta(ge=1, le=1e6)]  # how much longer a text may be
Architecture = Literal["llama", "mistral", "qwen2", "qwen3"]
DType = Literal["float32", "float16", "bfloat16"]
Weights = Literal["full", "int8", "int4"]  # full: in the dtype the model was loaded in
Execution = Literal["eager", "native", "cuda_graphs"]
Objective = Literal["e2e", "tpot", "price", "throughput", "goodput"]
MAX_PRICE = 1e9
Price = Annotated[float, Meta(gt=0, le=MAX_PRICE)]  # of a device-hour, in any currency

OBJECTIVES: dict[Objective, str] = {  # the first three are minimised, the others maximised
    "e2e": "end-to-end time",
    "tpot": "time per token",
    "price": "price per token",
    "throughput": "tokens/s of all requests",
    "goodput": "tokens/s within the limits of --goodput",
}

Selection = Literal["window", "chunk", "snapkv", "retrieval"]
Storage = Literal["retain", "evict"]

CHUNK_SIZE = 8  # BudgetDraft and TriForce both use 8
CHUNKED = ("chunk", "retrieval")
OBSERVATION = 32  # tokens whose attention SnapKV looks at; its paper uses 16 to 64

BYTES_PER_ELEMENT: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A frozen value that JSON can hold; unknown fields and wrong types are refused when it is read."""


def checked(value):
    """The value itself, after the range checks that msgspec makes only when it reads: for values that a user gave."""
    try:
        return msgspec.convert(msgspec.to_builtins(value), type(value))
    except msgspec.ValidationError as error:
        raise BadInput(str(error)) from None


class LinearRope(Spec, kw_only=True, tag_field="kind", tag="linear"):
    """Position interpolation (arXiv:2306.15595): all rotary frequencies are divided by `factor`."""

    factor: Factor


class Llama3Rope(Spec, kw_only=True, tag_field="kind", tag="llama3"):
    """Llama 3.1: wavelengths above original_max_position / low_freq_factor are stretched, those below
    original_max_position / high_freq_factor are kept, with a smooth passage between them."""

    factor: Factor
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position: Count

    def __post_init__(self):
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor must be above low_freq_factor ({self.low_freq_factor}), got {self.high_freq_factor}")


class YarnRope(Spec, kw_only=True, tag_field="kind", tag="yarn"):
    """YaRN (arXiv:2309.00071): dimensions that turn fewer than beta_slow times within original_max_position are stretched,
    those that turn more than beta_fast times are kept, with a ramp between them."""

    factor: Factor
    original_max_position: Count
    attention_factor: Positive  # multiplies cosines and sines, so scores grow with its square
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: bool = True  # the ramp begins and ends at whole dimensions

    def __post_init__(self):
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast must be above beta_slow ({self.beta_slow}), got {self.beta_fast}")


class DynamicRope(Spec, kw_only=True, tag_field="kind", tag="dynamic"):
    """NTK-aware scaling: the base grows with the total length, for which ModelSpec.max_context_len stands throughout."""

    factor: Factor
    original_max_position: Count  # total lengths up to here change nothing


class FactorsRope(Spec, kw_only=True, tag_field="kind", tag="factors"):
    """A divisor for each rotary frequency, as GGUF files of Llama 3 carry them."""

    factors: tuple[Positive, ...]  # head_dim / 2 of them, the fastest frequency first


RopeScaling = LinearRope | Llama3Rope | YarnRope | DynamicRope | FactorsRope


class ModelSpec(Spec, kw_only=True):
    """Shape of a decoder-only transformer: Llama and those that differ from it by biases or norms on queries and keys."""

    name: Annotated[str, Meta(max_length=500)]
    architecture: Architecture
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    hidden_size: Count
    intermediate_size: Count
    vocab_size: Count
    max_context_len: Count
    rope_theta: Annotated[float, Meta(gt=0)]
    rms_norm_eps: Annotated[float, Meta(gt=0)]
    tie_embeddings: bool
    rope_scaling: RopeScaling | None = None

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        match self.rope_scaling:
            case FactorsRope(factors=factors) if len(factors) != self.head_dim // 2:
                raise ValueError(f"rope scaling must have head_dim / 2 ({self.head_dim // 2}) factors, got {len(factors)}")
            case DynamicRope() if self.head_dim == 2:
                raise ValueError("dynamic rope scaling needs a head_dim above 2, got 2")
            case YarnRope() if self.rope_theta <= 1:
                raise ValueError(f"yarn rope scaling needs a rope_theta above 1, got {self.rope_theta}")

    @property
    def qkv_bias(self) -> bool:
        """Whether a bias is added to queries, keys and values."""
        return self.architecture == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether each head's query and key pass a norm before they are rotated."""
        return self.architecture == "qwen3"

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, tied embeddings counted once."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        attention += self.qkv_bias * self.head_dim * (self.num_heads + 2 * self.num_kv_heads) + self.qk_norm * 2 * self.head_dim
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    def shard(self, num_ranks: int) -> "ModelSpec":
        """The shape of what one of several ranks holds: whole KV heads with their queries, and a part of every MLP.

        The vocabulary stays: a rank holds a part of its rows, and sees all logits.
        """
        for name in ("num_kv_heads", "intermediate_size"):
            if (value := getattr(self, name)) % num_ranks:
                common = math.gcd(self.num_kv_heads, self.intermediate_size)
                fitting = " or ".join(str(n) for n in range(1, common + 1) if common % n == 0)
                raise BadInput(
                    f"{name} must be a multiple of the number of ranks, got {value} and {num_ranks}; start {fitting} (torchrun --nproc-per-node)"
                )
        return msgspec.structs.replace(
            self, num_heads=self.num_heads // num_ranks, num_kv_heads=self.num_kv_heads // num_ranks,
            intermediate_size=self.intermediate_size // num_ranks,
        )  # fmt: skip

    def kv_bytes_per_token(self, dtype: DType) -> int:
        """Keys and values of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * BYTES_PER_ELEMENT[dtype]


class DeviceSpec(Spec, kw_only=True):
    """The device something ran on."""

    kind: Literal["cpu", "cuda"]
    name: Annotated[str, Meta(max_length=500)]
    memory_bytes: Size
    num_cores: Count | None = None  # CPU threads in use; None on a GPU


class FullKV(Spec, kw_only=True, tag_field="kind", tag="full"):
    """Attend to every committed token."""

    def resident(self, context_len: int) -> int:
        """Tokens kept in memory."""
        return context_len

    def read(self, context_len: int) -> int:
        """Tokens one step attends to."""
        return context_len


class SparseKV(Spec, kw_only=True, tag_field="kind", tag="sparse"):
    """Attend to at most `budget` committed tokens per layer and KV head: a chosen set, which stays, and the most recent
    ones, which slide at commits.

    window     the first `sink` tokens and the most recent budget - sink (StreamingLLM, arXiv:2309.17453)
    chunk      chunks of CHUNK_SIZE prompt tokens, the first always and the rest by the dot product of their
               mean key with the last key (BudgetDraft, arXiv:2606.00144), and the `recent` tokens
    snapkv     the first `sink` tokens, those that the last OBSERVATION prompt tokens attend to most (SnapKV,
               arXiv:2404.14469), and the `recent` tokens
    retrieval  chunks as above, by the dot product of their mean key with the last query (TriForce, arXiv:2404.11912)

    The set is chosen after prefill, and with `refresh` again whenever that many more tokens are committed, as if the
    prompt ended there. The papers count rounds instead; counted in tokens, a choice depends on the text and not on how
    rounds cut it, so that a replay knows it.
    """

    budget: Annotated[int, Meta(ge=1, le=2**30)]
    sink: Annotated[int, Meta(ge=0, le=2**30)] = 4
    recent: Annotated[int, Meta(ge=1, le=2**30)] = 32
    selection: Selection = "window"
    refresh: Count | None = None  # committed tokens between two choices; None: chosen once
    storage: Storage = "retain"  # of a drafter with keys of its own: evict drops what was not chosen, for good

    def __post_init__(self):
        if self.budget < self.sink + self.recent:
            raise ValueError(f"kv budget must hold sink + recent ({self.sink + self.recent} tokens), got {self.budget}; raise --kv-budget")
        if self.selection in CHUNKED and self.sink > CHUNK_SIZE:
            raise ValueError(f"{self.selection} selection keeps the first chunk ({CHUNK_SIZE} tokens) as sinks, got sink {self.sink}; lower it")
        if self.selection in CHUNKED and self.recent < CHUNK_SIZE:
            raise ValueError(
                f"{self.selection} selection needs recent >= {CHUNK_SIZE}, the partial last chunk lives there, got {self.recent}; raise it"
            )
        if self.selection in CHUNKED and self.budget < self.recent + CHUNK_SIZE:
            raise ValueError(f"kv budget must hold recent + one chunk ({self.recent + CHUNK_SIZE} tokens), got {self.budget}; raise --kv-budget")
        if self.selection == "snapkv" and self.recent < OBSERVATION:
            raise ValueError(
                f"snapkv selection keeps its observation window ({OBSERVATION} tokens) as recent ones, got recent {self.recent}; raise it"
            )
        if self.refresh is not None and self.selection == "window":
            raise ValueError("window selection chooses nothing that could be refreshed, got a refresh; drop it or take another selection")
        if self.refresh is not None and self.storage == "evict":
            raise ValueError("a refresh chooses among all tokens, and storage evict has dropped them; take storage retain")

    def num_fixed(self, context_len: int) -> int:
        """Tokens that stay once chosen, from `context_len` committed ones; the rest of the budget slides.

        A context that fits into the budget is kept whole: nothing is selected, only the sinks are fixed.
        """
        if context_len <= self.budget or self.selection == "window":
            return min(self.sink, context_len)
        if self.selection == "snapkv":
            return self.budget - self.recent
        return (self.budget - self.recent) // CHUNK_SIZE * CHUNK_SIZE

    def chosen_at(self, context_len: int, committed: int) -> int:
        """How many tokens were committed when the set in force was chosen, the first choice being after `context_len`."""
        return context_len if self.refresh is None else committed - (committed - context_len) % self.refresh

    def choices(self, context_len: int, end: int) -> Iterator[range]:
        """Committed lengths from `context_len` to below `end`, in ranges that one choice serves, made at the first of each."""
        step = self.refresh or max(1, end - context_len)
        for first in range(context_len, end, step):
            yield range(first, min(first + step, end))

    def resident(self, context_len: int) -> int:
        """Tokens kept in memory."""
        return min(self.budget, context_len)

    def read(self, context_len: int) -> int:
        """Tokens one step attends to."""
        return min(self.budget, context_len)


KVPolicy = FullKV | SparseKV


class DrafterSpec(Spec, kw_only=True):
    """Who proposes. `none` means that no drafter is loaded: off, plain decoding.

    ngram        what followed when the last tokens last occurred
    self_sparse  the target itself, attending to a part of its own cache
    draft_model  a smaller model with the target's vocabulary and a cache of its own
    eagle3       a head of one layer on hidden states of the target (EAGLE-3, arXiv:2503.01840), with a cache of its own
    dflash       a few layers that draft a whole block in one pass, over hidden states of the target (DFlash, arXiv:2602.06036)
    """

    kind: Literal["none", "ngram", "self_sparse", "draft_model", "eagle3", "dflash"]
    path: Annotated[str, Meta(max_length=500)] | None = None  # of those in LOADED: a model folder or GGUF file, as the user named it
    weights: Weights = "full"  # of models: as loaded, or quantised; the KV of self_sparse stays the target's either way
    vocab: Count | None = None  # of models: tokens that the head knows, the frequent and the special ones; None: all
    dtype: DType | None = None  # of those in LOADED: weights and cache; None: the target's

    def __post_init__(self):
        if self.kind not in LOADED and self.dtype is not None:
            raise ValueError(f"a dtype goes with drafters {listed(LOADED)} and with no other, got drafter {self.kind}")
        if (self.kind in LOADED) != (self.path is not None):
            raise ValueError(f"a path goes with drafters {listed(LOADED)} and with no other, got drafter {self.kind} with path {self.path}")
        if self.kind not in QUANTIZED and self.weights != "full":
            raise ValueError(f"weights go with drafters {listed(QUANTIZED)} and with no other, got drafter {self.kind}")
        if self.kind not in REDUCIBLE and self.vocab is not None:
            raise ValueError(f"a vocab goes with drafters {listed(REDUCIBLE)} and with no other, got drafter {self.kind}")


def usual_storage(kind: str, refresh: int | None) -> Storage:
    """What becomes of a drafter's keys where nobody said: those that nothing would read again are dropped."""
    return "evict" if kind in ("draft_model", "dflash") and refresh is None else "retain"


LOADED = ("draft_model", "eagle3", "dflash")  # drafters with a checkpoint of their own
TAPPING = ("eagle3", "dflash")  # of these, heads: they read hidden states that the target's cache keeps for them
CACHED = ("self_sparse", "draft_model", "dflash")  # drafters whose cache may be sparse
QUANTIZED = ("self_sparse", "draft_model", "dflash")  # drafters whose matrices may have fewer bits than they were loaded with
REDUCIBLE = QUANTIZED  # drafters whose head may know fewer tokens than it was loaded with
TREELESS = ("none", "ngram")  # those without probabilities to make a tree of


def listed(kinds: tuple[str, ...], last: str = "and") -> str:
    """Several kinds in a sentence."""
    return f"{', '.join(kinds[:-1])} {last} {kinds[-1]}"


NO_DRAFTER = DrafterSpec(kind="none")


class Calibration(Spec, kw_only=True):
    """How often a text goes down a path of a draft tree, by the probability that the drafter gives it: linear between the points.

    Found by replay, for one drafter, context and sampler.
    """

    reported: tuple[Probability, ...]  # rising
    observed: tuple[Probability, ...]  # never falling

    def __post_init__(self):
        if len(self.reported) != len(self.observed) or not self.reported:
            raise ValueError(
                f"a calibration must have as many observed as reported probabilities, at least one, got {len(self.observed)} and {len(self.reported)}"
            )
        if any(b <= a for a, b in pairwise(self.reported)) or any(b < a for a, b in pairwise(self.observed)):
            raise ValueError("a calibration must be rising in what was reported and never fall in what was observed")


class TreeCosts(Spec, kw_only=True):
    """What an adaptive tree weighs every round: measured seconds, and what it knows about its probabilities."""

    draft_s: Annotated[float, Meta(ge=0, le=1e6)]  # all levels, and choosing the tree
    verify_s: tuple[Annotated[float, Meta(gt=0, le=1e6)], ...]  # [max_size + 1] of 0, 1, .. nodes: mask, pass, host copies and compaction
    rate: Positive | None = None  # tokens per second that a node must be worth, the best of the whole run; None: the best ratio of each round
    calibration: Calibration | None = None  # None: the drafter's probabilities as they are

    def __post_init__(self):
        if not 2 <= len(self.verify_s) <= MAX_TREE_SIZE + 1:
            raise ValueError(f"verify_s must have a time for 0 to max_size nodes, max_size from 1 to {MAX_TREE_SIZE}, got {len(self.verify_s)} times")


class FixedTree(Spec, kw_only=True, tag_field="kind", tag="fixed"):
    """The same number of nodes every round."""

    size: TreeSize

    @property
    def max_size(self) -> int:
        return self.size


class AdaptiveTree(Spec, kw_only=True, tag_field="kind", tag="adaptive"):
    """As many nodes as a round's verification is worth (CaDDTree, arXiv:2606.01813), up to max_size; none is one of the answers."""

    costs: TreeCosts

    @property
    def max_size(self) -> int:
        return len(self.costs.verify_s) - 1


Tree = FixedTree | AdaptiveTree


class DraftConfig(Spec, kw_only=True):
    """One setting of every knob."""

    drafter: DrafterSpec
    kv: KVPolicy = FullKV()  # what the drafter attends to; a drafter without a cache leaves it full
    draft_len: DraftLen = 0  # with a tree: the levels that are drafted
    tree: Tree | None = None  # which nodes of those levels are verified; None: a chain

    def __post_init__(self):
        kind, sparse = self.drafter.kind, isinstance(self.kv, SparseKV)
        if (kind == "none") != (self.draft_len == 0):
            raise ValueError(f"draft_len must be 0 without a drafter and at least 1 with one, got {self.draft_len} with {kind}; set --draft-len")
        if sparse and kind not in CACHED or not sparse and kind == "self_sparse":
            raise ValueError(
                "a kv budget goes with drafter self_sparse, may go with draft_model and dflash, and with no other, "
                f"got drafter {kind} with {describe_kv(self.kv)}"
            )
        if kind == "dflash" and sparse and (self.kv.selection, self.kv.storage) != ("window", "evict"):
            raise ValueError(f"drafter dflash keeps a window and drops the rest, got {describe_kv(self.kv)}; take selection window and storage evict")
        if kind == "self_sparse" and self.kv.storage == "evict":
            raise ValueError("storage evict is for a drafter with keys of its own, got self_sparse, which reads the target's; take storage retain")
        if self.tree is not None and kind in TREELESS:
            raise ValueError(f"a tree is made of a drafter's probabilities, {kind} has none; take another drafter, or drop the tree")

    @property
    def verified(self) -> int:
        """Most drafted tokens that the target verifies in a round: those of a chain, or the nodes of a tree."""
        return self.draft_len if self.tree is None else self.tree.max_size


PLAIN = DraftConfig(drafter=NO_DRAFTER)


class Sampler(Spec, kw_only=True):
    """How logits become a token. Temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole."""

    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=2**30)] = 0

    def __post_init__(self):
        if 0 < self.temperature < 0.01:
            raise ValueError(f"temperature must be 0 (greedy) or at least 0.01, got {self.temperature}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class Workload(Spec, kw_only=True):
    """What the planned deployment will be asked for: `batch` streams side by side, of requests of one shape."""

    context_len: Count  # prompt tokens, --isl
    output_len: Annotated[int, Meta(ge=2, le=2**30)]  # generated tokens, --osl
    sampler: Sampler
    batch: Count = 1  # streams that run side by side, --max-concurrency


def selection_of(kv: KVPolicy) -> Selection | None:
    """How a policy chooses; None where there is nothing to choose."""
    return kv.selection if isinstance(kv, SparseKV) else None


def describe_kv(kv: KVPolicy) -> str:
    """A policy in a few words."""
    if isinstance(kv, FullKV):
        return "full kv"
    return f"{kv.selection} {kv.budget}" + (f" refresh {kv.refresh}" if kv.refresh else "") + " evict" * (kv.storage == "evict")


def describe_drafter(drafter: DrafterSpec) -> str:
    """A drafter in a few words."""
    name = f"{drafter.kind} {drafter.path.rstrip('/').rsplit('/', 1)[-1]}" if drafter.path else drafter.kind
    name += f" {drafter.dtype}" * (drafter.dtype is not None)
    return name + f" {drafter.weights}" * (drafter.weights != "full") + f" vocab {drafter.vocab}" * (drafter.vocab is not None)


def describe_tree(tree: Tree) -> str:
    """A tree in a few words."""
    if isinstance(tree, FixedTree):
        return f"tree {tree.size}"
    return f"adaptive tree up to {tree.max_size}" + " by round" * (tree.costs.rate is None)


def describe(config: DraftConfig) -> str:
    """A configuration in a few words, as tables show it."""
    if config.draft_len == 0:
        return "off"
    kv = f" {describe_kv(config.kv)}" if isinstance(config.kv, SparseKV) else ""
    tree = "" if config.tree is None else f" {describe_tree(config.tree)}"
    return f"{describe_drafter(config.drafter)}{kv} K={config.draft_len}{tree}"


def describe_workload(workload: Workload) -> str:
    """A workload in a few words; a batch of one goes without saying."""
    shape = f"context {workload.context_len}, output {workload.output_len}, {describe_sampler(workload.sampler)}"
    return shape + f", {workload.batch} streams side by side" * (workload.batch > 1)


def describe_sampler(sampler: Sampler) -> str:
    """A sampler in a few words."""
    parts = ["greedy" if sampler.greedy else f"temperature {sampler.temperature:g}"]
    parts += [f"top_p {sampler.top_p:g}"] * (sampler.top_p < 1) + [f"top_k {sampler.top_k}"] * (sampler.top_k > 0)
    return " ".join(parts)
