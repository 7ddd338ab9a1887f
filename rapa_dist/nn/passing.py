"""A passage through a tile array as an operation that autograd can go back through: the only one there is."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rapa_dist.geometry import Geometry
from rapa_dist.machine import TileArray
from rapa_dist.nn.minibatch import Part

if TYPE_CHECKING:
    from rapa_dist.nn.layers import TiledLayer
    from rapa_dist.nn.session import Session


class Call(NamedTuple):
    """A layer that is called."""

    layer: "TiledLayer"
    session: "Session"
    array: TileArray
    geometry: Geometry
    part: Part


def pass_through(call: Call, planes: Tensor) -> Tensor:
    """Return the outputs (images, c_out, h, w) of planes (images, c_in, h, w).

    Assignments are those of training where the layer is in training mode and gradients are wanted; else those of a
    test. Whether the layer's parameter `kernels` wants a gradient says whether its tiles learn.
    """
    kernels = call.layer.kernels
    if torch.is_grad_enabled() and (planes.requires_grad or kernels.requires_grad):
        outputs: Tensor = apply(_Passing)(planes, kernels, call)
        return outputs
    passage = call.session.begin(call.array, call.geometry, planes.permute(0, 2, 3, 1), call.part)
    try:
        if not passage.shared:
            call.part.give_way()
        return passage.outputs().permute(0, 3, 1, 2)
    finally:
        passage.release()


def apply(function: type[torch.autograd.Function]) -> Any:
    """Return what `function.apply` calls in the end: without the questions of functorch, a third of its time."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


class _Passing(torch.autograd.Function):
    """Channels come first outside and last inside; as views in here they are not among autograd's operations."""

    @staticmethod
    def forward(ctx: Any, planes: Tensor, kernels: Tensor, call: Call) -> Tensor:
        _, session, array, geometry, part = call
        passage = session.begin(array, geometry, planes.permute(0, 2, 3, 1), part)
        session.expect_errors(array.index)
        ctx.call, ctx.passage = call, passage
        try:
            if not passage.shared:
                part.give_way()
            return passage.outputs().permute(0, 3, 1, 2)
        except BaseException:
            session.keep(passage)
            raise

    @staticmethod
    def backward(ctx: Any, errors: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (layer, session, array, _, part), passage, ctx.passage = ctx.call, ctx.passage, None
        if passage is None:
            raise RuntimeError(
                f"backward() goes through {array.name} for the second time, but its patches were given back "
                "after the first. Call the model again before the next backward()."
            )
        input_error, learn, _ = ctx.needs_input_grad
        rates = layer.rates if learn else None
        session.send_errors(array.index, passage, errors.permute(0, 2, 3, 1), rates, input_error, learn)
        back = None
        if input_error:
            try:
                part.give_way()
                back = passage.input_errors().permute(0, 3, 1, 2)
            except BaseException:
                session.keep(passage)
                raise
        return back, passage.kernel_gradient() if learn else None, None
