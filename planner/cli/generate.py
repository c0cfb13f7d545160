"""planner generate: flags to arguments."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

import planner
from planner.cli.app import app
from planner.cli.options import AsJson, Device, Dtype, Execution, MaxContext, Model, Quiet, RopeTheta, Seed, TargetWeights, takes
from planner.commands.flags import Asked
from planner.errors import BadInput


@app.command()
@takes(Asked)
def generate(
    asked: Asked,
    prompt: Annotated[str | None, typer.Option(help="The prompt itself.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file that holds it; - for standard input.")] = None,
    model: Model = "smollm2",
    temperature: Annotated[float, typer.Option(help="Sampling temperature, 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling, in (0, 1].")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens, 0 keeps all.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    execution: Execution = None,
    weights: TargetWeights = "full",
    rope_theta: RopeTheta = None,
    max_context: MaxContext = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write text with any configuration, streaming; what a plan's last line calls."""
    from planner.commands.configs import valid
    from planner.commands.trees import make_tree_config
    from planner.files import read_bytes
    from planner.report import terminal
    from planner.specs import Sampler

    if (prompt is None) == (prompt_file is None):
        raise BadInput("generate needs either --prompt TEXT or --prompt-file FILE (- for standard input)")
    if prompt_file is not None:
        content = sys.stdin.buffer.read() if str(prompt_file) == "-" else read_bytes(prompt_file, "prompt")
        prompt = content.decode("utf-8", errors="replace")
    config = make_tree_config(asked)
    sampler = valid(Sampler, temperature=temperature, top_p=top_p, top_k=top_k)
    pieces = planner.generate(
        model, prompt, config=config, sampler=sampler, max_new_tokens=max_new_tokens, chat=chat, dtype=dtype, device=device, execution=execution,
        weights=weights, rope_theta=rope_theta, max_context_len=max_context, seed=seed,
    )  # fmt: skip
    texts, tokens, accepted, times = [], [], [], []
    began = time.perf_counter()
    for piece in pieces:
        times.append(time.perf_counter())
        texts.append(piece.text)
        tokens.append(len(piece.tokens))
        accepted.append(piece.accepted)
        if not as_json:
            terminal.write_text(piece.text)
    rounds = len(tokens) - 2  # without prefill's token and the closing piece
    decode_s = times[-2] - times[0] if rounds > 0 else 0.0
    if as_json:
        terminal.print_json(
            {"text": "".join(texts), "num_tokens": sum(tokens), "num_rounds": max(0, rounds), "ttft_s": times[0] - began, "decode_s": decode_s}
        )
        return
    terminal.write_text("\n")
    if not quiet:
        terminal.show_generation_stats(num_tokens=sum(tokens), num_rounds=max(0, rounds), decode_s=decode_s, ttft_s=times[0] - began)
