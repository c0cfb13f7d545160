"""Names from outside in the files of engines: quoted so that they come out as they went in, or refused."""

import shlex

import yaml

from planner.errors import BadInput

SCRIPT = "#!/bin/sh\n# {about}\n{line}\n"
HERE = 'cd -- "$(dirname -- "$0")" && '


class Raw(str):
    """A word of shell that is not to be quoted."""


MORE = Raw('"$@"')  # flags of the user's own: ports, keys
DATASET = Raw('"${1:?the path of a dataset}"')


def shell_line(words: list[str]) -> str:
    """Words as one line of shell."""
    for word in words:
        if "\0" in word:
            raise BadInput(f"a command line cannot hold a NUL character, got {word[:80]!r}; rename it")
    return " ".join(word if isinstance(word, Raw) else shlex.quote(word) for word in words)


def to_flags(config: dict) -> list[str]:
    """The same as flags; one that is True stands alone."""
    return [word for key, value in config.items() for word in ([f"--{key}"] if value is True else [f"--{key}", str(value)])]


def to_yaml(value: dict, about: str) -> str:
    """A mapping in YAML, in its own order, which reads as it was written."""
    text = f"# {about}\n" + yaml.safe_dump(value, sort_keys=False, width=1_000_000)
    if yaml.safe_load(text) != value:
        raise BadInput("a name cannot be written in YAML so that it reads the same; rename it")
    return text


def from_yaml(text: str) -> dict:
    """The mapping of an engine's file."""
    found = yaml.safe_load(text)
    if not isinstance(found, dict):
        raise BadInput(f"an engine's YAML file holds a mapping, got {type(found).__name__}")
    return found


def to_ini(value: object) -> str:
    """A value of llama.cpp's preset, which has no quotes: there # and ; begin a comment anywhere, and blanks at the ends are lost."""
    text = str(value)
    if any(char in "#;" or ord(char) < 32 or ord(char) == 127 for char in text) or text != text.strip() or not text:
        raise BadInput(
            f"a value in an INI file holds no #, no ;, no line breaks, and neither begins nor ends with a blank, got {text[:80]!r}; rename it"
        )
    return text
