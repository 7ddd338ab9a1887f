"""Doorbells: a few bytes over Unix datagram sockets that say "your rows are ready".

The rows themselves lie in shared memory. A tile sleeps in `recv` on its own socket. That it is done it writes
into its cells; it sends a message, on the one socket of the node, where the coordinator sleeps for it, has to
know that it is up, or that it failed. Both ends ignore what does not carry the run's token.

A socket holds few messages (net.unix.max_dgram_qlen, 10 as a rule). What a tile has no room for, as it is busy or
stopped, is not waited for here: `ring` says what is left over, and the chip, which looks after its tiles, tries again.
"""

import os
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rapa_dist.errors import ClusterError

_RING = struct.Struct("<QQIIQQddQQQ")
_ANSWER = struct.Struct("<QQIi")
_TIMEVAL = struct.Struct("@ll")
_ROOM_S = 0.1  # that a tile, or the kernel's buffer for all of them, has to make room for a message
_MOST_RINGS = 4  # in one message
_LONGEST_MESSAGE = _MOST_RINGS * _RING.size + 1  # one byte more: what is longer shows
_LONGEST_NAME = 107  # bytes that Linux allows in the name of a Unix socket


class Cycle:
    """What a ring asks for, as flags; backward and update come in one ring, as they share D.

    Plain integers: the flags of an enum take microseconds, 42 times a step.
    """

    EMPTY = 0  # answer, and do nothing else: measures the data plane
    FORWARD = 1
    INPUT_ERROR = 2
    UPDATE = 4
    COMMIT = 8  # the update's last part: put the new kernel in force
    DISCARD = 16  # forget what parts of an update have prepared


class Status:
    """What an answer says."""

    DONE = 0
    HELLO = 1  # the tile's process has just come up, and knows nothing of earlier rings
    FAILED = 2


class Ring(NamedTuple):
    """One order to one tile."""

    number: int
    """Counts the cycles of a run upwards, from 1; a repetition carries the same number."""
    cycle: int
    """Flags of `Cycle`."""
    rows: int
    """How many rows the tile has."""
    patches: int
    """Where the first of its patches begins, in floats of the arena."""
    outputs: int
    """Where the first of its outputs begins."""
    learning_rate: float = 0.0
    weight_decay: float = 0.0
    hold_ns: int = 0
    """Nanoseconds that an array would be busy, slowed down; the answer waits for them. 0: it comes at once."""
    rung_ns: int = 0
    """time.monotonic_ns() of the ring, from when `hold_ns` counts."""
    after: int = 0
    """Number of the tile's ring before this one; a tile that has not done that cycle missed it, and waits for it."""


_unpack_rings, _make_ring, _RING_SIZE = _RING.iter_unpack, Ring._make, _RING.size  # looked up once


class TileDoorbell:
    """The tile's end: waits for rings, answers them."""

    def __init__(self, directory: Path, tile: int, token: int) -> None:
        """Bind the socket of tile number `tile` in the run's directory, in place of an earlier one."""
        self._tile, self._token = tile, token
        self._answered = 0  # number of the last ring that this process answered
        self._heard: deque[Ring] = deque()  # rings of the last message that are still to be done
        self._answer_to = str(answers_path(directory))
        path = bell_path(directory, tile)
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        os.chmod(path, 0o600)

    def wait(self) -> Ring:
        """Sleep until the coordinator rings for a cycle that this process has not answered yet.

        A first ring and this tile's HELLO may cross; the coordinator then rings for the cycle again, and
        would find rows change under its hands if it were done again.
        """
        heard = self._heard
        while True:
            while heard:
                ring = heard.popleft()
                if ring.number > self._answered:
                    return ring
            message = self._socket.recv(_LONGEST_MESSAGE)
            if len(message) % _RING_SIZE == 0:
                heard.extend(_make_ring(ring) for token, *ring in _unpack_rings(message) if token == self._token)

    def fileno(self) -> int:
        """Return its socket's file descriptor."""
        return self._socket.fileno()

    def answer(self, number: int, status: int = Status.DONE) -> None:
        """Tell the coordinator; raises OSError when there is none any more."""
        self._answered = number
        self._socket.sendto(_ANSWER.pack(self._token, number, self._tile, status), self._answer_to)


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

    def set_patience(self, seconds: float) -> None:
        """Have `hear` give up after so many seconds."""
        if seconds != self._patience_s:
            self._patience_s = seconds
            self._set_timeout(socket.SO_RCVTIMEO, seconds)

    def _set_timeout(self, option: int, seconds: float) -> None:
        """Set a time-out of the kernel's, which needs no second system call, unlike settimeout()."""
        whole = int(seconds)
        self._socket.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(whole, int((seconds - whole) * 1e6)))

    def ring(self, tile: int, *rings: Ring, wait: bool = True) -> Sequence[Ring]:
        """Ring one tile, for one cycle or a few. A tile that is down misses it; it says HELLO when it is back.

        Args:
            tile: its number.
            rings: in the order in which they are to be done.
            wait: whether to wait a moment if the tile has no room for them.

        Returns:
            Those that it has no room for.
        """
        for first in range(0, len(rings), _MOST_RINGS):
            message = b"".join([_RING.pack(self._token, *ring) for ring in rings[first : first + _MOST_RINGS]])
            try:
                self._socket.sendto(message, 0 if wait else socket.MSG_DONTWAIT, self._paths[tile])
            except (ConnectionRefusedError, FileNotFoundError, ConnectionResetError):
                pass  # suppress() would cost as much as the call
            except BlockingIOError:
                return rings[first:]
        return ()

    def hear(self) -> tuple[int, int, int] | None:
        """Return (tile, number, status) of the next answer, or None when patience runs out."""
        until = None
        while True:
            try:
                message = self._socket.recv(_LONGEST_MESSAGE)
            except BlockingIOError:
                return None
            if len(message) == _ANSWER.size:
                token, number, tile, status = _ANSWER.unpack(message)
                if token == self._token and tile < len(self._paths):
                    return tile, number, status
            now = time.monotonic()  # what says nothing does not prolong the patience
            until = until or now + self._patience_s
            if now >= until:
                return None

    def close(self) -> None:
        """Close the socket; its file goes with the run's directory."""
        self._socket.close()


def check_names(directory: Path, n_tiles: int) -> None:
    """Raise ClusterError if a directory's name is too long for sockets in it; it need not exist."""
    paths = [answers_path(directory), *(bell_path(directory, tile) for tile in range(n_tiles))]
    if (length := max(len(os.fsencode(path)) for path in paths)) > _LONGEST_NAME:
        raise ClusterError(
            f"The name of the folder {directory.parent} is too long: names of sockets below it have {length} bytes, "
            f"and {_LONGEST_NAME} are allowed. Set RAPA_DIST_SHM to a folder with a shorter name."
        )


def bell_path(directory: Path, tile: int) -> Path:
    """Return where tile number `tile` listens."""
    return directory / f"bell-{tile}"


def answers_path(directory: Path) -> Path:
    """Return where the node hears its tiles' answers."""
    return directory / "answers"
