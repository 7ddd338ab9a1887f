"""The network of a run: built from a configuration, put on a fabric, with the weights of a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rapa_dist.config import TrainConfig, parts_of
from rapa_dist.data import DataSet
from rapa_dist.errors import CheckpointError, UsageError
from rapa_dist.fabric.base import Fabric, Kernels
from rapa_dist.initial import initial_kernels
from rapa_dist.networks import PAPER, make
from rapa_dist.nn.convert import convert
from rapa_dist.nn.deploy import attach
from rapa_dist.nn.layers import TiledLayer
from rapa_dist.nn.optim import RapaSGD
from rapa_dist.nn.record import Recording, record
from rapa_dist.nn.schedule import Learner, MicroBatches
from rapa_dist.streams import Purpose, torch_seed
from rapa_dist.tile import Matrix


@dataclass(frozen=True, slots=True)
class Network:
    """A model whose convolutions are on tiles, which no fabric has yet."""

    config: TrainConfig
    """Everything that only the model could tell resolved: n_t of every layer, parts of a mini-batch."""
    model: nn.Module
    recording: Recording

    def initial_kernels(self) -> Kernels:
        """Return what is programmed into the tiles at the start, one array (n_t, k + 1, c_out) per tile array."""
        if self.config.init == "xavier":
            return initial_kernels(self.recording.machine, self.config.seed)
        return [layer.kernels.detach().numpy().copy() for layer in self.recording.layers]


def build(config: TrainConfig) -> Network:
    """Return the network of a configuration that knows its images.

    Raises:
        UsageError: it can't be built, does not take the images, or can't be put on tiles in this way.
    """
    assert config.image is not None
    assert config.classes is not None
    paper = config.network == PAPER
    options = {"channels": config.channels, "pooling": config.pooling, "seed": config.seed} if paper else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(config.seed, Purpose.INIT_DIGITAL))
        model = make(config.network, config.classes, config.image, **options)
    shape = (1, *config.image)
    tiles = config.tiles[0] if len(config.tiles) == 1 else config.tiles
    conversion = convert(model, tiles, scheme=config.scheme, images=shape, init=config.init)
    recording = record(model, shape)
    recording = replace(recording, machine=recording.machine.with_physics(config.physics, config.seed))
    if recording.output is None or recording.output[1:] != (config.classes,):
        returned = "no tensor"
        if recording.output is not None:
            returned = f"a tensor ({', '.join(('images', *map(str, recording.output[1:])))})"
        raise UsageError(
            f"--network {config.network} has to return scores (images, {config.classes}), one for each class; it "
            f"returned {returned}. A factory is called with the number of classes first."
        )
    parts = config.micro_batches
    if parts is None:  # parts of a mini-batch would have other statistics than the whole
        normalised = any(isinstance(module, _BatchNorm) for module in model.modules())
        parts = 1 if normalised else parts_of(conversion.tiles)
    return Network(replace(config, tiles=conversion.tiles, micro_batches=parts), model, recording)


def network_of(config: TrainConfig, data: DataSet) -> Network:
    """Return the network of a configuration for the images of a data set; errors are those of `build`."""
    return build(replace(config, dataset=data.name, image=data.image, classes=len(data.classes)))


def learner(
    config: TrainConfig, fabric: Fabric, digital: Mapping[str, Matrix], *, step: int, device: str = "cpu"
) -> Learner:
    """Return a network on the tiles of a fabric, ready to be trained or tested.

    Args:
        config: which network.
        fabric: with the kernels in its tiles.
        digital: the digital parameters and buffers by name.
        step: steps that it has been trained for.
        device: where the digital side computes.
    """
    network = build(config)
    model = network.model
    load_digital(model, digital)
    model.to(device)
    session = attach(network.recording, fabric, seed=config.seed, step=step)
    return Learner(
        model=model,
        optimizer=RapaSGD(model, lr=config.lr, weight_decay=config.weight_decay, lr_of=dict(config.lr_of)),
        session=session,
        recording=network.recording,
        schedule=MicroBatches(1 if fabric.gives_gradients else network.config.micro_batches or 1),
    )


def load_digital(model: nn.Module, digital: Mapping[str, Matrix]) -> None:
    """Give a model its digital parameters and buffers.

    Raises:
        CheckpointError: they are those of another model; what is missing, too many or of another shape is said.
    """
    ours = _digital(model)
    shapes = {name: tuple(value.shape) for name, value in ours.items()}
    found = {name: value.shape for name, value in digital.items()}
    if differs := [
        f"{name}: {_shape(shapes.get(name))} → {_shape(found.get(name))}"
        for name in sorted(shapes.keys() | found.keys())
        if shapes.get(name) != found.get(name)
    ]:
        raise CheckpointError(
            f"The checkpoint is of another network than its configuration makes now: {'; '.join(differs)}. "
            "Use the code that it was trained with."
        )
    with torch.no_grad():
        for name, value in digital.items():
            ours[name].copy_(torch.from_numpy(np.array(value)))


def digital_arrays(model: nn.Module) -> dict[str, Matrix]:
    """Return a copy of the digital parameters and buffers of a model, by name."""
    return {name: value.detach().cpu().numpy().copy() for name, value in _digital(model).items()}


def _digital(model: nn.Module) -> dict[str, Tensor]:
    """Return what a model's state dict would have besides the kernels of its tiles, whom nobody asks for them here."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, TiledLayer):
            continue
        own = dict(module.named_parameters(recurse=False))
        own |= {n: b for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set}
        found |= {f"{prefix}.{name}" if prefix else name: value for name, value in own.items()}
    return found


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else "×".join(map(str, shape)) or "a number"
