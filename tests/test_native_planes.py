"""Planes to rows and back in C: bit by bit what torch does in the same order, and in double precision."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from torch.testing import assert_close

from rapa_dist.assignment import Assignment, assign_fixed, assign_perforated_in_parts, assign_random
from rapa_dist.fabric.im2col import Im2col, add_tree, seen_by
from rapa_dist.fabric.in_tile_order import in_tile_order
from rapa_dist.geometry import Geometry
from rapa_dist.native import native, use_threads
from rapa_dist.tile_maps import region_mask, tile_map

pytestmark = pytest.mark.skipif(native().library is None, reason=str(native()))

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
GEOMETRIES = st.builds(
    lambda size, kernel, stride, before, after, dilation: Geometry(
        size=size, kernel=kernel, stride=stride, before=before, after=after, dilation=dilation
    ),
    st.tuples(st.integers(7, 11), st.integers(7, 12)),
    pairs,
    pairs,
    st.tuples(st.integers(0, 4), st.integers(0, 4)),
    st.tuples(st.integers(0, 4), st.integers(0, 4)),
    pairs,
)
CHANNELS = st.sampled_from([1, 3, 7, 8, 20, 32, 45])
TILES = st.integers(1, 9)


def floats(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def assigned(geometry, n_tiles, images, seed=3):
    return assign_random(n_tiles, geometry.n_patches, images, np.random.default_rng(seed))


def gathered(geometry, planes, assignment):
    patches = np.full((assignment.rows, geometry.places * planes.shape[3]), np.nan, np.float32)
    in_tile_order(geometry, planes.shape[3]).gather(planes.numpy(), assignment, patches, 0, assignment.rows)
    return torch.from_numpy(patches)


def scattered(geometry, input_errors, assignment, channels, tiles=None):
    in_c = in_tile_order(geometry, channels)
    rows, part = in_c.rows_of_patches(assignment), tiles or (0, len(assignment.offsets) - 1)
    return in_c.scatter(input_errors.numpy(), assignment, rows, part)


def check(geometry, channels, assignment, images=2):
    """Hold both ways against torch, bit by bit."""
    planes, in_torch = floats(images, *geometry.size, channels), Im2col(geometry, channels)
    seen, order = seen_by(assignment, geometry), torch.from_numpy(assignment.order)
    expected = torch.empty(assignment.rows, geometry.places * channels)
    in_torch.gather(planes, order, expected, seen)
    assert_array_equal(gathered(geometry, planes, assignment), expected)
    input_errors = floats(*expected.shape, seed=1)
    found = scattered(geometry, input_errors, assignment, channels)
    rows = torch.from_numpy(assignment.inverse())
    assert_array_equal(found, in_torch.scatter_by_tile(input_errors.clone(), assignment, rows, seen))
    dropped = assignment.rows < assignment.n_patches
    wide = in_torch.scatter(input_errors.clone(), rows, images, dropped=dropped, seen=seen)
    assert_close(torch.from_numpy(found), wide)


@settings(deadline=None, max_examples=60)
@given(geometry=GEOMETRIES, channels=CHANNELS, n_tiles=TILES)
def test_both_ways_have_the_bits_of_torch_for_any_geometry(geometry, channels, n_tiles):
    check(geometry, channels, assigned(geometry, n_tiles, 2))


def test_both_ways_are_those_of_a_convolution():
    """Against torch's conv2d and its gradient, in double precision."""
    geometry = Geometry(size=(9, 8), kernel=(3, 5), stride=(2, 1), before=(1, 2), after=(1, 2), dilation=(2, 1))
    planes, kernel = floats(2, 9, 8, 4), floats(6, 4, 3, 5, seed=5).double()
    assignment = assigned(geometry, 3, 2)
    wide = planes.double().permute(0, 3, 1, 2).requires_grad_()
    expected = torch.nn.functional.conv2d(wide, kernel, stride=(2, 1), padding=(1, 2), dilation=(2, 1))
    matrix = kernel.permute(2, 3, 1, 0).reshape(-1, 6)
    outputs = (gathered(geometry, planes, assignment).double() @ matrix)[torch.from_numpy(assignment.inverse())]
    assert_close(outputs.view(2, *geometry.out, 6).permute(0, 3, 1, 2), expected.detach())
    errors = floats(*expected.shape, seed=6).double()
    expected.backward(errors)
    by_row = errors.permute(0, 2, 3, 1).reshape(-1, 6)[torch.from_numpy(assignment.order)] @ matrix.T
    back = scattered(geometry, by_row.float().contiguous(), assignment, 4)
    assert_close(torch.from_numpy(back), wide.grad.permute(0, 2, 3, 1).float(), rtol=1e-4, atol=1e-5)


def test_patches_that_are_dropped_pass_nothing_back():
    geometry = Geometry(size=(8, 8), kernel=(5, 5), before=(2, 2), after=(2, 2))
    (assignment,) = assign_perforated_in_parts(3, geometry.n_patches, (2,), np.random.default_rng(0))
    assert assignment.rows < assignment.n_patches
    check(geometry, 8, assignment)


def test_pixels_of_another_tiles_region_are_not_seen():
    geometry = Geometry(size=(8, 8), kernel=(5, 5), before=(2, 2), after=(2, 2))
    of_pixel = tile_map("image-pad", 4, geometry.out, np.random.default_rng(0))
    mask = region_mask(of_pixel, tile_map("image-pad", 4, geometry.size), geometry)
    assignment = assign_fixed(of_pixel, 4, 2, mask)
    assert not assignment.mask.all()
    check(geometry, 3, assignment)


@pytest.mark.parametrize("n_tiles", [2, 3, 5, 7, 12])
def test_parts_of_the_tree_are_added_up_to_the_same_bits(n_tiles):
    """What a node has of a tree, it may add up by itself."""
    geometry = Geometry(size=(8, 8), kernel=(5, 5), before=(2, 2), after=(2, 2))
    assignment = assigned(geometry, n_tiles, 2)
    input_errors = floats(assignment.rows, 25 * 8, seed=1)
    whole = scattered(geometry, input_errors, assignment, 8)
    alone = [scattered(geometry, input_errors, assignment, 8, (tile, tile + 1)) for tile in range(n_tiles)]
    assert_array_equal(add_tree([torch.from_numpy(sums) for sums in alone]), whole)
    pairs = [
        scattered(geometry, input_errors, assignment, 8, (tile, min(tile + 2, n_tiles)))
        for tile in range(0, n_tiles, 2)
    ]
    assert_array_equal(add_tree([torch.from_numpy(sums) for sums in pairs]), whole)


@pytest.mark.parametrize("n_tiles", [63, 64, 65, 150])
@pytest.mark.parametrize("channels", [3, 32, 43])
def test_sums_of_many_tiles_have_the_bits_of_torch(n_tiles, channels):
    """More of them than a word has bits."""
    geometry = Geometry(size=(16, 16), kernel=(5, 5), before=(2, 2), after=(2, 2))
    check(geometry, channels, assigned(geometry, n_tiles, 2))


@pytest.mark.parametrize("n_tiles", [1, 3, 70])
def test_no_sum_is_a_negative_zero(n_tiles):
    geometry = Geometry(size=(9, 9), kernel=(3, 3), before=(1, 1), after=(1, 1))
    assignment = assigned(geometry, n_tiles, 2)
    input_errors = torch.full((assignment.rows, 9 * 11), -0.0)
    assert not np.signbit(scattered(geometry, input_errors, assignment, 11)).any()


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_bits_do_not_depend_on_the_number_of_threads(threads):
    geometry = Geometry(size=(16, 16), kernel=(5, 5), before=(2, 2), after=(2, 2))
    assignment = assigned(geometry, 4, 10)
    planes, input_errors = floats(10, 16, 16, 32), floats(assignment.rows, 800, seed=1)
    before = gathered(geometry, planes, assignment), scattered(geometry, input_errors, assignment, 32)
    try:
        use_threads(threads)
        assert_array_equal(gathered(geometry, planes, assignment), before[0])
        assert_array_equal(scattered(geometry, input_errors, assignment, 32), before[1])
    finally:
        use_threads(1)


def test_some_rows_may_be_gathered_alone():
    geometry = Geometry(size=(8, 8), kernel=(3, 3), before=(1, 1), after=(1, 1))
    planes, assignment = floats(2, 8, 8, 5), assigned(geometry, 3, 2)
    patches = torch.empty(assignment.rows, 45)
    patches[:] = 7
    in_tile_order(geometry, 5).gather(planes.numpy(), assignment, patches.numpy(), 30, 50)
    assert_array_equal(patches[30:50], gathered(geometry, planes, assignment)[30:50])
    assert (patches[:30] == 7).all()
    assert (patches[50:] == 7).all()


def test_nothing_is_written_beyond_the_rows():
    geometry = Geometry(size=(8, 8), kernel=(3, 3), before=(1, 1), after=(1, 1))
    assignment = assigned(geometry, 3, 2)
    memory, planes = torch.full((assignment.rows + 2, 9 * 5), 7.0), floats(2, 8, 8, 5)
    in_tile_order(geometry, 5).gather(planes.numpy(), assignment, memory[1:-1].numpy(), 0, assignment.rows)
    assert (memory[0] == 7).all()
    assert (memory[-1] == 7).all()


def test_arrays_that_are_not_floats_in_one_piece_are_refused():
    geometry = Geometry(size=(4, 4), kernel=(3, 3), before=(1, 1), after=(1, 1))
    assignment, patches = assigned(geometry, 1, 1), np.empty((16, 27), np.float32)
    with pytest.raises(ValueError, match=r"float32 in one piece, not \(1, 4, 4, 3\) float64"):
        in_tile_order(geometry, 3).gather(np.zeros((1, 4, 4, 3)), assignment, patches, 0, 16)
    with pytest.raises(ValueError, match="with gaps"):
        in_tile_order(geometry, 3).gather(np.zeros((1, 4, 4, 6), np.float32)[..., ::2], assignment, patches, 0, 16)


def test_an_empty_assignment_is_no_work():
    geometry = Geometry(size=(4, 4), kernel=(3, 3), before=(1, 1), after=(1, 1))
    assignment = Assignment(np.empty(0, np.int64), np.zeros(3, np.int64), 32)
    assert (scattered(geometry, torch.empty(0, 27), assignment, 3) == 0).all()
    assert len(gathered(geometry, floats(2, 4, 4, 3), replace(assignment))) == 0
