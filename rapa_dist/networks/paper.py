"""Caffe's "Full" CIFAR-10 network, which the paper trains (§3)."""

from collections.abc import Sequence

import torch
from torch import nn

from rapa_dist.errors import UsageError
from rapa_dist.initial import initial_head
from rapa_dist.machine import pooled
from rapa_dist.nn.stage import Stage

CHANNELS = (32, 32, 64)


class PaperNetwork(nn.Sequential):
    """5 × 5 convolutions, each followed by pooling, ReLU and normalisation, then a fully connected layer.

    Scores (images, classes) of images (images, channels, h, w).
    """

    def __init__(
        self,
        classes: int,
        image: tuple[int, int, int],
        *,
        channels: Sequence[int] = CHANNELS,
        pooling: str = "max",
        seed: int | None = None,
    ) -> None:
        """Build it.

        Args:
            classes: outputs.
            image: channels, h and w of an image.
            channels: c_out of every convolution.
            pooling: method of all layers but the last, which averages; one of `POOLINGS`.
            seed: of the fully connected layer, drawn like a kernel; None: as PyTorch draws it.

        Raises:
            UsageError: pooling leaves no pixels for so many layers.
        """
        super().__init__()
        c_in, h, w = image
        self.depth = len(channels)
        for index, c_out in enumerate(channels):
            if min(h, w) < 2 and index:
                raise UsageError(
                    f"--channels has {len(channels)} layers, but pooling leaves no pixels after {index}. "
                    f"Use at most {index}."
                )
            method = pooling if index < self.depth - 1 else "average"
            self.add_module(f"conv{index}", nn.Conv2d(c_in, c_out, 5, padding=2))
            self.add_module(f"stage{index}", Stage(method, index, c_out))
            c_in, h, w = c_out, pooled(h), pooled(w)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(c_in * h * w, classes)
        if seed is not None:
            with torch.no_grad():
                self.head.weight.copy_(torch.from_numpy(initial_head(classes, c_in * h * w, seed, self.depth)))
                self.head.bias.zero_()
