"""The application that every command registers with."""

from pathlib import Path

import typer
from typer.core import TyperGroup

from planner.errors import BadInput
from planner.units import meant


class Verbs(TyperGroup):
    """Says what to write where the word in a verb's place is none."""

    def resolve_command(self, ctx, args: list[str]):
        word = args[0]
        if self.get_command(ctx, word) is None and not word.startswith("-"):
            path = ctx.command_path
            hint = f"; the verb comes first: {path} VERB {word[:80]}" if Path(word).suffix or Path(word).exists() else meant(word, self.commands)
            raise BadInput(f"{path} takes one of {', '.join(self.list_commands(ctx))}, got {word[:80]!r}{hint}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="planner",
    cls=Verbs,
    help="Plan speculative decoding with a sparse drafter cache: measure a little, fit, choose, check.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
