"""A passage through a tile array as an operation that autograd can go back through: the only one there is."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rapa_dist.geometry import Geometry
from rapa_dist.nn.minibatch import Part

if TYPE_CHECKING:
    from rapa_dist.nn.layers import TiledLayer


def pass_through(layer: "TiledLayer", planes: Tensor, geometry: Geometry) -> Tensor:
    """Return the outputs (images, h, w, c_out) of planes (images, h, w, c_in).

    Assignments are those of training where the layer is in training mode and gradients are wanted; else those of a
    test. Whether the layer's parameter `kernels` wants a gradient says whether its tiles learn.
    """
    session, kernels = layer.session, layer.kernels
    wanted = torch.is_grad_enabled()
    part = session.part_for(layer.array.index, len(planes), training=layer.training and wanted)
    if wanted and (planes.requires_grad or kernels.requires_grad):
        outputs: Tensor = _Passing.apply(planes, kernels, layer, geometry, part)  # type: ignore[no-untyped-call]
        return outputs
    passage = session.begin(layer.array, geometry, planes, part)
    try:
        part.give_way()
        return passage.outputs()
    finally:
        passage.release()


class _Passing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, planes: Tensor, kernels: Tensor, layer: "TiledLayer", geometry: Geometry, part: Part
    ) -> Tensor:
        session, array = layer.session, layer.array
        passage = session.begin(array, geometry, planes, part)
        session.expect_errors(array.index)
        ctx.session, ctx.layer, ctx.part, ctx.passage = session, layer, part, passage
        try:
            part.give_way()
            return passage.outputs()
        except BaseException:
            session.keep(passage)
            raise

    @staticmethod
    def backward(ctx: Any, errors: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        layer, passage, ctx.passage = ctx.layer, ctx.passage, None
        if passage is None:
            raise RuntimeError(
                f"backward() goes through {layer.array.name} for the second time, but its patches were given back "
                "after the first. Call the model again before the next backward()."
            )
        input_error, learn = ctx.needs_input_grad[:2]
        ctx.session.send_errors(layer.array.index, passage, errors, layer.rates if learn else None, input_error, learn)
        back = None
        if input_error:
            try:
                ctx.part.give_way()
                back = passage.input_errors()
            except BaseException:
                ctx.session.keep(passage)
                raise
        return back, passage.kernel_gradient() if learn else None, None, None, None
