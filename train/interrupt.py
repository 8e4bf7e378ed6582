"""Ctrl-C and SIGTERM end a command with a message about its saved state."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM was received."""


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raise `Terminated` in the main thread at the first SIGTERM; the second one kills the process.

    A handler that is already set is not replaced.
    """

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def on_interrupt(describe: Callable[[], str]) -> Iterator[None]:
    """Add the message of `describe` to interrupts without a message."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise type(error)(str(error) or describe()) from None
