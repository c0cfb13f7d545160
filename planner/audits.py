"""An Audit: what does not add up in a table of measurements, and which of its rows to distrust. Plain JSON."""

from planner.measurements import Name
from planner.specs import Spec

MAX_EXAMPLES = 3


class Fault(Spec, kw_only=True):
    """One kind of contradiction."""

    kind: Name  # a word to filter by
    what: str
    rows: list[str]  # to distrust, all of them; each a file and a line
    examples: list[str]  # some of them with their values
    remedy: str

    def sentence(self) -> str:
        """One line that names the first rows."""
        more = len(self.examples) - MAX_EXAMPLES
        some = ", ".join(text if len(text) < 200 else text[-200:] for text in self.examples[:MAX_EXAMPLES])
        return f"{self.what} in {some}{f' and {more} more' if more > 0 else ''}: {self.remedy}"


class Audit(Spec, kw_only=True):
    """What was found in one table."""

    table: str
    num_rows: int
    faults: list[Fault]
    distrust: list[str]  # rows of all faults, in the table's order
    unchecked: list[str]  # what the table does not say, and what could not be tested for want of it
