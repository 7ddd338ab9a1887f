"""Similarity S of the filters that the tiles of a layer have learnt (Fig. 3 of the paper). Pure NumPy."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rapa_dist.tile import Matrix


def channel_similarity(filters: Matrix) -> NDArray[np.float64]:
    """Return, per output channel, the mean correlation coefficient between the filters of all pairs of tiles.

    Args:
        filters: (n_t, k, c_out), kernels without their biases.

    Returns:
        (c_out,); not a number with fewer than two tiles. A filter that is constant correlates with none: 0.
    """
    n_tiles = len(filters)
    if n_tiles < 2:
        return np.full(filters.shape[2], np.nan)
    centred = filters.astype(np.float64)
    centred -= centred.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    centred = np.divide(centred, norms, out=np.zeros_like(centred), where=norms > 0)
    of_all, with_themselves = (centred.sum(axis=0) ** 2).sum(axis=0), (centred**2).sum(axis=(0, 1))
    pairs: NDArray[np.float64] = (of_all - with_themselves) / (n_tiles * (n_tiles - 1))
    return pairs


def similarity(filters: Matrix) -> float | None:
    """Return S of a layer, the mean of `channel_similarity`; None with fewer than two tiles."""
    return None if len(filters) < 2 else float(channel_similarity(filters).mean())


class Projection(NamedTuple):
    """Kernels in two parts: along the random starts of their tiles, which are similar to nothing, and the rest."""

    share: float
    """Of its own start in a tile's kernel, in the mean; 1 before training.

    It is what weight decay leaves of the start and, beside that, whatever the tiles have learnt along it, forwards or
    backwards: not a measure of how much of the start has survived, for which see `learnt.decay_leaves`.
    """
    similarity: float
    """S of the rest: of what the tiles have learnt but along their starts."""


def project_on_start(filters: Matrix, start: Matrix) -> Projection | None:
    """Split the kernels of a layer by least squares: K_i = common + share · K_i(0) + rest.

    Every tile starts from a kernel of its own, so that S is low as long as much of that is there, whatever the tiles
    learn. The share is one number for all weights of the layer.

    Args:
        filters: (n_t, k, c_out), kernels without their biases.
        start: the same before training.

    Returns:
        None with fewer than two tiles, which have nothing in common to split off.
    """
    if len(filters) < 2:
        return None
    now, then = filters.astype(np.float64), start.astype(np.float64)
    own, own_start = now - now.mean(axis=0), then - then.mean(axis=0)
    of_start = float((own_start**2).sum())
    share = float((own * own_start).sum()) / of_start if of_start else 0.0  # all tiles may have started alike
    rest = filters - share * start
    return Projection(share, float(channel_similarity(rest).mean()))


def similarities(
    filters: Sequence[Matrix], start: Sequence[Matrix], decay_leaves: Sequence[float]
) -> dict[str, list[float | None]]:
    """Return S of every layer, the share of the start beside what decay leaves, and S of the rest; None for one tile.

    Args:
        filters: one array (n_t, k, c_out) per layer.
        start: the same before training.
        decay_leaves: per layer the share of the start that weight decay alone would have left.
    """
    found = [project_on_start(of_layer, before) for of_layer, before in zip(filters, start, strict=True)]
    return {
        "similarity": [similarity(of_layer) for of_layer in filters],
        "start_projection": [None if of_layer is None else of_layer.share for of_layer in found],
        "decay_leaves": [
            None if of_layer is None else left for of_layer, left in zip(found, decay_leaves, strict=True)
        ],
        "similarity_of_rest": [None if of_layer is None else of_layer.similarity for of_layer in found],
    }
