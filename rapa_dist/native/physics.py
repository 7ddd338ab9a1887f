"""A tile that is not ideal, whose products and pulses are the library's."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from rapa_dist.native.tile import address_of_floats
from rapa_dist.physics.parameters import ExpStepDevice, LinearStepDevice, PowStepDevice, SoftBoundsDevice
from rapa_dist.physics.periphery import step_of
from rapa_dist.physics.pulses import Sent
from rapa_dist.physics.tile import PhysicalTile

if TYPE_CHECKING:
    from rapa_dist.cells import Cells
    from rapa_dist.physics.devices import Devices
    from rapa_dist.physics.draws import Floats
    from rapa_dist.physics.parameters import IOParameters, Physics, UpdateParameters
    from rapa_dist.tile import Matrix

_FLOAT, _INT, _WORD, _SIZE, _POINTER = (
    ctypes.c_float,
    ctypes.c_int32,
    ctypes.c_uint64,
    ctypes.c_size_t,
    ctypes.c_void_p,
)
_MANAGEMENT = ("NONE", "ABS_MAX", "MAX", "CONSTANT")
_WEIGHT_NOISE = ("NONE", "ADDITIVE_CONSTANT", "PCM_READ")
_PULSES = ("STOCHASTIC_COMPRESSED", "MEAN_COUNT", "DETERMINISTIC_IMPLICIT")
_KINDS = {LinearStepDevice: 1, SoftBoundsDevice: 1, ExpStepDevice: 2, PowStepDevice: 3}


class _IO(ctypes.Structure):
    """struct io of periphery.h."""

    _fields_ = (
        *[
            (name, _FLOAT)
            for name in (
                *("inp_step", "inp_bound", "inp_noise", "out_step", "out_bound", "out_noise", "out_scale"),
                *("nm_thres", "w_noise", "ir_drop", "ir_drop_per_g"),
            )
        ],
        *[(name, _INT) for name in ("management", "iterative", "inp_sto_round", "out_sto_round", "w_noise_type")],
        ("max_reduction", ctypes.c_double),
    )


class _Pulsing(ctypes.Structure):
    """struct pulsing of physics.h."""

    _fields_ = (
        ("desired_bl", ctypes.c_uint32),
        *[(name, _INT) for name in ("pulse_type", "bl_management", "management")],
        *[(name, _FLOAT) for name in ("um_grad_scale", "granularity", "x_resolution", "d_resolution")],
    )


_ARRAYS = ("b_max", "b_min", "step_up", "step_down", "shape_up", "shape_down")


class _Devices(ctypes.Structure):
    """struct devices of physics.h."""

    _fields_ = (
        *[(name, _POINTER) for name in _ARRAYS],
        *[(name, _INT) for name in ("kind", "mult_noise")],
        *[
            (name, _FLOAT)
            for name in ("dw_min_std", "write_noise", "a", "b", "a_up", "a_down", "gamma_up", "gamma_down")
        ],
    )


class _Sent(ctypes.Structure):
    """struct sent of physics.h."""

    _fields_ = tuple((name, _WORD) for name in ("trains", "slots", "pulses"))


class NativePhysicalTile(PhysicalTile):
    """What `PhysicalTile` is, with the same draws, and many times as fast."""

    __slots__ = ("_device", "_io", "_library", "_pulsing", "_shape")

    def __init__(
        self,
        library: ctypes.CDLL,
        cells: Cells,
        physics: Physics,
        *,
        seed: int,
        place: tuple[int, int],
        bias: bool = True,
    ) -> None:
        """Work on a kernel matrix; as for `PhysicalTile`."""
        super().__init__(cells, physics, seed=seed, place=place, bias=bias)
        rows, c_out = cells.kernel_shape
        self._library, self._shape = library, (rows - bias, c_out, int(bias))
        library.rapa_analog_product.argtypes = [
            *[_POINTER] * 2,
            *[_SIZE] * 3,
            _POINTER,
            _SIZE,
            *[_WORD] * 2,
            _INT,
            *[_POINTER] * 2,
        ]
        library.rapa_analog_update.argtypes = [*[_POINTER] * 6, *[_SIZE] * 4, _FLOAT, *[_WORD] * 2, _POINTER]
        self._io = (_io(physics.forward, rows), _io(physics.backward, c_out))
        self._pulsing: Any = None
        self._device: Any = None
        if self.devices is not None:
            self._pulsing = _pulsing(physics.update, self.devices)
            self._device = _device(self.devices)

    def _product(self, active: int, vectors: Matrix, results: Matrix, *, backward: bool) -> int:
        io = (self.physics.forward, self.physics.backward)[backward]
        if io.is_perfect:
            return super()._product(active, vectors, results, backward=backward)
        k, c_out, bias = self._shape
        repeated = _WORD()
        failed = self._library.rapa_analog_product(
            ctypes.addressof(self._io[backward]),
            address_of_floats(self.cells.kernels[active]),
            *(k, c_out, bias),
            address_of_floats(vectors, (len(vectors), c_out if backward else k)),
            len(vectors),
            *(self._draws.key, self._cycle),
            backward,
            address_of_floats(results, (len(vectors), k if backward else c_out)),
            ctypes.addressof(repeated),
        )
        if failed:
            raise MemoryError
        return repeated.value

    def _pulse(self, weights: tuple[Floats, Floats], rows: tuple[Matrix, Matrix], rate: float) -> Sent:
        stored, seen = weights
        (patches, errors), (k, c_out, bias), sent = rows, self._shape, _Sent()
        failed = self._library.rapa_analog_update(
            ctypes.addressof(self._pulsing),
            ctypes.addressof(self._device),
            address_of_floats(stored),
            address_of_floats(seen),
            address_of_floats(patches, (len(errors), k)),
            address_of_floats(errors, (len(errors), c_out)),
            len(errors),
            *(k, bias, c_out),
            rate,
            *(self._draws.key, self._cycle),
            ctypes.addressof(sent),
        )
        if failed:
            raise MemoryError
        return Sent(sent.trains, sent.slots, sent.pulses)


def _io(io: IOParameters, n: int) -> Any:
    step, out_step = step_of(io.inp_res, io.inp_bound), step_of(io.out_res, io.out_bound)
    most = float(io.max_bm_factor)
    if step is not None:
        most = min(most, io.max_bm_res / float(step))
    return _IO(
        inp_step=step or 0,
        inp_bound=max(io.inp_bound, 0),
        inp_noise=io.inp_noise,
        out_step=out_step or 0,
        out_bound=max(io.out_bound, 0),
        out_noise=io.out_noise,
        out_scale=io.out_scale,
        nm_thres=io.nm_thres if io.noise_management != "NONE" else 0,
        w_noise=io.w_noise,
        ir_drop=io.ir_drop,
        ir_drop_per_g=n / io.ir_drop_g_ratio,
        management=_MANAGEMENT.index(io.noise_management),
        iterative=io.bound_management == "ITERATIVE",
        inp_sto_round=io.inp_sto_round,
        out_sto_round=io.out_sto_round,
        w_noise_type=_WEIGHT_NOISE.index(io.w_noise_type) if io.w_noise > 0 else 0,
        max_reduction=most,
    )


def _pulsing(update: UpdateParameters, devices: Devices) -> Any:
    return _Pulsing(
        desired_bl=update.desired_bl,
        pulse_type=_PULSES.index(update.pulse_type),
        bl_management=update.update_bl_management,
        management=update.update_management,
        um_grad_scale=update.um_grad_scale,
        granularity=devices.parameters.granularity,
        x_resolution=_resolution(update.x_res_implicit),
        d_resolution=_resolution(update.d_res_implicit),
    )


def _resolution(resolution: float) -> float:
    return 1 / resolution if resolution > 1 else max(resolution, 0.0)


def _device(devices: Devices) -> Any:
    device = devices.parameters
    values: dict[str, Any] = {}
    for name in _ARRAYS:
        of_name = getattr(devices, name)
        values[name] = None if of_name is None else address_of_floats(of_name)
    if isinstance(device, ExpStepDevice):
        values |= {"a": device.a, "b": device.b, "a_up": device.A_up, "a_down": device.A_down}
        values |= {"gamma_up": device.gamma_up, "gamma_down": device.gamma_down}
    return _Devices(
        **values,
        kind=_KINDS.get(type(device), 0),
        mult_noise=getattr(device, "mult_noise", False),
        dw_min_std=device.dw_min_std,
        write_noise=float(devices.write_noise),
    )
