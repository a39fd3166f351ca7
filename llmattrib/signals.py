"""What a process does when it is asked to stop: SIGTERM (a scheduler, a launcher) or SIGUSR1 (Slurm's warning).

`ending` leaves at once by `SystemExit`, so that locks are given back. `deferred`, inside it, only notes the signal, and
work that comes in pieces looks at the note between two of them. A handler that someone else has installed stays, and
outside the main thread nothing is changed. SIGKILL cannot be handled; nothing here is needed for what it leaves.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75
"""Of a process that was asked to stop and is to be run again: EX_TEMPFAIL of sysexits.h."""
Handler = Callable[[int, FrameType | None], None]


def ending() -> contextlib.AbstractContextManager[None]:
    """Let a signal to stop end the process by `SystemExit(128 + signal)`, through every `finally`."""
    return _handled(_end)


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Note signals to stop instead of obeying them.

    Yields:
        What says whether one came.
    """
    noted: list[int] = []
    with _handled(lambda number, frame: noted.append(number)):
        yield lambda: bool(noted)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _handled(handler: Handler) -> Iterator[None]:
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in STOPPING}
    mine = {number: old for number, old in before.items() if old in (signal.SIG_DFL, _end)}
    for number in mine:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in mine.items():
            signal.signal(number, old)
