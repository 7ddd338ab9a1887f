"""Similarity of filters, against NumPy's own correlation coefficients, pair by pair."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest

from rapa_dist.analysis.learnt import decay_leaves
from rapa_dist.config import resolve
from rapa_dist.coordinator.checkpoint import Progress
from rapa_dist.machine import TileArray
from rapa_dist.similarity import channel_similarity, project_on_start, similarities, similarity

SETTINGS = {
    "tiles": (4, 2, 1),
    "pooling": "max",
    "dataset": None,
    "limit_train": None,
    "limit_test": None,
    "epochs": 9,
    "batch_size": 10,
    "lr_decay_every": 2,
    "warmup_epochs": 1,
    "weight_decay": 0.1,
    "augment": False,
    "seed": 0,
}


@pytest.mark.parametrize("shape", [(2, 76, 32), (4, 11, 3), (7, 6, 1)])
def test_similarity_is_the_mean_correlation_of_all_pairs(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    filters = (rng.normal(size=shape) + rng.normal(size=shape[1:])).astype(np.float32)
    expected = [
        np.mean([np.corrcoef(filters[i, :, c], filters[j, :, c])[0, 1] for i, j in combinations(range(shape[0]), 2)])
        for c in range(shape[2])
    ]
    np.testing.assert_allclose(channel_similarity(filters), expected, atol=1e-6)
    assert similarity(filters) == pytest.approx(np.mean(expected), abs=1e-6)


def test_similarity_of_equal_and_opposite_filters() -> None:
    kernel = np.random.default_rng(1).normal(size=(1, 76, 32)).astype(np.float32)
    assert similarity(np.repeat(kernel, 3, axis=0)) == pytest.approx(1)
    assert similarity(np.concatenate((kernel, -2 * kernel))) == pytest.approx(-1)


def test_similarity_takes_two_tiles() -> None:
    filters = np.full((2, 4, 1), 5, np.float32)
    assert similarity(filters[:1]) is None
    assert similarity(filters) == 0, "constant filters correlate with none"


def test_filters_are_kernels_without_their_biases() -> None:
    array = TileArray(index=0, name="conv", k=3, c_out=1, n_tiles=2)
    kernels = np.arange(8, dtype=np.float32).reshape(2, 4, 1)
    np.testing.assert_array_equal(array.filters(kernels)[..., 0], [[0, 1, 2], [4, 5, 6]])
    without = dataclasses.replace(array, bias=False)
    assert without.filters(kernels[:, :3]).shape == (2, 3, 1)


def test_what_is_along_the_start_is_told_apart_from_the_rest() -> None:
    rng = np.random.default_rng(2)
    start = rng.normal(size=(16, 76, 32)).astype(np.float32)
    learnt = rng.normal(size=(1, 76, 32)).astype(np.float32)
    left = project_on_start(0.6 * start + learnt, start)
    assert left is not None
    assert left.share == pytest.approx(0.6)
    assert left.similarity == pytest.approx(1), "all tiles have learnt the same"
    assert similarity(0.6 * start + learnt) < 0.8
    each = rng.normal(size=start.shape).astype(np.float32)
    left = project_on_start(0.6 * start + each, start)
    assert left is not None
    assert left.share == pytest.approx(0.6, abs=0.02)
    assert abs(left.similarity) < 0.01, "every tile has learnt something of its own"


def test_the_share_of_the_start_is_that_of_least_squares() -> None:
    rng = np.random.default_rng(3)
    filters, start = rng.normal(size=(2, 4, 11, 3)).astype(np.float32)
    # unknowns: the share, and what is common to the tiles for each of the weights
    weights = start.reshape(4, -1)
    columns = np.column_stack((weights.ravel(), np.tile(np.eye(weights.shape[1]), (4, 1))))
    solution, *_ = np.linalg.lstsq(columns, filters.ravel().astype(np.float64), rcond=None)
    left = project_on_start(filters, start)
    assert left is not None
    assert left.share == pytest.approx(solution[0])
    rest = filters - np.float32(solution[0]) * start
    assert left.similarity == pytest.approx(similarity(rest), abs=1e-6)


def test_before_training_all_is_along_the_start_and_nothing_is_learnt() -> None:
    start = np.random.default_rng(4).normal(size=(4, 26, 5)).astype(np.float32)
    assert project_on_start(start, start) == (1, 0)
    assert project_on_start(start[:1], start[:1]) is None
    assert similarities([start, start[:1]], [start, start[:1]], [0.5, 0.5]) == {
        "similarity": [similarity(start), None],
        "start_projection": [1, None],
        "decay_leaves": [0.5, None],
        "similarity_of_rest": [0, None],
    }


def test_what_is_learnt_along_the_start_counts_in_and_decay_is_told_apart() -> None:
    """Half of the start is left by decay, and as much again is learnt along it: the projection is 1."""
    start = np.random.default_rng(4).normal(size=(4, 26, 5)).astype(np.float32)
    found = similarities([0.5 * start + 0.5 * start], [start], [0.5])
    assert (found["start_projection"], found["decay_leaves"]) == ([1], [0.5])


@pytest.mark.parametrize(("epoch", "step_in_epoch"), [(0, 0), (0, 4), (3, 0), (7, 5)])
def test_what_decay_leaves_is_what_steps_without_errors_leave(epoch, step_in_epoch) -> None:
    config = resolve(**SETTINGS)
    progress = Progress(epoch=epoch, step=epoch * 6 + step_in_epoch, step_in_epoch=step_in_epoch)
    weight = 1.0
    for step in range(progress.step):
        weight *= float(np.float32(1 - config.learning_rate(step // 6) * 0.1))
    assert decay_leaves(config, progress) == pytest.approx(weight, rel=1e-12)
    assert (weight < 0.97) == (epoch > 1)
