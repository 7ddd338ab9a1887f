"""The devices of an array: what each cross-point has been given when it was made, and what a pulse does to it.

ANALOG.md, section 3, after aihwkit 1.2.0. Devices are drawn from the run's seed, so that whoever needs them draws them
again; nothing of them has to be kept. In NumPy: the reference that the library's devices.c is held against.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rapa_dist.physics.draws import Draws, Floats, Kind
from rapa_dist.physics.parameters import (
    ConstantStepDevice,
    ExpStepDevice,
    LinearStepDevice,
    PowStepDevice,
    PulsedDevice,
    SoftBoundsDevice,
)

if TYPE_CHECKING:
    from collections.abc import Callable

Places = NDArray[np.int64]
_FEW = 13
"""Numbers that are drawn for every cross-point; their order is part of a run's meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """The devices of one tile; every array has the shape of its kernel matrix, (k + 1, c_out)."""

    parameters: PulsedDevice
    b_max: Floats
    """Largest weight."""
    b_min: Floats
    """Smallest weight."""
    step_up: Floats
    """Change by one upward pulse at weight 0."""
    step_down: Floats
    """… by one downward pulse."""
    shape_up: Floats | None
    """LinearStep, SoftBounds: slope over the weight; PowStep: γ; else None."""
    shape_down: Floats | None
    """… of downward pulses."""
    decay: Floats | None
    """Factor by which a weight comes closer to `reset` with every mini-batch; None: none does."""
    diffusion: Floats | None
    """Standard deviation of what is added with every mini-batch; None: nothing is."""
    reset: Floats | None
    """Weight that a device decays to; None: 0."""

    @property
    def write_noise(self) -> np.float32:
        """Standard deviation of what is seen of a weight around what is stored; 0: both are the same."""
        return np.float32(self.parameters.write_noise)

    def clip(self, weights: Floats) -> Floats:
        """Return weights within their devices' bounds."""
        return np.maximum(np.minimum(weights, self.b_max), self.b_min)

    def pulse(self, weights: Floats, places: Places, up: NDArray[np.bool_], noise: Floats | None) -> None:
        """Give some devices a pulse each.

        Args:
            weights: (cross-points,) the stored weights of all of them, changed in place.
            places: (n,) which get one, each once.
            up: (n,) the direction of each.
            noise: (n,) standard normal numbers, for the spread from pulse to pulse; None: there is none.
        """
        step = np.where(up, self.step_up.ravel()[places], self.step_down.ravel()[places])
        b_max, b_min = self.b_max.ravel()[places], self.b_min.ravel()[places]
        before = weights[places]
        factor: Factor = np.float32(1)
        if noise is not None:
            factor = np.float32(1) + np.float32(self.parameters.dw_min_std) * noise
        change = _CHANGES[type(self.parameters)](self, _Pulsed(places, up, before, step, b_max, b_min), factor)
        after = np.where(up, before + change, before - change)
        weights[places] = np.maximum(np.minimum(after, b_max), b_min)

    def end_batch(self, weights: Floats, draws: Draws, step: int) -> Floats:
        """Return weights (k + 1, c_out) after the diffusion and the decay that a mini-batch takes."""
        if self.diffusion is not None:
            noise = draws.normal(Kind.DIFFUSION, step, np.arange(len(weights)), weights.shape[1])
            weights = self.clip(weights + self.diffusion * noise)
        if self.decay is not None:
            reset = np.float32(0) if self.reset is None else self.reset
            weights = self.clip((weights - reset) * self.decay + reset)
        return weights


def draw_devices(device: PulsedDevice, shape: tuple[int, int], draws: Draws, *, bias: bool) -> Devices:
    """Make the devices of a tile.

    Args:
        device: what they are like.
        shape: (k + 1, c_out) of the kernel matrix.
        draws: the tile's.
        bias: whether the last row is the bias.
    """
    rows = np.arange(shape[0])
    normals = draws.normal(Kind.DEVICES, 0, rows, _FEW * shape[1]).reshape(shape[0], _FEW, shape[1])
    uniforms = draws.uniform(Kind.DEVICES, 1, rows, 2 * shape[1]).reshape(shape[0], 2, shape[1])

    def spread(mean: float, deviation: float, which: int) -> Floats:
        return np.float32(mean) * (np.float32(1) + np.float32(deviation) * normals[:, which])

    b_max, b_min = spread(device.w_max, device.w_max_dtod, 0), spread(device.w_min, device.w_min_dtod, 1)
    gain, between = spread(1, device.dw_min_dtod, 2), np.float32(device.up_down_dtod) * normals[:, 3]
    up_bias, down_bias = np.float32(min(device.up_down, 0.0)), np.float32(-max(device.up_down, 0.0))
    dw_min = np.float32(device.dw_min)
    step_up, step_down = np.abs((up_bias + gain + between) * dw_min), np.abs((down_bias + gain - between) * dw_min)
    b_max, b_min = np.abs(np.maximum(b_max, b_min)), -np.abs(np.minimum(b_max, b_min))
    if device.corrupt_devices_prob > 0:
        corrupt = uniforms[:, 0] < np.float32(device.corrupt_devices_prob)
        reach = np.float32(abs(device.corrupt_devices_range))
        low, high = np.maximum(b_min, -reach), np.minimum(b_max, reach)
        stuck = low + (high - low) * uniforms[:, 1]
        b_max, b_min = np.where(corrupt, stuck, b_max), np.where(corrupt, stuck, b_min)
        step_up, step_down = np.where(corrupt, np.float32(0), step_up), np.where(corrupt, np.float32(0), step_down)
    if device.perfect_bias and bias:
        step_up[-1], step_down[-1] = dw_min, dw_min
        b_max[-1], b_min[-1] = np.float32(100 * device.w_max), np.float32(100 * device.w_min)
    shape_up, shape_down = _shapes(device, normals, (step_up, step_down), (b_max, b_min))
    decay = diffusion = reset = None
    if device.lifetime > 0:
        lifetime = spread(device.lifetime, device.lifetime_dtod, 8)
        decay = np.where(lifetime > 1, np.float32(1) - np.float32(1) / lifetime, np.float32(0))
    if device.diffusion > 0:
        diffusion = np.abs(spread(device.diffusion, device.diffusion_dtod, 9))
    if device.reset != 0 or device.reset_dtod > 0:
        reset = np.float32(device.reset) + np.float32(device.reset_dtod) * normals[:, 10]
    return Devices(
        parameters=device,
        b_max=b_max,
        b_min=b_min,
        step_up=step_up,
        step_down=step_down,
        shape_up=shape_up,
        shape_down=shape_down,
        decay=decay,
        diffusion=diffusion,
        reset=reset,
    )


def _shapes(
    device: PulsedDevice, normals: Floats, steps: tuple[Floats, Floats], bounds: tuple[Floats, Floats]
) -> tuple[Floats | None, Floats | None]:
    """Return what a device's change depends on its weight by, upwards and downwards."""
    if isinstance(device, PowStepDevice):
        gain = np.float32(1) + np.float32(device.pow_gamma_dtod) * normals[:, 4]
        between = np.float32(device.pow_up_down_dtod) * normals[:, 5]
        up, down = np.float32(min(device.pow_up_down, 0.0)), np.float32(-max(device.pow_up_down, 0.0))
        gamma = np.float32(device.pow_gamma)
        return np.abs((up + gain + between) * gamma), np.abs((down + gain - between) * gamma)
    if isinstance(device, SoftBoundsDevice):
        b_max, b_min = bounds
        return _slope(np.float32(1), steps[0], b_max), _slope(np.float32(1), steps[1], b_min)
    if isinstance(device, LinearStepDevice):
        up = np.abs(np.float32(device.gamma_up) + np.float32(device.gamma_up_dtod) * normals[:, 4])
        down = np.abs(np.float32(device.gamma_down) + np.float32(device.gamma_down_dtod) * normals[:, 5])
        w_max, w_min = np.full_like(up, device.w_max), np.full_like(up, device.w_min)
        return _slope(up, steps[0], w_max), _slope(down, steps[1], w_min)
    return None, None


def _slope(decrease: Floats | np.float32, step: Floats, bound: Floats) -> Floats:
    return np.asarray(-decrease * step / np.where(bound == 0, np.float32(np.inf), bound), np.float32)


@dataclass(slots=True)
class _Pulsed:
    """Devices that get a pulse each."""

    places: Places
    up: NDArray[np.bool_]
    weights: Floats
    step: Floats
    b_max: Floats
    b_min: Floats

    def shape(self, devices: Devices) -> Floats:
        assert devices.shape_up is not None
        assert devices.shape_down is not None
        return np.where(self.up, devices.shape_up.ravel()[self.places], devices.shape_down.ravel()[self.places])


Factor = Floats | np.float32


def _constant(devices: Devices, of: _Pulsed, factor: Factor) -> Floats:
    return of.step * factor


def _linear(devices: Devices, of: _Pulsed, factor: Factor) -> Floats:
    slope = of.shape(devices)
    assert isinstance(devices.parameters, LinearStepDevice | SoftBoundsDevice)
    if devices.parameters.mult_noise:
        return (slope * of.weights + of.step) * factor
    return slope * of.weights + of.step * factor


def _exponential(devices: Devices, of: _Pulsed, factor: Factor) -> Floats:
    device = devices.parameters
    assert isinstance(device, ExpStepDevice)
    room = of.b_max - of.b_min
    z = np.float32(2) * of.weights / np.where(room > 0, room, np.float32(1)) * np.float32(device.a)
    z = z + np.float32(device.b)
    a = np.where(of.up, np.float32(device.A_up), np.float32(device.A_down))
    exponent = np.where(of.up, np.float32(device.gamma_up) * z, np.float32(device.gamma_down) * -z)
    y = np.maximum(np.float32(1) - a * np.exp(exponent), np.float32(0))
    return np.where(room > 0, y * factor * of.step, np.float32(0))


def _power(devices: Devices, of: _Pulsed, factor: Factor) -> Floats:
    room = of.b_max - of.b_min
    left = np.where(of.up, of.b_max - of.weights, of.weights - of.b_min) / np.where(room > 0, room, np.float32(1))
    found = of.step * np.maximum(left, np.float32(0)) ** of.shape(devices) * factor
    return np.where(room > 0, found, np.float32(0))


_CHANGES: "dict[type[PulsedDevice], Callable[[Devices, _Pulsed, Factor], Floats]]" = {
    ConstantStepDevice: _constant,
    LinearStepDevice: _linear,
    SoftBoundsDevice: _linear,
    ExpStepDevice: _exponential,
    PowStepDevice: _power,
}
