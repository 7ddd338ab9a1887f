"""Types of options: what is refused before a command begins."""

import math
from pathlib import Path

import click

from rapa_dist.errors import UsageError
from rapa_dist.folders import expanded


def text(value: str) -> str:
    """Return a name or an address; an empty one, as of `--address "$HEAD"` with no HEAD set, is a mistake."""
    if not value:
        raise click.BadParameter("it is empty. Give a value, or leave it out.")
    return value


def path(value: str) -> Path:
    """Return a path, with ~ for the home directory: the shell expands `--run-dir ~/x`, but not `--run-dir=~/x`."""
    try:
        return expanded(text(value))
    except UsageError as error:
        raise click.BadParameter(str(error)) from None


def patience(value: str) -> float:
    """Return for how many seconds to put up with something; inf is for ever."""
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise click.BadParameter(f"it needs seconds, 0 or more (inf: for ever); it is {value}.")
    return seconds
