"""Rows in another order, in C and in NumPy: held against torch, and told apart from what does not fit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import rapa_dist.native.rows as native_rows
from rapa_dist.native import native, use_threads

WAYS = [
    pytest.param("c", marks=pytest.mark.skipif(native().library is None, reason=str(native()))),
    "numpy",
]


@pytest.fixture(params=WAYS, scope="module")
def pick_rows(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(native_rows, "_pick", lambda: None)
        yield native_rows.pick_rows


def picked_by(pick_rows, rows, which):
    picked = np.full((len(which), rows.shape[1]), np.nan, np.float32)
    pick_rows(rows, which, picked)
    return picked


@settings(deadline=None, max_examples=60)
@given(n=st.integers(0, 3000), count=st.integers(0, 3000), width=st.integers(1, 70), threads=st.integers(1, 3))
def test_they_are_those_that_torch_selects_and_zeros_where_there_is_none(pick_rows, n, count, width, threads):
    rng = np.random.default_rng(n + 5 * count)
    rows, which = rng.normal(size=(n, width)).astype(np.float32), rng.integers(0, n + 1, count)
    padded = torch.cat((torch.from_numpy(rows), torch.zeros(1, width)))
    use_threads(threads)
    try:
        found = picked_by(pick_rows, rows, which)
    finally:
        use_threads(1)
    assert_array_equal(found, padded[torch.from_numpy(which)].numpy())


@pytest.mark.parametrize(
    ("rows", "which", "picked"),
    [
        (np.zeros((4, 6), np.float64), np.arange(3), np.zeros((3, 6), np.float32)),
        (np.zeros((4, 6), np.float32)[:, ::2], np.arange(3), np.zeros((3, 3), np.float32)),
        (np.zeros((4, 6), np.float32), np.arange(3), np.zeros((2, 6), np.float32)),
        (np.zeros((4, 6), np.float32), np.arange(3, dtype=np.int32), np.zeros((3, 6), np.float32)),
        (np.zeros((4, 6), np.float32), np.arange(6)[::2], np.zeros((3, 6), np.float32)),
    ],
)
def test_memory_that_is_laid_out_otherwise_is_refused(pick_rows, rows, which, picked):
    with pytest.raises(ValueError, match="expected"):
        pick_rows(rows, which, picked)
