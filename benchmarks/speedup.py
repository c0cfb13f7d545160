"""What a plan gains: decoding with the planned configuration beside plain decoding, on texts the profile did not see.

SmolLM2-135M, OUTPUT_LEN tokens behind prompts of real text. The plan is made here from a profile (--profile; the
committed one unless told) for every context and temperature. A text is processed once up to each context in turn; there,
at each temperature, plain and planned decoding follow each other, the other one first with every text. Speedup is plain
over planned, in time after prefill (selection, first token and all later ones); one over all texts of a cell is the ratio
of the sums. A cell whose plan is off has a speedup of 1 by definition, one that the profile does not cover is skipped.
Texts are taken as long as fit into about seven minutes, at least MIN_TEXTS.
"""

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import make_parser, progress, report_tables, texts
from others import open_llama_cpp

import planner
from planner.commands.session import Session, open_session
from planner.datasets import expand
from planner.errors import BadInput
from planner.plans import Plan
from planner.profiler.device import describe_device
from planner.profiler.texts import Prompt, draw_prompts
from planner.runtime.decode import cache_capacity, decode
from planner.runtime.drafters import make_drafter
from planner.runtime.model import prefill
from planner.runtime.weights import default_model_path
from planner.specs import PLAIN, DraftConfig, describe

CONTEXT_LENS = {"2k": 2048, "4k": 4096, "8k": 8000}  # the model ends at 8192, output included
TEMPERATURES = (1.0, 0.7)
OUTPUT_LEN, WARMUP_LEN = 96, 8
MIN_TEXTS, MAX_TEXTS = 3, 16
BUDGET_S = 420.0  # for all, loading included; no text is begun that would end later, but MIN_TEXTS are always run
LLAMA_CPP_STEPS = 32
SEED = 1  # the profile drew with 0


@dataclass(kw_only=True)
class Cell:
    """One context and temperature: its plan, and seconds by text."""

    name: str  # "2k_t0.7"
    context_len: int
    temperature: float
    plan: Plan
    plain_s: list[float] = field(default_factory=list)
    planned_s: list[float] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)  # of the planned configuration

    @property
    def off(self) -> bool:
        return self.plan.chosen == PLAIN

    @property
    def speedup(self) -> float:
        """Of the summed time after prefill."""
        return 1.0 if self.off else sum(self.plain_s) / sum(self.planned_s)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--profile", type=Path, help="profile to plan from (default: the one of smollm2 in profiles/)")
    args = parser.parse_args()
    began = time.perf_counter()
    profile_path = args.profile or committed_profile()
    cells = make_cells(profile_path)
    if not cells:
        parser.error(f"{profile_path} covers none of the contexts and temperatures")
    session = open_planned(profile_path, cells[0].plan)
    longest = max(cell.context_len for cell in cells)
    prompts = draw_prompts(
        session.tokenizer, expand([texts()]), length=longest, count=MAX_TEXTS, seed=SEED, seen=cells[0].plan.seen_texts
    )  # fmt: skip

    llama_cpp_ms = measure_llama_cpp(cells, prompts[0], session.model.spec.max_context_len)
    text_s = 0.0
    for number, prompt in enumerate(prompts):
        if number >= MIN_TEXTS and time.perf_counter() - began + text_s > BUDGET_S:
            break
        begin = time.perf_counter()
        run_text(session, cells, prompt, number)
        text_s = time.perf_counter() - begin
        progress(f"text {number + 1}: {text_s:.0f} s")

    figures = {f"speedup_{cell.name}": cell.speedup for cell in cells}
    figures["worst_cell_speedup"] = min(figures.values())
    title = f"{OUTPUT_LEN} tokens per text; planned from {profile_path.name}; intervals at 90 %"
    report_tables({title: [row(cell, llama_cpp_ms[cell.context_len]) for cell in cells]}, figures, args.json)
    progress(f"{time.perf_counter() - began:.0f} s")


def run_text(session: Session, cells: list[Cell], prompt: Prompt, number: int) -> None:
    """One text in every cell. Prefill goes on from context to context: a shorter prompt is the beginning of the longer one."""
    longest = max(cell.context_len for cell in cells)
    cache = session.model.new_cache(cache_capacity(longest, OUTPUT_LEN, max(cell.plan.chosen.draft_len for cell in cells)))
    done, prefill_s = 0, 0.0
    for context_len in sorted({cell.context_len for cell in cells}):
        begin = time.perf_counter()
        cache.truncate(done)
        logits = prefill(session.model, torch.tensor([prompt.tokens[done:context_len]]), cache)
        done, prefill_s = context_len, prefill_s + time.perf_counter() - begin
        for cell in (cell for cell in cells if cell.context_len == context_len):
            arms = [PLAIN] if cell.off else [PLAIN, cell.plan.chosen]
            for config in arms if number % 2 == 0 else arms[::-1]:
                if number == 0:
                    run(session, cache, prompt, logits, cell, config, WARMUP_LEN, number)
                seconds, rounds = run(session, cache, prompt, logits, cell, config, OUTPUT_LEN, number)
                (cell.plain_s if config == PLAIN else cell.planned_s).append(seconds)
                cell.rounds += [rounds] * (config != PLAIN)
            cell.prefill_s.append(prefill_s)


def run(session: Session, cache, prompt: Prompt, logits, cell: Cell, config: DraftConfig, output_len: int, number: int) -> tuple[float, int]:
    """Seconds after prefill and rounds of one decode. No stop tokens: both arms must write as much, and they sample different texts."""
    cache.truncate(cell.context_len)
    drafter = make_drafter(config, session.model)
    begin = time.perf_counter()
    rounds = decode(
        session.model, cache, [prompt.tokens[: cell.context_len]], logits, drafter, draft_len=config.draft_len, sampler=cell.plan.workload.sampler,
        generators=[torch.Generator().manual_seed(SEED + number)], max_new_tokens=output_len,
    )  # fmt: skip
    count = sum(1 for _ in rounds) - 1  # the first is prefill's token
    return time.perf_counter() - begin, count


def committed_profile() -> Path:
    """The profile of smollm2 under profiles/; exits where there is not exactly one."""
    found = sorted((Path(__file__).resolve().parents[1] / "profiles").glob("*/smollm2*.json"))
    if len(found) != 1:
        raise SystemExit(f"profiles/ must hold exactly one profile of smollm2, got {len(found)}; choose with --profile")
    return found[0]


def make_cells(profile_path: Path) -> list[Cell]:
    """A plan by context and temperature, for time per token, which is what is measured; those without an answer are named and left out."""
    cells = []
    for name, context_len in CONTEXT_LENS.items():
        for temperature in TEMPERATURES:
            try:
                plan = planner.plan(profile_path, context_len=context_len, output_len=OUTPUT_LEN, temperature=temperature, objective="tpot")
            except BadInput as error:
                progress(f"skipped {name} at temperature {temperature:g}: {error}")
                continue
            cells.append(Cell(name=f"{name}_t{temperature:g}", context_len=context_len, temperature=temperature, plan=plan))
    return cells


def open_planned(profile_path: Path, plan: Plan) -> Session:
    """The model as the profile ran it."""
    profile = planner.load_profile(profile_path)
    session = open_session(profile.model, dtype=profile.dtype, execution=profile.execution_mode, weights=profile.weights)
    if session.model.fingerprint != plan.target_fingerprint:
        raise SystemExit(f"the profile is of model {plan.target_fingerprint}, this one is {session.model.fingerprint}; profile it again")
    if (here := describe_device(session.model.device).name) != plan.device:
        progress(f"the profile was measured on {plan.device}, this is {here}: the plan may not be the best here")
    return session


def measure_llama_cpp(cells: list[Cell], prompt: Prompt, max_context_len: int) -> dict[int, str]:
    """Its plain decoding in ms per token by context, or why there is none."""
    contexts = sorted({cell.context_len for cell in cells})
    llama_cpp = open_llama_cpp(default_model_path(), max_context_len)
    if llama_cpp is None:
        return dict.fromkeys(contexts, "not installed")
    # Beginnings of one prompt, shortest first: each goes on from what llama.cpp has processed.
    return {c: f"{1000 * llama_cpp.plain_step_s(prompt.tokens[:c], LLAMA_CPP_STEPS):.2f}" for c in contexts}


def row(cell: Cell, llama_cpp_ms: str) -> dict:
    """Measured and predicted in columns of their own."""
    plan, later = cell.plan, OUTPUT_LEN - 1
    ratios = [plain / planned for plain, planned in zip(cell.plain_s, cell.planned_s)]
    whole = [(prefill + plain) / (prefill + planned) for prefill, plain, planned in zip(cell.prefill_s, cell.plain_s, cell.planned_s)]
    missing = "off" if cell.off else ""
    return {
        "context": cell.context_len,
        "temperature": f"{cell.temperature:g}",
        "planned": describe(plan.chosen),
        "texts": len(cell.plain_s),
        "plain, ms/token": f"{1000 * statistics.median(cell.plain_s) / later:.2f}",
        "planned, ms/token": missing or f"{1000 * statistics.median(cell.planned_s) / later:.2f}",
        "llama.cpp plain (4-bit Q4_1), ms/token": llama_cpp_ms,
        "measured speedup": missing or f"{cell.speedup:.3f}",
        "least, median, most of the texts": missing or f"{min(ratios):.2f}, {statistics.median(ratios):.2f}, {max(ratios):.2f}",
        "mean with prefill": missing or f"{statistics.mean(whole):.3f}",
        "predicted speedup": f"{plan.speedup.value:.3f} [{plan.speedup.low:.3f}, {plan.speedup.high:.3f}]",
        "tokens/round": missing or f"{later / statistics.mean(cell.rounds):.2f}",
        "predicted tokens/round": f"{plan.estimate.tokens_per_round.value:.2f}",
    }


if __name__ == "__main__":
    main()
