"""Similarity of filters, against NumPy's own correlation coefficients, pair by pair."""

from itertools import combinations

import numpy as np
import pytest

from rapa_dist.analysis.similarity import channel_similarity, similarity


@pytest.mark.parametrize("shape", [(2, 76, 32), (4, 11, 3), (7, 6, 1)])
def test_similarity_is_the_mean_correlation_of_all_pairs(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    kernels = (rng.normal(size=shape) + rng.normal(size=shape[1:])).astype(np.float32)
    expected = [
        np.mean(
            [np.corrcoef(kernels[i, :-1, c], kernels[j, :-1, c])[0, 1] for i, j in combinations(range(shape[0]), 2)]
        )
        for c in range(shape[2])
    ]
    np.testing.assert_allclose(channel_similarity(kernels), expected, atol=1e-6)
    assert similarity(kernels) == pytest.approx(np.mean(expected), abs=1e-6)


def test_similarity_of_equal_and_opposite_filters() -> None:
    kernel = np.random.default_rng(1).normal(size=(1, 76, 32)).astype(np.float32)
    assert similarity(np.repeat(kernel, 3, axis=0)) == pytest.approx(1)
    assert similarity(np.concatenate((kernel, -2 * kernel))) == pytest.approx(-1)


def test_similarity_takes_two_tiles_and_leaves_the_bias_out() -> None:
    kernels = np.zeros((2, 4, 1), np.float32)
    assert similarity(kernels[:1]) is None
    kernels[:, -1] = 5
    assert similarity(kernels) == 0, "constant filters correlate with none"
