"""Caffe's "Full" CIFAR-10 network: tiled convolutions with a digital side between and behind them."""

from collections.abc import Generator, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from rapa_dist.assignment import Assignment
from rapa_dist.fabric.base import Fabric, Kernels
from rapa_dist.machine import Machine
from rapa_dist.network.convolution import TiledConvolution
from rapa_dist.network.pipeline import Result, Routing, Step, classify, train
from rapa_dist.network.pooling import MIXTURE_START
from rapa_dist.network.stage import Head, make_stages
from rapa_dist.streams import Purpose, stream
from rapa_dist.tile import Matrix, Update


class Network:
    """Convolution, ReLU and pooling, normalisation for every layer, then a fully connected layer.

    In the first layer pooling comes before ReLU; see `pooling.relu_first`. The kernels are the fabric's; the digital
    parameters are here.
    """

    cuts = True
    """Whether mini-batches may come in parts."""

    def __init__(self, fabric: Fabric, *, pooling: str, digital: dict[str, Matrix]) -> None:
        """Build the network on a fabric.

        Args:
            fabric: where the tiles are.
            pooling: one of `POOLINGS`, for all layers but the last.
            digital: the digital parameters, as `initial_digital` returns them.
        """
        self.fabric = fabric
        layers = fabric.machine.layers
        self.convolutions = [TiledConvolution(layer, fabric) for layer in layers]
        self.digital = {name: torch.from_numpy(np.array(value)).requires_grad_() for name, value in digital.items()}
        self.stages = make_stages(layers, pooling, self.digital)
        self.head = Head(self.digital["head.weight"], self.digital["head.bias"])

    def __call__(self, images: Tensor, assignments: Sequence[Assignment], update: Update | None) -> Tensor:
        """Return the scores (images, classes) of a mini-batch (images, 32, 32, 3).

        Args:
            images: pixels as the network takes them.
            assignments: one per layer.
            update: what the tiles do in the backward pass; None to leave the kernels as they are.
        """
        planes = images
        for convolution, stage, assignment in zip(self.convolutions, self.stages, assignments, strict=True):
            planes = stage(convolution(planes, assignment, update))
        return self.head(planes)

    def train(self, steps: Iterable[Step]) -> Generator[Result]:
        """Train mini-batches; see `pipeline.train`."""
        return train(self, steps)

    def classify(self, images: Tensor, routing: Routing) -> Tensor:
        """Return the scores (images, classes) of a batch; see `pipeline.classify`."""
        return classify(self, images, routing)

    @torch.no_grad()
    def update_digital(self, update: Update) -> None:
        """Take one step of gradient descent with the digital parameters, by the same rule as a tile."""
        for parameter in self.digital.values():
            assert parameter.grad is not None
            parameter.mul_(1 - update.learning_rate * update.weight_decay)
            parameter.sub_(parameter.grad, alpha=update.learning_rate)
            parameter.grad = None

    def digital_arrays(self) -> dict[str, Matrix]:
        """Return a copy of the digital parameters."""
        return {name: parameter.detach().numpy().copy() for name, parameter in self.digital.items()}


def initial_kernels(machine: Machine, seed: int) -> Kernels:
    """Draw every tile's kernel independently: uniform in ±√(3 / k), biases 0 (Caffe2's Xavier)."""
    kernels = []
    for layer in machine.layers:
        kernel_of_tile = np.zeros((layer.n_tiles, *layer.kernel_shape), np.float32)
        bound = np.sqrt(3 / layer.k)
        for tile in range(layer.n_tiles):
            rng = stream(seed, Purpose.INIT, layer.index, tile)
            kernel_of_tile[tile, :-1] = rng.uniform(-bound, bound, (layer.k, layer.c_out))
        kernels.append(kernel_of_tile)
    return kernels


def initial_digital(machine: Machine, classes: int, seed: int, pooling: str = "max") -> dict[str, Matrix]:
    """Draw the fully connected layer, (features, classes), like a kernel; its bias is 0.

    "mixed" pooling has a β for every channel as well.
    """
    shapes = machine.digital_shapes(classes, pooling)
    parameters = {name: np.full(shape, MIXTURE_START, np.float32) for name, shape in shapes.items()}
    features, _ = shapes["head.weight"]
    bound = np.sqrt(3 / features)
    weight = stream(seed, Purpose.INIT, len(machine.layers)).uniform(-bound, bound, (features, classes))
    return parameters | {"head.weight": weight.astype(np.float32), "head.bias": np.zeros(classes, np.float32)}
