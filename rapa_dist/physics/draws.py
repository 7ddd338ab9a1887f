"""Random numbers of a tile, each a function of what it is for, never of who draws it, or when.

Philox 4×32-10 (Salmon et al. 2011) counts through them: its key is the tile's, its counter says which passage, which
row, which purpose, and which number. Normal ones are made of these by the transformation of Box and Muller, in float32,
with nothing but operations that round alike everywhere: the library's draws.c has the same bits.
"""

from enum import IntEnum
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Floats = NDArray[np.float32]

LANES = 8  # blocks that are drawn at once; a block has four words
_GROUP = 4 * LANES
_LINE_BLOCKS, _LINE_DRAWN = 8, 6  # that a line of an array has, and that are drawn of them
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_KIND_BIT, _PASS_BIT = 28, 23
_MANTISSA, _ONE = np.uint32(0x7FFFFF), np.uint32(0x3F800000)
_LOG = tuple(
    np.float32(term)
    for term in (
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    )
)
_SINE = tuple(np.float32(term) for term in (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1))
_COSINE = tuple(np.float32(term) for term in (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2))


class Kind(IntEnum):
    """What numbers are for. The values are part of a run's meaning: never renumber them."""

    DEVICES = 0
    INPUT_ROUNDING = 1  # the next four are those of the forward cycle; of the backward cycle they are five more
    INPUT_NOISE = 2
    WEIGHT_NOISE = 3
    OUTPUT_NOISE = 4
    OUTPUT_ROUNDING = 5
    PATCH_PULSES = 11
    ERROR_PULSES = 12
    PULSES = 13  # noise of single pulses
    DIFFUSION = 14
    WRITE_NOISE = 15


BACKWARD = 5
"""What is added to a kind of the forward cycle for that of the backward cycle."""


def key_of(seed: int, layer: int, tile: int) -> int:
    """Return the 64-bit key of a tile's draws."""
    return _digest("physics", seed, layer, tile)


def cycle_of(seed: int, purpose: int, place: tuple[int, ...], part: int) -> int:
    """Return the 64-bit number of a passage's draws.

    Args:
        seed: of the assignments.
        purpose: training, or which kind of test; see `rapa_dist.streams.Purpose`.
        place: where in the run, as its assignment is drawn for.
        part: of a mini-batch that goes through in parts.
    """
    return _digest("cycle", seed, purpose, part, *place)


def _digest(*of: object) -> int:
    return int.from_bytes(blake2b(",".join(map(str, of)).encode(), digest_size=8).digest(), "little")


class Draws:
    """The random numbers of one tile."""

    def __init__(self, key: int) -> None:
        """Begin; `key`: as `key_of` gives it."""
        self.key = key
        """The 64 bits."""
        self._key = key & 0xFFFFFFFF, key >> 32

    def words(self, kind: int, cycle: int, rows: NDArray[np.int64], count: int, number: int = 0) -> Words:
        """Return 32 random bits each.

        Args:
            kind: what for, a `Kind`.
            cycle: of which passage, as `cycle_of` gives it.
            rows: (n,) which rows of the tile in that passage.
            count: how many for each row.
            number: of the pass, where bound management repeats a row; below 32.

        Returns:
            (n, count).
        """
        groups = -(-count // _GROUP)
        block = np.arange(groups * LANES, dtype=np.uint32) + np.uint32(kind << _KIND_BIT | number << _PASS_BIT)
        shape = len(rows), groups * LANES
        counter = (
            np.broadcast_to(block, shape),
            np.broadcast_to(rows.astype(np.uint32)[:, None], shape),
            np.full(shape, cycle & 0xFFFFFFFF, np.uint32),
            np.full(shape, cycle >> 32, np.uint32),
        )
        found = np.stack(philox(counter, self._key), axis=-1)  # (n, blocks, 4)
        in_order = found.reshape(len(rows), groups, LANES, 4).swapaxes(2, 3)
        return np.ascontiguousarray(in_order).reshape(len(rows), -1)[:, :count]

    def words_of_lines(self, kind: int, cycle: int, row: int, lines: NDArray[np.int64], number: int = 0) -> Words:
        """Return 24 words of random bits for each of some lines.

        Args:
            kind: what for, a `Kind`.
            cycle: of which passage, as `cycle_of` gives it.
            row: which row of the tile in that passage.
            lines: (n,) which of the row's lines.
            number: of the part of a train; below 32.

        Returns:
            (n, 24).
        """
        first = lines[:, None] * _LINE_BLOCKS + (kind << _KIND_BIT | number << _PASS_BIT)
        block = (first + np.arange(_LINE_DRAWN)).astype(np.uint32)
        rest = [np.full(block.shape, word, np.uint32) for word in (row, cycle & 0xFFFFFFFF, cycle >> 32)]
        return np.stack(philox((block, rest[0], rest[1], rest[2]), self._key), axis=-1).reshape(len(lines), -1)

    def uniform(self, kind: int, cycle: int, rows: NDArray[np.int64], count: int, number: int = 0) -> Floats:
        """Return numbers in [0, 1), multiples of 2⁻²⁴; as for `words`."""
        words = self.words(kind, cycle, rows, count, number)
        return (words >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)

    def normal(self, kind: int, cycle: int, rows: NDArray[np.int64], count: int, number: int = 0) -> Floats:
        """Return standard normal numbers, of at most 5.9 in absolute value; as for `words`."""
        groups = -(-count // _GROUP)
        words = self.words(kind, cycle, rows, groups * _GROUP, number).reshape(len(rows), groups, 2, 2, LANES)
        found = np.empty(words.shape, np.float32)
        found[:, :, :, 0], found[:, :, :, 1] = normal_pairs(words[:, :, :, 0], words[:, :, :, 1])
        return found.reshape(len(rows), -1)[:, :count]


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Return Philox 4×32-10 of counters, arrays of any one shape, under a key."""
    c0, c1, c2, c3 = (words.astype(np.uint64) for words in counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (second >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            second & _LOW,
            (first >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            first & _LOW,
        )
        k0, k1 = (k0 + _STEPS[0]) & 0xFFFFFFFF, (k1 + _STEPS[1]) & 0xFFFFFFFF
    return c0.astype(np.uint32), c1.astype(np.uint32), c2.astype(np.uint32), c3.astype(np.uint32)


def normal_pairs(first: Words, second: Words) -> tuple[Floats, Floats]:
    """Return two independent standard normal numbers for every two words (Box and Muller 1958)."""
    half, two = np.float32(0.5), np.float32(2)
    uniform = ((first >> np.uint32(8)).astype(np.float32) + half) * np.float32(2**-24)
    radius = np.sqrt(-two * _log(uniform))
    turn = ((second & np.uint32(0x3FFFFFFF)) >> np.uint32(6)).astype(np.float32) * np.float32(2**-24) - half
    angle = turn * np.float32(np.pi / 2)  # an eighth of a circle to either side
    square = angle * angle
    s2, s1, s0 = _SINE
    sine = ((s2 * square + s1) * square + s0) * square * angle + angle
    c2, c1, c0 = _COSINE
    cosine = ((c2 * square + c1) * square + c0) * square * square - half * square + np.float32(1)
    swapped = (second >> np.uint32(30) & np.uint32(1)).astype(bool)
    negative = (second >> np.uint32(31)).astype(bool)
    x, y = np.where(swapped, -sine, cosine), np.where(swapped, cosine, sine)
    return radius * np.where(negative, -x, x), radius * np.where(negative, -y, y)


def _log(values: Floats) -> Floats:
    """Return natural logarithms of numbers in (0, 1): the polynomial of Cephes' logf."""
    bits = values.view(np.uint32)
    exponent = (bits >> np.uint32(23)).astype(np.int32) - np.int32(127)
    mantissa = (bits & _MANTISSA | _ONE).view(np.float32)  # [1, 2)
    large = mantissa > np.float32(1.41421356)
    mantissa = np.where(large, mantissa * np.float32(0.5), mantissa).astype(np.float32)
    exponent = (exponent + large).astype(np.float32)
    f = mantissa - np.float32(1)
    square = f * f
    polynomial = np.full_like(f, _LOG[0])
    for term in _LOG[1:]:
        polynomial = polynomial * f + term
    found = polynomial * f * square
    found = found + np.float32(-2.12194440e-4) * exponent
    found = found - np.float32(0.5) * square
    found = f + found
    return np.asarray(found + np.float32(0.693359375) * exponent, np.float32)
