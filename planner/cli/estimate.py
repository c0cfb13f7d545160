"""planner estimate: flags to arguments."""

import planner
from planner.cli.app import app
from planner.cli.options import AsJson, Concurrency, Isl, Objective, Osl, PricePerHour, ProfilePath, Temperature, TopK, TopP, takes
from planner.commands.flags import Asked


@app.command()
@takes(Asked)
def estimate(
    profile_path: ProfilePath,
    asked: Asked,
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
        profile_path, asked, context_len=isl, output_len=osl, temperature=temperature, top_p=top_p, top_k=top_k, batch=max_concurrency,
        objective=objective, price_per_hour=price_per_hour,
    )  # fmt: skip
    terminal.print_json({"estimate": found, "baseline": baseline}) if as_json else terminal.show_estimate(found, baseline)
