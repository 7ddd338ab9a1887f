"""The report's figures, drawn by matplotlib as SVG that stands in the page itself.

So text is text, colours are the page's, light or dark, and what is pointed at says its value: a `<title>`, no script.
"""

import base64
import html
import io
import re
from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np

from rapa_dist.console import counted
from rapa_dist.inspection import RunStats
from rapa_dist.layout import machine_of
from rapa_dist.machine import TileArray
from rapa_dist.report.content import Content
from rapa_dist.report.filters import filter_norms, tile_similarity
from rapa_dist.report.style import FAINT, INK, SERIES
from rapa_dist.tile import Matrix

_STYLE: Any = {
    "svg.hashsalt": "rapa-dist report",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the layout is the same everywhere
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
}
_WIDTH = 10.6  # inches


class Drawing:
    """One figure: axes to draw into, and texts for what is pointed at."""

    def __init__(self, name: str, height: float) -> None:
        """Begin a figure whose identifiers begin with `name`, unique in the page; `height` in inches.

        Raises:
            ImportError: there is no matplotlib.
        """
        import matplotlib
        from matplotlib.figure import Figure

        self._name, self._context = name, matplotlib.rc_context(_STYLE)
        self._numbers = count()
        self._points: list[tuple[str, list[str]]] = []
        self._shapes: list[tuple[str, str]] = []
        self._context.__enter__()
        self.figure: Any = Figure(figsize=(_WIDTH, height), layout="constrained")
        self.figure.patch.set_visible(False)

    def __enter__(self) -> "Drawing":
        return self

    def __exit__(self, *_: object) -> None:
        self._context.__exit__(None, None, None)

    def axes(self, place: Any, title: str = "") -> Any:
        """Return axes at a place of a grid."""
        axes = self.figure.add_subplot(place)
        axes.patch.set_visible(False)
        axes.set_title(title)
        return axes

    def curve(self, axes: Any, x: Sequence[float], y: Sequence[float], colour: str, label: str, unit: str = "") -> None:
        """Draw a curve over epochs; every point of it says its value."""
        axes.plot(x, y, color=colour, label=label, marker="o" if len(x) == 1 else None, markersize=4)
        gid = f"hits{next(self._numbers)}"
        axes.plot(x, y, linestyle="none", marker="o", markersize=7, color=colour, markeredgewidth=0, gid=gid)
        self._points.append((gid, [f"{label}, epoch {a:,}: {b:.4g}{unit}" for a, b in zip(x, y, strict=True)]))

    def bar(self, shape: Any, text: str) -> None:
        """Let a bar say a text."""
        gid = f"bar{next(self._numbers)}"
        shape.set_gid(gid)
        self._shapes.append((gid, text))

    def svg(self, description: str) -> str:
        """Return the figure as an element of a page; who can't see it is told the description."""
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        self.figure.savefig(buffer, format="svg", metadata=nothing)
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        for gid, texts in self._points:
            text = _point_texts(text, gid, texts)
        for gid, words in self._shapes:
            said = f'<g id="{gid}" class="bar"><title>{html.escape(words)}</title>'
            text = text.replace(f'<g id="{gid}">', said, 1)
        text = re.sub(r'\bid="', f'id="{self._name}-', text)  # of all figures of the page, each has its own
        text = re.sub(r'href="#', f'href="#{self._name}-', text)
        text = re.sub(r"url\(#", f"url(#{self._name}-", text)
        text = re.sub(r' xmlns(:xlink)?="[^"]*"| width="[\d.]+pt"| height="[\d.]+pt"', "", text, count=4)
        text = text.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)
        for colour, name in [(INK, "ink"), (FAINT, "faint"), *((c, f"series-{n}") for n, c in enumerate(SERIES, 1))]:
            text = text.replace(colour, f"var(--{name})")
        return text


def _point_texts(svg: str, gid: str, texts: Sequence[str]) -> str:
    """Put a title on each of the markers of a line; matplotlib draws them in order."""
    start = svg.index(f'<g id="{gid}">')
    head, tail = svg[:start], svg[start:].replace(f'<g id="{gid}">', f'<g id="{gid}" class="hits">', 1)
    words = iter(texts)
    titled = re.sub(
        r"(<use [^>]*?)/>", lambda m: f"{m[1]}><title>{html.escape(next(words))}</title></use>", tail, count=len(texts)
    )
    return head + titled


def curves(content: Content) -> str:
    """Return error, loss and λ over the epochs."""
    lines = content.metrics
    epochs = [line["epoch"] for line in lines]
    with Drawing("curves", 4.7) as drawing:
        grid = drawing.figure.add_gridspec(2, 2, width_ratios=(1.55, 1), height_ratios=(1.35, 1))
        error = drawing.axes(grid[:, 0], "Error (%)")
        loss = drawing.axes(grid[0, 1], "Loss")
        rate = drawing.axes(grid[1, 1], "Learning rate λ")
        for part, colour in (("train", SERIES[0]), ("test", SERIES[1])):
            percent = [line[f"{part}_error_percent"] for line in lines]
            drawing.curve(error, epochs, percent, colour, f"{part} error", " %")
            drawing.curve(loss, epochs, [line[f"{part}_loss"] for line in lines], colour, f"{part} loss")
        drawing.curve(rate, epochs, [line["learning_rate"] for line in lines], SERIES[2], "λ")
        best = content.best
        if best is not None:
            value = best["test_error_percent"]
            error.axhline(value, color=SERIES[1], linewidth=0.9, linestyle=(0, (4, 3)))
            error.annotate(  # below the line at the left, where the curves are high
                f"best {value:.2f} %, epoch {best['epoch']}",
                (epochs[0], value),
                xytext=(0, -4),
                textcoords="offset points",
                ha="left" if len(epochs) > 1 else "center",
                va="top",
            )
        error.set_ylim(bottom=0)
        loss.set_ylim(bottom=0)
        rate.set_yscale("log")
        error.legend(loc="best")
        for axes in (error, loss, rate):
            _epoch_axis(axes, epochs)
        loss.set_xlabel("")
        return drawing.svg(
            f"Train and test error, loss and learning rate over {counted(len(epochs), 'epoch')}. "
            "The numbers are in the table."
        )


def similarities(content: Content) -> str:
    """Return S of every layer of several tiles over the epochs."""
    with Drawing("similarity", 3.3) as drawing:
        axes = drawing.axes(drawing.figure.add_gridspec(1, 1)[0], "Similarity S")
        axes.axhline(0, color=INK, linewidth=0.7)
        seen: list[int] = []
        for layer, colour in zip(machine_of(content.config).arrays, _cycle(), strict=False):
            epochs, values = content.similarity(layer.index)
            if epochs:
                seen += epochs
                drawing.curve(axes, epochs, values, colour, f"{layer.name}, {counted(layer.n_tiles, 'tile')}")
        _epoch_axis(axes, seen)
        axes.margins(y=0.12)
        axes.legend(loc="best")
        return drawing.svg("Similarity S of each layer’s tiles over the epochs. The numbers are in the table.")


def step_times(content: Content) -> str:
    """Return what a step took here, wall time, over the epochs."""
    known = [(line["epoch"], line["wall"]["step_ms"]) for line in content.metrics if line["wall"].get("step_ms")]
    with Drawing("steps", 2.5) as drawing:
        axes = drawing.axes(
            drawing.figure.add_gridspec(1, 1)[0], "Wall time of a training step here (ms), mean of the epoch"
        )
        drawing.curve(
            axes, [epoch for epoch, _ in known], [ms for _, ms in known], SERIES[4], "wall time of a step", " ms"
        )
        axes.set_ylim(bottom=0)
        _epoch_axis(axes, [epoch for epoch, _ in known])
        return drawing.svg("Wall time of a training step over the epochs; the median is in the table.")


def timed(tiles: RunStats) -> bool:
    """Return whether the tiles' processor time is known; on the fabric batched it can't be told apart."""
    return any(tile.busy_s > 0 for tile in tiles.tiles)


def load(tiles: RunStats) -> str:
    """Return device time, and processor time if it is known, of every tile, layer by layer."""
    layers = tiles.layers
    shown = [("device_time_s", "device time", SERIES[2]), ("busy_s", "processor time", SERIES[0])]
    shown = shown if timed(tiles) else shown[:1]
    widths = [max(layer.tiles, 4) for layer in layers]
    with Drawing("load", 2.0 * len(shown)) as drawing:
        grid = drawing.figure.add_gridspec(
            len(shown), len(layers), width_ratios=[min(w, 3 * min(widths)) for w in widths]
        )
        for column, layer in enumerate(layers):
            ours = [tile for tile in tiles.tiles if tile.layer == layer.layer]
            for row, (name, unit, colour) in enumerate(shown):
                axes = drawing.axes(grid[row, column], layer.name if row == 0 else "")
                bars = axes.bar(range(len(ours)), [getattr(tile, name) for tile in ours], color=colour, width=0.82)
                for shape, tile in zip(bars, ours, strict=True):
                    words = (
                        f"{tile.tile}: {unit} {getattr(tile, name):.4g} s, {tile.rows:,} rows, {tile.updates:,} updates"
                    )
                    drawing.bar(shape, words)
                axes.grid(False, axis="x")
                axes.set_xticks(_some(len(ours)))
                axes.set_xlim(-0.8, max(len(ours), 2) - 0.2 if len(ours) > 1 else 0.8)
                if column == 0:
                    axes.set_ylabel(f"{unit} (s)")
                if row == len(shown) - 1:
                    axes.set_xlabel("tile")
        what = " and ".join(unit for _, unit, _ in shown).capitalize()
        return drawing.svg(f"{what} of every tile, a bar each. The numbers are in the table.")


def likeness(layer: TileArray, filters: Matrix) -> str:
    """Return a layer's tiles against each other, and the norms of their filters.

    Args:
        layer: whose tiles they are.
        filters: (n_t, k, c_out).
    """
    n_tiles, _, c_out = filters.shape
    several = n_tiles > 1
    with Drawing(f"likeness{layer.index}", 3.6 if several else 1.5) as drawing:
        grid = (
            drawing.figure.add_gridspec(1, 2, width_ratios=(1, 1.75)) if several else drawing.figure.add_gridspec(1, 1)
        )
        if several:
            axes = drawing.axes(grid[0], "Similarity of any two tiles")
            pairs = tile_similarity(filters)
            np.fill_diagonal(pairs, np.nan)
            extent = max(0.05, float(np.nanmax(np.abs(pairs))))
            image = axes.imshow(pairs, cmap="PuOr_r", vmin=-extent, vmax=extent, interpolation="none")
            _heat(drawing, axes, image, "tile", "tile", _some(n_tiles), _some(n_tiles))
        axes = drawing.axes(grid[1] if several else grid[0], "Norm of every filter")
        image = axes.imshow(filter_norms(filters), cmap="viridis", vmin=0, interpolation="none", aspect="auto")
        _heat(drawing, axes, image, "output channel", "tile", _some(c_out), _some(n_tiles))
        what = "Similarity of the filters of any two tiles, and norms" if several else "Norms"
        return drawing.svg(f"{what} of the filters of {layer.name}, as heat maps. The table sums them up.")


def scaling(report: dict[str, Any]) -> str:
    """Return the plot that `rapa-dist scale` makes of its measurement, as a data URI."""
    from rapa_dist.scaling.plot import draw

    return "data:image/svg+xml;base64," + base64.b64encode(draw(report)).decode()


def _cycle() -> list[str]:
    return [SERIES[0], SERIES[1], SERIES[2], *SERIES[3:]]


def _heat(drawing: Drawing, axes: Any, image: Any, x: str, y: str, x_ticks: list[int], y_ticks: list[int]) -> None:
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_xticks(x_ticks)
    axes.set_yticks(y_ticks)
    bar = drawing.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)


def _some(n: int) -> list[int]:
    """Return at most nine numbers from 0 to n - 1 to label."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n / step <= 9 or step == 256)
    return list(range(0, n, step))


def _epoch_axis(axes: Any, epochs: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    if epochs:
        low, high = min(epochs), max(epochs)
        axes.set_xlim(low - max(0.5, 0.02 * (high - low)), high + max(0.5, 0.02 * (high - low)))
