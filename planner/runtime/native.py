"""Kernels of kernels.cpp: a CPU's fast path for bfloat16 and float32, compiled on the machine it runs on.

The library is built once, in about ten seconds, and kept in $XDG_CACHE_HOME/specplan under a name made of the source, the
compiler and the processor. It is loaded after PyTorch, whose OpenMP threads it then shares.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from planner.errors import BadInput
from planner.runtime.kernels import Kernels
from planner.runtime.kv_cache import Ancestors, KVCache, Mask
from planner.runtime.linear import Matrix
from planner.runtime.rope import Rotation

if TYPE_CHECKING:
    from planner.runtime.model import Layer

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ["-std=gnu++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-w"]
MAX_ROWS = 80  # of a matrix product, a tree of 64 nodes among them: beyond, it is bound by arithmetic, and PyTorch's is as good
MAX_QUANTIZED_ROWS = 16  # beyond, restoring the weights and multiplying in bfloat16 is faster
DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64


class _Matrix(ctypes.Structure):
    _fields_ = [("bits", INTEGER), ("in_", INTEGER), ("out", INTEGER), ("weights", POINTER), ("scales", POINTER)]

    @classmethod
    def of(cls, matrix: Matrix) -> "_Matrix":
        out, width = matrix.shape
        return cls(matrix.bits, width, out, matrix.weights.data_ptr(), None if matrix.scales is None else matrix.scales.data_ptr())


class _Layer(ctypes.Structure):
    _fields_ = [(name, POINTER) for name in ("attention_norm", "mlp_norm")] + [
        (name, _Matrix) for name in ("qkv", "attention_out", "gate_up", "mlp_out")
    ]


class _Cache(ctypes.Structure):
    _fields_ = [("keys", POINTER), ("values", POINTER), ("lengths", POINTER)] + [
        (name, INTEGER) for name in ("layer_stride", "stream_stride", "capacity")
    ]

    @classmethod
    def of(cls, cache: KVCache) -> "_Cache":
        lengths = (INTEGER * len(cache.lengths))(*cache.lengths)
        layer, stream = cache.keys.stride()[:2]
        found = cls(cache.keys.data_ptr(), cache.values.data_ptr(), ctypes.cast(lengths, POINTER), layer, stream, cache.capacity)
        found.kept = lengths  # the structure holds an address only
        return found


ARGUMENTS = {
    "linear": [POINTER, POINTER, POINTER, INTEGER],
    "restore": [POINTER, POINTER],
    "attend": [POINTER, POINTER, POINTER, POINTER, INTEGER, POINTER, POINTER] + [INTEGER] * 5,
    "run": [POINTER, INTEGER, POINTER, ctypes.c_float] + [POINTER] * 7 + [INTEGER] * 5,
}


class NativeKernels(Kernels):
    """Passes over a few tokens in one call, trees and taps included; matrix products of wide ones, and other masks, are left to PyTorch."""

    execution = "native"

    def __init__(self, dtype: torch.dtype):
        """BadInput where they cannot be built."""
        if dtype not in DTYPES:
            raise BadInput(f"native kernels compute in bfloat16 or float32, got {str(dtype).removeprefix('torch.')}; use --execution eager")
        library, self._dtype = load_library(), dtype
        self._functions = {name: getattr(library, f"{name}_{DTYPES[dtype]}") for name in ARGUMENTS}
        for name, arguments in ARGUMENTS.items():
            self._functions[name].argtypes, self._functions[name].restype = arguments, None
        self._tables: WeakKeyDictionary = WeakKeyDictionary()  # layers or a matrix -> what the library is told of them

    def linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        out, width = matrix.shape
        rows = x.numel() // width
        if matrix not in self._tables:
            self._tables[matrix] = _Matrix.of(matrix) if self._fits(matrix) else None
        table = self._tables[matrix]
        if table is not None and matrix.scales is not None and rows > _most_rows(matrix) and x.dtype == self._dtype:
            weight = x.new_empty(out, width)
            self._functions["restore"](ctypes.byref(table), weight.data_ptr())
            return F.linear(x.contiguous(), weight)
        if table is None or rows > _most_rows(matrix) or not self._takes(x):
            return super().linear(x, matrix)
        y = x.new_empty(*x.shape[:-1], out)
        self._functions["linear"](ctypes.byref(table), x.data_ptr(), y.data_ptr(), rows)
        return y

    def attend(self, qkv: Tensor, rotation: Rotation, cache: KVCache, layer: int, mask: Mask) -> Tensor:
        if isinstance(mask, Tensor) or not self._takes(qkv, rotation) or not self._takes_cache(cache, len(qkv)):
            return super().attend(qkv, rotation, cache, layer, mask)
        B, n, width = qkv.shape
        G, D = cache.keys.shape[2], cache.keys.shape[4]
        H = width // D - 2 * G
        cache.check_room(n)
        out = qkv.new_empty(B, n, H * D)
        self._functions["attend"](
            qkv.data_ptr(), rotation.cos.data_ptr(), rotation.sin.data_ptr(), ctypes.byref(_Cache.of(cache)), layer, _address(mask, B, n),
            out.data_ptr(), B, n, H, G, D,
        )  # fmt: skip
        return out

    def run(
        self, layers: Sequence["Layer"], norm: Tensor, eps: float, x: Tensor, rotation: Rotation, cache: KVCache, mask: Mask,
        taps: Collection[int],
    ) -> tuple[Tensor, dict[int, Tensor]]:  # fmt: skip
        B, n, _ = x.shape
        narrow = B * n <= _most_rows(layers[0].qkv)
        if layers not in self._tables:
            plain = not any(layer.finishes_heads for layer in layers)  # the library knows neither biases nor norms of heads
            fits = plain and all(self._fits(matrix) and matrix.shape[0] % 32 == 0 for layer in layers for matrix in _matrices(layer))
            self._tables[layers] = (_Layer * len(layers))(*(_layer(layer) for layer in layers)) if fits else None
        takes = self._tables[layers] is not None and self._takes(x, rotation) and self._takes_cache(cache, B)
        if isinstance(mask, Tensor) or not narrow or not takes:
            return super().run(layers, norm, eps, x, rotation, cache, mask, taps)
        G, D = cache.keys.shape[2], cache.keys.shape[4]
        H = layers[0].attention_out.shape[1] // D
        cache.check_room(n)
        hidden, tapped = torch.empty_like(x), {layer: torch.empty_like(x) for layer in taps}
        addresses = (POINTER * len(layers))(*(tapped[layer].data_ptr() if layer in tapped else None for layer in range(len(layers))))
        self._functions["run"](
            self._tables[layers], len(layers), norm.data_ptr(), eps, x.data_ptr(), hidden.data_ptr(), addresses, rotation.cos.data_ptr(),
            rotation.sin.data_ptr(), ctypes.byref(_Cache.of(cache)), _address(mask, B, n), B, n, H, G, D,
        )  # fmt: skip
        return hidden, tapped

    def forget(self) -> None:
        self._tables.clear()

    def _takes(self, x: Tensor, rotation: Rotation | None = None) -> bool:
        """Whether these tensors are what the library was written for; what is to be differentiated is not."""
        fits = x.dtype == self._dtype and x.is_contiguous() and not x.requires_grad
        return fits and (rotation is None or all(part.is_contiguous() and part.shape[:2] == x.shape[:2] for part in rotation))

    def _takes_cache(self, cache: KVCache, B: int) -> bool:
        keys, values = cache.keys, cache.values
        capacity, D = keys.shape[3:]
        fits = keys.dtype == values.dtype == self._dtype and keys.shape[1] == len(cache.lengths) == B
        return fits and D in (64, 128) and keys.stride() == values.stride() and keys.stride()[2:] == (capacity * D, D, 1)

    def _fits(self, matrix: Matrix) -> bool:
        """Whether its weights lie as the library reads them."""
        dtypes = matrix.weights.dtype, None if matrix.scales is None else matrix.scales.dtype
        known = (self._dtype, None), (torch.int8, torch.float32), (torch.uint8, torch.bfloat16)
        return dtypes in known and matrix.shape[1] % 32 == 0


def _address(mask: Ancestors | None, B: int, n: int) -> int | None:
    """Where the library finds who sees whom, a byte for each pair of new tokens."""
    if mask is None:
        return None
    if mask.visible.shape != (B, n, n) or mask.visible.dtype != torch.bool or not mask.visible.is_contiguous():
        raise ValueError(f"a tree's mask must be bool of shape {[B, n, n]} in one piece, got {mask.visible.dtype} of {list(mask.visible.shape)}")
    return mask.visible.data_ptr()


def _most_rows(matrix: Matrix) -> int:
    return MAX_QUANTIZED_ROWS if matrix.bits < 16 else MAX_ROWS


def _matrices(layer: "Layer") -> tuple[Matrix, ...]:
    return layer.qkv, layer.attention_out, layer.gate_up, layer.mlp_out


def _layer(layer: "Layer") -> _Layer:
    return _Layer(layer.attention_norm.data_ptr(), layer.mlp_norm.data_ptr(), *(_Matrix.of(matrix) for matrix in _matrices(layer)))


@cache
def load_library() -> ctypes.CDLL:
    """The compiled kernels, built now if this machine has not built them before. BadInput says why it cannot be done."""
    asked = os.environ.get("CXX")
    compiler = shutil.which(asked or "g++")
    if compiler is None:
        found = f"CXX={asked} is not there" if asked else "none was found; install one"
        raise BadInput(f"native kernels need g++ 12 or newer, {found}, or use --execution eager")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = hashlib.sha256("\n".join([SOURCE.read_text(), *FLAGS, version, _processor()]).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specplan"
    except RuntimeError as error:
        raise BadInput(f"native kernels need a place to be kept ({error}); set XDG_CACHE_HOME to a folder that can be written") from None
    path = folder / f"kernels-{key}.so"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=folder) as building:
                result = Path(building) / path.name
                done = subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(result)], capture_output=True, text=True, check=False)
                if done.returncode:
                    why = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
                    raise BadInput(f"native kernels could not be built with {compiler} ({why}); use a newer compiler (CXX=...), or --execution eager")
                result.replace(path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BadInput(f"native kernels cannot be kept in {folder} ({error}); set XDG_CACHE_HOME to a folder that can be written") from None


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
