"""llama.cpp's server: its command, and what its log says. Read off b10434, which was run.

A draft model without a --spec-type is loaded and never drafts. Slots share the context out among them, unless the buffer is unified,
which is so where their number is left to the server.
"""

import re
from pathlib import Path

from planner.engines.contract import Command, Drafting, Engine, Startup
from planner.engines.words import MAX_DRAFT_LEN, MAX_PORT, check_drafting, dashed, one_step, split_program, take, take_named, warnings_of, whole
from planner.errors import BadInput
from planner.exporters import llamacpp as exporter
from planner.exporters.quoting import shell_line, to_flags
from planner.schedules import Setting
from planner.serving import OFF

MIB = 2**20
REMOVED = {
    "--draft": "--spec-draft-n-max", "--draft-n": "--spec-draft-n-max", "--draft-max": "--spec-draft-n-max", "--draft-min": "--spec-draft-n-min",
    "--draft-n-min": "--spec-draft-n-min", "--spec-ngram-size-n": "--spec-ngram-simple-size-n", "--spec-ngram-size-m": "--spec-ngram-simple-size-m",
    "--spec-ngram-min-hits": "--spec-ngram-simple-min-hits", "--ctx-size-draft": "--ctx-size, which holds for both", "-cd": "--ctx-size, which holds for both",
}  # fmt: skip
ALIASES = {
    "-md": "--spec-draft-model", "--model-draft": "--spec-draft-model", "-hfd": "--spec-draft-hf", "-hfrd": "--spec-draft-hf",
    "--hf-repo-draft": "--spec-draft-hf", "--draft-p-min": "--spec-draft-p-min", "--draft-p-split": "--spec-draft-p-split",
    "-ctkd": "--spec-draft-type-k", "--cache-type-k-draft": "--spec-draft-type-k", "-ctvd": "--spec-draft-type-v",
    "--cache-type-v-draft": "--spec-draft-type-v", "-td": "--spec-draft-threads", "--threads-draft": "--spec-draft-threads",
    "-tbd": "--spec-draft-threads-batch", "--threads-batch-draft": "--spec-draft-threads-batch", "-Cd": "--spec-draft-cpu-mask",
    "--cpu-mask-draft": "--spec-draft-cpu-mask", "-Crd": "--spec-draft-cpu-range", "--cpu-range-draft": "--spec-draft-cpu-range",
    "--cpu-strict-draft": "--spec-draft-cpu-strict", "--prio-draft": "--spec-draft-prio", "--poll-draft": "--spec-draft-poll",
    "-Cbd": "--spec-draft-cpu-mask-batch", "--cpu-mask-batch-draft": "--spec-draft-cpu-mask-batch",
    "--cpu-strict-batch-draft": "--spec-draft-cpu-strict-batch", "--prio-batch-draft": "--spec-draft-prio-batch",
    "--poll-batch-draft": "--spec-draft-poll-batch", "-otd": "--spec-draft-override-tensor",
    "--override-tensor-draft": "--spec-draft-override-tensor", "-cmoed": "--spec-draft-cpu-moe", "--cpu-moe-draft": "--spec-draft-cpu-moe",
    "--spec-draft-ncmoe": "--spec-draft-n-cpu-moe", "-ncmoed": "--spec-draft-n-cpu-moe", "--n-cpu-moe-draft": "--spec-draft-n-cpu-moe",
    "-devd": "--spec-draft-device", "--device-draft": "--spec-draft-device", "-ngld": "--spec-draft-ngl", "--gpu-layers-draft": "--spec-draft-ngl",
    "--n-gpu-layers-draft": "--spec-draft-ngl",
}  # fmt: skip
BARE = ("--spec-default", "--spec-draft-cpu-moe", "--spec-draft-backend-sampling", "--no-spec-draft-backend-sampling")
PRESETS = re.compile(r"--fim-[a-z0-9-]+-spec")
KIND, MODEL, LONGEST, P_MIN, SIZE_M, SIZE_N = (
    "--spec-type", "--spec-draft-model", "--spec-draft-n-max", "--spec-draft-p-min", "--spec-ngram-simple-size-m", "--spec-ngram-simple-size-n",
)  # fmt: skip
OURS = (KIND, MODEL, LONGEST, SIZE_M)
METHODS = {kind: method for method, kind in exporter.TYPES.items()}
UNSPELLED = ("ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache")  # llama.cpp has them, we have no words for them
DEFAULTS = {LONGEST: "3", SIZE_M: "48", SIZE_N: "12"}
MODELLESS = ("ngram", "mtp")
LEVELS = ("-lv", "--verbosity", "--log-verbosity", "-v", "--verbose", "--log-verbose")
TRACE = "4"  # the first level that says what the KV cache takes
WARNED = re.compile(r"\bW\b.*(spec|draft)|n_max.*clamp|clamp.*n_max|no implementations specified for speculative decoding", re.IGNORECASE)


def take_apart(words: list[str]) -> Command:
    head, rest = split_program(words)
    rest, flags = take(rest, _speculative_name, lambda name: name not in BARE and not PRESETS.fullmatch(name))
    rest, said = take_named(rest, {"--host": ["--host"], "--port": ["--port"]})
    _, kept = take_named(rest, {"model": ["--model", "-m"], "hf": ["--hf-repo", "-hf", "-hfr"], "router": ["--models-preset", "--models-dir"]})
    if "router" in kept:
        raise BadInput(f"a server of one model is measured, the command serves those of {kept['router'][:80]!r}; give --model FILE.gguf")
    if said.get("--host", "").endswith(".sock"):
        raise BadInput(f"a server is measured at a port, the command says --host {said['--host'][:80]!r}; give an address")
    yours, drafting = _yours({flag.name: flag.value for flag in flags}, [(flag.name, flag.words) for flag in flags])
    return Command(
        words=head + rest,
        model=kept.get("model") or kept.get("hf"),
        tensor_parallel=1,
        host=said.get("--host", "127.0.0.1"),
        port=whole(said["--port"], "--port", 1, MAX_PORT) if "--port" in said else None,
        yours=yours,
        yours_drafting=drafting,
    )


def put_together(command: Command, drafting: Drafting, *, port: int, max_batch: int, folder: Path) -> list[str]:
    flags = set(map(dashed, command.words))
    words = [*command.words, "--host", command.host, "--port", str(port)]
    words += [] if "--metrics" in flags else ["--metrics"]
    words += [] if flags & set(LEVELS) else ["-lv", TRACE]
    if not flags & {"-np", "--parallel"}:
        words += ["--parallel", str(max_batch)]
        words += [] if flags & {"-kvu", "--kv-unified", "-no-kvu", "--no-kv-unified"} else ["--kv-unified"]
    return words + _draft_words(drafting)


def paste(drafting: Drafting, *, max_batch: int, folder: Path) -> str:
    return "" if drafting.method == OFF else shell_line(_draft_words(drafting))


def read_log(text: str) -> Startup:
    """Of several caches the first, which is the target's; one in parts (sliding windows) is not added up. Cells are those of one stream."""
    build = re.search(r"build:? ([0-9]{1,9}) \(([0-9a-f]{5,40})\)", text)
    pool = re.search(r"llama_kv_cache\w*: size = +([0-9.]{1,12}) MiB \( *([0-9]{1,12}) cells, +[0-9]+ layers, +[0-9]+/([0-9]{1,6}) seqs", text)
    version = "" if build is None else f"b{build[1]}" if int(build[1]) > 1 else build[2]  # packages count their builds from 1
    lines = [re.sub(r"^[0-9.]{5,20} ", "", line) for line in text.splitlines() if WARNED.search(line[:500])]
    return Startup(version, int(pool[2]) * int(pool[3]) if pool else None, int(float(pool[1]) * MIB) if pool else None, warnings_of(lines))


def _speculative_name(head: str) -> str | None:
    flag = dashed(head)
    if flag in REMOVED:
        raise BadInput(f"llama.cpp has removed {flag}, the command says it; say {REMOVED[flag]}")
    flag = ALIASES.get(flag, flag)
    return flag if flag.startswith(("--spec-", "--no-spec-")) or PRESETS.fullmatch(flag) else None


def _yours(said: dict[str, str | None], flags: list[tuple[str, list[str]]]) -> tuple[Setting | None, Drafting | None]:
    if any(name == "--spec-default" or PRESETS.fullmatch(name) for name in said):
        return None, None
    kind = said.get(KIND, "none")
    if kind == "none":
        if MODEL in said or "--spec-draft-hf" in said:  # loaded, and idle
            return Setting(drafter="draft_model", draft_len=0), None
        return Setting(), Drafting()
    if unknown := [name for name in kind.split(",") if name not in (*METHODS, *UNSPELLED, "none")]:
        raise BadInput(f"llama.cpp's {KIND} is one of {', '.join((*METHODS, *UNSPELLED))}, the command says {unknown[0][:80]!r}; correct it")
    if kind not in METHODS:
        return None, None
    method = METHODS[kind]
    name = SIZE_M if method == "ngram" else LONGEST
    length = whole(said.get(name, DEFAULTS[name]), name, 0, MAX_DRAFT_LEN)
    if length == 0:
        return (Setting(), Drafting()) if method in MODELLESS else (Setting(drafter=method, draft_len=0), None)
    lookup = whole(said.get(SIZE_N, DEFAULTS[SIZE_N]), SIZE_N, 1, 2**16) if method == "ngram" else 0
    if length < lookup:  # no draft is shorter than what is looked up, so none is made
        return Setting(drafter=method, draft_len=0), None
    rest = [word for own, words in flags if own not in OURS and not (own == P_MIN and _is_zero(said[P_MIN])) for word in (own, *words[1:])]
    if method == "ngram" and SIZE_N not in said:
        rest += [SIZE_N, DEFAULTS[SIZE_N]]
    return Setting(drafter=method, draft_len=length), Drafting(method, said.get(MODEL), one_step(length), tuple(rest))


def _draft_words(drafting: Drafting) -> list[str]:
    check_drafting("llama.cpp", drafting, MODELLESS)
    drafts = exporter.draft_config(drafting.method, drafting.draft_model, drafting.draft_len)
    if SIZE_N in (rest := list(drafting.words)):
        at = rest.index(SIZE_N) + 1
        rest[at] = str(min(int(rest[at]), drafting.draft_len))
    own = {key: value for key, value in drafts.items() if f"--{key}" not in rest}  # a user's threshold or lookup stays
    return [*to_flags(own), *rest]


def _is_zero(text: str) -> bool:
    try:
        return float(text) == 0
    except ValueError:
        raise BadInput(f"{P_MIN} is a number, the command says {text[:80]!r}; correct it") from None


ENGINE = Engine("llama.cpp", take_apart, put_together, paste, read_log, usual_ready_s=600.0, repeats=2)
