"""The table of a run's tiles as text: totals per layer first, then the tiles, as many as there is room for.

Laid out by hand: rich's own table takes ten times as long, and a live one is drawn by the very process that
trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from rapa_dist.console import counted
from rapa_dist.inspection import RESTARTING, RunStats, TileStats, TotalStats, sort_tiles

_GAP = "  "


@dataclass(frozen=True, slots=True)
class _Column:
    heading: str
    keep: int
    """Which columns go first where the terminal is too narrow: those with the lowest number."""
    left: bool = False


_COLUMNS = (
    _Column("tile", 99, left=True),
    _Column("node", 1, left=True),
    _Column("pid", 3),
    _Column("state", 90, left=True),
    _Column("restarts", 6),
    _Column("rows fwd", 12),
    _Column("rows bwd", 9),
    _Column("updates", 7),
    _Column("busy s", 13),
    _Column("waiting s", 4),
    _Column("device s", 11),
    _Column("util %", 15),
    _Column("in", 5),
    _Column("out", 2),
    _Column("‖K‖", 10),
    _Column("step", 14),
    _Column("memory", 8),
    _Column("imbalance", 16),
    _Column("repeated", 7),
    _Column("pulses", 11),
    _Column("BL", 8),
    _Column("saturated %", 12),
)
_OF_PHYSICS = 4
"""The last columns, which ideal tiles have nothing in."""


def tiles_table(stats: RunStats, *, sort: str = "tile", width: int | None = None, height: int | None = None) -> Text:
    """Return the table of a run.

    Args:
        stats: what its tiles have done.
        sort: the column of `SORT_KEYS` that tiles are sorted by.
        width: columns of the terminal; None: as many as it takes.
        height: lines of the terminal; None: as many as it takes.
    """
    tiles = sort_tiles(stats.tiles, sort)
    totals = [*stats.layers, stats.total] if len(stats.layers) > 1 else list(stats.layers)
    heading = f"{stats.run}: {_which(stats)} on {counted(len({tile.node for tile in tiles}), 'node')}"
    notes = [f"no answer for {', '.join(stats.silent[:5])}{' …' * (len(stats.silent) > 5)}"] if stats.silent else []
    shown = tiles
    if height is not None:
        room = max(0, height - 3 - len(totals) - len(notes))  # heading, names of the columns, cursor
        if len(tiles) > room:
            shown = tiles[: max(0, room - 1)]
            notes.append(f"{counted(len(tiles) - len(shown), 'more tile')}, sorted by {sort}, do not fit here")
    rows = [_total_row(total) for total in totals] + [_tile_row(tile) for tile in shown]
    ideal = not (stats.total.repeated or stats.total.trains or stats.total.saturated)
    wanted = len(_COLUMNS) - _OF_PHYSICS * ideal
    columns, widths = _fit(rows, width, wanted)
    if dropped := wanted - len(columns):
        heading += f" (too narrow for {counted(dropped, 'more column')})"
    table = Text(no_wrap=True, overflow="crop")
    table.append(heading[:width] + "\n")
    table.append(_line([column.heading for column in _COLUMNS], columns, widths) + "\n", style="bold")
    for number, row in enumerate(rows):
        style = "cyan" if number < len(totals) else "red" if row[3] == RESTARTING else ""
        table.append(_line(row, columns, widths) + "\n", style=style)
    for note in notes:
        table.append(note[:width] + "\n", style="yellow")
    table.rstrip()
    return table


def _which(stats: RunStats) -> str:
    """Return which tiles of the run these are: "21 tiles", "conv1, 4 of 21 tiles"."""
    if len(stats.tiles) == stats.tiles_of_run:
        return counted(stats.tiles_of_run, "tile")
    layers = {tile.name for tile in stats.tiles}
    layer = f"{layers.pop()}, " if len(layers) == 1 else ""
    return f"{layer}{len(stats.tiles):,} of {counted(stats.tiles_of_run, 'tile')}"


def _fit(rows: Sequence[Sequence[str]], width: int | None, wanted: int) -> tuple[list[int], list[int]]:
    """Return which of the first `wanted` columns to show, and how wide each of all is."""
    widths = [max(len(column.heading), *(len(row[at]) for row in rows)) for at, column in enumerate(_COLUMNS)]
    columns = list(range(wanted))
    while width is not None and len(columns) > 1 and _total_width(columns, widths) > width:
        columns.remove(min(columns, key=lambda at: _COLUMNS[at].keep))
    return columns, widths


def _total_width(columns: Sequence[int], widths: Sequence[int]) -> int:
    return sum(widths[at] for at in columns) + len(_GAP) * (len(columns) - 1)


def _line(cells: Sequence[str], columns: Sequence[int], widths: Sequence[int]) -> str:
    return _GAP.join(
        cells[at].ljust(widths[at]) if _COLUMNS[at].left else cells[at].rjust(widths[at]) for at in columns
    ).rstrip()


def _tile_row(tile: TileStats) -> list[str]:
    return [
        tile.tile,
        tile.node[:6] or "–",
        str(tile.pid),
        tile.state,
        _restarts(tile),
        *_figures(tile),
        "",
        *_of_physics(tile),
    ]


def _total_row(total: TotalStats) -> list[str]:
    name = total.name if total.layer is None else f"L{total.layer} {total.name}"
    restarting = total.states.get(RESTARTING, 0)
    return [
        f"{name} ×{total.tiles}",
        "",
        "",
        f"{restarting} {RESTARTING}" if restarting else "",
        _restarts(total),
        *_figures(total),
        "" if total.load_imbalance is None else f"{total.load_imbalance:.3f}",
        *_of_physics(total),
    ]


def _restarts(stats: TileStats | TotalStats) -> str:
    return f"{stats.restarts} ({stats.hangs} hung)" if stats.hangs else str(stats.restarts)


def _figures(stats: TileStats | TotalStats) -> list[str]:
    return [
        count(stats.rows_forward),
        count(stats.rows_backward),
        count(stats.updates),
        seconds(stats.busy_s),
        seconds(stats.waiting_s),
        seconds(stats.device_time_s),
        f"{100 * stats.utilisation:.1f}",
        f"{count(stats.bytes_in)}B",
        f"{count(stats.bytes_out)}B",
        f"{stats.kernel_norm:.4g}",
        str(stats.last_step),
        f"{count(stats.resident_bytes)}B",
    ]


def _of_physics(stats: TileStats | TotalStats) -> list[str]:
    return [count(stats.repeated), count(stats.pulses), f"{stats.mean_bl:.1f}", f"{100 * stats.saturated:.2f}"]


def count(number: int) -> str:
    """Return a number in a few characters: 9999, 12.3 k, 1.23 M."""
    if number < 10_000:
        return str(number)
    scaled = float(number)
    for unit in "kMGT":
        scaled /= 1000
        if scaled < 999.5:
            return f"{scaled:.3g} {unit}"
    return f"{scaled / 1000:,.0f} P"


def seconds(time_s: float) -> str:
    """Return a time to three digits, without an exponent where that is short: 0.0213, 1.20, 123, 12345."""
    if 0 < time_s < 1e-4:
        return f"{time_s:.1e}"
    return f"{time_s:.0f}" if time_s >= 100 else f"{time_s:#.3g}"
