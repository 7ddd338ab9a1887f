"""Where words go: data on stdout, everything else on stderr."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rapa_dist import folders

# A width of 0, as some surroundings have it, is a width that is not known; rich would print nothing at all.
_width = 80 if os.environ.get("COLUMNS", "1").strip("0") == "" else None

stderr = Console(stderr=True, highlight=False, soft_wrap=True, width=_width)
stdout = Console(highlight=False, soft_wrap=True, width=_width)


def home_as_tilde(path: Path | str) -> str:
    """Return a path as people write it, with ~ for the home directory."""
    home, text = folders.home(), str(path)
    if home is None or not (text == f"{home}" or text.startswith(f"{home}/")):
        return text
    return f"~{text.removeprefix(f'{home}')}"


def counted(number: int, noun: str) -> str:
    """Return so many of something, in the singular where it is one: "1 tile", "1,000 tiles"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


Advance = Callable[[int, int], None]
"""Called with (done, total) as some work goes on."""


@contextmanager
def work(description: str, unit: str = "", *, auto_refresh: bool = True) -> Iterator[Advance]:
    """Show the progress of some work on stderr: a bar on a terminal, a line every 10 s elsewhere.

    Without `auto_refresh` it is redrawn only as the work goes on: no second thread beside what is being timed.
    """
    if stderr.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=stderr, transient=True, auto_refresh=auto_refresh) as progress:
            task = progress.add_task(description, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total, refresh=not auto_refresh)
        return
    last = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 10:
            last = time.monotonic()
            stderr.print(f"{description}: {done:,} of {total:,} {unit}".rstrip(), markup=False)

    yield advance
