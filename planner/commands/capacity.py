"""planner capacity: KV pool, running batch and break-even acceptance from sizes alone. Does not need torch, and measures nothing."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

import planner
from planner.capacities import Capacity, CapacityRow, Pool, Share
from planner.commands.sizes import is_model_key, read_system, sized
from planner.cost.capacity import LOGIT_BYTES, KVPool, Settings, bytes_per_token, kv_pool, requests_that_run
from planner.cost.roofline import LIKELY, STACKS, Load, round_s, step_s
from planner.engine_rules import EngineRules, find_engine, method_of
from planner.errors import BadInput
from planner.plans import Interval
from planner.serving import OFF, ModelSize, SystemSpec
from planner.specs import checked
from planner.units import format_bytes

MODELLESS = ("ngram", "suffix")  # methods that load nothing
BLOCK = ("dflash", "dspark", "pard")  # methods that draft a block in one pass
KV_BYTES = {
    "auto": None, "float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "fp16": 2.0, "bf16": 2.0, "fp8": 1.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0, "int8": 1.0,
    "q8_0": 34 / 32, "nvfp4": 0.5 + 1 / 16,
}  # fmt: skip
MAX_RANKS, MAX_ROWS = 1024, 500
STARVED = 0.9  # of the batch without a drafter; below it, that is said


class Drafter(NamedTuple):
    name: str
    method: str
    model: ModelSize | None  # None: nothing is loaded


def capacity(
    model: str,
    *,
    draft_models: Sequence[str] = (),
    system: str,
    engine: str = "vllm",
    context_len: int,
    output_len: int,
    tensor_parallel: int = 1,
    max_concurrency: int | None = None,
    draft_lens: Sequence[int] = (1, 3, 5),
    kv_budgets: Sequence[int] = (),
    kv_dtype: str = "auto",
    fraction: float | None = None,
    memory_cap_bytes: int | None = None,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
) -> Capacity:
    """What fits, with and without each drafter and kv budget.

    model, draft_models, system  as commands/sizes.py reads them; a draft model may be NAME=SPEC, or ngram
    max_concurrency              requests in the system; None: as many as run
    """
    rules = find_engine(engine)
    device, said = read_system(system)
    share = fraction if fraction is not None else device.fraction if said else None
    _check(rules, share, tensor_parallel, draft_lens, kv_budgets, context_len, output_len, max_concurrency, max_num_seqs, max_num_batched_tokens)
    target, notes, _ = sized(model)
    drafters, drafter_notes = _drafters(draft_models, target)
    named = [(target.name, note) for note in notes] + drafter_notes
    element = _kv_bytes(kv_dtype)
    if element is not None:
        target = replace(target, kv_bytes_per_element=element)
        drafters = [drafter._replace(model=drafter.model and replace(drafter.model, kv_bytes_per_element=element)) for drafter in drafters]
    settings = Settings(rules, tensor_parallel, share, memory_cap_bytes, max_num_seqs, max_num_batched_tokens)

    off = Drafter(OFF, OFF, None)
    pools = {drafter.name: kv_pool(target, drafter.model, device, settings, drafter.method) for drafter in [off, *drafters]}
    plain = _row(target, off, pools[OFF], device, settings, context_len, output_len, max_concurrency, 0, None, None)
    rows, dropped = [plain], []
    for drafter in drafters:
        budgets = [None, *kv_budgets] if drafter.method in rules.windowed else [None]
        if kv_budgets and len(budgets) == 1:
            dropped.append(f"{rules.name} cannot give a {drafter.method} drafter a kv budget; {drafter.name} keeps and reads all keys")
        whole = [budget for budget in budgets if budget is not None and budget >= context_len + output_len]
        if whole:
            dropped.append(f"a kv budget of {whole[0]} holds all {context_len + output_len} tokens of a request: {drafter.name} runs as without one")
        for budget in budgets:
            for draft_len in draft_lens:
                rows.append(
                    _row(target, drafter, pools[drafter.name], device, settings, context_len, output_len, max_concurrency, draft_len, budget, plain)
                )
    return checked(
        Capacity(
            planner_version=planner.__version__, engine=_engine_name(rules, engine), system=replace(device, fraction=pools[OFF].fraction or device.fraction),
            model=target, tensor_parallel=tensor_parallel, context_len=context_len, output_len=output_len, max_concurrency=max_concurrency,
            pools=[_pool(target, drafter, pools[drafter.name], tensor_parallel) for drafter in [off, *drafters]], rows=rows,
            assumed=[*_assumed(target, device, settings, pools[OFF], context_len, output_len), *_together(named), *dropped],
            warnings=_warnings(rows, drafters, pools, target, tensor_parallel),
        )
    )  # fmt: skip


def _row(
    target: ModelSize, drafter: Drafter, pool: KVPool, system: SystemSpec, settings: Settings, context_len: int, output_len: int,
    max_concurrency: int | None, draft_len: int, budget: int | None, plain: CapacityRow | None,
) -> CapacityRow:  # fmt: skip
    lengths = {"context_len": context_len, "output_len": output_len, "draft_len": draft_len}
    fitting = requests_that_run(pool, target, drafter.model, settings, **lengths, method=drafter.method, kv_budget=budget)
    caps = {"memory": fitting, "max_num_seqs": pool.max_num_seqs, "concurrency": max_concurrency}
    if drafter.name != OFF:
        caps["engine"] = None if settings.max_num_seqs else settings.engine.speculative_requests
    limit = min((name for name, cap in caps.items() if cap is not None), key=lambda name: caps[name]) if fitting else "nothing fits"
    running = caps[limit] if fitting else 0.0
    row = CapacityRow(
        drafter=drafter.name, method=drafter.method, kv_budget=budget, draft_len=draft_len, fitting=fitting, running=running, limited_by=limit,
        logits_bytes=int(running * (draft_len + 1) * (target.vocab_size or 0) * 4),
    )  # fmt: skip
    if not running or system.bandwidth_bytes_per_s is None or system.flops_per_s is None or (plain and not plain.running):
        return row
    length = context_len + output_len / 2
    load = Load(running, length, settings.tensor_parallel)
    passes = 0 if drafter.method in MODELLESS else 1 if drafter.method in BLOCK else None

    def took(stack):
        return round_s(target, drafter.model, system, load, stack, draft_len=draft_len, kv_budget=budget, passes=passes)

    def interval(value):
        bounds = [value(stack) for stack in STACKS]
        return Interval(value=value(LIKELY), low=min(bounds), high=max(bounds))

    if plain is None:
        return replace(row, round_s=interval(took))

    def alone(stack):
        return step_s(target, system, load._replace(batch=plain.running), stack)

    return replace(
        row, round_s=interval(took), break_even_tokens=interval(lambda stack: took(stack) / alone(stack)),
        break_even_throughput=interval(lambda stack: took(stack) / running / (alone(stack) / plain.running)),
    )  # fmt: skip


def _pool(target: ModelSize, drafter: Drafter, pool: KVPool, ranks: int) -> Pool:
    return Pool(
        drafter=drafter.name, tokens=pool.tokens, bytes=int(pool.bytes), bytes_per_token=bytes_per_token(target, drafter.model, ranks),
        rest=[Share(name=part.name, bytes=int(part.bytes)) for part in pool.parts],
    )  # fmt: skip


def _drafters(texts: Sequence[str], target: ModelSize) -> tuple[list[Drafter], list[tuple[str, str]]]:
    found, notes = [], []
    for text in texts:
        named = re.match(r"([A-Za-z][A-Za-z0-9_.-]{0,99})=(.+)", text, re.DOTALL)
        name, spec = named.groups() if named and not is_model_key(named[1]) and not Path(text).exists() else ("", text)
        if spec in MODELLESS:
            found.append(Drafter(name or spec, spec, None))
            continue
        model, said, kind = sized(spec, name)
        said_so = [method_of(name), kind, method_of(model.name)]  # the user, the checkpoint, its folder's name
        method = next((method for method in said_so if method != "draft_model"), "draft_model")
        found.append(Drafter(model.name, method, model))
        notes += [(model.name, note) for note in said]
        if method == "draft_model" and None not in (model.vocab_size, target.vocab_size) and model.vocab_size != target.vocab_size:
            ours, theirs = f"{model.vocab_size:,}", f"{target.vocab_size:,}"
            notes.append((model.name, f"its vocabulary has {ours} tokens, the target's {theirs}; most engines want them equal"))
    names = [OFF, *(drafter.name for drafter in found)]
    if len(set(names)) < len(names):
        raise BadInput(f"each drafter needs a name of its own other than {OFF}, got {', '.join(names[1:])[:200]}; write --draft-model NAME=SPEC")
    return found, notes


def _together(named: list[tuple[str, str]]) -> list[str]:
    """A note of several models once, behind their names."""
    texts = dict.fromkeys(note for _, note in named)
    return [f"{', '.join(name for name, note in named if note == text)}: {text}" for text in texts]


def _assumed(target: ModelSize, system: SystemSpec, settings: Settings, pool: KVPool, context_len: int, output_len: int) -> list[str]:
    said = list(pool.assumed)
    if settings.engine.on_demand:
        said.append(
            f"a request holds {context_len:,} + {output_len:,} / 2 tokens on average while it decodes, in blocks of {settings.engine.block_tokens}"
        )
    else:
        said.append(f"a request holds its whole {context_len + output_len:,} tokens from its start")
    said.append(f"keys and values of {8 * target.kv_bytes_per_element:g} bits; no prefix is shared")
    if settings.tensor_parallel > target.num_kv_heads and not target.latent:
        said.append(f"{target.num_kv_heads} KV heads on {settings.tensor_parallel} devices: each is held more than once")
    logged = settings.engine.name == "vllm"
    said.append(
        "pools of four logged runs of vLLM 0.19 were within 2 % of this"
        if logged
        else f"no logged pool of {settings.engine.name} was compared with this"
    )
    if system.bandwidth_bytes_per_s is None or system.flops_per_s is None:
        said.append("no times: the system's bandwidth or peak is not known; add bandwidth_gb_s=..,tflops=..")
    else:
        said.append("times are a roofline, from tuned to plain software; nothing is measured, and prefill of others is not counted in a round")
    if target.max_context_len is not None and context_len + output_len > target.max_context_len:
        said.append(f"the model declares {target.max_context_len:,} tokens; {context_len + output_len:,} need its context to be stretched")
    return said


def _warnings(rows: list[CapacityRow], drafters: list[Drafter], pools: dict[str, KVPool], target: ModelSize, ranks: int) -> list[str]:
    plain, found = rows[0], []
    if not plain.running:
        return [
            f"not one request fits: the KV pool holds {pools[OFF].tokens:,} tokens; take more devices (--tp), a smaller context or an 8-bit KV cache"
        ]
    for drafter in drafters:
        mine = [row for row in rows if row.drafter == drafter.name]
        worst = min(mine, key=lambda row: row.running)
        taken = f"its weights take {format_bytes(pools[drafter.name].parts[1].bytes)}" if drafter.model else "it loads nothing"
        own = bytes_per_token(target, drafter.model, ranks) / bytes_per_token(target, None, ranks) - 1
        if not worst.running:
            found.append(f"{drafter.name} leaves no room for one request: {taken} and its keys {own:.0%} more for every token; run without it")
        elif worst.running < STARVED * plain.running:
            why = f"{taken}, its keys {own:.0%} more for every token" if worst.limited_by == "memory" else f"limited by {worst.limited_by}"
            found.append(f"{drafter.name} starves the batch: {worst.running:.3g} requests run instead of {plain.running:.3g}, {why}")
        largest = max(mine, key=lambda row: row.logits_bytes)
        needed = largest.logits_bytes / 4 * LOGIT_BYTES
        free = sum(part.bytes for part in pools[drafter.name].parts if part.name in ("sampler peak", "activation peak", "outside the fraction"))
        if needed > free > 0:
            found.append(
                f"{drafter.name}: verifying {largest.draft_len + 1} tokens of {largest.running:.0f} requests takes {format_bytes(needed)} of logits, "
                f"and {format_bytes(free)} lie outside the pool; lower --max-num-seqs or the memory fraction"
            )
    return found


def _check(rules: EngineRules, fraction, ranks, draft_lens, kv_budgets, *counts) -> None:
    if fraction is not None and not 0 < fraction <= 1:  # False for NaN
        raise BadInput(f"a memory fraction must lie above 0 and at most at 1, got {fraction:g}")
    if fraction is not None and rules.fraction_of == "margin":
        raise BadInput(f"{rules.name} takes no memory fraction but keeps a margin, got {fraction:g}; give --memory-cap")
    if not 1 <= ranks <= MAX_RANKS:
        raise BadInput(f"--tp must lie in 1..{MAX_RANKS}, got {ranks}")
    if not draft_lens or not all(1 <= draft_len <= 1024 for draft_len in draft_lens):
        raise BadInput(f"draft lengths must lie in 1..1024, got {list(draft_lens)[:8]}; not drafting is the first row anyway")
    if not all(1 <= budget <= 2**30 for budget in kv_budgets):
        raise BadInput(f"kv budgets must lie in 1..{2**30}, got {list(kv_budgets)[:8]}")
    for name, count in zip(("--isl", "--osl", "--max-concurrency", "--max-num-seqs", "--max-num-batched-tokens"), counts, strict=True):
        if count is not None and not 1 <= count <= 2**30:
            raise BadInput(f"{name} must lie in 1..{2**30}, got {count}")
    if len(draft_lens) * (1 + len(kv_budgets)) > MAX_ROWS:
        raise BadInput(f"draft lengths times kv budgets must be at most {MAX_ROWS}, got {len(draft_lens) * (1 + len(kv_budgets))}; ask for fewer")


def _kv_bytes(dtype: str) -> float | None:
    if dtype not in KV_BYTES:
        raise BadInput(f"a KV dtype is one of {', '.join(KV_BYTES)}, got {dtype[:40]!r}")
    return KV_BYTES[dtype]


def _engine_name(rules: EngineRules, asked: str) -> str:
    """With the version that was asked for, else the newest that is known."""
    version = asked.partition("@")[2].strip() or ".".join(map(str, rules.last))
    return f"{rules.name}@{version}"
