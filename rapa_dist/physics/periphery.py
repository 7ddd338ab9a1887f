"""A matrix-vector product on an array with converters and noise: ANALOG.md, section 1, after aihwkit 1.2.0.

In NumPy, many vectors at a time: the reference that the library's periphery.c is held against.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rapa_dist.physics.draws import BACKWARD, Draws, Floats, Kind

if TYPE_CHECKING:
    from rapa_dist.physics.parameters import IOParameters

Rows = NDArray[np.int64]


class Product:
    """Products of vectors with the matrix of one tile, in one direction."""

    def __init__(self, io: "IOParameters", draws: Draws, *, backward: bool = False) -> None:
        """Multiply as `io` says; `backward`: whether its noise is that of backward cycles."""
        self.io, self._draws, self._kind = io, draws, BACKWARD if backward else 0
        self._inp_step = step_of(io.inp_res, io.inp_bound)
        self._out_step = step_of(io.out_res, io.out_bound)

    def multiply(self, vectors: Floats, weights: Floats, cycle: int) -> tuple[Floats, int]:
        """Multiply.

        Args:
            vectors: (rows, n).
            weights: (n, m).
            cycle: 64-bit number of the cycle, which its noise is drawn for.

        Returns:
            (rows, m), and how many passes bound management has repeated.
        """
        io = self.io
        if io.is_perfect:
            return vectors @ weights * np.float32(io.out_scale), 0
        alpha = self._alpha(vectors)
        results = np.zeros((len(vectors), weights.shape[1]), np.float32)
        left: Rows = np.arange(len(vectors))
        if io.noise_management != "NONE" and io.inp_noise <= 0:
            left = left[alpha > 0]
        managed = io.bound_management == "ITERATIVE"
        reduction, number, repeated = np.float32(1), 0, 0
        while len(left):
            scale = np.asarray(np.float32(1) / np.where(alpha[left] > 0, alpha[left], np.float32(1)), np.float32)
            if managed:
                scale = scale / reduction
            found, is_above = self._pass(vectors[left] * scale[:, None], weights, cycle, left, number)
            results[left] = found * (np.float32(io.out_scale) / scale)[:, None]
            if not managed or self._gives_up(float(reduction)):
                break
            left = left[is_above]
            repeated += len(left)
            reduction, number = reduction * np.float32(2), number + 1
        return results, repeated

    def _alpha(self, vectors: Floats) -> Floats:
        """Return (rows,) the scale of each vector."""
        io = self.io
        if io.noise_management in ("NONE", "CONSTANT"):
            constant = io.nm_thres if io.noise_management == "CONSTANT" and io.nm_thres > 0 else 1.0
            return np.full(len(vectors), constant, np.float32)
        absolute = io.noise_management == "ABS_MAX"
        alpha: Floats = (np.abs(vectors) if absolute else vectors).max(axis=1, initial=0 if absolute else -np.inf)
        return np.minimum(alpha, np.float32(io.nm_thres)) if io.nm_thres > 0 else alpha

    def _gives_up(self, reduction: float) -> bool:
        io, step = self.io, self._inp_step
        return reduction > io.max_bm_factor or (step is not None and reduction > io.max_bm_res / float(step))

    def _pass(
        self, inputs: Floats, weights: Floats, cycle: int, rows: Rows, number: int
    ) -> tuple[Floats, NDArray[np.bool_]]:
        """Return the outputs of the array for scaled inputs, and of which rows one was above the bound."""
        io, draws, kind = self.io, self._draws, self._kind
        n, m = weights.shape

        def normal(purpose: Kind, count: int) -> Floats:
            return draws.normal(purpose + kind, cycle, rows, count, number)

        def uniform(purpose: Kind, count: int) -> Floats:
            return draws.uniform(purpose + kind, cycle, rows, count, number)

        inputs = _rounded(inputs, self._inp_step, uniform(Kind.INPUT_ROUNDING, n) if io.inp_sto_round else None)
        if io.inp_bound > 0:
            inputs = np.clip(inputs, -np.float32(io.inp_bound), np.float32(io.inp_bound))
        if io.inp_noise > 0:
            inputs = inputs + np.float32(io.inp_noise) * normal(Kind.INPUT_NOISE, n)
        outputs = inputs @ weights
        if io.ir_drop > 0:
            outputs = outputs - self._voltage_drop(inputs, weights)
        if io.w_noise > 0 and io.w_noise_type != "NONE":
            outputs = outputs + self._weight_noise(inputs, weights, normal(Kind.WEIGHT_NOISE, m))
        if io.out_noise > 0:
            outputs = outputs + np.float32(io.out_noise) * normal(Kind.OUTPUT_NOISE, m)
        outputs = _rounded(outputs, self._out_step, uniform(Kind.OUTPUT_ROUNDING, m) if io.out_sto_round else None)
        if io.out_bound <= 0:
            return outputs, np.zeros(len(outputs), bool)
        bound = np.float32(io.out_bound)
        is_above: NDArray[np.bool_] = np.any(np.abs(outputs) > bound, axis=1)
        return np.clip(outputs, -bound, bound), is_above

    def _voltage_drop(self, inputs: Floats, weights: Floats) -> Floats:
        io, n = self.io, len(weights)
        a = np.float32(n / io.ir_drop_g_ratio) * (np.abs(inputs) @ np.abs(weights))
        c = a * (a * (np.float32(0.05) * a - np.float32(0.2)) + np.float32(0.5))
        place = np.float32(1) - (np.float32(1) - np.arange(n, dtype=np.float32) / np.float32(n)) ** 2
        return np.asarray(np.float32(io.ir_drop) * c * ((inputs * place) @ weights), np.float32)

    def _weight_noise(self, inputs: Floats, weights: Floats, noise: Floats) -> Floats:
        squares = inputs * inputs
        of_outputs = squares.sum(axis=1, keepdims=True)
        if self.io.w_noise_type == "PCM_READ":
            of_outputs = squares @ np.abs(weights)
        found: Floats = np.float32(self.io.w_noise) * np.sqrt(of_outputs) * noise
        return found


def step_of(resolution: float, bound: float) -> np.float32 | None:
    """Return the step of a converter; None: it has none. A resolution above 1 is a number of steps."""
    if resolution <= 0 or bound <= 0:
        return None
    return np.float32(1 / resolution if resolution > 1 else resolution) * np.float32(2 * bound)


def _rounded(values: Floats, step: np.float32 | None, uniform: Floats | None) -> Floats:
    """Return values rounded to a step, half to even, or at random to one of the two beside them."""
    if step is None:
        return values
    steps = values / step
    if uniform is not None:
        steps = steps + (uniform - np.float32(0.5))
    found: Floats = np.rint(steps) * step
    return found
