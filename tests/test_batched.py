"""The fabric `batched` beside `serial`: what its tiles count; that tests leave no trace; and what a GPU is told."""

import numpy as np
import pytest
import torch
from learners import batch, learner, weights

from rapa_dist.coordinator.session import one_digital_thread
from rapa_dist.fabric.batched import compute_in_float32
from rapa_dist.nn.schedule import Step
from rapa_dist.schemes import SCHEMES

IMAGES = 4
TILES = {"none": (1, 1, 1), "random": (6, 3, 1), "random-fixed": (6, 3, 1)}
"""6 and 3 divide no layer, nor do the 3 × 3 regions of the square schemes: some tiles have a row less."""


@pytest.fixture(autouse=True)
def _one_thread():
    """As in a run; threads of PyTorch's that wait for a core they share take a hundred times as long."""
    with one_digital_thread():
        yield


def network(fabric, scheme, pooling="max"):
    return learner(fabric, tiles=TILES.get(scheme, (9, 4, 1)), scheme=scheme, pooling=pooling, images=IMAGES)


def train(ours, *numbers):
    return list(ours.train(Step(number, *batch(number, IMAGES, scale=0.5), 0.05) for number in numbers))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tiles_count_the_same_rows_as_on_serial(scheme):
    """What they compute is in test_wrong_network.py."""
    found = []
    for fabric in ("serial", "batched"):
        with network(fabric, scheme) as ours:
            results = train(ours, 0, 1, 2)
            ours.classify(batch(99, IMAGES)[0], (3, 0, 0))
            counts = [
                (tile.tile, tile.rows_forward, tile.rows_backward, tile.rows_update, tile.updates, tile.last_step)
                for tile in ours.session.fabric.stats()
            ]
            found.append(([result[1:] for result in results], counts))
    assert found[0] == found[1]


def test_a_test_in_the_middle_leaves_no_trace():
    with network("batched", "image-pad") as disturbed, network("batched", "image-pad") as plain:
        for number in range(3):
            assert train(disturbed, number) == train(plain, number)
            disturbed.classify(batch(99, 3)[0], (number, 0, 0))
        for name, weight in weights(disturbed).items():
            assert np.array_equal(weight, weights(plain)[name])


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
