"""planner generate: write text with any configuration, token by token."""

from collections.abc import Iterator
from typing import NamedTuple

from planner.commands.session import Session, check_length, load_drafters, open_session
from planner.errors import BadInput
from planner.specs import DraftConfig, Execution, Sampler, Weights


class Piece(NamedTuple):
    """What one round added."""

    text: str
    tokens: list[int]
    drafted: int
    accepted: int


def generate(
    model: str,
    prompt: str,
    *,
    config: DraftConfig,
    sampler: Sampler,
    max_new_tokens: int = 128,
    chat: bool = False,
    dtype: str = "bfloat16",
    device: str | None = None,
    execution: Execution | None = None,
    weights: Weights = "full",
    rope_theta: float | None = None,
    max_context_len: int | None = None,
    seed: int = 0,
) -> Iterator[Piece]:
    """Load everything, then stream a continuation of the prompt: first prefill's token, then a piece per round, then what a cut-off character left."""
    session = open_session(
        model, dtype=dtype, device=device, execution=execution, weights=weights, rope_theta=rope_theta, max_context_len=max_context_len
    )
    tokenizer = session.tokenizer
    tokens = tokenizer.encode_chat([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)
    if not chat and tokenizer.bos_token is not None:
        tokens = [tokenizer.bos_token, *tokens]
    load_drafters(session, [config.drafter])
    if not tokens:
        raise BadInput("a prompt needs at least one token, got an empty one; give --prompt TEXT or --prompt-file FILE")
    if max_new_tokens < 1:
        raise BadInput(f"there must be at least one token to write, got {max_new_tokens}; raise --max-new-tokens")
    check_length(session, [config.drafter], len(tokens), max_new_tokens)
    return _pieces(session, tokens, config, sampler, max_new_tokens, seed)


def _pieces(session: Session, tokens: list[int], config: DraftConfig, sampler: Sampler, max_new_tokens: int, seed: int) -> Iterator[Piece]:
    import torch

    from planner.runtime.decode import cache_capacity, decode
    from planner.runtime.drafters import make_drafter
    from planner.runtime.model import prefill

    tokenizer, runner = session.tokenizer, session.model
    cache = runner.new_cache(cache_capacity(len(tokens), max_new_tokens, config.verified))
    logits = prefill(runner, torch.tensor([tokens], device=runner.device), cache)
    rounds = decode(
        runner, cache, [tokens], logits, make_drafter(config, runner), draft_len=config.draft_len, sampler=sampler,
        generators=[torch.Generator(device=runner.device).manual_seed(seed)], max_new_tokens=max_new_tokens, stop_tokens=tokenizer.stop_tokens,
    )  # fmt: skip
    decoder = tokenizer.stream_decoder()
    for round_ in rounds:
        new = round_.tokens[0]
        text = "".join(decoder.push(token) for token in new if token not in tokenizer.stop_tokens)
        yield Piece(text, new, round_.drafted[0], round_.accepted[0])
    yield Piece(decoder.finish(), [], 0, 0)
