"""Other runtimes on the default model, for the benchmarks to stand ours beside. Times are seconds.

transformers runs our own weights in bfloat16, put into a LlamaForCausalLM: nothing is fetched. llama.cpp reads the GGUF
file as it is, 4-bit weights (Q4_1), so it moves a third of the bytes per token; its server's own timings are taken.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from planner.runtime.weights import load_checkpoint

WARMUP_STEPS = 2
PREFILL_CHUNK = 512  # as planner.runtime.model prefills


def median_s(step: Callable[[], object], count: int, *, warmup: int, rewind: Callable[[], object] = lambda: None) -> float:
    """Median seconds of `step` over `count` calls after `warmup` untimed ones; `rewind` runs before each, untimed."""
    seconds = []
    for _ in range(warmup + count):
        rewind()
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[warmup:])


class Transformers:
    """The target in transformers, its caches filled with one prompt: attention "sdpa", DynamicCache and StaticCache."""

    CACHES = ("dynamic", "static")

    def __init__(self, path: Path):
        from transformers import LlamaConfig, LlamaForCausalLM

        spec, tensors, _ = load_checkpoint(path, torch.bfloat16, torch.device("cpu"))
        self.config = LlamaConfig(
            hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size, vocab_size=spec.vocab_size, num_hidden_layers=spec.num_layers,
            num_attention_heads=spec.num_heads, num_key_value_heads=spec.num_kv_heads, head_dim=spec.head_dim, rms_norm_eps=spec.rms_norm_eps,
            max_position_embeddings=spec.max_context_len, rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
            tie_word_embeddings=spec.tie_embeddings, attn_implementation="sdpa", dtype=torch.bfloat16,
        )  # fmt: skip
        with torch.device("meta"):
            model = LlamaForCausalLM(self.config).eval()
        model.load_state_dict(tensors, assign=True, strict=False)
        if spec.tie_embeddings:
            model.tie_weights()
        model.model.rotary_emb = type(model.model.rotary_emb)(self.config)  # a buffer that the weights do not hold
        model.generation_config.eos_token_id = None  # every run writes as many tokens
        self.model = model

    @torch.inference_mode()
    def prefill(self, prompt: list[int], room: int) -> None:
        """Its own forward in chunks fills the dynamic cache; the static one, of len(prompt) + room slots, takes a copy."""
        from transformers import DynamicCache, StaticCache

        self.prompt = prompt
        dynamic = DynamicCache(config=self.config)
        for chunk in torch.tensor([prompt]).split(PREFILL_CHUNK, dim=1):
            output = self.model(chunk, past_key_values=dynamic, logits_to_keep=1)
        static = StaticCache(config=self.config, max_cache_len=len(prompt) + room)
        for index, layer in enumerate(dynamic.layers):
            static.update(layer.keys, layer.values, index)
        self.first_logits = output.logits[:, -1]
        self._caches = {"dynamic": dynamic, "static": static}

    @torch.inference_mode()
    def rewind(self, kind: str) -> None:
        """Forget what lies behind the prompt."""
        length = len(self.prompt)
        for layer in self._caches[kind].layers:
            if kind == "dynamic":
                layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
            else:
                layer.cumulative_length.fill_(length)

    @torch.inference_mode()
    def plain_step_s(self, kind: str, count: int) -> float:
        """One token through the model, its logits, and a token sampled from them and read back."""
        self.rewind(kind)
        token = self._sampled(self.first_logits)

        def step() -> None:
            nonlocal token
            token = self._sampled(self.model(token, past_key_values=self._caches[kind]).logits[:, -1])
            int(token)

        return median_s(step, count, warmup=WARMUP_STEPS)

    @torch.inference_mode()
    def verify_s(self, kind: str, tokens: Tensor, count: int) -> float:
        """One pass over tokens [1, n] behind the prompt, logits of all of them."""
        return median_s(lambda: self.model(tokens, past_key_values=self._caches[kind]), count, warmup=WARMUP_STEPS, rewind=lambda: self.rewind(kind))

    def prompt_lookup_s(self, draft_len: int, num_tokens: int) -> float:
        """Seconds per token of greedy generate(prompt_lookup_num_tokens=draft_len), from its first tokens on.

        It processes the prompt anew: assisted generation sends the whole prompt through whatever a cache given to it
        holds. A streamer tells when that pass is over.
        """
        streamer = _Clock()
        tokens = torch.tensor([self.prompt])
        self.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), prompt_lookup_num_tokens=draft_len, do_sample=False,
            max_new_tokens=num_tokens, streamer=streamer,
        )  # fmt: skip
        (first_s, _), *later = streamer.puts[1:]  # the first put is the prompt
        return (later[-1][0] - first_s) / sum(count for _, count in later)

    @staticmethod
    def _sampled(logits: Tensor) -> Tensor:  # [1, V] -> [1, 1]
        return torch.multinomial(torch.softmax(logits.float(), dim=-1), 1)


class _Clock:
    """A streamer of generate() that notes when tokens came and how many."""

    def __init__(self):
        self.puts: list[tuple[float, int]] = []

    def put(self, tokens: Tensor) -> None:
        self.puts.append((time.perf_counter(), tokens.numel()))

    def end(self) -> None:
        pass


def llama_cpp_name() -> str | None:
    """The installed package that carries llama.cpp, if there is one."""
    return next((name for name in ("xllamacpp", "llama_cpp") if importlib.util.find_spec(name)), None)


def open_llama_cpp(path: Path, max_context_len: int) -> "XLlamaCpp | LlamaCppPython | None":
    """llama.cpp with the model, as many threads as torch uses; None where it is not installed."""
    kinds = {"xllamacpp": XLlamaCpp, "llama_cpp": LlamaCppPython}
    name = llama_cpp_name()
    return None if name is None else kinds[name](path, max_context_len, torch.get_num_threads())


class XLlamaCpp:
    """llama.cpp's server inside this process, through xllamacpp."""

    def __init__(self, path: Path, max_context_len: int, num_threads: int):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.cache_ram_mib = max_context_len, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
        params.verbosity = -1
        self._server = xllamacpp.Server(params)

    def plain_step_s(self, prompt: list[int], count: int) -> float:
        """Mean seconds per generated token behind the prompt. A prompt that was the last one is still cached."""
        answer = self._server.handle_completions(
            {"prompt": prompt, "max_tokens": count, "temperature": 1.0, "ignore_eos": True, "cache_prompt": True}
        )  # fmt: skip
        timings = answer["timings"]
        if timings["predicted_n"] != count or timings["cache_n"] + timings["prompt_n"] != len(prompt):
            raise RuntimeError(f"llama.cpp was to write {count} tokens behind {len(prompt)}, its timings are {timings}")
        return timings["predicted_per_token_ms"] / 1000


class LlamaCppPython:
    """llama.cpp through llama-cpp-python. Written from its documentation and not yet run."""

    def __init__(self, path: Path, max_context_len: int, num_threads: int):
        from llama_cpp import Llama

        self._llama = Llama(str(path), n_ctx=max_context_len, n_threads=num_threads, n_threads_batch=num_threads, verbose=False)
        self._prompt: list[int] = []

    def plain_step_s(self, prompt: list[int], count: int) -> float:
        """Mean seconds per generated token behind the prompt. A prompt that was the last one is still cached."""
        if prompt != self._prompt:
            self._llama.reset()
            self._llama.eval(prompt)
            self._prompt = prompt
        self._llama.n_tokens = len(prompt)  # eval drops what lies behind
        token = prompt[-1]
        begin = time.perf_counter()
        for _ in range(count):
            self._llama.eval([token])
            token = self._llama.sample(temp=1.0)
        return (time.perf_counter() - begin) / count
