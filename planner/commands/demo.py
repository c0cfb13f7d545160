"""planner demo: half of a published table in, the other half predicted, and the choice judged by the whole. Seconds, without torch."""

import csv
import io
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from planner.commands.import_bench import import_bench
from planner.commands.progress import Progress, Silent
from planner.commands.schedule import estimate_served, schedule
from planner.demos import Demo, DemoCell, DemoLoad, Rule
from planner.errors import BadInput
from planner.files import write_whole
from planner.schedules import Setting, save_schedule
from planner.serving import OFF, save_serving_profile

TABLE = "qwen25_rtx4060.csv"  # its neighbour with .txt says where it is from
SOURCE = (
    "vLLM on an RTX 4060 Laptop GPU, Qwen2.5-1.5B drafted for by Qwen2.5-0.5B, measured and published by others: "
    "github.com/adixg/vllm-specdecode-cost-model, results/phase4_sweep.json at cbf5cbd"
)
MODEL = "num_layers=28,num_kv_heads=2,head_dim=128,weights_gib=2.88,name=Qwen2.5-1.5B-Instruct"
DRAFTER, DRAFT_MODEL = "draft_model", "num_layers=24,num_kv_heads=2,head_dim=64,weights_gib=0.92,name=Qwen2.5-0.5B-Instruct"
SYSTEM = "memory_gib=8,fraction=0.85,name=RTX 4060 Laptop"
SEEN_LOADS = {0: (1, 2, 4, 8, 16, 48), 1: (1, 4), 3: (1, 16), 5: (1, 48)}  # by K: off at all, each K at one request and at one other load
FILES = ("measured.csv", "unseen.csv", "profile.json", "schedule.json")


def demo(out: str | Path = "demo", *, progress: Progress = Silent()) -> Demo:
    """Import a dozen of the table's cells, plan by load, estimate the rest; what a user would type does the same. Files go into the folder `out`.

    The choice is judged among the settings that the table holds: of others nobody knows what they would have done.
    """
    began, folder = time.perf_counter(), Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the folder {folder}: {error.strerror}; choose another with --out") from None
    measured, unseen, profile_path, schedule_path = (folder / name for name in FILES)
    progress.stage("import", 1)
    table = (files("planner") / "data" / TABLE).read_text()
    rows = list(csv.DictReader(io.StringIO(table)))
    seen = [row for row in rows if int(row["concurrency"]) in SEEN_LOADS[int(row["draft_len"])]]
    hidden = [row for row in rows if row not in seen]
    write_whole(measured, _csv(seen, list(rows[0])))
    write_whole(unseen, _csv(hidden, ["drafter", "draft_len", "concurrency", "context_len"]))
    profile = import_bench([measured], model=MODEL, draft_models={DRAFTER: DRAFT_MODEL}, system=SYSTEM)
    save_serving_profile(profile, profile_path)
    progress.advance()

    most = max(cell.concurrency for cell in profile.cells)
    progress.stage("plan", 1)
    found = schedule(profile_path, concurrency=(1, most), objective="throughput")
    save_schedule(found, schedule_path)
    progress.advance()

    progress.stage("estimate", 1)
    pairs = estimate_served(profile_path, [_place(row) for row in rows], objective="throughput")
    progress.advance()
    predicted = {(pair.estimate.setting, pair.estimate.concurrency): pair.estimate.output_tokens_per_s for pair in pairs}
    truth = {key: float(row["output_tokens_per_s"]) for key, row in zip(predicted, rows, strict=True)}
    cells = [
        DemoCell(setting=key[0], concurrency=key[1], predicted=predicted[key], measured=truth[key])
        for key, row in zip(predicted, rows, strict=True)
        if row in hidden
    ]
    loads = [
        _judge(load, {key[0]: value.value for key, value in predicted.items() if key[1] == load}, truth) for load in sorted({k[1] for k in truth})
    ]
    return Demo(
        source=SOURCE, num_cells=len(rows), num_seen=len(seen), commands=_commands(measured, unseen, profile_path, schedule_path, most),
        schedule=found, cells=cells, mean_error=sum(abs(cell.error) for cell in cells) / len(cells),
        inside=sum(cell.predicted.low <= cell.measured <= cell.predicted.high for cell in cells) / len(cells), loads=loads,
        rules=_rules(loads, truth), files=[str(folder / name) for name in FILES], seconds=time.perf_counter() - began,
    )  # fmt: skip


def _place(row: dict[str, str]) -> tuple[str, int, int, int | None]:
    return row["drafter"] or OFF, int(row["draft_len"]), int(row["concurrency"]), int(row["context_len"])


def _csv(rows: Sequence[dict[str, str]], columns: Sequence[str]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _judge(load: int, predicted: dict[Setting, float], truth: dict[tuple[Setting, int], float]) -> DemoLoad:
    chosen, best = max(predicted, key=predicted.get), max(predicted, key=lambda setting: truth[setting, load])
    return DemoLoad(
        concurrency=load, chosen=chosen, best=best, chosen_tokens_per_s=truth[chosen, load], best_tokens_per_s=truth[best, load]
    )  # fmt: skip


def _rules(loads: list[DemoLoad], truth: dict[tuple[Setting, int], float]) -> list[Rule]:
    """Regret of the choices, and of two rules that people use instead."""
    first = loads[0].best

    def lost(setting: Setting) -> list[float]:
        return [1 - truth[setting, load.concurrency] / load.best_tokens_per_s for load in loads]

    columns = {
        "planner, from the cells it saw": [load.regret for load in loads],
        f"K={first.draft_len} at every load, the best for one request": lost(first),
        "off at every load": lost(Setting()),
    }
    return [Rule(rule=rule, regret=sum(losses) / len(losses), worst=max(losses)) for rule, losses in columns.items()]


def _commands(measured: Path, unseen: Path, profile: Path, schedule_path: Path, most: int) -> list[str]:
    return [
        f"planner import bench {measured} --model '{MODEL}' --draft-model '{DRAFTER}={DRAFT_MODEL}' --system '{SYSTEM}' -o {profile}",
        f"planner plan {profile} --max-concurrency 1..{most} --objective throughput -o {schedule_path}",
        f"planner estimate {profile} --cells {unseen} --objective throughput",
    ]
