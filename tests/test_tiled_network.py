"""A whole tiled network of distinct kernels, against one written out in double precision with autograd.

Layer by layer this is tested elsewhere; here are the assignments of a run, the passage of errors from layer to layer,
the order of features in the head, and the updates of all of it over some steps.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rapa_dist.assignment import region_mask, tile_map
from rapa_dist.coordinator.assigner import Assigner
from rapa_dist.coordinator.session import one_digital_thread
from rapa_dist.fabric.batched import BatchedFabric
from rapa_dist.fabric.serial import SerialFabric
from rapa_dist.machine import Machine
from rapa_dist.network.batched import BatchedNetwork
from rapa_dist.network.model import Network, initial_digital, initial_kernels
from rapa_dist.network.pipeline import Step
from rapa_dist.tile import Update

CHANNELS, CLASSES, IMAGES, STEPS = (4, 5, 6), 7, 3, 3
RATE, DECAY = 0.05, 0.1
SCHEMES = ("random", "random-fixed", "alternate", "image-overlap", "image-pad", "perforated")


def machine_of(scheme):
    return Machine.build(channels=CHANNELS, tiles=(16, 4, 1), perforated=scheme == "perforated")


def a_batch(step):
    rng = np.random.default_rng((3, step))
    return rng.normal(scale=0.4, size=(IMAGES, 32, 32, 3)).astype(np.float32), rng.integers(0, CLASSES, IMAGES)


def tiles_of_patches(assignment, n_tiles):
    """Return the tile of every patch, -1 where it is dropped."""
    tiles = np.full(assignment.n_patches, -1)
    for tile in range(n_tiles):
        tiles[assignment.order[assignment.offsets[tile] : assignment.offsets[tile + 1]]] = tile
    return tiles


class Explicit:
    """Every patch times the kernel of its tile; gradients and updates are autograd's."""

    def __init__(self, scheme, kernels, digital):
        self.scheme = scheme
        self.kernels = [torch.from_numpy(of_layer).double().requires_grad_() for of_layer in kernels]
        self.head = [torch.from_numpy(digital[name]).double().requires_grad_() for name in ("head.weight", "head.bias")]

    def convolve(self, planes, kernels, tiles):
        """Return (images, c_out, side, side) for planes (images, c_in, side, side)."""
        images, c_in, side, _ = planes.shape
        patches = F.unfold(planes, 5, padding=2).view(images, c_in, 25, side * side)
        if self.scheme == "image-pad":
            seen = region_mask(tile_map("image-pad", len(kernels), side), side, 5)
            patches = patches * torch.from_numpy(seen).T.double()
        rows = patches.permute(0, 3, 2, 1).reshape(images * side * side, -1)  # k ordered (kh, kw, c_in)
        rows = torch.cat((rows, rows.new_ones(len(rows), 1)), dim=1)
        of_patch = kernels[torch.from_numpy(np.maximum(tiles, 0))]  # (patches, k + 1, c_out)
        outputs = torch.einsum("pk,pkc->pc", rows, of_patch)
        computed = torch.from_numpy(tiles >= 0)[:, None]
        return (outputs * computed).view(images, side, side, -1).permute(0, 3, 1, 2)

    def step(self, pixels, labels, assignments):
        planes = torch.from_numpy(pixels).double().permute(0, 3, 1, 2)
        for layer, (kernels, assignment) in enumerate(zip(self.kernels, assignments, strict=True)):
            active = self.convolve(planes, kernels, tiles_of_patches(assignment, len(kernels))).relu()
            pool = F.max_pool2d if layer < 2 else F.avg_pool2d
            pooled = pool(active, 3, 2, ceil_mode=True)
            planes = pooled * (1 + 5e-5 * F.avg_pool2d(pooled**2, 3, 1, 1)) ** -0.75
        weight, bias = self.head
        loss = F.cross_entropy(planes.permute(0, 2, 3, 1).flatten(1) @ weight + bias, torch.from_numpy(labels))
        parameters = [*self.kernels, *self.head]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.mul_(1 - RATE * DECAY).sub_(RATE * gradient)
        return loss.item()


@pytest.mark.parametrize("name", ["serial", "batched"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tiled_network_takes_the_steps_of_one_that_is_written_out(scheme, name):
    machine = machine_of(scheme)
    kernels, digital = initial_kernels(machine, 0), initial_digital(machine, CLASSES, 0)
    for of_layer in kernels:
        of_layer[:, -1] = np.random.default_rng(1).uniform(-0.1, 0.1, of_layer[:, -1].shape)
    explicit = Explicit(scheme, kernels, digital)
    assigner, batches = Assigner(machine, scheme, 0), [a_batch(step) for step in range(STEPS)]
    steps = [
        Step(torch.from_numpy(x), torch.from_numpy(y), assigner.route_training(n, IMAGES, 1), Update(RATE, DECAY), ())
        for n, (x, y) in enumerate(batches)
    ]
    with one_digital_thread():
        if name == "batched":
            batched = BatchedFabric(machine, IMAGES, [kernels])
            network = BatchedNetwork(batched, pooling="max", digital=[digital])
            results = list(network.train(steps))
            found, head = [batched.kernels(layer) for layer in machine.layers], network.digital_arrays()
        else:
            with SerialFabric(machine, IMAGES, kernels) as fabric:
                network = Network(fabric, pooling="max", digital=digital)
                results = list(network.train(steps))
                found, head = [fabric.kernels(layer) for layer in machine.layers], network.digital_arrays()
        for number, ((pixels, labels), result) in enumerate(zip(batches, results, strict=True)):
            loss = explicit.step(pixels, labels, assigner.for_training(number, IMAGES))
            assert result.loss == pytest.approx(loss, rel=1e-5)
    expected = [of_layer.detach().numpy() for of_layer in explicit.kernels]
    for ours, theirs, before in zip(found, expected, kernels, strict=True):
        assert abs(theirs - before).max() > 1e-3, "they have learnt something"
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
    np.testing.assert_allclose(head["head.weight"], explicit.head[0].detach().numpy(), atol=2e-6)
    np.testing.assert_allclose(head["head.bias"], explicit.head[1].detach().numpy(), atol=2e-6)
