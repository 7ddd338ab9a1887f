"""The regulariser of the theory: ⟨L⟩ = L(θ̄) + R to rounding, R ≥ 0, and what it is estimated by."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapa_dist.analysis import regularizer as theory
from rapa_dist.data import ImageSet

any_parameters = settings(max_examples=60, deadline=None)


def some_data(n=7, d=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.integers(0, 2, n).astype(float)


def likelihood(x, y, theta):
    """−Σ log p(y | x, θ), p(1) = 1 / (1 + e⁻ᶻ) and p(0) = 1 / (1 + eᶻ)."""
    z = x @ theta
    return np.sum(np.log1p(np.exp(np.where(y == 1, -z, z))))


@st.composite
def problems(draw):
    n_tiles, d, n = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([1e-3, 0.3, 3.0]))
    return rng.normal(size=(n, d)), rng.integers(0, 2, n).astype(float), rng.normal(scale=scale, size=(n_tiles, d))


def test_the_loss_is_the_negative_log_likelihood():
    x, y = some_data()
    theta = np.array([0.5, -2.0, 1.0])
    assert theory.loss(x, y, theta) == pytest.approx(likelihood(x, y, theta), rel=1e-12)


@any_parameters
@given(problems())
def test_the_mean_loss_over_all_choices_is_the_loss_of_the_mean_plus_the_regularizer(problem):
    """The whole loss, by a loop over all ways to choose a tile for every parameter."""
    x, y, tiles = problem
    n_tiles, d = tiles.shape
    all_losses = [
        likelihood(x, y, np.array([tiles[tile, place] for place, tile in enumerate(choice)]))
        for choice in product(range(n_tiles), repeat=d)
    ]
    assert theory.choices(tiles) == len(all_losses)
    expected = np.mean(all_losses)
    decomposed = theory.loss(x, y, tiles.mean(axis=0)) + theory.regularizer(x, tiles)
    assert decomposed == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert theory.mean_loss(x, y, tiles) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@any_parameters
@given(problems())
def test_the_regularizer_is_never_below_0(problem):
    x, _, tiles = problem
    assert theory.regularizer(x, tiles) >= -1e-12


def test_the_regularizer_of_tiles_that_agree_is_0():
    x, _ = some_data()
    assert theory.regularizer(x, np.tile([0.3, -1.0, 2.0], (4, 1))) == pytest.approx(0, abs=1e-13)


def test_sampling_estimates_the_regularizer_within_its_standard_error():
    x, _ = some_data()
    tiles = np.random.default_rng(3).normal(size=(3, 3))
    exact = theory.regularizer(x, tiles)
    deviations = []
    for seed in range(40):
        estimate, error = theory.sampled_regularizer(x, tiles, 4000, np.random.default_rng(seed))
        deviations.append((estimate - exact) / error)
    assert max(map(abs, deviations)) < 5
    assert 0.7 < np.std(deviations) < 1.4, "the standard error is one"
    assert abs(np.mean(deviations)) < 0.8


def test_the_taylor_form_is_of_second_order():
    """What it leaves out falls faster than the second power of the spread."""
    x, _ = some_data(n=20)
    rng = np.random.default_rng(4)
    centre, spread = rng.normal(size=3), rng.normal(size=(3, 3))
    errors = []
    for scale in (0.4, 0.1, 0.025):
        tiles = centre + scale * spread
        errors.append(abs(theory.taylor(x, tiles) / theory.regularizer(x, tiles) - 1))
    assert errors[0] < 0.2
    assert errors[2] < 0.1 * errors[0]
    assert errors[2] < 0.002


def test_along_training_the_tiles_come_together():
    result = theory.along_training(n_tiles=3, side=2, epochs=5, images=200)
    assert result["epochs"] == list(range(6))
    assert result["choices"] == 3**5
    total = np.array(result["loss_of_mean"]) + result["regularizer"]
    np.testing.assert_allclose(result["loss"], total, rtol=1e-12)
    assert min(result["regularizer"]) >= 0
    assert result["regularizer"][-1] < 0.2 * result["regularizer"][0]
    assert result == theory.along_training(n_tiles=3, side=2, epochs=5, images=200)
    sampled = theory.along_training(n_tiles=3, side=2, epochs=5, images=200, samples=4000)
    for estimate, error, exact in zip(
        sampled["regularizer"], sampled["regularizer_standard_error"], result["regularizer"], strict=True
    ):
        assert abs(estimate - exact) < 5 * error


def test_images_sorted_by_class_are_drawn_from_both():
    images = ImageSet(images=np.zeros((90, 32, 32, 3), np.uint8), labels=np.repeat(np.arange(3), 30))
    images.images[:, 0, 0] = np.arange(90)[:, None]
    sample = theory.two_classes(images, 2, 20)
    assert len(sample.y) == 20
    assert 5 < sample.y.sum() < 15
    assert len(np.unique(sample.x[:, 0])) == 20, "each once"
    assert sample.x[sample.y == 0, 0].max() < sample.x[sample.y == 1, 0].min(), "an image keeps its label"
    assert np.array_equal(theory.two_classes(images, 2, 100).y, np.repeat([0.0, 1.0], 30))
