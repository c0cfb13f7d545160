"""What `planner import audit` shows: the contradictions, and the rows to distrust."""

from planner.audits import MAX_EXAMPLES, Audit
from planner.report.layout import clean, open_console, put_lines, put_title

MAX_ROWS = 40


def show_audit(audit: Audit) -> None:
    console = open_console()
    count = len(audit.faults)
    found = "nothing contradicts itself" if not count else f"{count} contradiction{'s' * (count > 1)}, {len(audit.distrust)} rows to distrust"
    put_title(console, f"{clean(audit.table)}, {audit.num_rows} rows: {found}")
    lines = []
    for fault in audit.faults:
        more = len(fault.examples) - MAX_EXAMPLES
        some = "; ".join(map(clean, fault.examples[:MAX_EXAMPLES])) + (f"; and {more} more" if more > 0 else "")
        lines += [("Fault", clean(fault.what)), ("in", some), ("rows", _lines(fault.rows)), ("so", clean(fault.remedy))]
    if audit.distrust:
        lines.append(("Distrust", _lines(audit.distrust)))
    put_lines(console, [*lines, *(("Unchecked", clean(text)) for text in audit.unchecked)])


def _lines(rows: list[str]) -> str:
    """Lines of one file, neighbours joined: lines 12-15, 17."""
    numbers = [row.rpartition(":")[2] for row in rows]
    if not all(number.isdigit() for number in numbers) or len({row.rpartition(":")[0] for row in rows}) > 1:
        return ", ".join(map(clean, rows[:MAX_ROWS])) + (f" and {len(rows) - MAX_ROWS} more" if len(rows) > MAX_ROWS else "")
    spans: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    more = f" and {len(texts) - MAX_ROWS} more" if len(texts) > MAX_ROWS else ""
    return f"line{'s' * (len(numbers) > 1)} {', '.join(texts[:MAX_ROWS])}{more}"
