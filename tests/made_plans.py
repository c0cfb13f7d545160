"""Six plans that every exporter is shown, each with what a user says beside it."""

from typing import NamedTuple

import numpy as np
from made import DRAFT_MODEL, FIFTH, made_profile
from made_load import roofline

import planner
from planner.commands.flags import AskedExport
from planner.measurements import save_profile
from planner.serving import ModelSize, ServedCell, ServingProfile, SystemSpec, save_serving_profile
from planner.specs import FullKV, SparseKV

CAPACITY = {"none": 300 * 1128, "eagle3": 300 * 1128}


class Case(NamedTuple):
    plan: str
    profile: str
    asked: AskedExport = AskedExport()
    varies: bool = False  # with the load


HEAD = AskedExport(draft_model="org/head")
CASES = {
    "off": Case("off", "useless"),
    "static": Case("static", "own"),
    "schedule": Case("schedule", "served", HEAD, varies=True),
    "sparse kv": Case("sparse", "sparse"),
    "draft model with a path": Case("static", "own", AskedExport(draft_model="other/draft")),
    "several contexts": Case("contexts", "contexts", HEAD._replace(context_len=500), varies=True),
}


def served_profile(contexts=(1000,), name="eagle3") -> ServingProfile:
    """Cells of off and of a drafter that pays at small loads."""

    def cell(drafter, draft_len, concurrency, context_len):
        law = roofline("eagle3" if draft_len else "none", draft_len, np.array([concurrency]), context_len, capacity=CAPACITY, gain=0.75)
        tpot_s, running = (float(value[0]) for value in law)
        tokens = sum(0.75**i for i in range(draft_len + 1))
        return ServedCell(
            drafter=drafter, draft_len=draft_len, concurrency=concurrency, context_len=context_len, output_len=128, tpot_s=tpot_s,
            itl_s=tpot_s * tokens, output_tokens_per_s=running / tpot_s, ttft_s=0.02 * concurrency, tokens_per_round=tokens,
            acceptance=[0.75] * draft_len,
        )  # fmt: skip

    drafting = [(1, 1), (3, 1), (5, 1), (1, 16), (3, 16), (5, 16), (1, 64), (3, 64), (1, 256), (3, 256), (0, 1), (0, 256)]
    cells = [cell("none", 0, concurrency, context_len) for context_len in contexts for concurrency in (1, 16, 64, 256)]
    cells += [cell(name, draft_len, concurrency, context_len) for context_len in contexts for draft_len, concurrency in drafting]
    size = ModelSize(name="org/target", num_layers=32, num_kv_heads=8, head_dim=128, weights_bytes=16 * 2**30)
    return ServingProfile(
        source="made", date="2026-01-01", planner_version="0.1.0", model=size, drafters={}, cells=cells,
        system=SystemSpec(name="a device", memory_bytes=80 * 2**30, fraction=0.9),
    )  # fmt: skip


def write_plans(folder):
    """Paths of all plans and profiles, by name."""
    path = {name: folder / f"{name}.plan.json" for name in ("off", "static", "schedule", "sparse", "contexts")}
    profile = {name: folder / f"{name}.json" for name in ("useless", "own", "served", "sparse", "contexts")}
    save_serving_profile(served_profile(), profile["served"])
    save_serving_profile(served_profile((500, 8000)), profile["contexts"])
    full, windowed = [(DRAFT_MODEL, FullKV())], [(DRAFT_MODEL, SparseKV(budget=256, storage="evict"))]

    def costly(kv, draft_len, context_len):
        draft_s = draft_len * (1e-3 if isinstance(kv, SparseKV) else 6e-3)
        return draft_s, 10e-3 + 1e-3 * draft_len, 1e-4

    save_profile(made_profile(drafters=full, model="org/target"), profile["own"])
    save_profile(made_profile(drafters=full, model="org/target", accept=lambda kv, context_len, number: 0.0), profile["useless"])
    save_profile(
        made_profile(drafters=[*full, *windowed], model="org/target", round_s=costly, accept=lambda kv, c, n: 4 * FIFTH),
        profile["sparse"],
    )
    for name, source in {"off": "useless", "static": "own", "sparse": "sparse"}.items():
        planner.save_plan(planner.plan(profile[source], context_len=1024), path[name])
    planner.save_schedule(planner.schedule(profile["served"], objective="throughput"), path["schedule"])
    planner.save_schedule(planner.schedule(profile["contexts"], objective="throughput"), path["contexts"])
    return path, profile
