"""Which tokens should a sparse drafter keep? Acceptance by policy, budget, context and temperature.

SmolLM2-135M as its own drafter, with its own weights, on real texts: window, chunk, snapkv, and retrieval with refresh,
each replayed along the same continuations, so that policies differ by what they keep and by nothing else. Intervals are
90 %, over texts. + and - mark cells that differ from window beyond the interval of the paired difference. About 50 minutes
on two cores; what is finished stands in --journal, and --resume goes on from it.
"""

from pathlib import Path

import msgspec
import numpy as np
from common import make_parser, progress, report_tables, texts
from continuations import continuations
from scipy import stats

from planner.commands.session import open_session
from planner.cost.renewal import expected_rounds
from planner.datasets import expand
from planner.files import Journal
from planner.profiler.acceptance import replay
from planner.profiler.texts import draw_prompts
from planner.specs import DraftConfig, DrafterSpec, SparseKV

CONTEXTS, TEMPERATURES, BUDGETS = [2048, 4096, 8000], [0.7, 1.0], [64, 128, 256, 512, 1024]
POLICIES = {"window": {}, "chunk": {}, "snapkv": {}, "retrieval": {"refresh": 32}}
NUM_TEXTS, OUTPUT_LEN, DRAFT_LEN, GROUP = 16, 96, 4, 4


class Done(msgspec.Struct):
    """One continuation, judged."""

    text: int
    context_len: int
    temperature: float
    distinct_4grams: float
    first_draft: dict[str, float]  # "policy budget" -> mean chance that a round's first draft is accepted
    rounds_per_token: dict[str, float]  # at DRAFT_LEN


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--journal", type=Path, default=Path("policies.journal.jsonl"))
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
                for budget in BUDGETS:
                    rows.append({"context": context_len, "budget": budget} | _row(cell, field, budget))
                    for policy in POLICIES:
                        values = np.array([getattr(entry, field)[f"{policy} {budget}"] for entry in cell])
                        name = f"{field.replace('rounds_per_token', 'tokens_per_round')}/{temperature:g}/{context_len}/{policy}/{budget}"
                        figures[name] = float(values.mean() if field == "first_draft" else 1 / values.mean())
            tables[f"{title}, temperature {temperature:g}, {len(cell)} texts a cell"] = rows
    repetitive = sum(entry.distinct_4grams < 0.6 for entry in done)
    progress(f"{repetitive} of {len(done)} continuations repeat themselves (distinct 4-grams below 0.6)")
    report_tables(tables, figures, arguments.json)


def measure(journal_path: Path, resume: bool, num_texts: int) -> list[Done]:
    session = open_session("smollm2")
    model = session.model
    configs = {
        f"{policy} {budget}": DraftConfig(
            drafter=DrafterSpec(kind="self_sparse"), kv=SparseKV(budget=budget, selection=policy, **extra), draft_len=DRAFT_LEN
        )
        for policy, extra in POLICIES.items()
        for budget in BUDGETS
    }
    journal = Journal(journal_path, DoneHeader(fingerprint=model.fingerprint, configs=list(configs.values()), num_texts=num_texts), resume=resume)
    done = list(journal.entries(Done))
    known = {(entry.text, entry.context_len, entry.temperature) for entry in done}
    prompts = draw_prompts(session.tokenizer, expand([texts()]), length=max(CONTEXTS), count=num_texts, seed=0)

    def missing(*cell: float) -> bool:
        return cell not in known

    for found in continuations(model, prompts, CONTEXTS, TEMPERATURES, output_len=OUTPUT_LEN, group=GROUP, wanted=missing):
        samples = {name: replay(model, found.target_text, config, found.number) for name, config in configs.items()}
        chances = {name: sample.accept_prob.unpack() / 255 for name, sample in samples.items()}
        walks = {name: expected_rounds(chance[None], np.full((1, len(chance)), DRAFT_LEN), DRAFT_LEN) for name, chance in chances.items()}
        entry = Done(
            found.number, found.context_len, found.temperature, found.text.distinct_4grams,
            {name: float(chance[:, 0].mean()) for name, chance in chances.items()},
            {name: float(walk.rounds[0]) / len(chances[name]) for name, walk in walks.items()},
        )  # fmt: skip
        journal.add(entry)
        done.append(entry)
    return done


class DoneHeader(msgspec.Struct):
    """What must agree for a run to be resumed."""

    fingerprint: str
    configs: list[DraftConfig]
    num_texts: int


def _row(cell: list[Done], field: str, budget: int) -> dict[str, str]:
    """One column per policy: a mean with its interval, marked where it differs from window's."""
    row = {}
    window = np.array([getattr(entry, field)[f"window {budget}"] for entry in cell])
    for policy in POLICIES:
        values = np.array([getattr(entry, field)[f"{policy} {budget}"] for entry in cell])
        low, high = _interval(values)
        least, most = _interval(values - window)
        mark = " " if policy == "window" or least <= 0 <= most else "+" if (least > 0) == (field == "first_draft") else "-"
        if field == "first_draft":
            row[policy] = f"{values.mean():.3f} [{low:.3f}, {high:.3f}] {mark}"
        else:  # rounds per token: the mean over texts is taken there
            row[policy] = f"{1 / values.mean():.2f} [{1 / high:.2f}, {1 / low:.2f}] {mark}"
    return row


def _interval(values: np.ndarray) -> tuple[float, float]:
    half = stats.t.ppf(0.95, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return values.mean() - half, values.mean() + half


if __name__ == "__main__":
    main()
