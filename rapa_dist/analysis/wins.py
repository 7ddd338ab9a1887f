"""Wins (§4): how often a tile's activation is the largest in a window of the max pooling that follows its layer."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rapa_dist.console import work
from rapa_dist.coordinator.evaluation import as_images
from rapa_dist.coordinator.trained import Trained
from rapa_dist.data import evaluation_batches
from rapa_dist.nn.layers import TiledLayer
from rapa_dist.nn.minibatch import MiniBatch, Part, at_work
from rapa_dist.nn.record import Recording

_aten: Any = torch.ops.aten
_POOLING = _aten.max_pool2d_with_indices.default
_MIXING = frozenset(
    {_aten.convolution.default, _aten.addmm.default, _aten.mm.default, _aten.bmm.default, _aten.baddbmm.default}
)


def count_wins(trained: Trained, images: int) -> list[NDArray[np.int64] | None]:
    """Count over training images whose activation is the largest, above 0, of a window of a max pooling.

    Args:
        trained: the network.
        images: how many training images, drawn from all in the same way every time.

    Returns:
        Per layer (n_t, c_out), or None where its outputs go into no max pooling: whatever lies in between may change
        values, but neither places nor channels, and not mix them by a convolution or product.
    """
    subset = trained.data.train.sample(images)
    size = trained.test_images
    first = 0
    with trained.network() as network, work("Counting wins", "images") as advance:
        session, arrays = network.session, network.recording.machine.arrays
        wins: list[NDArray[np.int64] | None] = [None] * len(arrays)
        network.model.eval()
        for pixels, labels in evaluation_batches(subset, trained.mean, size):
            batch = MiniBatch(True, (trained.step + first // size,), (len(labels),), session.seed)
            with torch.no_grad(), at_work(Part(batch, 0)), _poolings(network.recording) as poolings:
                network.model(as_images(pixels))
            for pooling in poolings:
                array = arrays[pooling.array]
                assignment = session.assignment(array, array.passages[pooling.call], batch, pooling.call, 0)
                tile_of_patch = np.full(assignment.n_patches, -1)
                tile_of_patch[assignment.order] = np.repeat(np.arange(array.n_tiles), np.diff(assignment.offsets))
                won = wins_of(pooling.largest, pooling.places, tile_of_patch, array.n_tiles)
                before = wins[array.index]
                wins[array.index] = won if before is None else before + won
            first += len(labels)
            advance(first, images)
    return wins


def wins_of(
    largest: NDArray[np.float32], places: NDArray[np.int64], tile_of_patch: NDArray[np.int64], n_tiles: int
) -> NDArray[np.int64]:
    """Return how often a tile won a channel's window, (n_t, c_out); a window without activation has no winner.

    Args:
        largest: (images, c_out, h, w) the largest value of every window.
        places: (images, c_out, h, w) the pixel that it comes from.
        tile_of_patch: (images · pixels,) the tile of every pixel; −1 for none.
        n_tiles: n_t.
    """
    images, c_out = largest.shape[:2]
    tile = tile_of_patch.reshape(images, -1)[np.arange(images)[:, None, None, None], places]
    channel = np.broadcast_to(np.arange(c_out)[None, :, None, None], tile.shape)
    won = (largest > 0) & (tile >= 0)
    wins = np.zeros((n_tiles, c_out), np.int64)
    np.add.at(wins, (tile[won], channel[won]), 1)
    return wins


@dataclass(frozen=True, slots=True)
class _Pooling:
    """A max pooling of what a tile array has put out."""

    array: int
    call: int
    """How often an image had passed through the array before."""
    largest: NDArray[np.float32]
    places: NDArray[np.int64]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees which operations follow a layer on tiles; however a model calls its max pooling, it comes by here."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[_Pooling] = []
        self._calls: Counter[int] = Counter()
        self._last: tuple[int, int, torch.Size] | None = None

    def left(self, layer: TiledLayer, output: Tensor) -> None:
        """Take note of what a layer has put out."""
        array = layer.array.index
        self._last = array, self._calls[array], output.shape
        self._calls[array] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _MIXING:
            self._last = None
        elif func is _POOLING and self._last is not None and args[0].shape == self._last[2]:
            largest, places = result
            self.found.append(_Pooling(*self._last[:2], largest.numpy(), places.numpy()))
            self._last = None
        return result


@contextmanager
def _poolings(recording: Recording) -> Iterator[list[_Pooling]]:
    """Collect the max poolings that follow layers on tiles while a model is called."""
    watch = _Watch()
    hooks = [
        layer.register_forward_hook(lambda layer, arguments, output: watch.left(layer, output))
        for layer in recording.layers
    ]
    try:
        with watch:
            yield watch.found
    finally:
        for hook in hooks:
            hook.remove()
