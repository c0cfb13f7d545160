"""What the benchmarks share: where real texts are, how figures are printed."""

import argparse
import json
import os
import sys
from pathlib import Path

import msgspec


def texts() -> str:
    """The folder of real texts, $PLANNER_SHARED/texts or ../shared/texts; exits with the remedy if there is none."""
    root = Path(os.environ.get("PLANNER_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (root / "texts").is_dir():
        print(f"skipped: {root / 'texts'} does not exist; put .txt files there or set PLANNER_SHARED to the folder above them", file=sys.stderr)
        raise SystemExit(0)
    return str(root / "texts")


def wants_json(description: str) -> bool:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help='print {"figures": ..., "environment": ...} and nothing else')
    return parser.parse_args().json


def report(rows: list[dict], figures: dict[str, float], as_json: bool) -> None:
    """A table for people, or the figures by name with the environment they were measured in."""
    from planner.profiler.device import find_device, read_environment

    if as_json:
        print(json.dumps({"figures": figures, "environment": msgspec.to_builtins(read_environment(find_device(None)))}))
        return
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in rows[0]}
    print("  ".join(name.ljust(width) for name, width in widths.items()))
    for row in rows:
        print("  ".join(str(row[name]).ljust(width) for name, width in widths.items()))
