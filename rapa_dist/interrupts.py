"""Ctrl-C and the signals of batch systems: when they stop a run, and when they have to wait."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

NOTICES = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""That the terminal has been closed, and what batch systems send some time before they kill (Slurm, Grid Engine, LSF):
nobody has lost patience yet, however often they come."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, *NOTICES)
_ONE_DEED_S = 0.1  # `timeout`, a shell or a wrapper may pass on a signal that the whole group has got already
_Handler = Callable[[int, FrameType | None], None]


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether somebody wants to stop.

    The first signal only answers it, so that the step under way can be finished and saved; a second Ctrl-C or SIGTERM
    raises KeyboardInterrupt at once. A notice that comes still later says nothing new, and changes nothing.
    """
    asked: float | None = None

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked is None:
            asked = time.monotonic()
        elif number not in NOTICES and time.monotonic() - asked > _ONE_DEED_S:
            raise KeyboardInterrupt

    with _handled_by(ask) as before:
        try:
            yield lambda: asked is not None
        finally:
            if asked is not None:
                before |= {number: _heed_no_more for number in NOTICES if callable(before.get(number))}


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let signals wait until what is being cleaned up is clean; one that came is raised again at the end.

    It may be nested: then the end is that of the outermost.
    """
    came = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = number

    with _handled_by(note):
        yield
    if came:
        signal.raise_signal(came)  # the same: SIGINT may be ignored, as in the background of a shell


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, as Ctrl-C does, for a signal by which others than a person end a program."""
    notice_no_more()
    raise KeyboardInterrupt


def end_like_ctrl_c() -> None:
    """Have the other signals end this process as Ctrl-C does: cleaned up."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, *NOTICES):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, interrupt)


def notice_no_more() -> None:
    """Let notices change nothing any more: the command ends, or has ended and only its process is still there."""
    if threading.current_thread() is threading.main_thread():
        for number in NOTICES:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _heed_no_more)


def _heed_no_more(number: int, frame: FrameType | None) -> None:
    """Do nothing, as SIG_IGN does, which the processes that are started would inherit."""


@contextmanager
def _handled_by(handler: _Handler) -> Iterator[dict[signal.Signals, Any]]:
    """Yield the handlers that are put back at the end; they may be changed."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield {}
        return
    heeded = [number for number in _SIGNALS if number not in NOTICES or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}  # under nohup, SIGHUP is ignored
    try:
        yield before
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
