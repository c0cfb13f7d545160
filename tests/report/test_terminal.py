"""What the commands print: the figures are the data's, off comes first, 80 columns suffice, hostile names do no harm."""

import io
import json
import re
import sys
import unicodedata

import msgspec
import numpy as np
import pytest
from scipy import stats

from planner.measurements import AcceptanceSample, Environment, Failure, MemorySample, Packed, PrefillSample, Profile, RoundSample, Text
from planner.plans import Check, CheckCell, Estimate, Interval, Plan, Rejected, Sweep, SweepCell, Tie, Trial
from planner.replays import Headroom, Length, ProfiledCosts, ServedDrafter, ServedGroup, ServedReplay, UnitCosts
from planner.report import layout, terminal
from planner.specs import PLAIN, DeviceSpec, DraftConfig, DrafterSpec, FullKV, ModelSpec, Sampler, SparseKV, Workload, describe
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
SELF_SPARSE, NGRAM = DrafterSpec(kind="self_sparse"), DrafterSpec(kind="ngram")
WARM = Sampler(temperature=0.8, top_p=0.95, top_k=50)
WORKLOAD = Workload(context_len=2048, output_len=256, sampler=WARM)
CHOICE = DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=1024, selection="window"), draft_len=12)
TIED = DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=512, selection="chunk"), draft_len=4)
LOOKUP = DraftConfig(drafter=NGRAM, draft_len=8)


def around(value: float, share: float = 0.04) -> Interval:
    return Interval(value=value, low=value * (1 - share), high=value * (1 + share))


def exact(value: float) -> Interval:
    return around(value, 0)


def an_estimate(config: DraftConfig = CHOICE, tpot_s: float = 0.0321, speedup: float = 1.634, notes: tuple[str, ...] = ()) -> Estimate:
    plain = config.draft_len == 0
    return Estimate(
        config=config, tokens_per_round=exact(1) if plain else around(2.871), round_s=around(tpot_s * 2.871), tpot_s=around(tpot_s),
        ttft_s=around(1.234),
        e2e_s=around(1.234 + 255 * tpot_s), memory_bytes=around(3.21 * GIB), speedup=exact(1) if plain else around(speedup),
        sd_rounds_per_token=0.123,
        num_texts=0 if plain else 16, notes=list(notes),
    )  # fmt: skip


def a_plan(**changes) -> Plan:
    value = Plan(
        planner_version="0.1.0", profile_sha256="0123456789abcdef" * 4, model="smollm2", target_fingerprint="f" * 16, device="NVIDIA L4",
        dtype="bfloat16",
        source="own runtime", workload=WORKLOAD, objective="e2e", memory_cap_bytes=22 * GIB, chosen=CHOICE,
        estimate=an_estimate(notes=["context 2048 interpolated between 1024 and 4096"]), baseline=an_estimate(PLAIN, 0.0531), speedup=around(1.634),
        break_even_tokens_per_round=1.757, best_speculative=CHOICE,
        runners_up=[an_estimate(TIED, 0.0325, 1.61), an_estimate(LOOKUP, 0.0402, 1.31)],
        ties=[
            Tie(config=TIED, difference=Interval(value=0.0123, low=-0.0084, high=0.033), cost_of_being_wrong=0.0085, settle="profile about 40 texts"),
        ],
        rejected=[Rejected(config=LOOKUP, reason=f"needs 25.{i} GiB of 22.00 GiB; the largest kv_budget that fits is 512") for i in range(5)],
        num_candidates=97, latency_error=0.0312, latency_form="affine in tokens and context", seen_texts=[],
        command="planner generate --model smollm2 --drafter self_sparse --kv-budget 1024 --selection window --draft-len 12 --prompt-file PROMPT.txt",
        notes=["the machine drifted by +7%"],
    )  # fmt: skip
    return msgspec.structs.replace(value, **changes)


def a_trial(config: DraftConfig) -> Trial:
    return Trial(
        config=config, text="a.txt", output_len=4, prefill_s=1.0, start_s=0.1, decode_s=0.3, drafted=[2], accepted=[2], round_s=[0.3],
        cache_bytes=1, peak_bytes=2,
    )  # fmt: skip


def an_environment(**changes) -> Environment:
    value = Environment(
        date="2026-01-02T03:04:05+00:00", planner_version="0.1.0", python="3.12.1", torch="2.9.0", platform="Linux", num_threads=2, busy_share=0.25,
        load_1min=1.5,
        gpu={"driver": "550.1", "power_cap_w": 72.0},
    )  # fmt: skip
    return msgspec.structs.replace(value, **changes)


def a_check_cell(config: DraftConfig, role: str, tpot_s: float) -> CheckCell:
    return CheckCell(
        config=config, role=role, predicted=an_estimate(config, tpot_s), measured_tpot_s=around(tpot_s * 1.07), measured_e2e_s=around(tpot_s * 270),
        measured_round_s=tpot_s * 2.9, measured_tokens_per_round=2.755, expected_tokens_per_round=around(2.871, 0.06),
        measured_memory_bytes=3.11 * GIB, cost_over_choice=Interval(value=0.0451, low=0.0102, high=0.08), trials=[a_trial(config)],
    )  # fmt: skip


def a_check(**changes) -> Check:
    cells = [a_check_cell(CHOICE, "chosen", 0.0321), a_check_cell(TIED, "runner_up", 0.0325), a_check_cell(PLAIN, "baseline", 0.0531)]
    value = Check(
        planner_version="0.1.0", plan_sha256="ab" * 32, environment=an_environment(), objective="e2e", num_texts=8, cells=cells, best=TIED,
        regret=Interval(value=0.012, low=-0.004, high=0.028), passed=True, verdict="the choice is within 3 % of the best measured", minutes=4.26,
    )  # fmt: skip
    return msgspec.structs.replace(value, **changes)


def a_sweep(**changes) -> Sweep:
    def cell(config, tpot_s, speedup):
        return SweepCell(
            config=config,
            measured_tpot_s=around(tpot_s),
            measured_e2e_s=around(tpot_s * 270),
            measured_tokens_per_round=2.755,
            speedup=speedup,
            trials=[a_trial(config)],
        )

    cells = [cell(LOOKUP, 0.0402, around(1.32)), cell(CHOICE, 0.0321, around(1.65)), cell(PLAIN, 0.0531, exact(1)), cell(TIED, 0.0325, around(1.63))]
    value = Sweep(planner_version="0.1.0", model="smollm2", environment=an_environment(), workload=WORKLOAD, cells=cells, best=CHOICE, minutes=83.3)
    return msgspec.structs.replace(value, **changes)


FIRST_ACCEPTED = [204, 153, 102]  # of 255, by text: 0.8, 0.6, 0.4


def a_profile(**changes) -> Profile:
    texts = [
        Text(kind="code", source="a.py", offset=0, extent=100, context_len=2048, sampler=WARM, output_len=5, distinct_4grams=share)
        for share in (0.9, 0.8, 0.4)
    ]
    samples = []
    for i, first in enumerate(FIRST_ACCEPTED):
        prob = np.full((4, 2), first)
        samples.append(AcceptanceSample(text=i, drafter=SELF_SPARSE, kv=CHOICE.kv, accept_prob=Packed.pack(prob), drafted=Packed.pack(np.full(4, 2))))
        drafted = np.array([0, 2, 0, 0])  # n-gram finds something once, and it is accepted
        samples.append(
            AcceptanceSample(
                text=i,
                drafter=NGRAM,
                kv=FullKV(),
                accept_prob=Packed.pack(drafted[:, None] // 2 * np.full((4, 2), 255)),
                drafted=Packed.pack(drafted),
            )
        )

    def rounds(config, draft_ms, role="cell"):
        n = 3
        return RoundSample(
            drafter=config.drafter, kv=config.kv, draft_len=config.draft_len, context_len=2048, role=role, position=[2048] * n,
            drafted=[config.draft_len] * n,
            draft_s=[draft_ms / 1e3] * n, verify_s=[0.050, 0.0512, 0.090], commit_s=[0.001] * n, warmup_s=[], start_s=[0.0402],
        )  # fmt: skip

    value = Profile(
        model="smollm2", target_fingerprint="f" * 16, weights_bytes=2 * GIB, dtype="bfloat16", execution_mode="eager", seed=0, contexts=[2048],
        samplers=[WARM],
        max_draft_len=2, texts=texts, acceptance=samples, rounds=[rounds(CHOICE, 23.4), rounds(PLAIN, 0.0), rounds(CHOICE, 24.9, "drift")],
        target=ModelSpec(
            name="tiny", architecture="llama", num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_size=32, intermediate_size=48,
            vocab_size=61,
            max_context_len=4096, rope_theta=1e4, rms_norm_eps=1e-5, tie_embeddings=True,
        ),
        device=DeviceSpec(kind="cpu", name="Some CPU", memory_bytes=8 * GIB, num_cores=2), environment=an_environment(),
        prefill=[PrefillSample(context_len=2048, seconds=[1.2, 1.234, 1.5])],
        memory=[MemorySample(context_len=2048, known_bytes=1, peak_bytes=2, base_bytes=0)],
        failures=[Failure(cell=f"cell {i}", reason="out of memory") for i in range(8)], minutes={"latency": 1.5, "acceptance": 2.25},
        warnings=["others used 25% of the CPU"],
    )  # fmt: skip
    return msgspec.structs.replace(value, **changes)


def a_replay(**changes) -> ServedReplay:
    def drafter(spec, kv, tokens_per_round):
        lengths = [
            Length(draft_len=k, tokens_per_round=around(tokens_per_round + k / 10), acceptance_rate=around(0.61) if k < 3 else None, cost=around(0.6))
            for k in (1, 2, 3)
        ]
        headroom = Headroom(
            draft_len=2, fixed=around(0.625), rule="estimate 0.1", adaptive=around(0.6), adaptive_over_fixed=Interval(value=-0.04, low=-0.06, high=-0.02),
            oracle=around(0.5), oracle_over_fixed=Interval(value=-0.2, low=-0.25, high=-0.15),
        )  # fmt: skip
        return ServedDrafter(drafter=spec, kv=kv, lengths=lengths, headroom=headroom)

    drafters = [drafter(SELF_SPARSE, CHOICE.kv, 1.75), drafter(NGRAM, FullKV(), 1.05)]
    groups = [
        ServedGroup(samplers=samplers, num_texts=6, num_tokens=400, impossible=10, plain_cost=1.0, drafters=drafters, best=0)
        for samplers in ([WARM, Sampler()], [WARM])
    ]
    value = ServedReplay(
        planner_version="0.1.0", log="served.jsonl#12345678", num_lines=50, skipped={"too long": 3}, model="smollm2", target_fingerprint="f" * 16,
        dtype="bfloat16", execution_mode="eager", weights="full", device="Some CPU", environment=an_environment(), seed=7,
        costs=UnitCosts(draft_cost=0.1), max_draft_len=3, groups=groups, texts=[], acceptance=[], minutes=1.5,
    )  # fmt: skip
    return msgspec.structs.replace(value, **changes)


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
