"""Every document that a command writes and `planner show` shows: which of them a file is, and its value. Torch-free."""

from pathlib import Path
from typing import get_args

import msgspec

from planner.audits import Audit
from planner.canaries import Canary
from planner.capacities import Capacity
from planner.drifts import Drift
from planner.errors import BadInput
from planner.exports import Export
from planner.files import read_bytes
from planner.kinds import Kind, kind_by_class, kind_by_fields
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
VALUES = {kind_by_class(value): value for value in get_args(Document)}


def kind_of(document: Document) -> Kind:
    return kind_by_class(type(document))


def load_document(path: str | Path) -> Document:
    """Read and check a document, whatever it is; BadInput names the field that is wrong, or the kinds there are."""
    content = read_bytes(path, "document")
    try:
        fields = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
        tag = msgspec.json.decode(fields["kind"]) if "kind" in fields else None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"document {path} is not valid: {shortened(str(error))}; {_known()}") from None
    kind = kind_by_fields(fields, tag)
    if kind not in VALUES:
        what = f"has kind {str(tag)[:MAX_QUOTED]!r}" if tag is not None else f"has the fields {', '.join(fields)[:MAX_QUOTED]!r}"
        raise BadInput(f"document {path} is of no known kind, it {what}; {_known()}")
    value = VALUES[kind]
    if "schema_version" in value.__struct_fields__:
        return decode_checked(content, value, 1, f"{kind.name} {path}", kind.tag)
    try:
        return msgspec.json.decode(content, type=value)
    except msgspec.MsgspecError as error:
        raise BadInput(f"{kind.name} {path} is not valid: {shortened(str(error))}") from None


def _known() -> str:
    return "known are " + ", ".join(f"{kind.name} ({kind.written_by})" for kind in VALUES)
