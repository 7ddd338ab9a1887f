"""The fabric `batched` against `serial`, step by step; several networks at once against each by itself."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from rapa_dist.assignment import SCHEMES
from rapa_dist.config import POOLING_NAMES
from rapa_dist.coordinator.assigner import Assigner
from rapa_dist.coordinator.session import one_digital_thread
from rapa_dist.fabric.batched import BatchedFabric, compute_in_float32
from rapa_dist.fabric.serial import SerialFabric
from rapa_dist.machine import Machine
from rapa_dist.network.batched import BatchedNetwork
from rapa_dist.network.draws import pooling_draws
from rapa_dist.network.model import Network, initial_digital, initial_kernels
from rapa_dist.network.pipeline import Step
from rapa_dist.tile import Update, Word

CHANNELS, CLASSES, IMAGES, STEPS = (4, 5, 6), 7, 4, 20
TILES = {"none": (1, 1, 1), "random": (6, 3, 1), "random-fixed": (6, 3, 1)}
"""6 and 3 divide no layer, nor do the 3 × 3 regions of the square schemes: some tiles have a row less."""


@pytest.fixture(autouse=True)
def _one_thread():
    """As in a run; threads of PyTorch's that wait for a core they share take a hundred times as long."""
    with one_digital_thread():
        yield


def machine_of(scheme):
    tiles = TILES.get(scheme, (9, 4, 1))
    return Machine.build(channels=CHANNELS, tiles=tiles, perforated=scheme == "perforated")


def step_of(machine, scheme, pooling, number, seed=0, images=IMAGES, parts=1, rate=0.05):
    generator = np.random.default_rng((seed, number))
    pixels = generator.normal(scale=0.5, size=(images, 32, 32, 3)).astype(np.float32)
    return Step(
        torch.from_numpy(pixels),
        torch.from_numpy(generator.integers(0, CLASSES, images)),
        Assigner(machine, scheme, seed).route_training(number, images, parts),
        Update(rate, 0.01),
        pooling_draws(machine, pooling, seed, number, images),
    )


def weights_of(fabric, network):
    return {f"layer {i}": kernel for i, kernel in enumerate(fabric.all_kernels())} | network.digital_arrays()


def batched(machine, pooling, seeds=(0,)):
    fabric = BatchedFabric(machine, IMAGES, [initial_kernels(machine, seed) for seed in seeds])
    digital = [initial_digital(machine, CLASSES, seed, pooling) for seed in seeds]
    return fabric, BatchedNetwork(fabric, pooling=pooling, digital=digital)


class Followed:
    """Twenty steps on the fabric `serial`, a test, and what the tiles have counted."""

    def __init__(self, scheme, pooling, nudge=0.0):
        machine = machine_of(scheme)
        rng = np.random.default_rng(17)
        kernels = [
            k * (1 + nudge * rng.choice([-1, 1], k.shape)).astype(np.float32) for k in initial_kernels(machine, 0)
        ]
        with SerialFabric(machine, IMAGES, kernels) as fabric:
            network = Network(fabric, pooling=pooling, digital=initial_digital(machine, CLASSES, 0, pooling))
            self.results, self.numbers, self.counts = follow(fabric, network, scheme, pooling)


def follow(fabric, network, scheme, pooling):
    """Return the results of twenty steps, all numbers that they led to, and what the tiles have counted."""
    machine = fabric.machine
    results = list(network.train(step_of(machine, scheme, pooling, number) for number in range(STEPS)))
    route = Assigner(machine, scheme, 0).route_test(STEPS, 0, IMAGES, 0, 1)
    scores = network.classify(step_of(machine, scheme, pooling, 99).images, route)
    losses = np.array([result.loss for result in results])
    numbers = weights_of(fabric, network) | {"scores": scores.numpy(), "losses": losses}
    counts = [
        list(cells.words[Word.ROWS_FORWARD : Word.UPDATES + 1])
        for layer in machine.layers
        for cells in fabric.cells(layer.index)
    ]
    return results, numbers, counts


@pytest.mark.parametrize("pooling", POOLING_NAMES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_batched_follows_serial_for_twenty_steps_within_rounding(scheme, pooling):
    """Where an activation is so close to 0 that rounding decides on its error, `serial` says how far that leads."""
    results, numbers, counts = follow(*batched(machine_of(scheme), pooling), scheme, pooling)
    serial, nudged = Followed(scheme, pooling), Followed(scheme, pooling, nudge=1e-7)
    assert len(results) == STEPS
    assert [result[1:] for result in results] == [result[1:] for result in serial.results]
    assert counts == serial.counts
    for name, expected in serial.numbers.items():
        allowed = 1e-5 + 3 * abs(nudged.numbers[name] - expected).max()
        assert allowed < 0.02
        np.testing.assert_allclose(numbers[name], expected, rtol=1e-5, atol=allowed, err_msg=name)


@pytest.mark.parametrize("pooling", ["mixed", "stochastic"])
@pytest.mark.parametrize("scheme", ["random", "perforated", "image-pad"])
def test_several_networks_at_once_are_each_the_one_by_itself(scheme, pooling):
    """Each with its own seed, images, assignments, draws and learning rate, and with counts of its own."""
    machine, seeds, rates = machine_of(scheme), (0, 3, 4), (0.05, 0.02, 0.1)
    _, network = batched(machine, pooling, seeds)
    ones = [network.alone(i) for i in range(len(seeds))]
    sizes = (IMAGES, IMAGES, 3)  # the last mini-batch of an epoch may be smaller
    together = list(
        network.train_together(
            [
                step_of(machine, scheme, pooling, number, seed, size, rate=rate)
                for seed, rate in zip(seeds, rates, strict=True)
            ]
            for number, size in enumerate(sizes)
        )
    )
    images = step_of(machine, scheme, pooling, 99).images
    for i, (one, seed, rate) in enumerate(zip(ones, seeds, rates, strict=True)):
        own_fabric, alone = batched(machine, pooling, [seed])
        steps = (step_of(machine, scheme, pooling, n, seed, size, rate=rate) for n, size in enumerate(sizes))
        for (loss, *counts), of_all in zip(alone.train(steps), together, strict=True):
            assert of_all[i].loss == pytest.approx(loss, rel=1e-5)
            assert list(of_all[i][1:]) == counts
        test = Assigner(machine, scheme, seed).route_test(3, 0, IMAGES, 0, 1)
        assert_close(one.classify(images, test), alone.classify(images, test), rtol=1e-4, atol=1e-5)
        own = weights_of(own_fabric, alone)
        for name, weight in weights_of(one.fabric, one).items():
            assert_close(weight, own[name], rtol=1e-4, atol=1e-5)
        for tile, same in zip(one.fabric.stats(), own_fabric.stats(), strict=True):
            assert (tile.rows_forward, tile.rows_update, tile.last_step) == (
                same.rows_forward,
                same.rows_update,
                same.last_step,
            )


def test_a_test_in_the_middle_and_mini_batches_of_other_sizes_leave_no_trace():
    machine = machine_of("image-pad")
    disturbed, plain = batched(machine, "max"), batched(machine, "max")
    images = step_of(machine, "image-pad", "max", 99, images=3).images
    route = Assigner(machine, "image-pad", 0).route_test(1, 0, 3, 0, 1)
    for number in range(3):
        for _, network in (disturbed, plain):
            list(network.train([step_of(machine, "image-pad", "max", number)]))
        disturbed[1].classify(images, route)
    for name, weight in weights_of(*disturbed).items():
        assert np.array_equal(weight, weights_of(*plain)[name])


def test_memory_that_a_cuda_graph_writes_to_stays_although_a_mini_batch_of_more_patches_is_computed():
    """As in a test of two perforated networks: as many images, more rows, other memory."""
    machine, seeds = Machine.build(channels=CHANNELS, tiles=(16, 4, 1), perforated=True), (0, 1)
    _, network = batched(machine, "max", seeds)
    (convolution, *_) = network._convolutions_for(len(seeds) * IMAGES)

    def train(number):
        list(network.train_together([[step_of(machine, "perforated", "max", number, seed) for seed in seeds]]))
        return convolution._patches

    before = train(0)
    all_patches = [Assigner(machine, "perforated", seed).route_test(1, 0, IMAGES, 0, 1).whole for seed in seeds]
    images = torch.zeros(len(seeds) * IMAGES, 32, 32, 3)
    convolution.forward(images, network._slots_of(all_patches, machine.layers[0]))
    assert len(convolution._patches) > len(before)
    assert train(1) is before


def test_a_gpu_computes_convolutions_in_float32_and_every_time_alike():
    """On the CPU alone: what is set, not what a GPU makes of it."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = products.allow_tf32
    try:
        with cudnn.flags(allow_tf32=True, deterministic=False):
            products.allow_tf32 = True
            compute_in_float32()
            assert (cudnn.allow_tf32, products.allow_tf32, cudnn.deterministic) == (False, False, True)
    finally:
        products.allow_tf32 = before
