"""A configuration of aihwkit as a physics. Nothing of aihwkit is imported: whoever hands one over has it."""

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any

from rapa_dist.errors import UsageError
from rapa_dist.fields import shown
from rapa_dist.physics.parameters import (
    DEVICES,
    IOParameters,
    Parameters,
    Physics,
    PulsedDevice,
    UpdateParameters,
)

_EXACT = ("IdealDevice", "FloatingPointDevice")
_NO_MATTER = frozenset({"construction_seed", "count_pulses", "fixed_bl", "reset_std", "apply_write_noise_on_set"})
"""Fields that say nothing of a training here: devices are drawn from the run's seed, say."""


def is_aihwkit(value: Any) -> bool:
    """Return whether a value is a configuration of aihwkit's."""
    return any(each.__module__.partition(".")[0] == "aihwkit" for each in type(value).__mro__)


def from_aihwkit(config: Any) -> Physics:
    """Return the physics of a `SingleRPUConfig`.

    Its mapping says nothing here: matrices are never split, and biases lie on the tile.

    Raises:
        UsageError: it has something that tiles here don't have; all of it is named.
    """
    missing = [name for name in ("forward", "backward", "update", "device") if not hasattr(config, name)]
    if missing:
        raise UsageError(
            f"physics takes a SingleRPUConfig of aihwkit's; {type(config).__name__} has no {' and no '.join(missing)}."
        )
    lacking: list[str] = []
    values: dict[str, Any] = {"update": _values(config.update, UpdateParameters, "update", lacking)}
    for side in ("forward", "backward"):
        values[side] = _values(getattr(config, side), IOParameters, side, lacking)
    values["backward"]["bound_management"] = "NONE"  # nor has aihwkit any there
    device = _device_class(config.device)
    if device is not None:
        values["device"] = {"kind": device.kind, **_values(config.device, device, "device", lacking)}
    elif type(config.device).__name__ not in _EXACT:
        lacking.append(f"device={type(config.device).__name__} (there are {', '.join(DEVICES)})")
    if values["update"].get("pulse_type") == "NONE":
        values["update"].pop("pulse_type")
        if device is not None:
            lacking.append("update.pulse_type=NONE with a device (use device=None for exact updates)")
    lacking += [name for name in ("noise_model", "modifier", "drift_compensation") if hasattr(config, name)]
    if lacking:
        raise UsageError(
            f"What aihwkit's configuration has and tiles here don't: {'; '.join(lacking)}. Set these back to their "
            "defaults."
        )
    return Physics.from_dict(values)


def _device_class(device: Any) -> type[PulsedDevice] | None:
    """Return the class that a device, or the one that a preset is made from, has here."""
    names = [each.__name__.removesuffix("Device") for each in type(device).__mro__]
    return DEVICES.get(names[0]) or next((DEVICES[name] for name in names[1:2] if name in DEVICES), None)


def _values(given: Any, kind: type[Parameters], group: str, lacking: list[str]) -> dict[str, Any]:
    """Return the fields that there are here; note those that there are not, where they are not at their defaults."""
    known = {field.name: field.type for field in fields(kind)}
    found: dict[str, Any] = {}
    for name, value, default in _fields(given):
        plain = value.name if isinstance(value, Enum) else value
        if name not in known:
            if name not in _NO_MATTER and value != default:
                lacking.append(f"{group}.{name}={shown(plain)}")
        elif isinstance(value, Enum) and plain not in kind.choices.get(name, ()):
            if not (name == "pulse_type" and plain == "NONE"):
                lacking.append(f"{group}.{name}={plain}")
            else:
                found[name] = plain
        else:
            found[name] = float(plain) if known[name] is float else plain
    return found


def _fields(given: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, value and default of a dataclass's fields."""
    assert is_dataclass(given)
    for field in fields(given):
        default = field.default
        if default is MISSING and field.default_factory is not MISSING:
            default = field.default_factory()
        yield field.name, getattr(given, field.name), default
