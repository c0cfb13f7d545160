"""SGLang: YAML for --config, and the adaptive JSON that keys draft lengths on the batch.

Its parser takes misspelt keys that are the beginning of one, and most of what it cannot do is a warning on the way up: check()
compares names itself.
"""

import json
from collections.abc import Sequence

from planner.engine_rules import DraftRules, find_engine
from planner.errors import BadInput
from planner.exporters.contract import Deployed, Spelled, knob, memory_knob
from planner.exporters.lengths import spell_length
from planner.exporters.memory import spell_memory
from planner.exporters.quoting import DATASET, HERE, MORE, from_yaml, shell_line, to_flags, to_yaml
from planner.exporters.within import describe_steps
from planner.exports import Step

FILE, ADAPTIVE = "plan.sglang.yaml", "plan.sglang.adaptive.json"
CHECKED = "against our own copy of SGLang's names and rules, which `make engines` holds against the parser of SGLang 0.5.23"
ALGORITHMS = {
    "draft_model": "STANDALONE",
    "eagle": "EAGLE",
    "eagle3": "EAGLE3",
    "mtp": "NEXTN",
    "dflash": "DFLASH",
    "dspark": "DSPARK",
    "ngram": "NGRAM",
}
CHAINS = ("STANDALONE", "EAGLE", "EAGLE3", "NEXTN")
DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
KV_DTYPES = ("auto", "fp8_e5m2", "fp8_e4m3", "bf16", "bfloat16", "mxfp8", "nvfp4", "fp4_mx_block16")
DRAFT_KV_DTYPES = ("auto", "fp8_e5m2", "fp8_e4m3", "bf16", "bfloat16")
KEYS = {
    "model-path", "dtype", "tp-size", "context-length", "mem-fraction-static", "max-running-requests", "kv-cache-dtype", "speculative-algorithm",
    "speculative-draft-model-path", "speculative-num-steps", "speculative-eagle-topk", "speculative-num-draft-tokens", "speculative-draft-window-size",
    "speculative-draft-sink-size", "speculative-draft-kv-cache-dtype", "speculative-adaptive", "speculative-adaptive-config",
    "speculative-dspark-block-size", "speculative-ngram-max-bfs-breadth",
}  # fmt: skip


def spell(what: Deployed, rules: DraftRules) -> Spelled:
    config = {"model-path": what.model}
    config |= {"dtype": what.dtype} if what.dtype else {}
    config |= {"tp-size": what.tensor_parallel} if what.tensor_parallel > 1 else {}
    config |= {"context-length": what.total_len, "max-running-requests": what.max_batch}  # with a drafter an unset one becomes 48
    knobs = [knob("max_concurrency", what.max_batch, f"max-running-requests {what.max_batch}")]
    if what.memory:
        share = spell_memory(what, find_engine("sglang"))
        config["mem-fraction-static"] = share
        knobs.append(
            memory_knob(what, f"mem-fraction-static {share}", "approximated",
                "it bounds weights and KV cache; what activations and graphs take beside it is SGLang's own rule for a device of the cap's size",
            )
        )  # fmt: skip
    config |= {"kv-cache-dtype": what.kv_dtype} if what.kv_dtype else {}
    files = {}
    if not what.off:
        config |= _speculative(what, rules)
        if what.method == "ngram":
            reason = (
                "SGLang looks n-grams up in a trie over all requests, kept to chains here: what it drafts differs from what was measured elsewhere"
            )
            knobs.append(knob("ngram lookup", "as measured", "trie, breadth 1", "approximated", reason))
    if what.scheduled:
        files[ADAPTIVE] = adaptive_json(what.steps)
        config |= {"speculative-adaptive": True, "speculative-adaptive-config": ADAPTIVE}
        reason = "a row begins where the batch padded to a CUDA graph's size reaches it, which may be a few requests before the plan's"
        reason += "; Gemma 4's own drafter keeps a static length, which SGLang says when it starts" if what.method == "mtp" else ""
        knobs.append(knob("schedule edges", describe_steps(what.steps), "by padded batch", "approximated", reason))
    text = to_yaml(config, f"sglang serve --model-path MODEL --config {FILE}; how faithful it is to the plan stands in plan.json")
    check(text, files.get(ADAPTIVE), rules)
    measure = [
        "python3", "-m", "sglang.benchmark.serving", "--backend", "sglang", "--base-url", "http://127.0.0.1:30000", "--model", what.model,
        "--dataset-name", "sharegpt", "--dataset-path", DATASET, "--sharegpt-output-len", str(what.output_len), "--max-concurrency",
        str(what.max_batch), "--num-prompts", str(8 * what.max_batch),
    ]  # fmt: skip
    return Spelled(
        files={FILE: text, **files},  # its command wants the model's path beside the file, which holds it too
        run=HERE + "exec " + shell_line(["sglang", "serve", "--model-path", what.model, "--config", FILE, MORE]),
        measure="exec " + shell_line(measure),
        knobs=knobs,
        argv=["sglang", "serve", *to_flags(config)],
        notes=["measure takes conversations in ShareGPT's JSON; random tokens would say nothing about acceptance"],
    )


def draft_config(method: str, draft_model: str | None, draft_len: int) -> dict:
    """The flags of one draft length, which an adaptive schedule does not exceed."""
    found = {"speculative-algorithm": ALGORITHMS[method]}
    found |= {"speculative-draft-model-path": draft_model} if draft_model is not None else {}
    words = spell_length("sglang", method, draft_len)
    if method == "ngram":  # its trie is kept to chains
        return found | {"speculative-num-draft-tokens": words["speculative-num-draft-tokens"], "speculative-ngram-max-bfs-breadth": 1}
    return found | words


def adaptive_json(steps: Sequence[Step]) -> str:
    """A schedule: one candidate in each slot, which is then what is drafted."""
    return json.dumps({str(step.batch_from): {"candidate_steps": [step.draft_len]} for step in steps}, indent=1) + "\n"


def _speculative(what: Deployed, rules: DraftRules) -> dict:
    found = draft_config(what.method, what.draft_model, what.draft_len)
    if what.kv:
        sink = what.kv.sink if what.method in rules.sinks else 0
        found["speculative-draft-window-size"] = what.kv.budget - sink
        found |= {"speculative-draft-sink-size": sink} if sink else {}
    found |= {"speculative-draft-kv-cache-dtype": what.draft_kv_dtype} if what.draft_kv_dtype else {}
    return found


def check(text: str, adaptive: str | None, rules: DraftRules) -> None:
    """BadInput where SGLang would refuse the files, or would go on without what they say."""
    config = from_yaml(text)
    if unknown := [key for key in config if key not in KEYS]:
        raise BadInput(f"SGLang has no key {str(unknown[0])[:80]!r}, though it may take it for the beginning of one")
    for key, names, remedy in (
        ("dtype", DTYPES, "profile in one of these"),
        ("kv-cache-dtype", KV_DTYPES, "change --kv-dtype"),
        ("speculative-draft-kv-cache-dtype", DRAFT_KV_DTYPES, "change --draft-kv-dtype"),
    ):
        if config.get(key, "auto") not in names:
            raise BadInput(f"SGLang's {key} is one of {', '.join(names)}, got {str(config[key])[:80]!r}; {remedy}")
    for key in ("context-length", "max-running-requests", "speculative-num-steps", "speculative-num-draft-tokens", "speculative-draft-window-size"):
        if key in config and (type(config[key]) is not int or config[key] < 1):
            raise BadInput(f"SGLang's {key} is a whole number from 1 up, got {str(config[key])[:80]}")
    if not 0 < config.get("mem-fraction-static", 0.5) < 1:
        raise BadInput(f"mem-fraction-static lies in (0, 1), got {config['mem-fraction-static']}; change --memory-cap")
    algorithm = config.get("speculative-algorithm")
    if algorithm is None:
        if extra := [key for key in config if key.startswith("speculative-")]:
            raise BadInput(f"without an algorithm SGLang ignores {extra[0]}")
        return
    method = next((name for name, word in ALGORITHMS.items() if word == algorithm), None)
    if method is None:
        raise BadInput(f"SGLang has no algorithm {str(algorithm)[:80]!r}; give --method")
    if "speculative-draft-model-path" not in config and algorithm not in ("NEXTN", "NGRAM"):
        raise BadInput(f"SGLang's {algorithm} loads a checkpoint, got none; give --draft-model PATH")
    steps = config.get("speculative-num-steps")
    if algorithm in CHAINS and (
        steps is None or config.get("speculative-eagle-topk") != 1 or config.get("speculative-num-draft-tokens") != steps + 1
    ):
        raise BadInput("of a chain SGLang wants all three of num-steps, eagle-topk 1 and num-draft-tokens = num-steps + 1")
    window, sink = config.get("speculative-draft-window-size"), config.get("speculative-draft-sink-size")
    if sink is not None and window is None:
        raise BadInput("a draft-sink-size needs a draft-window-size")
    if window is not None and method not in rules.windowed or sink is not None and method not in rules.sinks:
        raise BadInput(f"SGLang's {algorithm} has no effect from a window or sinks")
    if algorithm == "DFLASH" and window is not None and window < config["speculative-num-draft-tokens"]:
        raise BadInput(f"a DFLASH window holds at least a block ({config['speculative-num-draft-tokens']}), got {window}")
    if (adaptive is not None) != (config.get("speculative-adaptive") is True):
        raise BadInput("speculative-adaptive goes with the file that says how")
    if adaptive is None:
        return
    if method not in rules.scheduled:
        raise BadInput(f"SGLang keeps a static length for {algorithm}")
    slots = json.loads(adaptive)
    if not slots or not all(key.isdigit() and int(key) >= 1 for key in slots) or min(map(int, slots)) != 1:
        raise BadInput(f"the slots of an adaptive schedule are batch sizes from 1 up, got {', '.join(slots)[:80]}")
    candidates = [step for slot in slots.values() for step in slot["candidate_steps"]]
    if steps not in candidates or not all(type(step) is int and 0 <= step <= steps for step in candidates):
        raise BadInput(f"num-steps ({steps}) must be among the candidates and the longest of them, got {candidates}")
