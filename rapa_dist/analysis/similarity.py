"""Similarity S of the filters that the tiles of a layer have learnt (Fig. 3 of the paper). Pure NumPy."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rapa_dist.tile import Matrix


def channel_similarity(kernels: Matrix) -> NDArray[np.float64]:
    """Return, per output channel, the mean correlation coefficient between the filters of all pairs of tiles.

    Args:
        kernels: (n_t, k + 1, c_out) with the bias as last row, which is not part of a filter.

    Returns:
        (c_out,); not a number with fewer than two tiles. A filter that is constant correlates with none: 0.
    """
    n_tiles = len(kernels)
    if n_tiles < 2:
        return np.full(kernels.shape[2], np.nan)
    filters = kernels[:, :-1].astype(np.float64)
    filters -= filters.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(filters, axis=1, keepdims=True)
    filters = np.divide(filters, norms, out=np.zeros_like(filters), where=norms > 0)
    of_all, with_themselves = (filters.sum(axis=0) ** 2).sum(axis=0), (filters**2).sum(axis=(0, 1))
    pairs: NDArray[np.float64] = (of_all - with_themselves) / (n_tiles * (n_tiles - 1))
    return pairs


def similarity(kernels: Matrix) -> float | None:
    """Return S of a layer, the mean of `channel_similarity`; None with fewer than two tiles."""
    return None if len(kernels) < 2 else float(channel_similarity(kernels).mean())


class Projection(NamedTuple):
    """Kernels in two parts: along the random starts of their tiles, which are similar to nothing, and the rest."""

    share: float
    """Of its own start in a tile's kernel, in the mean; 1 before training.

    It is what weight decay leaves of the start and, beside that, whatever the tiles have learnt along it, forwards or
    backwards: not a measure of how much of the start has survived, for which see `learnt.decay_leaves`.
    """
    similarity: float
    """S of the rest: of what the tiles have learnt but along their starts."""


def project_on_start(kernels: Matrix, start: Matrix) -> Projection | None:
    """Split the kernels of a layer by least squares: K_i = common + share · K_i(0) + rest.

    Every tile starts from a kernel of its own, so that S is low as long as much of that is there, whatever the tiles
    learn. The share is one number for all weights of the layer.

    Args:
        kernels: (n_t, k + 1, c_out) with the bias as last row, which is left out.
        start: the same shape, before training.

    Returns:
        None with fewer than two tiles, which have nothing in common to split off.
    """
    if len(kernels) < 2:
        return None
    now, then = kernels[:, :-1].astype(np.float64), start[:, :-1].astype(np.float64)
    own, own_start = now - now.mean(axis=0), then - then.mean(axis=0)
    share = float((own * own_start).sum() / (own_start**2).sum())
    rest = kernels.copy()
    rest[:, :-1] -= share * start[:, :-1]
    return Projection(share, float(channel_similarity(rest).mean()))


def similarities(
    kernels: Sequence[Matrix], start: Sequence[Matrix], decay_leaves: float
) -> dict[str, list[float | None]]:
    """Return S of every layer, the share of the start beside what decay leaves, and S of the rest; None for one tile.

    Args:
        kernels: one array (n_t, k + 1, c_out) per layer.
        start: the same before training.
        decay_leaves: share of the start that weight decay alone would have left.
    """
    found = [project_on_start(of_layer, before) for of_layer, before in zip(kernels, start, strict=True)]
    return {
        "similarity": [similarity(of_layer) for of_layer in kernels],
        "start_projection": [None if of_layer is None else of_layer.share for of_layer in found],
        "decay_leaves": [None if of_layer is None else decay_leaves for of_layer in found],
        "similarity_of_rest": [None if of_layer is None else of_layer.similarity for of_layer in found],
    }
