"""Does a drafter trained on many cache budgets survive a small cache? Acceptance by drafter, budget, context and temperature.

The shipped multi-view drafter of SmolLM2-135M beside the same layers trained for as many steps with the full cache alone, with
the smallest budget alone and with the largest alone, the same layers untrained, self_sparse and n-gram: all replayed along the
same continuations of texts that none of them was trained on. Budgets keep chunks by the last key, the selection of the training.
Intervals are 90 %, over texts; + and - mark cells that differ from multi_view beyond the interval of the paired difference.
About 25 minutes on two cores; what is finished stands in --journal, and --resume goes on from it.
"""

from pathlib import Path

import msgspec
import numpy as np
import torch
from common import make_parser, progress, report_tables, texts
from scipy import stats

from planner.commands.session import open_session
from planner.cost.renewal import expected_rounds
from planner.files import Journal
from planner.profiler.acceptance import replay, write_texts
from planner.profiler.texts import draw_prompts
from planner.runtime.model import Transformer, prefill
from planner.runtime.own_layers import load_own_layers, on_target, read_header
from planner.specs import DraftConfig, DrafterSpec, FullKV, KVPolicy, Sampler, SparseKV
from planner.training.multi_view import cut, own_weights

CONTEXTS, TEMPERATURES, BUDGETS = [2048, 4096, 8000], [0.0, 1.0], [64, 128, 256, 512, 1024]  # the model has 8192 positions
NUM_TEXTS, OUTPUT_LEN, DRAFT_LEN, GROUP = 12, 96, 4, 6
CONTROLS = Path(__file__).with_name("multi_view")
SHIPPED = Path(__file__).parents[1] / "planner" / "trained" / "smollm2-multi-view.safetensors"
TRAINED = {
    "multi_view": SHIPPED,
    "full_alone": CONTROLS / "full_alone.safetensors",
    "smallest_alone": CONTROLS / "smallest_alone.safetensors",
    "largest_alone": CONTROLS / "largest_alone.safetensors",
}
HELD_OUT = [
    "books/frankenstein.txt", "books/news_from_nowhere.txt", "books/guernsey_folk_lore.txt", "books/beethoven_letters_2.txt",
    "meetings/qmsum_academic_Bmr006.txt", "meetings/qmsum_academic_Bed015.txt", "code/py_pydecimal.txt", "code/py_language_reference_topics.txt",
]  # fmt: skip


class Done(msgspec.Struct):
    """One continuation, judged."""

    text: int
    context_len: int
    temperature: float
    distinct_4grams: float
    first_draft: dict[str, float]  # "drafter budget" -> mean chance that a round's first draft is accepted
    rounds_per_token: dict[str, float]  # at DRAFT_LEN


class DoneHeader(msgspec.Struct):
    """What must agree for a run to be resumed."""

    fingerprints: list[str]
    configs: list[DraftConfig]
    num_texts: int


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--journal", type=Path, default=Path("multi_view.journal.jsonl"))
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run with the same journal stopped")
    parser.add_argument("--texts", type=int, default=NUM_TEXTS, help="continuations per context and temperature")
    arguments = parser.parse_args()
    done = measure(arguments.journal, arguments.resume, arguments.texts)
    tables, figures = {}, {}
    for temperature in TEMPERATURES:
        for title, field in (("acceptance of a round's first draft", "first_draft"), (f"tokens per round, K = {DRAFT_LEN}", "rounds_per_token")):
            rows = []
            for context_len in CONTEXTS:
                cell = [entry for entry in done if (entry.context_len, entry.temperature) == (context_len, temperature)]
                for budget in [*map(str, BUDGETS), "full"]:
                    rows.append({"context": context_len, "budget": budget} | _row(cell, field, budget))
            tables[f"{title}, temperature {temperature:g}, {len(cell)} texts a cell"] = rows
    for entry in done:
        for name, value in entry.first_draft.items():
            drafter, budget = name.split(" ")
            figures.setdefault(f"acceptance/{drafter}/{entry.context_len}/{budget}/{entry.temperature:g}", []).append(value)
    figures = {name: float(np.mean(values)) for name, values in figures.items()}
    for temperature in TEMPERATURES:  # over budgets and contexts: is one drafter as good as the best of the controls?
        means = {
            name: np.mean([v for key, v in figures.items() if key.startswith(f"acceptance/{name}/") and key.endswith(f"/{temperature:g}")])
            for name in TRAINED
        }
        figures |= {f"mean_acceptance/{name}/{temperature:g}": float(value) for name, value in means.items()}
        best = max((name for name in TRAINED if name != "multi_view"), key=means.__getitem__)
        tables[f"mean over budgets and contexts, temperature {temperature:g}"] = [
            {"drafter": name, "acceptance": f"{value:.3f}", "multi_view - it": _mean_gap(done, temperature, name)} for name, value in means.items()
        ]
        figures[f"multi_view_minus_best_control/{temperature:g}"] = float(means["multi_view"] - means[best])
    repetitive = sum(entry.distinct_4grams < 0.6 for entry in done)
    progress(f"{repetitive} of {len(done)} continuations repeat themselves (distinct 4-grams below 0.6)")
    report_tables(tables, figures, arguments.json)


def measure(journal_path: Path, resume: bool, num_texts: int) -> list[Done]:
    files = [Path(texts()) / name for name in HELD_OUT]
    session = open_session("smollm2")
    model = session.model
    drafters = {name: load_own_layers(path, model, model.dtype) for name, path in TRAINED.items()}
    drafters["untrained"] = _untrained(model, read_header(SHIPPED).layers)
    model.beside |= {(name, None): drafter for name, drafter in drafters.items()}
    configs = _configs(list(drafters))
    header = DoneHeader([model.fingerprint, *(drafter.fingerprint for drafter in drafters.values())], list(configs.values()), num_texts)
    journal = Journal(journal_path, header, resume=resume)
    done = list(journal.entries(Done))
    known = {(entry.text, entry.context_len, entry.temperature) for entry in done}
    prompts = draw_prompts(session.tokenizer, files, length=max(CONTEXTS), count=num_texts, seed=0)
    for first in range(0, num_texts, GROUP):
        group = prompts[first : first + GROUP]
        cells = [(c, t) for c in CONTEXTS for t in TEMPERATURES if any((first + b, c, t) not in known for b in range(len(group)))]
        if not cells:
            continue
        cache = model.new_cache(max(CONTEXTS) + OUTPUT_LEN, batch=len(group))
        for begin, context_len in zip([0, *CONTEXTS], CONTEXTS):
            cache.truncate(begin)
            logits = []
            for b, prompt in enumerate(group):
                logits.append(prefill(model, torch.tensor([prompt.tokens[begin:context_len]]), stream := cache.stream(b)))
            cache.lengths = list(stream.lengths) * len(group)
            for temperature in (t for c, t in cells if c == context_len):
                cache.lengths = [context_len] * len(group)
                seeds = [1000 * TEMPERATURES.index(temperature) + first + b for b in range(len(group))]
                written = write_texts(
                    model, cache, group, context_len, torch.cat(logits), Sampler(temperature=temperature), output_len=OUTPUT_LEN, stop_tokens=(),
                    seeds=seeds,
                )  # fmt: skip
                for b, (text, target_text) in enumerate(written):
                    if (first + b, context_len, temperature) in known:
                        continue
                    entry = _judged(model, target_text, configs, first + b, text.distinct_4grams)
                    journal.add(entry)
                    done.append(entry)
                    progress(f"text {first + b + 1} of {num_texts}, context {context_len}, temperature {temperature:g}")
            cache.lengths = [context_len] * len(group)
    return done


def _judged(model: Transformer, text, configs: dict[str, DraftConfig], number: int, distinct: float) -> Done:
    first, rounds = {}, {}
    for name, config in configs.items():
        sample = replay(model, text, config, number)
        chance, drafted = sample.accept_prob.unpack() / 255, sample.drafted.unpack().astype(int)
        first[name] = float((chance[:, 0] * (drafted > 0)).mean())
        rounds[name] = float(expected_rounds(chance[None], drafted[None], DRAFT_LEN).rounds[0]) / len(chance)
    text.prompt_caches.clear()
    return Done(number, len(text.prompt), text.sampler.temperature, distinct, first, rounds)


def _configs(drafters: list[str]) -> dict[str, DraftConfig]:
    """By "drafter budget"."""

    def kept(budget: int | None, **extra) -> KVPolicy:
        return FullKV() if budget is None else SparseKV(budget=budget, selection="chunk", **extra)

    found = {}
    for budget in [*BUDGETS, None]:
        for name in drafters:
            spec = DrafterSpec(kind="draft_model", path=name)
            kv = FullKV() if budget is None else kept(budget, storage="evict")
            found[f"{name} {budget or 'full'}"] = DraftConfig(drafter=spec, kv=kv, draft_len=DRAFT_LEN)
        if budget is not None:
            found[f"self_sparse {budget}"] = DraftConfig(drafter=DrafterSpec(kind="self_sparse"), kv=kept(budget), draft_len=DRAFT_LEN)
    found["ngram full"] = DraftConfig(drafter=DrafterSpec(kind="ngram"), draft_len=DRAFT_LEN)
    return found


def _untrained(model: Transformer, layers: list[int]) -> Transformer:
    drafter = cut(model, layers)
    return on_target(model, drafter.spec, own_weights(drafter), model.dtype, "untrained")


def _row(cell: list[Done], field: str, budget: str) -> dict[str, str]:
    """The drafters at one budget, those that differ from multi_view marked."""
    row = {}
    ours = np.array([getattr(entry, field)[f"multi_view {budget}"] for entry in cell])
    for drafter in [*TRAINED, "untrained", "self_sparse", "ngram"]:
        if f"{drafter} {budget}" not in getattr(cell[0], field):
            row[drafter] = ""
            continue
        values = np.array([getattr(entry, field)[f"{drafter} {budget}"] for entry in cell])
        gap, half = (values - ours).mean(), _half_width(values - ours)
        better = gap > 0 if field == "first_draft" else gap < 0
        mark = " " if drafter == "multi_view" or abs(gap) <= half else "+" if better else "-"
        if field == "first_draft":
            row[drafter] = f"{values.mean():.3f} +-{_half_width(values):.3f}{mark}"
        else:
            row[drafter] = f"{1 / values.mean():.2f}{mark}"
    return row


def _mean_gap(done: list[Done], temperature: float, control: str) -> str:
    """The paired difference of means over budgets, by text and context."""
    gaps = {}
    for entry in done:
        if entry.temperature == temperature:
            own = [entry.first_draft[f"multi_view {b}"] - entry.first_draft[f"{control} {b}"] for b in [*BUDGETS, "full"]]
            gaps.setdefault(entry.text, []).append(np.mean(own))
    values = np.array([np.mean(own) for own in gaps.values()])
    return "" if control == "multi_view" else f"{values.mean():+.3f} +-{_half_width(values):.3f}"


def _half_width(values: np.ndarray) -> float:
    """Of the 90 % interval of the mean, by Student's t over texts."""
    return float(stats.t.ppf(0.95, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


if __name__ == "__main__":
    main()
