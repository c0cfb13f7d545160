"""What somebody asks of drafters, in the words of the flags. Without imports, so that `planner --help` waits for nothing."""

from typing import NamedTuple


class Asked(NamedTuple):
    """One drafter. None: not said, so that what was profiled decides, or the usual."""

    drafter: str = "none"
    draft_len: int = 0
    draft_model: str | None = None  # path, of a drafter with a checkpoint of its own
    draft_dtype: str | None = None
    drafter_weights: str | None = None
    drafter_vocab: str | None = None  # a number of tokens, or all
    kv_budget: int | None = None
    selection: str | None = None
    sink: int | None = None
    recent: int | None = None
    refresh: int | None = None
    storage: str | None = None
    tree_size: str | None = None  # nodes, or adaptive; None: a chain
    tree_costs: str | None = None  # path


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


class AskedTune(NamedTuple):
    """A tuning. None: not said, so that the engine's command, the dataset or this machine decides."""

    launch: str | None = None  # the command of a server
    base_url: str | None = None  # of one that is there, with its drafter
    baseline_url: str | None = None  # of one that is there, without
    engine: str | None = None  # NAME or NAME@VERSION
    method: str | None = None
    draft_model: str | None = None  # as the engine takes it
    max_draft_len: int = 8
    draft_len: int | None = None  # of a server that is there
    concurrency: tuple[int, int] = (1, 16)
    context_len: int = 512  # that raw text is cut to
    output_len: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    num_texts: int = 16  # at each load, twice the load at least
    repeats: int | None = None  # starts of each setting
    check_texts: int = 16  # 0: the choice is not checked
    cap_requests: int = 5000
    cap_minutes: float = 120.0
    ready_s: float | None = None  # that a start may take
    model: str | None = None  # its size, as sizes.py reads it
    draft_size: str | None = None
    system: str | None = None
    served_model: str | None = None
    keep_repetitive: bool = False


class AskedSimulation(NamedTuple):
    """A simulation. None: not said, so that the trace, the profile or an engine's default decides."""

    trace: str | None = None  # a file, or requests are generated:
    rate: float | None = None  # requests per second; of a trace: what it is rescaled to
    lengths: str | None = None  # IN:OUT,.. or a CSV file
    arrivals: str = "poisson"  # or gamma:CV
    num_requests: int = 1000
    speedup: float | None = None  # of a trace's arrival times
    limit: int | None = None  # first requests of a trace
    also: tuple[str, ...] = ()  # K=3 or NAME:K=3
    drafter: str | None = None
    output_len: int | None = None  # that a schedule is made for
    tensor_parallel: int | None = None
    model: str | None = None  # sizes, for a schedule
    draft_size: str | None = None
    system: str | None = None
    kv_tokens: int | None = None
    prefill_rate: float | None = None  # tokens per second
    spread: float | None = None  # of acceptance between texts
    max_num_seqs: tuple[int, ...] = ()  # several for a study
    max_num_batched_tokens: tuple[int, ...] = ()
    replicas: int = 1
    router: str = "round_robin"
    prefix_caching: bool = True
    num_trials: int | None = None
    storage: str | None = None
    workers: int = 1
