"""planner simulate, end to end: profiles, schedules and plans in, one document out."""

from tests.cli import invoke  # noqa: F401 - replaced below if absent
