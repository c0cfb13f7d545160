"""What files there are, by what they say of themselves: for messages about a file that is another one than was needed.

A file names its kind in the field "kind"; those without one are told by the fields that they alone have. The values that
files hold are in planner/documents.py, which knows all their types.
"""

from typing import NamedTuple

import msgspec


class Kind(NamedTuple):
    name: str
    holds: str  # the class of its value
    written_by: str
    fields: frozenset[str] = frozenset()  # of those without a field "kind": what no other document has
    tag: str | None = None  # the field "kind"

    def __str__(self) -> str:
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name} (`{self.written_by}`)"


KINDS = (
    Kind("profile", "Profile", "planner profile", frozenset({"rounds", "prefill"})),
    Kind("plan", "Plan", "planner plan", frozenset({"chosen", "runners_up"})),
    Kind("check", "Check", "planner check", frozenset({"regret", "passed"})),
    Kind("sweep", "Sweep", "planner sweep", frozenset({"cells", "best", "workload"})),
    Kind("replay", "ServedReplay", "planner replay", frozenset({"log", "groups"})),
    Kind("capacity", "Capacity", "planner capacity --json", frozenset({"pools", "rows"})),
    Kind("audit", "Audit", "planner import audit --json", frozenset({"table", "faults"})),
    Kind("serving profile", "ServingProfile", "planner import bench", tag="serving"),
    Kind("schedule", "Schedule", "planner plan --max-concurrency A..B", tag="schedule"),
    Kind("tuning", "Tuning", "planner tune", tag="tuning"),
    Kind("simulation", "Simulation", "planner simulate", tag="simulation"),
    Kind("drift", "Drift", "planner drift --json", tag="drift"),
    Kind("canary", "Canary", "planner check --base-url", tag="canary"),
    Kind("export", "Export", "planner export", tag="export"),
    Kind("tree", "TreeFile", "planner export", tag="tree"),
)


def kind_by_class(value: type) -> Kind | None:
    return next((kind for kind in KINDS if kind.holds == value.__name__), None)


def kind_by_fields(fields: dict, tag: str | None) -> Kind | None:
    """The kind of a file with these fields, of which `kind` says tag."""
    return next((kind for kind in KINDS if (kind.tag == tag if tag is not None else kind.fields and kind.fields <= fields.keys())), None)


def other_kind(content: bytes, wanted: type, what: str) -> str | None:
    """Where a file that cannot be read as `wanted` is another command's: what it is, and what is needed. None where that is not plain.

    what  the file, as messages call it
    """
    needed = kind_by_class(wanted)
    if needed is None:
        return None
    if content.lstrip()[:1] not in (b"{", b"["):
        table = b"," in content[:4096].split(b"\n", 1)[0] and content[:1000].isascii()
        return f"{what} is not valid: a table is no JSON; this needs {needed}, and `planner import bench` makes profiles of tables" if table else None
    try:
        fields = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    found = None if "kind" in fields else kind_by_fields(fields, None)
    return f"{what} is {found}; this needs {needed}" if found not in (None, needed) else None
