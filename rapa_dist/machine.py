"""What is emulated: tile arrays, each the replicas of one layer's kernel matrix. Arithmetic on shapes only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING

from rapa_dist.geometry import Geometry

if TYPE_CHECKING:  # arithmetic on shapes needs no NumPy, and `--help` is quicker without
    from rapa_dist.physics.choosing import PhysicsChoice
    from rapa_dist.physics.parameters import Physics
    from rapa_dist.tile import Matrix

IMAGE = (3, 32, 32)
"""Channels, h and w of an image in the paper."""
_KERNEL = 5  # every convolution of Caffe's "Full" CIFAR-10 network is 5 × 5, pad 2, stride 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TileArray:
    """The n_t tiles of one layer, and what an image asks of them."""

    index: int
    """Position among the tile arrays of the network, from 0."""
    name: str
    """The layer's name in its model, like "features.0"."""
    k: int
    """Length of a patch: kh · kw · c_in."""
    c_out: int
    """Output channels: columns of the kernel matrix."""
    n_tiles: int
    """n_t: replicas of the kernel matrix, each on a tile of its own."""
    bias: bool = True
    """Whether the kernel matrix has a last row for the bias."""
    scheme: str = "none"
    """Which tile computes which patch, one of `SCHEMES`."""
    passages: tuple[Geometry, ...] = ()
    """For each time that an image passes through the layer, how its patches lie; one unless the layer is used again."""
    input_error: bool = True
    """Whether the errors of the layer's input are wanted; not where its input is the image itself."""
    perforation: int = 1
    """In training one patch in so many is computed, and the others are dropped (scheme "perforated")."""
    physics: Physics | None = None
    """What its tiles are like; None: ideal."""
    seed: int = 0
    """Of what its tiles draw, if they are not ideal."""

    @property
    def n_patches(self) -> int:
        """n_p: patches per image, one for each output pixel."""
        return sum(geometry.n_patches for geometry in self.passages)

    @property
    def stores(self) -> bool:
        """Whether its devices store something else than what is seen of it: writing is noisy."""
        return self.physics is not None and self.physics.device is not None and self.physics.device.write_noise > 0

    @property
    def kernel_shape(self) -> tuple[int, int]:
        """Shape of the matrix on one tile, (k + 1, c_out); the last row is the bias. Without bias (k, c_out)."""
        return self.k + self.bias, self.c_out

    def filters(self, kernels: Matrix) -> Matrix:
        """Return kernels (…, k + 1, c_out) without the bias row, if they have one: a view (…, k, c_out)."""
        return kernels[..., : self.k, :]

    @property
    def n_weights(self) -> int:
        """Weights on all tiles, biases included."""
        rows, columns = self.kernel_shape
        return self.n_tiles * rows * columns

    @property
    def row_floats(self) -> int:
        """Floats that a row takes in an arena: patch and output."""
        return self.k + self.c_out


@dataclass(frozen=True)
class Machine:
    """All tile arrays of a network, in the order in which an image first meets them."""

    arrays: tuple[TileArray, ...]

    @classmethod
    def build(
        cls,
        *,
        channels: tuple[int, ...],
        tiles: tuple[int, ...],
        scheme: str = "random",
        image: tuple[int, ...] = IMAGE,
    ) -> Machine:
        """Lay out the paper's network: Caffe's "Full" CIFAR-10 network.

        Args:
            channels: c_out per layer.
            tiles: n_t per layer; for "perforated", how many times fewer patches its one tile computes.
            scheme: of all layers; those with one tile have none.
            image: channels, h and w of an image.
        """
        arrays, pad = [], _KERNEL // 2
        c_in, h, w = image
        for index, (c_out, number) in enumerate(zip(channels, tiles, strict=True)):
            perforated = scheme == "perforated"
            geometry = Geometry(size=(h, w), kernel=(_KERNEL, _KERNEL), before=(pad, pad), after=(pad, pad))
            arrays.append(
                TileArray(
                    index=index,
                    name=f"conv{index}",
                    k=geometry.places * c_in,
                    c_out=c_out,
                    n_tiles=1 if perforated else number,
                    scheme=scheme if number > 1 else "none",
                    passages=(geometry,),
                    input_error=index > 0,
                    perforation=number if perforated else 1,
                )
            )
            c_in, h, w = c_out, pooled(h), pooled(w)
        return cls(tuple(arrays))

    def with_physics(self, choice: PhysicsChoice | None, seed: int) -> Machine:
        """Return the machine on arrays that are as a user chose; None: ideal.

        Args:
            choice: what each layer is like.
            seed: of what tiles draw.

        Raises:
            UsageError: a layer that has its own physics is not there.
        """
        if choice is None:
            return self
        choice.check_layers([array.name for array in self.arrays])
        arrays = []
        for array in self.arrays:
            physics = choice.of(array.index, array.name)
            arrays.append(array if physics.is_ideal else replace(array, physics=physics, seed=seed))
        return Machine(tuple(arrays))

    @cached_property
    def tiles(self) -> tuple[tuple[int, int], ...]:
        """Every tile as (array, tile), in a fixed order: a tile's place here is its number."""
        return tuple((array.index, tile) for array in self.arrays for tile in range(array.n_tiles))

    @property
    def tiled(self) -> bool:
        """Whether some layer has several kernel matrices."""
        return any(array.n_tiles > 1 for array in self.arrays)

    @property
    def n_weights(self) -> int:
        """Weights on all tiles of all layers (79,328 for the paper's untiled network)."""
        return sum(array.n_weights for array in self.arrays)


def pooled(side: int) -> int:
    """Return the length of a plane's side after 3 × 3 pooling with stride 2, rounded up as Caffe does."""
    return max(1, ceil((side - 3) / 2) + 1)


def tile_name(array: int, tile: int) -> str:
    """Return the name of a tile within its run: "L0/T003"."""
    return f"L{array}/T{tile:03d}"
