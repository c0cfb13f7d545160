"""What does not add up among imported cells: within a row here, between rows by the laws of claims.py."""

from collections.abc import Iterable, Mapping
from itertools import accumulate
from operator import mul

from planner.audits import Fault
from planner.importers.claims import NOISE, REPEATS, Reads, Row, differ, find_faults
from planner.serving import OFF, ModelSize, ServedCell, SystemSpec

SLOW_S = 1.0  # per token: more likely milliseconds
UNKNOWN = Reads()
THIN = 0.8  # share of the concurrency that has to be there on average


def doubts(cells: list[ServedCell], reads: Reads = UNKNOWN) -> list[str]:
    """Sentences that name the rows, one for each kind of doubt."""
    sentences = [fault.sentence() for fault in cell_faults(cells, reads)]
    if not any(cell.drafter == OFF for cell in cells):
        sentences.append("no row is off (no drafter loaded): every speedup needs that baseline; measure it at the same loads")
    return sentences


def cell_faults(cells: list[ServedCell], reads: Reads = UNKNOWN) -> list[Fault]:
    """Contradictions within the rows, then among them."""
    rounds, accepted, crowded, thin, slow = [], [], [], [], []
    for cell in cells:
        from_acceptance = _tokens_per_round(cell)
        if cell.tpot_s > SLOW_S:
            slow.append((cell.source, f"({cell.tpot_s:.4g} s)"))
        per_round = 1.0 if cell.draft_len == 0 else cell.tokens_per_round or from_acceptance
        if cell.itl_s is not None and per_round is not None and differ(cell.tpot_s, cell.itl_s / per_round, NOISE):
            rounds.append((cell.source, f"({cell.tpot_s:.4g} against {cell.itl_s / per_round:.4g} s)"))
        if cell.tokens_per_round is not None and from_acceptance is not None and differ(cell.tokens_per_round, from_acceptance, NOISE):
            accepted.append((cell.source, f"({cell.tokens_per_round:.3g} against {from_acceptance:.3g})"))
        if cell.output_tokens_per_s is None:
            continue
        running = cell.output_tokens_per_s * cell.tpot_s
        if running > cell.concurrency * (1 + NOISE):
            crowded.append((cell.source, f"({running:.1f} of {cell.concurrency})"))
        elif cell.ttft_s is not None:
            present = cell.output_tokens_per_s / cell.output_len * (cell.ttft_s + cell.tpot_s * (cell.output_len - 1))
            if present < THIN * cell.concurrency:
                thin.append((cell.source, f"({present:.1f} of {cell.concurrency})"))
    found = [
        ("units", f"tpot_s is above {SLOW_S:g} s", slow, "times are in seconds; divide by 1000 if these are milliseconds"),
        (
            "round",
            "tpot_s is not itl_s / tokens_per_round",
            rounds,
            "queueing may be in tpot_s, or itl_s may count tokens or merged chunks, not rounds",
        ),
        (
            "tokens",
            "tokens_per_round is not what the acceptance gives",
            accepted,
            "acceptance_i is conditional on the position before; check which is meant",
        ),
        ("batch", "output_tokens_per_s x tpot_s, the running batch, is above concurrency", crowded, "one of the three is of another run"),
        ("batch", "on average fewer requests than concurrency were in the system", thin, "more prompts, or an unlimited rate, would fill it"),
        ("repeats", "repeated cells differ in tpot_s", _repeats(cells), "repeat them on an idle machine"),
    ]
    within = [
        Fault(kind=kind, what=what, rows=list(dict.fromkeys(row for row, _ in named)), examples=[f"{row} {why}" for row, why in named], remedy=remedy)
        for kind, what, named, remedy in found
        if named
    ]
    return [*within, *find_faults([_claim(cell) for cell in cells], reads, strict=False)]


def _claim(cell: ServedCell) -> Row:
    """Of a cell whose running batch is not known, only what its acceptance says: a round of fewer requests takes less time."""
    batch = 1.0 if cell.concurrency == 1 else None if cell.output_tokens_per_s is None else cell.output_tokens_per_s * cell.tpot_s
    per_round = cell.tokens_per_round or _tokens_per_round(cell)
    round_s = cell.itl_s or (per_round and cell.tpot_s * per_round)
    known = {} if batch is None else {"batch": batch, "tpot_s": cell.tpot_s, "round_s": round_s}
    return Row(
        source=cell.source, drafter=cell.drafter, series=(cell.concurrency, cell.output_len, cell.tensor_parallel), context_len=cell.context_len,
        draft_len=cell.draft_len, tokens_per_round=per_round, **known,
    )  # fmt: skip


def drafter_reads(drafters: Mapping[str, ModelSize], system: SystemSpec, cells: Iterable[ServedCell]) -> Reads:
    """The least time of a draft step. Nothing of the target's: a mixture of experts reads a part of its weights."""
    if system.bandwidth_bytes_per_s is None:
        return Reads()
    devices = max(cell.tensor_parallel for cell in cells)
    return Reads(drafter_s={name: size.weights_bytes / devices / system.bandwidth_bytes_per_s for name, size in drafters.items()})


def _tokens_per_round(cell: ServedCell) -> float | None:
    complete = cell.draft_len > 0 and len(cell.acceptance) == cell.draft_len
    return 1.0 + sum(accumulate(cell.acceptance, mul)) if complete else None


def _repeats(cells: Iterable[ServedCell]) -> list[tuple[str, str]]:
    first: dict[tuple, ServedCell] = {}
    differing = []
    for cell in cells:
        key = (cell.drafter, cell.draft_len, cell.concurrency, cell.context_len, cell.output_len, cell.tensor_parallel)
        known = first.setdefault(key, cell)
        if differ(cell.tpot_s, known.tpot_s, REPEATS):
            differing.append((cell.source, f"and {known.source} ({cell.tpot_s:.4g} and {known.tpot_s:.4g} s)"))
    return differing
