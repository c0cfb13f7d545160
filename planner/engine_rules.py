"""What serving engines do with a device's memory, by version: fractions, blocks, draft slots, and which drafters can be windowed;
and what each can be told about drafting, which is what a plan is exported within.

Read off the releases named here; ranges end at the newest one that was read, and others are refused.
Sources: vLLM arg_utils.py (batch defaults by device), pull requests 30515 and 45197 (graphs in the memory profile), cache.py
(0.9, then 0.92); SGLang server_args.py (reserve by device); TensorRT-LLM llm_args.py; llama.cpp common/arg.cpp. On drafting: vLLM
speculative.py of 0.33 (0.32 was run) and pull request 53827, vllm-ascend 10023; SGLang 0.5.23 (run); TensorRT-LLM pull requests 8194 and
10860; llama.cpp b10434 (run) and b11434; transformers 5.19 (run) and 5.23.
"""

import re
from typing import Literal, NamedTuple

from planner.errors import BadInput

FractionOf = Literal["total", "static", "free", "margin"]
FRACTION_OF: dict[FractionOf, str] = {
    "total": "of the device's memory, for weights, activations and KV cache together",
    "static": "of the memory free at the start, for weights and KV cache; activations and graphs take the rest",
    "free": "of what is free after weights and activations, for the KV cache",
    "margin": "all but a margin that stays free",
}


class EngineRules(NamedTuple):
    name: str
    first: tuple[int, ...]  # version
    last: tuple[int, ...]
    fraction: float | None  # default; None: by a rule of the engine's own
    fraction_of: FractionOf
    fraction_flag: str
    block_tokens: int  # of the KV cache
    graphs: Literal["beside", "residue", "counted"] = "beside"  # CUDA graphs: outside the fraction, or what profiling them leaves, or inside
    speculative_requests: int | None = None  # cap on running requests once a drafter is loaded
    on_demand: bool = True  # blocks are taken as a request grows; else its whole length at once
    windowed: tuple[str, ...] = ()  # methods whose drafter can be given a kv budget
    window_saves: tuple[str, ...] = ()  # those of them where that saves memory; elsewhere it saves reads alone


ENGINES = (
    EngineRules("vllm", (0, 10), (0, 17), 0.9, "total", "--gpu-memory-utilization", 16, windowed=("dflash",), window_saves=("dflash",)),
    EngineRules("vllm", (0, 18), (0, 20), 0.9, "total", "--gpu-memory-utilization", 16, "residue", windowed=("dflash",), window_saves=("dflash",)),
    EngineRules("vllm", (0, 21), (0, 33), 0.92, "total", "--gpu-memory-utilization", 16, "counted", windowed=("dflash",), window_saves=("dflash",)),
    EngineRules(
        "sglang", (0, 5), (0, 5), None, "static", "--mem-fraction-static", 1, speculative_requests=48, windowed=("eagle", "eagle3", "mtp", "dflash"),
        window_saves=("dflash",),
    ),
    EngineRules("tensorrt-llm", (1, 0), (1, 4), 0.9, "free", "free_gpu_memory_fraction", 32),
    EngineRules("llama.cpp", (10434,), (11549,), None, "margin", "--fit-target", 256, on_demand=False),
)  # fmt: skip
ALIASES = {"trtllm": "tensorrt-llm", "tensorrt_llm": "tensorrt-llm", "llamacpp": "llama.cpp", "llama-cpp": "llama.cpp", "hf": "transformers"}


class DraftRules(NamedTuple):
    """What one engine can be told about drafting."""

    name: str
    first: tuple[int, ...]  # version
    last: tuple[int, ...]
    methods: tuple[str, ...]  # drafters it can load
    scheduled: tuple[str, ...] = ()  # of them, those whose draft_len may follow the running batch
    windowed: tuple[str, ...] = ()  # those whose drafter takes a kv budget as a window of recent tokens
    sinks: tuple[str, ...] = ()  # of those, the ones that keep leading tokens beside it
    max_batch: int | None = None  # requests it drafts for at once
    no_tree: str = "it verifies chains only"  # why it cannot be told a tree of the best nodes; empty: it can
    schedule_keys: Literal["from", "to"] = "from"  # whether a schedule names the first or the last batch of a row


_NO_VLLM_TREE = "it verifies chains only since tree attention was removed (pull request 42121); one of the best nodes is open as 40809"
_EAGLE_TREE = "its trees are those of EAGLE heads, of a width of the engine's own and one size; the best nodes of any drafter it cannot be told"
_VLLM = ("draft_model", "eagle", "eagle3", "mtp", "dflash", "dspark", "pard", "ngram", "suffix")
_VLLM_SCHEDULED = ("draft_model", "eagle", "eagle3", "mtp", "dflash", "ngram")  # both model runners
_TENSORRT = ("draft_model", "eagle", "eagle3", "mtp", "dflash", "dspark", "pard", "ngram")
DRAFTING = (
    DraftRules("vllm", (0, 32), (0, 33), _VLLM, _VLLM_SCHEDULED, no_tree=_NO_VLLM_TREE),
    DraftRules("vllm-draft-window", (0, 33), (0, 33), _VLLM, _VLLM_SCHEDULED, windowed=("eagle3",), no_tree=_NO_VLLM_TREE),  # vLLM with pull request 53827
    DraftRules("vllm-ascend", (0, 27), (0, 27), _VLLM, windowed=("eagle3", "dflash", "dspark")),  # its schedules were not looked at
    DraftRules(
        "sglang", (0, 5, 23), (0, 5, 23), ("draft_model", "eagle", "eagle3", "mtp", "dflash", "dspark", "ngram"), ("eagle", "eagle3", "mtp"),
        windowed=("eagle", "eagle3", "mtp", "dflash"), sinks=("eagle", "mtp"), no_tree=_EAGLE_TREE,
    ),
    DraftRules("tensorrt-llm", (1, 2), (1, 2), ("draft_model", "ngram"), ("draft_model", "ngram")),
    DraftRules("tensorrt-llm", (1, 4), (1, 4), _TENSORRT, ("draft_model", "eagle", "eagle3", "mtp", "dflash", "pard", "ngram"), schedule_keys="to", no_tree=_EAGLE_TREE),
    DraftRules("llama.cpp", (10434,), (11549,), ("draft_model", "eagle3", "mtp", "dflash", "dspark", "ngram")),
    DraftRules("transformers", (5, 19), (5, 23), ("draft_model", "ngram"), max_batch=1),
    DraftRules(
        "planner", (0, 1), (0, 1), ("draft_model", "eagle3", "ngram", "self_sparse"), windowed=("draft_model", "self_sparse"),
        sinks=("draft_model", "self_sparse"), max_batch=1, no_tree="",
    ),
)  # fmt: skip

Ranged = EngineRules | DraftRules
METHODS = ("draft_model", "eagle", "eagle3", "mtp", "dflash", "dspark", "pard", "ngram", "suffix")


def find_engine(text: str) -> EngineRules:
    """The rules of `vllm@0.33`, or of the newest version known for `vllm`; BadInput lists what is known."""
    return _find(text, ENGINES)


def find_drafting(text: str) -> tuple[DraftRules, str]:
    """What the engine `vllm@0.33` can be told about drafting, and its version; without one the newest that is known."""
    rules = _find(text, DRAFTING)
    return rules, text.partition("@")[2].strip().lower() or _dotted(rules.last)


def _find(text: str, table: tuple[Ranged, ...]) -> Ranged:
    name, at, version = text.strip().lower().partition("@")
    name = ALIASES.get(name, name)
    known = [rules for rules in table if rules.name == name]
    if not known:
        raise BadInput(f"an engine is one of {describe_engines(table)}, got {text[:80]!r}")
    if not at:
        return known[-1]
    if not re.fullmatch(r"[vb]?[0-9]{1,6}(\.[0-9]{1,6}){0,3}([a-z]+[0-9]*|\.post[0-9]+)?", version):
        raise BadInput(f"a version is written as in vllm@0.33, got {text[:80]!r}")
    numbers = tuple(int(part) for part in re.findall(r"[0-9]+", version))
    for rules in known:
        if rules.first <= numbers[: len(rules.first)] <= rules.last:
            return rules
    raise BadInput(f"the versions known of {name} are {', '.join(span(rules) for rules in known)}, got {version}; name one of them")


def describe_engines(table: tuple[Ranged, ...] = ENGINES) -> str:
    """Engines with the versions that are known of each."""
    names = dict.fromkeys(rules.name for rules in table)
    spans = {name: [rules for rules in table if rules.name == name] for name in names}
    return ", ".join(f"{name} ({_range(rules[0].first, rules[-1].last)})" for name, rules in spans.items())


def draft_slots(engine: EngineRules, method: str, draft_len: int) -> int:
    """KV slots a request takes beyond its tokens: room for what is drafted, and what the drafter's own pass needs more."""
    if draft_len == 0:
        return 0
    extra = {"draft_model": 1, "pard": draft_len}.get(method, 0) if engine.name == "vllm" else 0
    return draft_len + extra


def method_of(name: str) -> str:
    """The engine method that a drafter's name says, a draft model where it says none."""
    word = re.split(r"[-_:. ]", name.lower())[0]
    return next((method for method in METHODS if name.lower() == method or word == method), "draft_model")


def span(rules: Ranged) -> str:
    """The versions that rules hold for."""
    return _range(rules.first, rules.last)


def _range(first: tuple[int, ...], last: tuple[int, ...]) -> str:
    return _dotted(first) if first == last else f"{_dotted(first)} to {_dotted(last)}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
