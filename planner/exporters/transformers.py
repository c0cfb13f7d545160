"""transformers: the generation_config.json of the assistant, and a script that generates with it.

The length counts on the assistant's own configuration, on the target's it changes nothing. A confidence threshold of 0 keeps it
from stopping early. The script merges into the assistant's configuration, which holds its stop tokens.
"""

import json

from planner.engine_rules import DraftRules
from planner.errors import BadInput
from planner.exporters.contract import Deployed, Spelled, knob, memory_knob
from planner.exporters.lengths import spell_length
from planner.exporters.quoting import HERE, MORE, shell_line

CONFIG, SETTINGS, SCRIPT = "generation_config.json", "settings.json", "generate.py"
CHECKED = "against our own ranges; a generation with such a file is a part of this package's tests"
NGRAM_LOOKUP = 4  # tokens, as in the own runtime
FIELDS = {
    "num_assistant_tokens": int, "num_assistant_tokens_schedule": str, "assistant_confidence_threshold": float, "prompt_lookup_num_tokens": int,
    "max_matching_ngram_size": int,
}  # fmt: skip

GENERATE = '''"""Greedy or sampled text with the exported setting. Prompt: a file, or standard input. --compare times it beside plain decoding."""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

here = Path(__file__).parent
settings = json.loads((here / "settings.json").read_text())
device = "cuda" if torch.cuda.is_available() else "cpu"


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=settings["dtype"]).to(device).eval()


def configure(config):
    unused = config.update(**json.loads((here / "generation_config.json").read_text()))
    assert not unused, f"this transformers does not know {unused}"


def main():
    names = [word for word in sys.argv[1:] if word != "--compare"]
    prompt = Path(names[0]).read_text() if names else sys.stdin.read()
    tokenizer, target = AutoTokenizer.from_pretrained(settings["model"]), load(settings["model"])
    planned = {}
    if settings["assistant"] is not None:
        planned["assistant_model"] = load(settings["assistant"])
        configure(planned["assistant_model"].generation_config)
    elif (here / "generation_config.json").exists():
        planned = json.loads((here / "generation_config.json").read_text())
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    sampling = {"do_sample": True, "temperature": settings["temperature"]} if settings["temperature"] else {"do_sample": False}
    for name, how in {"planned": planned, "off": {}}.items() if "--compare" in sys.argv else [("", planned)]:
        torch.manual_seed(0)
        start = time.perf_counter()
        tokens = target.generate(**inputs, **how, **sampling, max_new_tokens=settings["max_new_tokens"])[0, inputs["input_ids"].shape[1] :]
        seconds = time.perf_counter() - start
        print(f"{name}: {len(tokens)} tokens, {1e3 * seconds / len(tokens):.1f} ms each" if name else tokenizer.decode(tokens, skip_special_tokens=True))


main()
'''


def spell(what: Deployed, rules: DraftRules) -> Spelled:
    settings = {
        "model": what.model, "assistant": what.draft_model, "dtype": what.dtype or "auto", "max_new_tokens": what.output_len,
        "temperature": what.sampler.temperature,
    }  # fmt: skip
    files = {SETTINGS: json.dumps(settings, indent=1) + "\n", SCRIPT: GENERATE}
    knobs = []
    if not what.off:
        config = _config(what)
        files[CONFIG] = json.dumps(config, indent=1) + "\n"
        check(files[CONFIG])
        if what.method == "draft_model" and what.draft_model is None:
            raise BadInput("transformers loads the assistant from a checkpoint, got none; give --draft-model PATH")
    if what.method == "ngram":
        reason = "transformers looks up at most that many tokens, down to one: what it drafts differs from what was measured elsewhere"
        knobs.append(knob("ngram lookup", "as measured", f"{NGRAM_LOOKUP} tokens", "approximated", reason))
    if what.memory:
        knobs.append(memory_knob(what, "none", "dropped", "transformers takes what memory it needs"))
    if what.tensor_parallel > 1:
        knobs.append(knob("tensor_parallel", what.tensor_parallel, 1, "dropped", "the script runs on one device"))
    for name, value in (("kv_dtype", what.kv_dtype), ("draft_kv_dtype", what.draft_kv_dtype)):
        if value:
            knobs.append(knob(name, value, "the model's", "dropped", "transformers keeps caches in the model's dtype"))
    run = ["python3", SCRIPT]
    return Spelled(
        files=files, run=HERE + "exec " + shell_line([*run, MORE]), measure=HERE + "exec " + shell_line([*run, "--compare", MORE]),
        knobs=knobs, argv=run,
        notes=["run and measure take the absolute path of a prompt, or standard input",
               *([f"{CONFIG} is to be merged into the one beside the assistant, as {SCRIPT} does, not to replace it"] if what.draft_model else [])],
    )  # fmt: skip


def _config(what: Deployed) -> dict:
    if what.method == "ngram":
        return {"prompt_lookup_num_tokens": what.draft_len, "max_matching_ngram_size": NGRAM_LOOKUP}
    length = spell_length("transformers", what.method, what.draft_len)
    return {**length, "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}


def check(text: str) -> None:
    """BadInput for what transformers would take and then ignore or trip over."""
    config = json.loads(text)
    for key, value in config.items():
        if key not in FIELDS or type(value) is not FIELDS[key]:
            raise BadInput(f"transformers' generation configuration has no {key[:80]!r} of {str(value)[:80]!r}")
        if FIELDS[key] is int and value < 1:
            raise BadInput(f"transformers' {key} is a whole number from 1 up, got {value}")
    if config.get("num_assistant_tokens_schedule", "constant") != "constant" or config.get("assistant_confidence_threshold", 0.0) != 0:
        raise BadInput("a fixed length needs the schedule constant and a confidence threshold of 0")
