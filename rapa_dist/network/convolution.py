"""The tiled convolution, M_tiled = (b_lᵀ K_{s_l})_l, and its gradient.

In the backward pass the tiles update themselves: λ goes out with the errors, gradients of kernels never
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

    def begin(self, planes: Tensor, assignment: Assignment, first_image: int = 0) -> "Passage":
        """Send planes on their way through the layer; returns while the tiles work.

        Args:
            planes: (images, side, side, c_in).
            assignment: which tile computes which patch.
            first_image: place of the images in the fabric's memory. What is under way at the same time must
                not overlap.
        """
        passage = Passage(self, planes, assignment, first_image)
        passage.begin()
        passage.find_rows()  # while the tiles work
        return passage

    def prepare(self, planes: Tensor, assignment: Assignment, first_image: int = 0) -> "Passage":
        """Gather the patches of planes as `begin` does, and leave it to the passage's own `begin` to ring the tiles."""
        passage = Passage(self, planes, assignment, first_image)
        passage.find_rows()
        return passage

    def __call__(self, planes: Tensor, assignment: Assignment, update: Update | None) -> Tensor:
        """Convolve planes, as an operation that autograd can go back through.

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


class Passage:
    """A micro-batch on its way through a layer: forward, and with the same assignment backward.

    First `begin` and `receive_outputs`; then, in training, `send_errors` and `receive_input_errors`.
    """

    def __init__(self, convolution: TiledConvolution, planes: Tensor, assignment: Assignment, first_image: int) -> None:
        layer = convolution.layer
        self._convolution, self._assignment = convolution, assignment
        first_row = first_image * layer.n_patches
        rows = slice(first_row, first_row + assignment.rows)
        self._patches, self._outputs = convolution.patches[rows], convolution.outputs[rows]
        self._offsets = assignment.offsets + first_row
        convolution.geometry.gather(planes, assignment, self._patches)
        self._cycle: int | None = None
        self._row_of_patch: Tensor  # (n_patches,) the row of every patch

    def begin(self) -> None:
        """Ring the tiles for the forward cycle; returns while they work. Does nothing the second time."""
        if self._cycle is None:
            self._cycle = self._convolution.fabric.begin_forward(self._convolution.layer, self._offsets)

    def find_rows(self) -> None:
        """Work out where every patch went, by which outputs and input errors find their way back."""
        self._row_of_patch = torch.from_numpy(self._assignment.inverse())

    def finish(self) -> None:
        """Wait for the cycle that is under way, if one has been begun."""
        if self._cycle is not None:
            self._convolution.fabric.finish(self._cycle)

    def receive_outputs(self, first: int = 0, last: int | None = None) -> Tensor:
        """Wait for the tiles, and return the outputs M of some images or all, (images, side, side, c_out).

        Args:
            first: first image.
            last: one past the last image; None: all from the first on.
        """
        self.finish()
        convolution, assignment = self._convolution, self._assignment
        layer, outputs = convolution.layer, self._outputs
        patches = slice(first * layer.n_patches, None if last is None else last * layer.n_patches)
        if assignment.rows < assignment.n_patches:
            outputs = torch.cat((outputs, outputs.new_zeros(1, layer.c_out)))  # for the dropped patches
        return outputs.index_select(0, self._row_of_patch[patches]).view(-1, layer.side, layer.side, layer.c_out)

    def send_errors(
        self, errors: Tensor, update: Update | None, *, input_error: bool = True, commit: bool = True
    ) -> None:
        """Have the tiles pass the errors back and update themselves; returns while they work.

        Args:
            errors: (images, side, side, c_out) D.
            update: λ and decay, or None to leave the kernels alone.
            input_error: whether the errors of the planes are wanted.
            commit: whether this is the mini-batch's last part, after which the new kernels are in force.
        """
        convolution, order = self._convolution, torch.from_numpy(self._assignment.order)
        layer = convolution.layer
        torch.index_select(errors.reshape(-1, layer.c_out), 0, order, out=self._outputs)
        self._cycle = convolution.fabric.begin_backward(
            layer, self._offsets, update=update, input_error=input_error, commit=commit
        )

    def receive_input_errors(self) -> Tensor:
        """Wait for the tiles, and return the errors of the planes, (images, side, side, c_in)."""
        self.finish()
        return self._convolution.geometry.scatter(self._patches, self._row_of_patch, self._assignment)


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
        ctx.passage, ctx.update = convolution.begin(planes, assignment), update
        outputs: Tensor = ctx.passage.receive_outputs()
        return outputs

    @staticmethod
    def backward(ctx: Any, errors: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        input_error = ctx.needs_input_grad[0]
        if ctx.update is None and not input_error:
            return None, None, None, None, None
        passage: Passage = ctx.passage
        passage.send_errors(errors, ctx.update, input_error=input_error)
        if input_error:
            return passage.receive_input_errors(), None, None, None, None
        passage.finish()
        return None, None, None, None, None
