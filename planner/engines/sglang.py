"""SGLang: its command, and what its log says. Read off SGLang 0.5.23.

Its parser takes the beginning of a flag for the whole, so every flag that begins with --speculative is taken for one. Its log names no
levels: what is not in force is known by its words alone.
"""

import re
from pathlib import Path

from planner.engine_rules import find_engine
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
from planner.exporters import sglang as exporter
from planner.exporters.quoting import shell_line, to_flags
from planner.files import write_whole
from planner.schedules import Setting
from planner.serving import OFF
from planner.units import GIB

METHODS = {algorithm: method for method, algorithm in exporter.ALGORITHMS.items()}
UNSPELLED = ("UNO", "FROZEN_KV_MTP")  # SGLang has them, we have no words for them
MODELLESS = ("mtp", "ngram")
BARE = (
    "--speculative-adaptive", "--speculative-use-rejection-sampling", "--speculative-use-block-verification", "--speculative-skip-dp-mlp-sync",
    "--speculative-dspark-align-verify-tokens-to-graph-tier", "--speculative-enable-w4a4-mxfp4-megamoe",
    "--no-speculative-enable-w4a4-mxfp4-megamoe", "--enable-multi-layer-eagle",
)  # fmt: skip
ALIASES = {"--speculative-draft-model": "--speculative-draft-model-path", "--speculative-dflash-block-size": "--speculative-num-draft-tokens"}
ALGORITHM, MODEL, STEPS, TOPK, TOKENS, BLOCK, BREADTH = (
    f"--speculative-{name}"
    for name in ("algorithm", "draft-model-path", "num-steps", "eagle-topk", "num-draft-tokens", "dspark-block-size", "ngram-max-bfs-breadth")
)
REQUESTS = "--max-running-requests"
REFUSED = re.compile(
    r"has no effect|speculative_adaptive disabled|is adjusted to|is reset to|overriding speculative|defaulting (to|speculative)"
    r"|is disabled (because of using|for) [a-z0-9 ]*specul|block size mismatch|is ignored"
)


def take_apart(words: list[str]) -> Command:
    head, rest = split_program(words)
    rest, flags = take(rest, _speculative_name, lambda name: name not in BARE)
    rest, said = take_named(rest, {"--host": ["--host"], "--port": ["--port"]})
    _, kept = take_named(rest, {"model": ["--model-path", "--model"], "tp": ["--tp-size", "--tp", "--tensor-parallel-size"], "config": ["--config"]})
    file = read_config(kept["config"]) if "config" in kept else {}
    if drafts := next((key for key in file if key.startswith("speculative")), None):
        raise BadInput(
            f"{kept['config']} must not say {drafts!r}, without which it could not be launched: no flag says off; give it as a flag instead"
        )
    model = kept.get("model") or file.get("model-path") or file.get("model")
    if model is None and head[-1:] == ["serve"] and rest and not rest[0].startswith("-"):
        model = rest[0]
    port = said.get("--port", file.get("port"))
    yours, drafting = _yours({flag.name: flag.value for flag in flags}, [word for flag in flags if flag.name not in OURS for word in flag.words])
    return Command(
        words=head + rest,
        model=None if model is None else str(model),
        tensor_parallel=whole(str(kept.get("tp", file.get("tp-size", file.get("tensor-parallel-size", 1)))), "--tp-size", 1, MAX_RANKS),
        host=str(said.get("--host", file.get("host", "127.0.0.1"))),
        port=None if port is None else whole(str(port), "--port", 1, MAX_PORT),
        yours=yours,
        yours_drafting=drafting,
    )


def put_together(command: Command, drafting: Drafting, *, port: int, max_batch: int, folder: Path) -> list[str]:
    """Writes the adaptive schedule into the folder, where there is one."""
    _, kept = take_named(command.words, {"requests": [REQUESTS]})
    batch = whole(kept["requests"], REQUESTS, 1, 2**30) if "requests" in kept else max_batch
    words = [*command.words, "--host", command.host, "--port", str(port)]
    words += [] if "--enable-metrics" in map(dashed, command.words) else ["--enable-metrics"]
    drafts = _draft_words(drafting, batch, folder)
    return words + (drafts if "requests" in kept else _with_requests(drafts, batch))


def paste(drafting: Drafting, *, max_batch: int, folder: Path) -> str:
    """Writes the adaptive schedule as well."""
    return shell_line(_with_requests(_draft_words(drafting, max_batch, folder), max_batch))


def read_log(text: str) -> Startup:
    """Of a pool for the target and one for the drafter, the first, which is the target's; of several ranks, the first."""
    pool = re.search(r"KV Cache is allocated\..{0,80}?#tokens: ([0-9]{1,15}), (?:K size: ([0-9.]{1,12}) GB, V|KV) size: ([0-9.]{1,12}) GB", text)
    tokens = re.search(r"max_total_num_tokens=([0-9]{1,15})", text)
    size = int((float(pool[2] or 0) + float(pool[3])) * GIB) if pool else None  # its GB are GiB
    count = int(pool[1]) if pool else int(tokens[1]) if tokens else None
    lines = [re.sub(r"^\[[^]]{0,60}\] ", "", line) for line in text.splitlines() if REFUSED.search(line[:2000]) and "server_args=" not in line]
    return Startup("", count, size, warnings_of(lines))


def _speculative_name(head: str) -> str | None:
    flag = dashed(head)
    if flag == "--enable-multi-layer-eagle" or flag.startswith("--no-speculative"):
        return flag
    if not flag.startswith("--speculative"):
        return None
    if flag == "--speculative-config":
        raise BadInput(
            "the drafting of an SGLang command stands in --speculative-algorithm and its companions, the command says --speculative-config; spell it so"
        )
    if flag not in KNOWN:
        meant = [known for known in KNOWN if known.startswith(flag)]
        flag = meant[0] if len(meant) == 1 else flag
    return ALIASES.get(flag, flag)


def _yours(said: dict[str, str | None], rest: list[str]) -> tuple[Setting | None, Drafting | None]:
    if ALGORITHM not in said:
        return Setting(), Drafting()
    algorithm = said[ALGORITHM].upper()
    if algorithm in UNSPELLED:
        return None, None
    if algorithm not in METHODS:
        raise BadInput(f"SGLang drafts with {', '.join(METHODS)}, the command says {said[ALGORITHM][:80]!r}; correct it")
    method = METHODS[algorithm]
    numbers = {name: whole(said[name], name, 1, MAX_DRAFT_LEN + 1) for name in (STEPS, TOPK, TOKENS, BLOCK, BREADTH) if name in said}
    match method:
        case "dspark":
            length = numbers.get(BLOCK)
        case "dflash" | "ngram":
            length = numbers[TOKENS] - 1 if TOKENS in numbers else None
        case _:
            length = numbers.get(STEPS)
    tree = numbers.get(BREADTH) != 1 if method == "ngram" else algorithm in exporter.CHAINS and numbers.get(TOPK) != 1
    if tree or not length or "--speculative-adaptive" in said:  # a tree, SGLang's own choice, or one that changes
        return None, None
    return Setting(drafter=method, draft_len=length), Drafting(method, said.get(MODEL), one_step(length), tuple(rest))


def _draft_words(drafting: Drafting, max_batch: int, folder: Path) -> list[str]:
    if drafting.method == OFF:
        return []
    check_drafting("sglang", drafting, MODELLESS)
    steps = ending_at(drafting.steps, max_batch)
    check_drafting("sglang", drafting._replace(steps=steps), MODELLESS)
    config = exporter.draft_config(drafting.method, drafting.draft_model, max(step.draft_len for step in steps))
    if len(steps) > 1:
        path = folder.resolve() / exporter.ADAPTIVE
        write_whole(path, exporter.adaptive_json(steps).encode())
        config |= {"speculative-adaptive": True, "speculative-adaptive-config": path}
    return [*to_flags(config), *drafting.words]


def _with_requests(drafts: list[str], max_batch: int) -> list[str]:
    """With a drafter SGLang runs no more requests than its own cap, unless it is told."""
    return drafts + ([REQUESTS, str(max_batch)] if drafts and max_batch > find_engine("sglang").speculative_requests else [])


OURS = (ALGORITHM, MODEL, STEPS, TOPK, TOKENS, BLOCK, BREADTH, "--speculative-adaptive", "--speculative-adaptive-config")
KNOWN = (*OURS, *ALIASES, *BARE)
ENGINE = Engine("sglang", take_apart, put_together, paste, read_log, usual_ready_s=1200.0, repeats=1)
