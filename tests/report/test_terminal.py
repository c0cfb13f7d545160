"""What the commands print: the figures are the data's, off comes first, 80 columns suffice, hostile names do no harm."""

import io
import json
import re
import sys
import unicodedata

import msgspec
import numpy as np
import pytest
from made_reports import (
    CHOICE,
    LOOKUP,
    NGRAM,
    SELF_SPARSE,
    TIED,
    WORKLOAD,
    a_check,
    a_check_cell,
    a_plan,
    a_profile,
    a_replay,
    a_sweep,
    an_environment,
    an_estimate,
    around,
    exact,
)
from scipy import stats

from planner.measurements import AcceptanceSample, Failure, Packed
from planner.plans import Interval, Rejected, Tie
from planner.replays import ProfiledCosts
from planner.report import layout, terminal
from planner.specs import PLAIN, DeviceSpec, DraftConfig, FullKV, describe
from planner.units import GIB, format_bytes

HOSTILE = [
    "[red]x[/red]",
    "[/]",
    "\x1b[31mred\x1b[0m",
    "\x9b2J\x07\u202egnp.exe",
    "x" * 400,
    "模型 ünï 🚀 " * 20,
    "two\nlines\r\tand \udc80",
    ":rocket:",
]
REPORTS = {
    "plan": lambda **changes: terminal.show_plan(a_plan(**changes), "plan.json"),
    "check": lambda **changes: terminal.show_check(a_check(**changes), "check.json"),
    "sweep": lambda **changes: terminal.show_sweep(a_sweep(**changes), "sweep.json"),
    "profile": lambda **changes: terminal.show_profile(a_profile(**changes), "profile.json"),
    "replay": lambda **changes: terminal.show_replay(a_replay(**changes), "replay.json"),
    "estimate": lambda notes=("extrapolated",): terminal.show_estimate(an_estimate(notes=notes), an_estimate(PLAIN, 0.0531)),
}
COLUMNS = {  # every column that a report must have, as one line
    "plan": ["TPOT ms", "end-to-end s", "tokens/round", "speedup x", "memory"],
    "check": [],
    "sweep": ["TPOT ms", "end-to-end s", "tokens/round"],
    "profile": [],
    "replay": ["tokens/round", "accepted", "oracle,"],
    "estimate": ["TPOT ms", "TTFT s"],
}


@pytest.fixture(params=[80, 200])
def width(request, monkeypatch) -> int:
    """Columns of the console."""
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


def cells(out: str, config: DraftConfig | str) -> str:
    """All rows that begin with a configuration, a mark before it or not, joined, the first without its indent."""
    name = config if isinstance(config, str) else describe(config)
    rows = [line for line in out.splitlines() if re.match(rf"\W*(choice|tie|best|\d+)?\s*{re.escape(name)}(\s|$)", line)]
    assert rows, f"no row of {name} in\n{out}"
    return " ".join(rows).lstrip()


def display_width(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in line)


def shown(interval: Interval, scale: float, decimals: int) -> str:
    value, low, high = (f"{scale * bound:.{decimals}f}" for bound in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


# The figures


def test_a_plan_shows_its_figures(capsys, width):
    plan = a_plan()
    terminal.show_plan(plan, "plan.json")
    out, err = capsys.readouterr()
    assert err == ""
    for estimate in (plan.estimate, *plan.runners_up):
        row = cells(out, estimate.config)
        for figure in (
            shown(estimate.tpot_s, 1e3, 1),
            shown(estimate.e2e_s, 1, 2 if estimate.e2e_s.value < 10 else 1),
            shown(estimate.tokens_per_round, 1, 2),
        ):
            assert figure in row
        assert shown(estimate.speedup, 1, 2) in row and format_bytes(estimate.memory_bytes.value).split()[0] in row
    assert cells(out, CHOICE).startswith("choice") and cells(out, TIED).startswith("tie") and cells(out, LOOKUP).startswith("ngram")
    flat = " ".join(out.split())
    for sentence in (
        "smollm2 (bfloat16) on NVIDIA L4: context 2048, output 256, temperature 0.8 top_p 0.95 top_k 50;",
        "objective end-to-end time; memory cap 22.00 GiB",
        "1.63 [1.57, 1.70] times as fast as plain decoding", "pays above 1.76 tokens per round; predicted 2.87 [2.76, 2.99]",
        "self_sparse chunk 512 K=4 costs +1.2 [-0.8, +3.3] %", "profile about 40 texts", "and 4 like it: needs 25.0 GiB", "interpolated",
        "drifted by +7%",
        "3.1 % rms", "sha256 0123456789ab,", "plan.json",
    ):  # fmt: skip
        assert sentence in flat
    assert out.splitlines()[-1] == plan.command


def test_a_plan_draws_speedup_by_draft_len(capsys, width):
    plan = a_plan()
    terminal.show_plan(plan, None)
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if "|" in line and re.match(r"\s*(off|\d+)\s", line)]
    assert [row[0] for row in rows] == ["off", "1", "4", "12"] and [row[1] for row in rows] == ["1.00", "0.91", "1.40", "1.63"]
    assert len({line.index("|") for line in out.splitlines() if "|" in line and re.match(r"\s*(off|\d+)\s", line)}) == 1
    terminal.show_plan(a_plan(by_draft_len=plan.by_draft_len[:1]), None)
    assert "Speedup by K" not in capsys.readouterr().out


def test_bars_share_a_scale():
    drawn = layout.bars([exact(1.0), Interval(value=2.0, low=1.5, high=4.0), exact(0.0)], 41, 1.0)
    assert drawn[0] == "#" * 10 + "|" and drawn[2] == " " * 10 + "|"
    assert drawn[1] == "#" * 10 + "|" + "#" * 4 + "-" * 25 and len(drawn[1]) == 40
    assert layout.bars([exact(0.5)], 41, 1.0) == ["#" * 20 + " " * 20 + "|"]


def test_off_chosen_says_do_not_speculate(capsys):
    baseline = an_estimate(PLAIN, 0.0531)
    terminal.show_plan(a_plan(chosen=PLAIN, estimate=baseline, baseline=baseline, best_speculative=TIED, speedup=exact(1)), None)
    out = capsys.readouterr().out
    assert "Do not speculate" in out and cells(out, PLAIN).startswith("choice")
    assert len(re.findall(r"^\s*(?:choice)?\s*off\s+5", out, re.MULTILINE)) == 1  # the baseline and the choice are one row
    terminal.show_plan(a_plan(chosen=PLAIN, estimate=baseline, best_speculative=None, runners_up=[], ties=[], speedup=exact(1)), None)
    out = capsys.readouterr().out
    assert "Do not speculate" in out and "Break-even" not in out


def test_reasons_of_refusal_are_counted_and_cut(capsys):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    terminal.show_plan(a_plan(rejected=[Rejected(config=LOOKUP, reason=f"reason {word}") for word in words for _ in range(3)]), None)
    out = capsys.readouterr().out
    assert "reason six" in out and "reason seven" not in out and "and 6 more" in out


def test_a_check_keeps_predicted_and_measured_apart(capsys, width):
    check = a_check()
    terminal.show_check(check, "check.json")
    out, _ = capsys.readouterr()
    # the longest names fold at 80 columns; off never does
    cell = next(cell for cell in check.cells if cell.role == "baseline")
    row = cells(out, PLAIN)
    for figure in (
        shown(cell.predicted.tpot_s, 1e3, 1), shown(cell.measured_tpot_s, 1e3, 1), shown(cell.predicted.round_s, 1e3, 1),
        f"{1e3 * cell.measured_round_s:.1f}",
        shown(cell.expected_tokens_per_round, 1, 2), "2.75", "3.21 [3.08, 3.34] GiB", "3.11 GiB", "+4.5 [+1.0, +8.0]",
        shown(cell.predicted.e2e_s, 1, 1),
        shown(cell.measured_e2e_s, 1, 1),
    ):  # fmt: skip
        assert figure in row
    assert out.count("predicted") == out.count("measured") - 3 == 5  # what follows from measurements alone: over choice, regret, verdict
    assert "+1.2 [-0.4, +2.8] %" in out and re.search(r"PASS\s+the choice is within", out) and "4.3" in out
    terminal.show_check(a_check(passed=False, objective="tpot"), None)
    out = capsys.readouterr().out
    assert "FAIL" in out and "PASS" not in out and "end-to-end" not in out


def test_a_check_shows_prices_and_energy_where_they_were_measured(capsys, width):
    cell = a_check_cell(PLAIN, "baseline", 0.0531)
    predicted = msgspec.structs.replace(cell.predicted, price_per_million_tokens=around(4.56), joules_per_token=around(1.23))
    cell = msgspec.structs.replace(cell, predicted=predicted, measured_price_per_million_tokens=around(4.71), measured_joules_per_token=around(1.31))
    terminal.show_check(a_check(cells=[cell, a_check_cell(CHOICE, "chosen", 0.0321)]), None)
    out = capsys.readouterr().out
    assert out.count("price / 1M tokens") == out.count("J / token") == 2
    assert all(shown(around(value), 1, 2) in cells(out, PLAIN) for value in (4.56, 4.71, 1.23, 1.31))
    terminal.show_check(a_check(), None)
    out = capsys.readouterr().out
    assert "$" not in out and "J / token" not in out


def test_a_sweep_is_sorted_by_tpot_behind_off(capsys, width):
    sweep = a_sweep()
    terminal.show_sweep(sweep, "sweep.json")
    out = capsys.readouterr().out
    order = [out.index(describe(config)) for config in (PLAIN, CHOICE, TIED, LOOKUP)]
    assert order == sorted(order)
    assert cells(out, CHOICE).startswith("best") and shown(around(1.65), 1, 2) in cells(out, CHOICE)
    assert shown(around(0.0402), 1e3, 1) in cells(out, LOOKUP) and "83.3" in out


def test_a_profile_shows_acceptance_by_text(capsys, width):
    terminal.show_profile(a_profile(), "profile.json")
    out, err = capsys.readouterr()
    half = stats.t.ppf(0.95, 2) * np.std([0.8, 0.6, 0.4], ddof=1) / 3**0.5
    assert f"0.60 [{0.6 - half:.2f}, {0.6 + half:.2f}]" in out
    assert re.search(r"self_sparse(?: window 1024)?\s+3\s+100\s", out)
    assert re.search(r"ngram\s+3\s+25\s+1.00 \[1.00, 1.00\]", out)  # where it drafts it is right; that it rarely drafts stands beside it
    assert re.search(r"2048\s+temperature 0.8(?: top_p 0.95 top_k 50)?\s+3\s+15\s+70\s+1", out)  # 15 tokens, 70 % distinct, one repetitive
    assert re.search(r"self_sparse(?: window 1024 K=12)?\s+40.2\s+23.4\s+51.2\s+75.6\s+3\n", out)
    assert "repeated" in out and "cell 5: out of memory" in out and "cell 6" not in out and "and 2 more" in out
    assert "latency 1.5, acceptance 2.2; 3.8 in all" in out.replace("2.3;", "2.2;") and "2048 tokens in 1.23 s" in out
    assert err == "warning: others used 25% of the CPU\n"


def test_a_drafter_that_never_drafted_has_no_acceptance(capsys):
    nothing = AcceptanceSample(text=0, drafter=NGRAM, kv=FullKV(), accept_prob=Packed.pack(np.zeros((4, 2))), drafted=Packed.pack(np.zeros(4)))
    terminal.show_profile(a_profile(acceptance=[nothing]), None)
    assert re.search(r"ngram\s+0\s+0\s+never drafted", capsys.readouterr().out)


def test_one_text_has_no_interval(capsys):
    profile = a_profile()
    terminal.show_profile(a_profile(acceptance=profile.acceptance[:1]), None)
    assert "0.80 [one text]" in capsys.readouterr().out


def test_a_loaded_drafter_that_drafts_nothing_is_not_off(capsys):
    plain = a_profile().rounds[1]
    idle = msgspec.structs.replace(plain, drafter=SELF_SPARSE, kv=CHOICE.kv)
    terminal.show_profile(a_profile(rounds=[idle, plain], acceptance=[]), None)
    out = capsys.readouterr().out
    assert "self_sparse window 1024 K=0" in out and out.index("off ") < out.index("K=0") and "(none)" in out


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0.000"), (0.2468, "0.247"), (6.325, "6.33"), (43.12, "43.1"), (999.94, "999.9"), (12345.6, "12346"), (1e15, "1000000000000000")],
)
def test_figures_have_about_three_digits(value, shown):
    assert layout.format_interval(around(value), decimals=None).split()[0] == shown


def test_an_interval_across_two_units_names_both():
    assert layout.format_memory(Interval(value=0.12 * GIB, low=0.05 * GIB, high=0.2 * GIB)) == "0.12 GiB [51.2 MiB, 0.20 GiB]"
    assert layout.format_memory(exact(5 * GIB)) == "5.00 GiB"


def test_a_replay_shows_each_group_and_its_headroom(capsys, width):
    terminal.show_replay(a_replay(), "replay.json")
    out = capsys.readouterr().out
    flat = " ".join(out.split())
    assert "All 2 samplers, as the log mixes them: 6 lines, 400 tokens" in flat and "Temperature 0.8 top_p 0.95 top_k 50: 6 lines" in flat
    row = cells(out, "self_sparse window 1024") if width > 80 else out
    assert shown(around(1.85), 1, 2) in row and shown(around(2.05), 1, 2) in row  # K = 1 and the longest
    assert shown(around(0.625), 1, 3) in row and "-4.0 [-6.0, -2.0]" in row and "-20.0 [-25.0, -15.0]" in row
    fast = "best fixed K 1.60 (self_sparse window 1024 K=2), best adaptive rule 1.67 (self_sparse window 1024), clairvoyant oracle 2.00"
    assert fast in flat and "10 of 400 tokens (2.5%)" in flat and "3 lines: too long" in flat and "0.1 of one for every token" in flat
    terminal.show_replay(a_replay(costs=ProfiledCosts(profile_sha256="a" * 64)), None)
    assert "ms per token" in capsys.readouterr().out


# The form


@pytest.mark.parametrize("report", REPORTS)
def test_off_comes_first(report, capsys, width):
    REPORTS[report]()
    out = capsys.readouterr().out
    found = [re.match(r"\s*(?:choice|tie|best|2048)?\s*(off|self_sparse [\w ]+ K=\d+|ngram K=\d+)\s+\w", line) for line in out.splitlines()]
    assert next(match[1] for match in found if match) == "off"


@pytest.mark.parametrize("report", REPORTS)
def test_reports_keep_to_the_width(report, capsys, width):
    REPORTS[report]()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(display_width, lines if report != "plan" else lines[:-1])) <= width  # a line to paste is one line
    assert all("…" not in line for line in lines)


@pytest.mark.parametrize("columns", [20, 40])
@pytest.mark.parametrize("report", REPORTS)
def test_no_figure_is_cut_however_narrow(report, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    REPORTS[report]()
    assert "…" not in capsys.readouterr().out


@pytest.mark.parametrize("report", REPORTS)
def test_a_pipe_gets_plain_ascii(report, capsys, width):
    REPORTS[report]()
    out, err = capsys.readouterr()
    assert out.isascii() and err.isascii() and "\x1b" not in out + err


@pytest.mark.parametrize("report", COLUMNS)
def test_headers_carry_units(report, capsys, width):
    REPORTS[report]()
    out = capsys.readouterr().out
    assert all(column in out for column in COLUMNS[report])


# Names from outside


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(
    ("report", "fields"),
    [
        ("plan", ["model", "device", "dtype", "source", "latency_form", "command"]),
        ("check", ["verdict"]),
        ("sweep", ["model"]),
        ("profile", ["model", "source", "execution_mode"]),
        ("replay", ["log", "model"]),
        ("estimate", []),
    ],
)
def test_hostile_names_do_no_harm(report, fields, name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lists = {
        "plan": {
            "notes": [name], "rejected": [Rejected(config=LOOKUP, reason=name)],
            "ties": [Tie(config=TIED, difference=exact(0), cost_of_being_wrong=0, settle=name)],
        },
        "check": {"warnings": [name]},
        "sweep": {"warnings": [name]},
        "profile": {
            "warnings": [name], "failures": [Failure(cell=name, reason=name)], "minutes": {name: 1.0},
            "environment": an_environment(gpu={name: name}, torch=name), "device": DeviceSpec(kind="cpu", name=name, memory_bytes=GIB),
        },
        "replay": {"warnings": [name], "skipped": {name: 1}},
        "estimate": {"notes": [name]},
    }  # fmt: skip
    REPORTS[report](**dict.fromkeys(fields, name), **lists[report])
    out, err = capsys.readouterr()
    assert not [char for char in out + err if char != "\n" and unicodedata.category(char) in ("Cc", "Cf", "Cs")]
    lines = out.splitlines()
    assert max(map(display_width, lines if report != "plan" else lines[:-1])) <= 80
    if name.startswith(("[", ":")):
        assert name in out + err  # literally
    if name.startswith("x"):
        assert sum(out.count(char) + err.count(char) for char in "x") >= 400  # whole, folded


def test_an_ascii_terminal_gets_question_marks(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    terminal.show_plan(a_plan(model="模型"), None)
    terminal.write_text("ü")
    sys.stdout.flush()
    assert b"Plan for ?? (bfloat16)" in raw.getvalue() and raw.getvalue().endswith(b"?")


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        return True


def a_tty(monkeypatch) -> Terminal:
    """stdout and stderr are one terminal of 80 columns. No fixture: between set-up and test pytest puts its own streams back."""
    stream = Terminal()
    for name, value in {"TERM": "xterm", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_no_color_is_respected(monkeypatch):
    tty = a_tty(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    REPORTS["plan"]()
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|4[0-7]|9[0-7])m", tty.getvalue())


def test_streamed_text_is_literal(monkeypatch):
    tty = a_tty(monkeypatch)
    for piece in ("[red]", "x\n", "\ty\x1b[2J", "\x9b"):
        terminal.write_text(piece)
    assert tty.getvalue() == "[red]x\n\ty[2J"


def test_streamed_text_is_untouched_in_a_pipe(capsys):
    terminal.write_text("a\x1b[2J[red]\r\n")
    assert capsys.readouterr().out == "a\x1b[2J[red]\r\n"


def test_errors_and_warnings_are_one_line_on_stderr(capsys):
    terminal.show_error(ValueError("[bold]rule\nvalue \x1b[31m" + "x" * 400))
    terminal.show_warnings(["a [red]b[/red]", "c\r\nd", "c d"])
    out, err = capsys.readouterr()
    assert out == "" and err == f"error: [bold]rule value [31m{'x' * 400}\nwarning: a [red]b[/red]\nwarning: c d\n"


def test_generation_stats_go_to_stderr(capsys):
    terminal.show_generation_stats(num_tokens=101, num_rounds=40, decode_s=1.25, ttft_s=0.5)
    terminal.show_generation_stats(num_tokens=1, num_rounds=0, decode_s=0.0, ttft_s=0.5)
    out, err = capsys.readouterr()
    assert out == "" and err == "101 tokens, TTFT 0.500 s, 2.50 tokens/round, TPOT 12.5 ms\n1 tokens, TTFT 0.500 s\n"


# JSON


@pytest.mark.parametrize("make", [a_plan, a_check, a_sweep, a_profile, a_replay, an_estimate])
def test_json_is_alone_on_stdout_and_reads_back(make, capsys):
    value = make()
    terminal.print_json(value)
    out, err = capsys.readouterr()
    assert err == "" and out.endswith("\n") and msgspec.json.decode(out, type=type(value)) == value


@pytest.mark.parametrize("name", HOSTILE)
def test_json_keeps_names_and_escapes_them(name, capsys):
    terminal.print_json({"name": name})
    out = capsys.readouterr().out
    assert json.loads(out) == {"name": name} and out.isascii() and "\x1b" not in out


def test_json_refuses_what_is_no_number(capsys):
    with pytest.raises(ValueError):
        terminal.print_json({"tpot_s": float("nan")})
    assert capsys.readouterr().out == ""


# Progress


def run_stages(**options):
    with terminal.progress("profile", **options) as progress:
        progress.stage("latency", 3)
        progress.advance()
        progress.advance(2)
        progress.stage("texts", 2)
        progress.advance()


def test_quiet_progress_is_silent(capsys):
    run_stages(quiet=True)
    assert capsys.readouterr() == ("", "")


def test_quiet_progress_is_silent_on_a_terminal(monkeypatch):
    tty = a_tty(monkeypatch)
    run_stages(quiet=True)
    assert tty.getvalue() == ""


def test_progress_in_a_pipe_is_a_line_per_stage(capsys):
    run_stages()
    assert capsys.readouterr() == ("", "profile: latency (3)\nprofile: texts (2)\n")


def test_progress_on_a_terminal_counts(monkeypatch):
    tty = a_tty(monkeypatch)
    run_stages()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", tty.getvalue())
    assert "profile: latency" in plain and "3/3" in plain and "1/2" in plain and "0:00:0" in plain
    assert tty.getvalue().rfind("\x1b[?25h") > tty.getvalue().rfind("\x1b[?25l") >= 0  # the cursor is back


def test_progress_leaves_stdout_alone(monkeypatch):
    tty = a_tty(monkeypatch)
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    with terminal.progress("profile") as progress:
        progress.stage("[red]latency\x1b[31m", 3)
        terminal.write_text("answer")
        terminal.print_json({})
        terminal.show_warnings(["[b]hot"])
    assert out.getvalue() == "answer{}\n" and "[red]latency[31m" in tty.getvalue() and "[b]hot" in tty.getvalue()


def test_an_interrupt_gives_the_terminal_back(monkeypatch):
    tty = a_tty(monkeypatch)
    before = sys.stderr
    with pytest.raises(KeyboardInterrupt), terminal.progress("profile") as progress:
        progress.stage("latency", 3)
        raise KeyboardInterrupt
    assert sys.stderr is before and tty.getvalue().rfind("\x1b[?25h") > tty.getvalue().rfind("\x1b[?25l")
    assert tty.getvalue().endswith("\n") or tty.getvalue().endswith("\x1b[?25h")


# Batches


def test_a_batch_is_shown_where_there_is_one(capsys, width):
    batch = msgspec.structs.replace(WORKLOAD, batch=8)
    check = a_check(
        cells=[msgspec.structs.replace(cell, trials=[msgspec.structs.replace(t, batch=8) for t in cell.trials]) for cell in a_check().cells]
    )
    for show, alone, together in (
        (terminal.show_plan, a_plan(), a_plan(workload=batch)),
        (terminal.show_sweep, a_sweep(), a_sweep(workload=batch)),
        (terminal.show_check, a_check(), check),
    ):
        show(together, None)
        assert re.search(r"8 (streams )?side by side", " ".join(capsys.readouterr().out.split()))
        show(alone, None)
        assert "side by side" not in " ".join(capsys.readouterr().out.split())


def test_rounds_of_a_batch_stand_behind_those_of_one_stream(capsys, width):
    profile = a_profile()
    terminal.show_profile(profile, None)
    assert "batch" not in capsys.readouterr().out
    together = [msgspec.structs.replace(sample, batch=4) for sample in profile.rounds if sample.role == "cell"]
    terminal.show_profile(msgspec.structs.replace(profile, rounds=[*together, *profile.rounds]), None)
    out = capsys.readouterr().out
    assert re.findall(r"^ *2048 +([14]) +(off|self_sparse)", out, re.MULTILINE) == [
        ("1", "off"), ("1", "self_sparse"), ("4", "off"), ("4", "self_sparse"), ("1", "self_sparse"),
    ]  # fmt: skip
