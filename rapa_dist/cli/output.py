"""The `--json` option, and the one object that a command prints under it."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import PurePath

import click

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout, and nothing else there."
)
"""Passes `as_json` to the command. Logs and progress go to stderr with it and without it."""


@dataclasses.dataclass(slots=True)
class Output:
    """What a command line has put on stdout as JSON: nothing yet, or its one object."""

    emitted: bool = False


def emit(value: Mapping[str, object]) -> None:
    """Print the one JSON object of this command line; quantities carry their unit in the key.

    NumPy scalars and arrays become numbers and lists, dataclasses objects, paths strings. JSON knows no
    NaN or infinity: they become null. Raises RuntimeError if an object has been printed before.
    """
    context = click.get_current_context(silent=True)
    output = context.find_object(Output) if context else None
    if output is not None:
        if output.emitted:
            raise RuntimeError("a second JSON object on one stdout: --json promises exactly one")
        output.emitted = True
    click.echo(json.dumps(_plain(value), ensure_ascii=False))


def emit_error(kind: str, message: str, output: Output) -> None:
    """Print the error as the one JSON object, unless the command has already printed its own."""
    if not output.emitted:
        output.emitted = True
        click.echo(json.dumps({"error": {"type": kind, "message": message}}, ensure_ascii=False))


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
