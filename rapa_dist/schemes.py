"""Tiling schemes by name, and how many tiles a layer can have with each (§2 of the paper)."""

import difflib
from math import isqrt

from rapa_dist.errors import UsageError
from rapa_dist.geometry import Pair

SCHEMES = ("none", "random", "random-fixed", "alternate", "image-overlap", "image-pad", "perforated")
"""The tiling schemes by their names on the command line."""
SQUARE_SCHEMES = ("alternate", "image-overlap", "image-pad")
"""Schemes that cut the plane into q × q and so need n_t = q²."""


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
