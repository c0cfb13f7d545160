"""The Python API: every public name is there, typed and documented, and none of them loads torch before it runs a model."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import planner

ROOT = Path(__file__).parents[1]
FUNCTIONS = [name for name in planner.__all__ if inspect.isfunction(getattr(planner, name))]


def test_checkers_see_what_is_imported_lazily():
    tree = ast.parse((ROOT / "planner/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == planner._WHERE
    assert (ROOT / "planner/py.typed").is_file() and set(planner.__all__) <= set(dir(planner))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_typed_and_documented(name):
    function = getattr(planner, name)
    signature = inspect.signature(function)
    assert function.__doc__ and function.__doc__.strip()[0].isupper()
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())


def test_no_public_name_loads_torch():
    code = "import sys, planner\nfor name in planner.__all__: getattr(planner, name)\nassert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'plann'"):
        planner.plann  # noqa: B018
