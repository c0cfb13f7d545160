"""How long one forward pass takes on a GPU: tiles, waves, split-KV attention, collectives. Seconds, bytes, tokens.

The constants agree with measured tables (aiconfigurator, Apache-2.0: vLLM 0.14 and 0.19 on A100 and H100, bf16) within about
15 %: a 4096 x 4096 product takes 24 us up to 64 rows, 36 to 128, 54 to 384, 91 at 512 and 204 at 1024 on an A100, and 16 up to
128 rows, 24 at 512, 43 at 1024 on an H100. Decode attention of 32/8 heads reads 537 MB in 190 to 205 us on an H100.
"""

from typing import NamedTuple

import numpy as np


class Gpu(NamedTuple):
    """As the maker's data sheet has it."""

    name: str
    memory_gib: float
    bandwidth: float  # bytes/s
    flops: float  # per second, bf16, dense
    num_sms: int
    attention_read: float  # share of the bandwidth that decode attention reaches; measured on A100, H100 and H200
    link: float  # bytes/s between two, each way
    max_tensor_parallel: int

    @property
    def has_nvlink(self) -> bool:
        return self.link > 1e11


GPUS = (
    Gpu("a100_40gb", 40, 1.555e12, 312e12, 108, 0.72, 300e9, 8),
    Gpu("a100_80gb", 80, 2.039e12, 312e12, 108, 0.72, 300e9, 8),
    Gpu("h100_sxm", 80, 3.352e12, 989e12, 132, 0.85, 450e9, 8),
    Gpu("h200_sxm", 141, 4.8e12, 989e12, 132, 0.85, 450e9, 8),
    Gpu("l40s", 48, 0.864e12, 362e12, 142, 0.80, 25e9, 4),
    Gpu("rtx_4090", 24, 1.008e12, 165e12, 128, 0.80, 20e9, 2),
)


class Decoder(NamedTuple):
    """The shape of a decoder-only transformer, as its config.json has it."""

    name: str
    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    experts: int = 0  # 0: dense
    experts_per_token: int = 0

    @property
    def layer_weights(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return attention + 3 * self.hidden * self.intermediate * max(1, self.experts)

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocab


class Placement(NamedTuple):
    """A model on its devices, and how an engine runs it."""

    model: Decoder
    gpu: Gpu
    tensor_parallel: int
    weight_bytes: float  # per parameter
    kv_bytes: float  # per element
    lumps: np.ndarray  # [4, len(LUMPS) + 1] how far the kernel picked for a matrix product lies from the law, by row count
    verify_read: float = 1.0  # reading the KV for several rows at once, over reading it for one


TILES = ((64, 64, 0.50), (64, 128, 0.62), (128, 128, 0.75), (128, 256, 0.85))  # rows, columns, share of the peak they reach
LUMPS = np.array([16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048])  # where libraries change their kernel
LAUNCH_S = 3.5e-6  # a kernel in a CUDA graph, ramp included


def product_s(m: np.ndarray, n: int, k: int, gpu: Gpu, weight_bytes: float) -> np.ndarray:
    """[m] times [m, k] x [k, n]: the weights' read, or the tiles of the best kernel in whole waves over the SMs."""
    peak = gpu.flops * (1.8 if weight_bytes == 1 else 1.0) / gpu.num_sms
    tiles_s = np.full(len(m), np.inf)
    for rows, columns, share in TILES:
        tiles = np.ceil(m / rows) * np.ceil(n / columns)
        for split in (1, 2, 4):
            waves = np.ceil(tiles * split / gpu.num_sms)
            reduce_s = (split - 1) * m * n * 8 / gpu.bandwidth
            tiles_s = np.minimum(tiles_s, waves * 2 * rows * columns * (k / split) / (peak * share) + reduce_s)
    read_s = (n * k * weight_bytes + 2 * m * (n + k)) / (0.87 * gpu.bandwidth)
    return LAUNCH_S + (read_s**4 + tiles_s**4) ** 0.25


def experts_s(m: np.ndarray, at: Placement) -> np.ndarray:
    """[m] times of one layer's experts: every row wakes some, so the read grows with the rows until all are awake."""
    model, gpu = at.model, at.gpu
    awake = model.experts * (1 - (1 - model.experts_per_token / model.experts) ** m)
    weights = 3 * model.hidden * model.intermediate / at.tensor_parallel
    read_s = awake * weights * at.weight_bytes / (0.75 * gpu.bandwidth)
    rows = np.ceil(m * model.experts_per_token / awake / 16) * 16  # of one expert, in tiles of 16
    compute_s = awake * rows * 2 * weights / (0.45 * gpu.flops)
    return 6 * LAUNCH_S + (read_s**4 + compute_s**4) ** 0.25


def products_s(m: np.ndarray, at: Placement) -> np.ndarray:
    """[m] times of all matrix products of the layers, the head's left out."""
    m, again = np.unique(m, return_inverse=True)  # graphs pad many batches to one width
    model, tp = at.model, at.tensor_parallel
    q, kv = model.num_heads * model.head_dim // tp, max(1, model.num_kv_heads // tp) * model.head_dim
    lump = at.lumps[:, np.searchsorted(LUMPS, m)]
    out = lump[0] * product_s(m, q + 2 * kv, model.hidden, at.gpu, at.weight_bytes)
    out += lump[1] * product_s(m, model.hidden, q, at.gpu, at.weight_bytes)
    if model.experts:
        return model.num_layers * (out + lump[2] * experts_s(m, at))[again]
    out += lump[2] * product_s(m, 2 * model.intermediate // tp, model.hidden, at.gpu, at.weight_bytes)
    out += lump[3] * product_s(m, model.hidden, model.intermediate // tp, at.gpu, at.weight_bytes)
    return model.num_layers * out[again]


def attention_s(batch: np.ndarray, rows: float, kv_len: float, at: Placement) -> np.ndarray:
    """[batch] times of one layer's attention: `rows` new tokens of each request over kv_len keys.

    Two thread blocks fit an SM and 70 % of the SMs draw the whole bandwidth; the KV is split where that fills them better.
    """
    model, gpu = at.model, at.gpu
    kv_heads = max(1, model.num_kv_heads // at.tensor_parallel)
    passes = np.ceil(rows * model.num_heads / model.num_kv_heads / 64)  # query tiles; later ones find most keys in the L2
    read = batch * kv_len * 2 * kv_heads * model.head_dim * at.kv_bytes * (1 + 0.3 * (passes - 1))
    read *= at.verify_read if rows > 1 else 1.0
    stretch = np.full(len(batch), np.inf)
    for splits in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
        if splits > np.ceil(kv_len / 256):
            break
        blocks = batch * kv_heads * splits
        last = blocks % (2 * gpu.num_sms)  # blocks of the last wave
        tail = np.where(last > 0, np.maximum(last, 0.7 * gpu.num_sms), 0)
        stretch = np.minimum(stretch, (blocks - last + tail) / blocks * (1 + 0.01 * (splits - 1)))
    read_s = stretch * read / (gpu.attention_read * gpu.bandwidth)
    return (6e-6 if gpu.attention_read > 0.8 else 12e-6) + np.hypot(read_s, 3.4e-6 * np.ceil(batch * kv_heads / gpu.num_sms))


def all_reduce_s(m: np.ndarray, at: Placement) -> np.ndarray:
    """[m] times of one: in one shot while the message is small, then a ring."""
    if at.tensor_parallel == 1:
        return np.zeros(len(m))
    message, tp, link = 2.0 * m * at.model.hidden, at.tensor_parallel, at.gpu.link
    ring_s = (14e-6 if at.gpu.has_nvlink else 30e-6) + 2 * (tp - 1) / tp * message / (0.7 * link)
    if not at.gpu.has_nvlink:
        return ring_s
    return np.where(message < 512 * 1024, 5e-6 + (tp - 1) * message / (0.7 * link), ring_s)


def head_s(m: np.ndarray, at: Placement, vocab: int) -> np.ndarray:
    """[m] times of the logits over a vocabulary and of choosing from them in float32, which one rank does."""
    logits_s = product_s(m, vocab // at.tensor_parallel, at.model.hidden, at.gpu, 2)
    return logits_s + 40e-6 + 3 * 4 * m * vocab / at.gpu.bandwidth


def forward_s(m: np.ndarray, batch: np.ndarray, rows: float, kv_len: float, at: Placement, vocab: int) -> np.ndarray:
    """[m] times of a decoding pass over m (padded) tokens of `batch` requests, on the GPU alone."""
    glue_s = 2.5 * LAUNCH_S + 24 * m * at.model.hidden / at.gpu.bandwidth  # norms, rotary, activations, residuals
    layer_s = attention_s(batch, rows, kv_len, at) + glue_s + 2 * all_reduce_s(m, at)
    return products_s(m, at) + at.model.num_layers * layer_s + head_s(m, at, vocab)


def prefill_s(context_len: int, chunk: int, at: Placement) -> float:
    """Time of a whole prompt, chunk by chunk, without logits."""
    model, gpu = at.model, at.gpu
    m = np.array([min(chunk, context_len)])
    whole = context_len / m[0]
    causal = 2 * context_len**2 * model.num_heads * model.head_dim * model.num_layers / at.tensor_parallel
    glue_s = model.num_layers * (24 * m * model.hidden / gpu.bandwidth + 2 * all_reduce_s(m, at))
    return float(whole * (products_s(m, at) + glue_s)[0] + causal / (0.5 * gpu.flops))
