"""A drafter's own layers and the rest of its target's GGUF file as one GGUF file, which llama.cpp loads beside the target.

Tokenizer, embedding and head are copied as they are stored: what the two models share is then the same, bit for bit.

Source: llama.cpp convert_hf_to_gguf.py (names, permutation, norms and biases in float32), gguf-py gguf_new_metadata.py (how keys are copied).
"""

import math
import os
import tempfile
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize
from torch import Tensor

from planner.errors import BadInput, Unfinished
from planner.runtime.gguf_file import read_gguf
from planner.runtime.gguf_model import ROPE_FACTORS, gguf_name, gguf_spec
from planner.runtime.model_spec import Overrides
from planner.runtime.weights import permuted
from planner.specs import ModelSpec

COPIED = ("token_embd.weight", "output.weight", ROPE_FACTORS)
LEFT_OUT = ("GGUF.", "general.architecture", "general.alignment", "general.name", "general.file_type", "general.size_label", "quantize.", "split.")
SAME = ("num_heads", "num_kv_heads", "head_dim", "intermediate_size", "rope_theta", "rms_norm_eps")  # which the target's metadata speak of


def check_same(target: Path, spec: ModelSpec) -> None:
    """BadInput where the metadata of the target's file would not be the drafter's."""
    theirs = gguf_spec(target, read_gguf(target), Overrides())
    for field in SAME:
        if not math.isclose(own := getattr(spec, field), other := getattr(theirs, field), rel_tol=1e-6):
            raise BadInput(f"the drafter has {field} {own}, {target} has {other}; leave --gguf out, or take the GGUF file that it was trained on")


def write_gguf_drafter(path: Path, target: Path, spec: ModelSpec, tensors: dict[str, Tensor]) -> None:
    """tensors  the drafter's own, in float32, by Hugging Face names; Unfinished where the disk does not take the file"""
    read_gguf(target)  # which the library's reader trusts to be whole
    reader = gguf.GGUFReader(target)
    architecture = reader.fields["general.architecture"].contents()
    block_count = f"{architecture}.block_count"
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_name(spec.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_block_count(spec.num_layers)
    for field in reader.fields.values():
        if not field.name.startswith(LEFT_OUT) and field.name != block_count:
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, sub_type=field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        if tensor.name in COPIED:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, tensor in tensors.items():
        if architecture == "llama" and name.endswith(("self_attn.q_proj.weight", "self_attn.k_proj.weight")):
            tensor = permuted(tensor, spec.head_dim)
        kind, values = _stored(tensor.contiguous().numpy())
        writer.add_tensor(gguf_name(name), values, raw_dtype=kind)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".planner-") as folder:
            written = Path(folder) / path.name
            writer.write_header_to_file(written)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            os.replace(written, path)
    except OSError as error:
        raise Unfinished(f"cannot write {path}: {error.strerror or error}; make room on its disk") from None


def _stored(values: np.ndarray) -> tuple[gguf.GGMLQuantizationType, np.ndarray]:
    """Matrices in 8 bits where whole blocks of 32 fit their rows, else in 16; the rest, as llama.cpp wants it, in float32."""
    if values.ndim == 1:
        return gguf.GGMLQuantizationType.F32, values
    if values.shape[1] % 32:
        return gguf.GGMLQuantizationType.F16, values.astype(np.float16)
    return gguf.GGMLQuantizationType.Q8_0, quantize(values, gguf.GGMLQuantizationType.Q8_0)
