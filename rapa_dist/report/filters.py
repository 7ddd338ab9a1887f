"""Filters as pictures, and how alike those of any two tiles are. NumPy and Pillow only."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rapa_dist.geometry import Pair
from rapa_dist.tile import Matrix

_GAP = 1  # transparent pixels between two filters


def filter_row(kernel: Matrix, size: Pair) -> str:
    """Return a PNG, as a data URI, of the filters of a first layer's tile, side by side, a pixel for each weight.

    Every filter is scaled by its largest weight: 0 is mid-grey, and colours are those of the image's channels.

    Args:
        kernel: filters (k, c_out), k ordered (kh, kw, c_in), c_in 3 (colours) or 1 (grey).
        size: kh × kw.
    """
    c_out, (height, width) = kernel.shape[1], size
    filters = kernel.T.reshape(c_out, height, width, -1).astype(np.float64)
    largest = np.abs(filters).max(axis=(1, 2, 3), keepdims=True)
    levels = np.divide(filters, largest, out=np.zeros_like(filters), where=largest > 0)
    pixels = np.zeros((height, c_out * (width + _GAP) - _GAP, 4), np.uint8)
    for number, level in enumerate(levels):
        left = number * (width + _GAP)
        pixels[:, left : left + width, :3] = np.rint(127.5 + 127.5 * level)
        pixels[:, left : left + width, 3] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def tile_similarity(filters: Matrix) -> NDArray[np.float64]:
    """Return the correlation coefficient of the filters of any two tiles, mean over output channels.

    The mean of all entries off the diagonal is S of the layer.

    Args:
        filters: (n_t, k, c_out), kernels without their biases.

    Returns:
        (n_t, n_t), symmetric; 1 on the diagonal unless a filter is constant, which correlates with none.
    """
    centred = filters.astype(np.float64)
    centred -= centred.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    centred = np.divide(centred, norms, out=np.zeros_like(centred), where=norms > 0)
    flat = centred.reshape(len(filters), -1)
    pairs: NDArray[np.float64] = flat @ flat.T / filters.shape[2]
    return pairs


def filter_norms(filters: Matrix) -> NDArray[np.float64]:
    """Return the Euclidean norm of every filter, (n_t, c_out), given filters (n_t, k, c_out)."""
    norms: NDArray[np.float64] = np.linalg.norm(filters.astype(np.float64), axis=1)
    return norms
