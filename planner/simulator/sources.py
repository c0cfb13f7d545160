"""What a simulation asks of an engine, and where the answers are from: measured cells, a schedule's curves, or a plan's one batch."""

from functools import cached_property
from typing import Protocol

import numpy as np
from scipy.optimize import brentq, nnls

from planner.cost.capacity import Settings, kv_pool
from planner.cost.roofline import LIKELY, prefill_s
from planner.cost.serving import ServingModel
from planner.errors import BadInput
from planner.plans import Plan
from planner.schedules import LoadCurve, Schedule
from planner.serving import OFF, ModelSize, ServedCell, ServingProfile, SystemSpec
from planner.simulator.costs import Prefill
from planner.simulator.texts import Acceptance
from planner.specs import describe

SHORT = 64  # tokens of a request that hardly reads a cache
SIZELESS = ("self_sparse", "ngram", "suffix")  # drafters that load nothing and read no prompt of their own
HALVINGS = 10  # to the largest gain that texts can have
USUAL_SPREAD = 0.5  # of acceptance between texts, a logit


class Source(Protocol):
    """An engine with its drafters; off is one of them."""

    model: str
    system: str
    source: str
    tensor_parallel: int
    drafters: list[str]  # off first
    max_draft_len: dict[str, int]
    contexts: list[int]  # that acceptance is known at
    max_batch: int | None  # that times are known of; None: any, by extrapolation
    notes: list[str]  # what was assumed

    def rounds(self, drafter: str, draft_len: int, running: np.ndarray, held: np.ndarray) -> np.ndarray:
        """[n] seconds of a round of so many requests that hold so many tokens each, no prompt being read."""

    def tokens_per_round(self, drafter: str, draft_lens: list[int], context_len: int) -> list[float]: ...

    def prefill(self, drafter: str) -> Prefill | None:
        """None where nothing says."""

    def kv_tokens(self, drafter: str, max_num_seqs: int, max_num_batched_tokens: int) -> int | None:
        """Tokens of a replica's pool; None where nothing says."""


class Sizes:
    """What sizes alone say: room, and a roofline of reading prompts."""

    def __init__(self, target: ModelSize, drafters: dict[str, ModelSize], system: SystemSpec, tensor_parallel: int):
        self.target, self.drafters, self.system, self.tensor_parallel = target, drafters, system, tensor_parallel

    def kv_tokens(self, drafter: str, max_num_seqs: int, max_num_batched_tokens: int) -> int:
        settings = Settings(
            tensor_parallel=self.tensor_parallel, fraction=self.system.fraction, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        )  # fmt: skip
        return kv_pool(self.target, self.drafters.get(drafter), self.system, settings).tokens

    def prefill(self, drafter: str) -> Prefill | None:
        if self.system.bandwidth_bytes_per_s is None or self.system.flops_per_s is None:
            return None
        models = [self.target, *([self.drafters[drafter]] if drafter in self.drafters else [])]
        return Prefill(*(sum(part) for part in zip(*(prefill_s(model, self.system, self.tensor_parallel, LIKELY) for model in models), strict=True)))

    def weights_share(self, drafter: str) -> float:
        """The drafter's weights over the target's; 0 where nothing is known of it."""
        return self.drafters[drafter].weights_bytes / self.target.weights_bytes if drafter in self.drafters else 0.0


class ProfileSource:
    """A serving engine's measured cells."""

    def __init__(self, profile: ServingProfile, model: ServingModel, cells: list[ServedCell]):
        """cells  of the model's degree of tensor parallelism"""
        self._model, self._cells = model, cells
        self.model, self.system, self.source = profile.model.name, profile.system.name, profile.source
        self.tensor_parallel = cells[0].tensor_parallel
        self._sizes = Sizes(profile.model, profile.drafters, profile.system, self.tensor_parallel)
        self.drafters, self.max_draft_len, self.contexts, self.max_batch = model.drafters, model.max_draft_len, model.contexts, None
        measured = max(model.max_concurrency.values())
        self.notes = [
            (
                f"rounds were measured up to a concurrency of {measured} and contexts {self.contexts[0]}..{self.contexts[-1]}: beyond them "
                "they follow the fitted law"
            )
        ]
        if unsized := [name for name in self.drafters[1:] if name not in profile.drafters and name not in SIZELESS]:
            self.notes.append(f"the size of {', '.join(unsized)} is not known: it takes no memory, and no time for prompts")
        if not model.off_measured:
            self.notes.append("off was not measured: it is taken from the cells that draft; measure it without a drafter")

    def rounds(self, drafter: str, draft_len: int, running: np.ndarray, held: np.ndarray) -> np.ndarray:
        return self._model.rounds(drafter, draft_len, running, held)

    def tokens_per_round(self, drafter: str, draft_lens: list[int], context_len: int) -> list[float]:
        return self._model.tokens_per_round(drafter, draft_lens, context_len)

    def kv_tokens(self, drafter: str, max_num_seqs: int, max_num_batched_tokens: int) -> int:
        return int(self._sizes.kv_tokens(drafter, max_num_seqs, max_num_batched_tokens) * self._model.pool_correction(drafter))

    def prefill(self, drafter: str) -> Prefill | None:
        if self._prefill is None:
            return self._sizes.prefill(drafter)
        more = 1 + self._sizes.weights_share(drafter)
        return Prefill(*(more * part for part in self._prefill))

    @cached_property
    def _prefill(self) -> Prefill | None:
        """From the time to the first token of single requests without a drafter, where no other's prompt is in the way."""
        alone = [cell for cell in self._cells if cell.concurrency == 1 and cell.ttft_s is not None and cell.drafter == OFF]
        if not alone:
            self.notes.append(
                "no time to the first token of a single request was measured: prompts take what a roofline says; measure it, or give --prefill-rate"
            )
            return None
        length, ttft_s = np.array([cell.context_len for cell in alone], dtype=float), np.array([cell.ttft_s for cell in alone])
        known = len(set(length))  # as many terms: what a token takes first, what a pair takes, what does not depend on the prompt
        terms = np.stack([length, length * (length + 1) / 2, np.ones_like(length)], axis=1)[:, :known] / ttft_s[:, None]
        scale = terms.max(0)
        token_s, pair_s, first_s = np.pad(nnls(terms / scale, np.ones(len(alone)))[0] / scale, (0, 3 - len(scale)))
        self.notes.append(
            f"prompts take {1e6 * token_s:.3g} us a token and {1e12 * pair_s:.3g} ps a pair of query and key, from the time to the first token of "
            f"{len(alone)} runs of single requests"
            + f"; {1e3 * first_s:.3g} ms of it that do not depend on the prompt are left out"
            * bool(first_s > 0)
        )
        if token_s + pair_s == 0:
            raise BadInput("the time to the first token does not grow with the prompt in this profile; give --prefill-rate")
        return Prefill(token_s, pair_s)


class ScheduleSource:
    """A schedule's curves of off and of the drafters in its rows. Memory and prompts are for sizes or flags to say."""

    def __init__(self, schedule: Schedule, sizes: Sizes | None):
        if not schedule.curves:
            raise BadInput("the schedule holds no curves of round times, as those of earlier versions; plan again, or simulate its profile")
        self._sizes = sizes
        self.model, self.system, self.source, self.tensor_parallel = schedule.model, schedule.system, schedule.source, schedule.tensor_parallel
        self._curves: dict[tuple[str, int], list[LoadCurve]] = {}
        for curve in sorted(schedule.curves, key=lambda curve: curve.context_len):
            self._curves.setdefault((curve.setting.drafter, curve.setting.draft_len), []).append(curve)
        if several := next((key for key, curves in self._curves.items() if len({curve.setting.kv for curve in curves}) > 1), None):
            raise BadInput(f"the schedule runs {several[0]} K={several[1]} with several kv budgets, which one server does not; plan with one of them")
        self.drafters = [OFF, *dict.fromkeys(name for name, _ in self._curves if name != OFF)]
        self.max_draft_len = {name: max(k for drafter, k in self._curves if drafter == name) for name in self.drafters}
        self.contexts = schedule.contexts
        self._output_len = schedule.output_len
        self.max_batch = schedule.concurrency_to
        self.notes = [
            (
                f"rounds are those of the schedule, contexts {self.contexts[0]}..{self.contexts[-1]}, with the prompts of others that were read in them: "
                "a simulation from its profile tells the two apart"
            )
        ]

    def rounds(self, drafter: str, draft_len: int, running: np.ndarray, held: np.ndarray) -> np.ndarray:
        curves = self._curve(drafter, draft_len)
        at = np.array([_over_batch(curve, running, curve.round_s) for curve in curves])  # [contexts, n]
        return _over_context(np.array([curve.context_len + self._output_len / 2 for curve in curves]), at, held)

    def tokens_per_round(self, drafter: str, draft_lens: list[int], context_len: int) -> list[float]:
        found = []
        for draft_len in draft_lens:
            curves = self._curve(drafter, draft_len)
            found.append(
                float(np.interp(context_len, [curve.context_len for curve in curves], [np.mean(curve.tokens_per_round) for curve in curves]))
            )
        return found

    def prefill(self, drafter: str) -> Prefill | None:
        return self._sizes and self._sizes.prefill(drafter)

    def kv_tokens(self, drafter: str, max_num_seqs: int, max_num_batched_tokens: int) -> int | None:
        return self._sizes and self._sizes.kv_tokens(drafter, max_num_seqs, max_num_batched_tokens)

    def running(self, drafter: str, draft_len: int, concurrency: int, context_len: int) -> float:
        """Requests that decode of so many in the system, at the schedule's context that is nearest."""
        curve = min(self._curve(drafter, draft_len), key=lambda curve: abs(curve.context_len - context_len))
        return float(np.interp(concurrency, curve.concurrency, curve.running_batch))

    def _curve(self, drafter: str, draft_len: int) -> list[LoadCurve]:
        if (drafter, draft_len) not in self._curves:
            raise BadInput(f"the schedule says nothing of {drafter} K={draft_len}; simulate its profile instead")
        return self._curves[drafter, draft_len]


class PlanSource:
    """A plan of the own runtime: one batch, one context, off and what was chosen."""

    def __init__(self, plan: Plan):
        best = next((e for e in [plan.estimate, *plan.runners_up] if e.config == (plan.best_speculative or plan.chosen) and e.config.draft_len), None)
        self._estimates = {(OFF, 0): plan.baseline} | ({(best.config.drafter.kind, best.config.draft_len): best} if best else {})
        self.model, self.system, self.source, self.tensor_parallel = plan.model, plan.device, plan.source, plan.tensor_parallel
        self.drafters = list(dict.fromkeys(name for name, _ in self._estimates))
        self.max_draft_len = {name: k for name, k in self._estimates}
        self.contexts = [plan.workload.context_len]
        self.max_batch = plan.workload.batch
        self._prompt = plan.workload.context_len
        whole = plan.workload.context_len + plan.workload.output_len + max(e.config.verified for e in self._estimates.values()) + 1
        self._held = self.max_batch * whole
        self.notes = [
            f"a round takes what the plan says of {self.max_batch} requests at a context of {self._prompt}, however many run and however long they are",
            f"memory holds {self.max_batch} requests of {whole} tokens; --kv-tokens sets another room",
        ]
        if best and best.config.tree is not None:
            self.notes.append(f"rounds of {describe(best.config)} take and write what the plan says, and stand under K={best.config.draft_len}")

    def rounds(self, drafter: str, draft_len: int, running: np.ndarray, held: np.ndarray) -> np.ndarray:
        return np.full(len(running), self._of(drafter, draft_len).round_s.value)

    def tokens_per_round(self, drafter: str, draft_lens: list[int], context_len: int) -> list[float]:
        """What lies below the planned draft_len is interpolated: nothing is drafted with it."""
        k = self.max_draft_len[drafter]
        tokens = self._of(drafter, k).tokens_per_round.value
        accept = _constant_acceptance(tokens, k)
        return [float(sum(accept**i for i in range(draft_len + 1))) for draft_len in draft_lens]

    def prefill(self, drafter: str) -> Prefill:
        return Prefill(self._of(drafter, self.max_draft_len[drafter]).ttft_s.value / self._prompt, 0.0)

    def kv_tokens(self, drafter: str, max_num_seqs: int, max_num_batched_tokens: int) -> int:
        return self._held

    def _of(self, drafter: str, draft_len: int):
        if (drafter, draft_len) not in self._estimates:
            known = ", ".join(f"{name} K={k}" for name, k in self._estimates)
            raise BadInput(f"the plan holds {known}, got {drafter} K={draft_len}; simulate a schedule or a serving profile")
        return self._estimates[drafter, draft_len]


def feasible(tokens: list[float], spread: float) -> tuple[float, ...]:
    """Tokens per round by draft_len 1, 2, .. as near to those as texts can come: none adds more than the one before it, nor takes away."""
    if min(tokens) >= 1 and _drawable(tuple(tokens), spread):
        return tuple(tokens)
    found: tuple[float, ...] = ()
    for asked in tokens:
        before = found[-1] if found else 1.0
        gain = min(1.0, max(0.0, asked - before))
        if not _drawable((*found, before + gain), spread):
            can, cannot = 0.0, gain
            for _ in range(HALVINGS):
                middle = (can + cannot) / 2
                can, cannot = (middle, cannot) if _drawable((*found, before + middle), spread) else (can, middle)
            gain = can
        found = (*found, before + gain)
    return found


def _drawable(tokens: tuple[float, ...], spread: float) -> bool:
    try:
        Acceptance(tokens_per_round=(tokens,), spread=spread)
    except BadInput:
        return False
    return True


def pass_s(source: Source) -> float:
    """The least a pass takes: a step of one short request without a drafter."""
    return float(source.rounds(OFF, 0, np.array([1]), np.array([float(SHORT)]))[0])


def _constant_acceptance(tokens: float, draft_len: int) -> float:
    if tokens >= draft_len + 1 - 1e-9:
        return 1.0
    return float(brentq(lambda accept: sum(accept**i for i in range(draft_len + 1)) - tokens, 0.0, 1.0))


def _over_batch(curve: LoadCurve, running: np.ndarray, values: list[float]) -> np.ndarray:
    """[n] linear in the running batch, which may stay the same over many loads; beyond the largest as far as its last stretch leads."""
    batch, first = np.unique(np.round(curve.running_batch, 6), return_index=True)
    values = np.asarray(values)[first]
    found = np.interp(running, batch, values)
    if len(batch) > 1:
        i = max(0, len(batch) - 1 - max(1, len(batch) // 4))
        slope = max(0.0, (values[-1] - values[i]) / (batch[-1] - batch[i]))
        found = np.where(running > batch[-1], values[-1] + slope * (running - batch[-1]), found)
    return found


def _over_context(contexts: np.ndarray, at: np.ndarray, held: np.ndarray) -> np.ndarray:
    """[n] linear in the length, in which the cache is read; at one context, and beyond them, the nearest two lead on, never below a tenth."""
    if len(contexts) == 1:
        return at[0]
    left = np.clip(np.searchsorted(contexts, held) - 1, 0, len(contexts) - 2)
    n = np.arange(len(held))
    low, high = at[left, n], at[left + 1, n]
    return np.maximum(low + (high - low) * (held - contexts[left]) / (contexts[left + 1] - contexts[left]), 0.1 * at[0])
