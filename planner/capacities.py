"""A Capacity: what fits on a system, with and without each drafter, before anything is measured. Plain JSON.

Times are seconds, sizes bytes of one device. `low` and `high` are what tuned and plain software make of the device.
"""

from typing import Annotated, Literal

from msgspec import Meta

from planner.measurements import Name
from planner.plans import Interval, Sentence
from planner.serving import OFF, ModelSize, SystemSpec
from planner.specs import Count, DraftLen, Size, Spec

Amount = Annotated[float, Meta(ge=0, le=1e15)]
Limit = Literal["memory", "max_num_seqs", "engine", "concurrency", "nothing fits"]


class Share(Spec, kw_only=True):
    """What takes a part of a device's memory."""

    name: Name
    bytes: Size


class Pool(Spec, kw_only=True):
    """What an engine sets aside for keys and values with one drafter loaded, or none."""

    drafter: Name = OFF
    tokens: Annotated[int, Meta(ge=0, le=2**60)]
    bytes: Size
    bytes_per_token: Amount  # the target's keys and values, and the drafter's
    rest: list[Share]


class CapacityRow(Spec, kw_only=True):
    """One setting at the load asked for."""

    drafter: Name = OFF
    method: Name = OFF  # of the engine
    kv_budget: Count | None = None  # None: all
    draft_len: DraftLen = 0
    fitting: Amount  # requests that memory lets decode side by side
    running: Amount  # after the engine's caps and the concurrency asked for
    limited_by: Limit
    logits_bytes: Size  # float32, of all rows that are verified at once
    round_s: Interval | None = None  # None: nothing runs, or the system's bandwidth or peak is not known
    break_even_tokens: Interval | None = None  # tokens a round must emit for a request to be no slower than without drafting
    break_even_throughput: Interval | None = None  # and for all requests together, whose number the drafter's memory lowers


class Capacity(Spec, kw_only=True):
    """What fits."""

    schema_version: Literal[1] = 1
    planner_version: Name
    engine: Name
    system: SystemSpec
    model: ModelSize
    tensor_parallel: Count
    context_len: Count
    output_len: Count
    max_concurrency: Count | None
    pools: list[Pool]  # without a drafter first
    rows: list[CapacityRow]
    assumed: list[Sentence]
    warnings: list[Sentence]
