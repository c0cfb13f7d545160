"""Do we compute what transformers computes? Random small models of every family, in float32, each saved by transformers and loaded by us.

Logits of one pass, of prefill in chunks, and of passes over one token each, beside transformers' single pass; and what both write
greedily. Fifteen seconds on a CPU. tests/runtime/test_model.py runs the same cases.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from common import report, wants_json
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from planner.runtime.model import Transformer, build_model
from planner.runtime.weights import load_checkpoint

LENGTH, DRAWN, VOCAB_SIZE = 56, 8, 97  # tokens read, tokens written greedily behind them
SIZES = {
    "hidden_size": 32, "intermediate_size": 56, "vocab_size": VOCAB_SIZE, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "initializer_range": 0.25, "tie_word_embeddings": False,
}  # fmt: skip
SHORT = {"max_position_embeddings": 32}  # a text goes beyond the original context, where scaling shows


def _rope(kind: str, **values) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **values}}


class Case(NamedTuple):
    """A model, and how it is saved and opened."""

    family: str
    variant: str
    config: dict = {}
    save: dict = {}
    max_context_len: int | None = None

    @property
    def name(self) -> str:
        return f"{self.family}, {self.variant}"


CASES = [
    Case("llama", "plain"),
    Case("llama", "tied", {"tie_word_embeddings": True}),
    Case("llama", "no groups, theta 5e5", {"num_key_value_heads": 4, **_rope("default") | {"rope_theta": 5e5}}),
    Case("llama", "in shards", save={"max_shard_size": "20KB"}),
    Case("llama", "linear", _rope("linear", factor=4.0)),
    Case("llama", "llama3", _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)),
    Case("llama", "yarn", _rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    Case("llama", "yarn, its own factors", _rope("yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.3, beta_fast=8.0,
        beta_slow=2.0, truncate=False)),
    Case("llama", "yarn, mscale", _rope("yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=0.4)),
    Case("llama", "dynamic, within the context", _rope("dynamic", factor=4.0)),
    Case("llama", "dynamic, beyond it", SHORT | _rope("dynamic", factor=4.0), max_context_len=LENGTH),
    Case("mistral", "plain", {"sliding_window": None}),
    Case("mistral", "tied, in shards, a wide window", {"sliding_window": 512, "tie_word_embeddings": True}, {"max_shard_size": "20KB"}),
    Case("qwen2", "plain"),
    Case("qwen2", "tied", {"tie_word_embeddings": True}),
    Case("qwen2", "yarn, in shards", _rope("yarn", factor=4.0, original_max_position_embeddings=32), {"max_shard_size": "20KB"}),
    Case("qwen3", "plain"),
    Case("qwen3", "tied, wide heads", {"tie_word_embeddings": True, "head_dim": 24}),
    Case("qwen3", "yarn, in shards", _rope("yarn", factor=4.0, original_max_position_embeddings=32), {"max_shard_size": "20KB"}),
]  # fmt: skip


class Agreement(NamedTuple):
    """Largest absolute differences of logits from transformers' single pass over LENGTH tokens."""

    largest_logit: float
    one_pass: float
    chunks: float
    single_tokens: float
    same_greedy_tokens: bool


def reference(case: Case) -> PreTrainedModel:
    """Random weights, norms and biases that matter."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.family, **SIZES | case.config)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                parameter.copy_(("norm" in name) + 0.3 * torch.randn(parameter.shape))
    return theirs


def compare(case: Case, folder: Path) -> Agreement:
    """Saves transformers' model to the folder, and runs both."""
    theirs = reference(case)
    theirs.save_pretrained(folder, **case.save)
    ours = build_model(load_checkpoint(folder, torch.float32, torch.device("cpu"), max_context_len=case.max_context_len))
    tokens = torch.randint(VOCAB_SIZE, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(tokens).logits
        passes = [in_passes(ours, tokens, width) for width in (LENGTH, 16, 1)]
        # dynamic scaling is fixed by the declared length here, and follows the text there: only what is that long agrees
        written = 0 if case.max_context_len else DRAWN
        greedy = [write(lambda text: theirs(text).logits, tokens, written), write(lambda text: in_passes(ours, text, text.shape[1]), tokens, written)]
    differences = [float((logits - expected).abs().max()) for logits in passes]
    return Agreement(float(expected.abs().max()), *differences, torch.equal(*greedy))


def in_passes(model: Transformer, tokens: torch.Tensor, width: int) -> torch.Tensor:  # [B, n, vocab_size]
    """Logits behind every token, read `width` at a time."""
    B, n = tokens.shape
    cache, logits = model.new_cache(n, batch=B), []
    for start in range(0, n, width):
        part = tokens[:, start : start + width]
        positions = torch.arange(start, start + part.shape[1]).expand(B, -1)
        logits.append(model.logits(model(part, positions, cache).hidden))
        cache.commit([part.shape[1]] * B)
    return torch.cat(logits, 1)


def write(logits_of, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """The tokens, the greedy choice behind each of them, and `count` more behind the last."""
    for _ in range(count):
        tokens = torch.cat([tokens, logits_of(tokens)[:, -1:].argmax(-1)], 1)
    return torch.cat([tokens, logits_of(tokens).argmax(-1)], 1)


def main() -> None:
    as_json = wants_json(__doc__)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows, figures = [], {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = compare(case, Path(folder))
        rows.append(
            {
                "family": case.family,
                "variant": case.variant,
                "largest logit": f"{found.largest_logit:.1f}",
                "max abs difference": f"{found.one_pass:.1e}",
                "in chunks": f"{found.chunks:.1e}",
                "token by token": f"{found.single_tokens:.1e}",
                "greedy tokens": "equal" if found.same_greedy_tokens else "DIFFER",
            }
        )
        figures[f"max_abs_difference/{case.name}"] = max(found.one_pass, found.chunks, found.single_tokens)
        figures[f"greedy_equal/{case.name}"] = float(found.same_greedy_tokens)
    report(rows, figures, as_json)


if __name__ == "__main__":
    main()
