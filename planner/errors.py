"""Errors a caller may handle. Each message gives the rule, the value, and the remedy, on one line."""


class PlannerError(Exception):
    """Anything this package raises on purpose about its input or its surroundings; exit code 2."""


class BadInput(PlannerError, ValueError):
    """A file, flag or argument that breaks a rule."""


class Unfinished(PlannerError):
    """The machine did not let something be finished: the disk is full, or memory ran out."""


class OutOfMemory(Unfinished):
    """The memory does not suffice."""


class MissingExtra(PlannerError, ImportError):
    """A command that needs an optional part of the installation, `specplan[runtime]` for one."""


class ServerError(PlannerError):
    """A server that cannot be reached, or does not answer as it should."""
