"""What the benchmarks share: where real texts are, how figures are printed."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec

SHARED = Path(os.environ.get("PLANNER_SHARED", Path(__file__).resolve().parents[2] / "shared"))

# Texts under texts() that no shipped drafter was trained on.
HELD_OUT = [
    "books/frankenstein.txt", "books/news_from_nowhere.txt", "books/guernsey_folk_lore.txt", "books/beethoven_letters_2.txt",
    "meetings/qmsum_academic_Bmr006.txt", "meetings/qmsum_academic_Bed015.txt", "code/py_pydecimal.txt", "code/py_language_reference_topics.txt",
]  # fmt: skip


class Shown(NamedTuple):
    """What a part of a benchmark has to say."""

    figures: dict[str, float]
    tables: dict[str, list[dict]]  # by title; the rows of one have the same columns


def texts() -> str:
    """The folder of real texts, $PLANNER_SHARED/texts or ../shared/texts; exits with the remedy if there is none."""
    if not (SHARED / "texts").is_dir():
        print(f"skipped: {SHARED / 'texts'} does not exist; put .txt files there or set PLANNER_SHARED to the folder above them", file=sys.stderr)
        raise SystemExit(0)
    return str(SHARED / "texts")


def held_out() -> list[Path]:
    """Files of real text for drafters that were trained on others."""
    return [Path(texts()) / name for name in HELD_OUT]


def measured(name: str = "") -> Path:
    """A file of measurements that others made of real devices, or their folder, as for the texts."""
    path = SHARED / "measured" / name
    if not path.exists():
        print(f"skipped: {path} does not exist; put the tables there or set PLANNER_SHARED to the folder above them", file=sys.stderr)
        raise SystemExit(0)
    return path


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flag that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help='print {"figures": ..., "environment": ...} and nothing else')
    return parser


def wants_json(description: str) -> bool:
    return make_parser(description).parse_args().json


def report(rows: list[dict], figures: dict[str, float], as_json: bool) -> None:
    """A table for people, or the figures by name with the environment they were measured in."""
    report_tables({"": rows}, figures, as_json)


def report_tables(tables: dict[str, list[dict]], figures: dict[str, float], as_json: bool) -> None:
    """The same with several tables, each under its title; the rows of one table have the same columns."""
    from planner.profiler.device import find_device, read_environment

    if as_json:
        print(json.dumps({"figures": figures, "environment": msgspec.to_builtins(read_environment(find_device(None)))}))
        return
    for number, (title, rows) in enumerate(tables.items()):
        if title:
            print(("\n" if number else "") + title)
        widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in rows[0]}
        print("  ".join(name.ljust(width) for name, width in widths.items()))
        for row in rows:
            print("  ".join(str(row[name]).ljust(width) for name, width in widths.items()))


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
