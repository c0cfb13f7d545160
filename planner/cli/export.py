"""planner export: flags to arguments."""

from pathlib import Path
from typing import Annotated

import typer

import planner
from planner.cli.app import app
from planner.cli.options import AsJson
from planner.commands.flags import AskedExport
from planner.units import parse_bytes


@app.command()
def export(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan or a schedule, as `planner plan -o` writes it.")],
    engine: Annotated[str, typer.Option(help="NAME@VERSION: vllm, sglang, tensorrt-llm, llama.cpp, transformers, vllm-ascend or planner itself.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="A folder that is new, empty, or holds an earlier export.")],
    profile: Annotated[
        Path | None, typer.Option(help="What the plan was made from: what the engine lacks is then planned around, and its cost is shown.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="What the engine is to load; default: the plan's model.")] = None,
    drafter: Annotated[str | None, typer.Option(help="Of a schedule's deployments; default: the plan's, else the best.")] = None,
    method: Annotated[
        str | None, typer.Option(help="How the engine is to draft: draft_model, eagle3, mtp, ...; default: as the drafter is called.")
    ] = None,
    draft_model: Annotated[str | None, typer.Option(help="The drafter's checkpoint; default: the plan's.")] = None,
    isl: Annotated[int | None, typer.Option("--isl", help="Which context of a schedule, in prompt tokens.")] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(help="Requests that the server runs at most; for engines without schedules, the load.")
    ] = None,
    memory_cap: Annotated[str | None, typer.Option(help="Memory of a device that may be used, with its unit: 60GiB; default: the plan's.")] = None,
    system: Annotated[str | None, typer.Option(help="The engine's device, as h100_sxm or memory_gib=80; default: the profile's.")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Of the target's KV cache, in the engine's words.")] = None,
    draft_kv_dtype: Annotated[str | None, typer.Option(help="Of the drafter's KV cache, in the engine's words.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the requests, where the plan does not say it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a plan as an engine's own files, with what the engine cannot be told. Needs no torch."""
    from planner.report import terminal
    from planner.report.export import show_export

    asked = AskedExport(
        model=model, drafter=drafter, method=method, draft_model=draft_model, context_len=isl, max_concurrency=max_concurrency,
        memory_cap_bytes=None if memory_cap is None else parse_bytes(memory_cap), system=system, kv_dtype=kv_dtype, draft_kv_dtype=draft_kv_dtype,
        temperature=temperature,
    )  # fmt: skip
    found = planner.export(plan_path, engine, out, asked, profile_path=profile)
    terminal.print_json(found) if as_json else show_export(found, out)
