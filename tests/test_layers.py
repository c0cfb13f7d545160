"""The layers of DESIGN.md, section 4, read off the source with ast, and what importing planner and `planner --help` may load.

Imports inside functions count as well, and so do importlib.import_module("...") and __import__("...") of a literal name.
"""

import ast
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "planner").rglob("*.py"))

TORCH = ("torch", "safetensors", "tokenizers", "gguf", "planner.runtime", "planner.profiler", "planner.training")
PICKLE = ("pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "torch.load", "torch.serialization.load")
HEAVY = ("torch", "transformers", "matplotlib", "scipy")  # what neither `import planner` nor `planner --help` may wait for


class Rule(NamedTuple):
    inside: tuple[str, ...]  # path patterns the rule holds for; * crosses folders
    forbidden: tuple[str, ...]  # modules with all that is below them, or names such as print
    outside: tuple[str, ...] = ()  # path patterns that are exempt
    at_import: bool = False  # only what runs when the module is imported


def package(name: str) -> tuple[str, str]:
    """The patterns of planner/name/, or of planner/name.py should it be one file."""
    return f"planner/{name}/*", f"planner/{name}.py"


def files(*names: str) -> tuple[str, ...]:
    return tuple(f"planner/{name}.py" for name in names)


RULES = {
    **{
        f"{name} never imports torch": Rule(package(name), TORCH)
        for name in ("cost", "search", "simulator", "exporters", "importers", "engines", "trained")
    },
    "top-level modules import without torch": Rule(
        files(
            "__init__",
            "errors",
            "units",
            "specs",
            "measurements",
            "plans",
            "serving",
            "schedules",
            "audits",
            "machine",
            "checkups",
            "demos",
            "diffs",
            "documents",
            "capacities",
            "exports",
            "drifts",
            "canaries",
            "tunings",
            "documents",
            "shown",
            "engine_rules",
            "systems",
            "kinds",
            "draft_trees",
        ),
        TORCH,
        at_import=True,
    ),
    "a measurement does not know the hypothesis fitted to it": Rule(package("profiler"), ("planner.cost", "planner.search")),
    "runtime is below the planner": Rule(package("runtime"), ("planner.search", "planner.exporters", "planner.cost", "planner.profiler")),
    "only report and cli print": Rule(("planner/*",), ("print", "builtins.print", "rich"), outside=package("report") + package("cli")),
    "nothing unpickles": Rule(("planner/*",), PICKLE),
}


class Use(NamedTuple):
    names: tuple[str, ...]  # dotted; `from a import b` may mean the module a.b or a name in a, so both stand here
    line: int
    at_import: bool  # runs when the module is imported: outside functions and `if TYPE_CHECKING:`


def uses(path: str, source: str) -> Iterator[Use]:
    """Every import in a file, every print, and every dotted name that starts at an imported module."""
    tree = ast.parse(source, path)
    parts = Path(path).with_suffix("").parts
    home = parts[:-1]  # what `from .` means, in a module and in an __init__ alike
    deferred = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            body = node.body if isinstance(node.body, list) else [node.body]
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            body = node.body
        else:
            continue
        deferred.update(id(inner) for statement in body for inner in ast.walk(statement))

    bound = {}  # name in this file -> the dotted name it stands for
    for node in ast.walk(tree):
        names = ()
        if isinstance(node, ast.Import):
            names = tuple(alias.name for alias in node.names)
            bound |= {alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = home[: len(home) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = (base, *(f"{base}.{alias.name}" for alias in node.names))
            bound |= {alias.asname or alias.name: f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__") and node.args:
            argument = node.args[0]
            names = (argument.value,) if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else ()
        elif isinstance(node, ast.Name) and node.id == "print":
            names = ("print",)
        if names:
            yield Use(names, node.lineno, id(node) not in deferred)

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if first in bound:
                yield Use((f"{bound[first]}.{rest}",), node.lineno, id(node) not in deferred)


def violations(path: str, source: str) -> list[str]:
    """Each broken rule of a file as "path:line uses name: rule"; `path` is relative to the repository."""
    rules = {
        title: rule
        for title, rule in RULES.items()
        if any(fnmatch(path, pattern) for pattern in rule.inside) and not any(fnmatch(path, pattern) for pattern in rule.outside)
    }
    return [
        f"{path}:{use.line} uses {name}: {title}"
        for use in uses(path, source)
        for title, rule in rules.items()
        if use.at_import or not rule.at_import
        for name in use.names[-1:] + use.names[:-1]
        if any(name == bad or name.startswith(f"{bad}.") for bad in rule.forbidden)
    ]


def run(code: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter that finds planner in this checkout."""
    return subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_every_module_keeps_its_layer():
    broken = [line for path in SOURCES for line in violations(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))]
    assert not broken, "\n" + "\n".join(broken)


def test_the_rules_look_at_the_package():
    paths = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {"planner/units.py", "planner/specs.py", "planner/__init__.py", "planner/cli/__init__.py"} <= paths
    for name in ("cost", "search", "profiler", "runtime", "report"):
        assert any(fnmatch(path, f"planner/{name}/*") for path in paths), f"planner/{name} moved: the rules about it hold for nothing"


def example(pattern: str) -> str:
    return pattern.replace("*", "example.py")


@pytest.mark.parametrize(
    ("title", "path", "name"),
    [(title, example(pattern), name) for title, rule in RULES.items() for pattern in rule.inside for name in rule.forbidden],
)
def test_a_broken_rule_is_reported(title, path, name):
    source = "print('hello')" if name == "print" else f"import {name}"
    assert any(line.startswith(f"{path}:1 uses {name}") and line.endswith(title) for line in violations(path, source))
    assert violations(path, "import math\nfrom planner.units import GIB") == []


@pytest.mark.parametrize(
    "source",
    [
        "import math\nimport torch.nn.functional as F",
        "def late():\n    from torch import nn",
        "class Late:\n    import gguf",
        "def late():\n    from planner import runtime",
        "def late():\n    from planner.runtime.model import Model",
        "from . import objective\nfrom .. import profiler",
        "from ..runtime import decode",
        "import importlib\ntorch = importlib.import_module('torch')",
        "torch = __import__('torch')",
        "import math\nimport pickle as p",
        "from typing import Any\nfrom torch import load",
        "import numpy\nshow = print",
        "import rich\n",
        "from math import inf\nfrom rich.progress import track",
    ],
)
def test_roads_around_the_rules_are_seen(source):
    assert violations("planner/search/example.py", source)


@pytest.mark.parametrize(
    "source",
    [
        "import torchmetrics, richer, picklefish",  # a prefix of a name is not a parent of it
        "from planner.cost import memory",
        "from .. import units\nfrom . import schedule",
        "import json\nvalue = json.load(open('x'))\nself.print(value)\nfingerprint(value)",
        "'import torch'\n# import torch",
    ],
)
def test_what_is_allowed_is_not_reported(source):
    assert violations("planner/search/example.py", source) == []


@pytest.mark.parametrize(
    "call",
    ["import torch\ntorch.load(path)", "import torch as t\nt.serialization.load(path)", "from torch import serialization\nserialization.load(path)"],
)
def test_torch_load_is_seen_where_torch_is_allowed(call):
    assert [line.split(": ")[1] for line in violations("planner/runtime/weights.py", call)] == ["nothing unpickles"]
    assert violations("planner/runtime/weights.py", "import torch\nfrom safetensors.torch import load_file\ntorch.ones(1)") == []


def test_top_level_modules_may_import_torch_late():
    assert violations("planner/__init__.py", "import planner.runtime")
    assert violations("planner/__init__.py", "try:\n    import torch\nexcept ImportError:\n    pass")
    assert violations("planner/__init__.py", "def profile():\n    from planner.profiler import device") == []
    assert violations("planner/__init__.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from planner.profiler import device") == []


def test_report_and_cli_may_print():
    source = "from rich.table import Table\nprint(Table())"
    for path in ("planner/report/terminal.py", "planner/report/__init__.py", "planner/cli/plan.py"):
        assert violations(path, source) == []
    for path in ("planner/commands/plan.py", "planner/runtime/decode.py", "planner/__init__.py"):
        assert len(violations(path, source)) >= 2


def loaded_by(code: str) -> list[str]:
    """Which of HEAVY are in sys.modules after code ran in a fresh interpreter."""
    done = run(f"{code}\nimport sys, json\nsys.stdout.write('\\n' + json.dumps([name for name in {HEAVY!r} if name in sys.modules]))")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_planner_loads_nothing_heavy():
    assert loaded_by("import planner") == []


def test_help_loads_nothing_heavy():
    # what the installed command does, with its exit caught so that sys.modules can be read
    code = "import sys\nsys.argv = ['planner', '--help']\nfrom planner.cli import main\ntry:\n    code = main()\nexcept SystemExit as end:\n    code = end.code\nassert not code, code"
    assert loaded_by(code) == []


def test_a_heavy_import_would_be_seen():
    assert loaded_by("import planner, scipy") == ["scipy"]


def test_torch_free_packages_import_without_torch():
    """The roads that ast does not see: a module that is allowed and itself imports torch."""
    free = [pattern for rule in RULES.values() if rule.forbidden == TORCH for pattern in rule.inside]
    paths = [path.relative_to(ROOT) for path in SOURCES if any(fnmatch(path.relative_to(ROOT).as_posix(), pattern) for pattern in free)]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]
    assert "planner.units" in names
    done = run(f"import sys\nfor name in {names!r}:\n    __import__(name)\n    assert 'torch' not in sys.modules, name")
    assert done.returncode == 0, done.stderr


def test_importing_planner_is_quick():
    """Less than 0.3 s over a bare interpreter, the quickest of five each, taken in turn: what else runs here slows both."""

    def seconds(code: str) -> float:
        start = time.perf_counter()
        done = run(code)
        assert done.returncode == 0, done.stderr
        return time.perf_counter() - start

    seconds("import planner")  # writes the .pyc files and warms the disk
    pairs = [(seconds("pass"), seconds("import planner")) for _ in range(5)]
    bare_s, planner_s = (min(times) for times in zip(*pairs, strict=True))
    assert planner_s - bare_s < 0.3, f"import planner costs {planner_s - bare_s:.2f} s; move what is slow into the function that needs it"
