"""The paper's network as a run has it: built from a configuration, on a fabric, with the weights of a checkpoint."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from rapa_dist.config import TrainConfig
from rapa_dist.fabric.base import Fabric
from rapa_dist.machine import IMAGE_CHANNELS, IMAGE_SIDE
from rapa_dist.networks.paper import PaperNetwork
from rapa_dist.nn.convert import convert
from rapa_dist.nn.deploy import attach
from rapa_dist.nn.layers import TiledLayer
from rapa_dist.nn.optim import RapaSGD
from rapa_dist.nn.record import Recording
from rapa_dist.nn.schedule import Learner, MicroBatches
from rapa_dist.tile import Matrix

IMAGE = (IMAGE_CHANNELS, IMAGE_SIDE, IMAGE_SIDE)


def build(config: TrainConfig, classes: int) -> tuple[nn.Module, Recording]:
    """Return the network of a configuration, its convolutions on tiles that no fabric has yet."""
    network = PaperNetwork(classes, IMAGE, channels=config.channels, pooling=config.pooling)
    convert(network, tiles=config.tiles, scheme=config.scheme)
    layers = [network.get_submodule(array.name) for array in config.machine.arrays]
    tiled = tuple(layer for layer in layers if isinstance(layer, TiledLayer))
    return network, Recording(config.machine, tiled, 0)


def learner(
    config: TrainConfig, classes: int, fabric: Fabric, digital: Mapping[str, Matrix], *, step: int, device: str = "cpu"
) -> Learner:
    """Return a network on the tiles of a fabric, ready to be trained or tested.

    Args:
        config: which network.
        classes: its outputs.
        fabric: with the kernels in its tiles.
        digital: the digital parameters by name.
        step: steps that it has been trained for.
        device: where the digital side computes.
    """
    network, recording = build(config, classes)
    load_digital(network, digital)
    network.to(device)
    session = attach(recording, fabric, seed=config.seed, step=step)
    return Learner(
        model=network,
        optimizer=RapaSGD(network, lr=config.lr, weight_decay=config.weight_decay),
        session=session,
        recording=recording,
        schedule=MicroBatches(1 if fabric.gives_gradients else config.micro_batches),
    )


def load_digital(network: nn.Module, digital: Mapping[str, Matrix]) -> None:
    """Give a network its digital parameters."""
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for name, value in digital.items():
            parameters[name].copy_(torch.from_numpy(np.ascontiguousarray(value)))


def digital_arrays(network: nn.Module) -> dict[str, Matrix]:
    """Return a copy of the digital parameters of a network."""
    tiled = {name for name, layer in network.named_modules() if isinstance(layer, TiledLayer)}
    return {
        name: parameter.detach().cpu().numpy().copy()
        for name, parameter in network.named_parameters()
        if name.rpartition(".")[0] not in tiled
    }
