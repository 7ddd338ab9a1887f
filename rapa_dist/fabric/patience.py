"""Ray is waited for, but not for ever, and Ctrl-C is heard meanwhile.

Where something is missing, or one of its processes is stopped, calls of Ray that connect or disconnect may not return
for minutes; they are in C++ then, where Python's handlers of signals don't run. A thread looks after them: it ends
what they wait for, and the whole process if they don't return even then.
"""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rapa_dist.errors import ClusterError
from rapa_dist.fabric.scratch import abandon_all
from rapa_dist.interrupts import NOTICES, uninterrupted
from rapa_dist.leaving import leave

LIMIT_S = 120.0
"""For Ray to start or to be joined: 3 s as a rule, half a minute on a machine with much else to do."""
_GRACE_S = 5.0  # after a signal, for a call to come to its end, as it mostly does
_UNWIND_S = 5.0  # for it to return once what it waits for was ended
_LOOK_S = 0.1
_LONGEST_COUNTED_S = 1.0  # between two looks: this process may have been stopped in between
ADVICE = (
    "Look whether processes of the Ray cluster are stopped, and into its logs: /tmp/ray, if it was started by hand."
)
_IMPATIENT = (signal.SIGINT, signal.SIGTERM, *NOTICES)
_INSTALL = "_ZN3ray6RayLog27InstallFailureSignalHandlerEPKcb"


@contextmanager
def bounded(
    what: str,
    advice: str,
    *,
    limit_s: float = LIMIT_S,
    grace_s: float = 0.0,
    end: Callable[[], None] = lambda: None,
    needed: bool = True,
) -> Iterator[None]:
    """Give what Ray does inside so much time, and after a signal a few seconds.

    Args:
        what: it does, for the message, like "Starting Ray".
        advice: what the user can do where it does not come to its end.
        limit_s: the limit in seconds.
        grace_s: further seconds after a signal.
        end: called on another thread when it is over, to end what Ray waits for. Where it does not return even then,
            this process ends, and its scratch directories go with what lives in them.
        needed: whether nothing can go on without it; if not, it is enough that it was ended.

    Raises:
        ClusterError: it was over, and it is needed.
        KeyboardInterrupt: there was a signal.
    """
    guard = _Guard(what, advice, limit_s, grace_s, end)
    with uninterrupted(), _signals_heard(guard):
        guard.start()
        try:
            yield
        except BaseException as error:
            if (over := guard.finish(failed=True)) is not None and needed:
                raise over from error
            if not (guard.ended and isinstance(error, Exception)):  # else it failed because of that, as it should
                raise
        if (over := guard.finish()) is not None and needed:
            raise over


class _Guard(threading.Thread):
    """Looks after one call."""

    signals: int | None = None
    """Where the numbers of signals are read; None: they are not heard on the thread that calls."""

    def __init__(self, what: str, advice: str, limit_s: float, grace_s: float, end: Callable[[], None]) -> None:
        super().__init__(name="patience", daemon=True)
        self._what, self._advice, self._end = what, advice, end
        self._limit_s, self._grace_s = limit_s, _GRACE_S + grace_s
        self._done, self._decision = threading.Event(), threading.Lock()
        self._over: BaseException | None = None
        self._signalled = False
        self.ended = False
        """Whether what it waits for was ended."""

    def finish(self, *, failed: bool = False) -> BaseException | None:
        """Look after it no more, as it has returned or failed; return why it was over, if it was."""
        with self._decision:
            self._done.set()
        if failed and self._over is None and self._is_signalled():  # some calls let no thread run meanwhile
            self._over = KeyboardInterrupt()
        return self._over

    def run(self) -> None:
        waited_s, signalled_s, looked = 0.0, None, time.monotonic()
        while not self._done.wait(_LOOK_S):
            now = time.monotonic()
            waited_s, looked = waited_s + min(now - looked, _LONGEST_COUNTED_S), now
            if self._is_signalled() and signalled_s is None:
                signalled_s = waited_s
            if signalled_s is not None and waited_s - signalled_s > self._grace_s:
                self._give_up(KeyboardInterrupt())
            elif waited_s > self._limit_s:
                self._give_up(ClusterError(f"{self._what} takes longer than {self._limit_s:.0f} s. {self._advice}"))

    def _is_signalled(self) -> bool:
        if self.signals is not None:
            with suppress(BlockingIOError):
                self._signalled |= any(number in _IMPATIENT for number in os.read(self.signals, 64))
        return self._signalled

    def _give_up(self, why: BaseException) -> None:
        with self._decision:
            if self._done.is_set():
                return
            self._over, self.ended = why, True
        try:
            self._end()
        finally:
            if not self._done.wait(_UNWIND_S):
                with suppress(Exception):
                    abandon_all()
                leave(why)


@contextmanager
def _signals_heard(guard: _Guard) -> Iterator[None]:
    """Have a guard told of signals, and Ray put no handlers of its own in place of Python's.

    It has three: two in Python, which exit with codes of their own, and one in C++, which prints where the process is
    and ends it by the signal itself, with everything left behind. The latter is installed once in a process: it is,
    here, before the handlers that are there are put back.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    import ray

    with suppress(OSError, AttributeError):  # another version of Ray may have none
        getattr(ctypes.CDLL(ray._raylet.__file__), _INSTALL)(b"", False)
    set_handler = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda handler: None
    before = {number: handler for number in signal.valid_signals() if callable(handler := signal.getsignal(number))}
    _put_back(before)
    guard.signals, told = os.pipe()
    for descriptor in (guard.signals, told):
        os.set_blocking(descriptor, False)
    woken = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        _put_back(before)
        ray._private.utils.set_sigterm_handler = set_handler
        if guard.is_alive():  # it was never started where no thread could be
            guard.join()
        os.close(guard.signals)
        os.close(told)


def _put_back(handlers: dict[signal.Signals, Callable[..., object]]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
