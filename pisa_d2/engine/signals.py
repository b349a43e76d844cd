"""Handlers of SIGTERM and Ctrl-C."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def on_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """
    Call ``handler`` on SIGTERM and on SIGINT (Ctrl-C) until the context ends, except for a signal
    that the process ignores: a shell makes jobs in the background ignore Ctrl-C. Outside the main
    thread, which alone may set handlers, nothing changes.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(signum) != signal.SIG_IGN:
                before[signum] = signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, of_signal in before.items():
            signal.signal(signum, of_signal)
