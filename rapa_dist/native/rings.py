"""Rings of many tiles in one system call."""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class Bells:
    """The sockets of a node's tiles, to ring many of them at once."""

    def __init__(self, library: ctypes.CDLL, socket: int, n_tiles: int, prefix: bytes) -> None:
        """Ring tiles with numbers below `n_tiles`, from a socket, on those whose names are `prefix` and a number.

        Raises:
            MemoryError: there is none.
        """
        library.rapa_bells_new.restype, library.rapa_bells_new.argtypes = _POINTER, [_INT, _SIZE, ctypes.c_char_p]
        library.rapa_bells_free.restype, library.rapa_bells_free.argtypes = None, [_POINTER]
        library.rapa_ring.argtypes = [*[_POINTER] * 3, _SIZE, _SIZE, _INT, _POINTER]
        self._ring, self._bells = library.rapa_ring, library.rapa_bells_new(socket, n_tiles, prefix)
        if not self._bells:
            raise MemoryError
        weakref.finalize(self, library.rapa_bells_free, self._bells).atexit = False
        self._left = np.zeros(n_tiles, np.uint8)
        self._at_left = self._left.ctypes.data

    def ring(self, tiles: NDArray[np.uint32], messages: NDArray[Any], *, wait: bool) -> NDArray[np.bool_] | None:
        """Send messages (len(tiles), …) to tiles.

        Returns:
            (len(tiles),) which of them have no room for it; None if all have.

        Raises:
            OSError: this end's socket is broken.
        """
        count = len(tiles)
        at_tiles, at_messages = tiles.ctypes.data, messages.ctypes.data
        error = self._ring(self._bells, at_tiles, at_messages, count, messages.nbytes // count, wait, self._at_left)
        if error:
            raise OSError(error, os.strerror(error))
        left = self._left[:count].astype(bool)
        return left if left.any() else None
