"""Draws the assignments of a run: by each layer's tiling scheme, mini-batch by mini-batch."""

from dataclasses import replace
from functools import lru_cache

import numpy as np

from rapa_dist.assignment import Assignment, assign_fixed, assign_perforated_in_parts, assign_random_in_parts
from rapa_dist.geometry import Geometry
from rapa_dist.hardware import Load
from rapa_dist.machine import Machine, TileArray
from rapa_dist.physics.draws import cycle_of
from rapa_dist.streams import Purpose, stream
from rapa_dist.tile_maps import region_mask, tile_map


class Router:
    """A function of the seed and the place in the run, and of nothing else."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._fixed = lru_cache(maxsize=256)(self._assign_fixed)

    def assign(
        self, array: TileArray, geometry: Geometry, purpose: Purpose, place: tuple[int, ...], sizes: tuple[int, ...]
    ) -> list[Assignment]:
        """Return which tile computes which patch of a mini-batch, for each of its parts.

        Args:
            array: whose tiles.
            geometry: how the patches lie.
            purpose: ASSIGN_TRAIN or ASSIGN_TEST.
            place: where in the run, as documented at the purpose, without the layer.
            sizes: images of the parts.
        """
        found = self._assign(array, geometry, purpose, place, sizes)
        if array.physics is None:
            return found
        return [
            replace(assignment, draw=cycle_of(self._seed, purpose, place, part))
            for part, assignment in enumerate(found)
        ]

    def _assign(
        self, array: TileArray, geometry: Geometry, purpose: Purpose, place: tuple[int, ...], sizes: tuple[int, ...]
    ) -> list[Assignment]:
        if array.scheme == "random":
            rng = stream(self._seed, purpose, array.index, *place)
            return assign_random_in_parts(array.n_tiles, geometry.n_patches, sizes, rng)
        if array.scheme == "perforated":
            perforation = array.perforation if purpose == Purpose.ASSIGN_TRAIN else 1  # a test computes all patches
            rng = stream(self._seed, purpose, array.index, *place)
            return assign_perforated_in_parts(perforation, geometry.n_patches, sizes, rng)
        return [self._fixed(array, geometry, size) for size in sizes]

    def _assign_fixed(self, array: TileArray, geometry: Geometry, images: int) -> Assignment:
        rng = stream(self._seed, Purpose.ASSIGN_FIXED, array.index)
        tile_of_pixel = tile_map(array.scheme, array.n_tiles, geometry.out, rng)
        mask = None
        if array.scheme == "image-pad":
            mask = region_mask(tile_of_pixel, tile_map(array.scheme, array.n_tiles, geometry.size), geometry)
        return assign_fixed(tile_of_pixel, array.n_tiles, images, mask)


def loads(machine: Machine, router: Router, images: int, *, training: bool) -> tuple[Load, ...]:
    """Return the rows of every tile in the first training step or test of `images` images.

    In all others as many tiles have as many rows, and with scheme "random" take turns with the extra ones. The one tile
    of "perforated" may have one row more or less where it can't have an equal share.
    """
    purpose, place = (Purpose.ASSIGN_TRAIN, (0,)) if training else (Purpose.ASSIGN_TEST, (0, 0, 0))
    found = []
    for array in machine.arrays:
        rows = np.zeros(array.n_tiles, np.int64)
        for call, geometry in enumerate(array.passages):
            at = (*place, call) if call else place
            (assignment,) = router.assign(array, geometry, purpose, at, (images,))
            rows += np.diff(assignment.offsets)
        found.append(Load(rows=tuple(rows.tolist()), images=images, input_error=array.input_error))
    return tuple(found)
