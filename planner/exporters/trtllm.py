"""TensorRT-LLM: YAML for trtllm-serve --config. No copy of it can be had here, so check() is a mirror of its classes only.

Schedules: since pull request 10860 a key is the last batch of its row, before it was the first (engine_rules.py knows by version).
The longest length must stand in the first row.
"""

from planner.engine_rules import DraftRules, find_engine
from planner.errors import BadInput
from planner.exporters.contract import Deployed, Spelled, knob, memory_knob
from planner.exporters.lengths import spell_length
from planner.exporters.memory import spell_memory
from planner.exporters.quoting import DATASET, HERE, MORE, from_yaml, shell_line, to_yaml
from planner.exporters.within import describe_steps
from planner.exports import Knob, Step

FILE = "plan.trtllm.yaml"
CHECKED = "checked against a mirror of its classes only; TensorRT-LLM itself did not run"
TYPES = {
    "draft_model": "Draft_Target", "eagle": "Eagle", "eagle3": "Eagle3", "mtp": "MTP", "ngram": "NGram", "pard": "PARD", "dflash": "DFlash",
    "dspark": "DSpark",
}  # fmt: skip
TOP = {"dtype": str, "tensor_parallel_size": int, "max_batch_size": int, "max_seq_len": int, "kv_cache_config": dict, "speculative_config": dict}
KV = {"free_gpu_memory_fraction": float, "dtype": str}
SPECULATIVE = {"decoding_type": str, "speculative_model": str, "max_draft_len": int, "draft_len_schedule": dict}
NEED_MODEL = ("Draft_Target", "Eagle", "Eagle3", "PARD", "DFlash")


def spell(what: Deployed, rules: DraftRules) -> Spelled:
    config = {"dtype": what.dtype} if what.dtype else {}
    config |= {"tensor_parallel_size": what.tensor_parallel} if what.tensor_parallel > 1 else {}
    config |= {"max_batch_size": what.max_batch, "max_seq_len": what.total_len}
    knobs, cache = [knob("max_concurrency", what.max_batch, f"max_batch_size {what.max_batch}")], {}
    if what.memory:
        share = spell_memory(what, find_engine("tensorrt-llm"))
        if share is None:
            reason = "its fraction is of what weights and activations leave, and the sizes of the models are not known; give --profile of an engine"
            knobs.append(memory_knob(what, "its default", "dropped", reason))
        else:
            cache["free_gpu_memory_fraction"] = share
            reason = "what activations take is an estimate"
            knobs.append(memory_knob(what, f"free_gpu_memory_fraction {share}", "approximated", reason))
    cache |= {"dtype": what.kv_dtype} if what.kv_dtype else {}
    config |= {"kv_cache_config": cache} if cache else {}
    notes = []
    if what.draft_kv_dtype and not what.off:
        knobs.append(knob("draft_kv_dtype", what.draft_kv_dtype, "the target's", "dropped", "both models share one cache configuration"))
    if not what.off:
        steps, said = _first_is_longest(what.steps)
        knobs += said
        if steps:
            config["speculative_config"] = _speculative(what, rules, steps)
            if any(step.draft_len == 0 for step in steps):
                notes.append("behind a load at which nothing is drafted, acceptance was seen to collapse (TensorRT-LLM pull request 16888): watch it")
    text = to_yaml(config, f"trtllm-serve --config {FILE}; {CHECKED}; how faithful it is to the plan stands in plan.json")
    check(text, rules)
    measure = [
        "python3", "-m", "tensorrt_llm.serve.scripts.benchmark_serving", "--backend", "openai", "--base-url", "http://127.0.0.1:8000", "--model",
        what.model, "--dataset-name", "sharegpt", "--dataset-path", DATASET, "--max-concurrency", str(what.max_batch), "--num-prompts",
        str(8 * what.max_batch),
    ]  # fmt: skip
    serve = ["trtllm-serve", what.model, "--config", FILE]
    return Spelled(
        files={FILE: text}, run=HERE + "exec " + shell_line([*serve, MORE]), measure="exec " + shell_line(measure), knobs=knobs, argv=serve,
        notes=[*notes, "measure takes conversations in ShareGPT's JSON; random tokens would say nothing about acceptance"],
    )  # fmt: skip


def _first_is_longest(steps: tuple[Step, ...]) -> tuple[tuple[Step, ...], list[Knob]]:
    """Rows that draft no more than the first; none where that drafts nothing."""
    longest = steps[0].draft_len
    if all(step.draft_len <= longest for step in steps):
        return steps, []
    cut: list[Step] = []
    for step in steps:
        draft_len = min(step.draft_len, longest)
        first = step.batch_from
        if cut and cut[-1].draft_len == draft_len:
            first = cut.pop().batch_from
        cut.append(Step(batch_from=first, batch_to=step.batch_to, draft_len=draft_len))
    reason = "max_draft_len must be the length of the first row, so that none is longer"
    shown = describe_steps(tuple(cut)) if longest else "off"
    return tuple(cut) if longest else (), [knob("schedule lengths", describe_steps(steps), shown, "approximated", reason)]


def _speculative(what: Deployed, rules: DraftRules, steps: tuple[Step, ...]) -> dict:
    found = {"decoding_type": TYPES[what.method]}
    found |= {"speculative_model": what.draft_model} if what.draft_model is not None else {}
    found |= spell_length("tensorrt-llm", what.method, steps[0].draft_len)
    if len(steps) > 1:
        found["draft_len_schedule"] = {step.batch_to if rules.schedule_keys == "to" else step.batch_from: step.draft_len for step in steps}
    return found


def check(text: str, rules: DraftRules) -> None:
    """BadInput where the mirror of TensorRT-LLM's strict classes refuses the file."""
    config = from_yaml(text)
    _strict(config, TOP, "TensorRT-LLM's configuration")
    _strict(config.get("kv_cache_config", {}), KV, "kv_cache_config")
    if not 0 < config.get("kv_cache_config", {}).get("free_gpu_memory_fraction", 0.9) <= 1:
        raise BadInput("free_gpu_memory_fraction lies in (0, 1]; change --memory-cap")
    speculative = config.get("speculative_config")
    if speculative is None:
        return
    _strict(speculative, SPECULATIVE, "speculative_config")
    kind, longest = speculative.get("decoding_type"), speculative.get("max_draft_len", 0)
    if kind not in TYPES.values() or next(name for name, word in TYPES.items() if word == kind) not in rules.methods:
        raise BadInput(f"TensorRT-LLM has no decoding_type {str(kind)[:80]!r}; give --method")
    if longest < 1:
        raise BadInput(f"max_draft_len must be at least 1, got {longest}")
    if kind in NEED_MODEL and not speculative.get("speculative_model"):
        raise BadInput(f"TensorRT-LLM's {kind} loads a checkpoint, got none; give --draft-model PATH")
    schedule = speculative.get("draft_len_schedule")
    if schedule is None:
        return
    if not schedule or not all(type(key) is int and key >= 1 and type(value) is int and 0 <= value <= longest for key, value in schedule.items()):
        raise BadInput(f"draft_len_schedule maps batches from 1 up to lengths from 0 to max_draft_len ({longest}), got {str(schedule)[:80]}")
    if schedule[min(schedule)] != longest:
        raise BadInput(f"the length at the smallest key must be max_draft_len ({longest}), got {schedule[min(schedule)]}")
    if rules.schedule_keys == "from" and min(schedule) != 1:
        raise BadInput(f"a schedule by first batches begins at 1, got {min(schedule)}")


def _strict(config: dict, fields: dict[str, type], what: str) -> None:
    for key, value in config.items():
        if key not in fields:
            raise BadInput(f"{what} has no field {str(key)[:80]!r}")
        if type(value) is not fields[key]:
            raise BadInput(f"{what}: {key} must be {fields[key].__name__}, got {str(value)[:80]!r}")
