"""A ServingProfile: what a serving engine was measured to do under load, cell by cell. Raw measurements, as plain JSON.

Drafters are opaque here, methods of the engine that are known by their measurements only: draft_model, eagle3, mtp, ngram, or
any other name. "none" is off, no drafter loaded; a named drafter with draft_len 0 is loaded and idle, which costs something.
Times are seconds, sizes bytes, lengths tokens.
"""

import math
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from planner.files import read_bytes, write_whole
from planner.measurements import SCHEMA_VERSION, Name, Profile, Share, decode_checked, encode, kind_of
from planner.specs import Count, DraftLen, Positive, Size, Spec

SERVING_SCHEMA_VERSION = 1
OFF = "none"

Elapsed = Annotated[float, Meta(gt=0, le=1e6)]  # seconds


class ModelSize(Spec, kw_only=True):
    """What of a model decides the bytes it takes on a device. None: not known, and what depends on it is assumed and said."""

    name: Name
    num_layers: Count  # that keep keys and values
    num_kv_heads: Count
    head_dim: Count
    weights_bytes: Size  # of the whole model, whatever number of devices share it
    kv_bytes_per_element: Annotated[float, Meta(gt=0, le=8)] = 2.0
    latent: bool = False  # keys and values are one vector (MLA), which every rank holds whole
    hidden_size: Count | None = None
    intermediate_size: Count | None = None
    num_heads: Count | None = None
    vocab_size: Count | None = None
    max_context_len: Count | None = None

    def kv_bytes_per_token(self, tensor_parallel: int = 1) -> float:
        """Keys and values of one token over all layers, on one of the devices; a head is never cut."""
        if self.latent:
            return self.num_layers * self.head_dim * self.kv_bytes_per_element
        return 2 * self.num_layers * math.ceil(self.num_kv_heads / tensor_parallel) * self.head_dim * self.kv_bytes_per_element


class SystemSpec(Spec, kw_only=True):
    """A device as its maker describes it, and the share of it that an engine may use."""

    name: Name
    memory_bytes: Size  # of one device
    fraction: Annotated[float, Meta(gt=0, le=1)]  # of the total memory: the engine's weights, caches and everything else
    bandwidth_bytes_per_s: Positive | None = None
    flops_per_s: Annotated[float, Meta(gt=0, le=1e18)] | None = None  # dense, 16 bit


class ServedCell(Spec, kw_only=True):
    """One run of a benchmark: requests of one shape, `concurrency` of them in the system all the time."""

    drafter: Name = OFF
    draft_len: DraftLen = 0
    concurrency: Count
    context_len: Count  # prompt tokens
    output_len: Count
    tpot_s: Elapsed  # itl_s / tokens_per_round, queueing excluded
    itl_s: Elapsed | None = None  # a round
    output_tokens_per_s: Positive | None = None  # of all requests together
    ttft_s: Elapsed | None = None  # queueing included
    tokens_per_round: Annotated[float, Meta(ge=1, le=1025)] | None = None
    acceptance: list[Share] = []  # [i] P(draft i is accepted | those before it were), one per drafted token
    tokens_sd: Annotated[float, Meta(ge=0, le=2)] | None = None  # relative, of tokens_per_round, by which texts were asked for; None: not known
    tensor_parallel: Count = 1
    source: Name = ""  # file and line

    def __post_init__(self):
        if self.drafter == OFF and self.draft_len > 0:
            raise ValueError(f"draft_len must be 0 without a drafter, got {self.draft_len}; name the drafter")
        if len(self.acceptance) > self.draft_len:
            raise ValueError(f"acceptance must have at most one entry per drafted token ({self.draft_len}), got {len(self.acceptance)}")
        if self.tokens_per_round is not None and self.tokens_per_round > self.draft_len + 1:
            raise ValueError(f"tokens_per_round must be at most draft_len + 1 ({self.draft_len + 1}), got {self.tokens_per_round}")


class ServingProfile(Spec, kw_only=True):
    """Everything measured about one target in one engine on one system."""

    schema_version: Literal[1] = SERVING_SCHEMA_VERSION
    kind: Literal["serving"] = "serving"  # what tells it from a profile of the own runtime
    source: Name  # engine and version where known, else the files
    date: Name  # ISO 8601, UTC: of the measurement where the file says so, else of the import
    planner_version: Name
    model: ModelSize
    drafters: dict[Name, ModelSize]  # those whose size was given; of others, the bytes are taken as 0 and that is said
    system: SystemSpec
    cells: Annotated[list[ServedCell], Meta(min_length=1)]
    warnings: list[Annotated[str, Meta(max_length=2000)]] = []


class DrafterSummary(Spec, kw_only=True):
    """The cells of one drafter."""

    drafter: str
    cells: int
    draft_len: list[int]  # all that were measured, in order
    concurrency: tuple[int, int]  # least and most
    context_len: tuple[int, int]
    missing: list[str]  # what was not measured, and what that costs


class Summary(Spec, kw_only=True):
    """What was imported."""

    source: str
    model: ModelSize
    system: SystemSpec
    cells: int
    drafters: list[DrafterSummary]  # off first, where it was measured
    missing: list[str]  # likewise, of the whole table
    warnings: list[str]
    next_command: str


def save_serving_profile(profile: ServingProfile, path: str | Path) -> None:
    """Write a profile whole."""
    write_whole(path, encode(profile))


def load_any_profile(path: str | Path) -> Profile | ServingProfile:
    """Read and check a profile of either kind, by what it says it is; BadInput names the field that is wrong."""
    content = read_bytes(path, "profile")
    return (
        decode_serving_profile(content, path)
        if kind_of(content) == "serving"
        else decode_checked(content, Profile, SCHEMA_VERSION, f"profile {path}")
    )


def load_serving_profile(path: str | Path) -> ServingProfile:
    """Read and check a profile of a serving engine."""
    return decode_serving_profile(read_bytes(path, "profile"), path)


def decode_serving_profile(content: bytes, path: str | Path) -> ServingProfile:
    """A profile from its JSON; BadInput names the field that is wrong."""
    return decode_checked(content, ServingProfile, SERVING_SCHEMA_VERSION, f"profile {path}", "serving")
