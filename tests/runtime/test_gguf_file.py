"""Damaged and hostile GGUF files are refused at once, by name, before anything of a claimed size is allocated."""

import math
import random
import struct
from pathlib import Path

import pytest
from checkpoints import load, make_model, refused, write_gguf

from planner.errors import BadInput


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", make_model()).read_bytes()


def load_bytes(tmp_path: Path, data: bytes):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    return load(path)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(*, version=3, num_tensors=0, num_keys=0, rest=b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + rest + bytes(4096)


HUGE = 2**40
HOSTILE = {
    "2^40 tensors": (header(num_tensors=HUGE), "tensor_count"),
    "2^40 keys": (header(num_keys=HUGE), "kv_count"),
    "2^64-1 keys": (header(num_keys=2**64 - 1), "kv_count"),
    "version 1": (header(version=1), "version"),
    "version 4": (header(version=4), "version"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "huge key": (header(num_keys=1, rest=struct.pack("<Q", HUGE)), "metadata entry 0"),
    "huge string": (header(num_keys=1, rest=string(b"some.key") + struct.pack("<IQ", 8, HUGE)), "some.key"),
    "huge array of strings": (header(num_keys=1, rest=string(b"some.key") + struct.pack("<IIQ", 9, 8, HUGE)), "some.key"),
    "huge array of numbers": (header(num_keys=1, rest=string(b"some.key") + struct.pack("<IIQ", 9, 4, HUGE)), "some.key"),
    "array of arrays": (header(num_keys=1, rest=string(b"some.key") + struct.pack("<IIQ", 9, 9, 1)), "some.key"),
    "unknown value type": (header(num_keys=1, rest=string(b"some.key") + struct.pack("<I", 99)), "some.key"),
    "not UTF-8": (header(num_keys=1, rest=string(b"\xff\xfe")), "metadata entry 0"),
    "repeated key": (header(num_keys=2, rest=(string(b"some.key") + struct.pack("<IB", 0, 1)) * 2), "some.key"),
    "alignment 0": (header(num_keys=1, rest=string(b"general.alignment") + struct.pack("<II", 4, 0)), "general.alignment"),
    "alignment 24": (header(num_keys=1, rest=string(b"general.alignment") + struct.pack("<II", 4, 24)), "general.alignment"),
    "no dimensions": (header(num_tensors=1, rest=string(b"t") + struct.pack("<I", 0)), "tensor 't'"),
    "2^31 dimensions": (header(num_tensors=1, rest=string(b"t") + struct.pack("<I", 2**31)), "tensor 't'"),
    "2^40 weights": (header(num_tensors=1, rest=string(b"t") + struct.pack("<IQIQ", 1, HUGE, 0, 0)), "tensor 't'"),
    "dimensions that overflow": (header(num_tensors=1, rest=string(b"t") + struct.pack("<IQQIQ", 2, 2**32, 2**32, 0, 0)), "tensor 't'"),
    "empty dimension": (header(num_tensors=1, rest=string(b"t") + struct.pack("<IQIQ", 1, 0, 0, 0)), "tensor 't'"),
    "offset outside": (header(num_tensors=1, rest=string(b"t") + struct.pack("<IQIQ", 1, 8, 0, HUGE)), "tensor 't'"),
    "offset not aligned": (header(num_tensors=1, rest=string(b"t") + struct.pack("<IQIQ", 1, 8, 0, 4)), "tensor 't'"),
    "unknown tensor type": (header(num_tensors=1, rest=string(b"t") + struct.pack("<IQIQ", 1, 8, 77, 0)), "tensor 't'"),
    "integer tensor": (header(num_tensors=1, rest=string(b"t") + struct.pack("<IQIQ", 1, 8, 26, 0)), "tensor 't'"),
    "broken block": (header(num_tensors=1, rest=string(b"t") + struct.pack("<IQIQ", 1, 33, 8, 0)), "tensor 't'"),
    "repeated tensor": (header(num_tensors=2, rest=(string(b"t") + struct.pack("<IQIQ", 1, 8, 0, 0)) * 2), "tensor 't'"),
    "nothing inside": (header(), "general.architecture"),
}


@pytest.mark.parametrize(("data", "word"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_gguf_header_is_refused(tmp_path, data, word):
    with refused("hostile.gguf", word):
        load_bytes(tmp_path, data)


def test_tensors_that_share_their_bytes_are_refused(tmp_path):
    """Otherwise a small file could make any amount of memory."""
    infos = b"".join(string(f"t{i}".encode()) + struct.pack("<IQIQ", 1, 1000, 0, 0) for i in range(100))
    with refused("overlaps"):
        load_bytes(tmp_path, header(num_tensors=100, rest=infos))


def test_truncated_gguf_is_refused_wherever_the_cut_is(tmp_path, gguf_bytes):
    for length in [*range(0, 4000, 97), len(gguf_bytes) // 2, len(gguf_bytes) - 64]:
        with refused("hostile.gguf"):
            load_bytes(tmp_path, gguf_bytes[:length])


def test_any_damaged_byte_of_the_header_loads_or_is_refused(tmp_path, gguf_bytes):
    """No other exception, and no long loop, from 300 random changes of one to four bytes."""
    rng = random.Random(0)
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(300):
        damaged = bytearray(gguf_bytes)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(2200)] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        try:
            load_bytes(tmp_path, bytes(damaged))
            outcomes["loaded"] += 1
        except BadInput as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0])
def test_absurd_floats_in_gguf_metadata_are_refused(tmp_path, gguf_bytes, value):
    for key in (b"llama.rope.freq_base", b"llama.attention.layer_norm_rms_epsilon"):
        at = gguf_bytes.index(key) + len(key) + 4
        with refused(key.decode()):
            load_bytes(tmp_path, gguf_bytes[:at] + struct.pack("<f", value) + gguf_bytes[at + 4 :])


def test_weights_that_are_not_finite_are_refused_in_gguf_too(tmp_path, gguf_bytes):
    with refused("not finite"):
        load_bytes(tmp_path, gguf_bytes[:-64] + struct.pack("<16f", *[math.inf] * 16))
