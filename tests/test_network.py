"""The paper's network as runs have it: its machine, its first weights, and that equal kernels change nothing."""

import numpy as np
import pytest
from factories import initial_digital
from learners import batch, learner, weights
from oracle import Oracle
from torch.testing import assert_close

from rapa_dist.config import POOLING_NAMES
from rapa_dist.errors import UsageError
from rapa_dist.initial import initial_kernels
from rapa_dist.machine import Machine
from rapa_dist.networks.paper import PaperNetwork
from rapa_dist.nn.convert import convert
from rapa_dist.nn.record import record
from rapa_dist.nn.schedule import Step
from rapa_dist.schemes import SCHEMES

CHANNELS, CLASSES, IMAGES = (4, 5, 6), 7, 4
SMALL = {"channels": CHANNELS, "classes": CLASSES, "images": IMAGES}


def some_weights(tiles, pooling="max"):
    """Kernels of so many equal tiles, and digital parameters; biases are not zero, so that a lost one is seen."""
    untiled, rng = Machine.build(channels=CHANNELS, tiles=(1, 1, 1)), np.random.default_rng(5)
    kernels, digital = initial_kernels(untiled, 5), initial_digital(untiled, CLASSES, 5, pooling)
    for bias in (*(kernel[:, -1] for kernel in kernels), digital["head.bias"]):
        bias[:] = rng.uniform(-0.2, 0.2, bias.shape)
    return {
        "kernels": [np.repeat(one, n_tiles, axis=0) for one, n_tiles in zip(kernels, tiles, strict=True)],
        "digital": digital,
    }


@pytest.mark.parametrize("fabric", ["serial", "batched"])
@pytest.mark.parametrize("tiles", [(1, 1, 1), (16, 4, 1)])
@pytest.mark.parametrize("pooling", POOLING_NAMES)
def test_equal_kernels_have_the_scores_of_the_untiled_network(pooling, tiles, fabric):
    start = some_weights(tiles, pooling)
    images, _ = batch(0, IMAGES, scale=300)  # so large that normalisation shows
    with learner(fabric, tiles=tiles, pooling=pooling, **SMALL, **start) as tiled:
        scores = tiled.classify(images, (0, 0, 0))
    plain = Oracle("none", pooling, [kernels[:1] for kernels in start["kernels"]], start["digital"])
    expected = plain.scores(images, [np.zeros(IMAGES * side**2, int) for side in (32, 16, 8)]).detach()
    assert_close(scores.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("fabric", ["serial", "batched"])
def test_training_does_not_write_to_the_weights_it_began_with(fabric):
    start = some_weights((4, 1, 1))
    kept = [kernels.copy() for kernels in start["kernels"]] + [value.copy() for value in start["digital"].values()]
    with learner(fabric, tiles=(4, 1, 1), **SMALL, **start) as trained:
        list(trained.train([Step(0, *batch(0, IMAGES), 0.05)]))
        assert not any(map(np.array_equal, weights(trained).values(), kept))
    assert all(map(np.array_equal, [*start["kernels"], *start["digital"].values()], kept))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_machine_of_a_configuration_is_what_images_meet(scheme):
    tiles = (1, 1, 1) if scheme == "none" else (16, 4, 1)
    network = PaperNetwork(CLASSES, (3, 32, 32), channels=CHANNELS)
    convert(network, tiles=tiles, scheme=scheme)
    recording = record(network, (IMAGES, 3, 32, 32))
    assert recording.machine == Machine.build(channels=CHANNELS, tiles=tiles, scheme=scheme)
    assert recording.first == 0


def test_digital_parameters_start_as_tiles_do():
    network = PaperNetwork(CLASSES, (3, 32, 32), channels=CHANNELS, pooling="mixed", seed=5)
    start = initial_digital(Machine.build(channels=CHANNELS, tiles=(1, 1, 1)), CLASSES, 5, "mixed")
    drawn = {name: p.detach().numpy() for name, p in network.named_parameters() if not name.startswith("conv")}
    assert drawn.keys() == start.keys()
    assert all(np.array_equal(drawn[name], start[name]) for name in start)


def test_pooling_that_leaves_no_pixels_is_refused():
    with pytest.raises(
        UsageError, match=r"--channels has 3 layers, but pooling leaves no pixels after 2\. Use at most 2"
    ):
        PaperNetwork(CLASSES, (3, 4, 9), channels=CHANNELS)


# --- initial weights

TILED = Machine.build(channels=(32, 32, 64), tiles=(16, 4, 1))


def test_initial_kernels_are_uniform_within_the_bound_of_xavier():
    for layer, kernels in zip(TILED.arrays, initial_kernels(TILED, seed=0), strict=True):
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
    for layer, kernels in zip(TILED.arrays, initial_kernels(TILED, seed=0), strict=True):
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
    assert weight.shape == (10, 1024)
    assert weight.dtype == np.float32
    bound = np.sqrt(3 / 1024)
    assert np.abs(weight).max() <= np.float32(bound)
    assert np.abs(weight).max() > 0.99 * bound
