"""Every document that a command writes: which of them a file is, and its value. Torch-free.

A file says what it is in its field "kind"; those without one are told by the fields that they alone have.
"""

from pathlib import Path
from typing import NamedTuple

import msgspec

from planner.audits import Audit
from planner.canaries import Canary
from planner.capacities import Capacity
from planner.drifts import Drift
from planner.errors import BadInput
from planner.exports import Export
from planner.files import read_bytes
from planner.measurements import Profile, decode_checked, shortened
from planner.plans import Check, Plan, Sweep
from planner.replays import ServedReplay
from planner.schedules import Schedule
from planner.serving import ServingProfile
from planner.simulations import Simulation
from planner.tunings import Tuning

Document = (
    Profile | Plan | Check | Sweep | ServedReplay | ServingProfile | Schedule | Tuning | Simulation | Drift | Canary | Capacity | Audit | Export
)
MAX_QUOTED = 80  # characters of a file's own words in an error


class Kind(NamedTuple):
    name: str
    type: type
    written_by: str
    fields: frozenset[str] = frozenset()  # of those without a field "kind": what no other document has
    tag: str | None = None  # the field "kind"


KINDS = (
    Kind("profile", Profile, "planner profile", frozenset({"rounds", "prefill"})),
    Kind("plan", Plan, "planner plan", frozenset({"chosen", "runners_up"})),
    Kind("check", Check, "planner check", frozenset({"regret", "passed"})),
    Kind("sweep", Sweep, "planner sweep", frozenset({"cells", "best", "workload"})),
    Kind("replay", ServedReplay, "planner replay", frozenset({"log", "groups"})),
    Kind("capacity", Capacity, "planner capacity --json", frozenset({"pools", "rows"})),
    Kind("audit", Audit, "planner import audit --json", frozenset({"table", "faults"})),
    Kind("serving profile", ServingProfile, "planner import bench", tag="serving"),
    Kind("schedule", Schedule, "planner plan --max-concurrency A..B", tag="schedule"),
    Kind("tuning", Tuning, "planner tune", tag="tuning"),
    Kind("simulation", Simulation, "planner simulate", tag="simulation"),
    Kind("drift", Drift, "planner drift --json", tag="drift"),
    Kind("canary", Canary, "planner check --base-url", tag="canary"),
    Kind("export", Export, "planner export", tag="export"),
)


def kind_of(document: Document) -> Kind:
    return next(kind for kind in KINDS if type(document) is kind.type)


def load_document(path: str | Path) -> Document:
    """Read and check a document, whatever it is; BadInput names the field that is wrong, or the kinds there are."""
    content = read_bytes(path, "document")
    try:
        fields = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
        tag = msgspec.json.decode(fields["kind"]) if "kind" in fields else None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"document {path} is not valid: {shortened(str(error))}; {_known()}") from None
    kind = next((kind for kind in KINDS if (kind.tag == tag if tag is not None else kind.fields and kind.fields <= fields.keys())), None)
    if kind is None:
        what = f"has kind {str(tag)[:MAX_QUOTED]!r}" if tag is not None else f"has the fields {', '.join(fields)[:MAX_QUOTED]!r}"
        raise BadInput(f"document {path} is of no known kind, it {what}; {_known()}")
    if "schema_version" in kind.type.__struct_fields__:
        return decode_checked(content, kind.type, 1, f"{kind.name} {path}", kind.tag)
    try:
        return msgspec.json.decode(content, type=kind.type)
    except msgspec.MsgspecError as error:
        raise BadInput(f"{kind.name} {path} is not valid: {shortened(str(error))}") from None


def other_kind(content: bytes, wanted: type, what: str) -> str | None:
    """Where a file that cannot be read as `wanted` is another command's: what it is, and what is needed. None where that is not plain.

    what  the file, as messages call it
    """
    needed = next((f"a {kind.name} (`{kind.written_by}`)" for kind in KINDS if kind.type is wanted), None)
    if needed is None:
        return None
    if content.lstrip()[:1] not in (b"{", b"["):
        table = b"," in content[:4096].split(b"\n", 1)[0] and content[:1000].isascii()
        return f"{what} is not valid: a table is no JSON; this needs {needed}, and `planner import bench` makes profiles of tables" if table else None
    try:
        fields = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    found = next((kind for kind in KINDS if "kind" not in fields and kind.fields and kind.fields <= fields.keys() and kind.type is not wanted), None)
    return f"{what} is a {found.name} (`{found.written_by}`); this needs {needed}" if found else None


def _known() -> str:
    return "known are " + ", ".join(f"{kind.name} ({kind.written_by})" for kind in KINDS)
