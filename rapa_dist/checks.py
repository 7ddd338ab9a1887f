"""Checks of values that users give; each message says what was expected, what came, and what to do."""

import difflib
import math
from collections.abc import Collection

from rapa_dist.errors import UsageError


def listed(numbers: tuple[int, ...]) -> str:
    """Return numbers as options take them: "16,4,1"."""
    return ",".join(map(str, numbers))


def parse_list(option: str, text: str) -> tuple[int, ...]:
    """Parse "16,4,1".

    Raises:
        UsageError: a part is no integer; it is named.
    """
    numbers = []
    for part in text.split(","):
        try:
            numbers.append(int(part))
        except ValueError:
            raise UsageError(
                f"{option} needs integers with commas between, like 16,4,1; “{part}” in “{text}” is not an integer."
            ) from None
    return tuple(numbers)


def parse_image(option: str, text: str) -> tuple[int, int, int]:
    """Parse "3,32,32": channels, h and w of an image.

    Raises:
        UsageError: it is no three numbers from 1.
    """
    numbers = parse_list(option, text)
    if len(numbers) != 3 or min(numbers) < 1:
        raise UsageError(f"{option} needs channels, height and width of an image, like 3,32,32; it is “{text}”.")
    return numbers[0], numbers[1], numbers[2]


def parse_rates(option: str, texts: Collection[str]) -> tuple[tuple[str, float], ...]:
    """Parse "features.0=0.1", each a layer's name and its λ.

    Raises:
        UsageError: one has no name or no number, or a layer comes twice.
    """
    rates: dict[str, float] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            rate = float(number)
        except ValueError:
            name = ""
        if not name:
            raise UsageError(f"{option} needs a layer's name, “=” and a number, like conv0=0.1; not “{text}”.")
        if name in rates:
            raise UsageError(f"{option} gives {name} two rates, {rates[name]:g} and {rate:g}. Leave one of them out.")
        rates[name] = rate
    return tuple(rates.items())


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UsageError unless a value is one of some; the nearest is suggested."""
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"{option} is one of {', '.join(choices)}; not “{value}”.{hint}")


def check_positive_integers(option: str, values: tuple[int, ...], most: int | None) -> None:
    """Raise UsageError unless all values are at least 1 and, where there is a limit, at most `most`."""
    for value in values:
        if value < 1 or (most is not None and value > most):
            bound = f" and at most {most:,}" if most is not None else ""
            raise UsageError(f"{option} needs numbers of at least 1{bound}; it has {value:,} in {values}.")


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise UsageError if the value of a field is below `least`."""
    if value < least:
        raise UsageError(f"--{name.replace('_', '-')} needs at least {least}; it is {value}.")


def check_weight_decay(lr: float, weight_decay: float, given: Collection[str]) -> None:
    """Raise UsageError unless a step leaves something of every weight; what is named is what was given."""
    if 0 <= weight_decay * lr < 1:
        return
    why = "each step multiplies all weights by 1 - λ · weight decay"
    if not 0 <= weight_decay < math.inf or not lr > 0:
        raise UsageError(f"--weight-decay needs a number from 0, like 0.0001; it is {weight_decay}.")
    if "lr" not in given:
        raise UsageError(
            f"--weight-decay needs a number from 0 to below 1 / λ, here {1 / lr:g}; it is {weight_decay}: {why}."
        )
    if "weight_decay" not in given:
        raise UsageError(
            f"--lr needs a number below {1 / weight_decay:g} where the weight decay is {weight_decay:g}, its default; "
            f"it is {lr:g}: {why}."
        )
    raise UsageError(
        f"--lr {lr:g} and --weight-decay {weight_decay:g} need a product below 1; it is {lr * weight_decay:g}: {why}. "
        "Use a smaller one of the two."
    )
