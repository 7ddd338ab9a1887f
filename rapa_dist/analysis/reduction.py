"""Reduction (§4): one kernel matrix per layer, put together from the filters of its tiles, as an ordinary network."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rapa_dist.console import work
from rapa_dist.coordinator.evaluation import as_images, evaluate
from rapa_dist.coordinator.learner import build, load_digital
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.run_images import WHERE_THEY_WERE, Where
from rapa_dist.coordinator.trained import Trained
from rapa_dist.data import evaluation_batches
from rapa_dist.errors import UsageError
from rapa_dist.files import check_target, write_whole
from rapa_dist.layout import machine_of
from rapa_dist.nn.convert import digital
from rapa_dist.nn.minibatch import MiniBatch, Part, at_work
from rapa_dist.nn.pooling import POOL_SIDE, POOL_STRIDE
from rapa_dist.nn.record import Recording
from rapa_dist.tile import Matrix

METHODS = ("norm", "wins")
"""How the tile that a filter is taken from is chosen."""
_TRAINING_IMAGES = 2000


def strongest(filters: Matrix) -> NDArray[np.int64]:
    """Return (c_out,): per output channel the tile whose filter has the largest norm, given filters (n_t, k, c_out)."""
    return np.asarray(np.linalg.norm(filters, axis=1).argmax(axis=0))


def reduce_kernels(kernels: Matrix, tile_of_channel: NDArray[np.int64]) -> Matrix:
    """Return (k + 1, c_out): of every output channel filter and bias of the tile (c_out,) that is given for it."""
    return np.stack([kernels[tile, :, channel] for channel, tile in enumerate(tile_of_channel)], axis=1)


def reduce_run(
    path: Path,
    *,
    by: str = "norm",
    checkpoint: str = "newest",
    output: Path | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    where: Where = WHERE_THEY_WERE,
) -> dict[str, Any]:
    """Reduce a run's network to one kernel matrix per layer and test it as an ordinary PyTorch network.

    Args:
        path: the run's directory.
        by: "norm", the filter with the largest norm; "wins", the one that most often wins the max pooling over
            training images.
        checkpoint: "newest", "best" or a name.
        output: where to save the state dict of the `PaperNetwork`; None: nowhere.
        limit_train: training images for "wins"; None: 2,000, or all if there are fewer.
        limit_test: test images to use; None: as the run did.
        where: where the run's images are.

    Raises:
        RapaError: with the cause, and what to do.
    """
    if by not in METHODS:
        raise UsageError(f"--by is norm or wins; not “{by}”.")
    if limit_train is not None and limit_train < 1:
        raise UsageError(f"--limit-train needs at least 1; it is {limit_train}.")
    check_target("--output", output)
    if not RunDirectory(path).config.tiled:
        raise UsageError(f"The run in {path} has one kernel matrix per layer already. Give a tiled run.")
    trained = Trained.open(path, checkpoint=checkpoint, where=where, limit_test=limit_test)
    kernels = trained.checkpoint.kernels
    images = 0
    if by == "norm":
        arrays = machine_of(trained.config).arrays
        winners = [strongest(array.filters(of_layer)) for array, of_layer in zip(arrays, kernels, strict=True)]
    else:
        images = min(limit_train or _TRAINING_IMAGES, len(trained.data.train.labels))
        winners = [wins.argmax(axis=0) for wins in count_wins(trained, images)]
    network = untiled(trained, [reduce_kernels(*pair) for pair in zip(kernels, winners, strict=True)])
    if output is not None:
        save(network, output)
    with trained.network() as tiled, work("Testing the tiled network", "images") as advance:
        score = evaluate(
            tiled,
            trained.data.test,
            trained.mean,
            batch_size=trained.test_images,
            step=trained.step,
            advance=advance,
        )
    assert score is not None
    used = [len(np.unique(of_layer)) for of_layer in winners]
    return trained.about() | {
        "by": by,
        "training_images": images,
        "tiles_used": used,
        "tiled_test_error_percent": score.error_percent,
        "test_error_percent": error_of_untiled(network, trained),
        "output": None if output is None else str(output),
    }


def count_wins(trained: Trained, images: int) -> list[NDArray[np.int64]]:
    """Count over training images whose activation is the largest, above 0, of a pooling window.

    Args:
        trained: the network.
        images: how many training images, drawn from all in the same way every time.

    Returns:
        Per layer (n_t, c_out). A layer whose pooling is no max pooling has windows all the same.
    """
    arrays = machine_of(trained.config).arrays
    wins = [np.zeros((array.n_tiles, array.c_out), np.int64) for array in arrays]
    subset = trained.data.train.sample(images)
    size = trained.test_images
    first = 0
    with trained.network() as network, work("Counting wins", "images") as advance:
        session = network.session
        for pixels, labels in evaluation_batches(subset, trained.mean, size):
            batch = MiniBatch(True, (trained.step + first // size,), (len(labels),), session.seed)
            with torch.no_grad(), at_work(Part(batch, 0)), outputs_of(network.recording) as outputs:
                network.model.eval()
                network.model(as_images(pixels))
            for array, of_array in zip(arrays, outputs, strict=True):
                assignment = session.assignment(array, array.passages[0], batch, 0, 0)
                tile_of_patch = np.full(assignment.n_patches, -1)
                tile_of_patch[assignment.order] = np.repeat(np.arange(array.n_tiles), np.diff(assignment.offsets))
                wins[array.index] += _wins(of_array, tile_of_patch, array.n_tiles)
            first += len(labels)
            advance(first, images)
    return wins


@contextmanager
def outputs_of(recording: Recording) -> Iterator[list[Tensor]]:
    """Collect what the layers on tiles return while a model is called, by tile array."""
    outputs: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda layer, arguments, output: outputs.append(output))
        for layer in recording.layers
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _wins(outputs: Tensor, tile_of_patch: NDArray[np.int64], n_tiles: int) -> NDArray[np.int64]:
    """Return (n_t, c_out) for outputs (images, c_out, h, w) and the tile of every pixel."""
    images, c_out, height, width = outputs.shape
    largest, places = F.max_pool2d(
        outputs, POOL_SIDE, POOL_STRIDE, ceil_mode=True, return_indices=True
    )  # (images, c_out, pooled h, pooled w)
    image = np.arange(images)[:, None, None, None]
    tile = tile_of_patch.reshape(images, height * width)[image, places.numpy()]
    channel = np.broadcast_to(np.arange(c_out)[None, :, None, None], tile.shape)
    won = (largest.numpy() > 0) & (tile >= 0)
    wins = np.zeros((n_tiles, c_out), np.int64)
    np.add.at(wins, (tile[won], channel[won]), 1)
    return wins


def untiled(trained: Trained, kernels: Sequence[Matrix]) -> nn.Module:
    """Return an ordinary network with the given kernels, one (k + 1, c_out) per layer, and the run's digital side."""
    network = build(trained.config)
    load_digital(network.model, trained.checkpoint.digital)
    for array, layer, kernel in zip(network.recording.machine.arrays, network.recording.layers, kernels, strict=True):
        network.model.set_submodule(array.name, digital(layer, torch.from_numpy(np.ascontiguousarray(kernel))))
    return network.model.eval()


def save(network: nn.Module, path: Path) -> None:
    """Save a network's state dict, for `torch.load(path, weights_only=True)`; the file is never half-written.

    Raises:
        UsageError: it can't be written.
    """
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    try:
        write_whole(path, buffer.getvalue())
    except OSError as error:
        raise UsageError(f"Can't write {path}: {error.strerror}. Give another --output.") from error


@torch.no_grad()
def error_of_untiled(network: nn.Module, trained: Trained) -> float:
    """Return the test error in percent of an ordinary network on the images of a run."""
    wrong, done, total = 0, 0, len(trained.data.test.labels)
    with work("Testing the reduced network", "images") as advance:
        for pixels, labels in evaluation_batches(trained.data.test, trained.mean, 100):
            scores = network(as_images(pixels))
            wrong += int((scores.argmax(dim=1) != torch.from_numpy(labels)).sum())
            done += len(labels)
            advance(done, total)
    return 100 * wrong / total
