from itertools import combinations

import numpy as np
import pytest
from factories import tile_array
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from rapa_dist.assignment import Assignment, assign_fixed, assign_random
from rapa_dist.geometry import Geometry
from rapa_dist.machine import Machine
from rapa_dist.router import Router
from rapa_dist.schemes import SCHEMES, SQUARE_SCHEMES
from rapa_dist.streams import Purpose, stream
from rapa_dist.tile_maps import region_mask, tile_map

any_shape = settings(max_examples=80, deadline=None)


def tile_of_patch(assignment):
    """(n_patches,) the tile of every patch, by reading the assignment row by row; −1: dropped."""
    tiles = [-1] * assignment.n_patches
    for tile in range(len(assignment.offsets) - 1):
        for row in range(assignment.offsets[tile], assignment.offsets[tile + 1]):
            patch = assignment.order[row]
            assert tiles[patch] == -1, f"patch {patch} is on two tiles"
            tiles[patch] = tile
    return np.array(tiles)


def part_sizes(tiles, n_tiles):
    return [int(np.sum(tiles == tile)) for tile in range(n_tiles)]


def draw(n_tiles, n_patches, images, step=0, seed=0):
    return assign_random(n_tiles, n_patches, images, stream(seed, Purpose.ASSIGN_TRAIN, 0, step))


def equal(one, other):
    return np.array_equal(one.order, other.order) and np.array_equal(one.offsets, other.offsets)


@st.composite
def shapes(draw):
    """(n_tiles, n_patches, images) with 1 ≤ n_t ≤ n_p."""
    n_patches = draw(st.integers(1, 130))
    return draw(st.integers(1, n_patches)), n_patches, draw(st.integers(1, 5))


@st.composite
def planes(draw, square=False):
    """(n_tiles, (h, w), images) with 1 ≤ n_t ≤ h · w, or n_t = q² with q ≤ h and q ≤ w."""
    height, width = plane = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    n_tiles = draw(st.integers(1, min(plane))) ** 2 if square else draw(st.integers(1, height * width))
    return n_tiles, plane, draw(st.integers(1, 4))


@st.composite
def geometries(draw):
    """Patches of any kernel, stride, border and dilation on planes of any height and width."""
    pairs = {"size": (1, 9), "kernel": (1, 4), "stride": (1, 3), "before": (0, 3), "after": (0, 3), "dilation": (1, 2)}
    drawn = {name: draw(st.tuples(*[st.integers(*bounds)] * 2)) for name, bounds in pairs.items()}
    try:
        return Geometry(**drawn)
    except ValueError:  # the planes are smaller than the kernel
        reject()


# --- every patch is on exactly one tile, and the parts are equal


@any_shape
@given(shapes(), st.integers(0, 2**32))
def test_random_puts_every_patch_on_exactly_one_tile(shape, seed):
    n_tiles, n_patches, images = shape
    assignment = draw(n_tiles, n_patches, images, seed=seed)
    assert assignment.n_patches == assignment.rows == n_patches * images
    assert len(assignment.offsets) == n_tiles + 1
    assert (assignment.offsets[0], assignment.offsets[-1]) == (0, assignment.rows)
    assert tile_of_patch(assignment).min() >= 0


@any_shape
@given(shapes(), st.integers(0, 2**32))
def test_parts_of_random_differ_by_at_most_one_row_in_every_image_and_over_the_mini_batch(shape, seed):
    n_tiles, n_patches, images = shape
    tiles = tile_of_patch(draw(n_tiles, n_patches, images, seed=seed))
    for part in (tiles, *tiles.reshape(images, n_patches)):
        assert np.ptp(part_sizes(part, n_tiles)) <= 1


@any_shape
@given(planes(), st.integers(0, 2**32))
def test_parts_of_random_fixed_differ_by_at_most_one_row_in_an_image(shape, seed):
    n_tiles, (height, width), images = shape
    of_pixel = tile_map("random-fixed", n_tiles, (height, width), stream(seed, Purpose.ASSIGN_FIXED, 0))
    assert of_pixel.shape == (height * width,)
    assert np.ptp(part_sizes(of_pixel, n_tiles)) <= 1
    tiles = tile_of_patch(assign_fixed(of_pixel, n_tiles, images))
    assert np.array_equal(tiles, np.tile(of_pixel, images))


@any_shape
@given(planes(square=True), st.sampled_from(SQUARE_SCHEMES))
def test_square_schemes_put_every_patch_on_exactly_one_tile(shape, scheme):
    n_tiles, plane, images = shape
    assignment = assign_fixed(tile_map(scheme, n_tiles, plane), n_tiles, images)
    assert len(assignment.offsets) == n_tiles + 1
    tiles = tile_of_patch(assignment)
    assert tiles.min() >= 0
    assert tiles.max() < n_tiles


@pytest.mark.parametrize(("scheme", "n_tiles"), [("alternate", 16), ("image-overlap", 16), ("none", 1)])
def test_parts_of_fixed_schemes_are_equal_where_q_divides_n(scheme, n_tiles):
    assert set(part_sizes(tile_map(scheme, n_tiles, (32, 32)), n_tiles)) == {1024 // n_tiles}


@any_shape
@given(planes(square=True), st.sampled_from(SQUARE_SCHEMES))
def test_square_schemes_give_a_tile_a_rectangle_with_sides_that_differ_by_at_most_one(shape, scheme):
    """Where q does not divide n, the parts of these schemes differ by more than one row: rules fix them."""
    n_tiles, (height, width), _ = shape
    q = round(n_tiles**0.5)
    of_pixel = tile_map(scheme, n_tiles, (height, width)).reshape(height, width)
    for tile in range(n_tiles):
        rows, columns = (of_pixel == tile).any(axis=1).sum(), (of_pixel == tile).any(axis=0).sum()
        assert rows in {height // q, -(-height // q)}
        assert columns in {width // q, -(-width // q)}
        assert (of_pixel == tile).sum() == rows * columns


def test_image_overlap_of_nine_tiles_on_eight_pixels_has_strips_of_three_three_and_two():
    sizes = part_sizes(tile_map("image-overlap", 9, (8, 8)), 9)
    assert sizes == [9, 9, 6, 9, 9, 6, 6, 6, 4]


# --- the rules of the paper


@any_shape
@given(planes(square=True))
def test_alternate_is_the_formula_of_the_paper(shape):
    n_tiles, (height, width), _ = shape
    q = round(n_tiles**0.5)
    of_pixel = tile_map("alternate", n_tiles, (height, width))
    for y, x in np.ndindex(height, width):
        assert of_pixel[y * width + x] == (x % q) + q * (y % q)


@any_shape
@given(planes(square=True), st.sampled_from(["image-overlap", "image-pad"]))
def test_image_schemes_are_the_formula_of_the_paper(shape, scheme):
    n_tiles, (height, width), _ = shape
    q = round(n_tiles**0.5)
    of_pixel = tile_map(scheme, n_tiles, (height, width))
    for y, x in np.ndindex(height, width):
        assert of_pixel[y * width + x] == (q * x) // width + q * ((q * y) // height)


@any_shape
@given(geometries(), st.data())
def test_the_mask_of_image_pad_shows_the_pixels_of_the_patches_own_region_and_no_other(geometry, data):
    (columns, (height, width)), kernel_columns = (geometry.out[1], geometry.size), geometry.kernel[1]
    n_tiles = data.draw(st.integers(1, min(geometry.out))) ** 2
    of_patch, of_pixel = (tile_map("image-pad", n_tiles, plane) for plane in (geometry.out, geometry.size))
    mask = region_mask(of_patch, of_pixel, geometry)
    assert mask.shape == (geometry.n_patches, geometry.places)
    for y, x, kh, kw in np.ndindex(*geometry.out, *geometry.kernel):
        from_y = y * geometry.stride[0] + kh * geometry.dilation[0] - geometry.before[0]
        from_x = x * geometry.stride[1] + kw * geometry.dilation[1] - geometry.before[1]
        in_plane = 0 <= from_y < height and 0 <= from_x < width
        expected = in_plane and of_pixel[from_y * width + from_x] == of_patch[y * columns + x]
        assert mask[y * columns + x, kh * kernel_columns + kw] == expected


def test_none_has_one_tile():
    assert not tile_map("none", 1, (8, 8)).any()


@pytest.mark.parametrize("scheme", SQUARE_SCHEMES)
def test_square_schemes_refuse_other_numbers_of_tiles(scheme):
    with pytest.raises(ValueError, match="square number of tiles, not 12"):
        tile_map(scheme, 12, (8, 8))


def test_random_fixed_refuses_to_draw_from_nowhere():
    with pytest.raises(ValueError, match="generator"):
        tile_map("random-fixed", 4, (8, 8))


def test_random_has_no_map_for_all_images():
    with pytest.raises(ValueError, match="random has no tile map"):
        tile_map("random", 4, (8, 8), stream(0, Purpose.ASSIGN_FIXED, 0))


# --- order, offsets and inverse tell the same


@any_shape
@given(shapes(), st.integers(0, 2**32))
def test_inverse_is_the_row_of_every_patch(shape, seed):
    assignment = draw(*shape, seed=seed)
    inverse = assignment.inverse()
    assert inverse.shape == (assignment.n_patches,)
    for row, patch in enumerate(assignment.order):
        assert inverse[patch] == row


@any_shape
@given(st.data(), st.integers(1, 60))
def test_inverse_of_a_dropped_patch_is_one_past_the_last_row(data, n_patches):
    kept = data.draw(st.lists(st.integers(0, n_patches - 1), unique=True))
    assignment = Assignment(np.array(kept, np.int64), np.array([0, len(kept)]), n_patches)
    inverse = assignment.inverse()
    for patch in range(n_patches):
        assert inverse[patch] == (kept.index(patch) if patch in kept else len(kept))


# --- random is random


def test_random_differs_between_the_images_of_a_mini_batch():
    tiles = tile_of_patch(draw(4, 64, 5)).reshape(5, 64)
    assert len({row.tobytes() for row in tiles}) == 5


def test_random_differs_between_steps():
    drawn = {draw(4, 64, 2, step).order.tobytes() for step in range(20)}
    assert len(drawn) == 20


def test_the_same_stream_draws_the_same_assignment():
    draw(5, 49, 2, step=8)  # what was drawn in between does not matter
    assert equal(draw(5, 49, 3, step=7), draw(5, 49, 3, step=7))


def test_an_assignment_is_not_changed_by_drawing_another_one():
    first = draw(4, 36, 2, step=0)
    order, offsets = first.order.copy(), first.offsets.copy()
    draw(4, 36, 2, step=1)
    assert np.array_equal(first.order, order)
    assert np.array_equal(first.offsets, offsets)


N_DRAWS = 3000


def many_draws(n_tiles, n_patches, images):
    """(draws, images, n_p) tile of every patch."""
    drawn = np.empty((N_DRAWS, images * n_patches), np.int64)
    for step in range(N_DRAWS):
        assignment = draw(n_tiles, n_patches, images, step)
        drawn[step, assignment.order] = np.repeat(np.arange(n_tiles), np.diff(assignment.offsets))
    return drawn.reshape(N_DRAWS, images, n_patches)


@pytest.mark.parametrize(("n_tiles", "n_patches"), [(4, 16), (5, 9)])
def test_every_patch_is_equally_likely_on_every_place_of_every_tile(n_tiles, n_patches):
    images = 3
    drawn = many_draws(n_tiles, n_patches, images)
    expected, limit = N_DRAWS / n_tiles, chi2.ppf(1 - 1e-6, df=n_tiles - 1)
    for image in range(images):
        for pixel in range(n_patches):
            counts = np.bincount(drawn[:, image, pixel], minlength=n_tiles)
            assert np.sum((counts - expected) ** 2 / expected) < limit, (image, pixel, counts)


def test_two_pixels_of_an_image_meet_on_a_tile_as_often_as_in_a_uniform_partition():
    n_tiles, n_patches = 4, 16
    drawn = many_draws(n_tiles, n_patches, 1)[:, 0]
    probability = (n_patches / n_tiles - 1) / (n_patches - 1)  # its tile has that many places left
    spread = np.sqrt(probability * (1 - probability) / N_DRAWS)
    for one, other in combinations(range(n_patches), 2):
        together = np.mean(drawn[:, one] == drawn[:, other])
        assert abs(together - probability) < 5 * spread, (one, other, together)


def test_images_of_a_mini_batch_are_partitioned_independently():
    n_tiles, n_patches = 4, 12
    drawn = many_draws(n_tiles, n_patches, 2)
    spread = np.sqrt(1 / n_tiles * (1 - 1 / n_tiles) / N_DRAWS)
    for one in range(n_patches):
        for other in range(n_patches):
            together = np.mean(drawn[:, 0, one] == drawn[:, 1, other])
            assert abs(together - 1 / n_tiles) < 5 * spread, (one, other, together)


def test_random_fixed_partitions_uniformly():
    n_tiles, side = 4, 4
    drawn = np.array(
        [
            tile_map("random-fixed", n_tiles, (side, side), stream(seed, Purpose.ASSIGN_FIXED, 0))
            for seed in range(N_DRAWS)
        ]
    )
    expected, limit = N_DRAWS / n_tiles, chi2.ppf(1 - 1e-6, df=n_tiles - 1)
    for pixel in range(side * side):
        counts = np.bincount(drawn[:, pixel], minlength=n_tiles)
        assert np.sum((counts - expected) ** 2 / expected) < limit


# --- the router: which assignment where in a run


def machine(scheme="random", tiles=(16, 4, 1)):
    return Machine.build(channels=(4, 4, 4), tiles=(1, 1, 1) if scheme == "none" else tiles, scheme=scheme)


class Routed:
    """What the router says of all tile arrays of a machine."""

    def __init__(self, arrays, seed=0):
        self.arrays, self._router = arrays, Router(seed)

    def __call__(self, purpose, place, *sizes):
        """[part][array]"""
        parts = [self._router.assign(array, array.passages[0], purpose, place, sizes) for array in self.arrays]
        return list(zip(*parts, strict=True))

    def training(self, step, images=2):
        return self(Purpose.ASSIGN_TRAIN, (step,), images)[0]

    def test(self, step, first_image=0, images=2, vote=0):
        return self(Purpose.ASSIGN_TEST, (step, first_image, vote), images)[0]


def routed(scheme, seed=0, **values):
    return Routed(machine(scheme, **values).arrays, seed)


def all_equal(one, other):
    return all(equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "perforated"])
def test_the_router_covers_every_layer(scheme):
    here = routed(scheme)
    for array, assignment in zip(here.arrays, here.training(3), strict=True):
        assert assignment.n_patches == 2 * array.n_patches
        assert np.array_equal(np.sort(assignment.order), np.arange(2 * array.n_patches))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_routers_of_one_seed_agree_whatever_they_were_asked_before(scheme):
    one, other = routed(scheme), routed(scheme)
    one.training(1)
    one.test(5, images=3)
    assert all_equal(one.training(5), other.training(5))
    assert all_equal(one.test(5, 50, vote=1), other.test(5, 50, vote=1))


@pytest.mark.parametrize("tiles", [(16, 4, 1), (3, 5, 7)])
def test_perforated_keeps_its_share_of_every_image_in_training_and_all_in_a_test(tiles):
    here, images = routed("perforated", tiles=tiles), 3
    assert [array.n_tiles for array in here.arrays] == [1, 1, 1]
    for array, n_tiles, of_training, of_test in zip(
        here.arrays, tiles, here.training(2, images), here.test(2, images=images), strict=True
    ):
        kept = tile_of_patch(of_training).reshape(images, array.n_patches) == 0
        assert abs(kept.sum(axis=1) - array.n_patches / n_tiles).max() < 1
        assert abs(kept.sum() - images * array.n_patches / n_tiles) < 1
        assert of_training.n_patches == images * array.n_patches
        assert of_test.rows == of_test.n_patches == images * array.n_patches


def test_perforated_keeps_other_rows_of_every_image_step_layer_and_seed_and_all_of_them_equally_often():
    twins = [tile_array(index, side=6, n_tiles=1, scheme="perforated", perforation=4) for index in range(2)]
    draws = [Routed(twins, seed).training(step) for seed in (0, 1) for step in range(500)]
    kept = np.array([[tile_of_patch(one).reshape(2, 36) == 0 for one in layers] for layers in draws])
    assert len({rows.tobytes() for rows in kept.reshape(-1, 36)}) > 0.99 * 4000
    spread = np.sqrt(0.25 * 0.75 / 4000)
    assert np.all(abs(kept.reshape(-1, 36).mean(axis=0) - 0.25) < 5 * spread)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_patch_has_the_same_tile_however_the_mini_batch_is_cut(scheme):
    here = routed(scheme)
    (whole,) = here(Purpose.ASSIGN_TRAIN, (7,), 5)
    parts = here(Purpose.ASSIGN_TRAIN, (7,), 3, 2)
    for layer, expected in enumerate(whole):
        tiles = np.concatenate([tile_of_patch(part[layer]) for part in parts])
        assert np.array_equal(tiles, tile_of_patch(expected))


def test_random_changes_with_step_first_image_vote_seed_and_purpose():
    here = routed("random")
    drawn = [
        here.training(5),
        here.training(6),
        here.test(5),
        here.test(6),
        here.test(5, 50),
        here.test(5, vote=1),
        routed("random", seed=1).training(5),
    ]
    for layer in (0, 1):
        assert len({assignments[layer].order.tobytes() for assignments in drawn}) == len(drawn)


@pytest.mark.parametrize("scheme", ["random", "random-fixed"])
def test_layers_of_the_same_shape_are_partitioned_independently(scheme):
    here = Routed([tile_array(index, side=8, n_tiles=4, scheme=scheme) for index in range(2)])
    for first, second in (here.training(0, 1), here.test(0, images=1)):
        assert not np.array_equal(tile_of_patch(first), tile_of_patch(second))


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme not in ("random", "perforated")])
def test_fixed_schemes_are_the_same_for_all_images_steps_and_votes(scheme):
    here = routed(scheme)
    always = here.training(0)
    assert all_equal(always, here.training(9))
    assert all_equal(always, here.test(9, 50, vote=3))
    for array, assignment in zip(here.arrays, always, strict=True):
        first, second = tile_of_patch(assignment).reshape(2, array.n_patches)
        assert np.array_equal(first, second)


def test_random_fixed_has_a_partition_of_its_own_for_every_seed():
    one, other = (routed("random-fixed", seed).training(0, 1) for seed in (0, 1))
    assert not equal(one[0], other[0])
    assert not equal(one[1], other[1])
