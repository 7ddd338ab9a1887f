"""A passage through a tile array, below the network: with and without an arena, for any assignment."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rapa_dist.assignment import Assignment
from rapa_dist.demand import arena_floats
from rapa_dist.fabric.batched import BatchedFabric
from rapa_dist.fabric.serial import SerialFabric
from rapa_dist.geometry import Geometry
from rapa_dist.machine import Machine, TileArray
from rapa_dist.router import Router
from rapa_dist.streams import Purpose
from rapa_dist.tile import Update

C_IN, C_OUT, IMAGES = 3, 4, 3
GEOMETRY = Geometry(size=(6, 8), kernel=(5, 3), before=(2, 1), after=(2, 1))
K, N_PATCHES = 15 * C_IN, GEOMETRY.n_patches
UPDATE = Update(learning_rate=0.01, weight_decay=0.5)
FLOAT32 = {"rtol": 1e-5, "atol": 2e-5}  # sums of up to some hundred products of numbers around 1


def uniform(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32))


def planes_of(images=IMAGES, seed=1):
    return uniform(images, *GEOMETRY.size, C_IN, seed=seed)


def errors_of(images=IMAGES, seed=2):
    return uniform(images, *GEOMETRY.out, C_OUT, seed=seed)


class Bench:
    """One tile array."""

    def __init__(self, fabric, n_tiles, scheme="random"):
        self.array = TileArray(
            index=0, name="conv", k=K, c_out=C_OUT, n_tiles=n_tiles, scheme=scheme, passages=(GEOMETRY,)
        )
        machine = Machine((self.array,))
        self.before = uniform(n_tiles, K + 1, C_OUT)
        if fabric == "batched":
            self.fabric = BatchedFabric(machine, [self.before.clone()])
        else:
            self.fabric = SerialFabric(machine, arena_floats(machine, IMAGES), [self.before.numpy()])

    def assignment(self, images=IMAGES, step=0):
        (found,) = Router(3).assign(self.array, GEOMETRY, Purpose.ASSIGN_TRAIN, (step,), (images,))
        return found

    def begin(self, planes, assignment):
        passage = self.fabric.passage(self.array, GEOMETRY, planes, assignment)
        passage.begin()
        return passage

    def train(self, planes, errors, assignment, update=UPDATE):
        """One passage there and back; return outputs, input errors, kernels afterwards."""
        passage = self.begin(planes, assignment)
        outputs = passage.outputs()
        passage.send_errors(errors, update, input_error=True, commit=True)
        back, gradient = passage.input_errors(), passage.kernel_gradient()
        kernels = torch.from_numpy(self.fabric.kernels(self.array))
        if update is not None and gradient is not None:
            kernels = after_step(kernels, gradient)
            self.fabric.write(self.array, kernels.float().numpy(), 1)
        return outputs, back, kernels


@pytest.fixture(params=["serial", "batched"])
def bench(request):
    opened = []

    def open_bench(n_tiles, scheme="random"):
        opened.append(Bench(request.param, n_tiles, scheme))
        return opened[-1]

    yield open_bench
    for one in opened:
        one.fabric.close()


def tile_of_patch(assignment):
    """(images · n_p,) the tile of every patch; −1: dropped."""
    tiles = np.full(assignment.n_patches, -1)
    tiles[assignment.order] = np.repeat(np.arange(len(assignment.offsets) - 1), np.diff(assignment.offsets))
    return torch.from_numpy(tiles)


def sum_over_patches(planes, kernels, assignment):
    """M_tiled = (b_lᵀ K_{s_l})_l, patch by patch; a dropped patch gives zeros."""
    padded = F.pad(planes, (0, 0, 1, 1, 2, 2))
    rows = []
    for number, tile in enumerate(tile_of_patch(assignment).tolist()):
        image, pixel = divmod(number, N_PATCHES)
        y, x = divmod(pixel, GEOMETRY.out[1])
        patch = padded[image, y : y + 5, x : x + 3]  # (5, 3, c_in)
        if assignment.mask is not None:
            patch = patch * torch.from_numpy(assignment.mask[pixel]).reshape(5, 3, 1)
        if tile < 0:
            rows.append(planes.new_zeros(C_OUT))
        else:
            rows.append(patch.reshape(K) @ kernels[tile, :-1] + kernels[tile, -1])
    return torch.stack(rows).reshape(len(planes), *GEOMETRY.out, C_OUT)


def after_step(kernels, gradient, update=UPDATE):
    """Gradient descent by the rule of the paper: K ← (1 − λ · decay) K − λ dK."""
    return (1 - update.learning_rate * update.weight_decay) * kernels - update.learning_rate * gradient


def assert_as(found, function, planes, kernels, errors):
    """Assert outputs, input errors and kernels after a step to be those of a function under autograd in float64."""
    planes, kernels = planes.double().requires_grad_(), kernels.double().requires_grad_()
    outputs = function(planes, kernels)
    outputs.backward(errors.double())
    expected = outputs, planes.grad, after_step(kernels, kernels.grad)
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual.double(), wanted.detach(), **FLOAT32)


def assert_same_bits(found, expected):
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_image_pad_is_an_ordinary_convolution_of_every_region_by_itself(bench):
    """Each region is cut out, padded with zeros and convolved with the kernel of its tile."""
    many, planes, errors = bench(4, "image-pad"), planes_of(), errors_of()

    def conv2d(planes, kernel):
        weight = kernel[:-1].reshape(5, 3, C_IN, C_OUT).permute(3, 2, 0, 1)
        return F.conv2d(planes.permute(0, 3, 1, 2), weight, kernel[-1], padding=(2, 1)).permute(0, 2, 3, 1)

    def by_region(planes, kernels):
        rows, columns = (slice(0, 3), slice(3, 6)), (slice(0, 4), slice(4, 8))
        regions = [
            [conv2d(planes[:, y, x], kernels[2 * i + j]) for j, x in enumerate(columns)] for i, y in enumerate(rows)
        ]
        return torch.cat([torch.cat(row, dim=2) for row in regions], dim=1)

    assert_as(many.train(planes, errors, many.assignment()), by_region, planes, many.before, errors)


def with_dropped_patches(n_tiles):
    """A third of the patches, drawn at random and dealt to the tiles."""
    total = IMAGES * N_PATCHES
    order = np.random.default_rng(6).permutation(total)[: total // 3]
    return Assignment(order, np.linspace(0, len(order), n_tiles + 1).astype(np.int64), total)


def masked(assignment):
    mask = np.random.default_rng(5).random((N_PATCHES, 15)) < 0.6
    return Assignment(assignment.order, assignment.offsets, assignment.n_patches, mask)


@pytest.mark.parametrize("n_tiles", [1, 5])
@pytest.mark.parametrize("kind", ["whole", "masked", "dropped", "masked and dropped"])
def test_masked_pixels_and_dropped_patches_are_as_in_the_sum_over_patches(bench, kind, n_tiles):
    many, planes, errors = bench(n_tiles), planes_of(), errors_of()
    assignment = with_dropped_patches(n_tiles) if "dropped" in kind else many.assignment()
    if "masked" in kind:
        assignment = masked(assignment)
    found = many.train(planes, errors, assignment)
    assert_as(found, lambda p, k: sum_over_patches(p, k, assignment), planes, many.before, errors)
    dropped = tile_of_patch(assignment) < 0
    assert not found[0].reshape(-1, C_OUT)[dropped].any()  # exact zeros


def test_a_tile_that_gets_no_patch_only_decays(bench):
    many, planes, errors = bench(3), planes_of(), errors_of()
    everything = np.arange(IMAGES * N_PATCHES)
    half = len(everything) // 2
    assignment = Assignment(everything, np.array([0, half, half, len(everything)]), len(everything))
    found = many.train(planes, errors, assignment)
    assert_as(found, lambda p, k: sum_over_patches(p, k, assignment), planes, many.before, errors)
    assert_close(found[2][1], (1 - 0.01 * 0.5) * many.before[1])


def test_the_order_of_rows_within_a_tile_does_not_matter(bench):
    one, other, planes, errors = bench(4), bench(4), planes_of(), errors_of()
    assignment = one.assignment()
    order = assignment.order.copy()
    for first, last in zip(assignment.offsets[:-1], assignment.offsets[1:], strict=True):
        order[first:last] = order[first:last][::-1]
    turned = Assignment(order, assignment.offsets, assignment.n_patches)
    found, expected = one.train(planes, errors, assignment), other.train(planes, errors, turned)
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted, **FLOAT32)


def test_outputs_can_be_asked_for_image_by_image(bench):
    many, planes = bench(5), planes_of()
    assignment = many.assignment()
    whole = many.begin(planes, assignment).outputs()
    passage = many.begin(planes, assignment)
    assert_close(torch.cat([passage.outputs(0, 1), passage.outputs(1, 2), passage.outputs(2)]), whole)


# --- what was there before leaves no trace


def test_a_passage_without_mask_after_one_with_it_sees_all_pixels(bench):
    many, planes, errors = bench(5), planes_of(), errors_of()
    assignment = many.assignment()
    first = many.train(planes, errors, assignment, update=None)
    many.train(planes, errors, masked(assignment), update=None)
    assert_same_bits(many.train(planes, errors, assignment, update=None), first)


@pytest.mark.parametrize("n_tiles", [1, 5])
def test_a_smaller_mini_batch_after_a_larger_one(bench, n_tiles):
    many, fresh = bench(n_tiles), bench(n_tiles)
    many.train(planes_of(IMAGES, seed=8), errors_of(IMAGES, seed=9), many.assignment(), update=None)
    few = planes_of(1), errors_of(1), many.assignment(images=1)
    assert_same_bits(many.train(*few), fresh.train(*few))


def test_without_an_update_the_kernels_keep_their_bits(bench):
    many = bench(5)
    _, back, after = many.train(planes_of(), errors_of(), many.assignment(), update=None)
    assert torch.equal(after, many.before)
    assert back.any()


def test_outputs_stay_when_the_next_mini_batch_comes(bench):
    many = bench(5)
    passage = many.begin(planes_of(), many.assignment())
    outputs = passage.outputs()
    kept = outputs.clone()
    passage.release()
    many.begin(planes_of(seed=9), many.assignment(step=1)).outputs()
    assert torch.equal(outputs, kept)


@pytest.mark.parametrize("n_tiles", [1, 5])
def test_planes_and_errors_may_lie_in_memory_in_any_order(bench, n_tiles):
    many, same, planes, errors = bench(n_tiles), bench(n_tiles), planes_of(), errors_of()
    channels_first = planes.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    spread = errors.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    assignment = many.assignment()
    found, expected = many.train(channels_first, spread, assignment), same.train(planes, errors, assignment)
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted, **FLOAT32)
