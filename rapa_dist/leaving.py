"""Ending this process while its main thread waits in vain, so that nothing can be raised there."""

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


def report_with(report: Report) -> None:
    """Have errors that end the process reported in another way, as by a command line with its exit codes."""
    global _report
    _report = report


def leave(error: BaseException) -> NoReturn:
    """Report an error, and end the process at once; what it put anywhere has to be removed before."""
    code = 1
    try:
        code = _report(error)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
    finally:
        os._exit(code)
