import os
import signal
import threading

import pytest

from pisa_d2.engine.signals import on_signals

BOTH = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def own_handlers():
    """Handlers that end no test run, and those of pytest afterwards."""
    before = {signum: signal.signal(signum, lambda *_: None) for signum in BOTH}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_both_signals_are_handled_until_the_end_even_after_an_error():
    before = [signal.getsignal(signum) for signum in BOTH]
    told = []
    with pytest.raises(KeyError), on_signals(lambda signum, frame: told.append(signum)):
        for signum in BOTH:
            os.kill(os.getpid(), signum)
        raise KeyError
    assert told == list(BOTH)
    assert [signal.getsignal(signum) for signum in BOTH] == before


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    told = []
    with on_signals(lambda signum, frame: told.append(signum)):
        for signum in BOTH:
            os.kill(os.getpid(), signum)
    assert told == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_another_thread_changes_nothing():
    found = []

    def look():
        with on_signals(lambda signum, frame: None):
            found.extend(signal.getsignal(signum) for signum in BOTH)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signum) for signum in BOTH]
