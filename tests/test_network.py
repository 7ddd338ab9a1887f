"""The digital side, and the network as a whole, against independent implementations."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from rapa_dist.config import POOLING_NAMES
from rapa_dist.coordinator.assigner import Assigner
from rapa_dist.fabric.serial import SerialFabric
from rapa_dist.machine import Machine
from rapa_dist.network.model import Network, initial_digital, initial_kernels
from rapa_dist.network.normalisation import normalise, normalise_backward
from rapa_dist.network.pipeline import Step, train
from rapa_dist.network.pooling import POOLINGS
from rapa_dist.network.stage import Stage
from rapa_dist.tile import Update


def planes_of(side, images=2, channels=3, scale=1.0, seed=0):
    values = np.random.default_rng(seed).normal(scale=scale, size=(images, side, side, channels))
    return torch.from_numpy(values.astype(np.float32))


# --- pooling


def windows(planes):
    """Yield (y, x, window) of Caffe's 3×3 windows with stride 2, each cut off at the edge."""
    side = planes.shape[1]
    pooled = -(-(side - 3) // 2) + 1
    for y in range(pooled):
        for x in range(pooled):
            yield y, x, planes[:, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3]


OF_WINDOW = {"max": lambda window: window.amax(dim=(1, 2)), "average": lambda window: window.mean(dim=(1, 2))}


def plain_pool(method, planes):
    """ReLU and pooling, window by window; any precision, and autograd goes back through it."""
    pooled = {(y, x): OF_WINDOW[method](window.relu()) for y, x, window in windows(planes)}
    side = round(len(pooled) ** 0.5)
    return torch.stack([torch.stack([pooled[y, x] for x in range(side)], dim=1) for y in range(side)], dim=1)


@pytest.mark.parametrize("side", [32, 16, 8, 7, 5])
@pytest.mark.parametrize("method", POOLING_NAMES)
def test_pooling_is_over_what_is_inside_of_every_window(method, side):
    planes, errors = planes_of(side).requires_grad_(), None
    expected = plain_pool(method, planes)
    pooled, saved = POOLINGS[method].forward(planes.detach())
    assert_close(pooled, expected.detach())
    errors = planes_of(pooled.shape[1], seed=1)
    expected.backward(errors)
    assert_close(POOLINGS[method].backward(saved, errors), planes.grad)


def test_an_edge_window_averages_over_the_pixels_that_there_are():
    pooled, _ = POOLINGS["average"].forward(torch.ones(1, 8, 8, 1))
    assert_close(pooled, torch.ones(1, 4, 4, 1))


@pytest.mark.parametrize("method", POOLING_NAMES)
def test_pooling_changes_neither_its_input_nor_the_errors(method):
    planes, errors = planes_of(8), planes_of(4, seed=1)
    kept, kept_errors = planes.clone(), errors.clone()
    _, saved = POOLINGS[method].forward(planes)
    POOLINGS[method].backward(saved, errors)
    assert torch.equal(planes, kept)
    assert torch.equal(errors, kept_errors)


def test_every_pooling_that_can_be_asked_for_exists():
    assert tuple(POOLINGS) == POOLING_NAMES


# --- normalisation


def plain_normalise(planes):
    """x · (1 + α · avgpool3×3(x²))^−β with nine loops and zeros beyond the edge; any precision."""
    side = planes.shape[1]
    padded = F.pad(planes * planes, (0, 0, 1, 1, 1, 1))
    total = sum(padded[:, y : y + side, x : x + side] for y in range(3) for x in range(3))
    return planes * (1 + 5e-5 * total / 9) ** -0.75


@pytest.mark.parametrize("side", [16, 8, 4])
def test_normalisation_is_the_formula(side):
    planes = planes_of(side, scale=200)  # large, so that α x² is about 2
    expected = plain_normalise(planes.double())
    assert (expected / planes).median() < 0.7
    normalised, _ = normalise(planes)
    assert_close(normalised.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("side", [16, 8, 4])
def test_the_gradient_of_normalisation_is_autograds(side):
    planes, errors = planes_of(side, scale=200), planes_of(side, seed=1)
    _, saved = normalise(planes)
    plain = planes.double().requires_grad_()
    plain_normalise(plain).backward(errors.double())
    assert_close(normalise_backward(saved, errors).double(), plain.grad, rtol=1e-5, atol=1e-5)


def test_normalisation_changes_neither_its_input_nor_the_errors():
    planes, errors = planes_of(8, scale=200), planes_of(8, seed=1)
    kept, kept_errors = planes.clone(), errors.clone()
    _, saved = normalise(planes)
    normalise_backward(saved, errors)
    assert torch.equal(planes, kept)
    assert torch.equal(errors, kept_errors)


@pytest.mark.parametrize("method", POOLING_NAMES)
def test_autograd_goes_back_through_a_stage(method):
    outputs, errors = planes_of(8, scale=200).requires_grad_(), planes_of(4, seed=1)
    Stage(POOLINGS[method])(outputs).backward(errors)
    plain = outputs.detach().double().requires_grad_()
    plain_normalise(plain_pool(method, plain)).backward(errors.double())
    assert_close(outputs.grad.double(), plain.grad, rtol=1e-5, atol=1e-5)


# --- the whole network, untiled

CHANNELS, CLASSES, IMAGES = (4, 5, 6), 7, 4
UNTILED = Machine.build(channels=CHANNELS, tiles=(1, 1, 1))


class PlainNetwork(nn.Module):
    """Caffe's "Full" CIFAR-10 network in plain PyTorch, double precision, channels first."""

    def __init__(self, kernels, digital, pooling):
        super().__init__()
        self.convolutions = nn.ModuleList()
        c_in = 3
        for kernel_of_tile in kernels:
            (kernel,) = torch.from_numpy(kernel_of_tile).double()
            convolution = nn.Conv2d(c_in, kernel.shape[1], 5, padding=2)
            weight = kernel[:-1].reshape(5, 5, c_in, -1).permute(3, 2, 0, 1)
            convolution.weight = nn.Parameter(weight.contiguous())
            convolution.bias = nn.Parameter(kernel[-1].clone())
            self.convolutions.append(convolution)
            c_in = kernel.shape[1]
        pool = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}[pooling]
        self.pools = [pool(3, 2, ceil_mode=True), pool(3, 2, ceil_mode=True), nn.AvgPool2d(3, 2, ceil_mode=True)]
        self.head = nn.Linear(4 * 4 * c_in, len(digital["head.bias"]))
        rows = torch.from_numpy(digital["head.weight"]).double()  # (features, classes), features (y, x, channel)
        self.head.weight = nn.Parameter(self._transpose_head(rows, c_in))
        self.head.bias = nn.Parameter(torch.from_numpy(digital["head.bias"]).double())

    @staticmethod
    def _transpose_head(rows, c_in):
        return rows.reshape(4, 4, c_in, -1).permute(3, 2, 0, 1).flatten(1).contiguous()

    def forward(self, images):
        planes = images.double().permute(0, 3, 1, 2)
        for convolution, pool in zip(self.convolutions, self.pools, strict=True):
            planes = pool(convolution(planes).relu())
            planes = plain_normalise(planes.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(planes.flatten(1))

    def kernels(self):
        """The kernels as a tile holds them, (1, k + 1, c_out) per layer."""
        return [
            torch.cat((c.weight.permute(2, 3, 1, 0).flatten(0, 2), c.bias[None])).detach()[None]
            for c in self.convolutions
        ]

    def head_weight(self):
        return self.head.weight.detach().reshape(CLASSES, -1, 4, 4).permute(2, 3, 1, 0).flatten(0, 2)


def some_kernels(machine, seed=5):
    """Initial kernels with biases that are not zero, so that a lost bias is seen."""
    generator = np.random.default_rng(seed)
    kernels = initial_kernels(machine, seed)
    for kernel_of_tile in kernels:
        kernel_of_tile[:, -1] = generator.uniform(-0.2, 0.2, kernel_of_tile[:, -1].shape)
    return kernels


def some_digital(machine, seed=5):
    digital = initial_digital(machine, CLASSES, seed)
    digital["head.bias"] = np.random.default_rng(seed).uniform(-0.2, 0.2, CLASSES).astype(np.float32)
    return digital


def a_batch(step=0, scale=0.3):
    generator = np.random.default_rng(100 + step)
    pixels = generator.normal(scale=scale, size=(IMAGES, 32, 32, 3)).astype(np.float32)
    return torch.from_numpy(pixels), torch.from_numpy(generator.integers(0, CLASSES, IMAGES))


class Pair:
    """The same untiled network twice: on the fabric `serial`, and in plain PyTorch."""

    def __init__(self, fabric, pooling):
        kernels, digital = some_kernels(UNTILED), some_digital(UNTILED)
        self.fabric = fabric
        self.network = Network(fabric, pooling=pooling, digital=digital)
        self.plain = PlainNetwork(kernels, digital, pooling)
        self.assigner = Assigner(UNTILED, "none", seed=0)

    def step(self, number, update, scale=0.3, micro_batches=1):
        """Train both on one mini-batch; return both losses."""
        images, labels = a_batch(number, scale)
        routing = self.assigner.route_training(number, IMAGES, micro_batches)
        (result,) = train(self.network, [Step(images, labels, routing, update)])

        optimiser = torch.optim.SGD(self.plain.parameters(), update.learning_rate, weight_decay=update.weight_decay)
        optimiser.zero_grad()
        plain_loss = F.cross_entropy(self.plain(images), labels)
        plain_loss.backward()
        optimiser.step()
        return result.loss, plain_loss.item()

    def assert_same_weights(self, **tolerance):
        for layer, expected in zip(UNTILED.layers, self.plain.kernels(), strict=True):
            assert_close(torch.from_numpy(self.fabric.kernels(layer)).double(), expected, **tolerance)
        digital = self.network.digital_arrays()
        assert_close(torch.from_numpy(digital["head.weight"]).double(), self.plain.head_weight(), **tolerance)
        assert_close(torch.from_numpy(digital["head.bias"]).double(), self.plain.head.bias.detach(), **tolerance)


@pytest.fixture
def pair(request):
    with SerialFabric(UNTILED, IMAGES, some_kernels(UNTILED)) as fabric:
        yield Pair(fabric, request.param)


both_poolings = pytest.mark.parametrize("pair", POOLING_NAMES, indirect=True)


@both_poolings
def test_scores_of_the_untiled_network_are_those_of_plain_pytorch(pair):
    images, _ = a_batch(scale=300)  # so large that normalisation shows
    scores = pair.network(images, pair.assigner.for_training(0, IMAGES), None)
    assert_close(scores.double(), pair.plain(images), rtol=1e-4, atol=1e-3)


@both_poolings
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_one_step_of_the_untiled_network_is_that_of_plain_pytorch(pair, micro_batches):
    update = Update(learning_rate=1.0, weight_decay=0.1)  # so that gradients show
    loss, expected = pair.step(0, update, scale=3, micro_batches=micro_batches)
    assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    pair.assert_same_weights(rtol=1e-4, atol=1e-5)


@both_poolings
def test_ten_steps_of_the_untiled_network_follow_plain_pytorch(pair):
    for number in range(10):
        loss, expected = pair.step(number, Update(learning_rate=0.05, weight_decay=1e-2), micro_batches=2)
        assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    pair.assert_same_weights(rtol=1e-3, atol=1e-4)


def test_without_an_update_a_backward_pass_changes_no_weight():
    kernels, digital = some_kernels(UNTILED), some_digital(UNTILED)
    images, labels = a_batch()
    with SerialFabric(UNTILED, IMAGES, kernels) as fabric:
        network = Network(fabric, pooling="max", digital=digital)
        scores = network(images, Assigner(UNTILED, "none", seed=0).for_test(0, 0, IMAGES), None)
        F.cross_entropy(scores, labels).backward()
        for layer, kernel in zip(UNTILED.layers, kernels, strict=True):
            assert np.array_equal(fabric.kernels(layer), kernel)
        assert np.array_equal(network.digital_arrays()["head.weight"], digital["head.weight"])


@pytest.mark.parametrize("pooling", POOLING_NAMES)
def test_a_tiled_network_of_equal_kernels_has_the_scores_of_the_untiled_one(pooling):
    tiled = Machine.build(channels=CHANNELS, tiles=(16, 4, 1))
    kernels, digital = some_kernels(UNTILED), some_digital(UNTILED)
    replicas = [np.repeat(k, layer.n_tiles, axis=0) for k, layer in zip(kernels, tiled.layers, strict=True)]
    images, _ = a_batch()
    with SerialFabric(tiled, IMAGES, replicas) as fabric:
        network = Network(fabric, pooling=pooling, digital=digital)
        scores = network(images, Assigner(tiled, "random", seed=0).for_test(0, 0, IMAGES), None)
    assert_close(scores.double(), PlainNetwork(kernels, digital, pooling)(images), rtol=1e-4, atol=1e-5)


def test_the_network_does_not_write_to_the_parameters_it_was_given():
    digital = some_digital(UNTILED)
    kept = {name: value.copy() for name, value in digital.items()}
    with SerialFabric(UNTILED, IMAGES, some_kernels(UNTILED)) as fabric:
        network = Network(fabric, pooling="max", digital=digital)
        images, labels = a_batch()
        update = Update(0.05, 1e-4)
        assignments = Assigner(UNTILED, "none", seed=0).for_training(0, IMAGES)
        F.cross_entropy(network(images, assignments, update), labels).backward()
        network.update_digital(update)
        assert not np.array_equal(network.digital_arrays()["head.weight"], kept["head.weight"])
    for name, value in digital.items():
        assert np.array_equal(value, kept[name])


# --- initial weights

TILED = Machine.build(channels=(32, 32, 64), tiles=(16, 4, 1))


def test_initial_kernels_are_uniform_within_the_bound_of_xavier():
    for layer, kernels in zip(TILED.layers, initial_kernels(TILED, seed=0), strict=True):
        weights = kernels[:, :-1].astype(np.float64).ravel()
        bound = np.sqrt(3 / layer.k)
        assert kernels.dtype == np.float32
        assert np.abs(weights).max() <= np.float32(bound)
        assert np.abs(weights).max() > (1 - 20 / weights.size) * bound  # missed once in 10⁹
        for power, moment in ((1, 0), (2, bound**2 / 3), (3, 0), (4, bound**4 / 5)):
            spread = np.sqrt(bound ** (2 * power) / (2 * power + 1) - moment**2) / np.sqrt(weights.size)
            assert abs(np.mean(weights**power) - moment) < 5 * spread


def test_initial_biases_are_zero():
    for kernels in initial_kernels(TILED, seed=0):
        assert not kernels[:, -1].any()
    assert not initial_digital(TILED, 10, seed=0)["head.bias"].any()


def test_the_initial_kernels_of_two_tiles_are_independent():
    for layer, kernels in zip(TILED.layers, initial_kernels(TILED, seed=0), strict=True):
        flat = kernels[:, :-1].reshape(layer.n_tiles, -1).astype(np.float64)
        correlation = np.corrcoef(flat).reshape(layer.n_tiles, layer.n_tiles)
        others = correlation[~np.eye(layer.n_tiles, dtype=bool)]
        assert (np.abs(others) < 5 / np.sqrt(flat.shape[1])).all()


def test_the_initial_kernels_of_layers_of_one_shape_differ():
    machine = Machine.build(channels=(3, 3, 3), tiles=(1, 1, 1))
    first, second, third = initial_kernels(machine, seed=0)
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)


def test_an_initial_kernel_is_a_function_of_seed_layer_and_tile_alone():
    fewer = Machine.build(channels=(32, 32, 64), tiles=(4, 2, 1))
    for many, few in zip(initial_kernels(TILED, seed=1), initial_kernels(fewer, seed=1), strict=True):
        assert np.array_equal(many[: len(few)], few)


def test_another_seed_draws_other_weights():
    for one, other in zip(initial_kernels(TILED, seed=0), initial_kernels(TILED, seed=1), strict=True):
        assert not np.array_equal(one, other)
    one, other = (initial_digital(TILED, 10, seed)["head.weight"] for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_the_head_is_drawn_like_a_kernel():
    weight = initial_digital(TILED, 10, seed=0)["head.weight"]
    assert weight.shape == (1024, 10)
    assert weight.dtype == np.float32
    bound = np.sqrt(3 / 1024)
    assert np.abs(weight).max() <= np.float32(bound)
    assert np.abs(weight).max() > 0.99 * bound
