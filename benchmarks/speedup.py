"""What a plan gains: decoding with the planned configuration beside plain decoding, on texts the profile did not see.

SmolLM2-135M, OUTPUT_LEN tokens behind prompts of real text. The plan is made here from a profile (--profile; the
committed one unless told) for every context and temperature; both arms decode each text in turn. Speedup is plain over
planned, in time after prefill (selection, first token and all later ones); one over all texts of a cell is the ratio of
the sums. A cell whose plan is off has a speedup of 1 by definition, one that the profile does not cover is skipped.
Texts are taken as long as fit into about seven minutes, at least MIN_TEXTS per cell.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common import make_parser, progress, report_tables, texts
from others import open_llama_cpp

import planner
from planner.commands.session import Session, open_session
from planner.errors import BadInput
from planner.plans import Plan, Trial
from planner.profiler.device import describe_device
from planner.profiler.texts import Prompt, draw_prompts, expand
from planner.profiler.trial import run_trials
from planner.runtime.weights import default_model_path
from planner.specs import PLAIN, describe

CONTEXT_LENS = {"2k": 2048, "4k": 4096, "8k": 8000}  # the model ends at 8192, output included
TEMPERATURES = (1.0, 0.7)
OUTPUT_LEN = 96
MIN_TEXTS, MAX_TEXTS = 3, 12  # per cell
BUDGET_S = 420.0  # for all, loading included; no text is begun that would end later, but MIN_TEXTS are always run
LLAMA_CPP_STEPS = 32
SEED = 1  # the profile drew with 0


@dataclass(kw_only=True)
class Cell:
    """One context and temperature: its plan and what was measured."""

    name: str  # "2k_t0.7"
    context_len: int
    temperature: float
    plan: Plan
    prompts: list[Prompt]
    plain: list[Trial] = field(default_factory=list)
    planned: list[Trial] = field(default_factory=list)
    text_s: float = 0.0  # what the last text took

    @property
    def off(self) -> bool:
        return self.plan.chosen == PLAIN

    @property
    def speedup(self) -> float:
        """Of the summed time after prefill."""
        return 1.0 if self.off else sum(map(decode_s, self.plain)) / sum(map(decode_s, self.planned))

    def run_text(self, session: Session) -> None:
        """The next prompt with both arms, the other one first each time."""
        number = len(self.plain)
        arms = [PLAIN] if self.off else [PLAIN, self.plan.chosen]
        begin = time.perf_counter()
        # No stop tokens: the arms sample different texts, and a time ratio needs both to be as long.
        for trial in run_trials(
            session.model, [self.prompts[number]], arms if number % 2 == 0 else arms[::-1], self.plan.workload.sampler,
            output_len=OUTPUT_LEN, stop_tokens=(), seed=SEED + number, warm=number == 0,
        ):  # fmt: skip
            (self.plain if trial.config == PLAIN else self.planned).append(trial)
        self.text_s = time.perf_counter() - begin


def decode_s(trial: Trial) -> float:
    """Everything after prefill."""
    return trial.start_s + trial.decode_s


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--profile", type=Path, help="profile to plan from (default: the one of smollm2 in profiles/)")
    args = parser.parse_args()
    began = time.perf_counter()
    profile_path = args.profile or committed_profile()
    plans = make_plans(profile_path)
    if not plans:
        parser.error(f"{profile_path} covers none of the contexts and temperatures")
    session = open_planned(profile_path, next(iter(plans.values())))
    cells = draw_cells(session, plans)

    def left_s() -> float:
        return BUDGET_S - (time.perf_counter() - began)

    llama_cpp_ms = {}
    for number in range(MAX_TEXTS):
        if number == MIN_TEXTS:  # what must be there is, and the machine is as it was: the column beside it comes now
            llama_cpp_ms = measure_llama_cpp(cells, session.model.spec.max_context_len, left_s)
        for cell in cells:
            if number < wanted(cell) and (number < MIN_TEXTS or cell.text_s < left_s()):
                cell.run_text(session)
                progress(f"{cell.name}, text {number + 1}: {cell.text_s:.0f} s")

    figures = {f"speedup_{cell.name}": cell.speedup for cell in cells}
    figures["worst_cell_speedup"] = min(figures.values())
    title = f"{OUTPUT_LEN} tokens per text; planned from {profile_path.name}; intervals at 90 %"
    report_tables({title: [row(cell, llama_cpp_ms[cell.context_len]) for cell in cells]}, figures, args.json)
    progress(f"{time.perf_counter() - began:.0f} s")


def committed_profile() -> Path:
    """The profile of smollm2 under profiles/; exits where there is not exactly one."""
    found = sorted((Path(__file__).resolve().parents[1] / "profiles").glob("*/smollm2*.json"))
    if len(found) != 1:
        raise SystemExit(f"profiles/ must hold exactly one profile of smollm2, got {len(found)}; choose with --profile")
    return found[0]


def make_plans(profile_path: Path) -> dict[tuple[str, float], Plan]:
    """By context and temperature, for time per token, which is what is measured; cells without an answer are named and left out."""
    plans = {}
    for name, context_len in CONTEXT_LENS.items():
        for temperature in TEMPERATURES:
            try:
                plans[name, temperature] = planner.plan(
                    profile_path, context_len=context_len, output_len=OUTPUT_LEN, temperature=temperature, objective="tpot"
                )  # fmt: skip
            except BadInput as error:
                progress(f"skipped {name} at temperature {temperature:g}: {error}")
    return plans


def open_planned(profile_path: Path, plan: Plan) -> Session:
    """The model as the profile ran it."""
    profile = planner.load_profile(profile_path)
    session = open_session(profile.model, dtype=profile.dtype, execution=profile.execution_mode, weights=profile.weights)
    if session.model.fingerprint != plan.target_fingerprint:
        raise SystemExit(f"the profile is of model {plan.target_fingerprint}, this one is {session.model.fingerprint}; profile it again")
    if (here := describe_device(session.model.device).name) != plan.device:
        progress(f"the profile was measured on {plan.device}, this is {here}: the plan may not be the best here")
    return session


def draw_cells(session: Session, plans: dict[tuple[str, float], Plan]) -> list[Cell]:
    """Unseen prompts of the longest context; the others take their beginnings, as a profile does."""
    longest = max(CONTEXT_LENS[name] for name, _ in plans)
    seen = next(iter(plans.values())).seen_texts  # of the profile: the same in all
    prompts = draw_prompts(session.tokenizer, expand([texts()]), length=longest, count=MAX_TEXTS, seed=SEED, seen=seen)
    cells = []
    for (name, temperature), plan in plans.items():
        context_len = CONTEXT_LENS[name]
        cut = [prompt._replace(tokens=prompt.tokens[:context_len]) for prompt in prompts]
        cells.append(Cell(name=f"{name}_t{temperature:g}", context_len=context_len, temperature=temperature, plan=plan, prompts=cut))
    return cells


def wanted(cell: Cell) -> int:
    """Texts worth running: where the plan is off, only plain decoding's own time is left to tell."""
    return 1 if cell.off else MAX_TEXTS


def measure_llama_cpp(cells: list[Cell], max_context_len: int, left_s: Callable[[], float]) -> dict[int, str]:
    """Its plain decoding in ms per token by context, or why there is none."""
    contexts = sorted({cell.context_len for cell in cells})
    llama_cpp = open_llama_cpp(default_model_path(), max_context_len)
    if llama_cpp is None:
        return dict.fromkeys(contexts, "not installed")
    prompt = max((cell.prompts[0].tokens for cell in cells), key=len)
    # Beginnings of one prompt, shortest first: each goes on from what llama.cpp has processed.
    return {c: f"{1000 * llama_cpp.plain_step_s(prompt[:c], LLAMA_CPP_STEPS):.2f}" if left_s() > 0 else "no time left" for c in contexts}


def row(cell: Cell, llama_cpp_ms: str) -> dict:
    """Measured and predicted in columns of their own."""
    plan, later = cell.plan, OUTPUT_LEN - 1
    ratios = [decode_s(plain) / decode_s(planned) for plain, planned in zip(cell.plain, cell.planned)]
    whole = [plain.e2e_s / planned.e2e_s for plain, planned in zip(cell.plain, cell.planned)]
    missing = "off" if cell.off else ""
    return {
        "context": cell.context_len,
        "temperature": f"{cell.temperature:g}",
        "planned": describe(plan.chosen),
        "texts": len(cell.plain),
        "plain, ms/token": f"{1000 * statistics.median(trial.decode_s for trial in cell.plain) / later:.2f}",
        "planned, ms/token": missing or f"{1000 * statistics.median(trial.decode_s for trial in cell.planned) / later:.2f}",
        "llama.cpp plain (4-bit Q4_1), ms/token": llama_cpp_ms,
        "measured speedup": missing or f"{cell.speedup:.3f}",
        "median over texts": missing or f"{statistics.median(ratios):.3f}",
        "mean over texts": missing or f"{statistics.mean(ratios):.3f}",
        "mean with prefill": missing or f"{statistics.mean(whole):.3f}",
        "predicted speedup": f"{plan.speedup.value:.3f} [{plan.speedup.low:.3f}, {plan.speedup.high:.3f}]",
        "predicted with prefill": f"{plan.baseline.e2e_s.value / plan.estimate.e2e_s.value:.3f}",
    }


if __name__ == "__main__":
    main()
