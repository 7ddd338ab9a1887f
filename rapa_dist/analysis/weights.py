"""Where a network's weights lie between the bounds of their devices."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rapa_dist.coordinator.checkpoint import Checkpoint
from rapa_dist.errors import UsageError
from rapa_dist.inspection import bounds_of
from rapa_dist.layout import machine_of
from rapa_dist.machine import TileArray
from rapa_dist.tile import Matrix

_QUARTILES = (25, 50, 75)


def positions(array: TileArray, kernels: Matrix) -> NDArray[np.float64]:
    """Return (n_t, k + 1, c_out) where weights lie: 0 at a device's smallest, 1 at its largest; stuck ones are NaN.

    Args:
        array: on devices.
        kernels: (n_t, k + 1, c_out).
    """
    found = np.full(kernels.shape, np.nan)
    for tile, kernel in enumerate(kernels):
        b_max, b_min = (bound.astype(np.float64) for bound in bounds_of(array, tile))
        np.divide(kernel - b_min, b_max - b_min, out=found[tile], where=b_max > b_min)
    return found


def weights_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return, for every layer on devices, how many of its weights are saturated, and where the others lie.

    Raises:
        UsageError: no layer is on devices.
    """
    layers = []
    for array, kernels in zip(machine_of(checkpoint.config).arrays, checkpoint.kernels, strict=True):
        if array.physics is None or array.physics.device is None:
            continue
        where = positions(array, kernels)
        inside = where[np.isfinite(where)]
        low, median, high = np.percentile(inside, _QUARTILES).tolist()
        layers.append(
            {
                "layer": array.name,
                "device": array.physics.device.kind,
                "tiles": array.n_tiles,
                "weights": int(where.size),
                "stuck": int(np.isnan(where).sum()),
                "at_bound_percent": 100 * float(((inside <= 0) | (inside >= 1)).mean()),
                "position_quartiles": [low, median, high],
            }
        )
    if not layers:
        raise UsageError(
            "The run's weights are kept in exact numbers: there are no bounds to hold them against. Give a run with "
            "devices, like one of `train --physics ecram`."
        )
    return {"layers": layers}
