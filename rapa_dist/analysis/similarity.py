"""Similarity S of the filters that the tiles of a layer have learnt (Fig. 3 of the paper). Pure NumPy."""

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
