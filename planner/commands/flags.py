"""What somebody asks of drafters, in the words of the flags. Without imports, so that `planner --help` waits for nothing."""

from typing import NamedTuple


class Asked(NamedTuple):
    """One drafter. None: not said, so that what was profiled decides, or the usual."""

    drafter: str = "none"
    draft_len: int = 0
    draft_model: str | None = None  # path, of draft_model and eagle3
    draft_dtype: str | None = None
    drafter_weights: str | None = None
    drafter_vocab: int | None = None
    kv_budget: int | None = None
    selection: str | None = None
    sink: int | None = None
    recent: int | None = None
    refresh: int | None = None
    storage: str | None = None


class AskedGrid(NamedTuple):
    """Every combination of several, lists separated by commas."""

    drafters: str = "self_sparse,ngram"
    draft_model: list[str] = []
    draft_dtype: str | None = None
    drafter_weights: str | None = None
    drafter_vocabs: str = "all"
    kv_budgets: str = "64,128,256,512,1024"
    selections: str = "window,chunk"
    sink: int = 4
    recent: int = 32
    refresh: int | None = None
    storage: str | None = None


class AskedExport(NamedTuple):
    """What a server is to load and to bear, beside what the plan says. None: as the plan or the profile has it."""

    model: str | None = None
    drafter: str | None = None  # name in the plan's deployments
    method: str | None = None
    draft_model: str | None = None
    context_len: int | None = None
    max_concurrency: int | None = None
    memory_cap_bytes: int | None = None
    system: str | None = None
    kv_dtype: str | None = None
    draft_kv_dtype: str | None = None
    temperature: float | None = None
