"""One analog tile: a kernel matrix, its three cycles, and what it has done. Pure NumPy.

Nothing here knows of processes, sockets or files: the memory of a tile is any writable buffer, so the
same class works in the coordinator (fabric `serial`) and behind a doorbell in a process of its own
(fabric `ray`), and gives the same bits in both.
"""

from dataclasses import dataclass
from time import thread_time_ns

import numpy as np
from numpy.typing import NDArray

from rapa_dist.cells import Cells, Word

Matrix = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Update:
    """A local update: K ← (1 − λ · weight decay) K − λ Iᵀ D."""

    learning_rate: float
    """λ."""
    weight_decay: float
    """Relative decay of the kernel per unit of λ (the paper: 10⁻⁴)."""


_FORWARD, _BACKWARD, _UPDATED = Word.ROWS_FORWARD, Word.ROWS_BACKWARD, Word.ROWS_UPDATE
_COMMIT, _UPDATES, _STEP, _BUSY = Word.COMMIT, Word.UPDATES, Word.STEP, Word.BUSY_NS
_NEXT_STEP = Word.NEXT_STEP


class AnalogTile:
    """One kernel matrix K (k + 1, c_out), last row the bias, and the three cycles that touch it.

    Between two cycles of a tile others have had its core, and little of what it needs is in the caches
    then: whatever Python or NumPy object a cycle does not touch makes it faster. Hence the prepared
    views, the products where sums would do, and no object made twice.
    """

    __slots__ = (
        "_add",
        "_begin",
        "_bias_gradients",
        "_biases",
        "_buffers",
        "_flat_kernels",
        "_ones",
        "_transposed",
        "_update",
        "_weight_gradients",
        "_weights",
        "cells",
    )

    def __init__(self, cells: Cells, *, bias: bool = True) -> None:
        """Work on a kernel matrix; `bias`: whether its last row is the bias."""
        self.cells = cells
        gradients = cells.buffers[:, 1].reshape(cells.kernels.shape)
        k = cells.kernels.shape[1] - bias
        self._weights = [kernel[:k] for kernel in cells.kernels]
        self._transposed = [kernel[:k].T for kernel in cells.kernels]
        self._biases = [kernel[k] for kernel in cells.kernels] if bias else None
        self._flat_kernels = list(cells.buffers[:, 0])
        self._buffers = list(cells.buffers)
        self._weight_gradients = [gradient[:k] for gradient in gradients]
        self._bias_gradients = [gradient[k] for gradient in gradients] if bias else None
        self._ones = np.ones(0, np.float32)
        self._prepare(Update(0.0, 0.0))

    def _prepare(self, update: Update) -> None:
        """Keep by what kernel and gradient are multiplied in the first part of an update, and in later ones."""
        self._update = update
        rate = update.learning_rate
        self._begin = np.array([1 - rate * update.weight_decay, -rate], np.float32)
        self._add = np.array([1, -rate], np.float32)

    def program(self, kernel: Matrix, step: int) -> None:
        """Write a kernel (k + 1, c_out), as after `step` steps, into the cells."""
        self.cells.program(kernel, step)

    def forward(self, patches: Matrix, outputs: Matrix, draw: int = 0) -> None:
        """Compute M = I K + bias.

        Args:
            patches: (rows, k) I, the patches routed here.
            outputs: (rows, c_out) M, overwritten.
            draw: 64-bit number of the passage, for tiles that draw something.
        """
        started = thread_time_ns()
        words = self.cells.words
        active = words[_COMMIT] & 3
        self._multiply(active, patches, outputs)
        words[_FORWARD] += len(patches)
        words[_BUSY] += thread_time_ns() - started

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
        """Compute dI = D Kᵀ over the patches and update K, so that it may be killed and repeated anywhere.

        A mini-batch may come in parts: each adds its share to the kernel to be, the last one puts that in
        force; until then every part is computed with the old kernel. The order makes a repetition exact:
        Iᵀ D and the new kernel first (*prepared*), then the input error, from the old kernel and over I,
        then the switch to the new kernel (*committed*).

        Args:
            patches: (rows, k) I; holds dI afterwards if `input_error`.
            errors: (rows, c_out) D, the gradient of the mean loss of the mini-batch.
            cycle: number of this cycle, larger than every earlier one; the same again for a repetition.
            update: λ and decay of the local update, or None to leave K as it is.
            input_error: whether dI is wanted (the first layer needs none).
            commit: whether this is the last part of the mini-batch.
            draw: 64-bit number of the passage, for tiles that draw something.
        """
        started = thread_time_ns()
        words = self.cells.words
        state = words[_COMMIT]
        done, prepared, upcoming, active = state >> 5, state & 16, state >> 2 & 3, state & 3
        if update is not None:
            if done == cycle and not prepared:  # done before the process was killed; only the answer was lost
                words[_STEP] = words[_NEXT_STEP]
                return
            if done != cycle:
                first = upcoming == active
                # without rows the kernel that earlier parts prepared stays as it is
                if first or len(errors) or (commit and self._ends_batches()):
                    target = (active + 1) % 3 if first else 3 - active - upcoming
                    buffers = upcoming, target
                    self._add_update(buffers, patches, errors, update, first=first, commit=commit)
                    upcoming = target
                words[_NEXT_STEP] = words[_STEP] + commit
                words[_COMMIT] = cycle << 5 | 16 | upcoming << 2 | active
        if input_error:
            self._multiply_back(active, errors, patches)
            words[_BACKWARD] += len(errors)
        if update is not None:
            words[_COMMIT] = cycle << 5 | upcoming << 2 | (upcoming if commit else active)
            words[_UPDATED] += len(errors)
            if commit:
                words[_UPDATES] += 1
                words[_STEP] = words[_NEXT_STEP]
        words[_BUSY] += thread_time_ns() - started

    def discard(self, cycle: int) -> None:
        """Forget what parts of an update have prepared: the kernel to be is the one in force again."""
        words = self.cells.words
        state = words[_COMMIT]
        if state >> 5 != cycle:
            active = state & 3
            words[_COMMIT] = cycle << 5 | active << 2 | active

    def _ends_batches(self) -> bool:
        """Return whether something happens to the kernel when the last part of a mini-batch is done."""
        return False

    # what `NativeTile` does in C

    def _multiply(self, active: int, patches: Matrix, outputs: Matrix) -> None:
        """Write M = I K + bias, K in buffer `active`, into `outputs`."""
        np.dot(patches, self._weights[active], outputs)
        if self._biases is not None:
            np.add(outputs, self._biases[active], outputs)

    def _multiply_back(self, active: int, errors: Matrix, input_errors: Matrix) -> None:
        """Write dI = D Kᵀ, K in buffer `active`, into `input_errors`."""
        np.dot(errors, self._transposed[active], input_errors)

    def _add_update(
        self, buffers: tuple[int, int], patches: Matrix, errors: Matrix, update: Update, *, first: bool, commit: bool
    ) -> None:
        """Write the kernel of one buffer, less λ Iᵀ D and in the first part the decay, into another."""
        source, target = buffers
        if update is not self._update and update != self._update:
            self._prepare(update)
        rows = len(errors)
        if len(self._ones) < rows:
            self._ones = np.ones(rows, np.float32)
        np.dot(patches.T, errors, self._weight_gradients[source])
        if self._bias_gradients is not None:
            np.dot(self._ones[:rows], errors, self._bias_gradients[source])
        np.dot(self._begin if first else self._add, self._buffers[source], self._flat_kernels[target])
