"""Cost-aware planning of speculative decoding with a sparse drafter cache. Importing this does not import torch.

The verbs are functions: profile, plan, schedule (a plan by load), estimate, estimate_served, capacity, check, canary, drift, tune,
sweep, simulate, replay, generate, export, import_bench, audit, and load_profile, load_plan for their files.
"""

from importlib import import_module

__version__ = "0.1.0"

_WHERE = {
    "profile": "planner.commands.profile",
    "plan": "planner.commands.plan",
    "estimate": "planner.commands.plan",
    "schedule": "planner.commands.schedule",
    "estimate_served": "planner.commands.schedule",
    "Asked": "planner.commands.flags",
    "capacity": "planner.commands.capacity",
    "check": "planner.commands.check",
    "canary": "planner.commands.canary",
    "drift": "planner.commands.drift",
    "sweep": "planner.commands.sweep",
    "simulate": "planner.commands.simulate",
    "AskedSimulation": "planner.commands.flags",
    "replay": "planner.commands.replay",
    "generate": "planner.commands.generate",
    "export": "planner.commands.export",
    "AskedExport": "planner.commands.flags",
    "tune": "planner.commands.tune",
    "AskedTune": "planner.commands.flags",
    "import_bench": "planner.commands.import_bench",
    "audit": "planner.commands.audit",
    "diff": "planner.commands.diff",
    "doctor": "planner.commands.doctor",
    "demo": "planner.commands.demo",
    "load_profile": "planner.measurements",
    "save_profile": "planner.measurements",
    "load_any_profile": "planner.serving",
    "load_document": "planner.documents",
    "load_plan": "planner.plans",
    "save_plan": "planner.plans",
    "load_schedule": "planner.schedules",
    "save_schedule": "planner.schedules",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'planner' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
