"""The paper's network on tiles, with few channels: ready to be trained and tested."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from factories import initial_digital
from torch import Tensor

from rapa_dist.coordinator.learner import digital_arrays, load_digital
from rapa_dist.demand import arena_floats
from rapa_dist.fabric.base import Fabric, Kernels
from rapa_dist.fabric.batched import BatchedFabric
from rapa_dist.fabric.serial import SerialFabric
from rapa_dist.initial import initial_kernels
from rapa_dist.networks.paper import PaperNetwork
from rapa_dist.nn.convert import convert
from rapa_dist.nn.deploy import attach
from rapa_dist.nn.optim import RapaSGD
from rapa_dist.nn.record import record
from rapa_dist.nn.schedule import Learner, MicroBatches

Matrix = np.ndarray[Any, Any]


@contextmanager
def learner(
    fabric: str | Callable[..., Fabric] = "serial",
    *,
    tiles: Sequence[int],
    scheme: str = "random",
    pooling: str = "max",
    channels: Sequence[int] = (4, 5, 6),
    classes: int = 7,
    images: int = 5,
    side: int = 32,
    parts: int = 1,
    rate: float = 0.05,
    decay: float = 0.01,
    kernels: Kernels | None = None,
    digital: Mapping[str, Matrix] | None = None,
) -> Iterator[Learner]:
    """Bring the network up on a fabric: "serial", "batched", or a class like `SerialFabric`; the seed is 0."""
    model = PaperNetwork(classes, (3, side, side), channels=channels, pooling=pooling)
    convert(model, tiles=tiles, scheme=scheme)
    recording = record(model, (images, 3, side, side))
    machine = recording.machine
    load_digital(model, initial_digital(machine, classes, 0, pooling) if digital is None else digital)
    kernels = initial_kernels(machine, 0) if kernels is None else kernels
    make = SerialFabric if fabric == "serial" else fabric
    opened = (
        BatchedFabric(machine, kernels)
        if fabric == "batched"
        else make(machine, arena_floats(machine, images), kernels)
    )  # type: ignore[operator]
    with opened:
        yield Learner(
            model=model,
            optimizer=RapaSGD(model, lr=rate, weight_decay=decay),
            session=attach(recording, opened, seed=0),
            recording=recording,
            schedule=MicroBatches(parts),
        )


def weights(learner: Learner) -> dict[str, Matrix]:
    """Return all parameters by name; the kernels of a layer as "layer 0"."""
    kernels = learner.session.fabric.all_kernels()
    return {f"layer {index}": of_array for index, of_array in enumerate(kernels)} | digital_arrays(learner.model)


def batch(
    number: int, images: int = 5, *, side: int = 32, classes: int = 7, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return images (images, 3, side, side), in memory channels last, as runs have them; and their labels."""
    generator = np.random.default_rng((3, number))
    pixels = generator.normal(scale=scale, size=(images, side, side, 3)).astype(np.float32)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(generator.integers(0, classes, images))
