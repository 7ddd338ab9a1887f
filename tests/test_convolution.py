"""The tiled convolution against torch's conv2d, and against autograd on the sum over patches written out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rapa_dist.assignment import SCHEMES, Assignment
from rapa_dist.coordinator.assigner import Assigner
from rapa_dist.fabric.serial import SerialFabric
from rapa_dist.machine import Layer, Machine
from rapa_dist.network.convolution import TiledConvolution
from rapa_dist.tile import Update

SIDE, C_IN, C_OUT, IMAGES = 6, 3, 4, 3
N_PATCHES = SIDE * SIDE
K = 25 * C_IN
UPDATE = Update(learning_rate=0.01, weight_decay=0.5)
FLOAT32 = {"rtol": 1e-5, "atol": 2e-5}  # sums of up to some hundred products of numbers around 1


def uniform(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def planes_of(images=IMAGES, seed=1):
    """Planes (images, side, side, c_in) that want a gradient."""
    return torch.from_numpy(uniform(images, SIDE, SIDE, C_IN, seed=seed)).requires_grad_()


def errors_of(images=IMAGES, seed=2):
    return torch.from_numpy(uniform(images, SIDE, SIDE, C_OUT, seed=seed))


def distinct_kernels(n_tiles):
    return uniform(n_tiles, K + 1, C_OUT)


def equal_kernels(n_tiles):
    return np.repeat(uniform(1, K + 1, C_OUT), n_tiles, axis=0)


class Bench:
    """One layer of tiles on the fabric `serial`."""

    def __init__(self, kernels, images=IMAGES):
        self.layer = Layer(index=0, side=SIDE, c_in=C_IN, c_out=C_OUT, n_tiles=len(kernels), perforation=4)
        self.machine = Machine((self.layer,))
        self.fabric = SerialFabric(self.machine, images, [kernels])
        self.convolution = TiledConvolution(self.layer, self.fabric)

    def assignment(self, scheme="random", images=IMAGES, step=0):
        return Assigner(self.machine, scheme, seed=3).for_training(step, images)[0]

    @property
    def kernels(self):
        return torch.from_numpy(self.fabric.kernels(self.layer))


@pytest.fixture
def bench():
    opened = []

    def open_bench(kernels, images=IMAGES):
        opened.append(Bench(kernels, images))
        return opened[-1]

    yield open_bench
    for one in opened:
        one.fabric.close()


def train(bench, planes, errors, assignment, update=UPDATE):
    """One forward and one backward pass; return outputs, gradient of the planes, kernels afterwards."""
    planes.grad = None
    outputs = bench.convolution(planes, assignment, update)
    outputs.backward(errors)
    return outputs.detach(), planes.grad, bench.kernels


def tile_of_patch(assignment):
    """(images · n_p,) the tile of every patch; −1: dropped."""
    tiles = np.full(assignment.n_patches, -1)
    for tile in range(len(assignment.offsets) - 1):
        for row in range(assignment.offsets[tile], assignment.offsets[tile + 1]):
            tiles[assignment.order[row]] = tile
    return torch.from_numpy(tiles)


def conv2d(planes, kernel):
    """The ordinary convolution in double precision: planes as here, kernel (k + 1, c_out)."""
    weight = kernel[:-1].reshape(5, 5, C_IN, C_OUT).permute(3, 2, 0, 1)
    return F.conv2d(planes.permute(0, 3, 1, 2), weight, kernel[-1], padding=2).permute(0, 2, 3, 1)


def sum_over_patches(planes, kernels, tiles, mask=None):
    """M_tiled = (b_lᵀ K_{s_l})_l, patch by patch; a dropped patch gives zeros.

    Args:
        planes: (images, side, side, c_in), double precision.
        kernels: (n_t, k + 1, c_out), double precision.
        tiles: (images · n_p,) as `tile_of_patch` returns it.
        mask: (n_p, 25) or None.
    """
    padded = F.pad(planes, (0, 0, 2, 2, 2, 2))
    rows = []
    for number, tile in enumerate(tiles.tolist()):
        image, pixel = divmod(number, N_PATCHES)
        y, x = divmod(pixel, SIDE)
        patch = padded[image, y : y + 5, x : x + 5]  # (5, 5, c_in)
        if mask is not None:
            patch = patch * torch.from_numpy(mask[pixel]).reshape(5, 5, 1)
        if tile < 0:
            rows.append(planes.new_zeros(C_OUT))
        else:
            rows.append(patch.reshape(K) @ kernels[tile, :-1] + kernels[tile, -1])
    return torch.stack(rows).reshape(len(planes), SIDE, SIDE, C_OUT)


def reference(function, planes, kernels, errors):
    """Outputs, gradient of the planes and gradient of the kernels of a function, by autograd in float64."""
    planes = planes.detach().double().requires_grad_()
    kernels = torch.as_tensor(kernels).double().detach().clone().requires_grad_()
    outputs = function(planes, kernels)
    outputs.backward(errors.double())
    return outputs.detach(), planes.grad, kernels.grad


def after_step(kernels, gradient, update=UPDATE):
    """Gradient descent by the rule of the paper: K ← (1 − λ · decay) K − λ dK."""
    kernels = torch.as_tensor(kernels).double()
    return (1 - update.learning_rate * update.weight_decay) * kernels - update.learning_rate * gradient


def close(actual, expected):
    assert_close(actual.double(), expected, **FLOAT32)


# --- one tile is conv2d


def test_one_tile_is_conv2d_with_its_gradient_and_one_step_of_gradient_descent(bench):
    kernel, planes, errors = distinct_kernels(1), planes_of(), errors_of()
    one = bench(kernel)
    outputs, gradient, updated = train(one, planes, errors, one.assignment())
    expected, input_gradient, kernel_gradient = reference(lambda p, k: conv2d(p, k[0]), planes, kernel, errors)
    close(outputs, expected)
    close(gradient, input_gradient)
    close(updated, after_step(kernel, kernel_gradient))


def test_the_bias_is_the_last_row_of_the_kernel(bench):
    kernel = np.zeros((1, K + 1, C_OUT), np.float32)
    kernel[0, -1] = range(C_OUT)
    one = bench(kernel)
    outputs = one.convolution(planes_of(), one.assignment(), None)
    assert_close(outputs, torch.arange(C_OUT, dtype=torch.float32).expand(IMAGES, SIDE, SIDE, C_OUT))


# --- equal kernels on many tiles are conv2d

TILES = {
    "none": 1,
    "random": 5,
    "random-fixed": 5,
    "alternate": 9,
    "image-overlap": 9,
    "image-pad": 9,
    "perforated": 1,
}
WHOLE = [scheme for scheme in SCHEMES if scheme not in ("image-pad", "perforated")]
"""Schemes that compute every patch, and all of it."""


@pytest.mark.parametrize("scheme", WHOLE)
def test_equal_kernels_are_conv2d_whatever_the_scheme(bench, scheme):
    kernels, planes, errors = equal_kernels(TILES[scheme]), planes_of(), errors_of()
    many = bench(kernels)
    outputs, gradient, _ = train(many, planes, errors, many.assignment(scheme))
    expected, input_gradient, _ = reference(lambda p, k: conv2d(p, k[0]), planes, kernels, errors)
    close(outputs, expected)
    close(gradient, input_gradient)


@pytest.mark.parametrize("scheme", WHOLE)
def test_the_changes_of_equal_kernels_add_up_to_the_step_of_conv2d(bench, scheme):
    kernels, planes, errors = equal_kernels(TILES[scheme]), planes_of(), errors_of()
    many = bench(kernels)
    plain = Update(learning_rate=0.01, weight_decay=0.0)
    *_, updated = train(many, planes, errors, many.assignment(scheme), plain)
    _, _, kernel_gradient = reference(lambda p, k: conv2d(p, k[0]), planes, kernels, errors)
    change = (updated.double() - torch.from_numpy(kernels).double()).sum(dim=0)
    close(change, -0.01 * kernel_gradient[0])


# --- distinct kernels are autograd's on the sum over patches


@pytest.mark.parametrize("scheme", SCHEMES)
def test_distinct_kernels_are_the_sum_over_patches_with_its_gradients(bench, scheme):
    """That all of it fits one list of tiles says, too, that the three cycles use one assignment."""
    kernels, planes, errors = distinct_kernels(TILES[scheme]), planes_of(), errors_of()
    many = bench(kernels)
    assignment = many.assignment(scheme)
    tiles = tile_of_patch(assignment)
    outputs, gradient, updated = train(many, planes, errors, assignment)
    expected, input_gradient, kernel_gradient = reference(
        lambda p, k: sum_over_patches(p, k, tiles, assignment.mask), planes, kernels, errors
    )
    close(outputs, expected)
    close(gradient, input_gradient)
    close(updated, after_step(kernels, kernel_gradient))


@pytest.mark.parametrize("equal", [True, False])
def test_image_pad_is_an_ordinary_convolution_of_every_region_by_itself(bench, equal):
    """Each region is cut out, padded with zeros and convolved with the kernel of its tile."""
    kernels, planes, errors = (equal_kernels if equal else distinct_kernels)(9), planes_of(), errors_of()
    many = bench(kernels)
    outputs, gradient, updated = train(many, planes, errors, many.assignment("image-pad"))

    def by_region(p, k):
        edges = [slice(first, first + 2) for first in range(0, SIDE, 2)]
        rows = [[conv2d(p[:, y, x], k[3 * i + j]) for j, x in enumerate(edges)] for i, y in enumerate(edges)]
        return torch.cat([torch.cat(row, dim=2) for row in rows], dim=1)

    expected, input_gradient, kernel_gradient = reference(by_region, planes, kernels, errors)
    close(outputs, expected)
    close(gradient, input_gradient)
    close(updated, after_step(kernels, kernel_gradient))


def test_a_sequence_of_steps_under_new_assignments_follows_the_sum_over_patches(bench):
    kernels = distinct_kernels(4)
    many = bench(kernels)
    expected = torch.from_numpy(kernels).double()
    for step in range(4):
        planes, errors, assignment = planes_of(seed=step), errors_of(seed=10 + step), many.assignment(step=step)
        *_, updated = train(many, planes, errors, assignment)
        tiles = tile_of_patch(assignment)
        _, _, gradient = reference(lambda p, k, t=tiles: sum_over_patches(p, k, t), planes, expected, errors)
        expected = after_step(expected, gradient)
    close(updated, expected)


def test_the_fabric_gets_the_same_parts_in_all_cycles(bench, monkeypatch):
    many = bench(distinct_kernels(5))
    parts = []
    for name in ("begin_forward", "begin_backward"):
        begin = getattr(many.fabric, name)
        monkeypatch.setattr(
            many.fabric,
            name,
            lambda layer, offsets, b=begin, **how: (parts.append(offsets), b(layer, offsets, **how))[1],
        )
    assignment = many.assignment()
    train(many, planes_of(), errors_of(), assignment)
    assert len(parts) == 2
    assert all(np.array_equal(part, assignment.offsets) for part in parts)


def test_a_tile_that_gets_no_patch_only_decays(bench):
    kernels, planes, errors = distinct_kernels(3), planes_of(), errors_of()
    many = bench(kernels)
    everything = np.arange(IMAGES * N_PATCHES)
    half = len(everything) // 2
    idle_in_the_middle = Assignment(everything, np.array([0, half, half, len(everything)]), len(everything))
    outputs, gradient, updated = train(many, planes, errors, idle_in_the_middle)
    expected, input_gradient, kernel_gradient = reference(
        lambda p, k: sum_over_patches(p, k, tile_of_patch(idle_in_the_middle)), planes, kernels, errors
    )
    assert not kernel_gradient[1].any()
    close(outputs, expected)
    close(gradient, input_gradient)
    close(updated, after_step(kernels, kernel_gradient))


# --- masked pixels and dropped patches


def a_mask():
    return np.random.default_rng(5).random((N_PATCHES, 25)) < 0.6


def with_dropped_patches(n_tiles):
    """A third of the patches, drawn at random and dealt to the tiles."""
    total = IMAGES * N_PATCHES
    order = np.random.default_rng(6).permutation(total)[: total // 3]
    return Assignment(order, np.linspace(0, len(order), n_tiles + 1).astype(np.int64), total)


def masked(assignment):
    return Assignment(assignment.order, assignment.offsets, assignment.n_patches, a_mask())


@pytest.mark.parametrize("n_tiles", [1, 5])
@pytest.mark.parametrize("kind", ["masked", "dropped", "masked and dropped"])
def test_masked_pixels_and_dropped_patches_are_as_in_the_sum_over_patches(bench, kind, n_tiles):
    kernels, planes, errors = distinct_kernels(n_tiles), planes_of(), errors_of()
    many = bench(kernels)
    assignment = with_dropped_patches(n_tiles) if "dropped" in kind else many.assignment()
    if "masked" in kind:
        assignment = masked(assignment)
    tiles = tile_of_patch(assignment)
    outputs, gradient, updated = train(many, planes, errors, assignment)
    expected, input_gradient, kernel_gradient = reference(
        lambda p, k: sum_over_patches(p, k, tiles, assignment.mask), planes, kernels, errors
    )
    close(outputs, expected)
    close(gradient, input_gradient)
    close(updated, after_step(kernels, kernel_gradient))


def test_a_dropped_patch_gives_exact_zeros(bench):
    many = bench(distinct_kernels(5))
    assignment = with_dropped_patches(5)
    outputs = many.convolution(planes_of(), assignment, None).detach().reshape(-1, C_OUT)
    dropped = tile_of_patch(assignment) < 0
    assert not outputs[dropped].any()
    assert outputs[~dropped].all()


def test_a_mini_batch_without_mask_after_one_with_it_sees_all_pixels(bench):
    kernels, planes, errors = distinct_kernels(5), planes_of(), errors_of()
    many = bench(kernels)
    assignment = many.assignment()
    first, first_gradient, _ = train(many, planes, errors, assignment, update=None)
    train(many, planes, errors, masked(assignment), update=None)
    second, second_gradient, _ = train(many, planes, errors, assignment, update=None)
    assert torch.equal(first, second)
    assert torch.equal(first_gradient, second_gradient)


# --- mini-batches, layouts, modes


def test_a_mini_batch_smaller_than_the_memory_leaves_no_trace_of_the_one_before(bench):
    kernels = distinct_kernels(5)
    many, fresh = bench(kernels), bench(kernels)
    train(many, planes_of(IMAGES, seed=8), errors_of(IMAGES, seed=9), many.assignment(), update=None)
    planes, errors = planes_of(images=1), errors_of(images=1)
    assignment = many.assignment(images=1)
    after_larger, expected = train(many, planes, errors, assignment), train(fresh, planes, errors, assignment)
    for actual, wanted in zip(after_larger, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_without_an_update_the_kernels_keep_their_bits(bench):
    kernels = distinct_kernels(5)
    many = bench(kernels)
    _, gradient, after = train(many, planes_of(), errors_of(), many.assignment(), update=None)
    assert torch.equal(after, torch.from_numpy(kernels))
    assert gradient.any()


def test_planes_without_gradient_still_update_the_kernels(bench):
    """The first layer's planes are images; nobody wants their error."""
    kernels, planes, errors = distinct_kernels(5), planes_of(), errors_of()
    many = bench(kernels)
    assignment = many.assignment()
    many.convolution(planes.detach(), assignment, UPDATE).backward(errors)
    _, _, kernel_gradient = reference(
        lambda p, k: sum_over_patches(p, k, tile_of_patch(assignment)), planes, kernels, errors
    )
    close(many.kernels, after_step(kernels, kernel_gradient))


def test_without_autograd_the_outputs_are_the_same_and_the_kernels_stay(bench):
    kernels, planes = distinct_kernels(5), planes_of()
    many = bench(kernels)
    assignment = many.assignment()
    wanted = many.convolution(planes, assignment, UPDATE).detach()
    with torch.no_grad():
        assert torch.equal(many.convolution(planes, assignment, UPDATE), wanted)
    assert torch.equal(many.kernels, torch.from_numpy(kernels))


def test_outputs_stay_when_the_next_mini_batch_comes(bench):
    many = bench(distinct_kernels(5))
    first = many.convolution(planes_of(), many.assignment(), None).detach()
    kept = first.clone()
    many.convolution(planes_of(seed=9), many.assignment(step=1), None)
    assert torch.equal(first, kept)


def test_planes_and_errors_may_lie_in_memory_in_any_order(bench):
    kernels = distinct_kernels(5)
    many, same = bench(kernels), bench(kernels)
    planes, errors = planes_of(), errors_of()
    assignment = many.assignment()
    channels_first = planes.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_()
    spread = errors.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    assert not channels_first.is_contiguous()
    assert not spread.is_contiguous()
    for actual, wanted in zip(
        train(many, channels_first, spread, assignment), train(same, planes, errors, assignment), strict=True
    ):
        assert torch.equal(actual, wanted)


def test_the_order_of_rows_within_a_tile_does_not_matter(bench):
    kernels, planes, errors = distinct_kernels(4), planes_of(), errors_of()
    one, other = bench(kernels), bench(kernels)
    assignment = one.assignment()
    order = assignment.order.copy()
    for first, last in zip(assignment.offsets[:-1], assignment.offsets[1:], strict=True):
        order[first:last] = order[first:last][::-1]
    turned = Assignment(order, assignment.offsets, assignment.n_patches)
    for actual, wanted in zip(
        train(one, planes, errors, assignment), train(other, planes, errors, turned), strict=True
    ):
        close(actual, wanted.double())
