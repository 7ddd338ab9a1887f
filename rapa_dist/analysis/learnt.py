"""What the tiles of a checkpoint have learnt, told apart from the random start that each has of its own."""

import math

import numpy as np

from rapa_dist.analysis.similarity import similarities
from rapa_dist.config import TrainConfig
from rapa_dist.coordinator.checkpoint import Checkpoint, Progress
from rapa_dist.coordinator.initial import initial_kernels


def similarities_of(checkpoint: Checkpoint) -> dict[str, list[float | None]]:
    """Return `similarity.similarities` of a checkpoint."""
    config = checkpoint.config
    start = initial_kernels(config.machine, config.seed)
    return similarities(checkpoint.kernels, start, decay_leaves(config, checkpoint.progress))


def decay_leaves(config: TrainConfig, progress: Progress) -> float:
    """Return the share of a weight that decay alone leaves: Π (1 − λ · weight decay) over the steps so far."""
    steps = (progress.step - progress.step_in_epoch) // max(progress.epoch, 1)  # of a whole epoch
    logarithm = progress.step_in_epoch * _log_of_step(config, progress.epoch)
    logarithm += steps * sum(_log_of_step(config, epoch) for epoch in range(progress.epoch))
    return math.exp(logarithm)


def _log_of_step(config: TrainConfig, epoch: int) -> float:
    """Return the logarithm of what a step leaves, as tiles have it in float32."""
    return math.log(np.float32(1 - config.learning_rate(epoch) * config.weight_decay))
