"""What a person should know of a run's physics before it begins."""

import numpy as np

from rapa_dist.config import TrainConfig
from rapa_dist.console import counted
from rapa_dist.fabric.base import Fabric, Kernels


def notes(config: TrainConfig, given: Kernels, fabric: Fabric) -> list[str]:
    """Return sentences: weights that devices can't hold, and a learning rate at which pulse trains are always full.

    Args:
        config: the run's.
        given: the kernels that were to be programmed.
        fabric: on which they were.
    """
    if config.physics is None or not config.physics.has_devices:
        return []
    found = []
    beyond = sum(
        int(np.count_nonzero(programmed != wanted))
        for array, wanted, programmed in zip(fabric.machine.arrays, given, fabric.all_kernels(), strict=True)
        if array.physics is not None and array.physics.device is not None and not array.physics.device.write_noise
    )
    if beyond:
        found.append(
            f"{counted(beyond, 'weight')} of {fabric.machine.n_weights:,} are beyond the bounds of their devices, and "
            "begin at the bound."
        )
    for array in fabric.machine.arrays:
        if array.physics is None or array.physics.device is None:
            continue
        rate = dict(config.lr_of).get(array.name, config.lr)
        pulses = rate / config.batch_size / array.physics.device.granularity
        if pulses > array.physics.update.desired_bl:
            found.append(
                f"In {array.name} a patch and an error of size 1 ask for {pulses:,.0f} pulses, and a train has at most "
                f"{array.physics.update.desired_bl}: with λ = {rate:g} many updates will be cut. Try a smaller --lr."
            )
    return found
