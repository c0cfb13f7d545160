"""planner replay: what any drafter, budget and draft_len would have had accepted on traffic that was already served."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import planner
from planner.commands.progress import Progress, Silent
from planner.commands.session import Session, check_drafters, load_drafters, longest_context, open_session
from planner.errors import BadInput
from planner.measurements import MIN_DISTINCT_4GRAMS, AcceptanceSample, fingerprint, load_profile
from planner.plans import Interval
from planner.replays import Costs, Headroom, Length, ProfiledCosts, ServedDrafter, ServedGroup, ServedReplay, ServedText, UnitCosts
from planner.specs import PLAIN, DraftConfig, Execution, Sampler, Weights, checked, describe_sampler

MIN_TEXTS = 4  # below, an interval means nothing; halves of them tune the adaptive rules
MAX_SAMPLERS = 8  # that get a table of their own
IMPOSSIBLE_SHARE = 0.05  # near-ties in bfloat16 reach 2 % of greedy tokens; beyond this it is another model or sampler


def replay(
    model: str,
    log: str | Path,
    *,
    configs: Sequence[DraftConfig],
    num_texts: int = 64,
    default_sampler: Sampler | None = None,
    costs_from: str | Path | float = 0.1,
    dtype: str = "bfloat16",
    device: str | None = None,
    execution: Execution | None = None,
    weights: Weights = "full",
    rope_theta: float | None = None,
    max_context_len: int | None = None,
    seed: int = 0,
    progress: Progress = Silent(),
) -> ServedReplay:
    """Judge every drafter along lines of a log (profiler/served.py says what a line holds), at every draft_len up to its own.

    num_texts        lines to draw, with the seed
    default_sampler  fills what lines do not say about theirs
    costs_from       a profile of this model, for seconds; or what a drafted token costs in plain steps
    """
    from planner.profiler.served import read_log

    served = read_log(log, default_sampler)
    session = open_session(
        model, dtype=dtype, device=device, execution=execution, weights=weights, rope_theta=rope_theta, max_context_len=max_context_len
    )
    return run_replay(model, session, served, configs=configs, num_texts=num_texts, costs_from=costs_from, seed=seed, progress=progress)


def run_replay(
    model: str,
    session: Session,
    log: "Log",  # noqa: F821  planner.profiler.served
    *,
    configs: Sequence[DraftConfig],
    num_texts: int,
    costs_from: str | Path | float,
    seed: int,
    progress: Progress,
) -> ServedReplay:
    """The same with a model that is already loaded."""
    from planner.profiler.device import describe_device, read_environment
    from planner.profiler.served import draw_lines
    from planner.runtime.weights import dtype_name

    began = time.perf_counter()
    runner = session.model
    configs = list(dict.fromkeys(checked(config) for config in configs if config.draft_len > 0))
    lengths = {config.draft_len for config in configs}
    if len(lengths) != 1 or not 1 <= max(lengths) <= 64:
        raise BadInput(
            f"a replay needs drafters of one longest draft_len in 1..64, got {sorted(lengths) or 'none'}; give --drafters, --max-draft-len"
        )
    if num_texts < MIN_TEXTS:
        raise BadInput(f"an interval needs at least {MIN_TEXTS} lines, got {num_texts}; raise --texts")
    drafters = [config.drafter for config in configs]
    load_drafters(session, drafters)
    round_costs = _costs(costs_from, configs, session)
    environment = read_environment(runner.device)
    spec = runner.spec
    found = draw_lines(
        log, session.tokenizer, count=num_texts, seed=seed, vocab_size=spec.vocab_size, max_context_len=longest_context(session, drafters)
    )  # fmt: skip
    if len(found.lines) < MIN_TEXTS:
        reasons = "; ".join(f"{count} {reason}" for reason, count in found.skipped.items())
        raise BadInput(
            f"an interval needs at least {MIN_TEXTS} lines, {log.name} holds {len(found.lines)} that can be replayed{reasons and f' ({reasons})'}"
        )
    texts, samples = [], []
    progress.stage("replay", len(found.lines) * len(configs))
    for line in found.lines:
        text, own = _replayed(runner, line, configs, len(texts), progress)
        texts.append(text)
        samples += own
    groups, grouping = _groups(texts, samples, configs, round_costs, progress)
    return ServedReplay(
        planner_version=planner.__version__,
        log=log.source,
        num_lines=len(log.records),
        skipped=found.skipped,
        model=model,
        target_fingerprint=runner.fingerprint,
        dtype=dtype_name(runner.dtype),
        execution_mode=runner.kernels.execution,
        weights=session.weights,
        device=describe_device(runner.device).name,
        environment=environment,
        seed=seed,
        costs=round_costs.costs,
        max_draft_len=max(lengths),
        groups=groups,
        texts=texts,
        acceptance=samples,
        minutes=(time.perf_counter() - began) / 60,
        warnings=session.warnings + _doubts(groups, texts) + grouping + round_costs.doubts(texts),
    )  # fmt: skip


def _replayed(runner, line, configs: list[DraftConfig], index: int, progress: Progress) -> tuple[ServedText, list[AcceptanceSample]]:
    """One line judged, and every drafter along it."""
    import torch

    from planner.profiler.acceptance import judge, replay
    from planner.profiler.texts import distinct_4grams
    from planner.runtime.model import prefill
    from planner.runtime.sampling import probability_of

    cache = runner.new_cache(len(line.prompt) + len(line.output))
    first_logits = prefill(runner, torch.tensor([line.prompt], device=runner.device), cache)
    first = probability_of(first_logits, torch.tensor(line.output[:1], device=runner.device), line.sampler)
    target_text, own_probs = judge(runner, cache, line.prompt, line.output, line.sampler)
    text = ServedText(
        line=line.number, context_len=len(line.prompt), output_len=len(line.output), sampler=line.sampler,
        distinct_4grams=distinct_4grams(line.output), impossible=int((torch.cat([first, own_probs]) == 0).sum()),
    )  # fmt: skip
    samples = []
    for config in configs:
        samples.append(replay(runner, target_text, config, index))
        progress.advance()
    return text, samples


# ---- what a round costs


class _Costs(NamedTuple):
    costs: Costs
    latency: object | None = None  # planner.cost.latency.LatencyModel; without it, units
    contexts: tuple[int, ...] = ()  # that the profile timed

    def round_cost(self, config: DraftConfig, text: ServedText) -> np.ndarray:
        """[draft_len + 1] of a round by what it drafts, in the middle of the output."""
        if isinstance(self.costs, UnitCosts):
            return 1 + self.costs.draft_cost * np.arange(config.draft_len + 1)
        return self.latency.round_s(config, text.context_len, text.context_len + text.output_len / 2)[0]

    def doubts(self, texts: list[ServedText]) -> list[str]:
        from planner.cost.acceptance import CONTEXT_SLACK

        if not self.contexts:
            return []
        low, high = min(self.contexts) * (1 - CONTEXT_SLACK), max(self.contexts) * (1 + CONTEXT_SLACK)
        outside = sum(not low <= text.context_len <= high for text in texts)
        known = ", ".join(map(str, self.contexts))
        warning = f"{outside} of {len(texts)} lines have prompts outside the profiled contexts ({known}): their round times are extrapolated; profile with --contexts around them"
        return [warning] * (outside > 0)


def _costs(costs_from: str | Path | float, configs: list[DraftConfig], session: Session) -> _Costs:
    """Refuses, before anything runs, a profile that did not time these drafters on this model."""
    if isinstance(costs_from, int | float):
        return _Costs(checked(UnitCosts(draft_cost=float(costs_from))))
    from planner.cost.latency import fit_latency

    profile, target_fingerprint = load_profile(costs_from), session.model.fingerprint
    if profile.target_fingerprint != target_fingerprint:
        raise BadInput(
            f"round times come from a profile of the same model ({target_fingerprint}), {costs_from} is of {profile.target_fingerprint}; profile this model"
        )
    drafters = [config.drafter for config in configs]
    check_drafters(session, [own for own in profile.drafter_models if own.drafter in drafters])
    latency = fit_latency(profile)
    for config in [PLAIN, *configs]:
        latency.round_s(config, profile.contexts[0], profile.contexts[0])
    return _Costs(ProfiledCosts(profile_sha256=fingerprint(costs_from)), latency, tuple(profile.contexts))


# ---- summing up


def _groups(
    texts: list[ServedText], samples: list[AcceptanceSample], configs: list[DraftConfig], costs: _Costs, progress: Progress
) -> tuple[list[ServedGroup], list[str]]:
    """The whole log, and each sampler that has enough lines where there are several; and what was left out of that."""
    by_sampler: dict[Sampler, list[int]] = {}
    for index, text in enumerate(texts):
        by_sampler.setdefault(text.sampler, []).append(index)
    known = sorted(by_sampler, key=lambda sampler: -sum(texts[i].output_len for i in by_sampler[sampler]))
    shown = [sampler for sampler in known if len(by_sampler[sampler]) >= MIN_TEXTS][:MAX_SAMPLERS] if len(known) > 1 else []
    members = [(known, list(range(len(texts)))), *(([sampler], by_sampler[sampler]) for sampler in shown)]
    progress.stage("rounds", len(texts))
    per_drafter = _walked(texts, samples, configs, costs, progress)
    plain = np.array([costs.round_cost(PLAIN, text)[0] for text in texts])
    progress.stage("headroom", len(members) * len(configs))
    groups = []
    for samplers, rows in members:
        rows = np.array(rows)
        drafters = []
        for config, walked in zip(configs, per_drafter, strict=True):
            drafters.append(_drafter(config, walked, plain, rows))
            progress.advance()
        starts = np.array([texts[i].output_len - 1 for i in rows])
        group = ServedGroup(
            samplers=samplers, num_texts=len(rows), num_tokens=sum(texts[i].output_len for i in rows),
            impossible=sum(texts[i].impossible for i in rows), plain_cost=float((plain[rows] * starts).sum() / starts.sum()), drafters=drafters,
            best=int(np.argmin([drafter.headroom.fixed.value for drafter in drafters])),
        )  # fmt: skip
        groups.append(group)
    left_out = len(known) - len(shown)
    warning = f"{left_out} of {len(known)} samplers have fewer than {MIN_TEXTS} lines or are not among the {MAX_SAMPLERS} with most tokens: they count in the whole log only"
    return groups, [warning] * (len(known) > 1 and left_out > 0)


class _Walked(NamedTuple):
    """One drafter along all texts. starts: tokens behind the first, which decoding has to pay for."""

    accept_prob: list[np.ndarray]  # [starts, K] of each text
    drafted: list[np.ndarray]  # [starts]
    starts: np.ndarray  # [N]
    by_drafted: list[np.ndarray]  # of draft_len 1..K: [N, draft_len + 1] expected rounds
    round_cost: np.ndarray  # [N, K+1]


def _walked(texts: list[ServedText], samples: list[AcceptanceSample], configs: list[DraftConfig], costs: _Costs, progress: Progress) -> list[_Walked]:
    """Of every drafter; those of one text are walked together, which takes hardly longer than one of them."""
    from planner.cost.renewal import expected_rounds

    K = configs[0].draft_len
    accept_prob = [[] for _ in configs]
    drafted = [[] for _ in configs]
    by_drafted = [[[] for _ in range(K)] for _ in configs]
    for index in range(len(texts)):
        own = samples[index * len(configs) : (index + 1) * len(configs)]
        w = np.stack([sample.accept_prob.unpack() / 255.0 for sample in own])
        d = np.stack([sample.drafted.unpack().astype(np.int64) for sample in own])
        for k in range(1, K + 1):
            for number, rounds in enumerate(expected_rounds(w, d, k).by_drafted):
                by_drafted[number][k - 1].append(rounds)
        for number in range(len(configs)):
            accept_prob[number].append(w[number])
            drafted[number].append(d[number])
        progress.advance()
    starts = np.array([text.output_len - 1 for text in texts])
    return [
        _Walked(accept_prob[n], drafted[n], starts, list(map(np.stack, by_drafted[n])), np.stack([costs.round_cost(config, text) for text in texts]))
        for n, config in enumerate(configs)
    ]


def _drafter(config: DraftConfig, walked: _Walked, plain: np.ndarray, rows: np.ndarray) -> ServedDrafter:
    from planner.cost.headroom import align, best_adaptive, oracle_cost
    from planner.search.compare import mean_interval

    starts, round_cost = walked.starts[rows].astype(float), walked.round_cost[rows]
    lengths, by_length = [], {0: plain[rows] * starts}
    for k, by_drafted in enumerate(walked.by_drafted, 1):
        rounds = by_drafted[rows].sum(1)
        drafted = by_drafted[rows] @ np.arange(k + 1)
        by_length[k] = (by_drafted[rows] * round_cost[:, : k + 1]).sum(1)
        per_token = _ratio(rounds, starts, 1 / (k + 1), 1.0)
        length = Length(
            draft_len=k,
            tokens_per_round=Interval(value=1 / per_token.value, low=1 / per_token.high, high=1 / per_token.low),
            acceptance_rate=_ratio(starts - rounds, drafted, 0.0, 1.0) if drafted.sum() > 0 else None,
            cost=_ratio(by_length[k], starts),
        )
        lengths.append(length)
    best = min(by_length, key=lambda k: by_length[k].sum())
    fixed = by_length[best]
    texts = align([walked.accept_prob[i] for i in rows], [walked.drafted[i] for i in rows])
    adaptive = best_adaptive(texts, round_cost)
    unloaded = np.minimum(round_cost[:, 0], plain[rows])  # the oracle can do without the drafter altogether
    oracle = oracle_cost(texts, np.column_stack([unloaded, round_cost[:, 1:]]))

    def over_fixed(cost: np.ndarray) -> Interval:
        ratio = cost.sum() / fixed.sum()
        linear = ratio - 1 + (cost - ratio * fixed) * len(rows) / fixed.sum()
        return mean_interval(list(np.round(linear, 12) + 0.0))  # the same rule by two recursions differs by rounding; and no -0.0

    headroom = Headroom(
        draft_len=best, fixed=_ratio(fixed, starts), rule=adaptive.name, adaptive=_ratio(adaptive.cost, starts),
        adaptive_over_fixed=over_fixed(adaptive.cost), oracle=_ratio(oracle, starts), oracle_over_fixed=over_fixed(oracle),
    )  # fmt: skip
    return ServedDrafter(drafter=config.drafter, kv=config.kv, lengths=lengths, headroom=headroom)


def _ratio(above: np.ndarray, below: np.ndarray, least: float = 0.0, most: float = np.inf) -> Interval:
    """sum(above) / sum(below) over lines, with Student's interval of its linearisation, cut to where it can lie."""
    from planner.search.compare import mean_interval

    ratio = float(above.sum() / below.sum())
    found = mean_interval(list(ratio + (above - ratio * below) * len(below) / below.sum()))
    return Interval(value=ratio, low=min(ratio, max(least, found.low)), high=max(ratio, min(most, found.high)))


def _doubts(groups: list[ServedGroup], texts: list[ServedText]) -> list[str]:
    found = []
    for group in groups[1:] or groups:
        share = group.impossible / group.num_tokens
        if share > IMPOSSIBLE_SHARE:
            found.append(
                f"{share:.0%} of the tokens written at {describe_sampler(group.samplers[0])} could not have been: the log does not seem to be of "
                "this model and sampler, or its text was tokenised otherwise; log token ids, and check --model, --weights and --dtype"
            )
    repetitive = sum(text.distinct_4grams < MIN_DISTINCT_4GRAMS for text in texts)
    if repetitive:
        found.append(
            f"{repetitive} of {len(texts)} outputs repeat themselves (distinct 4-grams below {MIN_DISTINCT_4GRAMS}); if they are typical, so is their acceptance"
        )
    return found
