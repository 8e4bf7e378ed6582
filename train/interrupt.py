"""Ctrl-C and SIGTERM: both end a command with a line about its saved state."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM was received."""


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raise `Terminated` in the main thread at the first SIGTERM; a second one kills.

    A handler of the caller, or an ignored signal, is not changed.
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
    """Give an interrupt without a message that of `describe`."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise type(error)(str(error) or describe()) from None
