"""How a long function says where it is, without knowing who listens."""

from typing import Protocol


class Progress(Protocol):
    def stage(self, name: str, total: int) -> None:
        """A new stage of `total` steps begins."""

    def advance(self, n: int = 1) -> None:
        """n steps of the stage are done."""


class Silent:
    """Nobody listens."""

    def stage(self, name: str, total: int) -> None:
        pass

    def advance(self, n: int = 1) -> None:
        pass
