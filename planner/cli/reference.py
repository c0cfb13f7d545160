"""What of docs/ is made from the code: the command line, and a JSON Schema of every document. `python -m planner.cli.reference` writes it."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import typer

from planner.cli import app  # with all commands
from planner.documents import VALUES

DOCS = Path(__file__).parents[2] / "docs"
CLI, SCHEMAS = "cli.md", "schema"
HEAD = """# The command line

Written by `make docs` from the parser; `planner COMMAND --help` says the same. What a command answers goes to stdout, progress and
warnings to stderr; `--json` prints one document and nothing else. Exit codes: 0; 1 where nothing fits, a check failed or an audit found
something; 2 for bad input; 3 where a plan no longer pays (`drift`); 4 where a canary is not decided; 130 and 143 after Ctrl-C and SIGTERM.
Tab completes commands and flags after `planner --install-completion`.
"""


def documents() -> Iterator[tuple[str, str]]:
    """Path below docs/ and content of everything that is made from the code."""
    yield CLI, "\n".join([HEAD, *(_command(name, command) for name, command in commands().items())])
    for kind, value in VALUES.items():
        yield f"{SCHEMAS}/{kind.name.replace(' ', '_')}.json", json.dumps(msgspec.json.schema(value), indent=1) + "\n"


def commands() -> dict:
    """Every command by its words, as --help lists them."""
    found = {}
    for name, command in typer.main.get_command(app).commands.items():
        inner = getattr(command, "commands", None)
        found |= {f"{name} {sub}": own for sub, own in inner.items()} if inner else {name: command}
    return found


def _command(name: str, command) -> str:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option" and parameter.name != "help"]
    words = " ".join(["planner", name, *map(_shown, arguments), "[OPTIONS]"])
    lines = [f"## planner {name}", "", " ".join(command.help.split()), "", f"    {words}", ""]
    lines += [f"- `{_shown(parameter)}`: {_text(parameter.help)}" for parameter in arguments]
    lines += [""] * bool(arguments)
    lines += [f"- {_flags(parameter)}: {_text(parameter.help)}{_default(parameter)}" for parameter in options]
    return "\n".join([*lines, ""])


def _shown(argument) -> str:
    return argument.metavar or argument.name.upper()


def _flags(option) -> str:
    names = ", ".join(f"`{flag}`" for flag in [*option.opts, *option.secondary_opts])
    return f"{names} (needed)" if option.required else names


def _text(help: str | None) -> str:
    """One line of Markdown: * and _ and < stand for themselves."""
    return re.sub(r"([*_<|])", r"\\\1", " ".join((help or "").split()))


def _default(option) -> str:
    """What is taken where the flag is not given, unless its help says it."""
    value = option.default
    if value is None or value is False or value in ("", [], ()) or callable(value) or option.required or "default" in (option.help or ""):
        return ""
    return f" Default: `{'on' if value is True else ', '.join(map(str, value)) if isinstance(value, list | tuple) else value}`."


def write(folder: Path = DOCS) -> None:
    for name, content in documents():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    write(*map(Path, sys.argv[1:2]))
