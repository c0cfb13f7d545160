"""Does a drafter trained on many cache budgets survive a small cache? Acceptance by drafter, budget, context and temperature.

Three layers of SmolLM2-135M trained on many budgets (multi_view), as many steps with the full cache alone, with the smallest
budget alone and with the largest alone; the shipped drafter, which is multi_view trained on; the same layers untrained,
self_sparse and n-gram: all replayed along the same continuations of texts that none of them was trained on. Budgets keep chunks
by the last key, the selection of the training. Intervals are 90 %, over texts; + and - mark cells that differ from multi_view
beyond the interval of the paired difference.
About 25 minutes on two cores; what is finished stands in --journal, and --resume goes on from it.
"""

from pathlib import Path

import msgspec
import numpy as np
from common import held_out, make_parser, progress, report_tables
from continuations import Continuation, continuations
from scipy import stats

from planner.commands.session import open_session
from planner.cost.renewal import expected_rounds
from planner.files import Journal
from planner.profiler.acceptance import replay
from planner.profiler.texts import draw_prompts
from planner.runtime.model import Transformer
from planner.runtime.own_layers import load_own_layers, on_target
from planner.specs import DraftConfig, DrafterSpec, FullKV, SparseKV
from planner.trained import own_layers_path, read_header
from planner.training.multi_view import cut, own_weights

CONTEXTS, TEMPERATURES, BUDGETS = [2048, 4096, 8000], [0.0, 1.0], [64, 128, 256, 512, 1024]  # the model has 8192 positions
NUM_TEXTS, OUTPUT_LEN, DRAFT_LEN, GROUP = 12, 96, 4, 6
EQUAL_STEPS = ("multi_view", "full_alone", "smallest_alone", "largest_alone")
TRAINED = {name: str(Path(__file__).with_name("multi_view") / f"{name}.safetensors") for name in EQUAL_STEPS} | {"shipped": "smollm2-multi-view"}
DRAFTERS = [*TRAINED, "untrained", "self_sparse", "ngram"]


class Done(msgspec.Struct):
    """One continuation, as one drafter accepts it."""

    text: int
    context_len: int
    temperature: float
    drafter: str
    fingerprint: str  # of its weights
    distinct_4grams: float
    first_draft: dict[str, float]  # by budget: mean chance that a round's first draft is accepted
    rounds_per_token: dict[str, float]  # at DRAFT_LEN


class DoneHeader(msgspec.Struct):
    """What must agree for a run to be resumed; drafters may come, go and be trained again."""

    fingerprint: str  # of the target
    num_texts: int


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--journal", type=Path, default=Path("multi_view.journal.jsonl"))
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run with the same journal stopped")
    parser.add_argument("--texts", type=int, default=NUM_TEXTS, help="continuations per context and temperature")
    parser.add_argument("--drafters", default=",".join(DRAFTERS), help="some of %(default)s; multi_view is the one others are compared with")
    arguments = parser.parse_args()
    drafters = [name for name in DRAFTERS if name in arguments.drafters.split(",")]
    if len(drafters) < len(arguments.drafters.split(",")) or "multi_view" not in drafters:
        parser.error(f"drafters are some of {', '.join(DRAFTERS)}, multi_view among them, got {arguments.drafters}")
    done = measure(arguments.journal, arguments.resume, arguments.texts, drafters)
    by_cell = {}
    for entry in done:
        by_cell.setdefault((entry.context_len, entry.temperature), {}).setdefault(entry.drafter, {})[entry.text] = entry
    tables, figures = {}, {}
    for temperature in TEMPERATURES:
        for title, field in (("acceptance of a round's first draft", "first_draft"), (f"tokens per round, K = {DRAFT_LEN}", "rounds_per_token")):
            rows = []
            for context_len in CONTEXTS:
                for budget in [*map(str, BUDGETS), "full"]:
                    rows.append({"context": context_len, "budget": budget} | _row(by_cell[context_len, temperature], field, budget))
            tables[f"{title}, temperature {temperature:g}, {arguments.texts} texts a cell"] = rows
    for entry in done:
        for budget, value in entry.first_draft.items():
            figures.setdefault(f"acceptance/{entry.drafter}/{entry.context_len}/{budget}/{entry.temperature:g}", []).append(value)
    figures = {name: float(np.mean(values)) for name, values in figures.items()}
    trained = [name for name in drafters if name in TRAINED]
    for temperature in TEMPERATURES:  # over budgets and contexts: is one drafter as good as the best of the controls?
        means = {
            name: np.mean([v for key, v in figures.items() if key.startswith(f"acceptance/{name}/") and key.endswith(f"/{temperature:g}")])
            for name in trained
        }
        figures |= {f"mean_acceptance/{name}/{temperature:g}": float(value) for name, value in means.items()}
        best = max((name for name in trained if name in EQUAL_STEPS[1:]), key=means.__getitem__, default="multi_view")
        tables[f"mean over budgets and contexts, temperature {temperature:g}"] = [
            {"drafter": name, "acceptance": f"{value:.3f}", "multi_view - it": _mean_gap(done, temperature, name)} for name, value in means.items()
        ]
        figures[f"multi_view_minus_best_control/{temperature:g}"] = float(means["multi_view"] - means[best])
    written = {(entry.text, entry.context_len, entry.temperature): entry.distinct_4grams for entry in done}
    progress(f"{sum(value < 0.6 for value in written.values())} of {len(written)} continuations repeat themselves (distinct 4-grams below 0.6)")
    report_tables(tables, figures, arguments.json)


def measure(journal_path: Path, resume: bool, num_texts: int, names: list[str]) -> list[Done]:
    session = open_session("smollm2")
    model = session.model
    drafters = {name: load_own_layers(own_layers_path(TRAINED[name]), model, model.dtype) for name in names if name in TRAINED}
    if "untrained" in names:
        drafters["untrained"] = _untrained(model, read_header(own_layers_path(TRAINED["multi_view"])).layers)
    model.beside |= {(name, None): drafter for name, drafter in drafters.items()}
    prints = {name: drafters[name].fingerprint if name in drafters else model.fingerprint for name in names}
    journal = Journal(journal_path, DoneHeader(model.fingerprint, num_texts), resume=resume)
    done = [entry for entry in journal.entries(Done) if prints.get(entry.drafter) == entry.fingerprint]
    known = {(entry.text, entry.context_len, entry.temperature, entry.drafter) for entry in done}
    prompts = draw_prompts(session.tokenizer, held_out(), length=max(CONTEXTS), count=num_texts, seed=0)

    def missing(number: int, context_len: int, temperature: float) -> list[str]:
        return [name for name in names if (number, context_len, temperature, name) not in known]

    for found in continuations(model, prompts, CONTEXTS, TEMPERATURES, output_len=OUTPUT_LEN, group=GROUP, wanted=lambda *cell: bool(missing(*cell))):
        for name in missing(found.number, found.context_len, found.temperature):
            done.append(_judged(model, found, name, prints[name]))
            journal.add(done[-1])
    return done


def _judged(model: Transformer, found: Continuation, drafter: str, fingerprint: str) -> Done:
    first, rounds = {}, {}
    for budget, config in _configs(drafter).items():
        sample = replay(model, found.target_text, config, found.number)
        chance, drafted = sample.accept_prob.unpack() / 255, sample.drafted.unpack().astype(int)
        first[budget] = float((chance[:, 0] * (drafted > 0)).mean())
        rounds[budget] = float(expected_rounds(chance[None], drafted[None], DRAFT_LEN).rounds[0]) / len(chance)
    return Done(found.number, found.context_len, found.temperature, drafter, fingerprint, found.text.distinct_4grams, first, rounds)


def _configs(drafter: str) -> dict[str, DraftConfig]:
    """By budget, what a drafter is judged at."""
    if drafter == "ngram":
        return {"full": DraftConfig(drafter=DrafterSpec(kind="ngram"), draft_len=DRAFT_LEN)}
    if drafter == "self_sparse":  # with the full cache it is the target
        spec, storage, full = DrafterSpec(kind="self_sparse"), "retain", {}
    else:
        spec, storage = DrafterSpec(kind="draft_model", path=drafter), "evict"
        full = {"full": DraftConfig(drafter=spec, kv=FullKV(), draft_len=DRAFT_LEN)}
    policies = {str(budget): SparseKV(budget=budget, selection="chunk", storage=storage) for budget in BUDGETS}
    return {budget: DraftConfig(drafter=spec, kv=kv, draft_len=DRAFT_LEN) for budget, kv in policies.items()} | full


def _untrained(model: Transformer, layers: list[int]) -> Transformer:
    drafter = cut(model, layers)
    return on_target(model, drafter.spec, own_weights(drafter), model.dtype, "untrained")


def _row(cell: dict[str, dict[int, Done]], field: str, budget: str) -> dict[str, str]:
    """The drafters at one budget, those that differ from multi_view marked. cell  by drafter and text"""
    row = {}

    def values(drafter: str) -> np.ndarray:
        return np.array([getattr(entry, field)[budget] for _, entry in sorted(cell[drafter].items())])

    ours = values("multi_view")
    for drafter in (name for name in DRAFTERS if name in cell):
        if budget not in getattr(cell[drafter][0], field):
            row[drafter] = ""
            continue
        own = values(drafter)
        gap, half = (own - ours).mean(), _half_width(own - ours)
        better = gap > 0 if field == "first_draft" else gap < 0
        mark = " " if drafter == "multi_view" or abs(gap) <= half else "+" if better else "-"
        if field == "first_draft":
            row[drafter] = f"{own.mean():.3f} +-{_half_width(own):.3f}{mark}"
        else:
            row[drafter] = f"{1 / own.mean():.2f}{mark}"
    return row


def _mean_gap(done: list[Done], temperature: float, control: str) -> str:
    """The paired difference of means over budgets, by text and context."""
    found = {(e.drafter, e.text, e.context_len): np.mean(list(e.first_draft.values())) for e in done if e.temperature == temperature}
    numbers = {text for _, text, _ in found}
    gaps = np.array([np.mean([found["multi_view", text, c] - found[control, text, c] for c in CONTEXTS]) for text in sorted(numbers)])
    return "" if control == "multi_view" else f"{gaps.mean():+.3f} +-{_half_width(gaps):.3f}"


def _half_width(values: np.ndarray) -> float:
    """Of the 90 % interval of the mean, by Student's t over texts."""
    return float(stats.t.ppf(0.95, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


if __name__ == "__main__":
    main()
