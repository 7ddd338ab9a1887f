"""Putting a model's tiled layers on the tiles of a fabric, and taking them off again."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from rapa_dist.fabric.base import Fabric
from rapa_dist.nn.record import Recording
from rapa_dist.nn.session import Session


def attach(recording: Recording, fabric: Fabric, *, seed: int, step: int = 0) -> Session:
    """Have the layers of a model compute on the tiles of a fabric, with the kernels that these have."""
    session = Session(fabric, seed=seed, step=step)
    fabric.bind([layer.kernels for layer in recording.layers])
    for layer, array in zip(recording.layers, recording.machine.arrays, strict=True):
        layer.attach(session, array)
    return session


@contextmanager
def on_tiles(recording: Recording, fabric: Fabric, *, seed: int, step: int = 0) -> Iterator[Session]:
    """Do so for a while; afterwards the layers have the kernels that the tiles had last."""
    session = attach(recording, fabric, seed=seed, step=step)
    with ExitStack() as each:  # the others also where the tiles of one are lost
        each.callback(session.close)
        for layer in recording.layers:
            each.callback(layer.detach)
        yield session
