"""What images ask of a model's layers: found by sending two through it once, before anything is started."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rapa_dist.errors import RapaError, UsageError
from rapa_dist.geometry import Geometry
from rapa_dist.machine import Machine, TileArray
from rapa_dist.nn.layers import TiledLayer, geometry_of
from rapa_dist.shortened import shortened

Images = Tensor | Sequence[Tensor] | Sequence[int]
"""A batch of images as a model takes them, or its shape, (images, channels, h, w); or one for each of its inputs."""
_IMAGES = 2  # batch normalisation of planes with a single pixel wants two


class Meeting(NamedTuple):
    """One time that an image passes through a layer."""

    geometry: Geometry
    """How its patches lie."""
    input_error: bool
    """Whether the errors of the layer's input are wanted."""
    is_image: bool
    """Whether the input is the model's first argument itself."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A model's tile arrays as images meet them."""

    machine: Machine
    layers: tuple[TiledLayer, ...]
    """By tile array."""
    first: int | None
    """The tile array whose input is the images themselves, if there is one: it can begin a mini-batch beforehand."""
    output: tuple[int, ...] | None
    """Shape of what the model returned for two images; None: no tensor."""


def arguments_of(images: Images) -> list[Tensor]:
    """Return the arguments of a model, given a batch of images, several, or a shape."""
    if isinstance(images, Tensor):
        return [images]
    if images and all(isinstance(item, Tensor) for item in images):
        return list(images)  # type: ignore[arg-type]
    shape: list[Any] = list(images)
    if len(shape) < 2 or not all(isinstance(number, int) and number > 0 for number in shape):
        raise UsageError(f"images is a batch of images or its shape, like (10, 3, 32, 32); it is {images!r}.")
    return [torch.zeros(*shape)]


def meetings(
    model: nn.Module, names: Mapping[nn.Module, str], images: Images
) -> tuple[dict[nn.Module, list[Meeting]], Any]:
    """Send two images through a model in training mode, and return what some of its layers met. Nothing is changed.

    Args:
        model: any.
        names: the layers to look at, with their names.
        images: what the model takes; only the first image is used.

    Returns:
        By layer, in the order in which they were met; and what the model returned.

    Raises:
        UsageError: the model does not take the images, or some of the layers are never called.
    """
    arguments = [argument[:1].expand(_IMAGES, *argument.shape[1:]).contiguous() for argument in arguments_of(images)]
    met: dict[nn.Module, list[Meeting]] = {}

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        (planes,) = args
        meeting = Meeting(geometry_of(layer, planes, names[layer]), planes.requires_grad, planes is arguments[0])
        met.setdefault(layer, []).append(meeting)

    hooks = [layer.register_forward_pre_hook(note) for layer in names]
    try:
        with _unchanged(model), torch.enable_grad():
            model.train()
            returned = _called(model, arguments)
    finally:
        for hook in hooks:
            hook.remove()
    if unused := [name for layer, name in names.items() if layer not in met]:
        raise UsageError(
            f"Images never reach {', '.join(unused)}: the model does not call {'it' if len(unused) == 1 else 'them'}. "
            "Leave such layers digital with where=…, or remove them."
        )
    return met, returned


def _called(model: nn.Module, arguments: Sequence[Tensor]) -> Any:
    try:
        return model(*arguments)
    except RapaError:
        raise
    except Exception as error:
        shapes = " and ".join(str(tuple(argument.shape[1:])) for argument in arguments)
        raise UsageError(
            f"The model does not take images of the shape {shapes}: {shortened(error)}. Give "
            "images of another size, or another network; it is called with a batch of images, in training mode."
        ) from error


def record(model: nn.Module, images: Images) -> Recording:
    """Return the tile arrays of a model, and what images ask of them.

    Raises:
        UsageError: as `meetings` does, or the model has no layers on tiles.
    """
    names: dict[nn.Module, str] = {
        layer: name for name, layer in model.named_modules() if isinstance(layer, TiledLayer)
    }
    if not names:
        raise UsageError("The model has no layers on tiles. Call rapa_dist.convert(model, tiles=…) first.")
    met, returned = meetings(model, names, images)
    layers: list[TiledLayer] = []
    arrays = []
    first = None
    for index, (layer, passages) in enumerate(met.items()):
        assert isinstance(layer, TiledLayer)
        layers.append(layer)
        if passages[0].is_image:
            first = index if first is None else first
        arrays.append(
            TileArray(
                index=index,
                name=names[layer],
                k=layer.k,
                c_out=layer.c_out,
                n_tiles=layer.n_tiles,
                bias=layer.has_bias,
                scheme=layer.scheme,
                passages=tuple(meeting.geometry for meeting in passages),
                input_error=any(meeting.input_error for meeting in passages),
                perforation=layer.perforation,
            )
        )
    output = tuple(returned.shape) if isinstance(returned, Tensor) else None
    return Recording(Machine(tuple(arrays)), tuple(layers), first, output)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Keep buffers, modes and PyTorch's generator as they are."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
