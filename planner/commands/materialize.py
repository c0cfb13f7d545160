"""planner train materialize: ordinary checkpoints of a drafter whose own layers alone are kept. Needs the extra [runtime]."""

import os
from pathlib import Path

import msgspec

from planner.commands.session import locate
from planner.errors import BadInput
from planner.files import check_writable, write_whole
from planner.runtime.fields import read_json
from planner.trained import own_layers_path, read_header

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MARK = "specplan_own_layers"  # in config.json: the fingerprint of the layers that the folder was made of


def materialize(drafter: str, out: str | Path, *, model: str = "smollm2", gguf: str | Path | None = None, dtype: str = "bfloat16") -> list[str]:
    """Write the drafter as a Hugging Face folder, and as a GGUF file where one is named; the files written.

    drafter  a file of own layers, or the name of a drafter that comes with the package
    model    the target that it was cut from, which has its embedding, head and tokenizer
    """
    target, torch_dtype = locate(model, dtype)
    import torch
    from safetensors.torch import save

    from planner.runtime import folder_files, gguf_drafter, own_layers
    from planner.runtime.tokenizer import load_tokenizer
    from planner.runtime.weights import finite, load_checkpoint, read_spec

    file, cpu = own_layers_path(drafter), torch.device("cpu")
    header = read_header(file)
    own_layers.check_target(file, header, read_spec(target))
    tokenizer = load_tokenizer(target)
    mark = own_layers.own_fingerprint(file, header)
    config = folder_files.config_values(header.spec, dtype, tokenizer) | {MARK: mark}
    if gguf is not None:
        if target.is_dir():
            raise BadInput(
                f"a GGUF file is made from the target's, {target} is a folder; drop --gguf and convert what is written to {out} with llama.cpp's "
                "convert_hf_to_gguf.py"
            )
        gguf_drafter.check_same(target, header.spec)
        check_writable(gguf)
    own = own_layers.own_tensors(file, header, torch.float32, cpu)
    shared = load_checkpoint(target, torch_dtype, cpu, only=own_layers.SHARED).tensors

    folder = _opened(Path(out))
    files = {CONFIG: msgspec.json.format(msgspec.json.encode(config))}
    files |= folder_files.tokenizer_files(target, tokenizer, header.spec.max_context_len)
    files[WEIGHTS] = save(
        {name: finite(file, name, tensor.to(torch_dtype)).contiguous() for name, tensor in (shared | own).items()}, {"format": "pt"}
    )
    for name in {*folder_files.TOKENIZER_FILES} - {*files}:
        (folder / name).unlink(missing_ok=True)  # of another target
    for name, content in files.items():
        write_whole(folder / name, content)
    written = [str(folder / name) for name in files]
    if gguf is not None:
        gguf_drafter.write_gguf_drafter(Path(gguf), target, header.spec, own)
        written.append(str(gguf))
    return written


def _opened(folder: Path) -> Path:
    """The folder, empty or with an earlier drafter in it; BadInput for what holds anything else."""
    try:
        folder.mkdir(exist_ok=True)
        if any(folder.iterdir()) and not _ours(folder / CONFIG):
            raise BadInput(
                f"{folder} holds other files, and no drafter that `planner train materialize` has written; give an empty folder with --out"
            )
        if not os.access(folder, os.W_OK):
            raise BadInput(f"cannot write into {folder}; change --out")
    except OSError as error:
        raise BadInput(f"cannot make the folder {folder}: {error.strerror or error}; change --out") from None
    return folder


def _ours(config: Path) -> bool:
    try:
        values = read_json(config)
    except BadInput:
        return False
    return isinstance(values, dict) and MARK in values
