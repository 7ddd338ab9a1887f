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
from collections import deque
from pathlib import Path
from typing import NamedTuple

from rapa_dist.errors import ClusterError

_RING = struct.Struct("<QQIIQQddQQQQ")
ANSWER = struct.Struct("<QQIi")
MOST_RINGS = 4  # in one message
LONGEST_MESSAGE = MOST_RINGS * _RING.size + 1  # one byte more: what is longer shows
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
    draw: int = 0
    """64-bit number of the passage, for what a tile draws that is not ideal."""


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
            message = self._socket.recv(LONGEST_MESSAGE)
            if len(message) % _RING.size == 0:
                rings = _RING.iter_unpack(message)
                heard.extend(Ring._make(ring) for token, *ring in rings if token == self._token)

    def fileno(self) -> int:
        """Return its socket's file descriptor."""
        return self._socket.fileno()

    def answer(self, number: int, status: int = Status.DONE) -> None:
        """Tell the coordinator; raises OSError when there is none any more."""
        self._answered = number
        self._socket.sendto(ANSWER.pack(self._token, number, self._tile, status), self._answer_to)


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
