"""The theory's regulariser (§5): a logistic regression whose every parameter is read from a tile drawn at random.

With n_t replicas of each of d parameters, and s_l drawn independently for every parameter and access,

    ⟨L(θˢ)⟩ = L(θ̄) + R,    R = Σ_i (⟨A(x_i · θˢ)⟩ − A(x_i · θ̄)),    A(z) = −log(1 − σ(z)),

where θ̄ is the mean over tiles. A is convex, so R is never below 0, and it is 0 where all tiles agree: training
under random assignment draws them together. To second order R ≈ ½ Σ_i p_i (1 − p_i) Σ_l x_il² Var_s(θ_l). Pure NumPy.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rapa_dist.console import work
from rapa_dist.data import ImageSet, load_dataset
from rapa_dist.errors import UsageError
from rapa_dist.streams import Purpose, stream

Array = NDArray[np.float64]

MOST_CHOICES = 2**20
"""Choices n_t^d that are enumerated at most."""
_IN_TRAINING = 2**16
_START_SCALE = 1.0


def log_partition(z: Array) -> Array:
    """Return A(z) = −log(1 − σ(z)) = log(1 + eᶻ)."""
    return np.logaddexp(0, z)


def loss(x: Array, y: Array, theta: Array) -> float:
    """Return L(θ) = −Σ_i log p(y_i | x_i, θ), the sum over samples.

    Args:
        x: (n, d) inputs.
        y: (n,) 0 or 1.
        theta: (d,).
    """
    z = x @ theta
    return float(np.sum(log_partition(z) - y * z))


def choices(tiles: Array) -> int:
    """Return n_t^d, the number of parameter vectors that can be drawn from tiles (n_t, d)."""
    n_tiles, d = tiles.shape
    return int(n_tiles**d)


def every_product(x: Array, tiles: Array) -> Array:
    """Return x · θˢ for every choice s, (n_t^d,).

    Args:
        x: (d,) one input.
        tiles: (n_t, d).

    Raises:
        UsageError: there are too many choices to enumerate.
    """
    if choices(tiles) > MOST_CHOICES:
        n_tiles, d = tiles.shape
        raise UsageError(
            f"{n_tiles} tiles of {d} parameters can be combined in {n_tiles}^{d} ways; up to {MOST_CHOICES:,} are "
            "enumerated. Use fewer --tiles, a smaller --side, or --samples 10000."
        )
    products = np.zeros(1)
    for weight, replicas in zip(x, tiles.T, strict=True):
        products = np.add.outer(products, weight * replicas).ravel()
    return products


def mean_loss(x: Array, y: Array, tiles: Array) -> float:
    """Return ⟨L(θˢ)⟩ exactly, by enumerating all choices for every sample.

    Args:
        x: (n, d).
        y: (n,) 0 or 1.
        tiles: (n_t, d).

    Raises:
        UsageError: there are too many choices to enumerate.
    """
    total = 0.0
    for inputs, label in zip(x, y, strict=True):
        z = every_product(inputs, tiles)
        total += float(np.mean(log_partition(z) - label * z))
    return total


def regularizer(x: Array, tiles: Array) -> float:
    """Return R exactly, by enumerating all choices for every sample; see `mean_loss`."""
    excess = 0.0
    for inputs in x:
        z = every_product(inputs, tiles)
        excess += float(np.mean(log_partition(z)) - log_partition(inputs @ tiles.mean(axis=0)))
    return excess


def sampled_regularizer(x: Array, tiles: Array, samples: int, rng: np.random.Generator) -> tuple[float, float]:
    """Estimate R from random choices; return the estimate and its standard error.

    Args:
        x: (n, d).
        tiles: (n_t, d).
        samples: choices to draw, at least 2; one choice serves all inputs.
        rng: draws them.
    """
    n_tiles, d = tiles.shape
    drawn = tiles[rng.integers(n_tiles, size=(samples, d)), np.arange(d)]  # (samples, d)
    excess = np.sum(log_partition(drawn @ x.T) - log_partition(x @ tiles.mean(axis=0)), axis=1)
    return float(excess.mean()), float(excess.std(ddof=1) / np.sqrt(samples))


def taylor(x: Array, tiles: Array) -> float:
    """Return R to second order, ½ Σ_i p_i (1 − p_i) Σ_l x_il² Var_s(θ_l)."""
    p = 1 / (1 + np.exp(-(x @ tiles.mean(axis=0))))
    return float(0.5 * np.sum(p * (1 - p) * (x**2 @ tiles.var(axis=0))))


@dataclass(frozen=True, slots=True)
class Sample:
    """Two classes of a data set as inputs of a logistic regression."""

    x: Array
    """(n, d), the last column 1."""
    y: Array
    """(n,) 0 or 1."""


def two_classes(images: ImageSet, side: int, most: int) -> Sample:
    """Return the first two classes of some images, grey and averaged down to side × side pixels.

    Args:
        images: (n, 32, 32, 3), labelled.
        side: 1, 2, 4, 8, 16 or 32; features beside the constant are side².
        most: images to use at most, drawn from those of both classes in the same way every time.
    """
    chosen = images.take(np.flatnonzero(images.labels < 2)).sample(most)
    grey = chosen.images.mean(axis=3) / 255
    block = grey.shape[1] // side
    pixels = grey.reshape(len(chosen), side, block, side, block).mean(axis=(2, 4)).reshape(len(chosen), -1)
    scaled = (pixels - pixels.mean(axis=0)) / np.maximum(pixels.std(axis=0), 1e-9)
    return Sample(np.column_stack((scaled, np.ones(len(chosen)))), chosen.labels.astype(np.float64))


def along_training(
    *,
    n_tiles: int = 3,
    side: int = 2,
    epochs: int = 20,
    images: int = 500,
    learning_rate: float = 0.02,
    samples: int | None = None,
    seed: int = 0,
    dataset: str | None = "builtin",
    data_dir: Path | None = None,
) -> dict[str, Any]:
    """Train a tiled logistic regression and return ⟨L⟩, L(θ̄) and R after every epoch, the start first.

    It tells the first class of a data set from the second. Every sample of every epoch draws the tile of every
    parameter, and updates those alone, by plain SGD.

    Args:
        n_tiles: n_t.
        side: images are averaged down to side × side pixels, the features.
        epochs: passes over the images.
        images: images to use at most.
        learning_rate: λ, constant.
        samples: estimate R from so many choices; None: enumerate all.
        seed: of what is drawn.
        dataset: where the images are from.
        data_dir: where data sets are.

    Raises:
        RapaError: with the cause, and what to do.
    """
    for option, number in (("--tiles", n_tiles), ("--epochs", epochs), ("--images", images)):
        if number < 1:
            raise UsageError(f"{option} needs at least 1; it is {number}.")
    if side not in (1, 2, 4, 8, 16, 32):
        raise UsageError(f"--side needs 1, 2, 4, 8, 16 or 32, so that it divides 32 pixels; it is {side}.")
    if samples is not None and samples < 2:
        raise UsageError(f"--samples needs at least 2; it is {samples}.")
    if seed < 0:
        raise UsageError(f"--seed needs at least 0; it is {seed}.")
    if not 0 < learning_rate < np.inf:
        raise UsageError(f"--lr needs a number above 0, like 0.02; it is {learning_rate}.")
    d = side * side + 1
    if samples is None and n_tiles**d > _IN_TRAINING:
        raise UsageError(
            f"{n_tiles} tiles of {d} parameters can be combined in {n_tiles}^{d} ways; after every epoch up to "
            f"{_IN_TRAINING:,} are enumerated. Use fewer --tiles, a smaller --side, or --samples 10000."
        )
    data = load_dataset(dataset, data_dir=data_dir, limit_train=None, limit_test=None)
    sample = two_classes(data.train, side, images)
    tiles = stream(seed, Purpose.INIT, 0).normal(scale=_START_SCALE, size=(n_tiles, d))
    rows: dict[str, list[Any]] = {name: [] for name in ("epochs", "loss", "loss_of_mean", "regularizer", "taylor")}
    errors: list[float] = []
    with work("Training", "epochs") as advance:
        for epoch in range(epochs + 1):
            if epoch > 0:
                _train_epoch(sample, tiles, learning_rate, stream(seed, Purpose.ASSIGN_TRAIN, 0, epoch))
            of_mean = loss(sample.x, sample.y, tiles.mean(axis=0))
            if samples is None:
                excess = regularizer(sample.x, tiles)
            else:
                rng = stream(seed, Purpose.ASSIGN_TEST, 0, epoch, 0, 0)
                excess, error = sampled_regularizer(sample.x, tiles, samples, rng)
                errors.append(error)
            for name, value in zip(
                rows, (epoch, of_mean + excess, of_mean, excess, taylor(sample.x, tiles)), strict=True
            ):
                rows[name].append(value)
            advance(epoch, epochs)
    return rows | {
        "regularizer_standard_error": errors or None,
        "n_tiles": n_tiles,
        "parameters": d,
        "choices": n_tiles**d,
        "samples": samples,
        "dataset": data.name,
        "images": len(sample.y),
        "learning_rate": learning_rate,
        "seed": seed,
    }


def _train_epoch(sample: Sample, tiles: Array, learning_rate: float, rng: np.random.Generator) -> None:
    """Take one step of SGD for every sample, in a new order, with a tile drawn for every parameter."""
    n_tiles, d = tiles.shape
    parameter = np.arange(d)
    for index in rng.permutation(len(sample.y)):
        drawn = rng.integers(n_tiles, size=d)
        x = sample.x[index]
        p = 1 / (1 + np.exp(-(x @ tiles[drawn, parameter])))
        tiles[drawn, parameter] -= learning_rate * (p - sample.y[index]) * x
