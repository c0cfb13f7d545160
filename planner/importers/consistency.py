"""What does not add up among imported cells, one sentence for each kind of doubt."""

from collections.abc import Iterable
from itertools import accumulate
from operator import mul

from planner.serving import OFF, ServedCell

NOISE = 0.05  # two roads to one number may differ by so much
REPEATS = 0.10  # and two runs of one cell by so much
SLOW_S = 1.0  # per token: more likely milliseconds
THIN = 0.8  # share of the concurrency that has to be there on average


def doubts(cells: list[ServedCell]) -> list[str]:
    """Sentences that name the rows."""
    rounds, accepted, crowded, thin, slow = [], [], [], [], []
    for cell in cells:
        from_acceptance = _tokens_per_round(cell)
        if cell.tpot_s > SLOW_S:
            slow.append(f"{cell.source} ({cell.tpot_s:.4g} s)")
        per_round = 1.0 if cell.draft_len == 0 else cell.tokens_per_round or from_acceptance
        if cell.itl_s is not None and per_round is not None and _differ(cell.tpot_s, cell.itl_s / per_round, NOISE):
            rounds.append(f"{cell.source} ({cell.tpot_s:.4g} against {cell.itl_s / per_round:.4g} s)")
        if cell.tokens_per_round is not None and from_acceptance is not None and _differ(cell.tokens_per_round, from_acceptance, NOISE):
            accepted.append(f"{cell.source} ({cell.tokens_per_round:.3g} against {from_acceptance:.3g})")
        if cell.output_tokens_per_s is None:
            continue
        running = cell.output_tokens_per_s * cell.tpot_s
        if running > cell.concurrency * (1 + NOISE):
            crowded.append(f"{cell.source} ({running:.1f} of {cell.concurrency})")
        elif cell.ttft_s is not None:
            present = cell.output_tokens_per_s / cell.output_len * (cell.ttft_s + cell.tpot_s * (cell.output_len - 1))
            if present < THIN * cell.concurrency:
                thin.append(f"{cell.source} ({present:.1f} of {cell.concurrency})")
    found = [
        (f"tpot_s is above {SLOW_S:g} s", slow, "times are in seconds; divide by 1000 if these are milliseconds"),
        ("tpot_s is not itl_s / tokens_per_round", rounds, "queueing may be in tpot_s, or itl_s may count tokens or merged chunks, not rounds"),
        ("tokens_per_round is not what the acceptance gives", accepted, "acceptance_i is conditional on the position before; check which is meant"),
        ("output_tokens_per_s x tpot_s, the running batch, is above concurrency", crowded, "one of the three is of another run"),
        ("on average fewer requests than concurrency were in the system", thin, "more prompts, or an unlimited rate, would fill it"),
        ("repeated cells differ in tpot_s", _repeats(cells), "repeat them on an idle machine"),
    ]
    sentences = [f"{what} in {_listed(rows)}: {remedy}" for what, rows, remedy in found if rows]
    if not any(cell.drafter == OFF for cell in cells):
        sentences.append("no row is off (no drafter loaded): every speedup needs that baseline; measure it at the same loads")
    return sentences


def _tokens_per_round(cell: ServedCell) -> float | None:
    complete = cell.draft_len > 0 and len(cell.acceptance) == cell.draft_len
    return 1.0 + sum(accumulate(cell.acceptance, mul)) if complete else None


def _repeats(cells: Iterable[ServedCell]) -> list[str]:
    first: dict[tuple, ServedCell] = {}
    differing = []
    for cell in cells:
        key = (cell.drafter, cell.draft_len, cell.concurrency, cell.context_len, cell.output_len, cell.tensor_parallel)
        known = first.setdefault(key, cell)
        if _differ(cell.tpot_s, known.tpot_s, REPEATS):
            differing.append(f"{cell.source} and {known.source} ({cell.tpot_s:.4g} and {known.tpot_s:.4g} s)")
    return differing


def _differ(a: float, b: float, share: float) -> bool:
    return abs(a - b) > share * min(a, b)


def _listed(rows: list[str]) -> str:
    """The first few, and how many more; each a file and a line."""
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    return f"{', '.join(row if len(row) < 200 else row[-200:] for row in rows[:3])}{more}"
