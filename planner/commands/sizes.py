"""Sizes of models and devices from what a user writes: a checkpoint's config, a device's name, or name=value pairs. Needs no torch.

    meta-llama/Llama-3.1-8B/         a folder with config.json, or the config.json itself; behind it ,weights_gib=15.0 where no weights lie
    SmolLM2-135M-Instruct.gguf       a GGUF file
    drafter.safetensors              a drafter's own layers, or the name of one that comes with the package: as its checkpoint will be
    num_layers=32,num_kv_heads=8,head_dim=128,weights_gib=14.96
    h100_sxm                         a device of systems.py; behind it ,fraction=0.9 where an engine was given another share of the memory
    memory_gib=24,fraction=0.9,bandwidth_gb_s=1008,tflops=165

Any decoder is read that names its fields as transformers does, not only what the own runtime can run.
"""

import re
from pathlib import Path

from planner.commands.configs import valid
from planner.commands.model_config import MAX_BYTES, Sized, config_size, gguf_size, own_layers_size
from planner.errors import BadInput
from planner.runtime.fields import MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, MAX_WIDTH, one_line, where_from
from planner.serving import ModelSize, SystemSpec
from planner.systems import SYSTEMS
from planner.trained import NAMES, SUFFIX, checkpoint_path, own_layers_path
from planner.units import GIB, meant

FRACTION = 0.9  # of the memory, where nobody said: vLLM's default for most of its life, 0.92 of late


def model_size(text: str, name: str = "") -> ModelSize:
    """The size of a model; BadInput where the text does not say enough. name  in place of the folder's"""
    return sized(text, name).model


def sized(text: str, name: str = "") -> Sized:
    """The size of a model, and what had to be taken for granted."""
    head, pairs = _split(text)
    if head is None:
        return _from_pairs(_Pairs(text, pairs, _MODEL_KEYS), name)
    given = _Pairs(text, pairs, {"weights_gib", "weights_gb", "weights_bytes", "kv_bytes_per_element", "name"})
    path = _existing(head)
    read = {".gguf": gguf_size, SUFFIX: own_layers_size}.get(path.suffix, config_size)
    return read(
        path, name=name or pairs.get("name", ""), weights_bytes=given.size("weights"),
        kv_bytes_per_element=given.number("kv_bytes_per_element", 0, 8, None),
    )  # fmt: skip


def system_spec(text: str) -> SystemSpec:
    """A device, and the share of its memory that an engine may use."""
    return read_system(text)[0]


def read_system(text: str) -> tuple[SystemSpec, bool]:
    """The device, and whether the text itself says the share."""
    head, pairs = _split(text)
    names = {"fraction"} if head is not None else {"memory_gib", "memory_gb", "memory_bytes", "fraction", "bandwidth_gb_s", "tflops", "name"}
    given = _Pairs(text, pairs, names)
    fraction = given.number("fraction", 0, 1, FRACTION)
    if head is not None:
        if head not in SYSTEMS:
            raise BadInput(
                f"a system is one of {', '.join(SYSTEMS)}, or its memory as memory_gib=80,fraction=0.9 (optional: bandwidth_gb_s, tflops), "
                f"got {one_line(head)}{meant(head, SYSTEMS)}"
            )
        known = SYSTEMS[head]
        peaks = {"bandwidth_bytes_per_s": float(known.bandwidth_bytes_per_s), "flops_per_s": float(known.flops_per_s)}
        return valid(SystemSpec, name=head, memory_bytes=known.memory_bytes, fraction=fraction, **peaks), "fraction" in pairs
    memory = given.size("memory")
    if memory is None:
        raise BadInput(f"a system needs its memory, as in memory_gib=80,fraction=0.9, or a name of {', '.join(SYSTEMS)}, got {one_line(text)}")
    bandwidth, tflops = given.number("bandwidth_gb_s", 0, 1e6, None), given.number("tflops", 0, 1e6, None)
    return valid(
        SystemSpec, name=pairs.get("name", f"{memory / GIB:.4g} GiB"), memory_bytes=memory, fraction=fraction,
        bandwidth_bytes_per_s=None if bandwidth is None else bandwidth * 1e9, flops_per_s=None if tflops is None else tflops * 1e12,
    ), "fraction" in pairs  # fmt: skip


# ------------------------------------------------------------------ name=value pairs

_MODEL_KEYS = {
    "num_layers", "num_kv_heads", "head_dim", "weights_gib", "weights_gb", "weights_bytes", "kv_bytes_per_element", "hidden_size",
    "intermediate_size", "num_heads", "vocab_size", "name",
}  # fmt: skip
_UNITS = {"bytes": 1, "gib": GIB, "gb": 10**9}


def _split(text: str) -> tuple[str | None, dict[str, str]]:
    """A path or name, if the text begins with one, and the pairs behind it."""
    parts = text.split(",")
    first = len(parts)
    while first and re.match(r"\s*[a-z_]+\s*=", parts[first - 1]):
        first -= 1
    head = ",".join(parts[:first]).strip()
    pairs = {}
    for part in parts[first:]:
        name, _, value = part.partition("=")
        if name.strip() in pairs:
            raise BadInput(f"{name.strip()} must be given once, got {one_line(text)}")
        pairs[name.strip()] = value.strip()
    if not head and not pairs:
        raise BadInput("a model or a system must be named, got an empty text; give a folder, a config.json, a device's name or name=value pairs")
    return head or None, pairs


def is_model_key(name: str) -> bool:
    """Whether a name=value pair of this name says something of a model's size, so that it names no drafter."""
    return name in _MODEL_KEYS


class _Pairs:
    """The values of one text, each checked as it is taken out."""

    def __init__(self, text: str, values: dict[str, str], known: set[str]):
        self.text, self.values = text, values
        if unknown := sorted(values.keys() - known):
            raise BadInput(f"a name must be one of {', '.join(sorted(known))}, got {one_line(unknown[0])} in {one_line(text)}")

    def number(self, name: str, above: float, most: float, default: float | None) -> float | None:
        if name not in self.values:
            return default
        try:
            value = float(self.values[name])
        except ValueError:
            value = float("nan")
        if not above < value <= most:  # nor NaN
            raise BadInput(f"{name} must be a number above {above:g} and at most {most:g}, got {one_line(self.values[name])}")
        return value

    def count(self, name: str, most: int) -> int | None:
        if name not in self.values:
            return None
        text = self.values[name]
        if not re.fullmatch(r"[0-9]{1,12}", text) or not 1 <= int(text) <= most:
            raise BadInput(f"{name} must be an integer from 1 to {most}, got {one_line(text)}")
        return int(text)

    def size(self, what: str) -> int | None:
        """Bytes, from whichever unit was written."""
        found = [name for name in (f"{what}_{unit}" for unit in _UNITS) if name in self.values]
        if len(found) > 1:
            raise BadInput(f"the {what} must be given once, got {' and '.join(found)} in {one_line(self.text)}")
        if not found:
            return None
        scale = _UNITS[found[0].rsplit("_", 1)[1]]
        return max(1, int(self.number(found[0], 0, MAX_BYTES / scale, None) * scale))


def _from_pairs(given: _Pairs, name: str) -> Sized:
    least = {"num_layers": MAX_LAYERS, "num_kv_heads": MAX_HEADS, "head_dim": MAX_HEAD_DIM}
    weights = given.size("weights")
    missing = [key for key in least if key not in given.values] + ["weights_gib"] * (weights is None)
    if missing:
        raise BadInput(
            f"a model needs num_layers=..,num_kv_heads=..,head_dim=..,weights_gib=.., or a folder with config.json; "
            f"{', '.join(missing)} missing in {one_line(given.text)}"
        )
    more = {"hidden_size": MAX_WIDTH, "intermediate_size": MAX_WIDTH, "num_heads": MAX_HEADS, "vocab_size": MAX_VOCAB}
    counts = {key: given.count(key, most) for key, most in (least | more).items()}
    element = given.number("kv_bytes_per_element", 0, 8, 2.0)
    shown = name or given.values.get("name") or f"{weights / GIB:.4g} GiB model"
    return Sized(valid(ModelSize, name=shown, weights_bytes=weights, kv_bytes_per_element=element, **counts), [])


def _existing(head: str) -> Path:
    """The config.json that the text names."""
    if "\0" in head or len(head) > 4096:
        raise BadInput(f"a model is a folder, a config.json, a GGUF file or name=value pairs, got {one_line(head)}")
    path = own_layers_path(head) if head in NAMES else checkpoint_path(head)
    if path.is_dir():
        path = path / "config.json"
    elif not path.is_file():
        raise BadInput(
            f"a model is a Hugging Face folder, its config.json, a GGUF file, or num_layers=..,num_kv_heads=..,head_dim=..,weights_gib=..; "
            f"nothing lies at {one_line(head)}{where_from(head)}"
        )
    return path
