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
from rapa_dist.network.draws import pooling_draws
from rapa_dist.network.model import Network, initial_digital, initial_kernels
from rapa_dist.network.normalisation import normalise, normalise_backward
from rapa_dist.network.pipeline import Step, train
from rapa_dist.network.pooling import POOLINGS, make_pooling
from rapa_dist.network.stage import Stage
from rapa_dist.tile import Update


def planes_of(side, images=2, channels=3, scale=1.0, seed=0):
    values = np.random.default_rng(seed).normal(scale=scale, size=(images, side, side, channels))
    return torch.from_numpy(values.astype(np.float32))


FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}

# --- pooling

BETA = torch.tensor([0.2, -0.1, 0.05])


def a_pooling(method, channels=3):
    return make_pooling(method, 0, {"pool.0.beta": BETA[:channels].clone()})


def windows(planes):
    """Yield (y, x, window) of Caffe's 3×3 windows with stride 2, each cut off at the edge."""
    side = planes.shape[1]
    pooled = -(-(side - 3) // 2) + 1
    for y in range(pooled):
        for x in range(pooled):
            yield y, x, planes[:, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3]


def largest(window, beta, draw):
    return window.amax(dim=(1, 2))


def mean(window, beta, draw):
    return window.mean(dim=(1, 2))


def mixture(window, beta, draw):
    alpha = 1 / (1 + torch.exp(10 * beta))
    return alpha * mean(window, beta, draw) + (1 - alpha) * largest(window, beta, draw)


def drawn_or_expected(window, beta, draw):
    """Zeiler & Fergus: with probability a / Σ a the activation a; without a draw the expectation."""
    activations = window.flatten(1, 2)  # (images, pixels, channels)
    total = activations.sum(dim=1)
    if draw is None:
        return (activations**2).sum(dim=1) / total.clamp_min(1e-30)
    result = []
    for image, channel in np.ndindex(*draw.shape):
        reached = torch.cumsum(activations[image, :, channel], dim=0) > draw[image, channel] * total[image, channel]
        first = int(reached.nonzero()[0]) if reached.any() else 0  # if none is above 0, any will do
        result.append(activations[image, first, channel])
    return torch.stack(result).reshape(draw.shape)


OF_WINDOW = {"max": largest, "average": mean, "stochastic": drawn_or_expected, "mixed": mixture}


def plain_pool(method, planes, beta=None, draws=None):
    """Pooling, window by window; any precision, and autograd goes back through it."""
    pooled = {
        (y, x): OF_WINDOW[method](window, beta, None if draws is None else draws[:, y, x])
        for y, x, window in windows(planes)
    }
    side = round(len(pooled) ** 0.5)
    return torch.stack([torch.stack([pooled[y, x] for x in range(side)], dim=1) for y in range(side)], dim=1)


@pytest.mark.parametrize("side", [32, 16, 8, 7, 5])
@pytest.mark.parametrize("method", POOLING_NAMES)
def test_pooling_is_over_what_is_inside_of_every_window(method, side):
    planes, pooling = planes_of(side), a_pooling(method)
    planes = planes.relu() if method == "stochastic" else planes
    plain, beta = planes.double().requires_grad_(), BETA.double().requires_grad_()
    expected = plain_pool(method, plain, beta)
    pooled, saved = pooling.forward(planes)
    assert_close(pooled.double(), expected.detach(), **FLOAT32)
    errors = planes_of(pooled.shape[1], seed=1)
    expected.backward(errors.double())
    assert_close(pooling.backward(saved, errors).double(), plain.grad, **FLOAT32)
    if method == "mixed":
        assert_close(pooling.beta.grad.double(), beta.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [32, 8, 7, 5])
def test_stochastic_pooling_gives_the_activation_that_was_drawn_and_the_error_to_it(side):
    planes, pooling = planes_of(side), a_pooling("stochastic")
    plain, planes = planes.double().requires_grad_(), planes.relu()
    pooled_shape = pooling.forward(planes)[0].shape
    draws = torch.from_numpy(np.random.default_rng(3).random(pooled_shape, np.float32))
    expected = plain_pool("stochastic", plain.relu(), draws=draws.double())
    pooled, saved = pooling.forward(planes, draws)
    assert_close(pooled.double(), expected.detach(), **FLOAT32)
    errors = planes_of(pooled.shape[1], seed=1)
    expected.backward(errors.double())
    assert_close(pooling.backward(saved, errors).double() * (planes > 0), plain.grad, **FLOAT32)


def test_stochastic_pooling_draws_in_proportion_to_the_activations():
    window = torch.tensor([[1.0, 2.0, 0.0], [0.0, 4.0, 0.0], [0.5, 2.5, 0.0]])
    n_draws = 100_000
    planes = window.view(1, 3, 3, 1).expand(n_draws, 3, 3, 1)
    draws = torch.from_numpy(np.random.default_rng(0).random((n_draws, 1, 1, 1), np.float32))
    pooled, _ = a_pooling("stochastic", 1).forward(planes, draws)
    for activation, probability in ((1, 0.1), (2, 0.2), (4, 0.4), (0.5, 0.05), (2.5, 0.25)):
        share = (pooled == activation).double().mean().item()
        assert abs(share - probability) < 5 * np.sqrt(probability * (1 - probability) / n_draws)
    expected, _ = a_pooling("stochastic", 1).forward(planes[:1])
    assert expected.item() == pytest.approx((1 + 4 + 16 + 0.25 + 6.25) / 10)
    assert abs(pooled.mean().item() - expected.item()) < 0.02


@pytest.mark.parametrize("draws", [None, torch.full((1, 4, 4, 1), 0.999)])
def test_stochastic_pooling_of_windows_without_activation_gives_zeros_and_no_error(draws):
    pooling = a_pooling("stochastic", 1)
    pooled, saved = pooling.forward(torch.zeros(1, 8, 8, 1), draws)
    assert not pooled.any()
    assert not pooling.backward(saved, torch.ones(1, 4, 4, 1)).any()


def test_draws_of_stochastic_pooling_are_a_function_of_seed_layer_and_step():
    first = pooling_draws(UNTILED, "stochastic", 0, 5, IMAGES)
    assert [tuple(draws.shape) for draws in first] == [(IMAGES, 16, 16, 4), (IMAGES, 8, 8, 5)]
    assert all(draws.min() >= 0 and draws.max() < 1 and abs(draws.mean() - 0.5) < 0.05 for draws in first)
    assert all(map(torch.equal, first, pooling_draws(UNTILED, "stochastic", 0, 5, IMAGES)))
    for other in (pooling_draws(UNTILED, "stochastic", 0, 6, IMAGES), pooling_draws(UNTILED, "stochastic", 1, 5, 4)):
        assert not any(map(torch.equal, first, other))
    assert pooling_draws(UNTILED, "max", 0, 5, IMAGES) == ()


def test_mixed_pooling_starts_with_a_share_of_88_percent_for_the_maximum():
    (beta, _) = (v for k, v in initial_digital(UNTILED, CLASSES, 0, "mixed").items() if k.startswith("pool"))
    planes = planes_of(8, channels=4)
    mixed = make_pooling("mixed", 0, {"pool.0.beta": torch.from_numpy(beta)}).forward(planes)[0]
    largest_, mean_ = a_pooling("max").forward(planes)[0], a_pooling("average").forward(planes)[0]
    assert_close(mixed, 0.8808 * largest_ + 0.1192 * mean_, rtol=1e-3, atol=1e-4)


def test_an_edge_window_averages_over_the_pixels_that_there_are():
    pooled, _ = a_pooling("average").forward(torch.ones(1, 8, 8, 1))
    assert_close(pooled, torch.ones(1, 4, 4, 1))


@pytest.mark.parametrize("method", POOLING_NAMES)
def test_pooling_changes_neither_its_input_nor_the_errors(method):
    planes, errors = planes_of(8), planes_of(4, seed=1)
    kept, kept_errors = planes.clone(), errors.clone()
    pooling = a_pooling(method)
    _, saved = pooling.forward(planes)
    pooling.backward(saved, errors)
    assert torch.equal(planes, kept)
    assert torch.equal(errors, kept_errors)


def test_every_pooling_that_can_be_asked_for_exists():
    assert POOLINGS == POOLING_NAMES


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


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("method", POOLING_NAMES)
def test_autograd_goes_back_through_a_stage(method, first):
    outputs, errors = planes_of(8, scale=200), planes_of(4, seed=1)
    outputs = (outputs if first or method != "stochastic" else outputs.abs()).requires_grad_()
    Stage(a_pooling(method), relu_first=first)(outputs).backward(errors)
    plain = outputs.detach().double().requires_grad_()
    pooled = plain_pool(method, plain.relu() if first else plain, BETA.double())
    plain_normalise(pooled.relu()).backward(errors.double())
    assert_close(outputs.grad.double(), plain.grad, rtol=1e-5, atol=1e-5)


def test_a_stage_changes_neither_its_input_nor_the_errors():
    for first in (True, False):
        outputs, errors = planes_of(8), planes_of(4, seed=1)
        kept, kept_errors = outputs.clone(), errors.clone()
        stage = Stage(a_pooling("mixed"), relu_first=first)
        _, saved = stage.forward(outputs)
        stage.backward(saved, errors)
        assert torch.equal(outputs, kept)
        assert torch.equal(errors, kept_errors)


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
        self.pooling = pooling
        self.betas = nn.ParameterList(
            torch.from_numpy(digital[f"pool.{i}.beta"]).double() for i in range(2) if f"pool.{i}.beta" in digital
        )
        self.head = nn.Linear(4 * 4 * c_in, len(digital["head.bias"]))
        rows = torch.from_numpy(digital["head.weight"]).double()  # (features, classes), features (y, x, channel)
        self.head.weight = nn.Parameter(self._transpose_head(rows, c_in))
        self.head.bias = nn.Parameter(torch.from_numpy(digital["head.bias"]).double())

    @staticmethod
    def _transpose_head(rows, c_in):
        return rows.reshape(4, 4, c_in, -1).permute(3, 2, 0, 1).flatten(1).contiguous()

    def pool(self, layer, planes, draws):
        """Pool planes with channels first, in the first layer before ReLU; two methods are PyTorch's own."""
        if layer == 0 and self.pooling != "stochastic":
            return self._pool(layer, planes, draws).relu()
        return self._pool(layer, planes.relu(), draws)

    def _pool(self, layer, planes, draws):
        if layer == 2 or self.pooling == "average":
            return F.avg_pool2d(planes, 3, 2, ceil_mode=True)
        if self.pooling == "max":
            return F.max_pool2d(planes, 3, 2, ceil_mode=True)
        beta = self.betas[layer] if self.betas else None
        drawn = draws[layer].double() if draws else None
        return plain_pool(self.pooling, planes.permute(0, 2, 3, 1), beta, drawn).permute(0, 3, 1, 2)

    def forward(self, images, draws=()):
        planes = images.double().permute(0, 3, 1, 2)
        for layer, convolution in enumerate(self.convolutions):
            planes = self.pool(layer, convolution(planes), draws)
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


def some_digital(machine, seed=5, pooling="max"):
    digital = initial_digital(machine, CLASSES, seed, pooling)
    digital["head.bias"] = np.random.default_rng(seed).uniform(-0.2, 0.2, CLASSES).astype(np.float32)
    return digital


def a_batch(step=0, scale=0.3):
    generator = np.random.default_rng(100 + step)
    pixels = generator.normal(scale=scale, size=(IMAGES, 32, 32, 3)).astype(np.float32)
    return torch.from_numpy(pixels), torch.from_numpy(generator.integers(0, CLASSES, IMAGES))


class Pair:
    """The same untiled network twice: on the fabric `serial`, and in plain PyTorch."""

    def __init__(self, fabric, pooling):
        kernels, digital = some_kernels(UNTILED), some_digital(UNTILED, pooling=pooling)
        self.pooling = pooling
        self.fabric = fabric
        self.network = Network(fabric, pooling=pooling, digital=digital)
        self.plain = PlainNetwork(kernels, digital, pooling)
        self.assigner = Assigner(UNTILED, "none", seed=0)

    def step(self, number, update, scale=0.3, micro_batches=1):
        """Train both on one mini-batch; return both losses."""
        images, labels = a_batch(number, scale)
        routing = self.assigner.route_training(number, IMAGES, micro_batches)
        draws = pooling_draws(UNTILED, self.pooling, 0, number, IMAGES)
        (result,) = train(self.network, [Step(images, labels, routing, update, draws)])

        optimiser = torch.optim.SGD(self.plain.parameters(), update.learning_rate, weight_decay=update.weight_decay)
        optimiser.zero_grad()
        plain_loss = F.cross_entropy(self.plain(images, draws), labels)
        plain_loss.backward()
        optimiser.step()
        return result.loss, plain_loss.item()

    def assert_same_weights(self, **tolerance):
        for layer, expected in zip(UNTILED.layers, self.plain.kernels(), strict=True):
            assert_close(torch.from_numpy(self.fabric.kernels(layer)).double(), expected, **tolerance)
        digital = self.network.digital_arrays()
        assert_close(torch.from_numpy(digital["head.weight"]).double(), self.plain.head_weight(), **tolerance)
        assert_close(torch.from_numpy(digital["head.bias"]).double(), self.plain.head.bias.detach(), **tolerance)
        for layer, beta in enumerate(self.plain.betas):
            assert_close(torch.from_numpy(digital[f"pool.{layer}.beta"]).double(), beta.detach(), **tolerance)


@pytest.fixture
def pair(request):
    with SerialFabric(UNTILED, IMAGES, some_kernels(UNTILED)) as fabric:
        yield Pair(fabric, request.param)


all_poolings = pytest.mark.parametrize("pair", POOLING_NAMES, indirect=True)


@all_poolings
def test_scores_of_the_untiled_network_are_those_of_plain_pytorch(pair):
    images, _ = a_batch(scale=300)  # so large that normalisation shows
    scores = pair.network(images, pair.assigner.for_training(0, IMAGES), None)
    assert_close(scores.double(), pair.plain(images), rtol=1e-4, atol=1e-3)


@all_poolings
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_one_step_of_the_untiled_network_is_that_of_plain_pytorch(pair, micro_batches):
    update = Update(learning_rate=1.0, weight_decay=0.1)  # so that gradients show
    loss, expected = pair.step(0, update, scale=3, micro_batches=micro_batches)
    assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    pair.assert_same_weights(rtol=1e-4, atol=1e-5)


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
    kernels, digital = some_kernels(UNTILED), some_digital(UNTILED, pooling=pooling)
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
