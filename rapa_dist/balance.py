"""Load balance: how many tiles each layer gets, so that all take about the same time (§5 of the paper)."""

from collections.abc import Sequence
from fractions import Fraction
from math import floor, isqrt


def in_proportion(patches: Sequence[int], largest: int, *, square: bool = False) -> tuple[int, ...]:
    """Return n_t of every layer, in proportion to its patches, given that of the layer with most (n_t ∝ n_p).

    So 1024, 256, 64 patches with 16 give 16, 4, 1; and 3025, 729, 169, 169, 169 with 17 give 17, 4, 1, 1, 1.

    Args:
        patches: n_p of every layer.
        largest: n_t of the layer with most patches.
        square: whether every number has to be a square; then the nearest one is taken.
    """
    most = max(patches)
    shares = (Fraction(n_patches * largest, most) for n_patches in patches)
    numbers = (max(1, floor(share + Fraction(1, 2))) for share in shares)
    return tuple(_nearest_square(number) if square and number != largest else number for number in numbers)


def _nearest_square(number: int) -> int:
    root = isqrt(number)
    return min((root**2, (root + 1) ** 2), key=lambda square: abs(square - number))
