"""scaling.svg: how many times faster with more tiles, and where the time goes. Made from scaling.json alone."""

import hashlib
import io
import json
from typing import Any

PARTS = ("coordinator", "data_plane", "tiles")
"""What has the time of a step."""

_SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe & Ito: safe for the colour-blind
_MARKERS = "osD^vP"
_PART_COLOURS = {"coordinator": "#e69f00", "data_plane": "#56b4e9", "tiles": "#004d80"}
_PART_LABELS = {"coordinator": "coordinator", "data_plane": "data plane", "tiles": "tiles"}
_LINE = "#404040"


def digest(report: dict[str, Any]) -> str:
    """Return what a plot carries of the report that it was made from, to tell whether it is up to date."""
    return hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()


def draw(report: dict[str, Any]) -> bytes:
    """Return the SVG; the same bytes for the same report (and the same matplotlib).

    Raises:
        ImportError: there is no matplotlib.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.hashsalt": "rapa-dist",
        "font.family": "DejaVu Sans",
        "font.size": 9.0,
        "axes.edgecolor": _LINE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        blocks = report["blocks"]
        figure = Figure(figsize=(10, 1.6 + 1.3 * max(len(blocks), 2)), facecolor="white", layout="constrained")
        grid = figure.add_gridspec(max(len(blocks), 1), 2, width_ratios=(1, 1.15))
        _draw_speed_up(figure.add_subplot(grid[:, 0]), report)
        for row, block in enumerate(blocks):
            axes = figure.add_subplot(grid[row, 1])
            _draw_shares(axes, block, with_legend=row == 0, with_labels=row == len(blocks) - 1)
        figure.suptitle("Every tile is a process: what more tiles gain", fontsize=11)
        buffer = io.BytesIO()
        description = f"Made from a scaling.json with the digest {digest(report)}"
        figure.savefig(
            buffer, format="svg", metadata={"Date": None, "Creator": "rapa-dist scale", "Description": description}
        )
    return buffer.getvalue()


def block_title(time_dilation: float | None) -> str:
    """Return a block's name: "compute", or "paced, F = 2,000"."""
    return "compute" if time_dilation is None else f"paced, F = {time_dilation:,g}"


def name_of_first(report: dict[str, Any]) -> str:
    """Return the name of the first layer."""
    return str(report["blocks"][0]["configurations"][0]["layers"][0]["name"])


def first_layer(configuration: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of the first layer's cycles taken together."""
    both: dict[str, Any] = configuration["layers"][0]["cycles"]["all"]
    return both


def _range(configuration: dict[str, Any]) -> list[float]:
    """Return the smallest and the largest speed-up of a turn."""
    low_high: list[float] = first_layer(configuration)["speed_up_range"]
    return low_high


def _draw_speed_up(axes: Any, report: dict[str, Any]) -> None:
    tiles = sorted({c["layers"][0]["n_tiles"] for block in report["blocks"] for c in block["configurations"]})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.plot(tiles, tiles, color=_LINE, linestyle="--", linewidth=1, label="ideal")
    for number, block in enumerate(report["blocks"]):
        points = sorted(
            (c["layers"][0]["n_tiles"], first_layer(c)["speed_up"], *_range(c)) for c in block["configurations"]
        )
        n_tiles, speed_up, low, high = (list(column) for column in zip(*points, strict=True))
        colour = _SERIES[number % len(_SERIES)]
        axes.fill_between(n_tiles, low, high, color=colour, alpha=0.2, linewidth=0)
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot(
            n_tiles,
            speed_up,
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.5,
            label=block_title(block["time_dilation"]),
        )
    seen = [*tiles, *(x for block in report["blocks"] for c in block["configurations"] for x in _range(c))]
    axes.set_ylim(min(seen) / 1.3, max(seen) * 1.3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.grid(True, color="#e0e0e0", linewidth=0.6)
    axes.set_xticks(tiles)
    axes.minorticks_off()
    first = name_of_first(report)
    axes.set_xlabel(f"tiles of {first}, n_t")
    axes.set_ylabel(f"speed-up of {first}’s cycles over one tile (×)")
    axes.set_title("Speed-up", fontsize=10)
    axes.legend(loc="upper left")


def _draw_shares(axes: Any, block: dict[str, Any], *, with_legend: bool, with_labels: bool) -> None:
    configurations = block["configurations"]
    names = [",".join(map(str, configuration["tiles"])) for configuration in configurations]
    bottom = [0.0] * len(names)
    for part in reversed(PARTS):  # the tiles at the bottom, the coordinator on top
        heights = [configuration["shares_percent"][part] for configuration in configurations]
        axes.bar(
            range(len(names)),
            heights,
            bottom=bottom,
            color=_PART_COLOURS[part],
            edgecolor="white",
            linewidth=0.5,
            width=0.8,
            label=_PART_LABELS[part],
        )
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    axes.set_ylim(0, 100)
    axes.set_yticks((0, 50, 100))
    axes.set_ylabel("share of time (%)")
    axes.set_xticks(range(len(names)), names if with_labels else [""] * len(names), rotation=30, ha="right")
    if with_labels:
        axes.set_xlabel("tiles per layer")
    title = block_title(block["time_dilation"])
    axes.set_title(f"A step’s time: {title}" if with_legend else title, fontsize=10, loc="left")
    if with_legend:
        axes.legend(
            loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(PARTS), fontsize=8, handlelength=1, columnspacing=1
        )
