"""rapa-dist: a distributed emulator of RAPA ConvNets on analog arrays, one Ray actor per tile.

    import rapa_dist as rapa

    rapa.convert(model, tiles=16, images=(10, 3, 32, 32))
    with rapa.open_fabric(model, images=(10, 3, 32, 32)):
        optimizer = rapa.RapaSGD(model, lr=0.05)
        ...
    rapa.revert(model)

Nothing of PyTorch or Ray is loaded before one of the names below is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rapa_dist.config import TrainConfig
    from rapa_dist.config import resolve as configure
    from rapa_dist.errors import RapaError
    from rapa_dist.nn.convert import convert, revert
    from rapa_dist.nn.layers import RapaConv2d, RapaLinear
    from rapa_dist.nn.optim import RapaSGD
    from rapa_dist.opening import open_fabric
    from rapa_dist.physics.parameters import (
        ConstantStepDevice,
        ExpStepDevice,
        IOParameters,
        LinearStepDevice,
        Physics,
        PowStepDevice,
        SoftBoundsDevice,
        UpdateParameters,
    )
    from rapa_dist.training import train

__version__ = "0.1.0"
__all__ = [
    "ConstantStepDevice",
    "ExpStepDevice",
    "IOParameters",
    "LinearStepDevice",
    "Physics",
    "PowStepDevice",
    "RapaConv2d",
    "RapaError",
    "RapaLinear",
    "RapaSGD",
    "SoftBoundsDevice",
    "TrainConfig",
    "UpdateParameters",
    "configure",
    "convert",
    "open_fabric",
    "revert",
    "train",
]

_PHYSICS = "rapa_dist.physics.parameters"
_PLACES = {
    "ConstantStepDevice": _PHYSICS,
    "ExpStepDevice": _PHYSICS,
    "IOParameters": _PHYSICS,
    "LinearStepDevice": _PHYSICS,
    "Physics": _PHYSICS,
    "PowStepDevice": _PHYSICS,
    "RapaConv2d": "rapa_dist.nn.layers",
    "RapaError": "rapa_dist.errors",
    "RapaLinear": "rapa_dist.nn.layers",
    "RapaSGD": "rapa_dist.nn.optim",
    "SoftBoundsDevice": _PHYSICS,
    "TrainConfig": "rapa_dist.config",
    "UpdateParameters": _PHYSICS,
    "configure": "rapa_dist.config:resolve",
    "convert": "rapa_dist.nn.convert",
    "open_fabric": "rapa_dist.opening",
    "revert": "rapa_dist.nn.convert",
    "train": "rapa_dist.training",
}
"""Where the public names are defined: a module, or module:name where it is called otherwise there."""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}"
        )
    module, _, called = _PLACES[name].partition(":")
    return getattr(importlib.import_module(module), called or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
