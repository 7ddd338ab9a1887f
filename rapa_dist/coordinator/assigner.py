"""Draws the assignments of a run: the tiling scheme, layer by layer, mini-batch by mini-batch."""

from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np

from rapa_dist.assignment import (
    Assignment,
    Indices,
    assign_fixed,
    assign_perforated_in_parts,
    assign_random_in_parts,
    region_mask,
    tile_map,
)
from rapa_dist.hardware import Load
from rapa_dist.machine import Layer, Machine
from rapa_dist.network.pipeline import Part, Routing
from rapa_dist.streams import Purpose, stream


class Assigner:
    """A function of scheme, seed and place in the run, and of nothing else."""

    def __init__(self, machine: Machine, scheme: str, seed: int) -> None:
        self._machine = machine
        self._scheme = scheme
        self._seed = seed
        self._fixed = lru_cache(maxsize=64)(self._draw_fixed)

    def for_training(self, step: int, images: int) -> list[Assignment]:
        """Return every layer's assignment for the mini-batch of a step, `images` images long."""
        return self._assign_all(images, Purpose.ASSIGN_TRAIN, step)

    def for_test(self, step: int, first_image: int, images: int, vote: int = 0) -> list[Assignment]:
        """Return every layer's assignment for a batch of test images.

        Args:
            step: steps trained so far, so that every test of a run draws anew.
            first_image: the batch's place in the test set.
            images: images in the batch.
            vote: number of the vote; votes are independent.
        """
        return self._assign_all(images, Purpose.ASSIGN_TEST, step, first_image, vote)

    def route_training(self, step: int, images: int, micro_batches: int) -> Routing:
        """Return the same as `for_training`, cut into at most so many parts behind the first layer."""
        return self._route(images, micro_batches, Purpose.ASSIGN_TRAIN, step)

    def route_test(self, step: int, first_image: int, images: int, vote: int, micro_batches: int) -> Routing:
        """Return the same as `for_test`, cut into at most so many parts behind the first layer."""
        return self._route(images, micro_batches, Purpose.ASSIGN_TEST, step, first_image, vote)

    def loads(self, images: int) -> tuple[Load, ...]:
        """Return the rows of every tile in the first training step, of `images` images.

        In all other steps as many tiles have as many rows, and with scheme "random" take turns with the extra ones. The
        one tile of "perforated" may have one row more or less where it can't have an equal share.
        """
        return self._loads(self.for_training(0, images), images)

    def test_loads(self, images: int) -> tuple[Load, ...]:
        """Return the same of a test of `images` images."""
        return self._loads(self.for_test(0, 0, images), images)

    def _loads(self, assignments: list[Assignment], images: int) -> tuple[Load, ...]:
        return tuple(
            Load(rows=tuple(np.diff(assignment.offsets).tolist()), images=images, input_error=layer.index > 0)
            for layer, assignment in zip(self._machine.layers, assignments, strict=True)
        )

    def _route(self, images: int, micro_batches: int, purpose: Purpose, *place: int) -> Routing:
        first_layer, *others = self._machine.layers
        sizes = cut(images, micro_batches)
        (whole,) = self._assign(first_layer, (images,), purpose, *place)
        of_layers = [self._assign(layer, sizes, purpose, *place) for layer in others]
        edges = pairwise(accumulate(sizes, initial=0))
        parts = [Part(first, last, [of[i] for of in of_layers]) for i, (first, last) in enumerate(edges)]
        return Routing(whole, parts)

    def _assign_all(self, images: int, purpose: Purpose, *place: int) -> list[Assignment]:
        return [self._assign(layer, (images,), purpose, *place)[0] for layer in self._machine.layers]

    def _assign(self, layer: Layer, sizes: tuple[int, ...], purpose: Purpose, *place: int) -> list[Assignment]:
        if self._scheme == "random":
            rng = stream(self._seed, purpose, layer.index, *place)
            return assign_random_in_parts(layer.n_tiles, layer.n_patches, sizes, rng)
        if self._scheme == "perforated":
            perforation = layer.perforation if purpose == Purpose.ASSIGN_TRAIN else 1  # a test computes all patches
            rng = stream(self._seed, purpose, layer.index, *place)
            return assign_perforated_in_parts(perforation, layer.n_patches, sizes, rng)
        return [self._fixed(layer, size) for size in sizes]

    def _draw_fixed(self, layer: Layer, images: int) -> Assignment:
        tile_of_pixel = self._tile_map(layer)
        padded = self._scheme == "image-pad"
        mask = region_mask(tile_of_pixel, layer.side, layer.kernel_side) if padded else None
        return assign_fixed(tile_of_pixel, layer.n_tiles, images, mask)

    def _tile_map(self, layer: Layer) -> Indices:
        rng = stream(self._seed, Purpose.ASSIGN_FIXED, layer.index)
        return tile_map(self._scheme, layer.n_tiles, layer.side, rng)


@lru_cache(maxsize=256)
def cut(images: int, parts: int) -> tuple[int, ...]:
    """Return the sizes of at most `parts` parts of a mini-batch; they differ by at most one, the larger come first."""
    parts = min(parts, images)
    size, larger = divmod(images, parts)
    return (size + 1,) * larger + (size,) * (parts - larger)
