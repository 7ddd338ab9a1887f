"""What the training loop and the test ask of a network, on whatever fabric it is."""

from collections.abc import Generator, Iterable
from typing import Protocol

from torch import Tensor

from rapa_dist.fabric.base import Fabric, Tiles
from rapa_dist.fabric.batched import BatchedFabric
from rapa_dist.network.batched import BatchedNetwork
from rapa_dist.network.model import Network
from rapa_dist.network.pipeline import Result, Routing, Step
from rapa_dist.tile import Matrix


class Learner(Protocol):
    """A network that can be trained and can classify."""

    @property
    def cuts(self) -> bool:
        """Whether mini-batches may come in parts."""

    def train(self, steps: Iterable[Step]) -> Generator[Result]:
        """Train mini-batches and yield a result for each; steps may be asked for ahead."""

    def classify(self, images: Tensor, routing: Routing) -> Tensor:
        """Return the scores (images, classes) of a batch (images, 32, 32, 3)."""

    def digital_arrays(self) -> dict[str, Matrix]:
        """Return a copy of the digital parameters."""


def build(tiles: Tiles, *, pooling: str, digital: dict[str, Matrix]) -> Learner:
    """Build the network of a run on its tiles; see `Network`."""
    if isinstance(tiles, BatchedFabric):
        return BatchedNetwork(tiles, pooling=pooling, digital=[digital])
    assert isinstance(tiles, Fabric)
    return Network(tiles, pooling=pooling, digital=digital)
