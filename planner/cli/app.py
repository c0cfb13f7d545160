"""The application that every command registers with."""

import typer

app = typer.Typer(
    name="planner",
    help="Plan speculative decoding with a sparse drafter cache: measure a little, fit, choose, check.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
