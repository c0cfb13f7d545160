"""What `planner train` prints."""

from collections.abc import Sequence
from pathlib import Path

from planner.report.layout import Column, clean, open_console, put_lines, put_title, show_table


def show_texts(count: int, folder: str | Path) -> None:
    put_title(open_console(), f"{count} texts in {clean(str(folder))}")


def show_training(log: Sequence["Met"], folder: str | Path) -> None:  # noqa: F821  planner.commands.training_run
    """The losses met on the way, and what held-out texts accepted."""
    console = open_console()
    put_title(console, f"drafter in {clean(str(folder))}")
    if not log:
        return
    names = list(log[-1].acceptance)
    columns = [[Column("minutes", lambda met: f"{met.minutes:.1f}"), Column("loss", lambda met: f"{met.loss:.3f}")]]
    columns += [[Column(f"T={name}", lambda met, name=name: _percent(met.acceptance.get(name)))] for name in names]
    rounds = list(log[-1].tokens)
    columns += [[Column(f"tokens T={name}", lambda met, name=name: f"{met.tokens[name]:.2f}" if name in met.tokens else "")] for name in rounds]
    show_table(console, [Column("step", lambda met: str(met.step))], columns, log)
    if names:
        put_lines(console, [("T=t/b", "first drafts of held-out texts accepted at temperature t with kv budget b, %")])
    if rounds:
        put_lines(console, [("tokens", "of a round of whole blocks, mean over the places of the texts")])


def show_written(files: Sequence[str]) -> None:
    put_lines(open_console(), [("written", clean(file)) for file in files])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
