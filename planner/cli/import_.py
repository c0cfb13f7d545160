"""planner import: flags to arguments."""

from pathlib import Path
from typing import Annotated

import typer

import planner
from planner.cli.app import Verbs, app
from planner.cli.options import AsJson
from planner.errors import BadInput

imports = typer.Typer(
    cls=Verbs, help="Measurements made elsewhere, as a profile.", no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]}
)
app.add_typer(imports, name="import")

SIZE = "a Hugging Face folder, a config.json, or num_layers=..,num_kv_heads=..,head_dim=..,weights_gib=.."


@imports.command()
def bench(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="CSV tables, results of vllm bench serve or sglang.bench_serving, a server's answers or Prometheus text, profiles made by this.",
        ),
    ],
    model: Annotated[str, typer.Option(help=f"The target: {SIZE}.")],
    system: Annotated[str, typer.Option(help="The device: h100_sxm and its like, or memory_gib=80,fraction=0.9.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the profile goes.")],
    draft_model: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SPEC", help=f"Size of a drafter, by its name in the files; repeat it. SPEC: {SIZE}.")
    ] = None,
    drafter: Annotated[str | None, typer.Option(help="Name of the drafter, for files that drafted and do not say it.")] = None,
    draft_len: Annotated[int | None, typer.Option(help="Tokens drafted per round, for files that do not say it; 0: loaded and idle.")] = None,
    max_concurrency: Annotated[int | None, typer.Option(help="Requests in the system, for files that do not say it.")] = None,
    isl: Annotated[int | None, typer.Option("--isl", help="Prompt tokens, for files that do not say it.")] = None,
    osl: Annotated[int | None, typer.Option("--osl", help="Generated tokens, for files that do not say it.")] = None,
    tp: Annotated[int | None, typer.Option("--tp", help="Tensor parallel devices, for files that do not say it; default: 1.")] = None,
    since: Annotated[Path | None, typer.Option(help="An earlier scrape of the same server: FILE, Prometheus text, counts from there.")] = None,
    as_json: AsJson = False,
) -> None:
    """A profile of a serving engine under load, from tables and files that benchmarks wrote."""
    from planner.commands.import_bench import summarise
    from planner.files import check_writable
    from planner.report import imports, terminal
    from planner.serving import save_serving_profile

    check_writable(out)
    profile = planner.import_bench(
        files, model=model, system=system, draft_models=_named(draft_model or []), drafter=drafter, draft_len=draft_len,
        concurrency=max_concurrency, context_len=isl, output_len=osl, tensor_parallel=tp, since=since,
    )  # fmt: skip
    save_serving_profile(profile, out)
    summary = summarise(profile, out)
    terminal.print_json(summary) if as_json else imports.show_import(summary, out)


@imports.command()
def audit(
    table: Annotated[
        Path,
        typer.Argument(
            metavar="TABLE",
            help="CSV of published claims (drafter, context_len, draft_len, and any of table, texts, kv_budget, temperature, batch, acceptance, "
            "tokens_per_round, speedup, tokens_per_s, tpot_s, round_s, target, device), or a file that `import bench` reads.",
        ),
    ],
    model: Annotated[str | None, typer.Option(help=f"The target, to bound a step by the reading of its weights: {SIZE}.")] = None,
    draft_model: Annotated[list[str] | None, typer.Option(metavar="NAME=SPEC", help="The same of a drafter; repeat it.")] = None,
    system: Annotated[
        str | None, typer.Option(help="The device of those bounds: h100_sxm and its like, or memory_gib=80,bandwidth_gb_s=3350.")
    ] = None,
    max_concurrency: Annotated[int | None, typer.Option(help="Requests in the system, for benchmark files that do not say it.")] = None,
    isl: Annotated[int | None, typer.Option("--isl", help="Prompt tokens, likewise.")] = None,
    osl: Annotated[int | None, typer.Option("--osl", help="Generated tokens, likewise.")] = None,
    as_json: AsJson = False,
) -> None:
    """Which rows of a table cannot be true together. Exit 1 where any are found. Needs no torch."""
    from planner.report import terminal
    from planner.report.audit import show_audit

    found = planner.audit(
        table, model=model, draft_models=_named(draft_model or []), system=system, concurrency=max_concurrency, context_len=isl, output_len=osl
    )
    terminal.print_json(found) if as_json else show_audit(found)
    if found.faults:
        raise typer.Exit(1)


def _named(texts: list[str]) -> dict[str, str]:
    """NAME=SPEC, where SPEC may hold = and commas."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, spec = (part.strip() for part in text.partition("="))
        if not (name and equals and spec):
            raise BadInput(f"--draft-model takes NAME=SPEC, got {text[:80]!r}; NAME is the drafter's in the files")
        if name in found:
            raise BadInput(f"--draft-model {name[:80]!r} must be given once")
        found[name] = spec
    return found
