"""What `planner capacity` prints."""

from planner.capacities import Capacity, CapacityRow
from planner.plans import Interval
from planner.report.layout import Column, clean, format_interval, open_console, put_lines, put_title, show_table
from planner.report.terminal import show_warnings
from planner.units import format_bytes

LIMITS = {"memory": "memory", "max_num_seqs": "max_num_seqs", "engine": "engine's cap", "concurrency": "load", "nothing fits": "nothing fits"}


def show_capacity(capacity: Capacity) -> None:
    """The memory of a device, then a row for each setting; warnings go to stderr."""
    console = open_console()
    show_warnings(capacity.warnings)
    devices = f"{capacity.tensor_parallel} x {capacity.system.name}" if capacity.tensor_parallel > 1 else capacity.system.name
    load = f"{capacity.context_len} -> {capacity.output_len} tokens"
    load += f", {capacity.max_concurrency} requests" if capacity.max_concurrency else ""
    put_title(console, f"Capacity of {clean(capacity.model.name)} on {clean(devices)} under {clean(capacity.engine)}: {load}; nothing measured")

    keys = [Column("drafter", lambda pool: clean(pool.drafter), right=False)]
    sizes = [
        Column("KV pool\ntokens", lambda pool: f"{pool.tokens:,}"),
        Column("KV pool", lambda pool: format_bytes(pool.bytes)),
        Column("a token", lambda pool: f"{pool.bytes_per_token / 1024:.4g} KiB"),
    ]
    show_table(console, keys, [sizes], capacity.pools)
    put_lines(console, _rest(capacity))

    keys = [Column("setting", _setting, right=False)]
    groups = [
        [Column("requests\nthat run", _running), Column("limited by", lambda row: LIMITS[row.limited_by], right=False)],
        [Column("round ms", lambda row: _shown(row.round_s, 1e3))],
        [
            Column("break-even length\nof a request", lambda row: _shown(row.break_even_tokens, decimals=2)),
            Column("of all\ntogether", lambda row: _shown(row.break_even_throughput, decimals=2)),
        ],
    ]
    show_table(console, keys, groups, capacity.rows)
    put_lines(console, [("Break-even", BREAK_EVEN)] * (len(capacity.rows) > 1) + [("Assumed", clean(text)) for text in capacity.assumed])


BREAK_EVEN = (
    "tokens that a round must emit on average (accepted drafts + 1) to match the first row; above K + 1 drafting cannot pay, "
    "and below 1 the smaller batch alone is quicker"
)


def _rest(capacity: Capacity) -> list[tuple[str, str]]:
    """What takes the rest of a device's memory; of a drafter, what it adds."""
    plain, *others = capacity.pools
    lines = [("The rest", ", ".join(f"{clean(part.name)} {format_bytes(part.bytes)}" for part in plain.rest))]
    known = {part.name for part in plain.rest}
    added = [part for pool in others for part in pool.rest if part.name not in known]
    return lines + [("", f"with a drafter also {clean(part.name)} {format_bytes(part.bytes)}") for part in added]


def _setting(row: CapacityRow) -> str:
    if not row.draft_len:
        return "no drafter"
    kv = "" if row.kv_budget is None else f" kv {row.kv_budget}"
    return f"{clean(row.drafter)}{kv} K={row.draft_len}"


def _running(row: CapacityRow) -> str:
    return f"{row.running:.1f}" if 0 < row.running < 10 else f"{row.running:.0f}"


def _shown(interval: Interval | None, scale: float = 1.0, decimals: int | None = None) -> str:
    return "" if interval is None else format_interval(interval, scale, decimals)
