"""FP8 of published folders: matrices in e4m3, and beside each a scale in floats, for every block of it or for the whole.

Sources: transformers integrations/finegrained_fp8.py (names, scales), config.json of DeepSeek-V3 and Qwen3-8B-FP8 (blocks of 128 x 128).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from planner.errors import BadInput
from planner.runtime.fields import MAX_WIDTH, Fields, one_line
from planner.runtime.safetensors_folder import FLOAT_DTYPES, Stored

DTYPE = "F8_E4M3"  # as safetensors spells it
SUFFIXES = ("_scale_inv", "_scale")  # of a scale's name, behind its matrix's
LARGEST = 448.0  # of e4m3
BLOCK = (128, 128)
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}  # quantization_config


def scale_block(config: Fields) -> tuple[int, int] | None:
    """Rows and columns that share a scale in FP8 weights; None for weights that are not quantised, the others are refused."""
    if config.get("quantization_config") is None:
        return None
    given = config.get("quantization_config")
    quantization = Fields(config.source, given if isinstance(given, dict) else {"quant_method": given})
    method = quantization.get("quant_method")
    if method != "fp8":
        raise BadInput(
            f"{config.source}: quantization_config.quant_method {one_line(method)} cannot be run; supported are unquantised safetensors, "
            "fp8 in e4m3, and GGUF files: take one of these, and --weights int8 or int4 to quantise it here"
        )
    quantization.only("fmt", "e4m3")
    quantization.only("activation_scheme", "dynamic")
    match quantization.get("weight_block_size") or [MAX_WIDTH, MAX_WIDTH]:  # without blocks, a scale for the whole tensor
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise quantization.refusal("weight_block_size", "must be two positive integers")


def scales_of(stored: dict[str, Stored], block: tuple[int, int] | None) -> dict[str, str]:
    """The name of every FP8 tensor -> that of its scale, which fits it; none where weights are not quantised."""
    found = {}
    for name, part in stored.items() if block else ():
        if part.dtype != DTYPE:
            continue
        scale = next((name + suffix for suffix in SUFFIXES if name + suffix in stored), None)
        if scale is None:
            raise BadInput(
                f"{part.file}: tensor {one_line(name)} is in FP8 and needs a scale, its name with _scale_inv or _scale; get the folder again"
            )
        if stored[scale].dtype not in FLOAT_DTYPES:
            raise BadInput(f"{stored[scale].file}: tensor {one_line(scale)} must be one of {', '.join(FLOAT_DTYPES)}, got {stored[scale].dtype}")
        shape = stored[scale].shape
        blocks = tuple(-(-size // step) for size, step in zip(part.shape, block))
        if any(size != 1 for size in shape) and (len(part.shape) != 2 or shape != blocks):
            raise BadInput(
                f"{part.file}: the scale of tensor {one_line(name)} must have shape {list(blocks)} or one element, got {one_line(list(shape))}"
            )
        found[name] = scale
    return found


def restored(
    codes: Tensor,  # [out, in]
    scale: Tensor,  # [blocks down, blocks across], or one element
    block: tuple[int, int],
) -> Tensor:
    """[out, in] in float32."""
    return codes.float() * _per_weight(scale.float(), block, codes.shape)


def quantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices in e4m3, a float32 scale for each BLOCK beside them, whose largest weight becomes LARGEST; the rest as it is."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            blocks = F.pad(tensor.float(), (0, -tensor.shape[1] % BLOCK[1], 0, -tensor.shape[0] % BLOCK[0]))
            scale = blocks.unflatten(1, (-1, BLOCK[1])).unflatten(0, (-1, BLOCK[0])).abs().amax((1, 3)).clamp(min=1e-12) / LARGEST
            codes = (tensor.float() / _per_weight(scale, BLOCK, tensor.shape)).to(torch.float8_e4m3fn)
            found |= {name: codes, name + SUFFIXES[0]: scale}
    return found


def _per_weight(scale: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    if scale.numel() == 1:
        return scale.reshape(())
    for dim, (step, size) in enumerate(zip(block, shape)):
        scale = scale.repeat_interleave(min(step, size), dim).narrow(dim, 0, size)
    return scale
