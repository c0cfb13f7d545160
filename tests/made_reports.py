"""A document of every kind that a run on a model writes, small and with figures that can be looked up in a report."""

import msgspec
import numpy as np

from planner.canaries import Answer
from planner.exports import Step
from planner.measurements import AcceptanceSample, Environment, Failure, MemorySample, Packed, PrefillSample, Profile, RoundSample, Text
from planner.plans import Check, CheckCell, Estimate, Interval, Plan, Rejected, Sweep, SweepCell, Tie, Trial
from planner.replays import Headroom, Length, ServedDrafter, ServedGroup, ServedReplay, UnitCosts
from planner.schedules import Setting
from planner.specs import PLAIN, DeviceSpec, DraftConfig, DrafterSpec, FullKV, ModelSpec, Sampler, SparseKV, Workload
from planner.tunings import CheckedLoad, Defect, Launch, Run, TunedLoad, Tuning
from planner.units import GIB

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
        by_draft_len=[an_estimate(msgspec.structs.replace(CHOICE, draft_len=k), 0.0531 / x, x) for k, x in ((1, 0.912), (4, 1.402), (12, 1.634))],
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


K3, OFF = Setting(drafter="eagle3", draft_len=3), Setting()


def about(value, share=0.1):
    return Interval(value=value, low=value * (1 - share), high=value * (1 + share))


def made_tuning(**changes):
    answer = Answer(ttft_s=0.1, decode_s=1.0, output_tokens=100, prompt_tokens=50, chunks=40, longest_gap_s=0.02)
    load = TunedLoad(concurrency=4, setting=K3, running_batch=4.0, tpot_s=about(0.01), output_tokens_per_s=about(400.0), gain_over_off=about(0.9),
                     gain_over_yours=about(0.13), next_best=OFF, gain_over_next=about(0.9), best=K3)  # fmt: skip
    checked = [
        CheckedLoad(role=role, setting=setting, concurrency=4, num_answers=8, predicted_tpot_s=predicted, predicted_output_tokens_per_s=predicted and about(400.0),
                    measured_tpot_s=about(0.0123), measured_output_tokens_per_s=about(345.0), gain=gain)
        for role, setting, predicted, gain in (("chosen", K3, about(0.01), None), ("off", OFF, about(0.02), about(0.8)), ("yours", K3, None, about(0.11)))
    ]  # fmt: skip
    fields = {
        "planner_version": "0.1.0", "engine": "vllm", "engine_version": "0.33.0", "method": "eagle3", "draft_model": "D", "model": "M", "system": "a device",
        "objective": "tpot", "context_len": 50, "output_len": 100, "temperature": 0.0, "seed": 1, "minutes": 8.3, "requests": 812,
        "launches": [Launch(drafter="eagle3", ready_s=40.0)],
        "runs": [Run(launch=0, setting=K3, concurrency=4, answers=[answer], prompts=[0], wall_s=2.0, sent=1)],
        "profile": "profile.json", "schedule": "schedule.json",
        "chosen": [Step(batch_from=1, batch_to=8, draft_len=3), Step(batch_from=9, batch_to=16, draft_len=0)], "loads": [load],
        "yours": Setting(drafter="eagle3", draft_len=5), "predicted_gain": about(0.132), "paste": "--speculative-config '" + "x" * 200 + "'", "checked": checked,
        "max_draft_len": 8, "defects": [Defect(name="idle drafter", what="idle costs 12 %", known_as="issue 7")], "cut": ["--cap-minutes 1 was reached"],
    }  # fmt: skip
    return Tuning(**(fields | changes))
