"""llama.cpp: an INI preset for llama-server's router, which starts the server of the one model in it.

The context is shared out over the slots, and the server holds a request's whole length from its start.
"""

import json

from planner.engine_rules import DraftRules, find_engine
from planner.errors import BadInput
from planner.exporters.contract import Deployed, Spelled, knob, memory_knob
from planner.exporters.lengths import spell_length
from planner.exporters.memory import spell_memory
from planner.exporters.quoting import HERE, MORE, shell_line, to_flags, to_ini
from planner.serving import OFF

FILE, MODEL_ID, BLOCK = "plan.llamacpp.ini", "planned", 256
CHECKED = "against our own copy of llama.cpp's names; its server is started on such presets in this package's tests"
TYPES = {
    "draft_model": "draft-simple", "eagle3": "draft-eagle3", "mtp": "draft-mtp", "dflash": "draft-dflash", "dspark": "draft-dspark",
    "ngram": "ngram-simple",
}  # fmt: skip
KV_DTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
NGRAM_LOOKUP = 4  # tokens looked up, as in the own runtime; llama.cpp's default of 12 finds far less, and it makes no draft shorter than that
KEYS = {
    "model", "ctx-size", "parallel", "fit-target", "cache-type-k", "cache-type-v", "spec-type", "spec-draft-model", "spec-draft-n-max",
    "spec-draft-p-min", "spec-draft-type-k", "spec-draft-type-v", "spec-ngram-simple-size-n", "spec-ngram-simple-size-m", "load-on-startup",
}  # fmt: skip


def spell(what: Deployed, rules: DraftRules) -> Spelled:
    for name, flag in ((what.model, "--model"), (what.draft_model, "--draft-model")):
        if name is not None and not name.lower().endswith(".gguf"):
            raise BadInput(f"llama.cpp loads GGUF files, got {name[:80]!r}; give {flag} FILE.gguf")
    length = -(-(what.total_len + what.draft_len + 1) // BLOCK) * BLOCK
    config = {"model": what.model, "ctx-size": what.max_batch * length, "parallel": what.max_batch}
    knobs = [knob("max_concurrency", what.max_batch, f"parallel {what.max_batch}")]
    if what.dtype:
        knobs.append(knob("dtype", what.dtype, "the GGUF file's", "dropped", "a GGUF file has types of its own"))
    if what.tensor_parallel > 1:
        knobs.append(
            knob("tensor_parallel", what.tensor_parallel, "all devices", "approximated", "llama.cpp shares out layers over the devices it sees")
        )
    if what.memory:
        margin = spell_memory(what, find_engine("llama.cpp"))
        config["fit-target"] = margin
        knobs.append(memory_knob(what, f"fit-target {margin} MiB stay free"))
    config |= {"cache-type-k": what.kv_dtype, "cache-type-v": what.kv_dtype} if what.kv_dtype else {}
    config |= draft_config(what.method, what.draft_model, what.draft_len)
    if what.method == "ngram":
        lookup = config["spec-ngram-simple-size-n"]
        reason = f"llama.cpp looks {lookup} tokens up and no fewer: what it drafts differs from what was measured elsewhere"
        knobs.append(knob("ngram lookup", "as measured", f"{lookup} tokens", "approximated", reason))
    elif not what.off:
        config |= {"spec-draft-type-k": what.draft_kv_dtype, "spec-draft-type-v": what.draft_kv_dtype} if what.draft_kv_dtype else {}
    config["load-on-startup"] = "true"
    text = "\n".join(
        [f"; llama-server --models-preset {FILE}; how faithful it is to the plan stands in plan.json", "version = 1", "", f"[{MODEL_ID}]"]
        + [f"{key} = {to_ini(value)}" for key, value in config.items()]
    )
    text += "\n"
    check(text)
    body = json.dumps(
        {"model": MODEL_ID, "prompt": "Once upon a time there was", "max_tokens": what.output_len, "temperature": what.sampler.temperature}
    )
    measure = ["curl", "-sS", "http://127.0.0.1:8080/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    flags = to_flags({key: value for key, value in config.items() if key != "load-on-startup"})
    return Spelled(
        files={FILE: text},
        run=HERE + "exec " + shell_line(["llama-server", "--models-preset", FILE, MORE]),
        measure="exec " + shell_line(measure),
        knobs=knobs,
        argv=["llama-server", *flags],
        notes=["measure asks for one completion: its timings hold draft_n and draft_n_accepted; llama-bench does not draft"],
    )


def draft_config(method: str, draft_model: str | None, draft_len: int) -> dict:
    if method == OFF:
        return {"spec-type": "none"}
    found = {"spec-type": TYPES[method]}
    if method == "ngram":
        return found | {"spec-ngram-simple-size-n": min(NGRAM_LOOKUP, draft_len), "spec-ngram-simple-size-m": draft_len}
    found |= {"spec-draft-model": draft_model} if draft_model is not None else {}
    return found | {**spell_length("llama.cpp", method, draft_len), "spec-draft-p-min": 0.0}


def parse(text: str) -> dict[str, dict[str, str]]:
    """Sections of a preset, read as llama.cpp reads them: a comment begins anywhere."""
    sections: dict[str, dict[str, str]] = {"": {}}
    name = ""
    for line in text.splitlines():
        line = line.replace("#", ";").partition(";")[0].strip()
        if line.startswith("[") and line.endswith("]"):
            name = line[1:-1]
            sections[name] = {}
        elif line:
            key, _, value = line.partition("=")
            sections[name][key.strip()] = value.strip()
    return sections


def check(text: str) -> None:
    """BadInput where llama-server would refuse the preset, or its child would not start."""
    for name, config in parse(text).items():
        if not name:
            continue
        if unknown := [key for key in config if key not in KEYS]:
            raise BadInput(f"llama.cpp's preset has no option {unknown[0][:80]!r}")
        kind = config.get("spec-type", "none")
        if kind not in ("none", *TYPES.values()):
            raise BadInput(f"llama.cpp has no spec-type {kind[:80]!r}; give --method")
        if kind.startswith("draft-") and kind != "draft-mtp" and "spec-draft-model" not in config:
            raise BadInput(f"llama.cpp's {kind} loads a checkpoint, got none; give --draft-model FILE.gguf")
        for key in ("cache-type-k", "cache-type-v", "spec-draft-type-k", "spec-draft-type-v"):
            if config.get(key, "f16") not in KV_DTYPES:
                flag = "--draft-kv-dtype" if key.startswith("spec") else "--kv-dtype"
                raise BadInput(f"llama.cpp's {key} is one of {', '.join(KV_DTYPES)}, got {config[key][:80]!r}; change {flag}")
        for key in ("ctx-size", "parallel", "spec-draft-n-max", "spec-ngram-simple-size-m"):
            if key in config and not (config[key].isdigit() and int(config[key]) >= 1):
                raise BadInput(f"llama.cpp's {key} is a whole number from 1 up, got {config[key][:80]!r}")
