"""A cap on a device's memory as the fraction or margin that each engine takes it by."""

import math

from planner.cost.capacity import CONTEXT_BYTES, MIB, Settings, kv_pool, sglang_fraction
from planner.engine_rules import EngineRules
from planner.errors import BadInput
from planner.exporters.contract import Deployed
from planner.serving import SystemSpec
from planner.units import format_bytes


def spell_memory(what: Deployed, rules: EngineRules) -> float | int | None:
    """The value of the engine's own flag that keeps to the cap; None where the sizes of the models are needed and not known.

    total   cap / total
    static  SGLang keeps a reserve of its own for activations and graphs beside what its fraction names: (cap - reserve) / free at the start
    free    (cap - held) / (total - held), held being weights, activations and the context
    margin  total - cap, in MiB
    """
    total, cap = what.memory.total_bytes, what.memory.cap_bytes
    match rules.fraction_of:
        case "total":
            share = cap / total
        case "static":
            reserve = cap * (1 - sglang_fraction(cap, what.tensor_parallel, not what.off, what.method))
            share = (cap - reserve - CONTEXT_BYTES) / (total - CONTEXT_BYTES)
        case "free":
            if what.memory.target is None:
                return None
            settings = Settings(rules, what.tensor_parallel, rules.fraction, max_num_seqs=what.max_batch)
            system = SystemSpec(name="", memory_bytes=total, fraction=1.0)
            parts = kv_pool(what.memory.target, what.memory.drafter, system, settings, what.method).parts
            held = sum(part.bytes for part in parts if part.name != "outside the fraction")
            share = (cap - held) / (total - held)
        case "margin":
            return math.ceil((total - cap) / MIB)
    share = math.floor(1000 * share + 1e-6) / 1000  # rounded down: it is a cap, up to the whole byte that it may lack
    if not 0 < share <= 1:
        raise BadInput(f"{rules.name} needs more than {format_bytes(cap)} of {format_bytes(total)} for anything to fit; raise --memory-cap")
    return share
