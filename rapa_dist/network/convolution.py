"""The tiled convolution as a torch autograd function: M_tiled = (b_lᵀ K_{s_l})_l and its gradient.

In its backward pass the tiles update themselves: λ goes out with the errors, gradients of kernels never
come back. One assignment serves all three cycles.
"""

from typing import Any

import torch
from torch import Tensor

from rapa_dist.assignment import Assignment
from rapa_dist.fabric.base import Fabric
from rapa_dist.machine import Layer
from rapa_dist.network.patches import Patches
from rapa_dist.tile import Update


class TiledConvolution:
    """One layer's convolution, computed by the tiles of a fabric."""

    def __init__(self, layer: Layer, fabric: Fabric) -> None:
        self.layer = layer
        self.fabric = fabric
        self.geometry = Patches(layer, fabric.images)
        self.patches = torch.from_numpy(fabric.patches(layer.index))
        self.outputs = torch.from_numpy(fabric.outputs(layer.index))
        # autograd calls a backward pass only where some input wants a gradient; the kernels are elsewhere
        self._kernels_stand_in = torch.zeros((), requires_grad=True)

    def __call__(self, planes: Tensor, assignment: Assignment, update: Update | None) -> Tensor:
        """Convolve planes with the kernels of the tiles that the assignment names.

        Args:
            planes: (images, side, side, c_in).
            assignment: which tile computes which patch.
            update: what the tiles do with the errors of the backward pass besides passing them on.

        Returns:
            (images, side, side, c_out). Backpropagate at most once, before the layer's next forward pass:
            the patches stay in the fabric's memory for it.
        """
        output: Tensor = _Function.apply(  # type: ignore[no-untyped-call]
            planes, self._kernels_stand_in, self, assignment, update
        )
        return output


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        planes: Tensor,
        _stand_in: Tensor,
        convolution: TiledConvolution,
        assignment: Assignment,
        update: Update | None,
    ) -> Tensor:
        layer, fabric, rows = convolution.layer, convolution.fabric, assignment.rows
        convolution.geometry.gather(planes, assignment, convolution.patches[:rows])
        fabric.forward(layer, assignment.offsets)
        row_of_patch = torch.from_numpy(assignment.inverse())
        outputs = convolution.outputs[:rows]
        if rows < assignment.n_patches:
            outputs = torch.cat((outputs, outputs.new_zeros(1, layer.c_out)))  # for the dropped patches
        planes_out = outputs.index_select(0, row_of_patch)  # back in the order of the patches
        ctx.convolution, ctx.assignment, ctx.update = convolution, assignment, update
        ctx.row_of_patch = row_of_patch
        return planes_out.view(planes.shape[0], layer.side, layer.side, layer.c_out)

    @staticmethod
    def backward(ctx: Any, errors: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        convolution: TiledConvolution = ctx.convolution
        assignment: Assignment = ctx.assignment
        layer, rows = convolution.layer, assignment.rows
        in_patch_order = errors.reshape(-1, layer.c_out)
        torch.index_select(in_patch_order, 0, torch.from_numpy(assignment.order), out=convolution.outputs[:rows])
        input_error = ctx.needs_input_grad[0]
        if ctx.update is not None or input_error:
            convolution.fabric.backward(layer, assignment.offsets, update=ctx.update, input_error=input_error)
        if not input_error:
            return None, None, None, None, None
        planes = convolution.geometry.scatter(convolution.patches[:rows], ctx.row_of_patch, assignment)
        return planes, None, None, None, None
