"""A Simulation: what requests that come and go would meet at a server, by setting, on the same arrivals. Plain JSON.

Times are seconds, sizes bytes. `low` and `high` bound a number at 90 %, over parts of the run: what another hour of such a load
would change, not what the step times may be off. Differences are paired: the same requests at the same moments.
"""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from planner.files import write_whole
from planner.measurements import Name, Natural, encode
from planner.plans import Interval, Real, Sentence
from planner.schedules import Limits
from planner.serving import OFF
from planner.specs import Count, DraftLen, Positive, Spec

SIMULATION_SCHEMA_VERSION = 1
Fraction = Annotated[float, Meta(ge=0, le=1)]
Amount = Annotated[float, Meta(ge=0, le=1e15)]
QUANTILES = (1, 2, *range(5, 100, 5), 98, 99)  # % of the requests


class Step(Spec, kw_only=True):
    """What is drafted while so many requests decode at such a mean context; the last of each range holds beyond it."""

    batch_from: Count
    batch_to: Count
    context_from: Count
    context_to: Count
    draft_len: DraftLen


class Latency(Spec, kw_only=True):
    """Of the requests that were served."""

    mean: Interval
    p50: Interval
    p90: Interval
    p99: Interval
    quantiles: list[Amount] = []  # that QUANTILES % took at most; empty in files of earlier versions

    def __post_init__(self):
        if self.quantiles and (len(self.quantiles) != len(QUANTILES) or any(a > b for a, b in pairwise(self.quantiles))):
            raise ValueError(f"quantiles must be {len(QUANTILES)} seconds that do not fall, or none, got {len(self.quantiles)}")


class Goodput(Spec, kw_only=True):
    """What of the load was served within limits."""

    limits: Limits
    share: Interval  # of all requests that arrived
    requests_per_s: Interval
    output_tokens_per_s: Interval


class Change(Spec, kw_only=True):
    """A figure against off's on the same arrivals, relatively: -0.2 is a fifth less."""

    ttft: Interval | None  # of the mean; None where nothing was served by one of the two
    tpot: Interval | None
    e2e: Interval | None
    goodput: list[Interval | None]  # in requests, one for each limit; None where off keeps it for nobody


class Use(Spec, kw_only=True):
    """A share over time, of all replicas."""

    mean: Fraction
    max: Fraction
    series: list[Fraction] = []  # means of equal stretches of the run


class Arm(Spec, kw_only=True):
    """One setting under the load."""

    name: Name
    drafter: Name = OFF
    steps: list[Step]
    kv_tokens: Natural  # that a replica's pool holds
    served: Natural
    rejected: Natural  # longer than the pool, or than what the engine takes
    ttft_s: Latency | None  # None: nothing was served
    tpot_s: Latency | None
    e2e_s: Latency | None
    output_tokens_per_s: Interval
    goodput: list[Goodput]
    duration_s: Amount  # from the first arrival to the last token
    busy: Use  # the share of time that a step runs
    kv: Use  # of the pool's tokens
    running: Amount  # requests that decode in a round, mean over rounds
    tokens_per_round: Annotated[float, Meta(ge=0, le=1025)]  # mean over requests and rounds
    preemptions: Natural
    prefix_hits: Fraction  # share of prompt tokens that lay in the prefix cache
    against_off: Change | None  # None: this is off


class Load(Spec, kw_only=True):
    """The requests that came."""

    source: Name  # a file's name, or what was generated
    requests: Count
    duration_s: Amount  # from the first arrival to the last
    requests_per_s: Amount
    input_len_mean: Amount
    input_len_max: Count
    output_len_mean: Amount
    output_len_max: Count
    speedup: Positive = 1.0  # of arrival times


class Server(Spec, kw_only=True):
    """How each replica is run."""

    model: Name
    system: Name
    replicas: Count
    router: Name
    tensor_parallel: Count
    max_num_seqs: Count
    max_num_batched_tokens: Count
    block_tokens: Count
    prefix_caching: bool


class Tried(Spec, kw_only=True):
    """One configuration of a study."""

    setting: Name
    max_num_seqs: Count
    max_num_batched_tokens: Count
    cost: Real | None  # what is minimised; None: it cannot run
    reason: Sentence = ""
    worker: Name


class Studied(Spec, kw_only=True):
    """Configurations that were simulated on the same arrivals, in their order."""

    minimised: Name
    num_candidates: Count
    tried: list[Tried]
    best: int | None  # into tried


class Simulation(Spec, kw_only=True):
    schema_version: Literal[1] = SIMULATION_SCHEMA_VERSION
    kind: Literal["simulation"] = "simulation"
    planner_version: Name
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]  # of the profile, schedule or plan
    source: Name  # where its step times are from
    load: Load
    server: Server
    seed: int
    limits: list[Limits] = []
    arms: list[Arm]  # off first
    study: Studied | None = None
    seconds: Real  # that the simulation took
    notes: list[Sentence] = []


def save_simulation(simulation: Simulation, path: str | Path) -> None:
    """Write a simulation whole."""
    write_whole(path, encode(simulation))
