"""What the commands print: the answer on stdout; progress, warnings and errors on stderr. The only place that prints.

Times are shown in ms (per token, per round) or s (to the first token, end to end), sizes in GiB or MiB. "43.1 [41.9, 44.6]" is
an estimate with its 90 % interval. Nothing is interpreted as markup, and control characters of names never reach the terminal.
"""

import json
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from planner.measurements import MIN_DISTINCT_4GRAMS, Profile, RoundSample
from planner.plans import CONFIDENCE, Check, CheckCell, Estimate, Interval, Plan, Studied, Sweep, SweepCell
from planner.replays import ServedDrafter, ServedGroup, ServedReplay, UnitCosts
from planner.report.layout import (
    Column,
    Recorder,
    bars,
    clean,
    format_interval,
    format_memory,
    format_number,
    format_percent,
    open_console,
    put_lines,
    put_title,
    saved_lines,
    show_table,
)  # fmt: skip
from planner.specs import OBJECTIVES, DrafterSpec, KVPolicy, SparseKV, describe, describe_drafter, describe_kv, describe_sampler, describe_workload
from planner.units import format_bytes

MAX_ROWS = 6  # reasons of refusal, or failures, before "and N more"
HASH_CHARS = 12  # of a sha256, enough to recognise a file
REFRESH_S = 0.1
CHART_WIDTH = 44  # columns of the bars; with K and the figures a chart fits 80


# What everything goes through


def print_json(value: msgspec.Struct | dict) -> None:
    """One JSON document on stdout. ASCII, so that it survives any encoding and cannot carry terminal sequences."""
    print(json.dumps(msgspec.to_builtins(value), indent=1, allow_nan=False), flush=True)


def write_text(piece: str) -> None:
    """A piece of generated text on stdout, at once; on a terminal without the control characters a model may come up with."""
    console = open_console()
    if console.is_terminal:
        piece = "".join(char for char in piece if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs"))
    console.file.write(piece)
    console.file.flush()


def show_error(message: object) -> None:
    """One line on stderr."""
    print(f"error: {clean(message)}", file=sys.stderr, flush=True)


def show_warnings(warnings: Iterable[str]) -> None:
    """One line each on stderr, each warning once. Plain print: above a running progress bar rich redirects it."""
    if isinstance(console := open_console(), Recorder):
        put_lines(console, [("Warning", warning) for warning in dict.fromkeys(map(clean, warnings))])
        return
    for warning in dict.fromkeys(map(clean, warnings)):
        print(f"warning: {warning}", file=sys.stderr, flush=True)


# The reports


def show_plan(plan: Plan, path: str | Path | None) -> None:
    """The choice, what it is compared with, why, and last the line to paste."""
    console = open_console()
    cap = "no memory cap" if plan.memory_cap_bytes is None else f"memory cap {format_bytes(plan.memory_cap_bytes)}"
    objective = f"objective {OBJECTIVES[plan.objective]}"
    put_title(
        console, f"Plan for {clean(plan.model)} ({clean(plan.dtype)}) on {clean(plan.device)}: {describe_workload(plan.workload)}; {objective}; {cap}"
    )
    ties = [tie.config for tie in plan.ties]
    estimates = [plan.baseline]
    for estimate in [plan.estimate, *plan.runners_up]:
        if all(estimate.config != shown.config for shown in estimates):
            estimates.append(estimate)
    roles = ["choice" if e.config == plan.chosen else "tie" if e.config in ties else "" for e in estimates]
    _show_estimates(console, estimates, roles)
    _show_lengths(console, plan)

    lines = [("Choice", _choice(plan))]
    if plan.best_speculative is not None:
        predicted = next(
            (f"; predicted {format_interval(e.tokens_per_round, decimals=2)}" for e in estimates if e.config == plan.best_speculative), ""
        )
        threshold = f"{plan.break_even_tokens_per_round:.2f} tokens per round"
        lines.append(("Break-even", f"{describe(plan.best_speculative)} pays above {threshold}{predicted}"))
    for tie in plan.ties:
        lines.append(
            (
                "Tie",
                f"{describe(tie.config)} costs {format_percent(tie.difference)} %; if it is the better one, at most {100 * tie.cost_of_being_wrong:.1f} % is lost",
            )
        )
    lines += [("To settle", settle) for settle in dict.fromkeys(clean(tie.settle) for tie in plan.ties)]
    lines += _refused(plan)
    lines += [("Note", clean(note)) for note in dict.fromkeys([*plan.notes, *plan.estimate.notes, *plan.baseline.notes])]
    lines += [
        ("Latency fit", f"{100 * plan.latency_error:.1f} % rms error on cells left out; {clean(plan.latency_form)}"),
        ("Profile", f"sha256 {plan.profile_sha256[:HASH_CHARS]}, latency from {clean(plan.source)}"),
        *saved_lines(path),
    ]
    put_lines(console, lines)
    console.print(Text(clean(plan.command), style="bold"), soft_wrap=True)  # unbroken, to be pasted


def show_estimate(estimate: Estimate, baseline: Estimate) -> None:
    """One configuration beside plain decoding."""
    console = open_console()
    _show_estimates(console, [baseline] if estimate.config == baseline.config else [baseline, estimate])
    between = f"standard deviation between texts {estimate.sd_rounds_per_token:.3f} rounds per token" if estimate.num_texts else ""
    lines = [("Acceptance", f"from {estimate.num_texts} texts; {between}")] if estimate.num_texts else []
    put_lines(console, lines + [("Note", clean(note)) for note in dict.fromkeys([*estimate.notes, *baseline.notes])])


def show_profile(profile: Profile, path: str | Path | None) -> None:
    """What was measured, in short; the profile's own warnings go to stderr."""
    console = open_console()
    show_warnings(profile.warnings)
    device, environment = profile.device, profile.environment
    cores = f", {device.num_cores} threads" if device.num_cores else ""
    put_title(
        console,
        f"Profile of {clean(profile.model)} ({profile.dtype}, {format_bytes(profile.weights_bytes)} of weights) "
        f"on {f'{profile.tensor_parallel} x ' * (profile.tensor_parallel > 1)}{clean(device.name)} ({format_bytes(device.memory_bytes)}{cores}), {clean(profile.source)}, {clean(profile.execution_mode)}",
    )
    put_title(console, "Texts that the target wrote")
    show_table(console, *_texts_table(profile))
    put_title(console, f"Acceptance: P(first draft is accepted), mean over texts with {100 * CONFIDENCE:.0f} % interval")
    show_table(console, *_acceptance_table(profile))
    put_title(console, "Rounds: medians, each phase by itself; start is selection and the first token, once per text")
    show_table(console, *_latency_table(profile))

    load = "" if environment.load_1min is None else f"load {environment.load_1min:.1f}"
    busy = "" if environment.busy_share is None else f"others used {environment.busy_share:.0%} of the CPU before the run"
    gpu = [f"{clean(key)}={clean(value)}" for key, value in environment.gpu.items() if value not in (None, "")]
    lines = [
        ("Prefill", "; ".join(f"{sample.context_len} tokens in {format_number(float(np.median(sample.seconds)))} s" for sample in profile.prefill)),
        ("Energy", _energy(profile)),
        *_failed(profile),
        ("Machine", ", ".join(part for part in (load, busy, *gpu) if part)),
        ("Versions", f"planner {clean(environment.planner_version)}, torch {clean(environment.torch)}, {clean(environment.date)}"),
        ("Minutes", _minutes(profile.minutes)),
    ]
    put_lines(console, [line for line in lines if line[1]] + saved_lines(path))


def show_check(check: Check, path: str | Path | None) -> None:
    """Predicted beside measured, and the verdict; the check's own warnings go to stderr."""
    console = open_console()
    show_warnings(check.warnings)
    batch = max(trial.batch for cell in check.cells for trial in cell.trials)
    groups_of = f", {batch} side by side" * (batch > 1)
    put_title(console, f"Check on {check.num_texts} texts{groups_of}; objective {OBJECTIVES[check.objective]}")
    cells = sorted(check.cells, key=lambda cell: (cell.role != "baseline", cell.role != "chosen"))  # stable: runners-up stay in order
    config = [Column("configuration", lambda cell: describe(cell.config), right=False)]
    groups = [
        [
            Column("role", lambda cell: {"chosen": "choice", "baseline": "baseline", "runner_up": "runner-up"}[cell.role], right=False),
            Column("predicted\nTPOT ms", lambda cell: format_interval(cell.predicted.tpot_s, 1e3)),
            Column("measured\nTPOT ms", lambda cell: format_interval(cell.measured_tpot_s, 1e3)),
        ],
        [
            Column("predicted\nround ms", lambda cell: format_interval(cell.predicted.round_s, 1e3)),
            Column("measured\nround ms", lambda cell: format_number(1e3 * cell.measured_round_s)),
        ],
        [
            Column("predicted\ntokens\nper round", lambda cell: format_interval(cell.expected_tokens_per_round, decimals=2)),
            Column("measured\ntokens\nper round", lambda cell: f"{cell.measured_tokens_per_round:.2f}"),
        ],
        [
            Column("predicted\nmemory", lambda cell: format_memory(cell.predicted.memory_bytes)),
            Column("measured\nmemory", lambda cell: format_bytes(cell.measured_memory_bytes)),
        ],
    ]
    if check.objective == "e2e":
        end_to_end = [
            Column("predicted\nend-to-end s", lambda cell: format_interval(cell.predicted.e2e_s)),
            Column("measured\nend-to-end s", lambda cell: format_interval(cell.measured_e2e_s)),
        ]
        groups.insert(1, end_to_end)
    if any(cell.measured_price_per_million_tokens is not None for cell in cells):
        price = [
            Column("predicted\nprice / 1M tokens", lambda cell: _optional(cell.predicted.price_per_million_tokens)),
            Column("measured\nprice / 1M tokens", lambda cell: _optional(cell.measured_price_per_million_tokens)),
        ]
        groups.insert(1, price)
    if any(cell.measured_joules_per_token is not None for cell in cells):
        energy = [
            Column("predicted\nJ / token", lambda cell: _optional(cell.predicted.joules_per_token)),
            Column("measured\nJ / token", lambda cell: _optional(cell.measured_joules_per_token)),
        ]
        groups.append(energy)
    groups.append([Column("measured\nover choice %", lambda cell: "" if cell.role == "chosen" else format_percent(cell.cost_over_choice))])

    def style(cell: CheckCell) -> str:
        return "bold" if cell.role == "chosen" else ""

    show_table(console, config, groups, cells, style)
    put_lines(
        console,
        [
            ("Regret", f"{format_percent(check.regret)} % of {OBJECTIVES[check.objective]} against the best measured, {describe(check.best)}"),
            ("PASS" if check.passed else "FAIL", clean(check.verdict)),
            ("Minutes", f"{check.minutes:.1f}"),
            *saved_lines(path),
        ],
    )


def show_sweep(sweep: Sweep, path: str | Path | None) -> None:
    """The grid, fastest first behind plain decoding; the sweep's own warnings go to stderr."""
    console = open_console()
    show_warnings(sweep.warnings)
    put_title(console, f"Sweep of {clean(sweep.model)}: {describe_workload(sweep.workload)}; all measured")
    cells = sorted(sweep.cells, key=lambda cell: (cell.config.draft_len > 0, cell.measured_tpot_s.value))

    def role(cell: SweepCell) -> str:
        return "best" if cell.config == sweep.best else ""

    keys = [Column("", role, right=False), Column("configuration", lambda cell: describe(cell.config), right=False)]
    groups = [
        [
            Column("TPOT ms", lambda cell: format_interval(cell.measured_tpot_s, 1e3)),
            Column("end-to-end s", lambda cell: format_interval(cell.measured_e2e_s)),
        ],
        [
            Column("tokens/round", lambda cell: f"{cell.measured_tokens_per_round:.2f}"),
            Column("speedup\nof TPOT x", lambda cell: format_interval(cell.speedup, decimals=2)),
        ],
    ]
    show_table(console, keys, groups, cells, lambda cell: "bold" if role(cell) else "")
    lines = [("Minutes", f"{sweep.minutes:.1f} for {len(cells)} configurations")]
    if sweep.study is not None:
        lines = [*_studied(sweep.study, len(cells)), *lines]
    put_lines(console, [*lines, *saved_lines(path)])


def _studied(study: Studied, num_measured: int) -> list[tuple[str, str]]:
    """What part of a grid was run, and what was not."""
    chosen = f"{num_measured} of {study.num_candidates} configurations, chosen by {clean(study.chosen_by)} and run one after the other"
    lines = [("Study", f"{chosen}; the best of the grid may be among those left out" if study.left_out else chosen)]
    lines += [("Failed", f"{clean(describe(one.config))}: {clean(one.reason)}") for one in study.failed]
    if study.left_out:
        more = len(study.left_out) - MAX_ROWS
        names = ", ".join(clean(describe(config)) for config in study.left_out[:MAX_ROWS])
        lines.append(("Left out", names + (f" and {more} more (--json names them)" if more > 0 else "")))
    return lines


def show_replay(replay: ServedReplay, path: str | Path | None) -> None:
    """Per group of lines: tokens per round by drafter and K, then what better choices of K could gain; its warnings go to stderr."""
    console = open_console()
    show_warnings(replay.warnings)
    put_title(
        console,
        f"Replay of {clean(replay.log)} on {clean(replay.model)} ({replay.dtype}): {len(replay.texts)} of {replay.num_lines} lines, drawn with seed {replay.seed}",
    )
    units = isinstance(replay.costs, UnitCosts)
    for group in replay.groups:
        samplers = describe_sampler(group.samplers[0]) if len(group.samplers) == 1 else f"all {len(group.samplers)} samplers, as the log mixes them"
        put_title(console, f"{samplers[0].upper()}{samplers[1:]}: {group.num_texts} lines, {group.num_tokens} tokens written; tokens per round by K")
        show_table(console, *_lengths_table(group, replay.max_draft_len))
        put_title(console, f"Headroom of better choices of K: costs in {'plain steps' if units else 'ms'} per token, then what they change in %")
        show_table(console, *_headroom_table(group, units))
        put_lines(console, _headroom(group))
    lines = [("Skipped", f"{count} lines: {clean(reason)}") for reason, count in replay.skipped.items()]
    if units:
        each = f"{replay.costs.draft_cost:g} of one for every token it drafts"
        lines.append(("Costs", f"assumed: a round takes a plain step, and {each} (--draft-cost); --profile gives seconds"))
    else:
        lines.append(("Costs", f"round times of the profile with sha256 {clean(replay.costs.profile_sha256)[:HASH_CHARS]}"))
    put_lines(console, [*lines, ("Minutes", f"{replay.minutes:.1f}"), *saved_lines(path)])


def show_saved(path: str | Path) -> None:
    """Where a page lies."""
    put_lines(open_console(), saved_lines(path))


def show_files(files: Sequence[Path], minutes: float) -> None:
    """What a run wrote, and how long it took."""
    console = open_console()
    put_lines(console, [("Files", "  ".join(clean(file) for file in files)), ("Took", f"{minutes:.1f} minutes")])


def show_generation_stats(*, num_tokens: int, num_rounds: int, decode_s: float, ttft_s: float) -> None:
    """One line on stderr about a finished generation. The first token belongs to prefill, not to a round."""
    later = num_tokens - 1
    parts = [f"{num_tokens} tokens", f"TTFT {format_number(ttft_s)} s"]
    if later > 0:
        parts += [f"{later / max(1, num_rounds):.2f} tokens/round", f"TPOT {format_number(1e3 * decode_s / later)} ms"]
    print(", ".join(parts), file=sys.stderr, flush=True)


# Progress


class Progress:
    """Bars on a terminal, else a plain line per stage, else nothing: what `planner.commands.progress.Progress` asks for."""

    def __init__(self, description: str, bars: Bars | None, quiet: bool):
        self._description, self._bars, self._quiet = clean(description), bars, quiet
        self._task, self._drawn_at = None, 0.0

    def stage(self, name: str, total: int) -> None:
        """A new stage of `total` steps begins; the one before it is over."""
        label = ": ".join(part for part in (self._description, clean(name)) if part)
        if self._bars is not None:
            self._finish()
            self._task = self._bars.add_task(label, total=total)
            self._bars.refresh()
        elif not self._quiet:
            print(f"{label} ({total})", file=sys.stderr, flush=True)

    def advance(self, n: int = 1) -> None:
        """n steps of the stage are done."""
        if self._task is None:
            return
        self._bars.advance(self._task, n)
        if time.perf_counter() - self._drawn_at > REFRESH_S:
            self._bars.refresh()
            self._drawn_at = time.perf_counter()

    def _finish(self) -> None:
        """Stop the clock of the stage; a stage that did fewer steps than announced keeps its count."""
        if self._task is not None:
            self._bars.stop_task(self._task)


@contextmanager
def progress(description: str = "", *, quiet: bool = False) -> Iterator[Progress]:
    """Progress of a long run, on stderr. Leaving it, by Ctrl-C too, gives the terminal back as it was.

    Redrawn only by `advance`, never by a thread: a thread would disturb what is being timed.
    """
    console = open_console(stderr=True)
    if quiet or not console.is_terminal or console.is_dumb_terminal:
        yield Progress(description, None, quiet)
        return
    columns = [TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn()]
    columns += [TextColumn("left"), TimeRemainingColumn()]
    with Bars(*columns, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=True, expand=True) as bars:
        reporter = Progress(description, bars, quiet)
        try:
            yield reporter
        finally:
            reporter._finish()


# Tables


def _show_estimates(console: Console, estimates: list[Estimate], roles: Sequence[str] = ()) -> None:
    rows = list(zip(estimates, roles or [""] * len(estimates), strict=True))
    keys = [Column("", lambda row: row[1], right=False)] if any(roles) else []
    keys.append(Column("configuration", lambda row: describe(row[0].config), right=False))
    groups = [
        [Column("TPOT ms", lambda row: format_interval(row[0].tpot_s, 1e3)), Column("end-to-end s", lambda row: format_interval(row[0].e2e_s))],
        [
            Column("tokens/round", lambda row: format_interval(row[0].tokens_per_round, decimals=2)),
            Column("speedup x", lambda row: format_interval(row[0].speedup, decimals=2)),
        ],
        [Column("TTFT s", lambda row: format_interval(row[0].ttft_s)), Column("memory", lambda row: format_memory(row[0].memory_bytes))],
    ]
    costs = [
        Column("price / 1M tokens", lambda row: _optional(row[0].price_per_million_tokens)),
        Column("J / token", lambda row: _optional(row[0].joules_per_token)),
    ]
    known = [column for column in costs if any(column.cell(row) for row in rows)]
    groups += [known] if known else []
    show_table(console, keys, groups, rows, lambda row: "bold" if row[1] == "choice" else "")


def _show_lengths(console: Console, plan: Plan) -> None:
    """Speedup by draft_len of the best speculative drafter, as a chart; nothing where only one length may be used."""
    if len(plan.by_draft_len) < 2 or plan.best_speculative is None:
        return
    rows = [plan.baseline, *plan.by_draft_len]
    drawn = dict(zip(map(id, rows), bars([row.speedup for row in rows], CHART_WIDTH, 1.0), strict=True))
    own = plan.best_speculative
    kv = f" {describe_kv(own.kv)}" if isinstance(own.kv, SparseKV) else ""
    put_title(console, f"Speedup by K of {clean(describe_drafter(own.drafter))}{clean(kv)}: # the low end, - the interval, | plain decoding")
    keys = [Column("K", lambda row: str(row.config.draft_len) if row.config.draft_len else "off")]
    columns = [Column("speedup x", lambda row: format_interval(row.speedup, decimals=2)), Column("", lambda row: drawn[id(row)], right=False)]
    show_table(console, keys, [columns], rows, lambda row: "bold" if row.config == plan.chosen else "")


def _texts_table(profile: Profile) -> tuple[list[Column], list[list[Column]], list]:
    groups = {}
    for text in profile.texts:
        groups.setdefault((text.context_len, text.sampler), []).append(text)

    def distinct(row: tuple) -> float:
        return float(np.mean([text.distinct_4grams for text in row[1]]))

    def repetitive(row: tuple) -> str:
        return str(sum(text.distinct_4grams < MIN_DISTINCT_4GRAMS for text in row[1]))

    columns = [
        Column("texts", lambda row: str(len(row[1]))),
        Column("tokens\nwritten", lambda row: str(sum(text.output_len for text in row[1]))),
        Column("distinct\n4-grams %", lambda row: f"{100 * distinct(row):.0f}"),
        Column(f"texts below\n{100 * MIN_DISTINCT_4GRAMS:.0f} %", repetitive),
    ]
    return _context_columns(), [columns], sorted(groups.items(), key=lambda item: item[0][0])


def _acceptance_table(profile: Profile) -> tuple[list[Column], list[list[Column]], list]:
    groups = {}
    for sample in profile.acceptance:
        text = profile.texts[sample.text]
        starts = sample.drafted.unpack() > 0
        first = sample.accept_prob.unpack()[:, 0] / 255
        entry = groups.setdefault((text.context_len, text.sampler, sample.drafter, sample.kv), ([], []))
        entry[0].append(starts.mean())
        entry[1].extend([first[starts].mean()] if starts.any() else [])  # a text on which nothing was drafted says nothing
    columns = [
        Column("drafter", lambda row: _drafter_name(row[0][2], row[0][3]), right=False),
        Column("texts", lambda row: str(len(row[1][1]))),
        Column("rounds that\ndraft %", lambda row: f"{100 * np.mean(row[1][0]):.0f}"),
        Column("P(first accepted)", lambda row: _mean(row[1][1])),
    ]
    return _context_columns(), [columns], sorted(groups.items(), key=lambda item: item[0][0])


def _latency_table(profile: Profile) -> tuple[list[Column], list[list[Column]], list[RoundSample]]:
    def median(values: Sequence[float]) -> str:
        return format_number(1e3 * float(np.median(values)))

    columns = [
        Column("start\nms", lambda row: median(row.start_s)),
        Column("draft\nms", lambda row: median(row.draft_s)),
        Column("verify\nms", lambda row: median(row.verify_s)),
        Column("round\nms", lambda row: median(row.round_s)),
        Column("rounds", lambda row: str(len(row.position))),
        Column("", lambda row: "repeated" if row.role == "drift" else "", right=False),
    ]
    keys = [Column("context", lambda row: str(row.context_len)), Column("configuration", _round_name, right=False)]
    if any(row.batch > 1 for row in profile.rounds):
        keys.insert(1, Column("batch", lambda row: str(row.batch)))
    return keys, [columns], sorted(profile.rounds, key=lambda row: (row.role == "drift", row.batch, _round_name(row) != "off"))


def _lengths_table(group: ServedGroup, max_draft_len: int) -> tuple[list[Column], list[list[Column]], list]:
    """Of draft_len, the powers of two and the longest: what lies between is in the file."""
    shown = sorted({2**i for i in range(max_draft_len.bit_length())} | {max_draft_len})

    def tokens(row: ServedDrafter | None, k: int) -> str:
        return "1.00" if row is None else format_interval(row.lengths[k - 1].tokens_per_round, decimals=2)

    def accepted(row: ServedDrafter | None, k: int) -> str:
        rate = None if row is None else row.lengths[k - 1].acceptance_rate
        return "" if rate is None else f"{100 * rate.value:.0f}"

    groups = [
        [Column(f"K={k}\ntokens/round", lambda row, k=k: tokens(row, k)), Column("accepted\n%", lambda row, k=k: accepted(row, k))] for k in shown
    ]
    return [_served_name()], groups, [None, *group.drafters]


def _headroom_table(group: ServedGroup, units: bool) -> tuple[list[Column], list[list[Column]], list]:
    scale, decimals = (1.0, 3) if units else (1e3, None)

    def of(row: ServedDrafter | None, show: Callable) -> str:
        return "" if row is None else show(row.headroom)

    def fixed(row: ServedDrafter | None) -> str:
        return format_number(scale * group.plain_cost) if row is None else format_interval(row.headroom.fixed, scale, decimals)

    groups = [
        [Column("best\nfixed K", lambda row: of(row, lambda h: str(h.draft_len))), Column("its\ncost", fixed)],
        [
            Column("best adaptive\nrule, %", lambda row: of(row, lambda h: format_percent(h.adaptive_over_fixed))),
            Column("which", lambda row: of(row, lambda h: clean(h.rule)), right=False),
        ],
        [Column("oracle,\n%", lambda row: of(row, lambda h: format_percent(h.oracle_over_fixed)))],
    ]
    return [_served_name()], groups, [None, *group.drafters]


def _served_name() -> Column:
    return Column("drafter", lambda row: "off" if row is None else _drafter_name(row.drafter, row.kv), right=False)


def _context_columns() -> list[Column]:
    """For rows that begin with (context_len, sampler, ...)."""
    return [Column("context", lambda row: str(row[0][0])), Column("sampler", lambda row: describe_sampler(row[0][1]), right=False)]


# Sentences


def _choice(plan: Plan) -> str:
    if plan.chosen.draft_len > 0:
        return (
            f"{describe(plan.chosen)}: {format_interval(plan.speedup, decimals=2)} times as {'cheap' if plan.objective == 'price' else 'fast'} "
            f"as plain decoding by {OBJECTIVES[plan.objective]}, "
            f"the best of {plan.num_candidates} configurations"
        )
    if plan.best_speculative is None:
        return f"Do not speculate: of {plan.num_candidates} configurations none that speculates may be used"
    best = next((e for e in plan.runners_up if e.config == plan.best_speculative), None)
    reach = (
        f", reaches {format_interval(best.speedup, decimals=2)} times the speed of plain decoding" if best else " is no faster than plain decoding"
    )
    return f"Do not speculate: the best of {plan.num_candidates} configurations that does, {describe(plan.best_speculative)}{reach}"


def _headroom(group: ServedGroup) -> list[tuple[str, str]]:
    """The best of all drafters in three numbers, and whether the log is of this model."""

    def least(cost: Callable[[ServedDrafter], float]) -> tuple[str, float]:
        best = min(group.drafters, key=cost)
        return _drafter_name(best.drafter, best.kv), group.plain_cost / cost(best)

    (_, fixed), (drafter, adaptive), (ideal, oracle) = (
        least(lambda d, kind=kind: getattr(d.headroom, kind).value) for kind in ("fixed", "adaptive", "oracle")
    )
    best = group.drafters[group.best]
    name = f"{_drafter_name(best.drafter, best.kv)} K={best.headroom.draft_len}" if best.headroom.draft_len else "off"
    share = f"{group.impossible / group.num_tokens:.1%}"
    speeds = f"best fixed K {fixed:.2f} ({name}), best adaptive rule {adaptive:.2f} ({drafter}), clairvoyant oracle {oracle:.2f} ({ideal})"
    strange = f"{group.impossible} of {group.num_tokens} tokens ({share}) could not have been drawn by this model and sampler"
    return [("Headroom", f"times as fast as plain decoding: {speeds}"), ("Log", strange)]


def _refused(plan: Plan) -> list[tuple[str, str]]:
    """One line per reason; reasons that differ in their figures only are one."""
    groups: dict[str, list] = {}
    for rejected in plan.rejected:
        groups.setdefault(re.sub(r"[\d.]+", "#", rejected.reason), []).append(rejected)
    lines = []
    for group in list(groups.values())[:MAX_ROWS]:
        others = f" and {len(group) - 1} like it" if len(group) > 1 else ""
        lines.append(("Refused", f"{describe(group[0].config)}{others}: {clean(group[0].reason)}"))
    if len(groups) > MAX_ROWS:
        lines.append(("Refused", f"and {sum(map(len, list(groups.values())[MAX_ROWS:]))} more"))
    return lines


def _failed(profile: Profile) -> list[tuple[str, str]]:
    lines = [("Failed", f"{clean(failure.cell)}: {clean(failure.reason)}") for failure in profile.failures[:MAX_ROWS]]
    return lines + [("Failed", f"and {len(profile.failures) - MAX_ROWS} more")] * (len(profile.failures) > MAX_ROWS)


def _energy(profile: Profile) -> str:
    if not profile.energy:
        return ""
    watts = [sample.watts for sample in profile.energy]
    return f"{format_number(min(watts))} to {format_number(max(watts))} W in {len(watts)} cells, by {clean(profile.energy_source)}"


def _minutes(minutes: dict[str, float]) -> str:
    stages = ", ".join(f"{clean(stage)} {spent:.1f}" for stage, spent in minutes.items())
    return f"{stages}; {sum(minutes.values()):.1f} in all"


def _drafter_name(drafter: DrafterSpec, kv: KVPolicy) -> str:
    name = describe_drafter(drafter)
    return f"{name} {describe_kv(kv)}" if isinstance(kv, SparseKV) else name


def _round_name(sample: RoundSample) -> str:
    if sample.draft_len == 0:
        return "off" if sample.drafter.kind == "none" else f"{_drafter_name(sample.drafter, sample.kv)} K=0"
    return f"{_drafter_name(sample.drafter, sample.kv)} K={sample.draft_len}"


# Figures


def _optional(interval: Interval | None) -> str:
    return "" if interval is None else format_interval(interval)


def _mean(shares: Sequence[float]) -> str:
    """Mean of shares with its interval, Student's t over texts, cut at 0 and 1 where no share can lie."""
    if not shares:
        return "never drafted"
    mean = float(np.mean(shares))
    if len(shares) == 1:
        return f"{mean:.2f} [one text]"
    from scipy.special import stdtrit  # here: scipy is slow to import, and --help needs none of it

    half = float(stdtrit(len(shares) - 1, (1 + CONFIDENCE) / 2) * np.std(shares, ddof=1) / np.sqrt(len(shares)))
    return f"{mean:.2f} [{max(0.0, mean - half):.2f}, {min(1.0, mean + half):.2f}]"
