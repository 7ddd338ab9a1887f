"""Reduction (§4): one kernel matrix per layer, put together from the filters of its tiles, as an ordinary network."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from rapa_dist.analysis.untiled import UntiledNetwork
from rapa_dist.console import work
from rapa_dist.coordinator.evaluation import evaluate
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.run_images import WHERE_THEY_WERE, Where
from rapa_dist.coordinator.trained import Trained
from rapa_dist.data import evaluation_batches
from rapa_dist.errors import UsageError
from rapa_dist.files import check_target, write_whole
from rapa_dist.footprint import TEST_IMAGES
from rapa_dist.machine import KERNEL_SIDE, POOL_SIDE, POOL_STRIDE, pooled_side
from rapa_dist.tile import Matrix

METHODS = ("norm", "wins")
"""How the tile that a filter is taken from is chosen."""
_TRAINING_IMAGES = 2000


def strongest(kernels: Matrix) -> NDArray[np.int64]:
    """Return, per output channel, the tile whose filter has the largest norm, (c_out,).

    Args:
        kernels: (n_t, k + 1, c_out), bias last; it is not part of a filter.
    """
    return np.asarray(np.linalg.norm(kernels[:, :-1], axis=1).argmax(axis=0))


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
        output: where to save the state dict of `UntiledNetwork`; None: nowhere.
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
    if not RunDirectory(path).config.machine.tiled:
        raise UsageError(f"The run in {path} has one kernel matrix per layer already. Give a tiled run.")
    trained = Trained.open(path, checkpoint=checkpoint, where=where, limit_test=limit_test)
    kernels = trained.checkpoint.kernels
    images = 0
    if by == "norm":
        winners = [strongest(of_layer) for of_layer in kernels]
    else:
        images = min(limit_train or _TRAINING_IMAGES, len(trained.data.train.labels))
        winners = [wins.argmax(axis=0) for wins in count_wins(trained, images)]
    network = untiled(trained, [reduce_kernels(*pair) for pair in zip(kernels, winners, strict=True)])
    if output is not None:
        save(network, output)
    with trained.network() as tiled, work("Testing the tiled network", "images") as advance:
        score = evaluate(
            tiled,
            trained.assigner(),
            trained.data.test,
            trained.mean,
            step=trained.step,
            micro_batches=trained.config.micro_batches,
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
    machine = trained.config.machine
    wins = [np.zeros((layer.n_tiles, layer.c_out), np.int64) for layer in machine.layers]
    assigner = trained.assigner()
    subset = trained.data.train.sample(images)
    first = 0
    with trained.network() as network, work("Counting wins", "images") as advance:
        for pixels, labels in evaluation_batches(subset, trained.mean, TEST_IMAGES):
            assignments = assigner.for_training(trained.step + first // TEST_IMAGES, len(labels))
            planes = torch.from_numpy(pixels)
            with torch.no_grad():
                for layer, convolution, stage, assignment in zip(
                    machine.layers, network.convolutions, network.stages, assignments, strict=True
                ):
                    outputs = convolution.begin(planes, assignment).receive_outputs()
                    tile_of_patch = np.full(assignment.n_patches, -1)
                    tile_of_patch[assignment.order] = np.repeat(np.arange(layer.n_tiles), np.diff(assignment.offsets))
                    wins[layer.index] += _wins(outputs, tile_of_patch, layer.n_tiles)
                    planes, _ = stage.forward(outputs)
            first += len(labels)
            advance(first, images)
    return wins


def _wins(outputs: torch.Tensor, tile_of_patch: NDArray[np.int64], n_tiles: int) -> NDArray[np.int64]:
    """Return (n_t, c_out) for outputs (images, side, side, c_out) and the tile of every pixel."""
    images, side, _, c_out = outputs.shape
    largest, places = F.max_pool2d(
        outputs.permute(0, 3, 1, 2), POOL_SIDE, POOL_STRIDE, ceil_mode=True, return_indices=True
    )  # (images, c_out, pooled side, pooled side)
    assert largest.shape[2] == pooled_side(side)
    image = np.arange(images)[:, None, None, None]
    tile = tile_of_patch.reshape(images, side * side)[image, places.numpy()]
    channel = np.broadcast_to(np.arange(c_out)[None, :, None, None], tile.shape)
    won = (largest.numpy() > 0) & (tile >= 0)
    wins = np.zeros((n_tiles, c_out), np.int64)
    np.add.at(wins, (tile[won], channel[won]), 1)
    return wins


def untiled(trained: Trained, kernels: Sequence[Matrix]) -> UntiledNetwork:
    """Return an ordinary network with the given kernels, one (k + 1, c_out) per layer, and the run's digital side."""
    config, digital = trained.config, trained.checkpoint.digital
    machine = config.machine
    classes = len(trained.checkpoint.classes)
    network = UntiledNetwork(config.channels, machine.n_features, classes, config.pooling)
    state: dict[str, Matrix] = {}
    for layer, kernel in zip(machine.layers, kernels, strict=True):
        name = f"conv{layer.index + 1}"
        weight = kernel[:-1].reshape(KERNEL_SIDE, KERNEL_SIDE, layer.c_in, layer.c_out)
        state[f"{name}.weight"], state[f"{name}.bias"] = weight.transpose(3, 2, 0, 1), kernel[-1]
    last = machine.layers[-1]
    side = pooled_side(last.side)
    of_pixels = digital["head.weight"].reshape(side, side, last.c_out, classes).transpose(3, 2, 0, 1)
    state["fc.weight"], state["fc.bias"] = of_pixels.reshape(classes, -1), digital["head.bias"]
    for layer in machine.layers[:-1] if config.pooling == "mixed" else ():
        state[f"pool{layer.index + 1}.beta"] = digital[f"pool.{layer.index}.beta"]
    network.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()})
    return network


def save(network: UntiledNetwork, path: Path) -> None:
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
def error_of_untiled(network: UntiledNetwork, trained: Trained) -> float:
    """Return the test error in percent of an ordinary network on the images of a run."""
    wrong, done, total = 0, 0, len(trained.data.test.labels)
    with work("Testing the reduced network", "images") as advance:
        for pixels, labels in evaluation_batches(trained.data.test, trained.mean, 100):
            scores = network(torch.from_numpy(pixels).permute(0, 3, 1, 2))
            wrong += int((scores.argmax(dim=1) != torch.from_numpy(labels)).sum())
            done += len(labels)
            advance(done, total)
    return 100 * wrong / total
