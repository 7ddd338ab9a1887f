"""Rings of many tiles in one system call."""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from rapa_dist.native import native

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_POINTER, _SIZE, _INT, _WORD, _DOUBLE = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_uint64,
    ctypes.c_double,
)


class Bells:
    """The sockets of a node's tiles, to ring many of them at once."""

    def __init__(self, library: ctypes.CDLL, socket: int, token: int, n_tiles: int, prefix: bytes) -> None:
        """Ring tiles with numbers below `n_tiles`, from a socket, on those whose names are `prefix` and a number.

        Raises:
            MemoryError: there is none.
        """
        library.rapa_bells_new.restype, library.rapa_bells_new.argtypes = _POINTER, [_INT, _SIZE, ctypes.c_char_p]
        library.rapa_bells_free.restype, library.rapa_bells_free.argtypes = None, [_POINTER]
        library.rapa_ring.argtypes = [_POINTER, _WORD, *[_POINTER] * 2, _SIZE, _SIZE, _INT, _POINTER]
        self._ring, self._token = library.rapa_ring, token
        self._bells = library.rapa_bells_new(socket, n_tiles, prefix)
        if not self._bells:
            raise MemoryError
        weakref.finalize(self, library.rapa_bells_free, self._bells).atexit = False
        self._left = np.zeros(n_tiles, np.uint8)
        self._at_left = self._left.ctypes.data

    def ring(
        self, tiles: NDArray[np.uint32], messages: Sequence[NDArray[Any]], *, wait: bool
    ) -> NDArray[np.bool_] | None:
        """Send each of some tiles one ring of every array in `messages`, each (len(tiles),), in one message.

        Returns:
            (len(tiles),) which of them have no room for it; None if all have.

        Raises:
            OSError: this end's socket is broken.
        """
        count, together = len(tiles), len(messages)
        rings = (_POINTER * together)(*[rings.ctypes.data for rings in messages])
        n_left = self._ring(self._bells, self._token, tiles.ctypes.data, rings, together, count, wait, self._at_left)
        if n_left < 0:
            raise OSError(-n_left, os.strerror(-n_left))
        return self._left[:count].astype(bool) if n_left else None


@functools.cache
def writer() -> Any:
    """Return what writes rings in C, see rings.c; None without the library."""
    library = native().library
    if library is None:
        return None
    write = library.rapa_write_rings
    write.restype = None
    write.argtypes = [
        *[_POINTER] * 4,
        _SIZE,
        _POINTER,
        _WORD,
        ctypes.c_uint32,
        *[_WORD] * 4,
        *[_DOUBLE] * 3,
        *[_WORD] * 2,
    ]
    return write
