"""Pooling over 3×3 windows with stride 2, the output size rounded up as Caffe does; and where ReLU stands.

Each method is a pair: forward, and backward from what the forward pass left for it. Written out, they take
half the time that autograd needs to find its way through planes as small as these.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rapa_dist.machine import POOL_SIDE, POOL_STRIDE, pooled_side

_WINDOW = [POOL_SIDE, POOL_SIDE], [POOL_STRIDE, POOL_STRIDE], [0, 0]  # size, stride, padding
_CEIL = True
_aten: Any = torch.ops.aten


MIXTURE_SLOPE = 10.0
"""µ of mixed pooling (§3)."""
MIXTURE_START = 2 / MIXTURE_SLOPE
"""β of every channel at the start: a share of 0.88 for the maximum (§3)."""


class Pooling(Protocol):
    """Pooling: (images, side, side, channels) → (images, ⌈(side − 1) / 2⌉, …, channels)."""

    def forward(self, planes: Tensor, draws: Tensor | None = None) -> tuple[Tensor, Any]:
        """Return the smaller planes, and what `backward` needs.

        Args:
            planes: (images, side, side, channels).
            draws: like the smaller planes, uniform in [0, 1), for a method that draws in training; None in a test.
        """

    def backward(self, saved: Any, errors: Tensor) -> Tensor:
        """Return the errors of the planes, given those of the smaller ones; add to the parameters' gradients."""


class MaxPooling:
    """The largest value of every window."""

    def forward(self, planes: Tensor, draws: Tensor | None = None) -> tuple[Tensor, Any]:
        """Return the largest values, and where they were."""
        channels_first = planes.permute(0, 3, 1, 2)
        largest, places = _aten.max_pool2d_with_indices(channels_first, *_WINDOW, [1, 1], _CEIL)
        return largest.permute(0, 2, 3, 1), (channels_first, places)

    def backward(self, saved: Any, errors: Tensor) -> Tensor:
        """Give each error to the value that was the largest."""
        channels_first, places = saved
        at_largest = errors.permute(0, 3, 1, 2)
        back: Tensor = _aten.max_pool2d_with_indices_backward(
            at_largest, channels_first, *_WINDOW, [1, 1], _CEIL, places
        )
        return back.permute(0, 2, 3, 1)


class AveragePooling:
    """The mean of every window; windows that hang over the edge average what is inside."""

    def forward(self, planes: Tensor, draws: Tensor | None = None) -> tuple[Tensor, Any]:
        """Return the means, and the planes for their shape."""
        channels_first = planes.permute(0, 3, 1, 2)
        return _aten.avg_pool2d(channels_first, *_WINDOW, _CEIL, True, None).permute(0, 2, 3, 1), channels_first

    def backward(self, saved: Any, errors: Tensor) -> Tensor:
        """Spread each error evenly over its window."""
        spread: Tensor = _aten.avg_pool2d_backward(errors.permute(0, 3, 1, 2), saved, *_WINDOW, _CEIL, True, None)
        return spread.permute(0, 2, 3, 1)


class StochasticPooling:
    """In training an activation drawn from every window, with a probability in proportion to it.

    In a test the mean of all, weighted by these probabilities (Zeiler & Fergus 2013). A window without activation
    gives 0. The planes are activations, none below 0.
    """

    def forward(self, planes: Tensor, draws: Tensor | None = None) -> tuple[Tensor, Any]:
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

    def backward(self, saved: Any, errors: Tensor) -> Tensor:
        """Give each error to the activation that was drawn; in a test, differentiate Σ a² / Σ a."""
        planes, total, pooled, passed = saved
        if passed is not None:
            return _spread([errors * chosen for chosen in passed], planes.shape)
        share = torch.where(total > 0, errors / total, 0)
        return _spread([share * (2 * window - pooled) for window in _windows(planes)], planes.shape)


class MixedPooling:
    """α_k · average + (1 − α_k) · maximum, α_k = 1 / (1 + exp(µ β_k)), with a learned β_k for every channel (§3)."""

    def __init__(self, beta: Tensor) -> None:
        """Mix by (channels,) β, which stays the caller's; its gradient adds up in `beta.grad`.

        Where several networks compute as one, β is (networks, channels), and the images are theirs in turn.
        """
        self.beta = beta
        self._max, self._average = MaxPooling(), AveragePooling()

    def forward(self, planes: Tensor, draws: Tensor | None = None) -> tuple[Tensor, Any]:
        """Return the mixture, and what each of the two and α need."""
        largest, of_max = self._max.forward(planes)
        mean, of_average = self._average.forward(planes)
        alpha = torch.sigmoid(-MIXTURE_SLOPE * self.beta.detach()).view(-1, planes.shape[3])
        share = alpha.repeat_interleave(len(planes) // len(alpha), dim=0)[:, None, None]  # (images, 1, 1, channels)
        difference = mean - largest
        return torch.addcmul(largest, share, difference), (of_max, of_average, alpha, share, difference)

    def backward(self, saved: Any, errors: Tensor) -> Tensor:
        """Pass the errors back both ways, by their shares."""
        of_max, of_average, alpha, share, difference = saved
        of_images = (errors * difference).sum(dim=(1, 2))  # (images, channels)
        of_alpha = of_images.view(len(alpha), -1, alpha.shape[1]).sum(dim=1)
        gradient = of_alpha.mul_(alpha * (1 - alpha)).mul_(-MIXTURE_SLOPE).view(self.beta.shape)
        self.beta.grad = gradient if self.beta.grad is None else self.beta.grad.add_(gradient)
        averaged = errors * share
        return self._max.backward(of_max, errors - averaged) + self._average.backward(of_average, averaged)


POOLINGS = ("max", "average", "stochastic", "mixed")
"""What can follow the convolution of all layers but the last, which always averages."""


def relu_first(method: str, layer: int) -> bool:
    """Return whether ReLU stands before the pooling of a layer, or behind it.

    Caffe's "Full" network pools its first layer before ReLU, the others behind it. So with average pooling all tiles
    that contribute to a window of the first layer receive the same error, which a ReLU in between would hide from
    some of them. Stochastic pooling draws in proportion to activations, and needs ReLU first. For the maximum both
    are the same, and behind it ReLU has a quarter of the planes.
    """
    return method == "stochastic" or (method != "max" and layer > 0)


def make_pooling(method: str, layer: int, parameters: Mapping[str, Tensor]) -> Pooling:
    """Return the pooling of one layer.

    Args:
        method: one of `POOLINGS`.
        layer: index of the layer.
        parameters: the digital parameters; "mixed" learns `pool.<layer>.beta`.
    """
    if method == "mixed":
        return MixedPooling(parameters[f"pool.{layer}.beta"])
    poolings: dict[str, type[Pooling]] = {
        "max": MaxPooling,
        "average": AveragePooling,
        "stochastic": StochasticPooling,
    }
    return poolings[method]()


def _padded_side(side: int) -> int:
    """Return the side of planes that the windows cover, over the edge included."""
    return max(side, POOL_STRIDE * (pooled_side(side) - 1) + POOL_SIDE)


def _places(padded: Tensor) -> list[Tensor]:
    """Return, for each of the 9 places in a window, row by row, a view of what all windows have there."""
    last = padded.shape[1] - POOL_SIDE + 1
    every = [slice(first, first + last, POOL_STRIDE) for first in range(POOL_SIDE)]
    return [padded[:, y, x] for y in every for x in every]


def _windows(planes: Tensor) -> list[Tensor]:
    """Return the same of planes; beyond the edge there are zeros."""
    beyond = _padded_side(planes.shape[1]) - planes.shape[1]
    return _places(F.pad(planes, (0, 0, 0, beyond, 0, beyond)))


def _spread(pieces: list[Tensor], shape: torch.Size) -> Tensor:
    """Add up what goes back to each of the 9 places of all windows: the transpose of `_windows`."""
    images, side, _, channels = shape
    padded = pieces[0].new_zeros(images, _padded_side(side), _padded_side(side), channels)
    for place, piece in zip(_places(padded), pieces, strict=True):
        place.add_(piece)
    return padded[:, :side, :side]
