"""What stochastic pooling draws in training: a function of seed, layer and step alone, like every other draw."""

import numpy as np
import torch
from torch import Tensor

from rapa_dist.machine import Machine, pooled_side
from rapa_dist.streams import Purpose, stream


def pooling_draws(machine: Machine, pooling: str, seed: int, step: int, images: int) -> tuple[Tensor, ...]:
    """Return the draws for a mini-batch, for every layer but the last; none unless pooling is stochastic.

    Args:
        machine: which layers.
        pooling: the pooling method.
        seed: the run's seed.
        step: steps trained before.
        images: images in the mini-batch.

    Returns:
        Per layer (images, pooled side, pooled side, c_out), uniform in [0, 1).
    """
    if pooling != "stochastic":
        return ()
    drawn = []
    for layer in machine.layers[:-1]:
        side = pooled_side(layer.side)
        rng = stream(seed, Purpose.POOL_TRAIN, layer.index, step)
        drawn.append(torch.from_numpy(rng.random((images, side, side, layer.c_out), np.float32)))
    return tuple(drawn)
