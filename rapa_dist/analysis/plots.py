"""The plots of `rapa-dist analyze`, as SVG. Nothing here computes what it shows."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rapa_dist.analysis.weights import positions
from rapa_dist.command_lines import no_matplotlib
from rapa_dist.coordinator.checkpoint import Checkpoint
from rapa_dist.errors import RapaError, UsageError
from rapa_dist.fabric.base import Kernels
from rapa_dist.files import write_whole
from rapa_dist.geometry import Pair
from rapa_dist.layout import machine_of
from rapa_dist.machine import TileArray
from rapa_dist.similarity import channel_similarity
from rapa_dist.tile import Matrix

_FILTERS = 10
_TILES = 16
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999", "#7f3c8d")


def check_can_plot() -> None:
    """Raise RapaError if plots can't be drawn; before any work."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise RapaError(no_matplotlib("Plots can't be drawn")) from error


def plot_similarity(path: Path, kernels: Kernels, arrays: Sequence[TileArray]) -> None:
    """Draw some filters of the first layer on its tiles (Fig. 3 B), and the similarity of channels in every layer.

    Args:
        path: the SVG to write.
        kernels: one array (n_t, k + 1, c_out) per layer.
        arrays: the layers.
    """
    filters = [array.filters(of_layer) for array, of_layer in zip(arrays, kernels, strict=True)]
    with _figure(path, 10, 5) as figure:
        left, right = figure.subfigures(1, 2, width_ratios=(1.4, 1))
        axes = left.add_subplot()
        axes.imshow(_grid(filters[0], arrays[0].passages[0].kernel), interpolation="nearest")
        axes.set_xlabel("filter")
        axes.set_ylabel("tile")
        axes.set_xticks([])
        axes.set_yticks([])
        n_tiles, _, c_out = filters[0].shape
        shown = f"{min(c_out, _FILTERS)} of {c_out} filters on {min(n_tiles, _TILES)} of {n_tiles} tiles"
        axes.set_title(f"{arrays[0].name}: the same filters on different tiles ({shown})")
        axes = right.add_subplot()
        for array, of_layer in zip(arrays, filters, strict=True):
            if len(of_layer) > 1:
                colour = _COLOURS[array.index % len(_COLOURS)]
                axes.hist(channel_similarity(of_layer), bins=20, alpha=0.6, color=colour, label=array.name)
        axes.set_xlabel("similarity of a channel’s filters")
        axes.set_ylabel("channels")
        axes.legend(frameon=False)


def plot_positions(path: Path, checkpoint: Checkpoint) -> None:
    """Draw where the weights of every layer lie between the bounds of their devices.

    Args:
        path: the SVG to write.
        checkpoint: of a run with devices.
    """
    with _figure(path, 6, 4) as figure:
        axes = figure.add_subplot()
        for array, kernels in zip(machine_of(checkpoint.config).arrays, checkpoint.kernels, strict=True):
            if array.physics is None or array.physics.device is None:
                continue
            where = positions(array, kernels)
            colour = _COLOURS[array.index % len(_COLOURS)]
            axes.hist(
                where[np.isfinite(where)],
                bins=np.linspace(0, 1, 61),
                density=True,
                histtype="step",
                color=colour,
                label=array.name,
            )
        axes.set_xlabel("weight: 0 at its device’s smallest, 1 at its largest")
        axes.set_ylabel("density")
        axes.legend(frameon=False)


def plot_curves(
    path: Path,
    curves: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    title: str,
    markers: bool = True,
) -> None:
    """Draw curves, each with its label, and write the SVG.

    Args:
        path: the SVG to write.
        curves: (label, x, y) of each.
        x: what is along the lower edge.
        y: what is along the left edge.
        title: what it is about.
        markers: whether to mark the points; one alone always is.
    """
    from matplotlib.ticker import MaxNLocator

    with _figure(path, 6, 4) as figure:
        axes = figure.add_subplot()
        for (label, along, values), colour in zip(curves, np.resize(_COLOURS, len(curves)), strict=True):
            marker = "o" if markers or len(along) == 1 else None
            axes.plot(along, values, marker=marker, markersize=3, linewidth=1.2, color=str(colour), label=label)
        if all(isinstance(value, int) for _, along, _ in curves for value in along):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axes.legend(frameon=False)


def plot_bars(path: Path, bars: Sequence[tuple[str, float]], *, y: str, title: str, at_least: float = 0.0) -> None:
    """Draw a bar for every (label, value), and write the SVG; the axis goes up to `at_least`, or further."""
    with _figure(path, 7, 4) as figure:
        axes = figure.add_subplot()
        drawn = axes.bar([label for label, _ in bars], [value for _, value in bars], color=_COLOURS[0], width=0.7)
        axes.bar_label(drawn, fmt="%.3f", fontsize=8)
        axes.tick_params(axis="x", rotation=25)
        axes.set_ylim(top=max(axes.get_ylim()[1], at_least))
        axes.set_ylabel(y)
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)


def _grid(kernels: Matrix, size: Pair) -> Matrix:
    """Return an image of the first filters (columns) on the first tiles (rows), each scaled to its own range."""
    n_tiles, _, c_out = kernels.shape
    height, width = size
    n_tiles, filters = min(n_tiles, _TILES), min(c_out, _FILTERS)
    grid = np.ones((n_tiles * (height + 1) - 1, filters * (width + 1) - 1, 3), np.float32)
    for tile in range(n_tiles):
        for channel in range(filters):
            weights = kernels[tile, :, channel].reshape(height, width, -1)
            shown = weights if weights.shape[2] == 3 else weights.mean(axis=2, keepdims=True)
            low, high = shown.min(), shown.max()
            top, left = tile * (height + 1), channel * (width + 1)
            grid[top : top + height, left : left + width] = (shown - low) / (high - low if high > low else 1)
    return grid


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """Yield a matplotlib figure; what was drawn on it is written as a whole, with the same bytes for the same plot."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "rapa-dist", "font.family": "DejaVu Sans", "font.size": 9.0}):
        figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
        yield figure
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    try:
        write_whole(path, buffer.getvalue())
    except OSError as error:
        raise UsageError(
            f"Can't write the plot {path}: {error.strerror}. Make room there, or write it elsewhere."
        ) from error
