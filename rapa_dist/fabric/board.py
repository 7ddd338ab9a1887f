"""The board: one word that all processes of a chip see, which says whose answer the coordinator sleeps for.

A tile writes into its cells that a cycle is done. The coordinator looks there; only when it would have to
wait does it ask the tile to wake it, and only that tile sends it a message. A round over 128 tiles so takes
two or three wake-ups of the coordinator instead of 128, and while it is busy itself none at all.
"""

import mmap
import threading

SIZE = 4096  # bytes, one page
_NOBODY = 0


class Board:
    """Whose answer the coordinator sleeps for, if any.

    Both ends write first and look then, with a barrier between: the coordinator whom it awaits, and then
    whether the tile is done; the tile that it is done, and then whether it is awaited. So one of them sees
    the other. (Taking a lock is such a barrier on x86. Should it be none elsewhere, the coordinator looks
    again when its patience is over.)
    """

    __slots__ = ("_barrier", "_word")

    def __init__(self, buffer: mmap.mmap) -> None:
        """Lay the board over `buffer`, `SIZE` bytes of shared memory."""
        self._word = memoryview(buffer)[:8].cast("Q")
        self._barrier = threading.Lock()

    def ask(self, tile: int) -> None:
        """Ask a tile to send a message when it is done; look whether it is after this."""
        self._word[0] = tile + 1
        with self._barrier:
            pass

    def ask_nobody(self) -> None:
        """Ask no tile any more."""
        self._word[0] = _NOBODY

    def asks(self, tile: int) -> bool:
        """Return whether a tile, which has written down that it is done, has to send a message."""
        with self._barrier:
            pass
        return self._word[0] == tile + 1
