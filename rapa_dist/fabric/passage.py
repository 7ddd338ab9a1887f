"""A passage: some images on their way through a tile array, forward, and with the same assignment backward.

It is the seam between the network and the fabrics: above it are planes, below it rows in tile order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from rapa_dist.tile import Update

if TYPE_CHECKING:  # who only reads about a run does without it
    from torch import Tensor


class Passage(ABC):
    """First `begin` and `outputs`; then, where errors come back, `send_errors` and `input_errors`; or `release`."""

    shared: bool = False
    """Whether other parts of the mini-batch wait for the same cycle: none of them gets on before it is done."""

    @abstractmethod
    def begin(self) -> None:
        """Have the tiles begin the forward cycle; returns while they work. Does nothing the second time."""

    def prepare(self) -> None:  # noqa: B027  most have nothing to do
        """Do what can be done before `begin`, while there is time."""

    @abstractmethod
    def outputs(self, first: int = 0, last: int | None = None) -> Tensor:
        """Wait for the tiles, and return the outputs M of some images or all, (images, h, w, c_out).

        Args:
            first: first image.
            last: one past the last image; None: all from the first on.
        """

    @abstractmethod
    def send_errors(self, errors: Tensor, update: Update | None, *, input_error: bool, commit: bool) -> None:
        """Have the tiles pass errors back and prepare an update; returns while they work.

        Args:
            errors: (images, h, w, c_out) D.
            update: λ and decay, or None to leave the kernels alone.
            input_error: whether the errors of the planes are wanted.
            commit: whether the kernels that are prepared then are put in force.
        """

    @abstractmethod
    def input_errors(self) -> Tensor | None:
        """Wait for the tiles, and return the errors of the planes, (images, h, w, c_in), if they were wanted."""

    def kernel_gradient(self) -> Tensor | None:
        """Return Iᵀ D of every tile, (n_t, k + 1, c_out), where no tile takes its own update; else None."""
        return None

    @abstractmethod
    def release(self) -> None:
        """Give back the memory that the passage holds. Safe to call twice."""
