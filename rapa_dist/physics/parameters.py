"""The physics of a tile as numbers, under aihwkit's names and with its defaults (ANALOG.md, sections 1 to 3).

Nothing here computes; nothing of NumPy is loaded.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

from rapa_dist.checks import check_choice
from rapa_dist.errors import UsageError
from rapa_dist.fields import shown

NOISE_MANAGEMENT = ("NONE", "ABS_MAX", "MAX", "CONSTANT")
BOUND_MANAGEMENT = ("NONE", "ITERATIVE")
WEIGHT_NOISE = ("NONE", "ADDITIVE_CONSTANT", "PCM_READ")
PULSE_TYPES = ("STOCHASTIC_COMPRESSED", "MEAN_COUNT", "DETERMINISTIC_IMPLICIT")
LONGEST_TRAIN = 64
"""Most pulses of a train."""
_LARGEST = 1e30
P = TypeVar("P", bound="Parameters")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Numbers, switches and choices, each checked by its type."""

    group: ClassVar[str] = ""
    """What stands before a field's name where it is set: "forward", say."""
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """By name of a field what it may be."""
    positive: ClassVar[tuple[str, ...]] = ()
    """Names of fields that are 0 or more."""

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is str:
                check_choice(self.name_of(name), value, self.choices[name])
            elif field.type is bool:
                if type(value) is not bool:
                    raise UsageError(f"{self.name_of(name)} is true or false; not {shown(value)}.")
            elif type(value) not in (int, float) or not -_LARGEST <= value <= _LARGEST:
                raise UsageError(f"{self.name_of(name)} needs a finite number; it is {shown(value)}.")
            elif field.type is int and type(value) is not int:
                raise UsageError(f"{self.name_of(name)} needs a whole number; it is {shown(value)}.")
            elif name in self.positive and value < 0:
                raise UsageError(f"{self.name_of(name)} needs a number from 0; it is {value:g}.")

    def name_of(self, field: str) -> str:
        """Return a field's name as a user gives it."""
        return f"{self.group}.{field}" if self.group else field


@dataclass(frozen=True, slots=True, kw_only=True)
class IOParameters(Parameters):
    """What is around an array: its converters, its noise, and how inputs are scaled. A product's one direction.

    Example:
        >>> import rapa_dist as rapa
        >>> rapa.IOParameters(out_noise=0.0).out_bound
        12.0
    """

    choices: ClassVar = {
        "noise_management": NOISE_MANAGEMENT,
        "bound_management": BOUND_MANAGEMENT,
        "w_noise_type": WEIGHT_NOISE,
    }
    positive: ClassVar = ("inp_noise", "out_noise", "w_noise", "ir_drop", "nm_thres", "max_bm_factor", "max_bm_res")

    is_perfect: bool = False
    """Whether the product is exact; then only `out_scale` counts."""
    inp_bound: float = 1.0
    """Range of the input converter; 0 or less: no bound, and no steps. 1 where there is noise management."""
    inp_res: float = 1 / (2**7 - 2)
    """Its step, as a share of twice the range; above 1 the number of steps; 0 or less: none."""
    inp_noise: float = 0.0
    """Standard deviation of what is added behind it."""
    inp_sto_round: bool = False
    """Whether it rounds at random, to either side."""
    out_bound: float = 12.0
    """Range of the output converter; 0 or less: no bound, and no steps."""
    out_res: float = 1 / (2**9 - 2)
    """Its step, as for `inp_res`."""
    out_noise: float = 0.06
    """Standard deviation of what is added before it."""
    out_sto_round: bool = False
    """Whether it rounds at random, to either side."""
    out_scale: float = 1.0
    """What results are multiplied with."""
    noise_management: str = "ABS_MAX"
    """What inputs are divided by: NONE, ABS_MAX (the largest absolute one), MAX, CONSTANT (`nm_thres`, or 1)."""
    nm_thres: float = 0.0
    """The most that they are divided by; 0: no limit."""
    bound_management: str = "ITERATIVE"
    """NONE, or ITERATIVE: a vector with an output beyond the bound passes again with half the input. Forward only."""
    max_bm_factor: int = 1000
    """ITERATIVE gives up when inputs have been divided by more."""
    max_bm_res: float = 0.25
    """… and when 1 over that is less than so many input steps."""
    w_noise: float = 0.0
    """Size of the noise of weights as they are read."""
    w_noise_type: str = "NONE"
    """NONE, ADDITIVE_CONSTANT (the same for all), PCM_READ (grows with the root of the weight)."""
    ir_drop: float = 0.0
    """Voltage drop along wires; 1 is physical, 0 none."""
    ir_drop_g_ratio: float = 1 / 0.35 / 5e-6
    """Conductance of a wire between two cross-points over the largest one of a device."""

    def __post_init__(self) -> None:
        super(IOParameters, self).__post_init__()
        if not self.is_perfect and self.noise_management != "NONE" and self.inp_bound != 1:
            raise UsageError(
                f"{self.name_of('inp_bound')} is 1 where there is noise management, which divides inputs by their "
                f"largest; it is {self.inp_bound:g}. Use 1, or {self.name_of('noise_management')}=NONE."
            )
        if self.ir_drop_g_ratio <= 0:
            raise UsageError(
                f"{self.name_of('ir_drop_g_ratio')} needs a number above 0; it is {self.ir_drop_g_ratio:g}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateParameters(Parameters):
    """How the outer product of a patch and an error is sent to devices as pulses.

    Example:
        >>> import rapa_dist as rapa
        >>> rapa.UpdateParameters(pulse_type="MEAN_COUNT").desired_bl
        31
    """

    group: ClassVar = "update"
    choices: ClassVar = {"pulse_type": PULSE_TYPES}
    positive: ClassVar = ("x_res_implicit", "d_res_implicit")

    desired_bl: int = 31
    """Most pulses of a train."""
    pulse_type: str = "STOCHASTIC_COMPRESSED"
    """STOCHASTIC_COMPRESSED (the hardware's), or, drawing nothing, MEAN_COUNT or DETERMINISTIC_IMPLICIT."""
    update_bl_management: bool = True
    """Whether a train is only as long as a row needs."""
    update_management: bool = True
    """Whether as much is asked of patches as of errors."""
    um_grad_scale: float = 1.0
    """What the largest error is multiplied with for that."""
    x_res_implicit: float = 0.0
    """Of DETERMINISTIC_IMPLICIT, the step of what patches ask for; 0: none."""
    d_res_implicit: float = 0.0
    """… of what errors ask for."""

    def __post_init__(self) -> None:
        super(UpdateParameters, self).__post_init__()
        if not 1 <= self.desired_bl <= LONGEST_TRAIN:
            raise UsageError(
                f"{self.name_of('desired_bl')} is a number of pulses from 1 to {LONGEST_TRAIN}, 31 as a rule; it is "
                f"{self.desired_bl}."
            )
        if self.um_grad_scale <= 0:
            raise UsageError(f"{self.name_of('um_grad_scale')} needs a number above 0; it is {self.um_grad_scale:g}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PulsedDevice(Parameters):
    """What all devices have. Those ending in `_dtod` are the spread from device to device, drawn once for each."""

    group: ClassVar = "device"
    kind: ClassVar[str] = ""
    """Its name where it is chosen."""
    positive: ClassVar = (
        *("dw_min_dtod", "dw_min_std", "up_down_dtod", "w_max_dtod", "w_min_dtod", "corrupt_devices_prob"),
        *("corrupt_devices_range", "lifetime", "lifetime_dtod", "diffusion", "diffusion_dtod", "reset_dtod"),
        *("write_noise_std", "gamma_up_dtod", "gamma_down_dtod", "pow_gamma_dtod", "pow_up_down_dtod"),
    )

    dw_min: float = 0.001
    """Change by a pulse at weight 0."""
    dw_min_dtod: float = 0.3
    """Its spread, relative."""
    dw_min_std: float = 0.3
    """Its spread from pulse to pulse, relative."""
    up_down: float = 0.0
    """By how much smaller downward steps are (above 0), or upward ones (below 0), relative."""
    up_down_dtod: float = 0.01
    """Its spread."""
    w_max: float = 0.6
    """Largest weight."""
    w_max_dtod: float = 0.3
    """Its spread, relative."""
    w_min: float = -0.6
    """Smallest weight."""
    w_min_dtod: float = 0.3
    """Its spread, relative."""
    corrupt_devices_prob: float = 0.0
    """Share of devices that are stuck."""
    corrupt_devices_range: float = 0.1
    """… at a weight up to this."""
    lifetime: float = 0.0
    """Mini-batches in which a weight decays to 1 / e; 0: it does not."""
    lifetime_dtod: float = 0.0
    """Its spread, relative."""
    diffusion: float = 0.0
    """Standard deviation of what is added to weights with every mini-batch."""
    diffusion_dtod: float = 0.0
    """Its spread, relative."""
    reset: float = 0.0
    """Weight that decay leads to."""
    reset_dtod: float = 0.0
    """Its spread."""
    perfect_bias: bool = False
    """Whether the devices of biases are all alike, without bounds."""

    def __post_init__(self) -> None:
        super(PulsedDevice, self).__post_init__()
        if self.dw_min <= 0:
            raise UsageError(f"{self.name_of('dw_min')} needs a number above 0, like 0.001; it is {self.dw_min:g}.")
        if not self.w_min <= 0 <= self.w_max:
            raise UsageError(
                f"0 has to lie between {self.name_of('w_min')} and {self.name_of('w_max')}; they are {self.w_min:g} "
                f"and {self.w_max:g}."
            )
        if self.corrupt_devices_prob > 1:
            raise UsageError(
                f"{self.name_of('corrupt_devices_prob')} is a share from 0 to 1; it is {self.corrupt_devices_prob:g}."
            )
        if 0 < self.lifetime <= 1:
            raise UsageError(
                f"{self.name_of('lifetime')} is a number of mini-batches above 1, or 0 for no decay; it is "
                f"{self.lifetime:g}."
            )

    @property
    def write_noise(self) -> float:
        """Standard deviation of what is seen of a weight around what is stored."""
        return float(getattr(self, "write_noise_std", 0.0)) * self.dw_min

    @property
    def granularity(self) -> float:
        """The step that pulse trains are computed with, g."""
        return self.dw_min


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantStepDevice(PulsedDevice):
    """A pulse changes a weight by the same, wherever it is, up to its bounds.

    Example:
        >>> import rapa_dist as rapa
        >>> rapa.ConstantStepDevice(dw_min=0.002, dw_min_dtod=0.0).w_max
        0.6
    """

    kind: ClassVar = "ConstantStep"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearStepDevice(PulsedDevice):
    """A pulse's change falls in a straight line towards the bound.

    Example:
        >>> import rapa_dist as rapa
        >>> rapa.LinearStepDevice(gamma_up=0.1, gamma_down=0.5).mult_noise
        True
    """

    kind: ClassVar = "LinearStep"

    gamma_up: float = 0.0
    """By how much upward steps are smaller at `w_max` than at 0, relative."""
    gamma_down: float = 0.0
    """… downward steps at `w_min`."""
    gamma_up_dtod: float = 0.05
    """Its spread."""
    gamma_down_dtod: float = 0.05
    """Its spread."""
    mult_noise: bool = True
    """Whether noise from pulse to pulse is a share of the change; else of the step at 0."""
    write_noise_std: float = 0.0
    """What is seen of a weight around what is stored, in `dw_min`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftBoundsDevice(PulsedDevice):
    """A pulse's change falls in a straight line to 0 at the device's own bound.

    Example:
        >>> import rapa_dist as rapa
        >>> rapa.SoftBoundsDevice(w_max=1.0, w_min=-1.0).granularity
        0.001
    """

    kind: ClassVar = "SoftBounds"

    mult_noise: bool = True
    """Whether noise from pulse to pulse is a share of the change; else of the step at 0."""
    write_noise_std: float = 0.0
    """What is seen of a weight around what is stored, in `dw_min`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpStepDevice(PulsedDevice):
    """A pulse's change falls exponentially towards the bound.

    Example:
        >>> import rapa_dist as rapa
        >>> rapa.ExpStepDevice(A_up=0.0, A_down=0.0).granularity
        0.001
    """

    kind: ClassVar = "ExpStep"

    A_up: float = 0.00081
    """Size of the exponential of upward steps."""
    A_down: float = 0.36833
    """… of downward steps."""
    gamma_up: float = 12.44625
    """How steep it is upwards."""
    gamma_down: float = 12.78785
    """… downwards."""
    a: float = 0.244
    """Scale of the weight in it."""
    b: float = 0.2425
    """Offset of the weight in it."""
    write_noise_std: float = 0.0
    """What is seen of a weight around what is stored, in `dw_min`."""

    @property
    def granularity(self) -> float:
        """The step that pulse trains are computed with, g: that of a downward pulse at weight 0."""
        left = 1 - self.A_down * math.exp(-self.gamma_down * self.b)
        found = self.dw_min * (1 - max(self.up_down, 0.0)) * max(left, 0.0)
        return found if found > 0 else self.dw_min


@dataclass(frozen=True, slots=True, kw_only=True)
class PowStepDevice(PulsedDevice):
    """A pulse's change falls with a power of what is left to the bound.

    Example:
        >>> import rapa_dist as rapa
        >>> rapa.PowStepDevice(dw_min=0.004, pow_gamma=1.0).granularity
        0.002
    """

    kind: ClassVar = "PowStep"

    pow_gamma: float = 1.0
    """The power."""
    pow_gamma_dtod: float = 0.1
    """Its spread, relative."""
    pow_up_down: float = 0.0
    """By how much smaller it is downwards (above 0), or upwards (below 0), relative."""
    pow_up_down_dtod: float = 0.0
    """Its spread."""
    write_noise_std: float = 0.0
    """What is seen of a weight around what is stored, in `dw_min`."""

    @property
    def granularity(self) -> float:
        """The step that pulse trains are computed with, g: that of a pulse in the middle between the bounds."""
        return float(self.dw_min * 0.5**self.pow_gamma)


DEVICES: Mapping[str, type[PulsedDevice]] = {
    device.kind: device
    for device in (ConstantStepDevice, LinearStepDevice, SoftBoundsDevice, ExpStepDevice, PowStepDevice)
}
"""Devices by the names that they are chosen by."""
PERFECT = IOParameters(is_perfect=True, bound_management="NONE")
"""An exact product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Physics:
    """What an array does: its two products, and what its weights are kept in.

    Example:
        >>> import rapa_dist as rapa
        >>> noisy = rapa.Physics(forward=rapa.IOParameters(out_noise=0.1))
        >>> noisy.is_ideal, noisy.device
        (False, None)
    """

    forward: IOParameters = PERFECT
    """Of the forward cycle."""
    backward: IOParameters = PERFECT
    """Of the backward cycle, in which there is no bound management."""
    update: UpdateParameters = UpdateParameters()
    """How pulses are sent, where there are devices."""
    device: PulsedDevice | None = None
    """What weights are kept in; None: exact numbers, and exact updates."""

    def __post_init__(self) -> None:
        if not self.backward.is_perfect and self.backward.bound_management != "NONE":
            raise UsageError(
                "backward.bound_management is NONE: errors are never sent again with half the input, here as in "
                f"aihwkit; it is {self.backward.bound_management}. Leave it out."
            )

    @property
    def is_ideal(self) -> bool:
        """Whether it does what exact arithmetic does."""
        products = self.forward, self.backward
        return self.device is None and all(io.is_perfect and io.out_scale == 1 for io in products)

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers as plain values; the devices' kind stands among theirs."""
        device = None if self.device is None else {"kind": self.device.kind, **asdict(self.device)}
        values = {name: asdict(getattr(self, name)) for name in ("forward", "backward", "update")}
        return values if device is None else values | {"device": device}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Physics":
        """Return the physics that `as_dict` was called on; what is left out is as by default.

        Raises:
            UsageError: a name is unknown, or a value can't work.
        """
        check_names("A physics", values, ("forward", "backward", "update", "device"))
        device, of_device = None, dict(values.get("device") or {})
        if of_device:
            kind = str(of_device.pop("kind", ""))
            check_choice("device.kind", kind, tuple(DEVICES))
            device = made(DEVICES[kind], "device", of_device)
        return cls(
            forward=made(IOParameters, "forward", values.get("forward", asdict(PERFECT))),
            backward=made(IOParameters, "backward", values.get("backward", asdict(PERFECT))),
            update=made(UpdateParameters, "update", values.get("update", {})),
            device=device,
        )


def made(kind: type[P], group: str, values: Mapping[str, Any]) -> P:
    """Return parameters of a kind.

    Raises:
        UsageError: a name is unknown, or a value can't work; it goes by "group.name".
    """
    names = tuple(field.name for field in fields(kind))
    check_names(f"“{group}”", values, names)
    try:
        return kind(**{name: _as_typed(kind, name, value) for name, value in values.items()})
    except UsageError as error:
        if kind.group or not any(name in str(error) for name in names):
            raise
        raise UsageError(f"In “{group}”: {error}") from None


def _as_typed(kind: type[Parameters], name: str, value: Any) -> Any:
    """Return a whole number as a float where the field is one, and a choice in capitals."""
    found = {field.name: field.type for field in fields(kind)}[name]
    if found is float and type(value) is int:
        return float(value)
    return value.upper() if found is str and isinstance(value, str) else value


def check_names(what: str, values: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Raise UsageError unless all names are known; the nearest is suggested."""
    for name in values:
        if name not in names:
            check_choice(f"A field of {what}", name, names)
