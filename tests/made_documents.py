"""One small document of every kind that planner writes, as files; free texts in them are NAME, and the engine's drafter is DRAFTER."""

import json
from pathlib import Path

import msgspec
import numpy as np
from made import NGRAM, budgets, made_profile
from made_plans import served_profile
from msgspec.structs import replace

import planner
from planner.canaries import Answer, Canary, CanaryCell, Group
from planner.commands.flags import AskedExport
from planner.drifts import Choice, Drift, Position, Shift
from planner.exports import Step as Staircase
from planner.measurements import encode, fingerprint
from planner.plans import Check, CheckCell, Estimate, Interval, Plan, Sweep, SweepCell, Trial
from planner.replays import Headroom, Length, ServedDrafter, ServedGroup, ServedReplay, UnitCosts
from planner.schedules import Limits, Setting
from planner.simulations import QUANTILES, Arm, Change, Goodput, Latency, Load, Server, Simulation, Step, Use
from planner.specs import FullKV, Sampler, SparseKV
from planner.tunings import CheckedLoad, Launch, Run, TunedLoad, Tuning

NAME, DRAFTER = "made name", "eagle3"
HERE = Path(__file__).parent
K3, OFF = Setting(drafter=DRAFTER, draft_len=3), Setting()
ANSWER = Answer(ttft_s=0.1, decode_s=1.0, output_tokens=100, prompt_tokens=50, chunks=40, longest_gap_s=0.02)


def about(value: float, share: float = 0.1) -> Interval:
    half = share * abs(value)
    return Interval(value=value, low=value - half, high=value + half)


def write_documents(folder: Path) -> dict[str, Path]:
    """Paths by kind, as planner.documents names kinds."""
    paths = {}

    def write(kind: str, document: msgspec.Struct) -> Path:
        paths[kind] = folder / f"{kind.replace(' ', '-')}.json"
        paths[kind].write_bytes(encode(document))
        return paths[kind]

    drafters = [*budgets(64, 256), (NGRAM, FullKV())]
    profile = made_profile(
        drafters=drafters, contexts=(1024,), model=NAME, warnings=[NAME], noise=0.02, accept=lambda kv, *_: 0.9 if isinstance(kv, SparseKV) else 0.6
    )
    cap = int(1.5 * planner.plan(write("profile", profile)).baseline.memory_bytes.value)
    plan = planner.plan(paths["profile"], objective="tpot", memory_cap_bytes=cap)
    write("plan", plan)
    write("check", _check(plan, fingerprint(paths["plan"])))
    write("sweep", _sweep(plan))
    served = served_profile(name=DRAFTER)
    write("serving profile", replace(served, source=NAME, model=replace(served.model, name=NAME)))
    write("schedule", planner.schedule(paths["serving profile"], objective="throughput", concurrency=(1, 32)))
    write("export", planner.export(paths["schedule"], "vllm", folder / "engine", AskedExport(model=NAME, draft_model=NAME)))
    shape = "num_layers=32,num_kv_heads=8,head_dim=128,weights_gib=15"
    write("capacity", planner.capacity(shape, system="h100_sxm", context_len=4000, output_len=256, draft_models=[f"{DRAFTER}={shape}"]))
    write("audit", planner.audit(HERE / "published" / "budgetdraft.csv"))
    for kind, document in (
        ("tuning", _tuning()),
        ("simulation", _simulation()),
        ("replay", _replay(profile)),
        ("drift", _drift()),
        ("canary", _canary()),
    ):
        write(kind, document)
    return paths


def renamed(path: Path, folder: Path, name: str) -> Path:
    """The document with another text for NAME and DRAFTER."""
    text = path.read_text()
    for old in (NAME, DRAFTER):
        text = text.replace(f'"{old}"', json.dumps(name))
    out = folder / path.name
    out.write_text(text)
    return out


def _trial(config) -> Trial:
    return Trial(config=config, text="a.txt", output_len=4, prefill_s=1.0, start_s=0.1, decode_s=0.3, drafted=[2], accepted=[2], round_s=[0.3],
                 cache_bytes=1, peak_bytes=2)  # fmt: skip


def _check(plan: Plan, sha256: str) -> Check:
    def cell(estimate: Estimate, role: str, cost: float) -> CheckCell:
        return CheckCell(
            config=estimate.config, role=role, predicted=estimate, measured_tpot_s=about(1.07 * estimate.tpot_s.value, 0.03),
            measured_e2e_s=about(1.1 * estimate.e2e_s.value), measured_round_s=1.05 * estimate.round_s.value,
            measured_tokens_per_round=0.98 * estimate.tokens_per_round.value, expected_tokens_per_round=estimate.tokens_per_round,
            measured_memory_bytes=estimate.memory_bytes.value, cost_over_choice=about(cost), trials=[_trial(estimate.config)],
        )  # fmt: skip

    cells = [cell(plan.estimate, "chosen", 0.0), cell(plan.baseline, "baseline", 0.4), cell(plan.runners_up[0], "runner_up", 0.05)]
    environment = made_profile().environment
    return Check(planner_version="0", plan_sha256=sha256, environment=replace(environment, platform=NAME), objective=plan.objective, num_texts=8, cells=cells,
                 best=plan.chosen, regret=about(0.0), passed=True, verdict=NAME, minutes=1.0, warnings=[NAME])  # fmt: skip


def _sweep(plan: Plan) -> Sweep:
    def cell(estimate: Estimate, speedup: float) -> SweepCell:
        return SweepCell(config=estimate.config, measured_tpot_s=about(estimate.tpot_s.value), measured_e2e_s=about(estimate.e2e_s.value),
                         measured_tokens_per_round=2.5, speedup=about(speedup, 0.02), trials=[_trial(estimate.config)])  # fmt: skip

    cells = [cell(plan.baseline, 1.0), cell(plan.estimate, 1.41), *(cell(estimate, 1.2 + i / 10) for i, estimate in enumerate(plan.runners_up))]
    best = max(cells, key=lambda one: one.speedup.value).config
    return Sweep(planner_version="0", model=NAME, environment=made_profile().environment, workload=plan.workload, cells=cells, best=best, minutes=3.0)


def _tuning() -> Tuning:
    loads = [
        TunedLoad(concurrency=c, setting=K3, running_batch=float(c), tpot_s=about(0.01 * c**0.3), output_tokens_per_s=about(100.0 * c), gain_over_off=about(0.9),
                  gain_over_yours=about(0.13), next_best=OFF, gain_over_next=about(0.9), best=K3)
        for c in (1, 4, 16)
    ]  # fmt: skip
    checked = [
        CheckedLoad(role=role, setting=setting, concurrency=4, num_answers=8, predicted_tpot_s=about(predicted), predicted_output_tokens_per_s=about(400.0),
                    measured_tpot_s=about(0.0123), measured_output_tokens_per_s=about(345.0), gain=gain)
        for role, setting, predicted, gain in (("chosen", K3, 0.011, None), ("off", OFF, 0.02, about(0.8)))
    ]  # fmt: skip
    runs = [
        Run(launch=0, setting=setting, concurrency=c, answers=[ANSWER], prompts=[0], wall_s=2.0, sent=1) for setting in (OFF, K3) for c in (1, 4, 16)
    ]
    return Tuning(
        planner_version="0", engine="vllm", engine_version="0.33.0", method=DRAFTER, draft_model=NAME, model=NAME, system=NAME, objective="tpot",
        context_len=50, output_len=100, temperature=0.0, seed=1, minutes=8.3, requests=812, launches=[Launch(drafter=DRAFTER, ready_s=40.0)], runs=runs,
        profile="profile.json", schedule="schedule.json", chosen=[Staircase(batch_from=1, batch_to=16, draft_len=3)], loads=loads,
        yours=Setting(drafter=DRAFTER, draft_len=5), predicted_gain=about(0.132), paste="--speculative-config x", checked=checked, max_draft_len=8, notes=[NAME],
    )  # fmt: skip


def _simulation() -> Simulation:
    limits = [Limits(tpot_s=0.02, ttft_s=1.0)]
    steps = [Step(batch_from=1, batch_to=2**30, context_from=1, context_to=2**30, draft_len=0)]

    def latency(mean: float) -> Latency:
        quantiles = [float(np.interp(share, [0, 50, 90, 99], [0.2, 0.8, 1.9, 3.7])) * mean for share in QUANTILES]
        return Latency(mean=about(mean), p50=about(0.8 * mean), p90=about(1.9 * mean), p99=about(3.7 * mean), quantiles=quantiles)

    def arm(name: str, tpot_s: float, against: Change | None) -> Arm:
        kept = [Goodput(limits=one, share=about(0.8), requests_per_s=about(2.0), output_tokens_per_s=about(900.0)) for one in limits]
        return Arm(
            name=name, steps=steps, kv_tokens=123_456, served=99, rejected=1, ttft_s=latency(0.4), tpot_s=latency(tpot_s), e2e_s=latency(4.5),
            output_tokens_per_s=about(1234.0), goodput=kept, duration_s=60.0, busy=Use(mean=0.7, max=1.0), running=7.5, tokens_per_round=1.0, preemptions=3,
            kv=Use(mean=0.3, max=0.9, series=[round(float(x), 4) for x in np.linspace(0, 0.9, 48)]), prefix_hits=0.25, against_off=against,
        )  # fmt: skip

    change = Change(ttft=about(0.05), tpot=about(-0.25), e2e=about(-0.2), goodput=[about(0.3)])
    load = Load(
        source=NAME,
        requests=100,
        duration_s=50.0,
        requests_per_s=2.0,
        input_len_mean=1000.0,
        input_len_max=4000,
        output_len_mean=120.0,
        output_len_max=400,
    )
    server = Server(model=NAME, system=NAME, replicas=2, router="least_loaded", tensor_parallel=1, max_num_seqs=64, max_num_batched_tokens=2048,
                    block_tokens=16, prefix_caching=True)  # fmt: skip
    return Simulation(planner_version="0", sha256="ab" * 32, source=NAME, seed=1, limits=limits, load=load, server=server, seconds=2.0,
                      arms=[arm("off", 0.0123, None), arm("by batch", 0.0092, change)], notes=[NAME])  # fmt: skip


def _replay(profile) -> ServedReplay:
    lengths = [Length(draft_len=k, tokens_per_round=about(1 + 0.6 * k), acceptance_rate=about(0.6), cost=about(1 / (1 + 0.3 * k))) for k in (1, 2, 3)]
    headroom = Headroom(
        draft_len=3,
        fixed=about(0.53),
        rule=NAME,
        adaptive=about(0.5),
        adaptive_over_fixed=about(-0.06),
        oracle=about(0.4),
        oracle_over_fixed=about(-0.25),
    )
    drafter = ServedDrafter(drafter=NGRAM, kv=FullKV(), lengths=lengths, headroom=headroom)
    group = ServedGroup(samplers=[Sampler()], num_texts=4, num_tokens=200, impossible=1, plain_cost=1.0, drafters=[drafter], best=0)
    return ServedReplay(
        planner_version="0", log=NAME, num_lines=4, skipped={}, model=NAME, target_fingerprint="0", dtype="bfloat16", execution_mode="eager", weights="full",
        device=NAME, environment=profile.environment, seed=0, costs=UnitCosts(draft_cost=0.2), max_draft_len=3, groups=[group], texts=[], acceptance=[], minutes=1.0,
    )  # fmt: skip


def _drift() -> Drift:
    def shift(measured: float, predicted: float) -> Shift:
        return Shift(measured=about(measured), predicted=about(predicted), ratio=about(measured / predicted), moved=True)

    return Drift(
        planner_version="0", plan_sha256="0" * 64, model=NAME, engine="vllm", seconds=60.0, num_scrapes=5, num_restarts=0, num_failed=0, concurrency=4.0,
        concurrency_low=3.0, concurrency_high=5.0, running_batch=4.0, context_len=1000, context_planned=1000, planned=K3, running=K3, draft_len=3.0,
        positions=[Position(measured=0.5, predicted=0.8), Position(measured=0.3, predicted=0.6), Position(measured=0.1, predicted=None)],
        tokens_per_round=shift(1.9, 2.7), round_s=shift(0.02, 0.02), tpot_s=shift(0.011, 0.008), off_tpot_s=about(0.01), break_even_tokens_per_round=about(2.0),
        speedup=about(0.9), speedup_planned=1.4, load_moved=False, pays="no", verdict=NAME, causes=[NAME],
        choices=[Choice(setting=OFF, tpot_s=0.01, gain=about(0.1), restart=True)], advice=[NAME], notes=[NAME],
    )  # fmt: skip


def _canary() -> Canary:
    groups = [Group(wall_s=2.0, answers=[ANSWER])]
    cell = CanaryCell(
        concurrency=1, num_prompts=8, tpot_s=0.01, baseline_tpot_s=0.02, tpot_speedup=about(1.9), output_tokens_per_s=90.0, baseline_output_tokens_per_s=50.0,
        throughput_speedup=about(1.8), predicted_speedup=1.8, verdict="pass", more_prompts=None, groups=groups, baseline_groups=groups,
    )  # fmt: skip
    return Canary(planner_version="0", plan_sha256="0" * 64, model=NAME, server=NAME, baseline_server=NAME, measure="tpot", min_speedup=1.1, output_len=100,
                  temperature=0.0, seed=1, cells=[cell], passed=True, decided=True, verdict=NAME, notes=[NAME])  # fmt: skip
