"""How this process ends: in good order; or at once, where something in it waits in vain and can't be told so."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

Report = Callable[[BaseException], int]
"""Says what went wrong, and returns the exit code."""


def _say(error: BaseException) -> int:
    sys.stderr.write(f"Error: {error}\n")
    return 1


_report: Report = _say
_at_once = False


def report_with(report: Report) -> None:
    """Have errors that end the process reported in another way, as by a command line with its exit codes."""
    global _report
    _report = report


def leave(error: BaseException) -> NoReturn:
    """Report an error and end the process, while its main thread waits for something that does not come.

    What it put anywhere has to be removed before.
    """
    code = 1
    try:
        code = _report(error)
    finally:
        _exit(code)


def will_end_at_once() -> None:
    """Have `hurry` end the process: when it ends in good order, some library would wait for good."""
    global _at_once
    _at_once = True


def hurry(code: int) -> None:
    """End the process with an exit code if it has to end at once; call it when everything is done."""
    if _at_once:
        _exit(code)


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
