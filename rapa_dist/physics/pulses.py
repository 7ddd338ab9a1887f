"""Pulse trains: how an array is updated by the outer product of a patch and an error, one row after the other.

ANALOG.md, section 2, after aihwkit 1.2.0. In NumPy: the reference that the library's pulses.c is held against.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rapa_dist.physics.draws import Draws, Floats, Kind, Words

if TYPE_CHECKING:
    from rapa_dist.physics.devices import Devices
    from rapa_dist.physics.parameters import UpdateParameters

_SLOTS = 32  # pulses of a train that are drawn at once
_BITS = 24  # of a probability


@dataclass(slots=True)
class Sent:
    """What updates have sent."""

    trains: int = 0
    """Rows that were not all zero."""
    slots: int = 0
    """Their BL, added up."""
    pulses: int = 0
    """Pulses that devices got."""


class Train(NamedTuple):
    """How a row's outer product becomes pulses."""

    length: int
    """BL; 0: there is nothing to do."""
    of_patch: np.float32
    """B: what the elements of the patch are multiplied with."""
    of_error: np.float32
    """A: … of the error."""


def train_of(update: "UpdateParameters", largest: tuple[float, float], rate: float, granularity: float) -> Train:
    """Return the pulse train of a row.

    Args:
        update: its parameters.
        largest: the largest absolute values of the patch and of the error.
        rate: λ.
        granularity: g of the devices.
    """
    f = np.float32
    x, d = f(largest[0]), f(largest[1])
    if x == 0 or d == 0 or rate == 0:
        return Train(0, f(0), f(0))
    d = f(update.um_grad_scale) * d
    k = f(rate) * x * d / f(granularity)
    length = update.desired_bl
    if update.update_bl_management:
        length = int(min(np.ceil(k), f(length)))
    scale = np.sqrt(f(rate) / (f(granularity) * f(length)))
    if not update.update_management:
        return Train(length, scale, scale)
    if k > update.desired_bl:
        d = d * (f(update.desired_bl) / k)
    return Train(length, scale * np.sqrt(d / x), scale * np.sqrt(x / d))


def update_rows(
    update: "UpdateParameters",
    devices: "Devices",
    weights: tuple[Floats, Floats],
    rows: tuple[Floats, Floats],
    rate: float,
    draws: Draws,
    cycle: int,
) -> Sent:
    """Update an array, row by row.

    Args:
        update: parameters of the pulses.
        devices: of the array.
        weights: (k + 1, c_out) what is stored, and what is seen of it: the same array where there is no write noise.
            Changed in place.
        rows: (rows, k + 1) patches, with the 1 for the bias, and (rows, c_out) errors.
        rate: λ.
        draws: the tile's.
        cycle: 64-bit number of the cycle, which pulses are drawn for.
    """
    stored, seen = (matrix.reshape(-1) for matrix in weights)
    sent, (patches, errors) = Sent(), rows
    for number, (patch, error) in enumerate(zip(patches, errors, strict=True)):
        largest = float(np.abs(patch).max(initial=0)), float(np.abs(error).max(initial=0))
        train = train_of(update, largest, rate, devices.parameters.granularity)
        if not train.length:
            continue
        sent.trains += 1
        sent.slots += train.length
        where = Drawn(draws, cycle, number)
        for places in _rounds(update, train, patch, error, where):
            up = (patch[places // errors.shape[1]] < 0) != (error[places % errors.shape[1]] < 0)
            _pulse(devices, (stored, seen), places, up, where, sent)
    return sent


class Drawn:
    """The draws of a row's update: noise of pulse after pulse."""

    def __init__(self, draws: Draws, cycle: int, row: int) -> None:
        self._draws, self._cycle, self._row = draws, cycle, row
        self._noise: Floats = np.empty(0, np.float32)
        self._used = 0

    def trials(self, kind: Kind, probabilities: Floats, number: int) -> Words:
        """Return (lines,) 32 trials of each line, one part of the slots after another."""
        found = np.zeros(len(probabilities), np.uint32)
        lines = np.nonzero(probabilities)[0]
        words = self._draws.words_of_lines(kind, self._cycle, self._row, lines, number)
        found[lines] = bernoulli(probabilities[lines], words)
        return found

    def noise(self, count: int) -> Floats:
        """Return the next normal numbers."""
        first, last = self._used, self._used + count
        if last > len(self._noise):
            self._noise = self._draws.normal(Kind.PULSES, self._cycle, np.array([self._row]), 2 * last)[0]
        self._used = last
        return self._noise[first:last]


def _rounds(
    update: "UpdateParameters", train: Train, patch: Floats, error: Floats, where: Drawn
) -> Iterator[NDArray[np.int64]]:
    """Yield, pulse after pulse, the cross-points that get one: numbers in the kernel matrix, in order."""
    x, d, length = np.abs(patch) * train.of_patch, np.abs(error) * train.of_error, train.length
    if update.pulse_type == "STOCHASTIC_COMPRESSED":
        for slot in range(length):
            if slot % _SLOTS == 0:
                part = slot // _SLOTS
                of_patch = where.trials(Kind.PATCH_PULSES, x, part)
                of_error = where.trials(Kind.ERROR_PULSES, d, part)
            lines, columns = (_with(trials, slot % _SLOTS) for trials in (of_patch, of_error))
            if len(lines) and len(columns):
                yield (lines[:, None] * len(d) + columns).ravel()
        return
    counts = _counts(update, x, d, length)
    for number in range(int(counts.max(initial=0))):
        yield np.nonzero(counts > number)[0]


def _counts(update: "UpdateParameters", x: Floats, d: Floats, length: int) -> NDArray[np.int64]:
    """Return ((k + 1) · c_out,) how many pulses each cross-point gets, where nothing is drawn."""
    one, bl = np.float32(1), np.float32(length)
    if update.pulse_type == "MEAN_COUNT":
        of_patch, of_error = np.rint(bl * np.minimum(x, one)), np.rint(bl * np.minimum(d, one))
        counts = np.asarray(of_error * of_patch[:, None] / bl, np.float32)
    else:
        of_patch, of_error = _implicit(x, update.x_res_implicit), _implicit(d, update.d_res_implicit)
        counts = np.asarray(bl * of_error * of_patch[:, None], np.float32)
    found: NDArray[np.int64] = np.rint(counts).astype(np.int64).ravel()
    return found


def _implicit(values: Floats, resolution: float) -> Floats:
    values = np.minimum(values, np.float32(1))
    if resolution <= 0:
        return values
    step = np.float32(1 / resolution if resolution > 1 else resolution)
    found: Floats = np.minimum(np.rint(values / step) * step, np.float32(1))
    return found


def bernoulli(probabilities: Floats, words: Words) -> Words:
    """Draw 32 independent trials for each line.

    A trial compares the bits of a uniform number, from the first on, with those of the probability, until they differ:
    that decides. All trials of a line do so at once, one bit of each in a word; so seven words are enough as a rule.

    Args:
        probabilities: (lines,) of 1 in each trial; what is larger than 1 counts as 1, and all as multiples of 2⁻²⁴.
        words: (lines, 24) random bits.

    Returns:
        (lines,) trial t in bit t.
    """
    whole = np.rint(np.minimum(probabilities, np.float32(1)) * np.float32(1 << _BITS)).astype(np.uint32)
    undecided = np.full(len(whole), 0xFFFFFFFF, np.uint32)
    ones = np.where(whole >> np.uint32(_BITS), undecided, np.uint32(0))  # certain
    for bit in range(_BITS):
        word = words[:, bit]
        is_one = (whole >> np.uint32(_BITS - 1 - bit) & np.uint32(1)).astype(bool)
        ones = ones | np.where(is_one, undecided & ~word, np.uint32(0))
        undecided = undecided & np.where(is_one, word, ~word)
    return ones


def _with(trials: Words, slot: int) -> NDArray[np.int64]:
    """Return which lines have a 1 in a slot."""
    return np.nonzero(trials >> np.uint32(slot) & np.uint32(1))[0]


def _pulse(
    devices: "Devices",
    weights: tuple[Floats, Floats],
    places: NDArray[np.int64],
    up: NDArray[np.bool_],
    where: Drawn,
    sent: Sent,
) -> None:
    """Give devices a pulse each."""
    stored, seen = weights
    count, spread = len(places), devices.parameters.dw_min_std > 0
    sent.pulses += count
    noise = where.noise(count) if spread else None
    devices.pulse(stored, places, up, noise)
    if devices.write_noise > 0:
        seen[places] = stored[places] + devices.write_noise * where.noise(count)
