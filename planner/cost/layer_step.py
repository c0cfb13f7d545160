"""An engine step from times of one decoder layer's kernels, as a StepCost of the simulator: what the tables say, added up.

    step = embedding + layers (2 norms + qkv + rotary + attention + o + gate_up + act + down) + final norm + head + sampler + overhead

Dense kernels follow from the tokens of the step, which CUDA graphs round up to a captured size. Attention is interpolated linearly
between the measured points, over the chunk and what lies before it, the requests that decode and their mean length. Several
prompts in a step count as one with as many (query, key) pairs. Nothing is extrapolated: a step outside the tables is refused.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from planner.errors import BadInput

PER_LAYER = {"layernorm": 2, "qkv_proj": 1, "rotary_emb": 1, "o_proj": 1, "gate_up_proj": 1, "act_fn": 1, "down_proj": 1}
ONCE = {"embedding": 1, "final_layernorm": 1}
PER_SEQUENCE = {"lm_head": 1, "sampler": 1}
CAPTURED = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))  # vLLM's graph sizes up to max_cudagraph_capture_size 512


class LayerStep:
    """Seconds of steps without a drafter, whose cost the tables do not have."""

    def __init__(self, tables, num_layers: int, *, captured: Sequence[int] = CAPTURED, overhead_s: float = 0.0):
        """tables  importers.layer_tables.LayerTables; captured  sizes that graphs round tokens up to, none: eager
        overhead_s  of the host in every step, what kernels do not hide
        """
        for kind, curves, known in (("dense", tables.dense, PER_LAYER | ONCE), ("per_sequence", tables.per_sequence, PER_SEQUENCE)):
            if set(curves) != set(known):
                raise BadInput(f"{kind} must hold the layers {', '.join(known)}, got {', '.join(sorted(curves))[:200]}")
        if not (0 <= overhead_s < 1):
            raise BadInput(f"the overhead of a step must lie in [0, 1) seconds, got {overhead_s:g}")
        self.max_tokens = int(min(curve.at[-1] for curve in tables.dense.values()))
        self.max_sequences = int(min(curve.at[-1] for curve in tables.per_sequence.values()))
        tokens = _rounded_up(np.arange(1, self.max_tokens + 1), captured)
        times = {**{name: num_layers * times for name, times in PER_LAYER.items()}, **ONCE}
        self._dense_s = np.concatenate([[0.0], sum(count * np.interp(tokens, *tables.dense[name]) for name, count in times.items())])
        requests = np.arange(1, self.max_sequences + 1)
        self._per_sequence_s = np.concatenate([[0.0], sum(np.interp(requests, *curve) for curve in tables.per_sequence.values())])
        self._layers, self._overhead_s = num_layers, overhead_s
        prefilling = tables.attention[:, 0] > 0
        self._decode = _Grid("decode", tables.attention[~prefilling, 2:], tables.attention_s[~prefilling])
        self._mixed = _Grid("prefill", *_with_nobody(tables.attention[prefilling], tables.attention_s[prefilling]))

    def step_s(self, load) -> np.ndarray:
        """load  simulator.engine.StepLoad, of one step or of several"""
        if load.draft_len:
            raise BadInput(f"layer tables have no drafter and no verification, got draft_len {load.draft_len}; simulate off")
        tokens, requests = load.prefill_tokens + load.decode_requests, load.prefill_requests + load.decode_requests
        if np.max(tokens) > self.max_tokens or np.max(requests) > self.max_sequences:
            raise BadInput(
                f"the layer tables reach {self.max_tokens} tokens and {self.max_sequences} requests a step, got {np.max(tokens)} and {np.max(requests)}; "
                "measure more, or lower max_num_batched_tokens and max_num_seqs"
            )
        attention_s = self._attention_s(load)
        return self._dense_s[tokens] + self._per_sequence_s[requests] + self._layers * attention_s + self._overhead_s

    def _attention_s(self, load) -> np.ndarray:
        """Of steps; those that differ in no more than how long texts are, at once."""
        if np.ptp(load.decode_requests) or np.any(load.prefill_tokens) and np.ndim(load.prefill_tokens):
            columns = np.broadcast_arrays(*load[:5])
            return np.array([self._attention_s(type(load)(*(column[i] for column in columns), 0)) for i in range(len(columns[0]))])
        decoding = int(np.max(load.decode_requests))
        mean = load.decode_context / max(decoding, 1)
        if not np.any(load.prefill_tokens):
            return self._decode.at((decoding,), mean)
        chunk = load.prefill_tokens
        before = load.prefill_pairs / chunk - (chunk + 1) / 2
        if before < 0:  # several prompts
            chunk, before = (math.sqrt(8 * load.prefill_pairs + 1) - 1) / 2, 0.0
        return self._mixed.at((chunk, before, decoding), mean)


class _Grid:
    """Times on a full grid, linear between its points.."""

    def __init__(self, name: str, points: np.ndarray, seconds: np.ndarray):
        """points [rows, axes]"""
        self._name = name
        self.axes = [np.unique(column) for column in points.T]
        if any(len(axis) < 2 for axis in self.axes):
            raise BadInput(f"attention must have {name} rows at two values of each column, got {[len(axis) for axis in self.axes]}")
        self._seconds = np.full([len(axis) for axis in self.axes], np.nan)
        self._seconds[tuple(np.searchsorted(axis, column) for axis, column in zip(self.axes, points.T, strict=True))] = seconds
        if np.isnan(self._seconds).any():
            missing = [int(axis[i]) for axis, i in zip(self.axes, np.argwhere(np.isnan(self._seconds))[0], strict=True)]
            raise BadInput(f"attention must have a {name} row for every combination of its values, {missing} is missing")

    def at(self, fixed: tuple[float, ...], last: np.ndarray) -> np.ndarray:
        """Seconds at the first axes' values and any number of the last one's; below an axis's first value, at that."""
        line = self._seconds
        for axis, value in zip(self.axes, fixed, strict=False):
            self._check(axis, value)
            i = min(max(bisect_right(axis, value) - 1, 0), len(axis) - 2)
            share = max((value - axis[i]) / (axis[i + 1] - axis[i]), 0.0)
            line = (1 - share) * line[i] + share * line[i + 1]
        self._check(self.axes[-1], np.max(last))
        return np.interp(last, self.axes[-1], line)

    def _check(self, axis: np.ndarray, value: float) -> None:
        if value > axis[-1]:
            raise BadInput(f"an axis of the attention table's {self._name} rows reaches {axis[-1]}, a step has {value:.0f}; measure further")


def _with_nobody(points: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows without decoding requests stand for every length of theirs."""
    alone = points[:, 2] == 0
    lengths = np.unique(points[~alone, 3])
    repeated = np.repeat(points[alone], len(lengths), axis=0)
    repeated[:, 3] = np.tile(lengths, alone.sum())
    return np.concatenate([points[~alone], repeated]), np.concatenate([seconds[~alone], np.repeat(seconds[alone], len(lengths))])


def _rounded_up(tokens: np.ndarray, captured: Sequence[int]) -> np.ndarray:
    sizes = np.array(sorted(captured))
    if not len(sizes):
        return tokens
    at = np.searchsorted(sizes, tokens)
    return np.where(at < len(sizes), np.minimum(sizes[np.minimum(at, len(sizes) - 1)], tokens.max()), tokens)
