"""Fabric `batched`: all tiles of a layer as one batched product in torch, on the CPU or a GPU.

Made for experiments: several networks of one shape can be trained at once, each with kernels, assignments and
learning rate of its own; their tiles are then simply more tiles of the same product. The cycles are those of
`AnalogTile`, equal to them within rounding.
"""

import os
import time
from collections.abc import Sequence
from typing import Any

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
        self._weights, self._biases = [], []
        for layer in machine.layers:
            stacked = np.concatenate([of_network[layer.index] for of_network in kernels])  # (networks · n_t, k + 1, …)
            cells = torch.from_numpy(stacked).to(self.device)
            self._weights.append(cells[:, :-1].clone())
            self._biases.append(cells[:, -1:].clone())
        self._since_ns, self._step = time.monotonic_ns(), step
        self._rows = [np.zeros((3, layer.n_tiles), np.int64) for layer in machine.layers]
        self._updates = 0
        self._cells = [[Cells.volatile(layer.kernel_shape) for _ in range(layer.n_tiles)] for layer in machine.layers]

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

    def count(self, layer: Layer, rows: NDArray[np.int64], *, trained: bool) -> None:
        """Take note of the rows (n_t,) that the tiles of the first network have had in a mini-batch."""
        forward, backward, update = self._rows[layer.index]
        forward += rows
        if trained:
            update += rows
            if layer.index > 0:
                backward += rows
            else:
                self._step += 1
                self._updates += 1

    def tensors(self) -> list[Tensor]:
        """Return the tensors that hold all kernels: weights and biases of every layer."""
        return [*self._weights, *self._biases]

    def kernels(self, layer: Layer, network: int = 0) -> Matrix:
        """Return a copy of the kernels of a layer, (n_t, k + 1, c_out)."""
        tiles = slice(network * layer.n_tiles, (network + 1) * layer.n_tiles)
        both = torch.cat((self._weights[layer.index][tiles], self._biases[layer.index][tiles]), dim=1)
        kernels: Matrix = both.cpu().numpy()
        return kernels

    def cells(self, layer: int) -> list[Cells]:
        """Return cells as the first network's tiles would have them now. Their processor time can't be told apart."""
        rows = self._rows[layer]
        for tile, (cells, kernel) in enumerate(
            zip(self._cells[layer], self.kernels(self.machine.layers[layer]), strict=True)
        ):
            cells.program(kernel, self._step)
            words = cells.words
            words[Word.PID], words[Word.STARTS], words[Word.SINCE_NS] = os.getpid(), 1, self._since_ns
            words[Word.ROWS_FORWARD], words[Word.ROWS_BACKWARD], words[Word.ROWS_UPDATE] = rows[:, tile].tolist()
            words[Word.UPDATES] = self._updates
        return self._cells[layer]

    def close(self) -> None:
        """Do nothing: the tensors go with the fabric."""


def check_device(device: str) -> None:
    """Raise UsageError unless tensors can be put there."""
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device is cpu or cuda; not “{device}”.")
    if device == "cuda" and not torch.cuda.is_available():
        built: Any = torch.version.cuda
        why = "PyTorch finds no GPU on this machine" if built else "this PyTorch was built for the CPU alone"
        raise UsageError(f"--device cuda needs a GPU, and {why}. Use --device cpu, or a machine with a GPU.")
