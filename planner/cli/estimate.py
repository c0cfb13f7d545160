"""planner estimate: flags to arguments."""

from typing import Annotated

import typer

import planner
from planner.cli.app import app
from planner.cli.options import (
    AsJson,
    Budget,
    Concurrency,
    DrafterName,
    DrafterVocab,
    DrafterWeights,
    Isl,
    Objective,
    Osl,
    PricePerHour,
    ProfilePath,
    Selection,
    Temperature,
    TopK,
    TopP,
)


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
    price_per_hour: PricePerHour = None,
    as_json: AsJson = False,
) -> None:
    """The same estimate for one configuration of your choosing. Needs no torch."""
    from planner.report import terminal

    found, baseline = planner.estimate(
        profile_path, drafter=drafter, drafter_weights=drafter_weights, drafter_vocab=drafter_vocab, kv_budget=kv_budget, selection=selection, draft_len=draft_len, context_len=isl, output_len=osl,
        temperature=temperature, top_p=top_p, top_k=top_k, batch=max_concurrency, objective=objective, price_per_hour=price_per_hour,
    )  # fmt: skip
    terminal.print_json({"estimate": found, "baseline": baseline}) if as_json else terminal.show_estimate(found, baseline)
