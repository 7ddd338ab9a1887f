"""stdin, stdout and stderr, made fit for long work before a command begins.

stdout carries data: what it does not take is an `OutputError`, which says so in a sentence. stderr carries words: what
it does not take is dropped, as no training may end because nobody sees how it goes. Neither fails for a sign that its
encoding lacks.
"""

import codecs
import io
import os
import select
import stat
import sys
from contextlib import suppress
from typing import TextIO

from rapa_dist.errors import OutputError

PATIENCE_MS = 5000  # for a terminal or pipe that takes nothing: stopped by Ctrl-S, or behind a frozen connection
_CHUNK = 1024  # what a pipe or terminal that is ready takes without a wait
_SPELLED_OUT = "spelled-out"
_SPELLING = {
    "λ": "lambda",
    "θ": "theta",
    "µ": "u",
    "…": "...",
    "·": "-",
    "×": "x",
    "−": "-",
    "–": "-",
    "—": "-",
    "“": '"',
    "”": '"',
    "’": "'",
    "→": "->",
    "‖": "||",
    "⟨": "<",
    "⟩": ">",
    "±": "+-",
    "²": "2",
    "ˢ": "^s",
    "\u0304": "_mean",  # the bar of θ̄
}


def prepare() -> None:
    """Put streams that keep these promises in the place of Python's; those that a test has put there stay."""
    _occupy()
    codecs.register_error(_SPELLED_OUT, _spell_out)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(_Data(1), sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Words(2), sys.stderr)


def _occupy() -> None:
    """Open what was closed of 0, 1 and 2: a socket or a checkpoint that got such a number would be printed into.

    As the C library does for programs that run as another user: opened the wrong way round, so that using them fails.
    """
    for number, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)  # the lowest number that is free: this one


def _text(raw: io.RawIOBase, before: TextIO | None) -> io.TextIOWrapper:
    encoding = before.encoding if before is not None else "utf-8"
    return io.TextIOWrapper(raw, encoding, _SPELLED_OUT, newline="\n", write_through=True)  # type: ignore[arg-type]


class _Stream(io.RawIOBase):
    """A file descriptor that is written to, and never closed."""

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def writable(self) -> bool:
        return True


class _Data(_Stream):
    """Takes everything, however long that takes, or raises OutputError."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        left = memoryview(data)
        try:
            while left:
                try:
                    left = left[os.write(self._number, left) :]
                except BlockingIOError:  # whoever else has this terminal or pipe has made it so
                    _ready(self._number, None)
        except OSError as error:
            raise OutputError(error) from error
        return len(data)


class _Words(_Stream):
    """Takes what it can, and lets go of the rest."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self._target = _unblocked(number)
        self._patience_ms = PATIENCE_MS

    def write(self, data: bytes) -> int:  # type: ignore[override]
        left = memoryview(data)
        with suppress(OSError):
            while left and _ready(self._target, self._patience_ms):
                left = left[os.write(self._target, left[:_CHUNK]) :]
        self._patience_ms = 0 if left else PATIENCE_MS  # who has let us wait once is not waited for again
        return len(data)


def _unblocked(number: int) -> int:
    """Return a descriptor of the same pipe or terminal that never blocks; of anything else, the same descriptor.

    A second opening, because to change the first one would change it for everybody who shares it, such as the shell.
    """
    with suppress(OSError):  # as of a terminal that is another user's
        if stat.S_ISFIFO(os.fstat(number).st_mode) or os.isatty(number):
            return os.open(f"/proc/self/fd/{number}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return number


def _ready(number: int, timeout_ms: int | None) -> bool:
    """Return whether a descriptor can be written to, or fails at once, after a wait of at most so long."""
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    return bool(poll.poll(timeout_ms))


def _spell_out(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return what is written for a sign that an encoding lacks, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    sign = error.object[error.start]
    if "\udc80" <= sign <= "\udcff":  # a byte of a file's name that was no UTF-8: it is written as it is on disk
        return bytes([ord(sign) - 0xDC00]), error.start + 1
    return _SPELLING.get(sign) or sign.encode("ascii", "backslashreplace").decode(), error.start + 1
