"""How a long stage tells its caller how far it is; the command line turns it into a bar."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (units done, units in all); the unit is the stage's own (examples, steps, passes)."""


def silent(done: int, total: int) -> None:
    """Ignore progress."""
