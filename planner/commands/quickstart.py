"""planner quickstart: the whole way once, on the default model, the CPU or GPU at hand, and text that every Python carries."""

import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from planner.commands.check import run_check
from planner.commands.profile import measure
from planner.commands.profile_settings import Settings
from planner.commands.progress import Progress, Silent
from planner.commands.session import DEFAULT_MODEL, needs_runtime, open_session
from planner.errors import BadInput
from planner.measurements import Profile, fingerprint, save_profile
from planner.plans import Check, Plan, save_check, save_plan
from planner.specs import Sampler, SparseKV, Workload

CONTEXT_LEN, OUTPUT_LEN, NUM_TEXTS, CHECK_TEXTS, CHECK_OUTPUT_LEN = 2048, 96, 16, 4, 64
BUDGETS, MAX_DRAFT_LEN = (64, 256, 1024), 5


class Quickstart(NamedTuple):
    profile: Profile
    plan: Plan
    check: Check
    files: list[Path]  # profile, plan, check, plot
    minutes: float


def quickstart(
    out: str | Path = "quickstart", *, dataset: Sequence[str] = (), device: str | None = None, progress: Progress = Silent()
) -> Quickstart:
    """Profile at 2K tokens and temperature 1, plan, check on unseen text, draw the map; files go into the folder `out`."""
    needs_runtime()  # before anything is written
    from planner.report.plot import speedup_map
    from planner.search.objective import fit_models, predict, with_speedup
    from planner.search.optimize import candidates, make_plan
    from planner.specs import PLAIN

    began = time.perf_counter()
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the folder {folder}: {error.strerror}; choose another with --out") from None
    files = [folder / name for name in ("profile.json", "plan.json", "check.json", "speedup.png")]
    texts = list(dataset) or write_python_texts(folder)
    session = open_session(DEFAULT_MODEL, device=device)

    sampler = Sampler(temperature=1.0)
    settings = Settings(
        contexts=[CONTEXT_LEN], samplers=[sampler], policies=[SparseKV(budget=budget) for budget in BUDGETS], max_draft_len=MAX_DRAFT_LEN,
        num_texts=NUM_TEXTS, output_len=OUTPUT_LEN,
    )  # fmt: skip
    profile = measure(DEFAULT_MODEL, session, texts, settings=settings, progress=progress, began=time.perf_counter())
    save_profile(profile, files[0])

    workload = Workload(context_len=CONTEXT_LEN, output_len=CHECK_OUTPUT_LEN, sampler=sampler)
    plan = make_plan(profile, fingerprint(files[0]), workload, objective="tpot", memory_cap_bytes=None)
    save_plan(plan, files[1])
    check = run_check(session, plan, fingerprint(files[1]), texts, num_texts=CHECK_TEXTS, epsilon=None, seed=1, progress=progress)
    save_check(check, files[2])

    models = fit_models(profile)
    baseline = predict(models, PLAIN, workload)
    estimates = [with_speedup(predict(models, config, workload), baseline, "tpot").estimate for config in candidates(models)]
    tied = {tie.config for tie in plan.ties}
    plain_s = next(cell.measured_tpot_s.value for cell in check.cells if cell.role == "baseline")
    speedup_map(
        files[3],
        [(estimate.config, estimate.speedup.value, estimate.config in tied) for estimate in estimates],
        plan.chosen,
        f"{profile.target.name}, {profile.device.name}: speedup of TPOT at {CONTEXT_LEN} tokens, temperature 1",
        [(cell.config, plain_s / cell.measured_tpot_s.value) for cell in check.cells if cell.role != "baseline"],
    )
    return Quickstart(profile, plan, check, files, (time.perf_counter() - began) / 60)


def write_python_texts(folder: Path) -> list[str]:
    """Prose and code from the standard library, as two files: a user's machine need not have any text of its own."""
    import _pydecimal
    import argparse
    import pydoc_data.topics
    import typing

    texts = {
        "python_docs.txt": "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)),
        "python_code.txt": "\n\n".join(inspect.getsource(module) for module in (_pydecimal, argparse, typing)),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [str(folder / name) for name in texts]
