"""What a profile is to measure, checked against the model; and the cells that follow from it."""

from typing import NamedTuple

from msgspec.structs import replace

from planner.commands.configs import kv_choices
from planner.commands.session import Session, check_length, load_drafters, usual_weights
from planner.errors import BadInput
from planner.specs import PLAIN, TREELESS, DraftConfig, DrafterSpec, FixedTree, KVPolicy, Sampler, SparseKV, checked, selection_of

SMALL_TREES = (1, 2, 4)
MIN_TEXTS = 4  # kept whatever --max-minutes says: below, an interval means nothing


class Settings(NamedTuple):
    """What to measure. Lengths in tokens."""

    contexts: list[int]
    samplers: list[Sampler]
    policies: list[SparseKV]
    drafters: list[DrafterSpec] | None = None  # None: self_sparse, in int8 on a CPU and with the target's weights elsewhere, and ngram
    max_draft_len: int = 8
    num_texts: int = 16
    output_len: int = 128
    seed: int = 0
    max_minutes: float | None = None
    batches: list[int] = [1]  # streams side by side, to time rounds at; texts are written and replayed once for all
    tree_sizes: list[int] = []  # nodes of draft trees to time; replayed up to the largest
    tree_levels: list[int] | None = None  # of those; None: max_draft_len, its half and so on down to 2


def checked_settings(settings: Settings, session: Session) -> Settings:
    from planner.runtime.drafters import drafting_model

    drafters = settings.drafters
    if drafters is None:
        drafters = [DrafterSpec(kind="self_sparse", weights=usual_weights(str(session.model.device))), DrafterSpec(kind="ngram")]
    drafters = list(dict.fromkeys(drafter for drafter in drafters if drafter.kind != "none"))
    load_drafters(session, drafters)
    for drafter in drafters:
        if drafter.kind != "ngram":
            drafting_model(drafter, session.model)  # refuses what the model cannot be made into; and before anything is timed
        if drafter.kind == "self_sparse" and not settings.policies:
            raise BadInput("drafter self_sparse needs a kv budget, got none; give --kv-budgets or leave it out of --drafters")
    for context_len in settings.contexts:
        if context_len < 1:
            raise BadInput(f"a context has at least one token, got {context_len}; change --contexts")
        check_length(session, drafters, context_len, settings.output_len)
    longest = max(settings.contexts) + settings.output_len
    least = min((policy.budget for policy in settings.policies), default=0)
    if least >= longest:
        raise BadInput(
            f"a kv budget must leave something out of {longest} tokens, the longest context and its output, got {least}; lower --kv-budgets"
        )
    if settings.num_texts < MIN_TEXTS:
        raise BadInput(f"an interval needs at least {MIN_TEXTS} texts, got {settings.num_texts}; raise --texts")
    if settings.output_len < 16:
        raise BadInput(f"a text needs at least 16 tokens, got {settings.output_len}; raise --output-len")
    if not 1 <= (K := settings.max_draft_len) <= 64:
        raise BadInput(f"max_draft_len must lie in 1..64, got {K}")
    if not settings.batches or min(settings.batches) < 1:
        raise BadInput(f"a batch counts streams and must be at least 1, got {settings.batches}; give --batches 1,4,8")
    if settings.max_minutes is not None and not settings.max_minutes > 0:
        raise BadInput(f"--max-minutes must be positive, got {settings.max_minutes:g}")
    levels = settings.tree_levels
    if levels is None:
        levels = sorted({max(min(2, K), K >> halvings) for halvings in range(7)})
    if not settings.tree_sizes and settings.tree_levels is not None:
        raise BadInput(f"--tree-levels goes with --tree-sizes, got {settings.tree_levels} and no sizes; give both or drop it")
    if not all(1 <= level <= K for level in levels):
        raise BadInput(
            f"a tree has from 1 to --max-draft-len ({K}) levels, got --tree-levels {','.join(map(str, levels))}; raise the one or lower the other"
        )
    if settings.tree_sizes and all(drafter.kind in TREELESS for drafter in drafters):
        raise BadInput("a tree is made of a drafter's probabilities, got --tree-sizes without a drafter that has some; drop it, or add one")
    return settings._replace(
        drafters=drafters,
        tree_levels=sorted(set(levels)) if settings.tree_sizes else None,
        contexts=sorted(set(settings.contexts)),
        batches=sorted(set(settings.batches)),
        samplers=[checked(sampler) for sampler in settings.samplers],
        policies=[checked(policy) for policy in settings.policies],
    )


def drafts(settings: Settings) -> list[DraftConfig]:
    """The drafters and policies to replay, each at the longest draft_len."""
    return [
        DraftConfig(drafter=drafter, kv=kv, draft_len=settings.max_draft_len)
        for drafter in settings.drafters
        for kv in kv_choices(drafter, settings.policies)
    ]


def latency_cells(settings: Settings, batch: int = 1) -> list[DraftConfig]:
    """Where rounds are timed: plain; the smallest cache at several widths, the largest at fewer; n-gram at the widest.

    Policies of one budget run the same kernels on caches of the same size, so one selection stands for all; the others are
    timed once, for what choosing takes. None is timed with a refresh, which a few rounds may or may not meet: it costs a
    choice every so many tokens. Verifying is the same for every drafter, so those after the first are timed at three
    places. A batch above 1 does without K = 2: its cells take longer, and there may be many batches.
    """
    K = settings.max_draft_len
    middle = (K + 1) // 2
    cells = [PLAIN, *(DraftConfig(drafter=drafter, draft_len=K) for drafter in settings.drafters if drafter.kind == "ngram")]
    by_read = {
        drafter: sorted(map(_unrefreshed, kv_choices(drafter, settings.policies)), key=lambda kv: kv.read(max(settings.contexts)))
        for drafter in settings.drafters
        if drafter.kind not in ("none", "ngram")
    }
    for number, (drafter, kvs) in enumerate((drafter, kvs) for drafter, kvs in by_read.items() if kvs):
        smallest, largest = kvs[0], kvs[-1]
        at_smallest = sorted({1, middle, K} | ({min(2, K)} if batch == 1 else set())) if number == 0 else sorted({1, middle})
        at_largest = sorted({1, middle, K}) if number == 0 else [K]
        cells += [DraftConfig(drafter=drafter, kv=smallest, draft_len=k) for k in at_smallest]
        if number or largest != smallest:
            cells += [DraftConfig(drafter=drafter, kv=largest, draft_len=k) for k in at_largest]
        by_selection = {selection_of(kv): kv for kv in reversed(kvs)} if batch == min(settings.batches) else {}
        others = by_selection.keys() - {selection_of(kv) for kv in (smallest, largest)}
        cells += [DraftConfig(drafter=drafter, kv=kv, draft_len=1) for selection, kv in by_selection.items() if selection in others]
    return list(dict.fromkeys([*cells, *_tree_cells(settings, batch)]))


def _tree_cells(settings: Settings, batch: int) -> list[DraftConfig]:
    """Trees with the smallest cache at the most levels: what other caches and lengths change is the draft's, which the chains' cells tell.

    Small ones come along, at the first batch: adaptive trees are often small, and passes over few tokens have kernels of their own.
    """
    if not settings.tree_sizes:
        return []
    sizes = {*settings.tree_sizes, *(SMALL_TREES if batch == min(settings.batches) else ())}
    cells = []
    for drafter in settings.drafters:
        if drafter.kind not in TREELESS:
            kv = min(map(_unrefreshed, kv_choices(drafter, settings.policies)), key=lambda kv: kv.read(max(settings.contexts)))
            chain = DraftConfig(drafter=drafter, kv=kv, draft_len=max(settings.tree_levels))
            cells += [replace(chain, tree=FixedTree(size=size)) for size in sorted(sizes) if size <= max(settings.tree_sizes)]
    return cells


def _unrefreshed(kv: KVPolicy) -> KVPolicy:
    return replace(kv, refresh=None) if isinstance(kv, SparseKV) else kv
