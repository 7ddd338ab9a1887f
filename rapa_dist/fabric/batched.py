"""Fabric `batched`: all tiles of a layer as one batched product in torch, on the CPU or a GPU.

Made for experiments: several networks of one shape can be trained at once, each with kernels, assignments and
learning rate of its own; their tiles are then simply more tiles of the same product. The cycles are those of
`AnalogTile`, equal to them within rounding.
"""

import copy
import os
import time
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rapa_dist.errors import UsageError
from rapa_dist.fabric.base import Kernels, Tiles
from rapa_dist.machine import Layer, Machine
from rapa_dist.tile import Cells, Matrix, Word


class BatchedFabric(Tiles):
    """The tiles of one machine, or of several alike, as tensors. Nothing has to be closed."""

    name = "batched"

    def __init__(
        self, machine: Machine, images: int, kernels: Sequence[Kernels], *, device: str = "cpu", step: int = 0
    ) -> None:
        """Program the tiles.

        Args:
            machine: which tiles a network has.
            images: images in the largest mini-batch of a network.
            kernels: for every network one array (n_t, k + 1, c_out) per layer.
            device: where the tensors are, "cpu" or "cuda".
            step: steps that the kernels have been trained for.
        """
        super().__init__(machine, images)
        self.networks, self.device = len(kernels), torch.device(device)
        if self.device.type == "cuda":
            compute_in_float32()
        self._weights, self._biases = [], []
        for layer in machine.layers:
            stacked = np.concatenate([of_network[layer.index] for of_network in kernels])  # (networks · n_t, k + 1, …)
            cells = torch.from_numpy(stacked).to(self.device)
            self._weights.append(cells[:, :-1].clone())
            self._biases.append(cells[:, -1:].clone())
        self._since_ns, self._start = time.monotonic_ns(), step
        self._rows = [np.zeros((self.networks, 3, layer.n_tiles), np.int64) for layer in machine.layers]
        self._updates = np.zeros(self.networks, np.int64)
        self._cells = _volatile_cells(machine)

    def alone(self, network: int) -> Self:
        """Return the fabric of one of the networks. Its tiles are those of this one: what is done here shows there."""
        one = copy.copy(self)
        one.networks = 1
        one._weights, one._biases = (
            [
                of_layer[network * layer.n_tiles :][: layer.n_tiles]
                for layer, of_layer in zip(self.machine.layers, tensors, strict=True)
            ]
            for tensors in (self._weights, self._biases)
        )
        one._rows = [of_layer[network : network + 1] for of_layer in self._rows]
        one._updates = self._updates[network : network + 1]
        one._cells = _volatile_cells(self.machine)
        return one

    def forward(self, layer: Layer, patches: Tensor) -> Tensor:
        """Return M = I K + bias of all tiles, (tiles, rows, c_out), for patches (tiles, rows, k)."""
        return torch.baddbmm(self._biases[layer.index], patches, self._weights[layer.index])

    def backward(
        self, layer: Layer, patches: Tensor, errors: Tensor, *, rate: Tensor, keep: Tensor, input_error: bool
    ) -> None:
        """Update all tiles, K ← keep · K − λ Iᵀ D, and compute dI = D Kᵀ with the kernels from before.

        Args:
            layer: whose tiles.
            patches: (tiles, rows, k) I; holds dI afterwards if `input_error`. Rows without a patch are zero.
            errors: (tiles, rows, c_out) D; zero in rows without a patch.
            rate: (tiles, 1, 1) λ of every tile, or of all: (1, 1, 1).
            keep: the same shape, 1 − λ · weight decay.
            input_error: whether dI is wanted.
        """
        weights, biases = self._weights[layer.index], self._biases[layer.index]
        gradient = torch.bmm(patches.transpose(1, 2), errors)
        if input_error:
            torch.bmm(errors, weights.transpose(1, 2), out=patches)
        weights.mul_(keep).sub_(gradient.mul_(rate))
        biases.mul_(keep).sub_(errors.sum(dim=1, keepdim=True).mul_(rate))

    def convolve(self, layer: Layer, planes: Tensor) -> Tensor:
        """Return what a layer's only tile makes of all patches, (images, side, side, c_out): an ordinary convolution.

        Args:
            layer: with one tile, of the only network.
            planes: (images, side, side, c_in).
        """
        weight, bias = self._as_convolution(layer)
        pad = [layer.kernel_side // 2] * 2
        outputs: Tensor = torch.conv2d(planes.permute(0, 3, 1, 2), weight, bias, padding=pad)
        return outputs.permute(0, 2, 3, 1)

    def convolve_back(
        self, layer: Layer, planes: Tensor, errors: Tensor, *, rate: Tensor, keep: Tensor, input_error: bool
    ) -> Tensor | None:
        """Update the tile of a `convolve`; return the errors (images, side, side, c_in) of its planes, if wanted.

        Args:
            layer: with one tile, of the only network.
            planes: (images, side, side, c_in) as they were convolved.
            errors: (images, side, side, c_out).
            rate: (1, 1, 1) λ.
            keep: (1, 1, 1) 1 − λ · weight decay.
            input_error: whether the errors of the planes are wanted.
        """
        weight, bias = self._as_convolution(layer)
        pad = [layer.kernel_side // 2] * 2
        back, of_weight, of_bias = torch.ops.aten.convolution_backward(
            errors.permute(0, 3, 1, 2),
            planes.permute(0, 3, 1, 2),
            weight,
            list(bias.shape),
            *([1, 1], pad, [1, 1], False, [0, 0], 1),  # stride, padding, dilation, not transposed, groups
            [input_error, True, True],
        )
        weights, biases = self._weights[layer.index], self._biases[layer.index]
        weights.mul_(keep).sub_(of_weight.permute(2, 3, 1, 0).reshape(weights.shape) * rate)
        biases.mul_(keep).sub_(of_bias.view(biases.shape) * rate)
        return back.permute(0, 2, 3, 1) if input_error else None

    def _as_convolution(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return the only tile's kernel as PyTorch has it, (c_out, c_in, kh, kw), and its bias."""
        kernel = self._weights[layer.index].view(layer.kernel_side, layer.kernel_side, layer.c_in, layer.c_out)
        weight = kernel.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
        return weight, self._biases[layer.index].view(-1)

    def count(self, layer: Layer, rows: Sequence[NDArray[np.int64]], *, trained: bool) -> None:
        """Take note of the rows that the tiles of every network have had in a mini-batch, (n_t,) each."""
        for network, of_network in enumerate(rows):
            forward, backward, update = self._rows[layer.index][network]
            forward += of_network
            if trained:
                update += of_network
                if layer.index > 0:
                    backward += of_network
                else:
                    self._updates[network] += 1

    def tensors(self) -> list[Tensor]:
        """Return the tensors that hold all kernels: weights and biases of every layer."""
        return [*self._weights, *self._biases]

    def kernels(self, layer: Layer) -> Matrix:
        """Return a copy of the kernels of a layer of the only network, (n_t, k + 1, c_out)."""
        assert self.networks == 1, "alone() has those of one of several networks"
        kernels: Matrix = torch.cat((self._weights[layer.index], self._biases[layer.index]), dim=1).cpu().numpy()
        return kernels

    def cells(self, layer: int) -> list[Cells]:
        """Return cells as the only network's tiles would have them now. Their processor time can't be told apart."""
        (rows,), (updates,) = self._rows[layer], self._updates.tolist()
        for tile, (cells, kernel) in enumerate(
            zip(self._cells[layer], self.kernels(self.machine.layers[layer]), strict=True)
        ):
            cells.program(kernel, self._start + updates)
            words = cells.words
            words[Word.PID], words[Word.STARTS], words[Word.SINCE_NS] = os.getpid(), 1, self._since_ns
            words[Word.ROWS_FORWARD], words[Word.ROWS_BACKWARD], words[Word.ROWS_UPDATE] = rows[:, tile].tolist()
            words[Word.UPDATES] = updates
        return self._cells[layer]

    def close(self) -> None:
        """Do nothing: the tensors go with the fabric."""


def _volatile_cells(machine: Machine) -> list[list[Cells]]:
    return [[Cells.volatile(layer.kernel_shape) for _ in range(layer.n_tiles)] for layer in machine.layers]


def compute_in_float32() -> None:
    """Have a GPU compute convolutions as it does products: in float32, and every time alike."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def check_device(device: str, *, here: bool = True) -> None:
    """Raise UsageError unless tensors can be put there.

    Args:
        device: "cpu" or "cuda".
        here: whether it is this machine that computes.
    """
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device is cpu or cuda; not “{device}”.")
    if device == "cuda" and here and not torch.cuda.is_available():
        built: Any = torch.version.cuda
        why = "PyTorch finds no GPU on this machine" if built else "this PyTorch was built for the CPU alone"
        raise UsageError(f"--device cuda needs a GPU, and {why}. Use --device cpu, or a machine with a GPU.")
