"""The untiled network as an ordinary PyTorch module: what a tiled one is reduced to."""

from typing import Any

import torch
from torch import Tensor, nn

from rapa_dist.machine import KERNEL_SIDE, POOL_SIDE, POOL_STRIDE
from rapa_dist.network.normalisation import ALPHA, BETA, SIZE
from rapa_dist.network.pooling import MIXTURE_SLOPE, relu_first


class UntiledNetwork(nn.Module):
    """Caffe's "Full" CIFAR-10 network: takes (images, 3, 32, 32), less the training set's mean, and returns scores.

    Its state dict has conv1, conv2, … and fc, each with weight and bias in PyTorch's layout, and where pooling is
    "mixed" pool1.beta and pool2.beta.
    """

    def __init__(self, channels: tuple[int, ...], features: int, classes: int, pooling: str) -> None:
        """Make it with any weights.

        Args:
            channels: c_out of every layer.
            features: inputs of the fully connected layer.
            classes: scores.
            pooling: method of all layers but the last, which averages.
        """
        super().__init__()
        self.n_layers = len(channels)
        c_in = 3
        for number, c_out in enumerate(channels, 1):
            self.add_module(f"conv{number}", nn.Conv2d(c_in, c_out, KERNEL_SIDE, padding=KERNEL_SIDE // 2))
            method = pooling if number < len(channels) else "average"
            self.add_module(f"pool{number}", _Pool(method, c_out, relu_first=relu_first(method, number - 1)))
            c_in = c_out
        self.fc = nn.Linear(features, classes)

    def forward(self, planes: Tensor) -> Tensor:
        """Return scores (images, classes) of planes (images, 3, 32, 32)."""
        for number in range(1, self.n_layers + 1):
            convolution, pool = self.get_submodule(f"conv{number}"), self.get_submodule(f"pool{number}")
            planes = pool(convolution(planes))
            scale = 1 + ALPHA * nn.functional.avg_pool2d(planes * planes, SIZE, 1, SIZE // 2)
            planes = planes * scale**-BETA
        scores: Tensor = self.fc(planes.flatten(1))
        return scores


class _Pool(nn.Module):
    """ReLU, and pooling 3×3 with stride 2 as in a test."""

    def __init__(self, method: str, channels: int, *, relu_first: bool) -> None:
        super().__init__()
        self.method, self.relu_first = method, relu_first
        if method == "mixed":
            self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, planes: Tensor) -> Tensor:
        return self._pool(planes.relu()) if self.relu_first else self._pool(planes).relu()

    def _pool(self, planes: Tensor) -> Tensor:
        window: Any = {"kernel_size": POOL_SIDE, "stride": POOL_STRIDE, "ceil_mode": True}
        largest: Tensor = nn.functional.max_pool2d(planes, **window)
        if self.method == "max":
            return largest
        mean: Tensor = nn.functional.avg_pool2d(planes, **window)
        if self.method == "average":
            return mean
        if self.method == "mixed":
            alpha = torch.sigmoid(-MIXTURE_SLOPE * self.beta)[:, None, None]
            return largest + alpha * (mean - largest)
        squares: Tensor = nn.functional.avg_pool2d(planes * planes, **window)
        return torch.where(mean > 0, squares / mean, 0)  # stochastic: Σ a² / Σ a
