"""What lies between the convolutions of the paper's network: ReLU, pooling and normalisation as one module."""

from typing import Any

import torch
from torch import Tensor, nn

from rapa_dist.config import MIXTURE_START
from rapa_dist.machine import pooled
from rapa_dist.native import stage as native_stage
from rapa_dist.nn.minibatch import current
from rapa_dist.nn.normalisation import ALPHA, BETA, normalise, normalise_backward
from rapa_dist.nn.passing import apply
from rapa_dist.nn.pooling import POOLINGS, relu_first
from rapa_dist.streams import Purpose, stream

_aten: Any = torch.ops.aten


class Stage(nn.Module):
    """ReLU and pooling, in either order, then normalisation: (images, channels, h, w) → smaller planes.

    The three are written out as one operation: a third faster than as three modules, on planes as small as these.
    """

    def __init__(self, method: str, layer: int, channels: int) -> None:
        """Follow a convolution.

        Args:
            method: of pooling, one of `POOLINGS`.
            layer: which convolution, from 0; it decides where ReLU stands, see `relu_first`.
            channels: of its output; "mixed" learns a β for each.
        """
        super().__init__()
        self.method, self.layer = method, layer
        self.pooling, self.relu_first = POOLINGS[method](), relu_first(method, layer)
        self.register_parameter(
            "beta", nn.Parameter(torch.full((channels,), MIXTURE_START)) if method == "mixed" else None
        )

    def forward(self, input: Tensor) -> Tensor:
        """Return the smaller planes."""
        draws = self._draws(input) if self.method == "stochastic" and self.training else None
        smaller: Tensor = apply(_Staging)(input, self.beta, (self, draws))
        return smaller

    def _draws(self, planes: Tensor) -> Tensor:
        """Return uniform draws in [0, 1), one for each of the smaller planes' values, channels last."""
        images, channels, h, w = planes.shape
        shape = pooled(h), pooled(w), channels
        part = current()
        if part is None:
            return torch.rand(images, *shape, device=planes.device)
        batch = part.batch

        def draw() -> list[Tensor]:
            rng = stream(batch.seed, Purpose.POOL_TRAIN, self.layer, *batch.place)
            drawn = torch.from_numpy(rng.random((batch.images, *shape), "float32"))
            return [drawn[first:last] for first, last in batch.edges]

        found: Tensor = batch.draw((Purpose.POOL_TRAIN, self.layer), draw, part.number)
        return found.to(planes.device)

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        return f"{self.method}, relu_first={self.relu_first}"


class _Staging(torch.autograd.Function):
    """Channels come first outside and last inside, as in `_Passing`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, beta: Tensor | None, of_stage: tuple[Stage, Tensor | None]) -> Tensor:
        ctx.stage, draws = stage, _ = of_stage
        outputs = input.permute(0, 2, 3, 1)
        if native_stage.does(outputs, stage.method):
            size = pooled(outputs.shape[1]), pooled(outputs.shape[2])
            kind = {"average": stage.method == "average", "relu_first": stage.relu_first}
            normalised, ctx.saved = native_stage.forward(outputs, size, **kind, alpha=ALPHA, beta=BETA)
            return normalised.permute(0, 3, 1, 2)
        planes = outputs.relu() if stage.relu_first else outputs
        smaller, for_pooling = stage.pooling.forward(planes, beta, draws)
        active = planes if stage.relu_first else smaller.relu_()
        normalised, for_normalisation = normalise(smaller)
        ctx.saved = active, for_pooling, for_normalisation
        return normalised.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, errors: Tensor) -> tuple[Tensor, Tensor | None, None]:
        stage, saved, ctx.saved = ctx.stage, ctx.saved, None  # freed at once: who asks for memory next finds it warm
        if saved is None:
            raise RuntimeError("backward() goes through a stage for the second time. Call the model again before that.")
        errors = errors.permute(0, 2, 3, 1).contiguous()  # a flattened head sends others back
        if isinstance(saved, native_stage.Left):
            return native_stage.backward(saved, errors).permute(0, 3, 1, 2), None, None
        active, for_pooling, for_normalisation = saved
        errors = normalise_backward(for_normalisation, errors)
        if not stage.relu_first:
            errors = _aten.threshold_backward(errors, active, 0)
        back, of_beta = stage.pooling.backward(for_pooling, errors)
        if stage.relu_first:
            back = _aten.threshold_backward(back, active, 0)
        return back.permute(0, 3, 1, 2), of_beta, None
