"""What a command puts on stdout: text, or under `--json` one object; and what happens where it does not get there."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePath

import click

from rapa_dist.errors import OutputError

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout, and nothing else there."
)
"""Passes `as_json` to the command. Logs and progress go to stderr with it and without it."""


@dataclasses.dataclass(slots=True)
class Output:
    """What a command line has put on stdout as JSON: nothing yet, or its one object."""

    emitted: bool = False


def show(text: str) -> None:
    """Print lines of data."""
    sys.stdout.write(f"{text}\n")


def tell(text: str) -> None:
    """Print a message to whoever watches."""
    sys.stderr.write(f"{text}\n")


@contextmanager
def outcome(exit_code: int, kept: str = "") -> Iterator[None]:
    """Leave with an exit code once the result has been shown, and also if it can't be.

    Args:
        exit_code: what the command came to.
        kept: a sentence on where the result is, whatever becomes of stdout.
    """
    try:
        yield
    except OutputError as error:
        raise OutputError(error.cause, kept, exit_code or error.exit_code) from None
    if exit_code:
        raise click.exceptions.Exit(exit_code)


def emit(value: Mapping[str, object]) -> None:
    """Print the one JSON object of this command line, in ASCII; quantities carry their unit in the key.

    NumPy scalars and arrays become numbers and lists, dataclasses objects, paths strings. JSON knows no
    NaN or infinity: they become null. Raises RuntimeError if an object has been printed before.
    """
    context = click.get_current_context(silent=True)
    output = context.find_object(Output) if context else None
    if output is not None and output.emitted:
        raise RuntimeError("a second JSON object on one stdout: --json promises exactly one")
    show(json.dumps(_plain(value)))
    if output is not None:
        output.emitted = True


def emit_error(kind: str, message: str, output: Output) -> None:
    """Print the error as the one JSON object, unless the command has already printed its own."""
    if not output.emitted:
        output.emitted = True
        show(json.dumps({"error": {"type": kind, "message": message}}))


def _plain(value: object) -> object:
    """Return the same value in the types that JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if hasattr(value, "tolist"):  # a NumPy scalar or array, a torch tensor
        return _plain(value.tolist())
    return value
