"""What the tiles of a checkpoint have learnt, told apart from the random start that each has of its own."""

import math

import numpy as np

from rapa_dist.config import TrainConfig
from rapa_dist.coordinator.checkpoint import Checkpoint, Progress
from rapa_dist.layout import machine_of, start_of
from rapa_dist.similarity import similarities


def similarities_of(checkpoint: Checkpoint) -> dict[str, list[float | None]]:
    """Return `similarity.similarities` of a checkpoint."""
    config = checkpoint.config
    arrays = machine_of(config).arrays
    filters, start = (
        [array.filters(of_layer) for array, of_layer in zip(arrays, kernels, strict=True)]
        for kernels in (checkpoint.kernels, start_of(config))
    )
    rates = dict(config.lr_of)
    leaves = [decay_leaves(config, checkpoint.progress, rates.get(array.name, config.lr)) for array in arrays]
    return similarities(filters, start, leaves)


def decay_leaves(config: TrainConfig, progress: Progress, lr: float | None = None) -> float:
    """Return the share of a weight that decay alone leaves: Π (1 − λ · weight decay) over the steps so far.

    Args:
        config: of the run.
        progress: how far it has come.
        lr: λ of the layer; None: the run's.
    """
    ratio = 1.0 if lr is None else lr / config.lr
    steps = (progress.step - progress.step_in_epoch) // max(progress.epoch, 1)  # of a whole epoch
    logarithm = progress.step_in_epoch * _log_of_step(config, progress.epoch, ratio)
    logarithm += steps * sum(_log_of_step(config, epoch, ratio) for epoch in range(progress.epoch))
    return math.exp(logarithm)


def _log_of_step(config: TrainConfig, epoch: int, ratio: float) -> float:
    """Return the logarithm of what a step leaves, as tiles have it in float32."""
    return math.log(np.float32(1 - ratio * config.learning_rate(epoch) * config.weight_decay))
