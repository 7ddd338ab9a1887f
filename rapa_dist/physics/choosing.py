"""From what a user gives to the physics of every layer: a preset or a file, and single fields by aihwkit's names."""

import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rapa_dist.checks import check_choice
from rapa_dist.errors import UsageError
from rapa_dist.fields import shown
from rapa_dist.physics.parameters import (
    DEVICES,
    IOParameters,
    Parameters,
    Physics,
    UpdateParameters,
    check_names,
)
from rapa_dist.physics.presets import IDEAL, PRESETS

_GROUPS = ("forward", "backward", "update", "device")
_NONE = "none"
_TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_OFF = asdict(
    IOParameters(
        inp_bound=0.0, inp_res=0.0, out_bound=0.0, out_res=0.0, out_noise=0.0, noise_management="NONE",
        bound_management="NONE",
    )
)  # fmt: skip
"""A product that is exact because every non-ideality is switched off."""
_NEEDED: Mapping[str, Mapping[str, Any]] = {
    "inp_res": {"inp_bound": 1.0, "noise_management": "ABS_MAX"},
    "inp_sto_round": {"inp_bound": 1.0, "noise_management": "ABS_MAX", "inp_res": IOParameters().inp_res},
    "out_res": {"out_bound": IOParameters().out_bound},
    "out_sto_round": {"out_bound": IOParameters().out_bound, "out_res": IOParameters().out_res},
    "noise_management": {"inp_bound": 1.0},
}
"""What a field that is switched on alone needs to have an effect."""
Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PhysicsChoice:
    """The physics of a network: of all layers, but those that have their own."""

    default: Physics = PRESETS[IDEAL]
    layers: tuple[tuple[str, Physics], ...] = ()
    """By a layer's name, or its number from 0."""

    def of(self, index: int, name: str) -> Physics:
        """Return the physics of a layer."""
        own = dict(self.layers)
        return own.get(name, own.get(str(index), self.default))

    def check_layers(self, names: Sequence[str]) -> None:
        """Raise UsageError unless every layer that has its own physics is there; `names`: of all, in order."""
        known = (*names, *map(str, range(len(names))))
        for layer, _ in self.layers:
            if layer not in known:
                check_choice("A layer with its own physics", layer, known)

    @property
    def is_ideal(self) -> bool:
        """Whether all layers are ideal."""
        return all(physics.is_ideal for physics in self.all)

    @property
    def all(self) -> tuple[Physics, ...]:
        """Every physics that a layer may have."""
        return (self.default, *(physics for _, physics in self.layers))

    @property
    def name(self) -> str:
        """Its preset; what is none is called "own"."""
        found = [name for name, preset in PRESETS.items() if preset == self.default and not self.layers]
        return found[0] if found else "own"

    @property
    def has_devices(self) -> bool:
        """Whether some layer's weights are kept in devices."""
        return any(physics.device is not None for physics in self.all)

    def as_dict(self) -> Values:
        """Return all numbers as plain values."""
        values = self.default.as_dict()
        return values | {"layers": {name: own.as_dict() for name, own in self.layers}} if self.layers else values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PhysicsChoice":
        """Return the choice that `as_dict` was called on.

        Raises:
            UsageError: a name is unknown, or a value can't work.
        """
        check_names("physics", values, (*_GROUPS, "layers"))
        of_all = {name: value for name, value in values.items() if name != "layers"}
        layers = dict(values.get("layers", {}))
        return cls(Physics.from_dict(of_all), tuple((name, Physics.from_dict(own)) for name, own in layers.items()))


def choose(
    name: str | None = None, settings: Sequence[str] = (), begin_with: PhysicsChoice | None = None
) -> PhysicsChoice:
    """Return the physics that a user asks for.

    A setting is group.field=value, like "forward.out_noise=0.1", or "device=LinearStep", "device=none"; before it may
    stand a layer, by its number or its name: "0.forward.inp_res=0.1", "features.0.device=none". Where a product is
    exact, a field that is set is switched on alone: all others stay off, but what it needs to have an effect (a
    converter's step needs a range).

    Args:
        name: a preset's, or a TOML file with the tables [forward], [backward], [update], [device], each as in
            `settings`, `preset = "…"` to begin with, and tables [layers.NAME.forward] and so on; None: `begin_with`.
        settings: what is changed of that, one after the other; those of single layers after those of all.
        begin_with: what there is already; None: ideal.

    Raises:
        UsageError: a name is unknown, or a value can't work.
    """
    own: dict[str, Values] = {}
    if name is not None and name.endswith(".toml"):
        values, own = _from_file(Path(name))
    elif name is not None:
        check_choice("--physics", name, tuple(PRESETS))
        values = PRESETS[name].as_dict()
    else:
        start = begin_with or PhysicsChoice()
        values, own = start.default.as_dict(), {layer: physics.as_dict() for layer, physics in start.layers}
    for layer, group, field, text in sorted(map(_split, settings), key=lambda setting: setting[0] is not None):
        of_what = values if layer is None else own.setdefault(layer, deepcopy(values))
        _set(of_what, group, field, text)
    return PhysicsChoice(
        Physics.from_dict(values), tuple((layer, Physics.from_dict(of_layer)) for layer, of_layer in own.items())
    )


def _split(setting: str) -> tuple[str | None, str, str | None, str]:
    """Return layer, group, field and value of a setting."""
    key, equals, text = setting.partition("=")
    if not equals or not text:
        raise UsageError(f"--physics-set needs a name, “=” and a value, like forward.out_noise=0.1; not “{setting}”.")
    return *_parts(key), text


def _parts(key: str) -> tuple[str | None, str, str | None]:
    """Return layer, group and field of a setting's name."""
    parts = key.split(".")
    if parts[-1] == "device":
        return ".".join(parts[:-1]) or None, "device", None
    if len(parts) < 2:
        raise UsageError(
            f"--physics-set needs a group and a field, like forward.out_noise; not “{key}”. Groups are "
            f"{', '.join(_GROUPS)}."
        )
    check_choice(f"The group of “{key}”", parts[-2], _GROUPS)
    return ".".join(parts[:-2]) or None, parts[-2], parts[-1]


def _set(values: Values, group: str, field: str | None, given: Any) -> None:
    """Set a field of a group, by its text or its value; without a field, choose the device."""
    if field is None or (group == "device" and field == "kind"):
        _set_device(values, str(given))
        return
    kind = _kind(values, group)
    check_choice(f"A field of “{group}”", field, tuple(each.name for each in fields(kind)))
    found, value = values.setdefault(group, {}), _parsed(kind, f"{group}.{field}", field, given)
    if kind is IOParameters:
        if found.get("is_perfect") and field not in ("is_perfect", "out_scale"):
            found.update(_OFF)
        needed = _NEEDED.get(field, {}) if value not in (0, "NONE") else {}
        found.update({name: least for name, least in needed.items() if found.get(name) == _OFF[name]})
    found[field] = value


def _set_device(values: Values, name: str) -> None:
    if name.lower() == _NONE:
        values.pop("device", None)
        return
    known = {kind.lower(): kind for kind in DEVICES}
    if name.lower() not in known:
        check_choice("device", name, (_NONE, *DEVICES))
    values["device"] = {"kind": known[name.lower()]}


def _kind(values: Values, group: str) -> type[Parameters]:
    if group != "device":
        return UpdateParameters if group == "update" else IOParameters
    kind = values.get("device", {}).get("kind")
    if kind is None:
        having = ", ".join(name for name, physics in PRESETS.items() if physics.device is not None)
        raise UsageError(
            "A field of “device” needs a device, and there is none: updates are exact. Set "
            f"device={next(iter(DEVICES))} before, or begin with one of {having}."
        )
    return DEVICES[kind]


def _parsed(kind: type[Parameters], name: str, field: str, given: Any) -> Any:
    """Return a value of a field's type."""
    wanted = {each.name: each.type for each in fields(kind)}[field]
    if not isinstance(given, str):
        return given
    if wanted is str:
        return given.upper()
    if wanted is bool:
        if given.lower() not in _TRUTHS:
            raise UsageError(f"{name} is true or false; not “{given}”.")
        return _TRUTHS[given.lower()]
    try:
        return wanted(given)  # type: ignore[operator]
    except ValueError:
        number = "a whole number" if wanted is int else "a number"
        raise UsageError(f"{name} needs {number}; not “{given}”.") from None


def _from_file(path: Path) -> tuple[Values, dict[str, Values]]:
    """Return the physics in a file: of all layers, and of those that have their own."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Can't read --physics {path}: {error.strerror}. Name a file that is there.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--physics {path} is no TOML file: {error}.") from None
    try:
        check_names("the file", found, ("preset", "layers", *_GROUPS))
        values = _merged(PRESETS[_preset(found)].as_dict(), found)
        own: dict[str, Values] = {}
        for layer, of_layer in _table("layers", found.get("layers", {})).items():
            check_names(f"layers.{layer}", _table(f"layers.{layer}", of_layer), ("preset", *_GROUPS))
            start = PRESETS[_preset(of_layer)].as_dict() if "preset" in of_layer else deepcopy(values)
            own[layer] = _merged(start, of_layer)
        for physics in (values, *own.values()):
            Physics.from_dict(physics)
    except UsageError as error:
        raise UsageError(f"In {path}: {error}") from None
    return values, own


def _preset(table: Values) -> str:
    name = table.get("preset", IDEAL)
    check_choice("preset", str(name), tuple(PRESETS))
    return str(name)


def _merged(values: Values, table: Values) -> Values:
    for group in _GROUPS:
        if group not in table:
            continue
        given = table[group]
        if group == "device" and isinstance(given, str):
            _set_device(values, given)
            continue
        of_group = dict(_table(group, given))
        if "kind" in of_group:
            _set_device(values, str(of_group.pop("kind")))
        for field, value in of_group.items():
            _set(values, group, field, value)
    return values


def _table(name: str, value: Any) -> Values:
    if not isinstance(value, dict):
        raise UsageError(f"“{name}” is a table of names and values; it is {shown(value)}.")
    return value
