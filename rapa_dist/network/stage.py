"""What the digital side computes: behind each convolution a stage, and behind the last one the head."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rapa_dist.machine import Layer
from rapa_dist.network.normalisation import normalise, normalise_backward
from rapa_dist.network.pooling import Pooling, make_pooling, relu_first

_aten: Any = torch.ops.aten


class Stage:
    """ReLU and pooling, in either order, then normalisation: (images, side, side, channels) → smaller planes."""

    def __init__(self, pooling: Pooling, *, relu_first: bool) -> None:
        """Make one; for `relu_first`, see `pooling.relu_first`."""
        self.pooling, self.relu_first = pooling, relu_first

    def forward(self, outputs: Tensor, draws: Tensor | None = None) -> tuple[Tensor, Any]:
        """Return the planes for the next layer, and what `backward` needs; for `draws`, see `Pooling.forward`."""
        planes = outputs.relu() if self.relu_first else outputs
        pooled, for_pooling = self.pooling.forward(planes, draws)
        active = planes if self.relu_first else pooled.relu_()
        normalised, for_normalisation = normalise(pooled)
        return normalised, (active, for_pooling, for_normalisation)

    def backward(self, saved: Any, errors: Tensor) -> Tensor:
        """Return the errors of the tiles' outputs, given those of the planes."""
        active, for_pooling, for_normalisation = saved
        errors = normalise_backward(for_normalisation, errors)
        if not self.relu_first:
            return self.pooling.backward(for_pooling, _aten.threshold_backward(errors, active, 0))
        errors = self.pooling.backward(for_pooling, errors)
        through: Tensor = _aten.threshold_backward(errors, active, 0)
        return through

    def __call__(self, outputs: Tensor) -> Tensor:
        """Do the same, as in a test, as an operation that autograd can go back through."""
        planes: Tensor = _Function.apply(outputs, self)  # type: ignore[no-untyped-call]
        return planes


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, stage: Stage) -> Tensor:
        planes, ctx.saved = stage.forward(outputs)
        ctx.stage = stage
        return planes

    @staticmethod
    def backward(ctx: Any, errors: Tensor) -> tuple[Tensor, None]:
        return ctx.stage.backward(ctx.saved, errors), None


def make_stages(layers: Sequence[Layer], method: str, parameters: Mapping[str, Tensor]) -> list[Stage]:
    """Return what follows the convolutions of a network.

    Args:
        layers: all its layers.
        method: pooling of all but the last, one of `POOLINGS`; the last always averages.
        parameters: the digital parameters; see `make_pooling`.
    """
    methods = [method] * (len(layers) - 1) + ["average"]
    return [
        Stage(make_pooling(of_layer, layer.index, parameters), relu_first=relu_first(of_layer, layer.index))
        for layer, of_layer in zip(layers, methods, strict=True)
    ]


class Head:
    """The fully connected layer and the loss: planes → scores → cross entropy.

    Its parameters belong to the digital side, which sums their gradients up over the parts of a mini-batch.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """Compute with (features, classes) weights and (classes,) biases, which stay the caller's."""
        self.weight, self.bias = weight, bias

    def __call__(self, planes: Tensor) -> Tensor:
        """Return the scores (images, classes) of planes (images, side, side, channels)."""
        return torch.addmm(self.bias, planes.flatten(1), self.weight)

    @torch.no_grad()
    def train(self, planes: Tensor, labels: Tensor, images: int) -> tuple[float, int, Tensor]:
        """Add to the gradients of the parameters; return what these images contribute, and their errors.

        Args:
            planes: (images here, side, side, channels).
            labels: (images here,).
            images: images in the whole mini-batch, over which the loss is averaged.

        Returns:
            Loss, number of images classified wrongly, and the errors of the planes.
        """
        features = planes.flatten(1)
        scores = torch.addmm(self.bias, features, self.weight)
        wrong = torch.count_nonzero(scores.argmax(dim=1) != labels)
        logarithms = scores.log_softmax(dim=1)
        of_labels = labels.unsqueeze(1)
        loss = logarithms.gather(1, of_labels).sum() / -images
        errors = logarithms.exp_()
        errors.scatter_add_(1, of_labels, errors.new_full((1, 1), -1.0).expand_as(of_labels)).div_(images)
        self._add_gradient(self.weight, features.t() @ errors)
        self._add_gradient(self.bias, errors.sum(dim=0))
        return loss.item(), int(wrong), (errors @ self.weight.t()).view(planes.shape)

    @staticmethod
    def _add_gradient(parameter: Tensor, gradient: Tensor) -> None:
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
