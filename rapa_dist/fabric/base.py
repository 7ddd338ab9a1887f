"""What the coordinator may ask of a fabric: passages through tile arrays, and what is in the tiles between steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from rapa_dist.assignment import Assignment
from rapa_dist.fabric.passage import Passage
from rapa_dist.geometry import Geometry
from rapa_dist.inspection import TileStats
from rapa_dist.machine import Machine, TileArray
from rapa_dist.tile import Matrix

if TYPE_CHECKING:  # who only reads about a run does without it
    from torch import Tensor

Kernels = Sequence[Matrix]
"""The kernels of a whole machine: one array (n_t, k + 1, c_out) per tile array."""


class Fabric(ABC):
    """Where the tiles of a machine live. A context manager: leaving it stops the tiles and frees what they held."""

    name: ClassVar[str]
    gives_gradients: ClassVar[bool] = False
    """Whether passages return the gradients of kernels, for the optimizer; else tiles update themselves."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def bind(self, parameters: Sequence[Tensor]) -> None:  # noqa: B027  most have nothing to do
        """Take note of the layers' parameters, by tile array; a fabric that gives gradients computes with them."""

    @abstractmethod
    def passage(self, array: TileArray, geometry: Geometry, planes: Tensor, assignment: Assignment) -> Passage:
        """Prepare a passage: gather the patches of planes (images, h, w, c_in) in tile order. No tile is told yet."""

    @abstractmethod
    def commit(self, arrays: Sequence[int]) -> None:
        """Put the updates that tile arrays have prepared in force; returns when that is done."""

    @abstractmethod
    def discard(self, arrays: Sequence[int]) -> None:
        """Have tile arrays forget the updates that they have prepared; returns when that is done."""

    def together(self) -> AbstractContextManager[None]:
        """Have the cycles that are begun inside reach every tile at once, when it is left; none may be waited for.

        A matter of speed alone: a tile that is woken once for two cycles finds its memory still in the caches.
        """
        return nullcontext()

    @abstractmethod
    def kernels(self, array: TileArray) -> Matrix:
        """Return a copy of the kernels of a tile array, (n_t, k + 1, c_out). Between steps only."""

    def all_kernels(self) -> list[Matrix]:
        """Return a copy of the kernels of all tile arrays. Between steps only."""
        return [self.kernels(array) for array in self.machine.arrays]

    def stored(self) -> dict[int, Matrix]:
        """Return what devices store, by number of the tile array, where writing is noisy: (n_t, k + 1, c_out) each.

        Elsewhere that is what is seen of it, the kernels. Between steps only.
        """
        return {}

    def restore(self, kernels: Kernels, stored: Mapping[int, Matrix]) -> None:
        """Put what was stored back, with what was seen of it: tiles go on with the very bits that they had.

        Args:
            kernels: of all tile arrays, as `all_kernels` returned them; they have been programmed.
            stored: as `stored` returned it at the same moment.
        """
        if stored:
            raise ValueError(f"tiles of the fabric {self.name} have no noise of writing")

    @abstractmethod
    def write(self, array: TileArray, kernels: Matrix, step: int) -> None:
        """Program kernels (n_t, k + 1, c_out), as after `step` steps, into tiles, which are not at work."""

    def program(self, kernels: Kernels, step: int) -> None:
        """Program all tiles: one array (n_t, k + 1, c_out) per tile array."""
        for array, of_array in zip(self.machine.arrays, kernels, strict=True):
            expected = (array.n_tiles, *array.kernel_shape)
            if np.shape(of_array) != expected:
                raise ValueError(f"kernels of {array.name} have the shape {np.shape(of_array)}, expected {expected}")
            self.write(array, of_array, step)

    @abstractmethod
    def stats(self) -> list[TileStats]:
        """Return what the tiles have done so far."""

    @abstractmethod
    def busy_ns(self, array: int) -> list[int]:
        """Return by tile of an array the processor time that it has taken in cycles so far."""

    @property
    def spread(self) -> bool:
        """Whether tiles live on other nodes than the coordinator's: they can be lost, with their kernels."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Stop the tiles and free what they held. Safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
