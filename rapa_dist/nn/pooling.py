"""Pooling over 3×3 windows with stride 2, the output size rounded up as Caffe does; and where ReLU stands.

Each method is a pair: forward, and backward from what the forward pass left for it. Written out, they take
half the time that autograd needs to find its way through planes as small as these.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rapa_dist.config import MIXTURE_SLOPE
from rapa_dist.machine import pooled

POOL_SIDE, POOL_STRIDE = 3, 2
_WINDOW = [POOL_SIDE, POOL_SIDE], [POOL_STRIDE, POOL_STRIDE], [0, 0]  # size, stride, padding
_CEIL = True
_aten: Any = torch.ops.aten


class Pooling(Protocol):
    """Pooling: (images, h, w, channels) → (images, ⌈(h − 1) / 2⌉, ⌈(w − 1) / 2⌉, channels)."""

    def forward(self, planes: Tensor, beta: Tensor | None = None, draws: Tensor | None = None) -> tuple[Tensor, Any]:
        """Return the smaller planes, and what `backward` needs.

        Args:
            planes: (images, h, w, channels).
            beta: (channels,) for a method that mixes by it.
            draws: like the smaller planes, uniform in [0, 1), for a method that draws in training; None in a test.
        """

    def backward(self, saved: Any, errors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the errors of the planes, given those of the smaller ones, and the gradient of β if there is one."""


class MaxPooling:
    """The largest value of every window."""

    def forward(self, planes: Tensor, beta: Tensor | None = None, draws: Tensor | None = None) -> tuple[Tensor, Any]:
        """Return the largest values, and where they were."""
        channels_first = planes.permute(0, 3, 1, 2)
        largest, places = _aten.max_pool2d_with_indices(channels_first, *_WINDOW, [1, 1], _CEIL)
        return largest.permute(0, 2, 3, 1), (channels_first, places)

    def backward(self, saved: Any, errors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give each error to the value that was the largest."""
        channels_first, places = saved
        at_largest = errors.permute(0, 3, 1, 2)
        back: Tensor = _aten.max_pool2d_with_indices_backward(
            at_largest, channels_first, *_WINDOW, [1, 1], _CEIL, places
        )
        return back.permute(0, 2, 3, 1), None


class AveragePooling:
    """The mean of every window; windows that hang over the edge average what is inside."""

    def forward(self, planes: Tensor, beta: Tensor | None = None, draws: Tensor | None = None) -> tuple[Tensor, Any]:
        """Return the means, and the planes for their shape."""
        channels_first = planes.permute(0, 3, 1, 2)
        return _aten.avg_pool2d(channels_first, *_WINDOW, _CEIL, True, None).permute(0, 2, 3, 1), channels_first

    def backward(self, saved: Any, errors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Spread each error evenly over its window."""
        spread: Tensor = _aten.avg_pool2d_backward(errors.permute(0, 3, 1, 2), saved, *_WINDOW, _CEIL, True, None)
        return spread.permute(0, 2, 3, 1), None


class StochasticPooling:
    """In training an activation drawn from every window, with a probability in proportion to it.

    In a test the mean of all, weighted by these probabilities (Zeiler & Fergus 2013). A window without activation
    gives 0. The planes are activations, none below 0.
    """

    def forward(self, planes: Tensor, beta: Tensor | None = None, draws: Tensor | None = None) -> tuple[Tensor, Any]:
        """Return what was drawn, by the inverse of the distribution function, or the weighted means."""
        windows = _windows(planes)
        total = sum(windows[1:], start=windows[0])
        if draws is None:
            squares = sum((window * window for window in windows[1:]), start=windows[0] * windows[0])
            mean = torch.where(total > 0, squares / total, 0)
            return mean, (planes, total, mean, None)
        threshold, passed, before = draws * total, [], torch.zeros_like(total)
        for window in windows:
            after = before + window
            passed.append((before <= threshold) & (threshold < after))
            before = after
        drawn = sum((window * chosen for window, chosen in zip(windows, passed, strict=True)), torch.zeros_like(total))
        return drawn, (planes, total, drawn, passed)

    def backward(self, saved: Any, errors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give each error to the activation that was drawn; in a test, differentiate Σ a² / Σ a."""
        planes, total, mean, passed = saved
        if passed is not None:
            return _spread([errors * chosen for chosen in passed], planes.shape), None
        share = torch.where(total > 0, errors / total, 0)
        return _spread([share * (2 * window - mean) for window in _windows(planes)], planes.shape), None


class MixedPooling:
    """α_k · average + (1 − α_k) · maximum, α_k = 1 / (1 + exp(µ β_k)), with a learned β_k for every channel (§3)."""

    def __init__(self) -> None:
        self._max, self._average = MaxPooling(), AveragePooling()

    def forward(self, planes: Tensor, beta: Tensor | None = None, draws: Tensor | None = None) -> tuple[Tensor, Any]:
        """Return the mixture, and what each of the two and α need."""
        assert beta is not None
        largest, of_max = self._max.forward(planes)
        mean, of_average = self._average.forward(planes)
        alpha = torch.sigmoid(-MIXTURE_SLOPE * beta)
        difference = mean - largest
        return torch.addcmul(largest, alpha, difference), (of_max, of_average, alpha, difference)

    def backward(self, saved: Any, errors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pass the errors back both ways, by their shares."""
        of_max, of_average, alpha, difference = saved
        of_alpha = (errors * difference).sum(dim=(0, 1, 2))  # (channels,)
        averaged = errors * alpha
        back = self._max.backward(of_max, errors - averaged)[0] + self._average.backward(of_average, averaged)[0]
        return back, of_alpha.mul_(alpha * (1 - alpha)).mul_(-MIXTURE_SLOPE)


POOLINGS: dict[str, type[Pooling]] = {
    "max": MaxPooling,
    "average": AveragePooling,
    "stochastic": StochasticPooling,
    "mixed": MixedPooling,
}
"""What can follow the convolution of all layers but the last, which always averages."""


def relu_first(method: str, layer: int) -> bool:
    """Return whether ReLU stands before the pooling of a layer, or behind it.

    Caffe's "Full" network pools its first layer before ReLU, the others behind it. So with average pooling all tiles
    that contribute to a window of the first layer receive the same error, which a ReLU in between would hide from
    some of them. Stochastic pooling draws in proportion to activations, and needs ReLU first. For the maximum both
    are the same, and behind it ReLU has a quarter of the planes.
    """
    return method == "stochastic" or (method != "max" and layer > 0)


def _padded_side(side: int) -> int:
    """Return the side of planes that the windows cover, over the edge included."""
    return max(side, POOL_STRIDE * (pooled(side) - 1) + POOL_SIDE)


def _places(padded: Tensor) -> list[Tensor]:
    """Return, for each of the 9 places in a window, row by row, a view of what all windows have there."""
    rows, columns = (
        [slice(first, first + length - POOL_SIDE + 1, POOL_STRIDE) for first in range(POOL_SIDE)]
        for length in padded.shape[1:3]
    )
    return [padded[:, y, x] for y in rows for x in columns]


def _windows(planes: Tensor) -> list[Tensor]:
    """Return the same of planes; beyond the edge there are zeros."""
    below, right = (_padded_side(side) - side for side in planes.shape[1:3])
    return _places(F.pad(planes, (0, 0, 0, right, 0, below)))


def _spread(pieces: list[Tensor], shape: torch.Size) -> Tensor:
    """Add up what goes back to each of the 9 places of all windows: the transpose of `_windows`."""
    images, h, w, channels = shape
    padded = pieces[0].new_zeros(images, _padded_side(h), _padded_side(w), channels)
    for place, piece in zip(_places(padded), pieces, strict=True):
        place.add_(piece)
    return padded[:, :h, :w]
