"""A Profile: raw measurements of a model on a device, as plain JSON. It never holds a fitted model.

Times are seconds, sizes bytes, lengths tokens. Reading checks every field; what it refuses it names.
"""

import base64
import hashlib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from planner.errors import BadInput
from planner.files import read_bytes, write_whole
from planner.kinds import kind_by_class, kind_by_fields, other_kind
from planner.specs import Count, DeviceSpec, DrafterSpec, DraftLen, DType, KVPolicy, ModelSpec, Positive, Sampler, Size, Spec, Weights

SCHEMA_VERSION = 1

Name = Annotated[str, Meta(max_length=500)]
Seconds = Annotated[float, Meta(ge=0, le=1e6)]
Natural = Annotated[int, Meta(ge=0, le=2**40)]
Share = Annotated[float, Meta(ge=0, le=1)]

MIN_DISTINCT_4GRAMS = 0.6  # below this a text repeats itself, and repetition inflates acceptance


class Packed(Spec, kw_only=True):
    """A small array of bytes, row by row, in base64. Probabilities are stored as round(255 p)."""

    shape: Annotated[list[Annotated[int, Meta(ge=0, le=2**20)]], Meta(min_length=1, max_length=2)]
    u8: str

    def __post_init__(self):
        expected = int(np.prod(self.shape, dtype=object))
        if len(self.u8) != 4 * ((expected + 2) // 3):
            raise ValueError(f"u8 must hold {expected} bytes for shape {self.shape}, got {len(self.u8)} base64 characters")
        if len(base64.b64decode(self.u8, validate=True)) != expected:  # binascii.Error is a ValueError
            raise ValueError(f"u8 must hold {expected} bytes for shape {self.shape}, got another number")

    @classmethod
    def pack(cls, array: np.ndarray) -> "Packed":
        """From whole numbers 0..255."""
        return cls(shape=list(array.shape), u8=base64.b64encode(array.astype(np.uint8).tobytes()).decode())

    def unpack(self) -> np.ndarray:
        """uint8, of the stored shape."""
        return np.frombuffer(base64.b64decode(self.u8), dtype=np.uint8).reshape(self.shape)


class Text(Spec, kw_only=True):
    """A prompt and the continuation that the target wrote for it."""

    kind: Name  # stratum: folder or file it came from
    source: Name  # file name
    offset: Natural  # first token of the prompt in the file, or first chat
    extent: Natural  # tokens or chats of the file that it takes
    context_len: Count  # prompt tokens
    sampler: Sampler
    output_len: Annotated[int, Meta(ge=2, le=2**30)]  # tokens written; fewer than asked for if a stop token came
    distinct_4grams: Share  # of the continuation


class AcceptanceSample(Spec, kw_only=True):
    """What one drafter would have had accepted along one text, a round starting behind each token."""

    text: Natural  # index into texts
    drafter: DrafterSpec
    kv: KVPolicy
    accept_prob: Packed  # [starts, draft_len]: P(draft i is accepted | the ones before it were)
    drafted: Packed  # [starts]: tokens drafted by a round behind that token


PER_HALVING = 16  # steps of a path probability: 4 % each, down to 1e-5
NO_NODE = 255


class TreeSample(Spec, kw_only=True):
    """What trees of one drafter would have had accepted along one text, a round starting behind each token.

    The target chooses at each node and the text is what it chose, so this is exact: a round behind s with a tree of n nodes
    writes the tokens whose smallest tree has at most n nodes, and one more.
    """

    text: Natural  # index into texts
    drafter: DrafterSpec
    kv: KVPolicy
    draft_len: Annotated[int, Meta(ge=1, le=255)]  # levels
    sizes: Packed  # [starts, draft_len]: nodes of the smallest tree that goes along the text down to each level; 0: none that was looked at
    probs: Packed  # [starts, max_size]: path probabilities of the nodes, best first, as the drafter has them: -16 log2(p), 255 where there is no node

    def __post_init__(self):
        if len(self.sizes.shape) != 2 or len(self.probs.shape) != 2 or self.sizes.shape != [self.probs.shape[0], self.draft_len]:
            raise ValueError(f"sizes must hold {self.draft_len} levels of as many starts as probs, got {self.sizes.shape} and {self.probs.shape}")
        if not 1 <= self.max_size <= 255:
            raise ValueError(f"trees of 1 to 255 nodes can be stored, got {self.max_size}")

    @property
    def max_size(self) -> int:
        return self.probs.shape[1]

    @classmethod
    def of(
        cls,
        *,
        text: int,
        drafter: DrafterSpec,
        kv: KVPolicy,
        sizes: np.ndarray,  # [starts, draft_len]
        probs: np.ndarray,  # [starts, max_size], 0 where there is no node
    ) -> "TreeSample":
        steps = np.clip(np.round(-PER_HALVING * np.log2(np.maximum(probs, 1e-30))), 0, NO_NODE - 1)
        packed = Packed.pack(np.where(probs > 0, steps, NO_NODE))
        return cls(text=text, drafter=drafter, kv=kv, draft_len=sizes.shape[1], sizes=Packed.pack(sizes), probs=packed)

    def node_probs(self) -> np.ndarray:
        """[starts, max_size] float64, 0 where there is no node."""
        steps = self.probs.unpack()
        return np.where(steps == NO_NODE, 0.0, 2.0 ** (-steps.astype(float) / PER_HALVING))


class DrafterModel(Spec, kw_only=True):
    """What a drafter with a checkpoint of its own ran."""

    drafter: DrafterSpec
    spec: ModelSpec
    fingerprint: Name
    weights_bytes: Size  # beyond what it shares with the target
    dtype: DType  # of weights and cache
    taps: list[Natural] = []  # layers of the target whose hidden states its cache keeps for a head
    block_size: Natural = 0  # of a DFlash head: tokens of one pass, for which its cache has room


class RoundSample(Spec, kw_only=True):
    """Whole rounds of one configuration, timed in place: each list has one entry per round, in the order they ran.

    A round of a batch is that of all its streams; times are never divided by their number.
    """

    drafter: DrafterSpec
    kv: KVPolicy
    draft_len: DraftLen  # of a tree: levels
    tree_size: Annotated[int, Meta(ge=0, le=255)] = 0  # nodes that were verified; 0: a chain
    context_len: Count  # prompt tokens
    batch: Count = 1  # streams side by side
    role: Literal["cell", "drift"] = "cell"  # drift: the first cell again, at the end
    position: list[Natural]  # committed tokens when the round began, mean over streams
    drafted: list[DraftLen]  # by the stream that drafted most, of a tree its nodes: the pass is as wide for all
    draft_s: list[Seconds]  # until the drafts are there
    verify_s: list[Seconds]  # target pass and accept rule, up to the read back to the host
    commit_s: list[Seconds]  # caches and bookkeeping
    warmup_s: list[Seconds]  # whole rounds before these, left out of every fit
    start_s: Annotated[list[Seconds], Meta(min_length=1)]  # selection and the first token, once per pass

    def __post_init__(self):
        if len({len(self.position), len(self.drafted), len(self.draft_s), len(self.verify_s), len(self.commit_s)}) != 1 or not self.position:
            raise ValueError("position, drafted, draft_s, verify_s and commit_s must have one entry per round, and at least one")

    @property
    def round_s(self) -> np.ndarray:
        return np.array(self.draft_s) + np.array(self.verify_s) + np.array(self.commit_s)


class EnergySample(Spec, kw_only=True):
    """What rounds of one configuration used, one after the other; every few rounds the text begins again, which is included.

    The window lasts a second or longer and is cut where the device's counter ticks, so it is known to a round at either end.
    """

    drafter: DrafterSpec
    kv: KVPolicy
    draft_len: DraftLen
    context_len: Count  # prompt tokens
    batch: Count = 1  # streams side by side
    rounds: Count
    seconds: Annotated[float, Meta(gt=0, le=1e6)]
    joules: Annotated[float, Meta(gt=0, le=1e9)]  # of the whole device, all streams

    @property
    def watts(self) -> float:
        return self.joules / self.seconds


class PrefillSample(Spec, kw_only=True):
    """Prompts processed one at a time."""

    context_len: Count
    seconds: Annotated[list[Annotated[float, Meta(ge=1e-9, le=1e6)]], Meta(min_length=1)]


class MemorySample(Spec, kw_only=True):
    """What running configurations held at their peak."""

    context_len: Count
    batch: Count = 1
    known_bytes: Size  # weights and caches, counted tensor by tensor
    peak_bytes: Size  # of the process (CPU) or the allocator (CUDA), over `base_bytes`
    base_bytes: Size  # before the model was loaded


class Failure(Spec, kw_only=True):
    """A cell that could not be measured."""

    cell: Name
    reason: Name


class Environment(Spec, kw_only=True):
    """Where and how it was measured."""

    date: Name  # ISO 8601, UTC
    planner_version: Name
    python: Name
    torch: Name
    platform: Name
    num_threads: Count | None
    busy_share: Share | None  # CPU time others used just before the run; None where it cannot be read
    load_1min: Annotated[float, Meta(ge=0, le=1e6)] | None
    gpu: dict[Name, str | float | int | None] = {}  # driver, clocks in MHz, power cap in W, throttle reasons, other processes


class Profile(Spec, kw_only=True):
    """Everything measured about one target on one device."""

    schema_version: Literal[1] = SCHEMA_VERSION
    source: Name = "own runtime"  # whose latency this is
    model: Name  # as the user named it: a path, or smollm2
    target: ModelSpec
    target_fingerprint: Name
    weights_bytes: Size  # on one device
    dtype: DType
    execution_mode: Name
    weights: Weights = "full"  # of the target
    tensor_parallel: Count = 1  # devices that share the target; every size in bytes is that of one of them
    rope_theta: Positive | None = None  # as the user gave it; what the checkpoint says otherwise, and `target` in either case
    max_context_len: Count | None = None  # likewise
    drafter_models: list[DrafterModel] = []
    device: DeviceSpec
    environment: Environment
    seed: int
    contexts: Annotated[list[Count], Meta(min_length=1)]
    samplers: Annotated[list[Sampler], Meta(min_length=1)]
    max_draft_len: Annotated[int, Meta(ge=1, le=255)]  # what a byte of `drafted` can say
    texts: list[Text]
    acceptance: list[AcceptanceSample]
    trees: list[TreeSample] = []  # none where no tree sizes were asked for
    rounds: list[RoundSample]
    prefill: Annotated[list[PrefillSample], Meta(min_length=1)]
    memory: list[MemorySample]
    energy: list[EnergySample] = []  # none where the device does not count it
    energy_source: Name | None = None  # which counter, and what it counts
    failures: list[Failure] = []
    minutes: dict[Name, Annotated[float, Meta(ge=0, le=1e6)]]  # by stage
    warnings: list[Annotated[str, Meta(max_length=2000)]] = []

    def __post_init__(self):
        for index, sample in enumerate(self.acceptance):
            if sample.text >= len(self.texts):
                raise ValueError(f"acceptance[{index}].text must be below {len(self.texts)}, the number of texts, got {sample.text}")
            starts = self.texts[sample.text].output_len - 1
            if sample.accept_prob.shape != [starts, self.max_draft_len] or sample.drafted.shape != [starts]:
                raise ValueError(f"acceptance[{index}] must hold {starts} starts x {self.max_draft_len} drafts, got {sample.accept_prob.shape}")
        for index, sample in enumerate(self.trees):
            if sample.text >= len(self.texts):
                raise ValueError(f"trees[{index}].text must be below {len(self.texts)}, the number of texts, got {sample.text}")
            if sample.sizes.shape[0] != (starts := self.texts[sample.text].output_len - 1):
                raise ValueError(f"trees[{index}] must hold {starts} starts, got {sample.sizes.shape[0]}")
        if not any(sample.draft_len == 0 for sample in self.rounds):
            raise ValueError("rounds must hold plain decoding (draft_len 0), the baseline of every speedup")


def load_profile(path: str | Path) -> Profile:
    """Read and check a profile; BadInput names the field that is wrong."""
    return decode_checked(read_bytes(path, "profile"), Profile, SCHEMA_VERSION, f"profile {path}")


def save_profile(profile: Profile, path: str | Path) -> None:
    """Write a profile whole."""
    write_whole(path, encode(profile))


def fingerprint(path: str | Path) -> str:
    """Hex sha256 of a file as it lies on disk; a plan names its profile by it."""
    return hashlib.sha256(read_bytes(path, "profile")).hexdigest()


def encode(value: msgspec.Struct) -> bytes:
    """JSON that a person can look at: one line per entry of the outer lists."""
    return msgspec.json.format(msgspec.json.encode(value), indent=1) if len(msgspec.json.encode(value)) < 200_000 else _by_line(value)


def decode_checked(content: bytes, kind: type, schema_version: int, what: str, tag: str | None = None):
    """A value of `kind` from JSON; its version, and `tag`, the field "kind" of those files that have one, are looked at first."""
    try:
        head = msgspec.json.decode(content, type=Head)
        if head.kind != tag:
            found = kind_by_fields(msgspec.json.decode(content, type=dict[str, msgspec.Raw]), head.kind)
            is_ = found or f"of an unknown kind{'' if head.kind is None else f', {shortened(repr(head.kind))}'}"
            raise BadInput(f"{what} is {is_}; this needs {kind_by_class(kind)}")
        if head.schema_version != schema_version:
            raise BadInput(f"{what} has schema_version {head.schema_version}, this planner reads {schema_version}; make it again with this version")
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(other_kind(content, kind, what) or f"{what} is not valid: {shortened(str(error))}") from None


def shortened(message: str) -> str:
    """A message that may quote the file: its beginning says what is wrong, its end says where."""
    return message if len(message) <= 400 else f"{message[:200]} ... {message[-200:]}"


class Head(msgspec.Struct):
    """What a file says of itself."""

    schema_version: int
    kind: str | None = None


def kind_of(content: bytes) -> str | None:
    """The field "kind" of a file, None without one; what is wrong with a broken file is for its reader to say."""
    try:
        return msgspec.json.decode(content, type=Head).kind
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _by_line(value: msgspec.Struct) -> bytes:
    """One line per field, and per element of its lists: compact, and still diffable."""
    parts = []
    for field in value.__struct_fields__:
        item = getattr(value, field)
        if isinstance(item, list) and item:
            body = b"[\n" + b",\n".join(msgspec.json.encode(element) for element in item) + b"\n]"
        else:
            body = msgspec.json.encode(item)
        parts.append(msgspec.json.encode(field) + b":" + body)
    return b"{\n" + b",\n".join(parts) + b"\n}\n"
