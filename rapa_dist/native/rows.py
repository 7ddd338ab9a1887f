"""Rows in another order: in C, or in NumPy where there is no library."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from rapa_dist.native import native
from rapa_dist.native.tile import address_of_floats

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rapa_dist.tile import Matrix


@functools.cache
def _pick() -> Any:
    library = native().library
    if library is None:
        return None
    pick, size, pointer = library.rapa_pick_rows, ctypes.c_size_t, ctypes.c_void_p
    pick.restype, pick.argtypes = None, [pointer, size, size, pointer, size, pointer]
    return pick


def pick_rows(rows: Matrix, which: NDArray[np.int64], picked: Matrix) -> None:
    """Write picked[i] = rows[which[i]], or zeros where there is no such row.

    Args:
        rows: (n, width), in one piece.
        which: (count,) numbers from 0 on, in one piece.
        picked: (count, width), in one piece, which share no memory with `rows`.

    Raises:
        ValueError: they have other shapes or types.
    """
    count, width = len(which), rows.shape[1]
    if which.dtype != np.int64 or not which.flags.c_contiguous:
        gaps = " with gaps" if which.dtype == np.int64 else ""
        raise ValueError(f"expected int64 in one piece, not {which.dtype}{gaps}")
    at, at_picked = address_of_floats(rows), address_of_floats(picked, (count, width))
    if (pick := _pick()) is not None:
        pick(at, len(rows), width, which.ctypes.data, count, at_picked)
    elif len(rows):
        np.take(rows, which, axis=0, out=picked, mode="clip")
        picked[which >= len(rows)] = 0
    else:
        picked[:] = 0
