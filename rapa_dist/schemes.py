"""Tiling schemes that are the same for every image: which tile computes which pixel (§2 and Fig. 2 of the paper)."""

import difflib
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from rapa_dist.errors import UsageError
from rapa_dist.geometry import Geometry, Pair

SCHEMES = ("none", "random", "random-fixed", "alternate", "image-overlap", "image-pad", "perforated")
"""The tiling schemes by their names on the command line."""
SQUARE_SCHEMES = ("alternate", "image-overlap", "image-pad")
"""Schemes that cut the plane into q × q and so need n_t = q²."""

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


def check_tiles(scheme: str, n_tiles: int, *, where: str, plane: Pair | None = None) -> None:
    """Raise UsageError unless a layer can have so many tiles with a scheme.

    Args:
        scheme: one of `SCHEMES`.
        n_tiles: for "perforated", how many times fewer patches its one tile computes.
        where: how the layer is called in messages.
        plane: h × w of its output, if that is known.
    """
    if scheme not in SCHEMES:
        near = difflib.get_close_matches(scheme, SCHEMES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"{where}: a scheme is one of {', '.join(SCHEMES)}; not “{scheme}”.{hint}")
    if n_tiles < 1:
        raise UsageError(f"{where}: a layer needs at least 1 tile; it has {n_tiles}.")
    if scheme == "none" and n_tiles != 1:
        raise UsageError(
            f"{where}: scheme none means one tile per layer; here are {n_tiles}. Use 1, or the scheme random."
        )
    root = isqrt(n_tiles)
    if scheme in SQUARE_SCHEMES and root * root != n_tiles:
        raise UsageError(
            f"{where}: {scheme} needs a square number of tiles; here are {n_tiles}. "
            f"Use {root**2} or {(root + 1) ** 2}, or the scheme random."
        )
    if plane is None:
        return
    height, width = plane
    if n_tiles > height * width:
        raise UsageError(
            f"{where} has {height * width:,} patches per image, so at most {height * width:,} tiles can work on it; "
            f"it is given {n_tiles:,}."
        )
    if scheme in SQUARE_SCHEMES and root > min(plane):
        raise UsageError(
            f"{where}: {scheme} cuts its {height} × {width} output pixels into {root} × {root} regions, more than "
            f"there are pixels. Use at most {min(plane) ** 2} tiles, or the scheme random."
        )
