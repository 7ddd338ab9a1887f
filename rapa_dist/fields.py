"""What was read from a file, held against what this program writes there: names, types and ranges.

A field is looked at once, where it is read; whoever uses it needs no further check.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

_MOST = 2**63 - 1
_LARGEST = 1e300  # so that the sum of some is finite, too
_SHOWN = 40


@dataclass(frozen=True, slots=True)
class Kind:
    """What a field may hold."""

    expected: str
    """As people read it: "a whole number"."""
    fits: Callable[[Any], bool]


def whole(least: int = 0, most: int = _MOST) -> Kind:
    """Return what holds whole numbers in a range."""
    expected = "a whole number" if most == _MOST else f"a whole number up to {most:,}"
    expected += f" from {least:,}" if least else ""
    return Kind(expected, lambda value: type(value) is int and least <= value <= most)


def optional(kind: Kind) -> Kind:
    """Return what may also hold null."""
    return Kind(f"{kind.expected}, or null", lambda value: value is None or kind.fits(value))


def listing(kind: Kind, length: int | None = None) -> Kind:
    """Return what holds a list of so many values of a kind; None: of any length."""
    number = "" if length is None else f"{length} × "
    return Kind(
        f"a list of {number}{kind.expected}",
        lambda v: isinstance(v, list) and length in (None, len(v)) and all(map(kind.fits, v)),
    )


NUMBER = Kind(
    "a finite number",
    lambda value: type(value) in (int, float) and -_LARGEST <= value <= _LARGEST and math.isfinite(value),
)
POSITIVE = Kind("a finite number from 0", lambda value: NUMBER.fits(value) and value >= 0)
TEXT = Kind("text", lambda value: isinstance(value, str) and "\0" not in value)
TRUTH = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def check(
    values: Any, kinds: Mapping[str, Kind], *, may_lack: Collection[str] = (), exact: bool = False
) -> dict[str, Any]:
    """Return an object whose fields are these.

    Args:
        values: what was read.
        kinds: what each field may hold.
        may_lack: fields that need not be there.
        exact: whether there may be no others.

    Raises:
        ValueError: it is no object, or lacks a field, or one holds something else.
    """
    if not isinstance(values, dict):
        raise ValueError(f"an object is expected, not {shown(values)}")
    if lacking := [name for name in kinds if name not in values and name not in may_lack]:
        raise ValueError(f"it lacks {', '.join(lacking)}")
    if exact and (others := values.keys() - kinds.keys()):
        raise ValueError(f"{shown(', '.join(sorted(others)))} is unknown")
    for name, kind in kinds.items():
        if name in values and not kind.fits(values[name]):
            raise ValueError(f"{name} is {shown(values[name])}, expected {kind.expected}")
    return values


def shown(value: Any) -> str:
    """Return a value as a part of a message, cut short."""
    try:
        text = repr(value)
    except ValueError:
        text = "an integer of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
