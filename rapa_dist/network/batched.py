"""The network on the fabric `batched`: one network or several alike, with every layer's tiles as one product.

The same draws, the same digital side and the same updates as on the other fabrics, in another order of summation. On
a GPU a training step is one CUDA graph over memory that stays where it is, and its loss is read steps later, so that
nothing waits for the host.
"""

import copy
import operator
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rapa_dist.assignment import Assignment
from rapa_dist.fabric.batched import BatchedFabric
from rapa_dist.machine import KERNEL_SIDE, Layer
from rapa_dist.network.patches import Geometry
from rapa_dist.network.pipeline import Result, Routing, Step
from rapa_dist.network.slots import Slots, lay_out
from rapa_dist.network.stage import make_stages
from rapa_dist.tile import Matrix

_PAD = KERNEL_SIDE // 2
_READ_EVERY = 50
"""Steps on a GPU between two looks at what has come of them."""


class _Convolution:
    """One layer for mini-batches of one size: im2col, the batched product, and back."""

    def __init__(self, layer: Layer, fabric: BatchedFabric, images: int) -> None:
        self.layer, self._fabric, self._images = layer, fabric, images
        device, padded = fabric.device, layer.side + 2 * _PAD
        geometry = Geometry.of(layer.side, images)
        empty = geometry.runs.new_zeros(1, KERNEL_SIDE)  # an empty slot sees the upper left of the border
        self._runs_of_patch = torch.cat((geometry.runs, empty)).to(device)
        self._piece_patch, self._piece_place, self._pixel_pieces = (
            tensor.to(device) for tensor in (geometry.piece_patch, geometry.piece_place, geometry.pixel_pieces)
        )
        self._planes = torch.zeros(images, padded, padded, layer.c_in, device=device)  # the border stays zero
        n_runs = images * padded * padded - KERNEL_SIDE + 1
        self._runs = self._planes.view(-1).as_strided((n_runs, KERNEL_SIDE * layer.c_in), (layer.c_in, 1))
        self._patches = self._convolved = torch.empty(0, device=device)
        self._buffers: dict[int, Tensor] = {}  # by slots; a CUDA graph goes on writing to the one it was made with
        self._slots: Slots | None = None

    def forward(self, planes: Tensor, slots: Slots) -> Tensor:
        """Return the outputs (images, side, side, c_out) of planes (images, side, side, c_in)."""
        layer, n_slots = self.layer, len(slots.patch_of_slot)
        self._slots = slots
        if slots.plain:
            self._convolved = planes
            return self._fabric.convolve(layer, planes)
        self._planes[:, _PAD:-_PAD, _PAD:-_PAD].copy_(planes)
        runs = self._runs_of_patch.index_select(0, slots.patch_of_slot).view(-1)
        if n_slots not in self._buffers:
            self._buffers[n_slots] = self._planes.new_empty(n_slots, layer.k)
        self._patches = self._buffers[n_slots]
        torch.index_select(self._runs, 0, runs, out=self._patches.view(len(runs), -1))
        self._hide(slots)
        outputs = self._fabric.forward(layer, self._of_tiles(self._patches)).view(n_slots, layer.c_out)
        if slots.some_dropped:
            outputs = torch.cat((outputs, outputs.new_zeros(1, layer.c_out)))
        return outputs.index_select(0, slots.slot_of_patch).view(-1, layer.side, layer.side, layer.c_out)

    def backward(self, errors: Tensor, rate: Tensor, keep: Tensor) -> Tensor | None:
        """Update the tiles; return the errors (images, side, side, c_in) of the planes, None in the first layer.

        Args:
            errors: (images, side, side, c_out).
            rate: λ, as `BatchedFabric.backward` takes it.
            keep: what is left of a weight after decay.
        """
        layer, slots = self.layer, self._slots
        assert slots is not None
        input_error = layer.index > 0
        if slots.plain:
            planes = self._convolved
            return self._fabric.convolve_back(layer, planes, errors, rate=rate, keep=keep, input_error=input_error)
        rows = errors.reshape(-1, layer.c_out)
        if slots.some_empty:
            rows = torch.cat((rows, rows.new_zeros(1, layer.c_out)))
        rows = self._of_tiles(rows.index_select(0, slots.patch_of_slot))
        patches = self._of_tiles(self._patches)
        self._fabric.backward(layer, patches, rows, rate=rate, keep=keep, input_error=input_error)
        return self._scatter(slots) if input_error else None

    def _scatter(self, slots: Slots) -> Tensor:
        """Add the input errors of the patches up to those of the planes (col2im)."""
        self._hide(slots)
        layer, input_errors = self.layer, self._patches
        if slots.some_dropped:
            input_errors = torch.cat((input_errors, input_errors.new_zeros(1, layer.k)))
        pieces = slots.slot_of_patch.index_select(0, self._piece_patch)
        pieces.mul_(KERNEL_SIDE * KERNEL_SIDE).add_(self._piece_place)
        summed = F.embedding_bag(pieces, input_errors.view(-1, layer.c_in), self._pixel_pieces, mode="sum")
        return summed.view(self._images, layer.side, layer.side, layer.c_in)

    def _hide(self, slots: Slots) -> None:
        if slots.seen is not None:
            self._patches.view(*slots.seen.shape[:2], self.layer.c_in).mul_(slots.seen)

    def _of_tiles(self, rows: Tensor) -> Tensor:
        """Return rows tile by tile, (tiles, width, columns)."""
        return rows.view(self._fabric.networks * self.layer.n_tiles, -1, rows.shape[1])


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What one step of all networks needs, as tensors on the device."""

    images: Tensor
    """(networks · images, 32, 32, 3)."""
    labels: Tensor
    """(networks, images)."""
    slots: tuple[Slots, ...]
    """One for every layer."""
    rate: Tensor
    """(networks, 1, 1) λ."""
    keep: Tensor
    """(networks, 1, 1) 1 − λ · weight decay."""
    draws: tuple[Tensor, ...]
    """For stochastic pooling, per layer but the last; else empty."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what changes from step to step."""
        of_slots = (tensor for slots in self.slots for tensor in slots.tensors())
        return (self.images, self.labels, self.rate, self.keep, *of_slots, *self.draws)

    @property
    def shape(self) -> tuple[tuple[torch.Size, ...], tuple[bool, ...]]:
        """Return the shapes, and in which layers slots are empty; steps that have both alike can share a graph."""
        return tuple(tensor.shape for tensor in self.tensors()), tuple(slots.some_empty for slots in self.slots)


class BatchedNetwork:
    """The network of `Network`, or several of them, on a `BatchedFabric`."""

    cuts = False
    """Mini-batches are not cut into parts: nothing works at the same time."""

    def __init__(self, fabric: BatchedFabric, *, pooling: str, digital: Sequence[dict[str, Matrix]]) -> None:
        """Build on a fabric.

        Args:
            fabric: where the tiles are.
            pooling: one of `POOLINGS`, for all layers but the last.
            digital: for every network the digital parameters, as `initial_digital` returns them.
        """
        self.fabric = fabric
        self._layers = fabric.machine.layers
        self._networks = fabric.networks
        self._digital = {
            name: torch.from_numpy(np.stack([of_network[name] for of_network in digital])).to(fabric.device)
            for name in digital[0]
        }
        self._pooling = pooling
        self._build()

    def _build(self) -> None:
        """Build what computes with the parameters that are there."""
        self._stages = make_stages(self._layers, self._pooling, self._digital)
        self._convolutions: dict[int, list[_Convolution]] = {}
        self._last_slots: dict[tuple[int, int], tuple[Sequence[Assignment], Slots]] = {}
        self._graphs: dict[Any, _Graph] = {}  # by `_Inputs.shape`

    def alone(self, network: int) -> Self:
        """Return one of the networks. Its parameters are those of this one: what is learnt here shows there."""
        one = copy.copy(self)
        one.fabric, one._networks = self.fabric.alone(network), 1
        one._digital = {name: parameter[network : network + 1] for name, parameter in self._digital.items()}
        one._build()
        return one

    @cached_property
    def _on_gpu(self) -> bool:
        return self.fabric.device.type == "cuda"

    def train(self, steps: Iterable[Step]) -> Generator[Result]:
        """Train one network, as `pipeline.train` does. On a GPU, results come some steps later."""
        for (result,) in self.train_together([step] for step in steps):
            yield result

    def train_together(self, steps: Iterable[Sequence[Step]]) -> Generator[list[Result]]:
        """Train all networks at once.

        Args:
            steps: for every step one mini-batch per network, all of one size.

        Yields:
            A result per network, for every step.
        """
        waiting: list[tuple[Tensor, Tensor, int]] = []
        for of_networks in steps:
            inputs = self._inputs(of_networks)
            loss, wrong = self._graph(inputs)(inputs) if self._on_gpu else self._train_step(inputs)
            waiting.append((loss, wrong, len(of_networks[0].labels)))
            if not self._on_gpu or len(waiting) == _READ_EVERY:
                yield from _results(waiting)
                waiting.clear()
        yield from _results(waiting)

    @torch.no_grad()
    def classify(self, images: Tensor, routing: Routing) -> Tensor:
        """Return the scores (images, classes) of a batch (images, 32, 32, 3) by the only network."""
        planes, assignments = images.to(self.fabric.device), _whole(routing)
        layers = zip(self._layers, self._convolutions_for(len(images)), self._stages, assignments, strict=True)
        for layer, convolution, stage, assignment in layers:
            planes, _ = stage.forward(convolution.forward(planes, self._slots_of([assignment], layer)))
            self.fabric.count(layer, [np.diff(assignment.offsets)], trained=False)
        return self._scores(planes.reshape(1, len(images), -1))[0].cpu()

    def digital_arrays(self) -> dict[str, Matrix]:
        """Return a copy of the digital parameters of the only network."""
        arrays = {}
        for name, parameter in self._digital.items():
            (of_network,) = parameter.cpu().numpy()
            arrays[name] = of_network.copy()
        return arrays

    def _inputs(self, steps: Sequence[Step]) -> _Inputs:
        """Gather the steps of all networks, and bring them to the device."""
        assignments = [_whole(step.routing) for step in steps]
        slots = []
        for layer in self._layers:
            of_layer = [of_network[layer.index] for of_network in assignments]
            slots.append(self._slots_of(of_layer, layer))
            self.fabric.count(layer, [np.diff(assignment.offsets) for assignment in of_layer], trained=True)
        rates = [(step.update.learning_rate, step.update.weight_decay) for step in steps]
        rate = np.array([rate for rate, _ in rates], np.float32)
        keep = np.array([1 - rate * decay for rate, decay in rates], np.float32)
        draws = zip(*(step.draws for step in steps), strict=True)
        return _Inputs(
            self._to_device(torch.cat([step.images for step in steps])),
            self._to_device(torch.stack([step.labels for step in steps])),
            tuple(slots),
            self._to_device(torch.from_numpy(rate.reshape(-1, 1, 1))),
            self._to_device(torch.from_numpy(keep.reshape(-1, 1, 1))),
            tuple(self._to_device(torch.cat(drawn)) for drawn in draws),
        )

    def _slots_of(self, assignments: Sequence[Assignment], layer: Layer) -> Slots:
        """Return the slots on the device; those of before where the assignments are, as in a fixed scheme."""
        key = layer.index, assignments[0].n_patches
        before, slots = self._last_slots.get(key, ((), None))
        if slots is not None and all(map(operator.is_, before, assignments)):
            return slots
        slots = lay_out(assignments, layer)
        patch_of_slot, slot_of_patch = map(self._to_device, slots.tensors())
        seen = None if slots.seen is None else self._to_device(slots.seen)
        slots = replace(slots, patch_of_slot=patch_of_slot, slot_of_patch=slot_of_patch, seen=seen)
        self._last_slots[key] = assignments, slots
        return slots

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.fabric.device, non_blocking=True) if self._on_gpu else tensor

    def _convolutions_for(self, images: int) -> list[_Convolution]:
        if images not in self._convolutions:
            self._convolutions[images] = [_Convolution(layer, self.fabric, images) for layer in self._layers]
        return self._convolutions[images]

    @torch.no_grad()
    def _train_step(self, inputs: _Inputs) -> tuple[Tensor, Tensor]:
        """Train a mini-batch of every network; return loss and number of errors, (networks,) each."""
        networks, rate, keep = self._networks, inputs.rate, inputs.keep
        convolutions = self._convolutions_for(len(inputs.images))
        draws = [*inputs.draws, *[None] * (len(self._stages) - len(inputs.draws))]
        planes, saved = inputs.images, []
        for convolution, stage, slots, draw in zip(convolutions, self._stages, inputs.slots, draws, strict=True):
            planes, for_backward = stage.forward(convolution.forward(planes, slots), draw)
            saved.append(for_backward)
        features = planes.reshape(networks, inputs.labels.shape[1], -1)
        scores = self._scores(features)
        loss, wrong, at_scores = _loss(scores, inputs.labels)
        gradients = {
            "head.weight": features.transpose(1, 2) @ at_scores,
            "head.bias": at_scores.sum(dim=1),
        }
        errors: Tensor | None = (at_scores @ self._digital["head.weight"].transpose(1, 2)).view(planes.shape)
        of_tiles = [
            (value if networks == 1 else value.repeat_interleave(layer.n_tiles, dim=0))
            for layer in self._layers
            for value in (rate, keep)
        ]
        for index in reversed(range(len(self._layers))):
            assert errors is not None
            at_outputs = self._stages[index].backward(saved[index], errors)
            errors = convolutions[index].backward(at_outputs, *of_tiles[2 * index : 2 * index + 2])
        for name, parameter in self._digital.items():
            gradient = gradients.get(name, parameter.grad)
            assert gradient is not None
            flat = parameter.view(networks, -1)
            flat.mul_(keep.view(-1, 1)).sub_(gradient.reshape(networks, -1) * rate.view(-1, 1))
            parameter.grad = None
        return loss, wrong

    def _scores(self, features: Tensor) -> Tensor:
        """Return (networks, images, classes)."""
        return torch.baddbmm(self._digital["head.bias"].unsqueeze(1), features, self._digital["head.weight"])

    def _graph(self, inputs: _Inputs) -> "_Graph":
        shape = inputs.shape
        if shape not in self._graphs:
            self._graphs[shape] = _Graph(self._train_step, self._state(), inputs)
        return self._graphs[shape]

    def _state(self) -> list[Tensor]:
        """Return everything that a step changes."""
        return [*self.fabric.tensors(), *self._digital.values()]


class _Graph:
    """A training step captured as a CUDA graph: one launch for some hundred kernels."""

    def __init__(self, step: Any, state: Sequence[Tensor], inputs: _Inputs) -> None:
        """Capture `step(inputs)`; the warm-up that capturing needs leaves no trace in `state`."""
        self._inputs = inputs
        before = [tensor.clone() for tensor in state]
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = step(inputs)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)

    def __call__(self, inputs: _Inputs) -> tuple[Tensor, Tensor]:
        """Do a step; the results are copies, to be read later."""
        for mine, given in zip(self._inputs.tensors(), inputs.tensors(), strict=True):
            if mine is not given:
                mine.copy_(given)
        self._graph.replay()
        loss, wrong = self._results
        return loss.clone(), wrong.clone()


def _whole(routing: Routing) -> list[Assignment]:
    """Return every layer's assignment for a whole mini-batch."""
    (part,) = routing.parts
    return [routing.whole, *part.assignments]


def _loss(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean cross entropy and number of errors, (networks,) each, and the errors of the scores."""
    images = scores.shape[1]
    of_labels = labels.unsqueeze(2)
    logarithms = scores.log_softmax(dim=2)
    loss = logarithms.gather(2, of_labels).sum(dim=(1, 2)) / -images
    wrong = (scores.argmax(dim=2) != labels).sum(dim=1)
    errors = logarithms.exp()
    errors.scatter_add_(2, of_labels, errors.new_full((1, 1, 1), -1.0).expand_as(of_labels))
    return loss, wrong, errors.div_(images)


def _results(waiting: Sequence[tuple[Tensor, Tensor, int]]) -> list[list[Result]]:
    """Read the results of some steps, at one go."""
    if not waiting:
        return []
    losses: NDArray[np.float32] = torch.stack([loss for loss, _, _ in waiting]).cpu().numpy()
    wrongs = torch.stack([wrong for _, wrong, _ in waiting]).cpu().numpy()
    return [
        [Result(float(loss), int(wrong), images) for loss, wrong in zip(of_step, wrong_of_step, strict=True)]
        for of_step, wrong_of_step, (_, _, images) in zip(losses, wrongs, waiting, strict=True)
    ]
