"""Ringing tiles: a node's end of the doorbells, from which many tiles are rung at once."""

import os
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rapa_dist.fabric.doorbell import (
    ANSWER,
    LONGEST_MESSAGE,
    Ring,
    answers_path,
    bell_path,
    check_names,
)
from rapa_dist.native import native
from rapa_dist.native.rings import Bells

_TIMEVAL = struct.Struct("@ll")
_ROOM_S = 0.1  # that a tile, or the kernel's buffer for all of them, has to make room for a message
RING = np.dtype(
    [
        ("token", "<u8"),
        ("number", "<u8"),
        ("cycle", "<u4"),
        ("rows", "<u4"),
        ("patches", "<u8"),
        ("outputs", "<u8"),
        ("learning_rate", "<f8"),
        ("weight_decay", "<f8"),
        ("hold_ns", "<u8"),
        ("rung_ns", "<u8"),
        ("after", "<u8"),
        ("draw", "<u8"),
    ]
)
"""A ring as it is sent; see `Ring`."""


class Rings(NamedTuple):
    """Rings of some tiles for the same cycle, one each, as they are sent."""

    number: int
    """Of the cycle."""
    tiles: NDArray[np.uint32]
    """(n,) whose, each once."""
    messages: NDArray[np.void]
    """(n,) of `RING`."""

    @classmethod
    def of(cls, rings: Sequence[tuple[int, Ring]]) -> "Rings":
        """Return the rings of tiles, given one by one, with the same number."""
        tiles = np.array([tile for tile, _ in rings], np.uint32)
        return cls(rings[0][1].number, tiles, np.array([(0, *ring) for _, ring in rings], RING))

    def to(self, tile: int) -> Ring | None:
        """Return the ring of a tile, if it has one."""
        for place in np.nonzero(self.tiles == tile)[0]:
            return Ring(*self.messages[place].tolist()[1:])
        return None


class NodeDoorbell:
    """The coordinator's end on a node: rings its tiles, hears what they have to tell."""

    def __init__(self, directory: Path, n_tiles: int, token: int) -> None:
        """Bind the socket on which all tiles of the node answer.

        Raises:
            ClusterError: the directory's name is too long for sockets in it.
        """
        self._token = token
        check_names(directory, n_tiles)
        self._paths = [str(bell_path(directory, tile)) for tile in range(n_tiles)]
        path = answers_path(directory)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        os.chmod(path, 0o600)
        self._patience_s = 0.0
        self._set_timeout(socket.SO_SNDTIMEO, _ROOM_S)
        library = native().library
        prefix = os.fsencode(bell_path(directory, 0))[:-1]
        self._bells = Bells(library, self._socket.fileno(), token, n_tiles, prefix) if library else None

    def set_patience(self, seconds: float) -> None:
        """Have `hear` give up after so many seconds."""
        if seconds != self._patience_s:
            self._patience_s = seconds
            self._set_timeout(socket.SO_RCVTIMEO, seconds)

    def _set_timeout(self, option: int, seconds: float) -> None:
        """Set a time-out of the kernel's, which needs no second system call, unlike settimeout()."""
        whole = int(seconds)
        self._socket.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(whole, int((seconds - whole) * 1e6)))

    def ring(
        self, tiles: NDArray[np.uint32], messages: Sequence[NDArray[np.void]], *, wait: bool = True
    ) -> NDArray[np.bool_] | None:
        """Ring tiles, each for one cycle or a few. A tile that is down misses it; it says HELLO when it is back.

        Args:
            tiles: (n,) their numbers, each once.
            messages: up to MOST_RINGS arrays (n,) of `RING`, in the order in which they are to be done.
            wait: whether to wait a moment if a tile has no room for them.

        Returns:
            (n,) which have no room for them; None if all have.
        """
        if self._bells is not None:
            return self._bells.ring(tiles, messages, wait=wait)
        left = np.zeros(len(tiles), bool)
        for rings in messages:
            rings["token"] = self._token
        for place, tile in enumerate(tiles):
            message = b"".join([rings[place].tobytes() for rings in messages])
            try:
                self._socket.sendto(message, 0 if wait else socket.MSG_DONTWAIT, self._paths[tile])
            except (ConnectionRefusedError, FileNotFoundError, ConnectionResetError):
                pass  # suppress() would cost as much as the call
            except BlockingIOError:
                left[place] = True
        return left if left.any() else None

    def hear(self) -> tuple[int, int, int] | None:
        """Return (tile, number, status) of the next answer, or None when patience runs out."""
        until = None
        while True:
            try:
                message = self._socket.recv(LONGEST_MESSAGE)
            except BlockingIOError:
                return None
            if len(message) == ANSWER.size:
                token, number, tile, status = ANSWER.unpack(message)
                if token == self._token and tile < len(self._paths):
                    return tile, number, status
            now = time.monotonic()  # what says nothing does not prolong the patience
            until = until or now + self._patience_s
            if now >= until:
                return None

    def close(self) -> None:
        """Close the socket; its file goes with the run's directory."""
        self._socket.close()
