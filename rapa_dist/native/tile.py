"""A tile that multiplies with the library in C. In all else, and in what a kill leaves behind, it is `AnalogTile`."""

import ctypes

import numpy as np

from rapa_dist.tile import AnalogTile, Cells, Matrix, Update


class NativeTile(AnalogTile):
    """One kernel matrix K (k + 1, c_out), last row the bias."""

    __slots__ = (
        "_back",
        "_bias",
        "_forward",
        "_gradients_at",
        "_kernels_at",
        "_learn",
        "_memory",
        "_shape",
        "_transposed_at",
    )

    def __init__(self, library: ctypes.CDLL, cells: Cells, *, bias: bool = True) -> None:
        """Work on a kernel matrix; `bias`: whether its last row is the bias."""
        super().__init__(cells, bias=bias)
        rows, c_out = cells.kernels.shape[1:]
        k = rows - bias
        self._shape, self._bias = (k, c_out), bias
        self._forward, self._back, self._learn = library.rapa_forward, library.rapa_input_error, library.rapa_update
        self._kernels_at = [kernel.ctypes.data for kernel in cells.kernels]
        self._gradients_at = [of_buffer[1].ctypes.data for of_buffer in cells.buffers]
        self._memory = np.empty((c_out, k), np.float32)
        self._transposed_at = self._memory.ctypes.data

    def _multiply(self, active: int, patches: Matrix, outputs: Matrix) -> None:
        k, c_out = self._shape
        kernel = self._kernels_at[active]
        bias = kernel + 4 * k * c_out if self._bias else None
        self._forward(patches.ctypes.data, kernel, bias, outputs.ctypes.data, len(patches), k, c_out)

    def _multiply_back(self, active: int, errors: Matrix, input_errors: Matrix) -> None:
        kernel, rows = self._kernels_at[active], len(errors)
        self._back(errors.ctypes.data, kernel, self._transposed_at, input_errors.ctypes.data, rows, *self._shape)

    def _add_update(
        self, source: int, target: int, patches: Matrix, errors: Matrix, update: Update, first: bool
    ) -> None:
        rate = update.learning_rate
        self._learn(
            patches.ctypes.data,
            errors.ctypes.data,
            self._kernels_at[source],
            self._gradients_at[source],
            self._kernels_at[target],
            len(errors),
            *self._shape,
            self._bias,
            1 - rate * update.weight_decay if first else 1.0,
            rate,
        )
