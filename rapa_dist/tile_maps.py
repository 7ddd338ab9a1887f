"""Which tile computes which pixel, for tiling schemes that are the same for every image (§2, Fig. 2 of the paper)."""

from math import isqrt

import numpy as np
from numpy.typing import NDArray

from rapa_dist.geometry import Geometry, Pair
from rapa_dist.schemes import SQUARE_SCHEMES

Indices = NDArray[np.int64]


def tile_map(scheme: str, n_tiles: int, plane: Pair, rng: np.random.Generator | None = None) -> Indices:
    """Return the (h · w,) tile of every output pixel for a scheme that is the same for every image.

    On a plane that is not square, x and y are each divided by their own length.

    Args:
        scheme: "none", "random-fixed", "alternate", "image-overlap" or "image-pad".
        n_tiles: n_t; 1 for "none", a square for the last three.
        plane: h × w of the output plane.
        rng: draws the partition of "random-fixed"; not used by the others.
    """
    height, width = plane
    y, x = np.divmod(np.arange(height * width), width)
    q = isqrt(n_tiles)
    if scheme in SQUARE_SCHEMES and q * q != n_tiles:
        raise ValueError(f"{scheme} needs a square number of tiles, not {n_tiles}")
    if scheme == "none":
        return np.zeros(height * width, np.int64)
    if scheme == "alternate":
        return np.asarray((x % q) + q * (y % q))
    if scheme in ("image-overlap", "image-pad"):
        return np.asarray(q * x // width + q * (q * y // height))
    if scheme == "random-fixed":
        if rng is None:
            raise ValueError("random-fixed needs a generator to draw its partition from")
        return rng.permutation(np.arange(height * width) % n_tiles)
    raise ValueError(f"{scheme} has no tile map that holds for every image")


def region_mask(region_of_patch: Indices, region_of_pixel: Indices, geometry: Geometry) -> NDArray[np.bool_]:
    """Return which pixels a patch may see if those of other regions are zero, as in "image-pad".

    Args:
        region_of_patch: (n_p,) as `tile_map` returns it for the output plane.
        region_of_pixel: (h · w,) the same for the input plane; each plane is cut by its own length.
        geometry: how the patches lie.

    Returns:
        (n_p, kh · kw): whether the pixel at that place of the patch lies in the plane and in the region of the patch.
    """
    columns, (height, width) = geometry.out[1], geometry.size
    y, x = np.divmod(np.arange(geometry.n_patches)[:, None], columns)
    kh, kw = np.indices(geometry.kernel).reshape(2, 1, -1)
    from_y = geometry.stride[0] * y + geometry.dilation[0] * kh - geometry.before[0]  # (n_p, kh · kw)
    from_x = geometry.stride[1] * x + geometry.dilation[1] * kw - geometry.before[1]
    inside = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
    region = region_of_pixel[np.where(inside, from_y * width + from_x, 0)]
    return np.asarray(inside & (region == region_of_patch[:, None]))
