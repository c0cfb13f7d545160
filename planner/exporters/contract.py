"""What an exporter gets and gives. It spells what it gets in an engine's words, and decides nothing."""

from typing import NamedTuple

from planner.exports import Fidelity, Knob, Step
from planner.serving import OFF, ModelSize
from planner.specs import DraftConfig, DType, Execution, Sampler, SparseKV, Tree, Weights
from planner.units import format_bytes


class Memory(NamedTuple):
    """What of a device may be used."""

    total_bytes: int
    cap_bytes: int
    target: ModelSize | None = None  # None: not known
    drafter: ModelSize | None = None


class OwnRuntime(NamedTuple):
    """How the own runtime ran when it was profiled."""

    config: DraftConfig
    dtype: DType
    execution: Execution
    weights: Weights
    rope_theta: float | None
    max_context_len: int | None


class Deployed(NamedTuple):
    """One server, in our words."""

    model: str
    method: str  # of METHODS, self_sparse, or off
    draft_model: str | None
    steps: tuple[Step, ...]  # from 1 up, without gaps
    kv: SparseKV | None  # of the drafter; None: all
    context_len: int  # the longest
    output_len: int
    tensor_parallel: int = 1
    sampler: Sampler = Sampler()
    dtype: DType | None = None
    kv_dtype: str | None = None  # of the target's cache, in the engine's words; None: the engine's default
    draft_kv_dtype: str | None = None
    memory: Memory | None = None
    own: OwnRuntime | None = None
    tree: Tree | None = None

    @property
    def off(self) -> bool:
        return self.method == OFF

    @property
    def max_batch(self) -> int:
        return self.steps[-1].batch_to

    @property
    def draft_len(self) -> int:
        return max(step.draft_len for step in self.steps)

    @property
    def scheduled(self) -> bool:
        return len(self.steps) > 1

    @property
    def total_len(self) -> int:
        return self.context_len + self.output_len


class Spelled(NamedTuple):
    """An engine's words for it."""

    files: dict[str, str]  # by name inside the folder
    run: str  # one line of shell, as is `measure`
    measure: str
    knobs: list[Knob]  # those that the engine's own words decide
    argv: list[str]
    notes: list[str] = []
    sweep: str | None = None  # one line that measures the plan against off, each in a server of its own


def memory_knob(what: "Deployed", exported: str, fidelity: Fidelity = "exact", reason: str = "") -> Knob:
    return knob("memory_cap", f"{format_bytes(what.memory.cap_bytes)} of {format_bytes(what.memory.total_bytes)}", exported, fidelity, reason)


def knob(name: str, planned: object, exported: object, fidelity: Fidelity = "exact", reason: str = "") -> Knob:
    return Knob(knob=name, planned=str(planned), exported=str(exported), fidelity=fidelity, reason=reason)
