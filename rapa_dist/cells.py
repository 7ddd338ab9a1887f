"""The memory of a tile that outlives its process: its kernel, and the words that say what it has done.

Nothing here needs NumPy before somebody looks at a kernel: a tile's process, whose cycles the library does, never does.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rapa_dist.tile import Matrix

_PAGE = 4096
_BUFFERS = 3  # the kernel in force, the one to be, and one to write the next part of an update into


class Word:
    """The 64-bit words at the head of the cells: what a tile remembers besides its kernel.

    Plain integers: looking up a member of an enum takes as long as a small matrix product.
    """

    STATE = 0  # what it is doing, one of `State`
    COMMIT = 1  # cycle << 5 | prepared << 4 | buffer of the kernel to be << 2 | buffer of the kernel in force
    PID = 2  # of the process that owns the tile now
    STARTS = 3  # processes that have owned it so far
    ROWS_FORWARD = 4
    ROWS_BACKWARD = 5
    ROWS_UPDATE = 6
    UPDATES = 7
    BUSY_NS = 8  # processor time, so that tiles that share a core do not count each other's
    ANSWERED = 9  # number of the last cycle that is done, whichever process did it: the tile's answer
    STEP = 10  # training steps up to the last update, those before a resume included
    SINCE_NS = 11  # time.monotonic_ns() when its first process began to serve
    THREAD = 12  # of that process, which does the cycles; 0 before it is there
    HANGS = 13  # how often its process was killed because it hung
    REPEATED = 14  # rows that bound management has sent through the array again
    TRAINS = 15  # pulse trains sent: rows of updates that were not all zero
    SLOTS = 16  # their lengths BL, added up
    PULSES_SENT = 17  # pulses that devices got
    NEXT_STEP = 18  # what STEP will be once the kernel to be is in force


class State:
    """What a tile is doing, in `Word.STATE`."""

    IDLE = 0
    FORWARD = 1
    BACKWARD = 2
    HOLDING = 3  # done, and holding its answer until an array would be


class Cells:
    """The non-volatile memory of a tile: three kernel buffers and a page of words.

    Which buffers hold the kernel in force and the one to be, and how far an update has come, is one
    64-bit word, written in one store: a process killed at any instruction leaves either the old kernel
    or the new one.
    """

    __slots__ = ("_buffers", "kernel_shape", "memory", "words")

    def __init__(self, buffer: mmap.mmap | memoryview, kernel_shape: tuple[int, int]) -> None:
        """Lay the cells over `buffer` (at least `Cells.size(kernel_shape)` bytes, page-aligned)."""
        self.memory, self.kernel_shape = buffer, kernel_shape
        self.words = memoryview(buffer)[:_PAGE].cast("Q")  # plain integers: quicker than NumPy's
        self._buffers: Any = None

    @property
    def buffers(self) -> Matrix:
        """(3, 2, (k + 1) · c_out): kernels, and beside each of them room for the gradient of an update.

        A tile whose devices store something else than what is seen of them keeps that there.
        """
        if self._buffers is None:
            import numpy as np

            rows, columns = self.kernel_shape
            floats = _padded_floats(self.kernel_shape)
            raw = np.frombuffer(self.memory, np.float32, 2 * _BUFFERS * floats, offset=_PAGE)
            self._buffers = raw.reshape(_BUFFERS, 2, floats)[:, :, : rows * columns]
        found: Matrix = self._buffers
        return found

    @property
    def kernels(self) -> Matrix:
        """(3, k + 1, c_out) the kernels of all buffers."""
        return self.buffers[:, 0].reshape(_BUFFERS, *self.kernel_shape)

    @staticmethod
    def size(kernel_shape: tuple[int, int]) -> int:
        """Return the bytes that the cells of one tile take, a whole number of pages."""
        needed = _PAGE + 2 * _BUFFERS * 4 * _padded_floats(kernel_shape)
        return -(-needed // _PAGE) * _PAGE

    @classmethod
    def volatile(cls, kernel_shape: tuple[int, int]) -> Cells:
        """Return cells in anonymous memory, laid out like those in a file."""
        return cls(mmap.mmap(-1, cls.size(kernel_shape)), kernel_shape)

    def program(self, kernel: Matrix, step: int = 0) -> None:
        """Write a kernel (k + 1, c_out), as after `step` steps, and forget all cycles: how a run starts or resumes."""
        self.words[Word.COMMIT] = 0
        self.words[Word.STEP] = self.words[Word.NEXT_STEP] = step
        self.kernels[0] = kernel

    @property
    def kernel(self) -> Matrix:
        """The kernel in force, (k + 1, c_out): a view, valid until the next update."""
        kernel: Matrix = self.kernels[self.words[Word.COMMIT] & 3]
        return kernel


def _padded_floats(kernel_shape: tuple[int, int]) -> int:
    rows, columns = kernel_shape
    return -(-rows * columns // 16) * 16  # both buffers start on a cache line
