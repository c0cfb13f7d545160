"""The container format of GGUF files: header, metadata, where each tensor lies, and its weights as floats.

The file is untrusted: every size is checked against it before it is looped over or allocated.

Source: ggml docs/gguf.md (GGUF 2 and 3).
"""

import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from planner.errors import BadInput
from planner.runtime.fields import MIB, Fields, one_line

MAX_HEADER_BYTES = 256 * MIB  # a vocabulary of 256K tokens with its merges takes about 20 MiB
MAX_ENTRIES = 2**22  # elements of all arrays of a header; a vocabulary of 256K with scores, types and merges has 1.4M
MAX_TENSORS = 2**16  # also of metadata keys
NO_DEQUANTIZER = {"F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K"}  # integers, and blocks that only activations use


class GGUFTensor(NamedTuple):
    """Where a tensor lies in its file."""

    shape: tuple[int, ...]  # outermost first, as torch has it; the file stores it reversed
    kind: GGMLQuantizationType
    offset: int  # bytes from the start of the file
    num_bytes: int


class GGUF(NamedTuple):
    """The header of a GGUF file, every size in it checked against the file."""

    metadata: dict[str, Any]  # bool, int, float, str, or a list of one of these
    tensors: dict[str, GGUFTensor]
    header_bytes: int


SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}  # GGUF type -> numpy
STRING, ARRAY = 8, 9
TENSOR_TYPES = {int(kind): kind for kind in GGMLQuantizationType if kind.name not in NO_DEQUANTIZER}


class _Cursor:
    """Reads a GGUF header front to back and never past its end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at, self.end = path, data, 0, min(len(data), MAX_HEADER_BYTES)
        self.entries_left = MAX_ENTRIES

    def take(self, num_bytes: int, what: str) -> bytes:
        start, self.at = self.at, self.at + num_bytes
        if self.at > self.end:
            raise self.refusal(what, f"needs {num_bytes} bytes at {start}, the header can have {self.end}")
        return self.data[start : self.at]

    def integer(self, num_bytes: int, what: str) -> int:
        return int.from_bytes(self.take(num_bytes, what), "little")

    def count(self, what: str, least_bytes: int, most: int) -> int:
        """How many entries follow: a count that the rest of the file can hold."""
        count = self.integer(8, what)
        most = min(most, (self.end - self.at) // least_bytes)
        if count > most:
            raise self.refusal(what, f"claims {count} entries, at most {most} fit")
        return count

    def array_len(self, what: str, least_bytes: int) -> int:
        count = self.count(what, least_bytes, self.entries_left)
        self.entries_left -= count
        return count

    def text(self, what: str) -> str:
        raw = self.take(self.integer(8, what), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.refusal(what, f"must be UTF-8, got {one_line(raw)}") from None

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.text(what)
        if kind == ARRAY:
            kind = self.integer(4, what)
            if kind == STRING:
                return [self.text(what) for _ in range(self.array_len(what, 8))]
            return self.numbers(kind, what, lambda size: self.array_len(what, size))
        return self.numbers(kind, what, lambda size: 1)[0]

    def numbers(self, kind: int, what: str, count) -> list:
        if kind not in SCALARS:
            raise self.refusal(what, f"has value type {kind}, which GGUF does not define here")
        dtype = np.dtype(SCALARS[kind])
        values = np.frombuffer(self.take(count(dtype.itemsize) * dtype.itemsize, what), dtype)
        # the shortest decimal that makes these 32 bits: 1e-05, not 9.999999747378752e-06
        return [float(str(value)) for value in values] if kind == 6 and len(values) == 1 else values.tolist()

    def refusal(self, what: str, rule: str) -> BadInput:
        return BadInput(f"{self.path}: {what} {rule}; the file is damaged or cut short, download it again")


def read_gguf(path: Path) -> GGUF:
    """Reads and checks the header. gguf.GGUFReader is not used: it trusts counts, sizes and offsets."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise BadInput(f"{path} is not a GGUF file (these start with 'GGUF'); give a GGUF file or a Hugging Face folder")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse_gguf(path, _Cursor(path, data), len(data))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {one_line(error)}") from error


def _parse_gguf(path: Path, cursor: _Cursor, size: int) -> GGUF:
    cursor.take(4, "magic")
    version = cursor.integer(4, "version")
    if version not in (2, 3):
        hint = "big-endian files are not read" if version >= 2**16 else "convert it again with a current llama.cpp"
        raise BadInput(f"{path}: version must be 2 or 3, got {version}; {hint}")
    num_tensors = cursor.count("tensor_count", 8 + 4 + 8 + 4 + 8, MAX_TENSORS)
    num_keys = cursor.count("kv_count", 8 + 4 + 1, MAX_TENSORS)

    metadata = {}
    for i in range(num_keys):
        key = cursor.text(f"name of metadata entry {i}")
        if key in metadata:
            raise cursor.refusal(one_line(key), "is given twice")
        metadata[key] = cursor.value(cursor.integer(4, one_line(key)), one_line(key))
    alignment = Fields(path, metadata).integer("general.alignment", 2**20, 32)
    if alignment % 8 or alignment & (alignment - 1):
        raise cursor.refusal("general.alignment", f"must be a power of two from 8 up, got {alignment}")

    infos = {}
    for i in range(num_tensors):
        name = cursor.text(f"name of tensor {i}")
        what = f"tensor {one_line(name)}"
        if name in infos:
            raise cursor.refusal(what, "is given twice")
        if not 1 <= (num_dims := cursor.integer(4, what)) <= 4:
            raise cursor.refusal(what, f"must have 1 to 4 dimensions, got {num_dims}")
        shape = tuple(cursor.integer(8, what) for _ in range(num_dims))[::-1]
        number, offset = cursor.integer(4, what), cursor.integer(8, what)
        if (kind := TENSOR_TYPES.get(number)) is None:
            raise BadInput(f"{path}: {what} has type {number}, which is not supported; use a common quantization such as Q8_0 or Q4_K_M")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block or offset % alignment:
            raise cursor.refusal(what, f"must have whole blocks of {block} and be aligned to {alignment}, got {list(shape)} at {offset}")
        infos[name] = GGUFTensor(shape, kind, offset, math.prod(shape) // block * block_bytes)

    start = -(-cursor.at // alignment) * alignment
    tensors = {name: info._replace(offset=start + info.offset) for name, info in infos.items()}
    for name, (shape, _, offset, num_bytes) in tensors.items():
        if offset + num_bytes > size:
            raise cursor.refusal(f"tensor {one_line(name)}", f"needs {num_bytes} bytes at {offset}, the file has {size}")
    if sum(info.num_bytes for info in infos.values()) > size:
        raise cursor.refusal("tensor data", "overlaps")
    return GGUF(metadata, tensors, cursor.at)


def dequantized(path: Path, info: GGUFTensor) -> Iterator[np.ndarray]:
    """The rows of a tensor in float32, a few million weights at a time: an embedding in float32 may be larger than the model."""
    num_rows, columns = math.prod(info.shape[:-1]), info.shape[-1]
    data = np.memmap(path, np.uint8, "r", offset=info.offset, shape=(num_rows, info.num_bytes // num_rows))
    step = max(1, 2**22 // columns)
    with np.errstate(all="ignore"):  # what overflows is refused once it is loaded
        for row in range(0, num_rows, step):
            yield dequantize(np.array(data[row : row + step]), info.kind)
