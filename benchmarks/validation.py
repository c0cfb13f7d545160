"""planner's models on measurements that nobody here made: each is fitted to a few rows and predicts the rest.

A part is a function that returns its figures and tables; its name begins its figures' names. One row of the summary for each
figure with a target says whether it is met. --only PART runs parts whose name begins so.
"""

import operator
from collections.abc import Callable

from common import Shown, make_parser, progress, report_tables
from simulator import mooncake
from validation_kernels import a800, attention, matrix_products
from validation_run import audit, real_run

AT_MOST, AT_LEAST = operator.le, operator.ge

PARTS: dict[str, Callable[[], Shown]] = {
    "decode_attention": attention,
    "gemm": matrix_products,
    "a800": a800,
    "real_run": real_run,
    "simulator": mooncake,
    "audit": audit,
}

# How a figure's name ends, within a part: errors and losses are shares.
TARGETS: dict[str, dict[str, tuple[Callable[[float, float], bool], float]]] = {
    "decode_attention": {
        "n20": (AT_MOST, 0.10),
        "n50": (AT_MOST, 0.07),
        "n20_chosen": (AT_MOST, 0.08),
        "n50_chosen": (AT_MOST, 0.05),
    },
    "a800": {"mape": (AT_MOST, 0.04), "throughput_loss_max": (AT_MOST, 0.02)},
    "real_run": {"tpot_mean": (AT_MOST, 0.03), "e2e_mean": (AT_MOST, 0.05), "ttft_mean": (AT_MOST, 0.10)},
    "simulator": {"mooncake_seconds": (AT_MOST, 10)},
    "audit": {"budgetdraft_found": (AT_LEAST, 2)},
}


def judged(part: str, figures: dict[str, float]) -> list[dict]:
    """A row for each figure that has a target."""
    rows = []
    for name, value in figures.items():
        if name.rpartition("/")[2] in TARGETS.get(part, {}):
            holds, bound = TARGETS[part][name.rpartition("/")[2]]
            target = f"{'at most' if holds is AT_MOST else 'at least'} {bound:g}"
            rows.append({"figure": name, "value": f"{value:.4g}", "target": target, "": "met" if holds(value, bound) else "missed"})
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--only", metavar="PART", default="", help=f"parts whose name begins so; of {', '.join(PARTS)}")
    args = parser.parse_args()
    chosen = [part for part in PARTS if part.startswith(args.only)]
    if not chosen:
        parser.error(f"--only needs the beginning of a part's name ({', '.join(PARTS)}), got {args.only}")
    figures, tables, summary = {}, {}, []
    for part in chosen:
        progress(part)
        shown = PARTS[part]()
        figures |= shown.figures
        tables |= shown.tables
        summary += judged(part, shown.figures)
    report_tables(tables | ({"Targets": summary} if summary else {}), figures, args.json)


if __name__ == "__main__":
    main()
