"""What of a plan an engine can be told: the rest is dropped or approximated, aloud."""

from planner.engine_rules import DraftRules
from planner.errors import BadInput
from planner.exporters.contract import Deployed, knob
from planner.exports import Knob, Step
from planner.serving import OFF
from planner.specs import describe_kv, describe_tree


def describe_steps(steps: tuple[Step, ...]) -> str:
    """A schedule by running batch in a few words."""
    spans = [str(step.batch_from) if step.batch_from == step.batch_to else f"{step.batch_from}-{step.batch_to}" for step in steps]
    return ", ".join(f"{span}: K={step.draft_len}" for span, step in zip(spans, steps, strict=True))


def fit_engine(what: Deployed, rules: DraftRules, load: int, draft_len: int) -> tuple[Deployed, list[Knob]]:
    """The deployment with what the engine lacks taken out, and what became of each knob.

    draft_len  of the plan at the concurrency `load`, for an engine without schedules
    """
    knobs = []
    if what.off:
        return what._replace(kv=None, draft_kv_dtype=None), [knob("drafter", "off", "off")]
    if what.method not in rules.methods:
        raise BadInput(
            f"{rules.name} drafts with {', '.join(rules.methods)}, got {what.method}; give --profile, so that planner plans again within that"
        )
    if not what.scheduled:
        knobs.append(knob("draft_len", f"K={what.draft_len}", f"K={what.draft_len}"))
    elif what.method in rules.scheduled:
        knobs.append(knob("schedule", describe_steps(what.steps), describe_steps(what.steps)))
    else:
        static = (Step(batch_from=1, batch_to=what.max_batch, draft_len=draft_len),)
        reason = f"{rules.name} has one draft_len for {what.method} at every load; this is the plan's for a concurrency of {load}"
        knobs.append(knob("schedule", describe_steps(what.steps), f"K={draft_len}", "dropped", reason))
        what = what._replace(steps=static)
    if what.draft_len == 0:
        knobs.append(knob("drafter", f"{what.method} idle", "off", "exact", ""))
        return what._replace(method=OFF, draft_model=None, kv=None, draft_kv_dtype=None), knobs
    knobs.append(knob("drafter", what.method, what.method))
    if what.tree is not None and rules.no_tree:
        reason = f"{rules.no_tree}; give --profile, so that planner plans the best chain for it"
        knobs.append(knob("tree", describe_tree(what.tree), f"a chain of {what.draft_len}", "dropped", reason))
        what = what._replace(tree=None)
    elif what.tree is not None:
        knobs.append(knob("tree", describe_tree(what.tree), describe_tree(what.tree)))
    if what.kv is not None:
        what, said = _fit_kv(what, rules)
        knobs.append(said)
    return what, knobs


def _fit_kv(what: Deployed, rules: DraftRules) -> tuple[Deployed, Knob]:
    kv, planned = what.kv, f"{describe_kv(what.kv)} (sink {what.kv.sink})"
    if rules.name == "planner":
        return what, knob("kv_budget", planned, planned)
    if what.method not in rules.windowed:
        reason = f"{rules.name} gives a {what.method} drafter no kv budget: it keeps and reads all tokens, which costs time and memory"
        return what._replace(kv=None), knob("kv_budget", planned, "all tokens", "dropped", reason)
    reasons = []
    if kv.selection != "window":
        reasons.append(f"it keeps the most recent tokens where the plan chose by {kv.selection}: acceptance will differ")
    if kv.sink and what.method not in rules.sinks:
        reasons.append(f"it keeps no sinks: all {kv.budget} are recent ones")
    if what.method != "dflash" and kv.storage == "evict":
        reasons.append("it saves reads, not memory: every token keeps its slot")
    sink = kv.sink if what.method in rules.sinks else 0
    exported = f"{sink} sinks and {kv.budget - sink} recent tokens" if sink else f"{kv.budget} recent tokens"
    return what, knob("kv_budget", planned, exported, "approximated" if reasons else "exact", "; ".join(reasons))
