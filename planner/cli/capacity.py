"""planner capacity: flags to arguments."""

from typing import Annotated

import typer

import planner
from planner.cli.app import app
from planner.cli.options import AsJson
from planner.units import parse_bytes, parse_numbers


@app.command()
def capacity(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, a config.json, or num_layers=..,num_kv_heads=..,head_dim=..,weights_gib=..")
    ],
    system: Annotated[str, typer.Option(help="A device by name, as h100_sxm, or memory_gib=80,bandwidth_gb_s=3350,tflops=989.")],
    isl: Annotated[int, typer.Option("--isl", help="Prompt tokens.")],
    osl: Annotated[int, typer.Option("--osl", help="Generated tokens.")],
    draft_model: Annotated[
        list[str] | None,
        typer.Option(
            help="SPEC or NAME=SPEC, repeatable; the name may be the engine's method (eagle3, mtp, dflash, draft_model), and ngram needs no SPEC."
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="vllm, sglang, tensorrt-llm or llama.cpp, with a version as vllm@0.33; default: the newest known.")
    ] = "vllm",
    tp: Annotated[int, typer.Option("--tp", help="Devices that share the model (tensor parallel).")] = 1,
    max_concurrency: Annotated[int | None, typer.Option(help="Requests in the system; default: as many as run.")] = None,
    draft_lens: Annotated[str, typer.Option(help="Tokens drafted per round, several by commas.")] = "1,3,5",
    kv_budgets: Annotated[str | None, typer.Option(help="Tokens that drafters attend to, several by commas; all is always shown.")] = None,
    kv_dtype: Annotated[str, typer.Option(help="Of the KV cache: auto, fp8, bfloat16, ...")] = "auto",
    memory_cap: Annotated[str | None, typer.Option(help="Memory of a device that may be used at all, with its unit: 24GiB.")] = None,
    fraction: Annotated[
        float | None,
        typer.Option(
            "--gpu-memory-utilization", "--mem-fraction-static", "--fraction", help="The engine's own memory fraction; default: its default."
        ),
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Requests that the engine runs at most; default: its default for the device.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens in a step at most; default: the engine's for the device.")] = None,
    as_json: AsJson = False,
) -> None:
    """KV pool, running batch with and without each drafter, and break-even acceptance length: at once, nothing is measured. Needs no torch."""
    from planner.report import terminal
    from planner.report.capacity import show_capacity

    found = planner.capacity(
        model, draft_models=draft_model or [], system=system, engine=engine, context_len=isl, output_len=osl, tensor_parallel=tp,
        max_concurrency=max_concurrency, draft_lens=parse_numbers(draft_lens, int, "--draft-lens"),
        kv_budgets=parse_numbers(kv_budgets, int, "--kv-budgets") if kv_budgets is not None else [], kv_dtype=kv_dtype, fraction=fraction,
        memory_cap_bytes=None if memory_cap is None else parse_bytes(memory_cap), max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
    )  # fmt: skip
    terminal.print_json(found) if as_json else show_capacity(found)
    if not found.rows[0].running:
        raise typer.Exit(1)
