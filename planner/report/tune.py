"""What is shown of a tuning: what to set and to paste, load by load beside off and what the user runs now, and how it held."""

from pathlib import Path

from planner.plans import Interval
from planner.report.layout import (
    Column,
    clean,
    format_interval,
    format_number,
    format_percent,
    open_console,
    put_lines,
    put_title,
    show_table,
)  # fmt: skip
from planner.schedules import Setting, describe_setting
from planner.specs import OBJECTIVES
from planner.tunings import CheckedLoad, Defect, Tuning


def show_tuning(tuning: Tuning, folder: str | Path) -> None:
    """Predictions and measurements stand in tables of their own. Times are in ms, throughput is of all requests together."""
    console = open_console()
    how = "greedy" if tuning.temperature == 0 else f"temperature {tuning.temperature:g}"
    put_title(
        console,
        f"Tuning of {clean(tuning.model)} on {clean(tuning.system)}, {clean(f'{tuning.engine} {tuning.engine_version}'.strip())}: {tuning.method}, "
        f"prompts of {tuning.context_len} tokens, outputs of up to {tuning.output_len}, {how}; objective {OBJECTIVES[tuning.objective]}",
    )
    put_lines(console, [("Set", _setting(tuning)), ("Gain", _gain(tuning))])
    put_title(console, f"Predicted, from {sum(run.stage == 'measure' for run in tuning.runs)} loads that were run")
    groups = [
        [Column("set", lambda load: _name(load.setting), right=False)],
        [
            Column("TPOT ms", lambda load: format_interval(load.tpot_s, 1e3)),
            Column("tokens/s", lambda load: format_interval(load.output_tokens_per_s)),
        ],
        [Column("over off %", lambda load: _percent(load.gain_over_off))],
    ]
    if any(load.gain_over_yours is not None for load in tuning.loads) and tuning.yours != Setting():
        groups.append([Column(f"over your\n{_name(tuning.yours)} %", lambda load: _percent(load.gain_over_yours))])
    next_best = [Column("next best", lambda load: "" if load.next_best is None else _name(load.next_best), right=False)]
    groups.append([*next_best, Column("over it %", lambda load: _percent(load.gain_over_next))])
    if any(load.best != load.setting for load in tuning.loads):
        groups.append([Column("best there", lambda load: _name(load.best), right=False)])
    show_table(console, [Column("concurrency", lambda load: str(load.concurrency))], groups, tuning.loads)
    if tuning.checked:
        put_title(console, "Checked on prompts that were not used before")
        show_table(
            console,
            [Column("concurrency", lambda one: str(one.concurrency)), Column("runs", _role, right=False)],
            [
                [Column("TPOT ms\npredicted", lambda one: _maybe(one.predicted_tpot_s, 1e3)), Column("measured", lambda one: format_interval(one.measured_tpot_s, 1e3))],
                [
                    Column("tokens/s\npredicted", lambda one: _maybe(one.predicted_output_tokens_per_s)),
                    Column("measured", lambda one: format_interval(one.measured_output_tokens_per_s)),
                ],
                [Column("the choice\ngains %", lambda one: _percent(one.gain))],
            ],
            tuning.checked,
            lambda one: "bold" if one.role == "chosen" else "",
        )  # fmt: skip
    lines = [("Found", clean("; ".join(text for text in (defect.what, _known(defect), defect.remedy) if text))) for defect in tuning.defects]
    lines += [("Cut", clean(sentence)) for sentence in tuning.cut] + [("Note", clean(note)) for note in tuning.notes]
    ready = max((launch.ready_s for launch in tuning.launches), default=0.0)
    took = f"{format_number(tuning.minutes)} minutes, {tuning.requests} requests, {len(tuning.launches)} starts of up to {format_number(ready)} s"
    schedule, profile = Path(folder) / tuning.schedule, Path(folder) / tuning.profile
    lines += [("Took", took), ("Files", clean(f"{profile}, {schedule} (planner export, drift), {Path(folder) / 'tuning.json'} (every answer)"))]
    put_lines(console, lines)
    if tuning.paste:
        put_title(console, "Add to your command, in place of what it says of drafting")
        console.file.write(f"{tuning.paste}\n")  # as it is, to be copied


def _setting(tuning: Tuning) -> str:
    if not tuning.chosen:
        return "off: do not draft"
    if len(tuning.chosen) == 1:
        return f"{tuning.method} K={tuning.chosen[0].draft_len} at every load"
    spans = [
        f"{'idle' if step.draft_len == 0 else f'K={step.draft_len}'} "
        + (f"for {step.batch_from}" if step.batch_from == step.batch_to else f"for {step.batch_from} to {step.batch_to}")
        for step in tuning.chosen
    ]
    return f"{tuning.method}, {', '.join(spans)} requests that decode at once"


def _gain(tuning: Tuning) -> str:
    """The headline, predicted, and measured where it was checked."""
    if not tuning.chosen and tuning.yours == Setting():
        return "none to be had: your command does not draft, and that is best"
    if tuning.yours is None or tuning.predicted_gain is None:
        over = (
            "off, your command says nothing that could be compared"
            if tuning.yours is None
            else f"your {_name(tuning.yours)}: not measured before the check"
        )
        predicted = f"over {over}"
    elif tuning.yours == Setting():
        predicted = f"{format_percent(tuning.predicted_gain)} % over your command, which does not draft, over all loads, as predicted"
    else:
        predicted = f"{format_percent(tuning.predicted_gain)} % over your {_name(tuning.yours)}, over all loads, as predicted"
    role = "yours" if any(one.role == "yours" for one in tuning.checked) else "off"
    measured = [f"{format_percent(one.gain)} % at {one.concurrency}" for one in tuning.checked if one.role == role and one.gain is not None]
    own = "your setting" if role == "yours" else "off"
    unsure = tuning.predicted_gain is not None and tuning.predicted_gain.low < 0 < tuning.predicted_gain.high
    return predicted + "; it may not pay" * unsure + (f"; measured over {own}: {', '.join(measured)}" if measured else "")


def _name(setting: Setting) -> str:
    return clean(describe_setting(setting))


def _role(one: CheckedLoad) -> str:
    return _name(one.setting) + {"chosen": "", "off": "", "yours": ", yours"}[one.role]


def _percent(interval: Interval | None) -> str:
    return "" if interval is None else format_percent(interval)


def _maybe(interval: Interval | None, scale: float = 1.0) -> str:
    return "not measured" if interval is None else format_interval(interval, scale)


def _known(defect: Defect) -> str:
    return f"known as {defect.known_as}" if defect.known_as else ""
