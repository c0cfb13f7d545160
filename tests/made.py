"""A small but complete Profile whose acceptance and latency are chosen, so that what is computed from it is known."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tiny import tiny_spec

from planner.measurements import (
    AcceptanceSample,
    DrafterModel,
    EnergySample,
    Environment,
    MemorySample,
    Packed,
    PrefillSample,
    Profile,
    RoundSample,
    Text,
)
from planner.specs import LOADED, NO_DRAFTER, DeviceSpec, DrafterSpec, FullKV, KVPolicy, Sampler, SparseKV

SELF_SPARSE, NGRAM = DrafterSpec(kind="self_sparse"), DrafterSpec(kind="ngram")
DRAFT_MODEL = DrafterSpec(kind="draft_model", path="folders/a small one")
GREEDY, WARM = Sampler(), Sampler(temperature=1.0)
FIFTH = 51 / 255  # multiples of it survive storage as round(255 p) exactly


def budgets(*sizes: int) -> list[tuple[DrafterSpec, KVPolicy]]:
    """Self-sparse drafting with windows of these sizes."""
    return [(SELF_SPARSE, SparseKV(budget=size)) for size in sizes]


def linear_round_s(kv: KVPolicy, draft_len: int, context_len: int) -> tuple[float, float, float]:
    """Seconds of draft, verify and commit: a weight-bound device on which long contexts cost a little."""
    draft_s = draft_len * (4e-3 + 1e-6 * kv.read(context_len)) if isinstance(kv, SparseKV) else 1e-4 * (draft_len > 0)
    return draft_s, 10e-3 + 1e-3 * draft_len + 1e-6 * context_len, 1e-4


def made_profile(
    *,
    accept: Callable[[KVPolicy, int, int], float | np.ndarray] = lambda kv, context_len, number: 4 * FIFTH,  # -> scalar or [starts, max_draft_len]
    round_s: Callable[[KVPolicy, int, int], tuple[float, float, float]] = linear_round_s,  # (kv, draft_len, context_len) -> draft, verify, commit
    batches: Mapping[int, Callable] | None = None,  # batch -> its round_s; default: a batch of one with `round_s`
    drafters: Sequence[tuple[DrafterSpec, KVPolicy]] = tuple(budgets(64, 256)),
    contexts: Sequence[int] = (1024, 4096),
    samplers: Sequence[Sampler] = (GREEDY,),
    texts_per_cell: int = 4,  # texts for each context and sampler
    output_len: int = 33,
    max_draft_len: int = 4,
    draft_lens: Sequence[int] = (1, 4),  # timed
    rounds_per_cell: int = 6,
    noise: float = 0.0,  # relative standard deviation of the timings
    noise_seed: int = 0,
    distinct_4grams: float = 1.0,
    watts: Callable[[DrafterSpec, int, int, int], float] | None = None,  # (drafter, draft_len, context_len, batch); None: no energy was counted
    **changes,  # any field of Profile
) -> Profile:
    """The texts of a context and sampler are numbered 0, 1, .. for `accept`; every text is replayed with every drafter."""
    rng = np.random.default_rng(noise_seed)
    laws = batches or {1: round_s}
    starts = output_len - 1

    def times(seconds: float) -> list[float]:
        return [max(0.0, seconds * (1 + noise * rng.standard_normal())) for _ in range(rounds_per_cell)]

    def timed(drafter: DrafterSpec, kv: KVPolicy, draft_len: int, context_len: int, batch: int, role: str = "cell") -> RoundSample:
        draft_s, verify_s, commit_s = laws[batch](kv, draft_len, context_len)
        return RoundSample(
            drafter=drafter, kv=kv, draft_len=draft_len, context_len=context_len, batch=batch, role=role,
            position=[context_len + i * (draft_len + 1) for i in range(rounds_per_cell)], drafted=[draft_len] * rounds_per_cell,
            draft_s=times(draft_s), verify_s=times(verify_s), commit_s=times(commit_s), warmup_s=[2 * (draft_s + verify_s + commit_s)],
            start_s=times(1e-3)[:3],
        )  # fmt: skip

    texts, acceptance = [], []
    for context_len in contexts:
        for sampler in samplers:
            for number in range(texts_per_cell):
                for drafter, kv in drafters:
                    prob = np.broadcast_to(accept(kv, context_len, number), (starts, max_draft_len))
                    acceptance.append(
                        AcceptanceSample(
                            text=len(texts), drafter=drafter, kv=kv, accept_prob=Packed.pack((prob * 255).round()),
                            drafted=Packed.pack(np.full(starts, max_draft_len)),
                        )
                    )  # fmt: skip
                texts.append(
                    Text(
                        kind="prose", source="made.txt", offset=len(texts) * 10_000, extent=context_len, context_len=context_len, sampler=sampler,
                        output_len=output_len, distinct_4grams=distinct_4grams,
                    )
                )  # fmt: skip
    rounds = []
    for batch in laws:
        rounds += [timed(NO_DRAFTER, FullKV(), 0, context_len, batch) for context_len in contexts]
        rounds += [timed(drafter, kv, k, context_len, batch) for context_len in contexts for drafter, kv in drafters for k in draft_lens]
    energy = [
        EnergySample(
            drafter=r.drafter, kv=r.kv, draft_len=r.draft_len, context_len=r.context_len, batch=r.batch, rounds=20, seconds=float(20 * r.round_s.mean()),
            joules=float(20 * r.round_s.mean()) * watts(r.drafter, r.draft_len, r.context_len, r.batch),
        )
        for r in (rounds if watts else [])
    ]  # fmt: skip
    rounds.append(timed(NO_DRAFTER, FullKV(), 0, contexts[0], min(laws), role="drift"))
    spec = tiny_spec()
    small = tiny_spec(num_layers=1)
    own = [drafter for drafter in dict.fromkeys(drafter for drafter, _ in drafters) if drafter.kind in LOADED]
    fields = dict(  # noqa: C408 - keywords read better
        model="tiny", target=spec, target_fingerprint="0" * 16, weights_bytes=spec.num_parameters * 4, dtype="float32", execution_mode="eager",
        device=DeviceSpec(kind="cpu", name="made", memory_bytes=8 * 2**30, num_cores=2),
        environment=Environment(
            date="2026-01-01T00:00:00Z", planner_version="0.1.0", python="3.11", torch="2.9", platform="Linux", num_threads=2, busy_share=0.0,
            load_1min=0.1,
        ),
        drafter_models=[
            DrafterModel(drafter=drafter, spec=small, fingerprint="1" * 16, weights_bytes=small.num_parameters * 4, dtype=drafter.dtype or "float32")
            for drafter in own
        ],
        seed=0, contexts=list(contexts), samplers=list(samplers), max_draft_len=max_draft_len, texts=texts, acceptance=acceptance, rounds=rounds,
        prefill=[PrefillSample(context_len=context_len, seconds=[1e-4 * context_len] * 3) for context_len in contexts],
        memory=[MemorySample(context_len=context_len, known_bytes=2**20,
            peak_bytes=2**20 + 1000 * context_len, base_bytes=2**16) for context_len in contexts],
        energy=energy, energy_source="made" if energy else None, minutes={"acceptance": 1.0, "latency": 1.0},
    )  # fmt: skip
    return Profile(**(fields | changes))
