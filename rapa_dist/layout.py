"""The machine of a configuration, and what its tiles start from.

By arithmetic for the paper's network, for any other by building its model.
"""

from functools import lru_cache

from rapa_dist.config import TrainConfig, resolve
from rapa_dist.initial import initial_kernels
from rapa_dist.machine import IMAGE, Machine, TileArray
from rapa_dist.networks import PAPER, USUAL_IMAGES, check_network
from rapa_dist.tile import Matrix

CLASSES = 10
"""Outputs of a network that is laid out without any data."""


@lru_cache(maxsize=32)
def machine_of(config: TrainConfig) -> Machine:
    """Return the tile arrays of a network; it loads PyTorch only where the network is not the paper's.

    Raises:
        UsageError: the network can't be built, or does not take the images.
    """
    if config.network == PAPER:
        return config.paper_machine.with_physics(config.physics, config.seed)
    from rapa_dist.coordinator.learner import build

    return build(config).recording.machine


def arrays_of(network: str, image: tuple[int, ...] | None = None) -> tuple[TileArray, ...]:
    """Return the convolutions of a network on one tile each, in the order in which an image meets them.

    Args:
        network: its name, as `networks.check_network` takes it.
        image: channels, h and w of an image; None: those that the network was made for.

    Raises:
        UsageError: as `machine_of`.
    """
    check_network(network)
    image = image or USUAL_IMAGES.get(network, IMAGE)
    return machine_of(resolve(network=network, scheme="none", image=image, classes=CLASSES)).arrays


def start_of(config: TrainConfig) -> list[Matrix]:
    """Return the kernels that a run starts from, one array (n_t, k + 1, c_out) per tile array."""
    if config.init == "xavier":
        return initial_kernels(machine_of(config), config.seed)
    from rapa_dist.coordinator.learner import build

    return list(build(config).initial_kernels())
