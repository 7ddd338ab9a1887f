"""Assignments: which tile computes which patch of a mini-batch. Pure NumPy, no state.

A patch of a mini-batch is numbered image · n_p + y · width + x, for its place in the output plane. An assignment
lists the patches tile by tile, so that the rows of one tile lie side by side in memory, and says where those of each
begin.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Assignment:
    """Who computes what in one mini-batch of one layer.

    Drawn in the forward cycle and kept for backward and update. A patch that is missing from `order` is
    dropped: no tile computes it, its output is zero and it passes no error back.
    """

    order: Indices
    """(rows,): row r, counted tile by tile, is patch order[r]."""
    offsets: Indices
    """(n_t + 1,): tile j has the rows offsets[j] … offsets[j + 1] − 1."""
    n_patches: int
    """Patches in the mini-batch, dropped ones included."""
    mask: NDArray[np.bool_] | None = None
    """(n_p, kh · kw): False where a patch must see zero instead of the pixel; None: it sees all."""
    draw: int = 0
    """64-bit number of the passage, for what tiles that are not ideal draw; see `rapa_dist.physics.draws`."""

    @property
    def rows(self) -> int:
        """Rows that are computed."""
        return self.order.size

    def inverse(self) -> Indices:
        """Return (n_patches,) the row of every patch, and `rows` for a patch that is dropped."""
        if self.rows == self.n_patches:
            row = np.empty(self.n_patches, np.int64)
        else:
            row = np.full(self.n_patches, self.rows, np.int64)
        row[self.order] = np.arange(self.rows)
        return row


def assign_fixed(
    tile_of_pixel: Indices, n_tiles: int, images: int, mask: NDArray[np.bool_] | None = None
) -> Assignment:
    """Assign the patches of a mini-batch by one map that holds for every image.

    Args:
        tile_of_pixel: (n_p,) as `tile_map` returns it.
        n_tiles: n_t.
        images: images in the mini-batch.
        mask: (n_p, kh · kw) as `region_mask` returns it, or None.
    """
    assignment = _by_tile(np.tile(tile_of_pixel, images), n_tiles)
    return assignment if mask is None else replace(assignment, mask=mask)


def assign_random(n_tiles: int, n_patches: int, images: int, rng: np.random.Generator) -> Assignment:
    """Partition the patches of every image anew and at random into equal parts ("random").

    Parts differ by at most one row, within an image and over the mini-batch. Where n_t does not divide the rows, the
    tiles that have one more are drawn at random: none has more than others in the long run.

    Args:
        n_tiles: n_t.
        n_patches: n_p, patches of one image.
        images: images in the mini-batch.
        rng: the layer's stream for this mini-batch.
    """
    (assignment,) = assign_random_in_parts(n_tiles, n_patches, (images,), rng)
    return assignment


def assign_random_in_parts(
    n_tiles: int, n_patches: int, images: tuple[int, ...], rng: np.random.Generator
) -> list[Assignment]:
    """Assign a mini-batch as `assign_random` does, and return it cut into parts of so many images each.

    Every patch goes to the same tile however the mini-batch is cut; patches are numbered within their part.
    """
    if n_tiles == 1:
        return [_one_tile(n_patches * size) for size in images]
    pixels = rng.permuted(_pixels_of_images(n_patches, sum(images)), axis=1)  # shuffled within each image
    turns = rng.permutation(n_tiles) if n_patches % n_tiles else None
    parts, first = [], 0
    for size in images:
        dealt = _dealt(n_tiles, n_patches, first, size)
        if turns is not None:
            dealt = _in_other_turns(dealt, turns)
        patches = (pixels[first : first + size] + _first_patches(n_patches, size)).ravel()
        parts.append(Assignment(patches[dealt.order], dealt.offsets, size * n_patches))
        first += size
    return parts


def assign_perforated_in_parts(
    perforation: int, n_patches: int, images: tuple[int, ...], rng: np.random.Generator
) -> list[Assignment]:
    """Have one tile compute a random n_p / perforation of every image's patches; drop the others ("perforated").

    It is what one of so many tiles would get of `assign_random_in_parts`: where the patches can't be divided, one
    more of some images than of others, drawn at random, and as many as that in the mean.

    Args:
        perforation: how many times fewer patches are computed, what n_t is to the other schemes.
        n_patches: n_p, patches of one image.
        images: images in each part of the mini-batch.
        rng: the layer's stream for this mini-batch.

    Returns:
        One assignment per part; patches are numbered within their part.
    """
    if perforation == 1:
        return [_one_tile(n_patches * size) for size in images]
    pixels = rng.permuted(_pixels_of_images(n_patches, sum(images)), axis=1)
    turn = int(rng.integers(perforation)) if n_patches % perforation else 0
    first_place = np.arange(sum(images) + 1) * n_patches  # of an image, if those of all are dealt one by one
    n_kept = np.diff(-((turn - first_place) // perforation))  # (images,) patches dealt to the tile whose turn it is
    kept = np.arange(n_patches) < n_kept[:, None]  # (images, n_p)
    parts, first = [], 0
    for size in images:
        of_part = slice(first, first + size)
        patches = (pixels[of_part] + _first_patches(n_patches, size))[kept[of_part]]
        parts.append(Assignment(patches, np.array([0, patches.size]), size * n_patches))
        first += size
    return parts


@lru_cache(maxsize=256)
def _dealt(n_tiles: int, n_patches: int, first: int, images: int) -> Assignment:
    """Return which places of the shuffled patches, from image `first` on, go to which tile: dealt one by one.

    Where n_t does not divide the patches, the first tiles are dealt one more, over the mini-batch and in its first
    image; those behind them in the second.
    """
    place = first * n_patches + np.arange(images * n_patches)
    return _by_tile(place % n_tiles, n_tiles)


def _in_other_turns(dealt: Assignment, turns: Indices) -> Assignment:
    """Return the same with tile j in the place of tile turns[j]."""
    sizes = np.diff(dealt.offsets)[turns]
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    from_row = np.repeat(dealt.offsets[turns] - offsets[:-1], sizes) + np.arange(dealt.rows)
    return Assignment(dealt.order[from_row], offsets, dealt.n_patches)


@lru_cache(maxsize=64)
def _pixels_of_images(n_patches: int, images: int) -> NDArray[np.int32]:
    return np.tile(np.arange(n_patches, dtype=np.int32), (images, 1))


@lru_cache(maxsize=64)
def _first_patches(n_patches: int, images: int) -> Indices:
    return np.arange(images, dtype=np.int64)[:, None] * n_patches


@lru_cache(maxsize=64)
def _one_tile(rows: int) -> Assignment:
    return Assignment(np.arange(rows), np.array([0, rows]), rows)


def _by_tile(tile_of_patch: Indices, n_tiles: int) -> Assignment:
    order = np.argsort(tile_of_patch, kind="stable")
    offsets = np.concatenate(([0], np.cumsum(np.bincount(tile_of_patch, minlength=n_tiles))))
    return Assignment(order, offsets, tile_of_patch.size)
