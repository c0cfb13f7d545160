"""Our runtime beside transformers, llama.cpp and what the memory allows: seconds of a step, SmolLM2-135M, batch 1.

The same real text behind all of them, measured in turn over several rounds of one run; a ratio is taken within a round,
and the median over rounds is shown. Ours over theirs: below 1, ours is faster.

plain step    one token through the model, its logits, a token sampled from them and read back
verification  one pass over VERIFY_LEN tokens, the logits of all of them; nothing kept
draft step    one token of self_sparse at DRAFT_BUDGET, timed in decode() at K = DRAFT_LEN with the target running in between
prompt lookup seconds per token of greedy text, our n-gram drafter against generate(prompt_lookup_num_tokens), both at
              K = DRAFT_LEN; the two look up different lengths (ours 4 down to 2 tokens, theirs 2 down to 1)
floor         bytes that a pass must read (weights and KV, bfloat16) over the best read bandwidth of the run

Ours and transformers compute in bfloat16. llama.cpp reads the 4-bit file (Q4_1), about a third of the bytes.
"""

import math
import statistics
import time
from collections import defaultdict

import torch
from common import progress, report_tables, texts, wants_json
from others import Transformers, llama_cpp_name, median_s, open_llama_cpp

from planner.commands.session import open_session
from planner.datasets import expand
from planner.profiler.texts import draw_prompts
from planner.profiler.timer import PhaseTimer
from planner.runtime.decode import decode
from planner.runtime.drafters import make_drafter
from planner.runtime.model import prefill
from planner.runtime.weights import default_model_path
from planner.specs import PLAIN, DraftConfig, DrafterSpec, Sampler, SparseKV

CONTEXT_LEN = 4096  # of the figures
OTHER_CONTEXT_LENS = (8000, 512)  # in this order llama.cpp goes on from the prompt it has
NUM_ROUNDS = {512: 5, 4096: 7, 8000: 3}
LATEST_START_S = {8000: 240.0, 512: 430.0}  # a context is begun only before: it takes 150 s or 20 s, and all must end within eight minutes
VERIFY_LEN, VERIFY_REPEATS = 8, 4
PLAIN_STEPS = 16
DRAFT_BUDGET, DRAFT_LEN, DRAFT_ROUNDS = 256, 4, 8
CURVE_LENS, CURVE_REPEATS = (1, 2, 4, 8, 16, 32, 64), 3
LOOKUP_TOKENS, LOOKUP_ROUNDS = 64, 2  # each processes the prompt anew in transformers
LLAMA_CPP_STEPS = 32
FLOOR_BYTES = 400 * 10**6  # much larger than any cache of a CPU
WARMUP = 2  # steps or rounds before the timed ones
ROOM = 80  # slots behind the prompt, enough for each of these


class Ours:
    """Our runtime with one prompt in its cache: the only place here that calls it."""

    def __init__(self):
        self.session = open_session("smollm2")
        self.model = self.session.model
        self._drafters = {weights: make_drafter(config, self.model) for weights, config in self._draft_configs().items()}

    @staticmethod
    def _draft_configs() -> dict[str, DraftConfig]:
        """By weights."""
        specs = {weights: DrafterSpec(kind="self_sparse", weights=weights) for weights in ("int8", "int4")}
        return {weights: DraftConfig(drafter=spec, kv=SparseKV(budget=DRAFT_BUDGET), draft_len=DRAFT_LEN) for weights, spec in specs.items()}

    def prefill(self, prompt: list[int]) -> None:
        self.prompt = prompt
        self.cache = self.model.new_cache(len(prompt) + ROOM)
        self.first_logits = prefill(self.model, torch.tensor([prompt]), self.cache)

    @torch.inference_mode()
    def verify_s(self, tokens: torch.Tensor, count: int) -> float:
        cache, n = self.cache, tokens.shape[1]
        cache.truncate(len(self.prompt))

        def step() -> None:
            positions = torch.arange(cache.lengths[0], cache.lengths[0] + n)[None]
            self.model.logits(self.model(tokens, positions, cache).hidden)

        return median_s(step, count, warmup=WARMUP)

    def plain_step_s(self, count: int) -> float:
        phases = self._phases(make_drafter(PLAIN, self.model), 0, WARMUP + count)
        return statistics.median([sum(parts) for parts in zip(phases["draft"], phases["verify"], phases["commit"], strict=True)][WARMUP:])

    def draft_step_s(self, weights: str, num_rounds: int) -> float:
        phases = self._phases(self._drafters[weights], DRAFT_LEN, WARMUP + num_rounds)
        return statistics.median(phases["draft"][WARMUP:]) / DRAFT_LEN

    @property
    def draft_weights(self) -> list[str]:
        return list(self._drafters)

    def prompt_lookup_s(self, draft_len: int, num_tokens: int) -> float:
        """Seconds per later token of greedy decoding with the n-gram drafter; its index of the prompt is made before the first."""
        drafter = make_drafter(DraftConfig(drafter=DrafterSpec(kind="ngram"), draft_len=draft_len), self.model)
        rounds = self._decode(drafter, draft_len, num_tokens, Sampler(temperature=0.0))
        next(rounds)
        begin = time.perf_counter()
        emitted = sum(len(round_.tokens[0]) for round_ in rounds)
        return (time.perf_counter() - begin) / emitted

    def _phases(self, drafter, draft_len: int, num_rounds: int) -> dict[str, list[float]]:
        """Seconds by phase of the first rounds of decoding at temperature 1, each as wide as draft_len."""
        timer = PhaseTimer(self.model.device)
        rounds = self._decode(drafter, draft_len, ROOM, Sampler(temperature=1.0), timer.mark)
        for _ in range(1 + num_rounds):  # the first is prefill's token
            next(rounds)
        return timer.seconds()

    def _decode(self, drafter, draft_len: int, max_new_tokens: int, sampler: Sampler, mark=lambda phase: None):
        self.cache.truncate(len(self.prompt))
        return decode(
            self.model, self.cache, [self.prompt], self.first_logits, drafter, draft_len=draft_len, sampler=sampler,
            generators=[torch.Generator(device=self.model.device).manual_seed(0)], max_new_tokens=max_new_tokens, mark=mark,
        )  # fmt: skip

    def bytes_read(self, context_len: int) -> int:
        """Of one pass: every weight once (the tied embedding as the head) and the committed keys and values."""
        return self.model.nbytes + context_len * self.model.spec.kv_bytes_per_token("bfloat16")

    def operations(self, n: int, context_len: int) -> int:
        """Multiplications and additions of one pass over n tokens: matrix products and attention."""
        spec = self.model.spec
        return 2 * spec.num_parameters * n + 4 * n * context_len * spec.num_heads * spec.head_dim * spec.num_layers


class Floor:
    """The read bandwidth of the memory: a sum over a buffer that no cache holds, the best of all repetitions."""

    def __init__(self):
        self._buffer = torch.ones(FLOOR_BYTES // 4)
        self.bandwidth_bytes_per_s = 0.0

    def measure(self) -> None:
        for _ in range(2):
            begin = time.perf_counter()
            self._buffer.sum()
            self.bandwidth_bytes_per_s = max(self.bandwidth_bytes_per_s, self._buffer.nbytes / (time.perf_counter() - begin))


def measure_context(ours: Ours, theirs: Transformers, llama_cpp, floor: Floor, prompt: list[int]) -> list[dict[str, float]]:
    """Seconds by side and what, "static verify" for example; one dict per round, each with every side in turn."""
    ours.prefill(prompt)
    theirs.prefill(prompt, ROOM)
    if llama_cpp:
        llama_cpp.plain_step_s(prompt, 1)  # its prefill
    drafts = torch.tensor([prompt[:VERIFY_LEN]])
    rounds = []
    for number in range(NUM_ROUNDS[len(prompt)]):
        seconds = {"ours plain": ours.plain_step_s(PLAIN_STEPS)}
        for kind in theirs.CACHES:
            seconds[f"{kind} plain"] = theirs.plain_step_s(kind, PLAIN_STEPS // 2)
        if llama_cpp:
            seconds["llama.cpp plain"] = llama_cpp.plain_step_s(prompt, LLAMA_CPP_STEPS)
        floor.measure()
        seconds["ours verify"] = ours.verify_s(drafts, VERIFY_REPEATS)
        for kind in theirs.CACHES:
            seconds[f"{kind} verify"] = theirs.verify_s(kind, drafts, VERIFY_REPEATS)
        for weights in ours.draft_weights:
            seconds[f"ours draft {weights}"] = ours.draft_step_s(weights, DRAFT_ROUNDS)
        if len(prompt) == CONTEXT_LEN and number < LOOKUP_ROUNDS:
            seconds["ours lookup"] = ours.prompt_lookup_s(DRAFT_LEN, LOOKUP_TOKENS)
            seconds["dynamic lookup"] = theirs.prompt_lookup_s(DRAFT_LEN, LOOKUP_TOKENS)
        rounds.append(seconds)
        progress(f"context {len(prompt)}: round {number + 1} of {NUM_ROUNDS[len(prompt)]}")
    return rounds


def median_of(rounds: list[dict[str, float]], name: str) -> float:
    return statistics.median(seconds[name] for seconds in rounds if name in seconds)


def ratio_of(rounds: list[dict[str, float]], ours: str, theirs: str) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(seconds[ours] / seconds[theirs] for seconds in rounds if ours in seconds and theirs in seconds)


def compare(rounds: list[dict[str, float]], context_len: int, floor_s: float, llama_cpp: str | None) -> tuple[list[dict], dict[str, float]]:
    """The rows of one context, and its figures."""
    rows, figures = [], {}

    def fastest(what: str) -> str:
        return min((f"{kind} {what}" for kind in Transformers.CACHES), key=lambda name: median_of(rounds, name))

    def add(what: str, ours: str, other: str, other_s: float, ratio: float, note: str = "") -> None:
        rows.append(
            {
                "context": context_len, "what": what, "ours, ms": f"{1000 * median_of(rounds, ours):.2f}", "beside": other,
                "theirs, ms": f"{1000 * other_s:.2f}", "ours / theirs": f"{ratio:.3f}", "note": note,
            }
        )  # fmt: skip

    for what, title, figure in (("plain", "plain step", "plain_step"), ("verify", f"verification of {VERIFY_LEN}", f"verify{VERIFY_LEN}")):
        best = fastest(what)
        for kind in Transformers.CACHES:
            name = f"{kind} {what}"
            ratio = ratio_of(rounds, f"ours {what}", name)
            add(title, f"ours {what}", f"transformers, {kind} cache", median_of(rounds, name), ratio, "the faster cache" if name == best else "")
        figures[f"{figure}_vs_transformers"] = ratio_of(rounds, f"ours {what}", best)
    figures["plain_step_vs_floor"] = median_of(rounds, "ours plain") / floor_s
    add("plain step", "ours plain", "bandwidth floor", floor_s, figures["plain_step_vs_floor"])
    if "llama.cpp plain" in rounds[0]:
        figures["plain_step_vs_llama_cpp"] = ratio_of(rounds, "ours plain", "llama.cpp plain")
        add(
            "plain step",
            "ours plain",
            "llama.cpp",
            median_of(rounds, "llama.cpp plain"),
            figures["plain_step_vs_llama_cpp"],
            f"4-bit Q4_1, {llama_cpp}",
        )
    else:
        missing = {"beside": "llama.cpp", "theirs, ms": "not installed", "ours / theirs": "", "note": "pip install xllamacpp"}
        rows.append(rows[0] | missing)
    drafts = {}
    for name in sorted(name for name in rounds[0] if name.startswith("ours draft")):
        drafts[name] = ratio_of(rounds, name, "ours plain")
        title = f"draft step, budget {DRAFT_BUDGET}, {name.split()[-1]} weights"
        add(title, name, "ours, plain step", median_of(rounds, "ours plain"), drafts[name], f"per token at K={DRAFT_LEN}")
    figures["draft_step_vs_plain_step"] = min(drafts.values())
    if "ours lookup" in rounds[0]:
        figures["prompt_lookup_vs_transformers"] = ratio_of(rounds, "ours lookup", "dynamic lookup")
        theirs_s = median_of(rounds, "dynamic lookup")
        note = f"ms per token, K={DRAFT_LEN}, greedy"
        add("prompt lookup", "ours lookup", "transformers, generate", theirs_s, figures["prompt_lookup_vs_transformers"], note)
    return rows, figures


def curve(ours: Ours, floor: Floor) -> dict[int, float]:
    """Seconds of a pass by its width, behind the prompt that was prefilled last."""
    floor.measure()
    return {n: ours.verify_s(torch.tensor([ours.prompt[:n]]), CURVE_REPEATS) for n in CURVE_LENS}


def main() -> None:
    as_json = wants_json(__doc__)
    began = time.perf_counter()
    path = default_model_path()
    ours, theirs, floor = Ours(), Transformers(path), Floor()
    longest = max(CONTEXT_LEN, *OTHER_CONTEXT_LENS)
    llama_cpp = open_llama_cpp(path, ours.model.spec.max_context_len)
    prompt = draw_prompts(ours.session.tokenizer, expand([texts()]), length=longest, count=1, seed=0)[0].tokens

    rounds, curves = {}, defaultdict(dict)
    for context_len in (CONTEXT_LEN, *OTHER_CONTEXT_LENS):
        if time.perf_counter() - began > LATEST_START_S.get(context_len, math.inf):
            progress(f"context {context_len} is left out: {LATEST_START_S[context_len]:.0f} s are over")
            continue
        rounds[context_len] = measure_context(ours, theirs, llama_cpp, floor, prompt[:context_len])
        curves[context_len] = curve(ours, floor)

    bandwidth = floor.bandwidth_bytes_per_s
    compared = {c: compare(rounds[c], c, ours.bytes_read(c) / bandwidth, llama_cpp_name()) for c in sorted(rounds)}
    widths = [
        {
            "context": context_len, "tokens": n, "ms": f"{1000 * seconds:.2f}", "bytes read, MB": f"{ours.bytes_read(context_len) / 1e6:.0f}",
            "operations, GFLOP": f"{ours.operations(n, context_len) / 1e9:.2f}", "GFLOP/s": f"{ours.operations(n, context_len) / seconds / 1e9:.0f}",
            "floor, ms": f"{1000 * ours.bytes_read(context_len) / bandwidth:.2f}", "ours / floor": f"{seconds * bandwidth / ours.bytes_read(context_len):.2f}",
        }
        for context_len in sorted(curves)
        for n, seconds in curves[context_len].items()
    ]  # fmt: skip
    tables = {
        f"A step, medians over {', '.join(f'{len(rounds[c])} rounds at {c}' for c in sorted(rounds))} tokens of context": [
            row for rows, _ in compared.values() for row in rows
        ],
        f"A verification pass by its width, medians of {CURVE_REPEATS}; the memory reads {bandwidth / 1e9:.1f} GB/s": widths,
    }
    report_tables(tables, compared[CONTEXT_LEN][1], as_json)
    progress(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
