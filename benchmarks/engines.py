"""Synthetic serving engines: a target, one to three drafters, a scheduler, a KV pool, and the noise of a benchmark.

An engine here is what planner's serving model must predict from a dozen cells and may not know the law of: matrix products step
with tiles and waves, CUDA graphs pad the batch, attention reads the KV, verification takes K + 1 rows of every request, prompts
are prefilled in chunks between decoding steps, requests that do not fit wait. Nothing in this file is fitted to planner.

    engine = random_engine(seed)
    engine.truth("eagle3", 4, concurrency=32, context_len=2000)     expectations, without noise
    engine.measure(cells, rng)                                      one benchmark run per cell
    engine.profile(cells, rng), engine.table(path, cells, rng)      what planner gets

Times are seconds, sizes bytes, lengths tokens. `python benchmarks/engines.py [SEED ...]` prints some.
"""

import argparse
import csv
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from drafted_texts import MAX_DRAFT_LEN, Counters, Drafted, draw_drafted, draw_texts, expected, simulate
from step_times import GPUS, LUMPS, Decoder, Gpu, Placement, forward_s, prefill_s

import planner
from planner.serving import OFF, ModelSize, ServedCell, ServingProfile, SystemSpec

GIB = 2**30
CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MAX_CONCURRENCY = CONCURRENCIES[-1]

# From the models' config.json.
LLAMA_1B = Decoder("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 64, 128256)
LLAMA_8B = Decoder("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256)
LLAMA_70B = Decoder("Llama-3.3-70B", 80, 8192, 28672, 64, 8, 128, 128256)
QWEN_06B = Decoder("Qwen3-0.6B", 28, 1024, 3072, 16, 8, 128, 151936)
QWEN_17B = Decoder("Qwen3-1.7B", 28, 2048, 6144, 16, 8, 128, 151936)
QWEN_4B = Decoder("Qwen3-4B", 36, 2560, 9728, 32, 8, 128, 151936)
QWEN_8B = Decoder("Qwen3-8B", 36, 4096, 12288, 32, 8, 128, 151936)
QWEN_14B = Decoder("Qwen3-14B", 40, 5120, 17408, 40, 8, 128, 151936)
QWEN_32B = Decoder("Qwen3-32B", 64, 5120, 25600, 64, 8, 128, 151936)
QWEN_30B_A3B = Decoder("Qwen3-30B-A3B", 48, 2048, 768, 32, 4, 128, 151936, experts=128, experts_per_token=8)
FAMILIES = {  # target: draft models that share its vocabulary
    LLAMA_1B: (),
    LLAMA_8B: (LLAMA_1B,),
    LLAMA_70B: (LLAMA_1B, LLAMA_8B),
    QWEN_4B: (QWEN_06B,),
    QWEN_8B: (QWEN_06B, QWEN_17B),
    QWEN_14B: (QWEN_06B, QWEN_17B),
    QWEN_32B: (QWEN_06B, QWEN_17B),
    QWEN_30B_A3B: (QWEN_06B,),
}


class Cell(NamedTuple):
    drafter: str
    draft_len: int
    concurrency: int
    context_len: int


class Truth(NamedTuple):
    round_s: float  # the inter-token latency of a stream, a round's tokens arriving together
    tokens_per_round: float
    tpot_s: float
    running: float  # requests that decode at once
    output_tokens_per_s: float
    ttft_s: float  # waiting included


class Method(NamedTuple):
    """A drafter as the engine runs it."""

    kind: str  # draft_model, eagle3, mtp, ngram, dflash
    at: Placement | None  # None: n-gram, on the CPU
    vocab: int  # that it chooses from
    max_draft_len: int
    pass_s: float  # glue of each of its passes, and the least a pass takes
    request_s: float  # CPU time per running request and round
    idle_tax: float  # of a round, while it is loaded and drafts nothing
    blocks_async: bool  # the scheduler waits for its drafts
    drafted: Drafted


class Scheduler(NamedTuple):
    """The engine's CPU side and its graphs."""

    round_s: float  # of a round, whatever runs
    request_s: float  # per running request: sampling, detokenising, streaming
    overlapped: bool  # the next round is prepared while the GPU works
    pads_tokens: bool  # graphs by tokens (vLLM), else by requests (SGLang)
    largest_graph: int  # tokens or requests
    eager_layer_s: float  # launching one layer without a graph
    chunk: int  # tokens of a prompt between two decoding steps
    cached: float  # share of a prompt that is not computed here: prefixes that repeat, or another machine prefills
    max_running: int
    fraction: float  # of the device's memory
    reserve_bytes: float  # per rank: activations, graphs, the runtime
    pool_error: float  # what nobody knows: profiling, fragmentation, watermarks
    held_output: float  # share of the output's KV that a running request is charged on average


class Curve(NamedTuple):
    """One setting at every concurrency 1..MAX_CONCURRENCY."""

    round_s: np.ndarray
    tokens_per_round: float
    running: np.ndarray
    request_s: np.ndarray  # decoding one request, queueing and prefill excluded
    requests_per_s: np.ndarray
    ttft_s: np.ndarray


class Engine:
    """One engine, fixed by its parts; `seed` names it."""

    def __init__(self, seed: int, target: Placement, methods: dict[str, Method], scheduler: Scheduler, output_len: dict[int, int], noise: float):
        self.seed, self.target, self.methods, self.scheduler, self.noise = seed, target, methods, scheduler, noise
        self.output_len = output_len  # by context_len
        self.reports = {"acceptance": True, "itl": True}  # what this engine's benchmark prints
        self.sizes_known = True
        self._curves: dict[tuple, Curve] = {}
        self._counters: dict[tuple, Counters] = {}

    @property
    def contexts(self) -> list[int]:
        return list(self.output_len)

    def settings(self) -> list[tuple[str, int]]:
        """Off, then each drafter idle and at every draft length."""
        return [(OFF, 0), *((name, k) for name, method in self.methods.items() for k in range(method.max_draft_len + 1))]

    def grid(self) -> list[Cell]:
        return [Cell(*setting, concurrency, context) for context in self.contexts for setting in self.settings() for concurrency in CONCURRENCIES]

    def __str__(self) -> str:
        at, drafters = self.target, ", ".join(f"{name} (K <= {m.max_draft_len})" for name, m in self.methods.items())
        shape = " and ".join(f"{context} + {out}" for context, out in self.output_len.items())
        return f"engine {self.seed}: {at.model.name} on {at.tensor_parallel} x {at.gpu.name}, {drafters}, {shape} tokens"

    # what a round takes

    def _padded(self, batch: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """[batch] tokens of a decoding pass as the graphs pad it, and whether a graph holds it.

        By tokens, vLLM rounds every captured size up to a multiple of K + 1 and takes the first that is large enough.
        """
        if self.scheduler.pads_tokens:
            sizes = np.array([1, 2, 4, *range(8, 257, 8), *range(272, 1025, 16)])
            sizes = np.unique(-(-sizes[sizes <= self.scheduler.largest_graph] // rows) * rows)
        else:
            sizes = np.array([1, 2, 4, 8, 12, *range(16, 161, 8), *range(192, 513, 32)])
            sizes = sizes[sizes <= self.scheduler.largest_graph] * rows
        load = batch * rows
        held = load <= sizes[-1]
        return np.where(held, sizes[np.minimum(np.searchsorted(sizes, load), len(sizes) - 1)], load).astype(np.int64), held

    def _target_s(self, batch: np.ndarray, rows: int, kv_len: float) -> np.ndarray:
        m, held = self._padded(batch, rows)
        gpu_s = forward_s(m, batch, rows, kv_len, self.target, self.target.model.vocab)
        return np.where(held, gpu_s, np.maximum(gpu_s, self.target.model.num_layers * self.scheduler.eager_layer_s))

    def _draft_s(self, method: Method, draft_len: int, batch: np.ndarray, kv_len: float) -> np.ndarray:
        """[batch] times of drafting draft_len tokens."""
        cpu_s = method.request_s * batch
        if method.at is None:
            return 50e-6 + cpu_s
        if method.kind == "dflash":  # the block in one pass
            m, _ = self._padded(batch, draft_len + 1)
            return cpu_s + np.maximum(method.pass_s, forward_s(m, batch, draft_len + 1, kv_len, method.at, method.vocab)) + method.pass_s / 2
        first, _ = self._padded(batch, 2)
        later, _ = self._padded(batch, 1)
        passes_s = forward_s(first, batch, 2, kv_len, method.at, method.vocab)
        passes_s = np.maximum(method.pass_s, passes_s) + (draft_len - 1) * np.maximum(
            method.pass_s, forward_s(later, batch, 1, kv_len, method.at, method.vocab)
        )
        return cpu_s + passes_s + 0.3 * draft_len * method.pass_s

    def decoding_s(self, drafter: str, draft_len: int, context_len: int) -> np.ndarray:
        """[MAX_CONCURRENCY] times of a round of 1, 2, .. requests that nothing interrupts."""
        batch = np.arange(1, MAX_CONCURRENCY + 1)
        kv_len = context_len + self.output_len[context_len] / 2
        method, scheduler = self.methods.get(drafter), self.scheduler
        cpu_s = scheduler.round_s + scheduler.request_s * batch
        if method is None or draft_len == 0:
            round_s = self._run_s(self._target_s(batch, 1, kv_len), cpu_s, scheduler.overlapped)
            return round_s * (1 + method.idle_tax) if method else round_s
        verify_s = self._target_s(batch, draft_len + 1, kv_len)
        if method.kind == "ngram":  # rows of the rounds that found something, on a batch of mixed widths
            rows = np.maximum(1, np.round((1 + self.counters(drafter, draft_len).drafting * draft_len) * batch) / batch)
            m = np.round(rows * batch).astype(np.int64)
            verify_s = np.maximum(
                forward_s(m, batch, draft_len + 1, kv_len, self.target, self.target.model.vocab),
                self.target.model.num_layers * scheduler.eager_layer_s * 0.5,
            )
        gpu_s = verify_s + self._draft_s(method, draft_len, batch, kv_len)
        rows_s = 4e-6 * batch * draft_len  # rejecting, rolling back, copying the accepted
        return self._run_s(gpu_s + rows_s + 150e-6, 1.3 * cpu_s, scheduler.overlapped and not method.blocks_async)

    @staticmethod
    def _run_s(gpu_s: np.ndarray, cpu_s: np.ndarray, overlapped: bool) -> np.ndarray:
        return np.maximum(gpu_s, cpu_s) + 100e-6 if overlapped else gpu_s + cpu_s

    # what fits, and what runs

    def capacity(self, drafter: str, draft_len: int, context_len: int) -> float:
        """Requests whose KV fits beside the weights."""
        at, method, scheduler = self.target, self.methods.get(drafter), self.scheduler
        free = at.gpu.memory_gib * GIB * scheduler.fraction - scheduler.reserve_bytes - weights_bytes(at) / at.tensor_parallel
        token = kv_bytes_per_token(at)
        free -= 128 * (draft_len + 1) * at.model.vocab * 4  # logits of the batch that the engine profiles itself with
        if method and method.at:
            free -= drafter_bytes(method, at) / method.at.tensor_parallel
            token += kv_bytes_per_token(method.at)
        tokens = math.floor(free * (1 + scheduler.pool_error) / token / 16) * 16
        request = context_len + scheduler.held_output * self.output_len[context_len] + draft_len
        return tokens / (math.ceil(request / 16) * 16)

    def counters(self, drafter: str, draft_len: int) -> Counters:
        """Expected counters of a setting."""
        if draft_len == 0:
            return Counters(1.0, (), 0.0)
        if (drafter, draft_len) not in self._counters:
            self._counters[drafter, draft_len] = expected(self.methods[drafter].drafted, draft_len)
        return self._counters[drafter, draft_len]

    @functools.cached_property
    def _prefill_s(self) -> dict[tuple[str, int], float]:
        out = {}
        for context in self.contexts:
            own = prefill_s(context, self.scheduler.chunk, self.target)
            out[OFF, context] = own
            for name, method in self.methods.items():
                out[name, context] = own + (prefill_s(context, self.scheduler.chunk, method.at) if method.at else 0.0)
        return out

    def curve(self, drafter: str, draft_len: int, context_len: int) -> Curve:
        """A closed loop: `concurrency` requests are in the system, each replaced when it ends.

        A request waits for room, is prefilled in chunks that lengthen the rounds of those that decode, then decodes for
        (output - 1) / tokens_per_round rounds. The number that decodes is the fixed point; the rest follows from Little's law.
        """
        key = (drafter, draft_len, context_len)
        if key in self._curves:
            return self._curves[key]
        output, tokens = self.output_len[context_len], self.counters(drafter, draft_len).tokens_per_round
        rounds = (output - 1) / tokens  # of one request
        alone_s = self.decoding_s(*key)
        prompt_s = (1 - self.scheduler.cached) * self._prefill_s[drafter, context_len]
        chunks = math.ceil((1 - self.scheduler.cached) * context_len / self.scheduler.chunk) + 1
        concurrency = np.arange(1, MAX_CONCURRENCY + 1)
        room = max(1.0, min(self.capacity(*key), self.scheduler.max_running))
        inside = np.minimum(concurrency, room)
        others = 1 - 1 / inside  # a stream is not interrupted by its own prompt

        def balance(decoding: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            base_s = np.interp(decoding, concurrency, alone_s)
            round_s = base_s + others * decoding / rounds * prompt_s
            rate = decoding / (rounds * round_s)
            busy = np.minimum(0.98, others * rate * prompt_s)
            prefill = prompt_s + chunks * base_s * (inside > 1) + 0.5 * busy / (1 - busy) * prompt_s
            return decoding + rate * prefill, round_s, rate

        low, high = np.zeros(len(concurrency)), inside.astype(float)
        for _ in range(40):
            middle = (low + high) / 2
            over = balance(middle)[0] > inside
            low, high = np.where(over, low, middle), np.where(over, middle, high)
        running = (low + high) / 2
        _, round_s, rate = balance(running)
        curve = Curve(round_s, tokens, running, rounds * round_s, rate, concurrency / rate - rounds * round_s)
        self._curves[key] = curve
        return curve

    def truth(self, drafter: str, draft_len: int, concurrency: int, context_len: int) -> Truth:
        """What a benchmark without noise would print."""
        curve, i, output = self.curve(drafter, draft_len, context_len), concurrency - 1, self.output_len[context_len]
        return Truth(
            round_s=float(curve.round_s[i]),
            tokens_per_round=curve.tokens_per_round,
            tpot_s=float(curve.round_s[i] / curve.tokens_per_round),
            running=float(curve.running[i]),
            output_tokens_per_s=float(curve.requests_per_s[i] * output),
            ttft_s=float(curve.ttft_s[i]),
        )

    # what a benchmark prints

    def measure(self, cells: Sequence[Cell], rng: np.random.Generator) -> list[ServedCell]:
        """One run per cell: the texts of a few hundred requests, and a device that is not as fast every time."""
        requests = np.array([np.clip(4 * cell.concurrency, 200, 512) for cell in cells])
        counted = [Counters(1.0, (), 0.0)] * len(cells)
        for name, method in self.methods.items():
            mine = [i for i, cell in enumerate(cells) if cell.drafter == name and cell.draft_len > 0]
            if mine:
                draft_len = np.array([cells[i].draft_len for i in mine])
                for i, one in zip(mine, simulate(method.drafted, draft_len, requests[mine], rng), strict=True):
                    counted[i] = one
        out = []
        for cell, one in zip(cells, counted, strict=True):
            truth, output = self.truth(*cell), self.output_len[cell.context_len]
            pace = float(np.exp(rng.normal(-(self.noise**2) / 2, self.noise)))
            itl_s, ttft_s = truth.round_s * pace, truth.ttft_s * pace * float(np.exp(rng.normal(0, self.noise)))
            tpot_s = itl_s / one.tokens_per_round
            out.append(
                ServedCell(
                    drafter=cell.drafter,
                    draft_len=cell.draft_len,
                    concurrency=cell.concurrency,
                    context_len=cell.context_len,
                    output_len=output,
                    tpot_s=tpot_s,
                    itl_s=itl_s if self.reports["itl"] else None,
                    output_tokens_per_s=output * cell.concurrency / (ttft_s + (output - 1) * tpot_s),  # Little's law
                    ttft_s=ttft_s,
                    tokens_per_round=one.tokens_per_round if self.reports["itl"] and cell.draft_len else None,
                    acceptance=list(one.acceptance) if self.reports["acceptance"] else [],
                    tensor_parallel=self.target.tensor_parallel,
                    source=f"engine {self.seed}",
                )
            )
        return out

    def profile(self, cells: Sequence[Cell], rng: np.random.Generator) -> ServingProfile:
        """What an import of those runs would give."""
        sized = {name: method for name, method in self.methods.items() if method.at and self.sizes_known}
        return ServingProfile(
            source=f"synthetic engine {self.seed}",
            date="2026-01-01T00:00:00Z",
            planner_version=planner.__version__,
            model=self.model_size(self.target, weights_bytes(self.target)),
            drafters={name: self.model_size(method.at, drafter_bytes(method, self.target)) for name, method in sized.items()},
            system=SystemSpec(
                name=self.target.gpu.name,
                memory_bytes=int(self.target.gpu.memory_gib * GIB),
                fraction=self.scheduler.fraction,
                bandwidth_bytes_per_s=self.target.gpu.bandwidth,
                flops_per_s=self.target.gpu.flops,
            ),
            cells=self.measure(cells, rng),
        )

    @staticmethod
    def model_size(at: Placement, weights: float) -> ModelSize:
        model = at.model
        return ModelSize(
            name=model.name,
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            weights_bytes=int(weights),
            kv_bytes_per_element=at.kv_bytes,
            hidden_size=model.hidden,
            intermediate_size=model.intermediate,
            num_heads=model.num_heads,
            vocab_size=model.vocab,
        )

    def import_flags(self) -> list[str]:
        """What goes with the table on the command line of `planner import bench`."""
        profile_sizes = {"": (self.target, weights_bytes(self.target))}
        profile_sizes |= {name: (m.at, drafter_bytes(m, self.target)) for name, m in self.methods.items() if m.at and self.sizes_known}
        flags = []
        for name, (at, weights) in profile_sizes.items():
            spec = f"num_layers={at.model.num_layers},num_kv_heads={at.model.num_kv_heads},head_dim={at.model.head_dim}"
            spec += f",weights_gib={weights / GIB:.4f},kv_bytes_per_element={at.kv_bytes:g}"
            flags += ["--draft-model", f"{name}={spec}"] if name else ["--model", spec]
        return [*flags, "--system", f"memory_gib={self.target.gpu.memory_gib:g},fraction={self.scheduler.fraction:g}"]

    def table(self, path: Path, cells: Sequence[Cell], rng: np.random.Generator) -> None:
        """The same runs as the CSV that `planner import bench` reads; empty where this benchmark does not say."""
        measured = self.measure(cells, rng)
        names = ["drafter", "draft_len", "concurrency", "context_len", "output_len", "tpot_s", "itl_s", "output_tokens_per_s", "ttft_s"]
        names += ["tokens_per_round", *(f"acceptance_{i + 1}" for i in range(MAX_DRAFT_LEN)), "tp"]
        with path.open("w", newline="") as file:
            rows = csv.DictWriter(file, names, restval="")
            rows.writeheader()
            for cell in measured:
                row = {name: getattr(cell, name) for name in names[:10] if getattr(cell, name) is not None}
                row |= {f"acceptance_{i + 1}": value for i, value in enumerate(cell.acceptance)}
                rows.writerow(row | {"drafter": "" if cell.drafter == OFF else cell.drafter, "tp": cell.tensor_parallel})


def weights_bytes(at: Placement) -> float:
    """Of a whole model; embeddings and head stay in 16 bit."""
    return at.model.num_layers * at.model.layer_weights * at.weight_bytes + 2 * 2 * at.model.head_weights


def drafter_bytes(method: Method, target: Placement) -> float:
    """Of a whole drafter: heads share the target's embeddings."""
    if method.kind == "draft_model":
        return weights_bytes(method.at)
    fused = 3 * target.model.hidden**2 * 2  # joins hidden states of the target
    own_head = method.vocab * target.model.hidden * 2 if method.kind == "eagle3" else 0
    return method.at.model.num_layers * method.at.model.layer_weights * method.at.weight_bytes + fused + own_head


def kv_bytes_per_token(at: Placement) -> float:
    """On one rank."""
    return 2 * at.model.num_layers * math.ceil(at.model.num_kv_heads / at.tensor_parallel) * at.model.head_dim * at.kv_bytes


def place(model: Decoder, gpu: Gpu, tensor_parallel: int, rng: np.random.Generator, weight_bytes: float = 2, kv_bytes: float = 2) -> Placement:
    lumps = np.exp(rng.normal(0, 0.03, (4, len(LUMPS) + 1)))
    return Placement(model, gpu, tensor_parallel, weight_bytes, kv_bytes, lumps, verify_read=float(rng.uniform(1.0, 1.4)))


def make_method(kind: str, target: Placement, draft_model: Decoder | None, texts, rng: np.random.Generator) -> Method:
    """A drafter of a method, its glue and taxes drawn."""
    model, gpu, tp = target.model, target.gpu, target.tensor_parallel
    at, vocab, max_draft_len = None, model.vocab, int(rng.choice([5, 8]))
    if kind == "draft_model":
        at = place(draft_model, gpu, tp if tp <= draft_model.num_kv_heads and rng.random() < 0.5 else 1, rng)
    elif kind == "eagle3":
        dense = model.intermediate if not model.experts else 4 * model.hidden
        at = place(model._replace(name="eagle3 head", num_layers=1, intermediate=dense, experts=0, experts_per_token=0), gpu, tp, rng)
        vocab = 32000
    elif kind == "mtp":
        at = place(model._replace(name="mtp layer", num_layers=1), gpu, tp, rng, weight_bytes=target.weight_bytes)
        max_draft_len = int(rng.choice([3, 5]))
    elif kind == "dflash":
        at = place(model._replace(name="dflash drafter", num_layers=5, experts=0, experts_per_token=0), gpu, tp, rng)
        if model.experts:
            at = at._replace(model=at.model._replace(intermediate=4 * model.hidden))
        max_draft_len = 8
    tax = {"draft_model": (0.07, 0.22), "eagle3": (0.07, 0.18), "mtp": (0.02, 0.10), "dflash": (0.05, 0.15), "ngram": (0.01, 0.05)}[kind]
    return Method(
        kind=kind,
        at=at,
        vocab=vocab,
        max_draft_len=max_draft_len,
        pass_s=float(rng.uniform(2e-4, 9e-4)),
        request_s=float(rng.uniform(15e-6, 80e-6) if kind == "ngram" else rng.uniform(0, 6e-6)),
        idle_tax=float(rng.uniform(*tax)),
        blocks_async=kind == "ngram" or rng.random() < 0.4,
        drafted=draw_drafted(texts, kind, rng),
    )


def make_scheduler(gpu: Gpu, rng: np.random.Generator) -> Scheduler:
    pads_tokens = bool(rng.random() < 0.65)
    small = gpu.memory_gib < 60
    return Scheduler(
        round_s=float(rng.uniform(2e-4, 1.5e-3)),
        request_s=float(rng.uniform(4e-6, 18e-6)),
        overlapped=bool(rng.random() < 0.6),
        pads_tokens=pads_tokens,
        largest_graph=int(rng.choice([256, 512, 1024] if pads_tokens else [32, 80, 160] if small else [160, 256, 512])),
        eager_layer_s=float(rng.uniform(1.0e-4, 3.0e-4)),
        chunk=int(rng.choice([2048, 4096, 8192])),
        cached=float(rng.choice([0.0, 0.8, 1.0], p=[0.6, 0.2, 0.2])),
        max_running=int(rng.choice([128, 256, 512, 1024], p=[0.15, 0.35, 0.25, 0.25])),
        fraction=float(rng.choice([0.85, 0.9, 0.92, 0.95])),
        reserve_bytes=float(rng.uniform(1.0, 3.5)) * GIB,
        pool_error=float(rng.uniform(-0.05, 0.05)),
        held_output=float(rng.uniform(0.5, 1.0)),
    )


def random_engine(seed: int) -> Engine:
    """An engine that could be: the target fits with room for a few requests, and so does each of its drafters."""
    rng = np.random.default_rng([2606, seed])
    while True:
        engine = _draw(seed, rng)
        room = [engine.capacity(name, k, context) for context in engine.contexts for name, k in engine.settings()]
        if min(room) >= 2 and max(room) >= 6:
            return engine


def _draw(seed: int, rng: np.random.Generator) -> Engine:
    target = list(FAMILIES)[rng.integers(len(FAMILIES))]
    gpu = GPUS[rng.integers(len(GPUS))]
    tps = [tp for tp in (1, 2, 4, 8) if tp <= min(gpu.max_tensor_parallel, target.num_kv_heads)]
    tps = [tp for tp in tps if tp == 1 or 2 * target.num_layers * target.layer_weights / tp > 0.05 * gpu.memory_gib * GIB]  # nobody cuts finer
    at = place(target, gpu, int(rng.choice(tps)), rng, float(rng.choice([2, 1], p=[0.7, 0.3])), float(rng.choice([2, 1], p=[0.85, 0.15])))
    kinds = ["eagle3", "ngram", "mtp", "dflash"] + ["draft_model"] * bool(FAMILIES[target])
    chance = np.array([{"eagle3": 0.3, "ngram": 0.15, "mtp": 0.2, "dflash": 0.1, "draft_model": 0.35}[kind] for kind in kinds])
    kinds = rng.choice(kinds, size=int(rng.integers(1, 4)), replace=False, p=chance / chance.sum())
    texts = draw_texts(rng)
    methods = {}
    for kind in map(str, kinds):
        small = FAMILIES[target][rng.integers(len(FAMILIES[target]))] if kind == "draft_model" else None
        methods[kind] = make_method(kind, at, small, texts, rng)
    contexts = sorted(int(round(np.exp(rng.uniform(np.log(500), np.log(32000))), -2)) for _ in range(1 + int(rng.random() < 0.25)))
    scheduler = make_scheduler(gpu, rng)
    engine = Engine(
        seed,
        at,
        methods,
        scheduler,
        {context: int(rng.choice([128, 256, 512, 1024, 2048], p=[0.1, 0.25, 0.3, 0.25, 0.1])) for context in contexts},
        rng.uniform(0.005, 0.02),
    )
    engine.reports = {"acceptance": bool(rng.random() < 0.75), "itl": bool(rng.random() < 0.85)}
    engine.sizes_known = bool(rng.random() < 0.9)
    return engine


def twelve_cells(engine: Engine, drafter: str, rng: np.random.Generator | None = None) -> list[Cell]:
    """The dozen that a sensible user measures of a drafter; off is one of them, with six concurrencies (eight of two contexts).

    Ends included, K in staircases at spread concurrencies. With an rng the inner cells are drawn instead.
    """
    contexts = engine.contexts
    if drafter == OFF:
        spread = (1, 4, 16, 64, 128, 256) if len(contexts) == 1 else (1, 8, 64, 256)
        return [Cell(OFF, 0, concurrency, context) for context in contexts for concurrency in spread]
    k = engine.methods[drafter].max_draft_len
    half = (k + 1) // 2
    ends = [(1, k), (256, k), (1, 1), (256, 1), (256, 0)]
    rows = [(1, half), (256, half), (8, 2), (8, k), (32, 1), (32, half + 1), (128, 2)]
    if rng is not None:
        free = [(c, n) for c in CONCURRENCIES for n in range(k + 1) if (c, n) not in ends]
        rows = [free[i] for i in rng.choice(len(free), size=7, replace=False)]
    cells = [*ends, *rows]
    return [Cell(drafter, n, c, contexts[i % len(contexts)]) for i, (c, n) in enumerate(cells)]


def measured_cells(engine: Engine, rng: np.random.Generator | None = None) -> list[Cell]:
    """A dozen of each drafter, and off."""
    return [cell for name in (OFF, *engine.methods) for cell in twelve_cells(engine, name, rng)]


def qwen_on_h100() -> Engine:
    """Qwen3-32B with Qwen3-1.7B on one 80 GB GPU, as in a public vLLM run: 23.65 ms a step at batch 1, and 24.35 + 2.5 K a round."""
    rng = np.random.default_rng(0)
    gpu = next(gpu for gpu in GPUS if gpu.name == "h100_sxm")
    target = place(QWEN_32B, gpu, 1, rng)._replace(lumps=np.ones((4, len(LUMPS) + 1)))
    method = make_method("draft_model", target, QWEN_17B, draw_texts(rng), rng)
    method = method._replace(at=method.at._replace(lumps=np.ones((4, len(LUMPS) + 1))), pass_s=3e-4, blocks_async=False, max_draft_len=8)
    scheduler = make_scheduler(gpu, rng)._replace(round_s=1e-3, overlapped=True, fraction=0.95, reserve_bytes=1.5 * GIB)
    return Engine(-1, target, {"draft_model": method}, scheduler._replace(pads_tokens=True, largest_graph=512), {500: 128}, 0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2])
    engine = qwen_on_h100()
    print(engine, "\nK     ", *range(9), "\nround ", *(f"{1e3 * engine.truth('draft_model', k, 1, 500).round_s:.2f}" for k in range(1, 9)))
    for seed in parser.parse_args().seeds:
        engine = random_engine(seed)
        print(f"\n{engine}\ncapacity of off {engine.capacity(OFF, 0, engine.contexts[0]):.0f} requests\nTPOT ms at concurrency", *CONCURRENCIES)
        for context in engine.contexts:
            for name, k in engine.settings():
                print(f"{context:6} {name:12} {k}", *(f"{1e3 * engine.truth(name, k, c, context).tpot_s:8.2f}" for c in CONCURRENCIES))


if __name__ == "__main__":
    main()
