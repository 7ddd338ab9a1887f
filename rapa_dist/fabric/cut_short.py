"""What a process says before it ends because a file that it has mapped was cut short by somebody else.

Memory whose file has gone can't be touched: the kernel sends SIGBUS, and without a handler the process ends without a
word. A handler of Python's own would never be called, as it waits for the end of the instruction that the kernel
repeats for good. So the kernel calls this one itself, through ctypes, where it may not return: it says a sentence,
and ends the process as a failure. What touches mapped memory holds no lock but the interpreter's, so that Python works.
"""

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_signal = ctypes.CDLL(None).signal
_signal.argtypes, _signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p


class Guard:
    """Has the process say what was cut short, if something was, until it is closed."""

    def __init__(self, what_is_cut: Callable[[], str | None], clean_up: Callable[[], None]) -> None:
        """Begin.

        Args:
            what_is_cut: returns the sentence to say; None if no file was cut short, so that it has another cause.
            clean_up: called before the process ends.
        """
        self.what_is_cut, self.clean_up = what_is_cut, clean_up
        _guards.append(self)
        before = _signal(signal.SIGBUS, _handler)
        if before != _handler.value:
            _before.append(before)

    def close(self) -> None:
        """Say nothing any more. Safe to call twice."""
        if self in _guards:
            _guards.remove(self)
            if not _guards:
                _restore()


def _handle(number: int) -> None:
    for guard in _guards:
        if (sentence := guard.what_is_cut()) is not None:
            with suppress(OSError):
                os.write(2, f"Error: {sentence}\n".encode(errors="backslashreplace"))
            for tell in _last_words:
                with suppress(Exception):
                    tell(sentence)
            try:
                guard.clean_up()
            finally:  # whatever that raises: to return would repeat the instruction, for good
                os._exit(1)
    _restore()  # it has another cause: the instruction is repeated, and whoever handled that before has it


def _restore() -> None:
    if _before:
        _signal(signal.SIGBUS, _before[-1])
        _before.clear()


@contextmanager
def last_words(tell: Callable[[str], None]) -> Iterator[None]:
    """Have something said, or written, where the process ends so: it gets the sentence on what was cut short."""
    _last_words.append(tell)
    try:
        yield
    finally:
        _last_words.remove(tell)


_guards: list[Guard] = []
_last_words: list[Callable[[str], None]] = []
_before: list[int | None] = []
_handler = ctypes.cast(_Handler(_handle), ctypes.c_void_p)  # keeps what it was made of
