"""Reduction (§4): one kernel matrix per layer, put together from the filters of its tiles, as an ordinary network."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rapa_dist.analysis.wins import count_wins
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
            training images, in layers that a max pooling follows; in others the one with the largest norm.
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
    arrays = machine_of(trained.config).arrays
    winners = [strongest(array.filters(of_layer)) for array, of_layer in zip(arrays, kernels, strict=True)]
    how = dict.fromkeys((array.name for array in arrays), "norm")
    if by == "wins":
        images = min(limit_train or _TRAINING_IMAGES, len(trained.data.train.labels))
        for array, wins in zip(arrays, count_wins(trained, images), strict=True):
            if wins is not None:
                winners[array.index], how[array.name] = wins.argmax(axis=0), "wins"
        if not any(how[array.name] == "wins" for array in arrays if array.n_tiles > 1):
            raise UsageError("Nothing can be won: no layer on several tiles is followed by max pooling. Use --by norm.")
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
        "by_layer": how,
        "training_images": images,
        "tiles_used": used,
        "tiled_test_error_percent": score.error_percent,
        "test_error_percent": error_of_untiled(network, trained),
        "output": None if output is None else str(output),
    }


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
