"""The own runtime: `planner generate` with every knob of the plan."""

import shlex

import msgspec

from planner.engine_rules import DraftRules
from planner.errors import BadInput
from planner.exporters.contract import Deployed, OwnRuntime, Spelled, knob, memory_knob
from planner.exporters.quoting import Raw, shell_line
from planner.measurements import encode
from planner.plans import TreeFile
from planner.specs import AdaptiveTree, DraftConfig, FixedTree, Sampler, SparseKV, Tree, usual_storage

TREE = "plan.tree.json"
CHECKED = "it is the command that this package runs"


def generate_words(
    model: str,
    own: OwnRuntime,
    sampler: Sampler,
    output_len: int,
    *,
    tensor_parallel: int = 1,
    usual_execution: str | None = None,  # not worth a flag
    tree_costs: str = "PLAN.json",  # where an adaptive tree has its costs from
) -> list[str]:
    """The words of the command, but for its prompt."""
    config = own.config
    launcher = "planner" if tensor_parallel == 1 else f"torchrun --nproc-per-node {tensor_parallel} -m planner.cli"
    words = [*shlex.split(launcher), "generate", "--model", model]
    words += ["--dtype", own.dtype] * (own.dtype != "bfloat16") + ["--weights", own.weights] * (own.weights != "full")
    words += ["--rope-theta", str(own.rope_theta)] * (own.rope_theta is not None)
    words += ["--max-context", str(own.max_context_len)] * (own.max_context_len is not None)
    words += ["--execution", own.execution] * (own.execution != usual_execution)
    words += _drafter_words(config)
    if isinstance(config.kv, SparseKV):
        words += _kv_words(config.drafter.kind, config.kv)
    words += ["--draft-len", str(config.draft_len)] * (config.draft_len > 0) + _tree_words(config.tree, tree_costs)
    words += ["--temperature", str(sampler.temperature)] + ["--top-p", str(sampler.top_p)] * (sampler.top_p < 1)
    return words + ["--top-k", str(sampler.top_k)] * (sampler.top_k > 0) + ["--max-new-tokens", str(output_len)]


def _drafter_words(config: DraftConfig) -> list[str]:
    drafter = config.drafter
    words = ["--drafter", drafter.kind] + ["--draft-model", str(drafter.path)] * (drafter.path is not None)
    words += ["--draft-dtype", str(drafter.dtype)] * (drafter.dtype is not None)
    words += ["--drafter-weights", drafter.weights] * (drafter.weights != "full")
    return words + ["--drafter-vocab", str(drafter.vocab)] * (drafter.vocab is not None)


def _tree_words(tree: Tree | None, costs: str) -> list[str]:
    match tree:
        case None:
            return []
        case FixedTree():
            return ["--tree-size", str(tree.size)]
    return ["--tree-size", "adaptive", "--tree-costs", costs]


def _kv_words(kind: str, kv: SparseKV) -> list[str]:
    usual = {field.name: field.default for field in msgspec.structs.fields(SparseKV)}  # a small budget does not hold them
    words = ["--kv-budget", str(kv.budget), "--selection", kv.selection]
    words += ["--sink", str(kv.sink)] * (kv.sink != usual["sink"]) + ["--recent", str(kv.recent)] * (kv.recent != usual["recent"])
    words += ["--refresh", str(kv.refresh)] * (kv.refresh is not None)
    return words + ["--storage", kv.storage] * (kv.storage != usual_storage(kind, kv.refresh))


def spell(what: Deployed, rules: DraftRules) -> Spelled:
    if what.own is None:
        raise BadInput("the own runtime runs what it was profiled with, and the schedule does not say that; give --profile of the own runtime")
    words = generate_words(what.model, what.own, what.sampler, what.output_len, tensor_parallel=what.tensor_parallel, tree_costs=TREE)
    tree, files = what.own.config.tree, {}
    if isinstance(tree, AdaptiveTree):
        files[TREE] = encode(TreeFile(tree=tree)).decode()
    prompt = ["--prompt-file", Raw('"${1:--}"')]
    knobs = []
    if what.memory:
        knobs.append(memory_knob(what, "as planned", "approximated", "the choice fits under it; nothing holds it there"))
    for name, value in (("kv_dtype", what.kv_dtype), ("draft_kv_dtype", what.draft_kv_dtype)):
        if value:
            knobs.append(knob(name, value, "the model's", "dropped", "the own runtime keeps caches in the model's dtype"))
    here = [Raw(f'"$(dirname -- "$0")/{TREE}"') if word == TREE else word for word in words] if files else words
    return Spelled(
        files=files, run="exec " + shell_line([*here, *prompt]), measure="exec " + shell_line([*here, *prompt, "--json"]), knobs=knobs, argv=words,
        notes=["run and measure take the path of a prompt, or standard input; planner check PLAN compares with plain decoding on texts"],
    )  # fmt: skip
