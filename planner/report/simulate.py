"""What is shown of a simulation: every setting beside off, on the same arrivals."""

from collections.abc import Callable, Sequence
from pathlib import Path

from planner.plans import Interval
from planner.report.layout import (
    Column,
    clean,
    format_interval,
    format_number,
    format_percent,
    open_console,
    put_lines,
    put_title,
    saved_lines,
    show_table,
)  # fmt: skip
from planner.report.terminal import HASH_CHARS
from planner.schedules import Limits
from planner.simulations import Arm, Latency, Simulation, Step, Studied

MAX_TRIED = 10
LATENCIES = {"TTFT s": ("ttft_s", 1.0), "TPOT ms": ("tpot_s", 1e3), "end to end s": ("e2e_s", 1.0)}
BARS = " .:-=+*#%@"  # of a series, in any encoding


def show_simulation(simulation: Simulation, path: str | Path | None) -> None:
    """The arms, what each changes against off, how full the server was, and what was assumed."""
    console, load, server = open_console(), simulation.load, simulation.server
    replicas = f"{server.replicas} replicas of " * (server.replicas > 1)
    devices = f"{server.tensor_parallel} x " * (server.tensor_parallel > 1)
    put_title(
        console,
        f"Simulation of {clean(server.model)} on {replicas}{devices}{clean(server.system)}, {clean(simulation.source)}: {load.requests:,} requests of "
        f"{clean(load.source)}, {load.requests_per_s:.3g}/s, prompts of {load.input_len_mean:,.0f} tokens, outputs of {load.output_len_mean:,.0f}",
    )
    keys = [Column("setting", lambda arm: clean(arm.name), right=False)]
    show_table(console, keys, _figures(simulation), simulation.arms)
    put_title(console, "Half, 90 and 99 % of the requests took at most")
    show_table(console, keys, _percentiles(), simulation.arms)
    if len(simulation.arms) > 1:
        put_title(console, "Changed against off, the same requests at the same moments, %")
        show_table(console, keys, _changes(simulation), simulation.arms[1:])
    put_title(console, "The server")
    show_table(console, keys, _server(), simulation.arms)
    lines = [(f"{clean(arm.name)}", describe_steps(arm.steps)) for arm in simulation.arms if len(arm.steps) > 1]
    put_lines(console, lines)
    if any(arm.kv.series for arm in simulation.arms):
        put_lines(console, [(f"KV use, {clean(arm.name)}", f"|{_bars(arm.kv.series)}|") for arm in simulation.arms])
    if simulation.study is not None:
        _show_study(console, simulation.study)
    caching = "prefix caching" if server.prefix_caching else "no prefix caching"
    about = f"at most {server.max_num_seqs} requests and {server.max_num_batched_tokens} tokens in a step, {caching}"
    lines = [("Each replica", about + f"; router {server.router}" * (server.replicas > 1))]
    lines += [("Note", clean(note)) for note in dict.fromkeys(simulation.notes)]
    lines += [
        ("Intervals", "90 %, over stretches of the run; what the step times may be off is not in them"),
        ("File", f"sha256 {simulation.sha256[:HASH_CHARS]}; seed {simulation.seed}; {simulation.seconds:.1f} s"),
        *saved_lines(path),
    ]
    put_lines(console, lines)


def describe_steps(steps: Sequence[Step]) -> str:
    """A policy in a few words: "context ..4095: K=3 ..16, K=1 ..64, K=0; context 4096..: ..."."""
    parts = []
    for first in dict.fromkeys(step.context_from for step in steps):
        own = [step for step in steps if step.context_from == first]
        merged = [step for i, step in enumerate(own) if i + 1 == len(own) or own[i + 1].draft_len != step.draft_len]
        spelled = ", ".join(f"K={step.draft_len}" + (f" up to {step.batch_to}" if i + 1 < len(merged) else "") for i, step in enumerate(merged))
        parts.append((first, spelled))
    if len(parts) == 1:
        return f"by requests that decode: {parts[0][1]}"
    return "by requests that decode; " + "; ".join(f"texts from {first} tokens: {spelled}" for first, spelled in parts)


def _figures(simulation: Simulation) -> list[list[Column]]:
    """Means, and what changed of them."""
    groups = [[Column(title, _latency(name, unit, "mean"))] for title, (name, unit) in LATENCIES.items()]
    groups += [
        [Column(f"goodput %\n{_limits(limits)}", lambda arm, i=i: format_interval(arm.goodput[i].share, 100, 1))]
        for i, limits in enumerate(simulation.limits)
    ]
    if len(simulation.arms) > 1:
        groups.append([Column("end to end\nagainst off %", lambda arm: "" if arm.against_off is None else _percent(arm.against_off.e2e))])
    return groups


def _percentiles() -> list[list[Column]]:
    return [
        [Column(f"{title}\n{stat}", _latency(name, unit, stat)) for stat in pair]
        for title, (name, unit) in LATENCIES.items()
        for pair in (("p50",), ("p90", "p99"))
    ]


def _latency(name: str, unit: float, stat: str) -> Callable[[Arm], str]:
    def cell(arm: Arm) -> str:
        latency: Latency | None = getattr(arm, name)
        return "-" if latency is None else format_interval(getattr(latency, stat), unit)

    return cell


def _changes(simulation: Simulation) -> list[list[Column]]:
    names = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "end to end"}
    groups = [[Column(title, lambda arm, name=name: _percent(getattr(arm.against_off, name)))] for name, title in names.items()]
    return groups + [
        [Column(f"goodput\n{_limits(limits)}", lambda arm, i=i: _percent(arm.against_off.goodput[i]))] for i, limits in enumerate(simulation.limits)
    ]


def _server() -> list[list[Column]]:
    return [
        [Column("output\ntokens/s", lambda arm: format_interval(arm.output_tokens_per_s))],
        [Column("busy %", lambda arm: f"{100 * arm.busy.mean:.0f}"), Column("decoding\nat once", lambda arm: format_number(arm.running))],
        [
            Column("KV tokens", lambda arm: f"{arm.kv_tokens:,}"),
            Column("used %\nmean", lambda arm: f"{100 * arm.kv.mean:.0f}"),
            Column("most", lambda arm: f"{100 * arm.kv.max:.0f}"),
        ],
        [
            Column("tokens/round", lambda arm: f"{arm.tokens_per_round:.2f}" if arm.tokens_per_round else "-"),
            Column("prefix\nhits %", lambda arm: f"{100 * arm.prefix_hits:.0f}"),
        ],
        [Column("preempted", lambda arm: str(arm.preemptions)), Column("rejected", lambda arm: str(arm.rejected))],
    ]


def _show_study(console, study: Studied) -> None:
    put_title(console, f"Study: {len(study.tried)} of {study.num_candidates} configurations, by {study.minimised}")
    order = sorted((row for row in study.tried if row.cost is not None), key=lambda row: row.cost)
    show_table(
        console,
        [Column("setting", lambda row: clean(row.setting), right=False)],
        [
            [
                Column("max-num-seqs", lambda row: str(row.max_num_seqs)),
                Column("max-num-batched-tokens", lambda row: str(row.max_num_batched_tokens)),
            ],
            [Column(study.minimised, lambda row: format_number(row.cost))],
        ],
        order[:MAX_TRIED],
        lambda row: "bold" if row is order[0] else "",
    )
    failed = [row for row in study.tried if row.cost is None]
    workers = len({row.worker for row in study.tried})
    lines = [("Cannot run", f"{clean(row.setting)}, {row.max_num_seqs} and {row.max_num_batched_tokens}: {clean(row.reason)}") for row in failed[:3]]
    lines += [("Workers", f"{workers} processes took part")] * (workers > 1)
    put_lines(console, lines)


def _percent(interval: Interval | None) -> str:
    return "-" if interval is None else format_percent(interval)


def _limits(limits: Limits) -> str:
    known = [f"{name} {1e3 * limit:g}" for name, limit in (("TPOT", limits.tpot_s), ("TTFT", limits.ttft_s)) if limit is not None]
    return " ".join(known) + " ms"


def _bars(series: Sequence[float]) -> str:
    return "".join(BARS[min(len(BARS) - 1, int(share * len(BARS)))] for share in series)
