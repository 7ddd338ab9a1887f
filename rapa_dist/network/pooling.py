"""ReLU, and pooling over 3×3 windows with stride 2, the output size rounded up as Caffe does."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rapa_dist.machine import POOL_SIDE, POOL_STRIDE

Pool = Callable[[Tensor], Tensor]
"""(images, side, side, channels) → (images, ⌈(side − 1) / 2⌉, …, channels)."""


def max_pool(planes: Tensor) -> Tensor:
    """Take the largest activation of every window."""
    return F.max_pool2d(planes.permute(0, 3, 1, 2), POOL_SIDE, POOL_STRIDE, ceil_mode=True).permute(0, 2, 3, 1)


def average_pool(planes: Tensor) -> Tensor:
    """Take the mean of every window; windows that hang over the edge average what is inside."""
    return F.avg_pool2d(planes.permute(0, 3, 1, 2), POOL_SIDE, POOL_STRIDE, ceil_mode=True).permute(0, 2, 3, 1)


def rectify_and_max_pool(planes: Tensor) -> Tensor:
    """ReLU, then max pooling; done the other way round, which is the same and has a quarter of the planes."""
    return torch.relu(max_pool(planes))


def rectify_and_average_pool(planes: Tensor) -> Tensor:
    """ReLU, then average pooling."""
    return average_pool(torch.relu(planes))


POOLINGS: dict[str, Pool] = {"max": rectify_and_max_pool, "average": rectify_and_average_pool}
"""What follows the convolution of all layers but the last, which always averages, by the method's name."""
