"""Cost-aware planning of speculative decoding with a sparse drafter cache. Importing this does not import torch.

The verbs are functions that return documents (docs/files.md): profile, plan, schedule (a plan by load), estimate, estimate_served,
capacity, check, canary, drift, tune, sweep, simulate, replay, generate, export, import_bench, audit, diff, show,
demo, doctor, quickstart.
`load_document` reads any of their files. Values that they take stand here too: Workload, Sampler, SparseKV, DraftConfig, Settings, ..
Every name is imported when it is first used; torch only by those that run a model.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for checkers and editors, which do not run __getattr__
    from planner.commands.audit import audit as audit
    from planner.commands.canary import canary as canary
    from planner.commands.capacity import capacity as capacity
    from planner.commands.check import check as check
    from planner.commands.demo import demo as demo
    from planner.commands.diff import diff as diff
    from planner.commands.doctor import doctor as doctor
    from planner.commands.drift import drift as drift
    from planner.commands.export import export as export
    from planner.commands.flags import Asked as Asked
    from planner.commands.flags import AskedExport as AskedExport
    from planner.commands.flags import AskedSimulation as AskedSimulation
    from planner.commands.flags import AskedTune as AskedTune
    from planner.commands.generate import generate as generate
    from planner.commands.import_bench import import_bench as import_bench
    from planner.commands.materialize import materialize as materialize
    from planner.commands.plan import estimate as estimate
    from planner.commands.plan import plan as plan
    from planner.commands.profile import profile as profile
    from planner.commands.profile_settings import Settings as Settings
    from planner.commands.quickstart import quickstart as quickstart
    from planner.commands.replay import replay as replay
    from planner.commands.schedule import estimate_served as estimate_served
    from planner.commands.schedule import schedule as schedule
    from planner.commands.show import show as show
    from planner.commands.simulate import simulate as simulate
    from planner.commands.sweep import sweep as sweep
    from planner.commands.train_block_diffusion import train_block_diffusion as train_block_diffusion
    from planner.commands.train_multi_view import train_multi_view as train_multi_view
    from planner.commands.train_texts import train_texts as train_texts
    from planner.commands.tune import tune as tune
    from planner.documents import load_document as load_document
    from planner.errors import BadInput as BadInput
    from planner.errors import PlannerError as PlannerError
    from planner.measurements import load_profile as load_profile
    from planner.measurements import save_profile as save_profile
    from planner.plans import load_plan as load_plan
    from planner.plans import save_plan as save_plan
    from planner.schedules import Limits as Limits
    from planner.schedules import Setting as Setting
    from planner.schedules import load_schedule as load_schedule
    from planner.schedules import save_schedule as save_schedule
    from planner.serving import load_any_profile as load_any_profile
    from planner.specs import DraftConfig as DraftConfig
    from planner.specs import DrafterSpec as DrafterSpec
    from planner.specs import FullKV as FullKV
    from planner.specs import Sampler as Sampler
    from planner.specs import SparseKV as SparseKV
    from planner.specs import Workload as Workload

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
    "show": "planner.commands.show",
    "tune": "planner.commands.tune",
    "AskedTune": "planner.commands.flags",
    "train_texts": "planner.commands.train_texts",
    "train_multi_view": "planner.commands.train_multi_view",
    "train_block_diffusion": "planner.commands.train_block_diffusion",
    "materialize": "planner.commands.materialize",
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
    "quickstart": "planner.commands.quickstart",
    "Settings": "planner.commands.profile_settings",
    "Workload": "planner.specs",
    "Sampler": "planner.specs",
    "DraftConfig": "planner.specs",
    "DrafterSpec": "planner.specs",
    "FullKV": "planner.specs",
    "SparseKV": "planner.specs",
    "Setting": "planner.schedules",
    "Limits": "planner.schedules",
    "PlannerError": "planner.errors",
    "BadInput": "planner.errors",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'planner' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
