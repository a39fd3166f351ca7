"""Signals to stop: noted or obeyed, and handlers of others, or other threads, left alone."""

import os
import signal
import threading

import pytest

from llmattrib.signals import STOPPING, deferred, ending


def handlers():
    return [signal.getsignal(number) for number in STOPPING]


@pytest.mark.parametrize("number", STOPPING)
def test_ending_leaves_through_every_finally(number):
    before, left = handlers(), []

    def work():
        with ending():
            try:
                os.kill(os.getpid(), number)
                signal.pause()
            finally:
                left.append(True)

    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == 128 + number
    assert left == [True]
    assert handlers() == before == [signal.SIG_DFL] * 2


@pytest.mark.parametrize("number", STOPPING)
def test_deferred_inside_ending_notes_and_goes_on(number):
    with ending():
        outer = handlers()
        with deferred() as is_asked:
            assert not is_asked()
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            assert is_asked()
        assert handlers() == outer
    assert handlers() == [signal.SIG_DFL] * 2


def test_the_handler_of_someone_else_stays():
    got = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    try:
        with ending(), deferred() as is_asked:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not is_asked()
        assert got == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_other_threads_change_nothing():
    found = []

    def work():
        with ending(), deferred() as is_asked:
            found.extend([*handlers(), is_asked()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL, signal.SIG_DFL, False]
