"""A tile whose cycles are the library's: what `AnalogTile` does, in the same order, and its process's loop besides."""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import mmap
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from rapa_dist.cells import Cells
    from rapa_dist.tile import Matrix, Update

_INPUT_ERROR, _UPDATE, _COMMIT = 2, 4, 8  # flags of `Cycle`
_POINTER, _SIZE, _WORD, _INT, _DOUBLE = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_uint64,
    ctypes.c_int,
    ctypes.c_double,
)
_SIGNATURES = {
    "rapa_tile_new": (_POINTER, [_POINTER, _SIZE, _SIZE, _INT]),
    "rapa_tile_free": (None, [_POINTER]),
    "rapa_tile_forward": (None, [*[_POINTER] * 3, _SIZE]),
    "rapa_tile_backward": (None, [*[_POINTER] * 3, _SIZE, _WORD, _INT, _DOUBLE, _DOUBLE]),
    "rapa_tile_discard": (None, [_POINTER, _WORD]),
    "rapa_loop_new": (
        _POINTER,
        [_POINTER, _POINTER, _WORD, _POINTER, _WORD, ctypes.c_uint32, _INT, ctypes.c_char_p],
    ),
    "rapa_loop_free": (None, [_POINTER]),
    "rapa_serve": (_INT, [_POINTER]),
}


class NativeTile:
    """One kernel matrix K (k + 1, c_out), last row the bias, and the three cycles that touch it."""

    __slots__ = ("__weakref__", "_c_out", "_k", "_library", "_tile", "cells")

    def __init__(self, library: ctypes.CDLL, cells: Cells, *, bias: bool = True) -> None:
        """Work on a kernel matrix; `bias`: whether its last row is the bias.

        Raises:
            MemoryError: there is none.
        """
        declare(library)
        rows, self._c_out = cells.kernel_shape
        self.cells, self._library, self._k = cells, library, rows - bias
        self._tile = library.rapa_tile_new(address_of(cells.memory), self._k, self._c_out, bias)
        if not self._tile:
            raise MemoryError
        weakref.finalize(self, library.rapa_tile_free, self._tile).atexit = False  # its process may end at work

    def program(self, kernel: Matrix, step: int) -> None:
        """Write a kernel (k + 1, c_out), as after `step` steps, into the cells."""
        self.cells.program(kernel, step)

    def forward(self, patches: Matrix, outputs: Matrix, draw: int = 0) -> None:
        """Compute M = I K + bias, as `AnalogTile.forward`."""
        rows = len(patches)
        at_patches, at_outputs = (
            address_of_floats(patches, (rows, self._k)),
            address_of_floats(outputs, (rows, self._c_out)),
        )
        self._library.rapa_tile_forward(self._tile, at_patches, at_outputs, rows)

    def backward(
        self,
        patches: Matrix,
        errors: Matrix,
        *,
        cycle: int,
        update: Update | None,
        input_error: bool,
        commit: bool = True,
        draw: int = 0,
    ) -> None:
        """Compute dI = D Kᵀ over the patches and update K, as `AnalogTile.backward`."""
        rows, flags = len(errors), _INPUT_ERROR if input_error else 0
        at_patches, at_errors = (
            address_of_floats(patches, (rows, self._k)),
            address_of_floats(errors, (rows, self._c_out)),
        )
        if update is not None:
            flags |= _UPDATE | (_COMMIT if commit else 0)
        rate, decay = (update.learning_rate, update.weight_decay) if update else (0.0, 0.0)
        self._library.rapa_tile_backward(self._tile, at_patches, at_errors, rows, cycle, flags, rate, decay)

    def discard(self, cycle: int) -> None:
        """Forget what parts of an update have prepared."""
        self._library.rapa_tile_discard(self._tile, cycle)

    def loop(self, arena: mmap.mmap, board: mmap.mmap, token: int, number: int, bell: int, answers: Path) -> NativeLoop:
        """Return the loop of this tile's process.

        Args:
            arena: the chip's memory for rows.
            board: where it says whose answer it sleeps for.
            token: what rings and answers of the run carry.
            number: the tile's in the machine.
            bell: its socket, as a file descriptor.
            answers: where the chip listens.
        """
        return NativeLoop(self._library, self, arena, board, (token, number, bell, os.fsencode(answers)))

    @property
    def handle(self) -> int:
        """What the library knows the tile by."""
        found: int = self._tile
        return found


class NativeLoop:
    """What a tile's process does all day, in C: wait for a ring, compute, hold, answer."""

    def __init__(
        self,
        library: ctypes.CDLL,
        tile: NativeTile,
        arena: mmap.mmap,
        board: mmap.mmap,
        end: tuple[int, int, int, bytes],
    ) -> None:
        self._library, self._kept = library, (tile, arena, board)
        self._loop = library.rapa_loop_new(tile.handle, address_of(arena), len(arena) // 4, address_of(board), *end)
        if not self._loop:
            raise MemoryError
        weakref.finalize(self, library.rapa_loop_free, self._loop).atexit = False

    def serve(self) -> NoReturn:
        """Serve for good.

        Raises:
            OSError: nobody listens to answers any more.
        """
        error = self._library.rapa_serve(self._loop)
        raise OSError(error, os.strerror(error))


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the functions for tiles take and return."""
    for name, (returns, takes) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = returns, takes


def address_of(memory: mmap.mmap | memoryview) -> int:
    """Return where writable memory lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def address_of_floats(array: NDArray[np.float32], shape: tuple[int, int] | None = None) -> int:
    """Return where an array lies, which the library takes to be floats in one piece.

    Raises:
        ValueError: it is something else, or has another shape.
    """
    gaps = not array.flags.c_contiguous
    if gaps or array.dtype != "float32" or array.shape != (shape or array.shape):
        raise ValueError(
            f"expected {shape or array.shape} float32 in one piece, not {array.shape} {array.dtype}"
            f"{' with gaps' if gaps else ''}"
        )
    return array.ctypes.data
