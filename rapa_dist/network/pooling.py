"""ReLU, and pooling over 3×3 windows with stride 2, the output size rounded up as Caffe does.

Each method is a pair: forward, and backward from what the forward pass left for it. Written out, they take
half the time that autograd needs to find its way through planes as small as these.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from rapa_dist.machine import POOL_SIDE, POOL_STRIDE

_WINDOW = [POOL_SIDE, POOL_SIDE], [POOL_STRIDE, POOL_STRIDE], [0, 0]  # size, stride, padding
_CEIL = True
_aten: Any = torch.ops.aten


class Pooling(Protocol):
    """ReLU and pooling: (images, side, side, channels) → (images, ⌈(side − 1) / 2⌉, …, channels)."""

    def forward(self, planes: Tensor) -> tuple[Tensor, Any]:
        """Return the smaller planes, and what `backward` needs."""

    def backward(self, saved: Any, errors: Tensor) -> Tensor:
        """Return the errors of the planes, given those of the smaller ones."""


class MaxPooling:
    """The largest activation of every window.

    ReLU comes behind the maximum instead of before, which is the same and has a quarter of the planes.
    """

    def forward(self, planes: Tensor) -> tuple[Tensor, Any]:
        """Return the largest activations, and where they were."""
        channels_first = planes.permute(0, 3, 1, 2)
        largest, places = _aten.max_pool2d_with_indices(channels_first, *_WINDOW, [1, 1], _CEIL)
        largest.relu_()
        return largest.permute(0, 2, 3, 1), (channels_first, largest, places)

    def backward(self, saved: Any, errors: Tensor) -> Tensor:
        """Give each error to the activation that was the largest, if it was above 0."""
        channels_first, largest, places = saved
        through = _aten.threshold_backward(errors.permute(0, 3, 1, 2), largest, 0)
        back: Tensor = _aten.max_pool2d_with_indices_backward(through, channels_first, *_WINDOW, [1, 1], _CEIL, places)
        return back.permute(0, 2, 3, 1)


class AveragePooling:
    """The mean activation of every window; windows that hang over the edge average what is inside."""

    def forward(self, planes: Tensor) -> tuple[Tensor, Any]:
        """Return the mean activations, and all activations."""
        active = planes.permute(0, 3, 1, 2).relu()
        return _aten.avg_pool2d(active, *_WINDOW, _CEIL, True, None).permute(0, 2, 3, 1), active

    def backward(self, saved: Any, errors: Tensor) -> Tensor:
        """Spread each error evenly over its window, to the activations above 0."""
        active = saved
        spread = _aten.avg_pool2d_backward(errors.permute(0, 3, 1, 2), active, *_WINDOW, _CEIL, True, None)
        back: Tensor = _aten.threshold_backward(spread, active, 0)
        return back.permute(0, 2, 3, 1)


POOLINGS: dict[str, Pooling] = {"max": MaxPooling(), "average": AveragePooling()}
"""What follows the convolution of all layers but the last, which always averages, by the method's name."""
