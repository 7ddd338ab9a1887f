"""What tiles have done so far: read from their cells, summed per layer, sorted. No Ray, no torch, no rich.

Reading takes nothing from a tile that works: its counters are single words, and its kernel is copied
between two looks at the word that says which buffer is in force.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rapa_dist.cells import Cells, State, Word
from rapa_dist.errors import UsageError
from rapa_dist.fields import POSITIVE, TEXT, check, whole
from rapa_dist.hardware import CycleTimes
from rapa_dist.machine import TileArray, tile_name

if TYPE_CHECKING:
    from rapa_dist.tile import Matrix

RESTARTING = "restarting"
_FLOAT = 4  # bytes
_STATES = {
    State.IDLE: "idle",
    State.FORWARD: "forward",
    State.BACKWARD: "backward",
    State.HOLDING: "holding",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TileStats:
    """What one tile is, and what it has done since the run was started or resumed."""

    tile: str
    """Its name within the run: "L0/T003"."""
    layer: int
    """Its layer, from 0."""
    name: str
    """The layer's name in its network, like "features.0"."""
    node: str
    """Ray's id of the node that it lives on; empty without Ray."""
    pid: int
    """Its process; 0 before it has one."""
    state: str
    """idle, forward, backward, holding (done, and waiting until an array would be), or restarting."""
    restarts: int
    """How often its process was replaced."""
    hangs: int = 0
    """How often that was because it hung."""
    rows_forward: int
    """Rows of M = I K computed."""
    rows_backward: int
    """Rows of dI = D Kᵀ computed; none in the first layer."""
    rows_update: int
    """Rows that went into updates of K."""
    updates: int
    """Updates of K, one per training step."""
    busy_s: float
    """Processor time that it took in its cycles."""
    waiting_s: float
    """Wall time since its first process began to serve in which it was not busy."""
    device_time_s: float
    """What an array would have taken for these rows."""
    utilisation: float
    """busy / (busy + waiting), from 0 to 1."""
    bytes_in: int
    """Bytes of patches and errors that it read."""
    bytes_out: int
    """Bytes of outputs and input errors that it wrote."""
    kernel_norm: float
    """‖K‖, Frobenius, bias included."""
    last_step: int
    """Number of the last training step whose update it has committed."""
    resident_bytes: int
    """Resident memory of its process; 0 if it has none."""
    repeated: int = 0
    """Rows that bound management sent through the array again."""
    trains: int = 0
    """Pulse trains that it was sent: rows of updates that were not all zero. None on ideal tiles."""
    slots: int = 0
    """Their lengths BL, added up."""
    pulses: int = 0
    """Pulses that its devices got."""
    saturated: float = 0.0
    """Share of its weights that are at a bound of their device."""

    @property
    def mean_bl(self) -> float:
        """Mean length of its pulse trains; 0 without any."""
        return self.slots / self.trains if self.trains else 0.0

    @property
    def rows(self) -> int:
        """Rows of all cycles: proportional to its device time if all cycles take the same."""
        return self.rows_forward + self.rows_backward + self.rows_update

    def as_dict(self) -> dict[str, Any]:
        """Return the stats as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TileStats":
        """Return the stats that `as_dict` made values of.

        Raises:
            ValueError: a field is unknown or missing, or holds what it can't.
        """
        return cls(**check(values, _KINDS, exact=True))


_KINDS = {field.name: {int: whole(), float: POSITIVE, str: TEXT}[field.type] for field in fields(TileStats)}  # type: ignore[index]
_SUMMED = (
    "restarts",
    "hangs",
    "rows_forward",
    "rows_backward",
    "rows_update",
    "updates",
    "busy_s",
    "waiting_s",
    "bytes_in",
    "bytes_out",
    "repeated",
    "trains",
    "slots",
    "pulses",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TotalStats:
    """Tiles summed up: those of a layer, or all."""

    layer: int | None
    """The layer, from 0; None for the whole machine."""
    name: str
    """The layer's name in its network; "all" for the whole machine."""
    tiles: int
    states: dict[str, int]
    """How many tiles are in which state."""
    restarts: int
    hangs: int = 0
    rows_forward: int
    rows_backward: int
    rows_update: int
    updates: int
    busy_s: float
    """Sum over the tiles, as all that follow unless they say otherwise."""
    waiting_s: float
    device_time_s: float
    """Of a layer: that of its slowest tile, as its tiles work at once. Of the machine: the sum over its layers.

    It is made of sums over all mini-batches. Where tiles take turns with extra rows (scheme "random", rows that n_t
    does not divide), a layer waits for another tile in each: up to a row per mini-batch longer than this. The
    device times of epochs count that.
    """
    utilisation: float
    """busy / (busy + waiting) of all tiles together."""
    bytes_in: int
    bytes_out: int
    load_imbalance: float | None
    """Rows of the busiest tile over the mean of the tiles, 1 if all have the same; None without rows, and for the
    whole machine, whose layers differ by design."""
    kernel_norm: float
    """Mean over the tiles."""
    last_step: int
    """The last training step that all tiles have committed."""
    resident_bytes: int
    """Sum over the processes: tiles that share one count once."""
    repeated: int = 0
    trains: int = 0
    slots: int = 0
    pulses: int = 0
    saturated: float = 0.0
    """Mean over the tiles."""

    @property
    def mean_bl(self) -> float:
        """Mean length of pulse trains; 0 without any."""
        return self.slots / self.trains if self.trains else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the sums as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStats:
    """All tiles of a run at one moment."""

    run: str
    tiles: tuple[TileStats, ...]
    layers: tuple[TotalStats, ...]
    total: TotalStats
    silent: tuple[str, ...] = ()
    """Tiles that nobody on their node answered for."""
    tiles_of_run: int
    """How many the run has: these, the silent ones, and those of layers that were left out."""

    @classmethod
    def of(
        cls, run: str, tiles: Iterable[TileStats], silent: Iterable[str] = (), tiles_of_run: int | None = None
    ) -> "RunStats":
        """Sum up the tiles of a run, layer by layer; they stay in the order of their names.

        Args:
            run: its name.
            tiles: what is known of its tiles.
            silent: the names of those that nobody answered for.
            tiles_of_run: how many there are; None: no more than these.
        """
        ordered, silent = tuple(sorted(tiles, key=_place)), tuple(silent)
        layers = tuple(
            _total(index, [tile for tile in ordered if tile.layer == index])
            for index in sorted({tile.layer for tile in ordered})
        )
        return cls(
            run=run,
            tiles=ordered,
            layers=layers,
            total=_whole(ordered, layers),
            silent=silent,
            tiles_of_run=len(ordered) + len(silent) if tiles_of_run is None else tiles_of_run,
        )

    def only(self, which: str | None) -> "RunStats":
        """Return the part of one layer, by its name or its number; all of it for None.

        Raises:
            UsageError: there is no such layer.
        """
        if which is None:
            return self
        numbers = {name: t.layer for t in self.layers for name in (t.name, str(t.layer), f"L{t.layer}")}
        layer = numbers.get(which)
        if layer is None:
            known = ", ".join(f"{total.layer} ({total.name})" for total in self.layers)
            raise UsageError(f"--layer is a layer's number or name, one of {known}; not “{which}”.")
        silent = [name for name in self.silent if name.startswith(f"L{layer}/")]
        return RunStats.of(
            self.run, [tile for tile in self.tiles if tile.layer == layer], silent, tiles_of_run=self.tiles_of_run
        )

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "run": self.run,
            "tiles": [tile.as_dict() for tile in self.tiles],
            "layers": [layer.as_dict() for layer in self.layers],
            "total": self.total.as_dict(),
            "silent": list(self.silent),
            "tiles_of_run": self.tiles_of_run,
        }


SORT_KEYS: dict[str, Callable[[TileStats], Any]] = {
    "tile": lambda tile: _place(tile),
    "node": lambda tile: tile.node,
    "pid": lambda tile: tile.pid,
    "state": lambda tile: tile.state,
    "restarts": lambda tile: -tile.restarts,
    "forward": lambda tile: -tile.rows_forward,
    "backward": lambda tile: -tile.rows_backward,
    "updates": lambda tile: -tile.updates,
    "busy": lambda tile: -tile.busy_s,
    "waiting": lambda tile: -tile.waiting_s,
    "device": lambda tile: -tile.device_time_s,
    "utilisation": lambda tile: -tile.utilisation,
    "in": lambda tile: -tile.bytes_in,
    "out": lambda tile: -tile.bytes_out,
    "norm": lambda tile: -tile.kernel_norm,
    "step": lambda tile: -tile.last_step,
    "memory": lambda tile: -tile.resident_bytes,
    "repeated": lambda tile: -tile.repeated,
    "pulses": lambda tile: -tile.pulses,
    "bl": lambda tile: -tile.mean_bl,
    "saturated": lambda tile: -tile.saturated,
}
"""Columns that tiles can be sorted by: names upwards, quantities from the largest down."""


def sort_tiles(tiles: Sequence[TileStats], column: str) -> list[TileStats]:
    """Return tiles sorted by a column of `SORT_KEYS`; those that are equal in it stay in order."""
    return sorted(tiles, key=SORT_KEYS[column])


def check_sort(column: str) -> None:
    """Raise UsageError unless tiles can be sorted by a column of this name."""
    if column not in SORT_KEYS:
        raise UsageError(f"--sort is one of {', '.join(SORT_KEYS)}; not “{column}”.")


def read_tile(cells: Cells, array: TileArray, tile: int, node: str = "") -> TileStats:
    """Return the stats of a tile, given its cells; it may be at work.

    Args:
        cells: its memory, mapped on the node that it lives on.
        array: the tile array that it belongs to.
        tile: which of its tiles.
        node: the node's id.
    """
    words, k, c_out = cells.words, array.k, array.c_out
    pid = int(words[Word.PID])
    resident, kernel = _resident_bytes(pid), read_kernel(cells)
    rows_forward, rows_backward, rows_update = (
        int(words[word]) for word in (Word.ROWS_FORWARD, Word.ROWS_BACKWARD, Word.ROWS_UPDATE)
    )
    since = int(words[Word.SINCE_NS])
    busy_s = words[Word.BUSY_NS] / 1e9
    served_s = (time.monotonic_ns() - since) / 1e9 if since else 0.0
    elapsed_s = max(busy_s, served_s)
    device_ns = CycleTimes().tile_ns(forward=rows_forward, backward=rows_backward, update=rows_update)
    return TileStats(
        tile=tile_name(array.index, tile),
        layer=array.index,
        name=array.name,
        node=node,
        pid=pid,
        state=_STATES.get(int(words[Word.STATE]), "idle") if resident else RESTARTING,
        restarts=max(0, int(words[Word.STARTS]) - 1),
        hangs=int(words[Word.HANGS]),
        rows_forward=rows_forward,
        rows_backward=rows_backward,
        rows_update=rows_update,
        updates=int(words[Word.UPDATES]),
        busy_s=busy_s,
        waiting_s=elapsed_s - busy_s,
        device_time_s=device_ns * 1e-9,
        utilisation=busy_s / elapsed_s if elapsed_s else 0.0,
        bytes_in=_FLOAT * (rows_forward * k + max(rows_update, rows_backward) * c_out),
        bytes_out=_FLOAT * (rows_forward * c_out + rows_backward * k),
        kernel_norm=_norm(kernel),
        last_step=int(words[Word.STEP]),
        resident_bytes=resident,
        repeated=int(words[Word.REPEATED]),
        trains=int(words[Word.TRAINS]),
        slots=int(words[Word.SLOTS]),
        pulses=int(words[Word.PULSES_SENT]),
        saturated=_saturated(kernel, array, tile),
    )


def _saturated(kernel: "Matrix", array: TileArray, tile: int) -> float:
    """Return the share of the weights seen that are at a bound of their device, or beyond it by noise of writing."""
    if array.physics is None or array.physics.device is None:
        return 0.0
    b_max, b_min = bounds_of(array, tile)
    return float(((kernel >= b_max) | (kernel <= b_min)).mean())


@lru_cache(maxsize=512)
def bounds_of(array: TileArray, tile: int) -> "tuple[Matrix, Matrix]":
    """Return the largest and the smallest weights of a tile's devices."""
    from rapa_dist.physics.devices import draw_devices
    from rapa_dist.physics.draws import Draws, key_of

    assert array.physics is not None
    assert array.physics.device is not None
    draws = Draws(key_of(array.seed, array.index, tile))
    devices = draw_devices(array.physics.device, array.kernel_shape, draws, bias=array.bias)
    return devices.b_max, devices.b_min


def _norm(kernel: "Matrix") -> float:
    import numpy as np

    return float(np.linalg.norm(kernel))


def read_kernel(cells: Cells) -> "Matrix":
    """Return a copy of the kernel, (k + 1, c_out), as after some whole number of updates."""
    words = cells.words
    while True:
        before = words[Word.COMMIT]
        kernel = cells.kernel.copy()
        if words[Word.COMMIT] == before:  # else an update may have overtaken the copy
            return kernel


def _total(layer: int | None, tiles: Sequence[TileStats]) -> TotalStats:
    sums = {name: sum(getattr(tile, name) for tile in tiles) for name in _SUMMED}
    elapsed_s = sums["busy_s"] + sums["waiting_s"]
    rows = [tile.rows for tile in tiles]
    return TotalStats(
        layer=layer,
        name="all" if layer is None else tiles[0].name,
        tiles=len(tiles),
        states=dict(Counter(tile.state for tile in tiles)),
        device_time_s=max((tile.device_time_s for tile in tiles), default=0.0),
        utilisation=sums["busy_s"] / elapsed_s if elapsed_s else 0.0,
        load_imbalance=max(rows) * len(rows) / sum(rows) if any(rows) else None,
        kernel_norm=sum(tile.kernel_norm for tile in tiles) / len(tiles) if tiles else 0.0,
        last_step=min((tile.last_step for tile in tiles), default=0),
        saturated=sum(tile.saturated for tile in tiles) / len(tiles) if tiles else 0.0,
        resident_bytes=sum({(tile.node, tile.pid): tile.resident_bytes for tile in tiles}.values()),
        **sums,
    )


def _whole(tiles: Sequence[TileStats], layers: Sequence[TotalStats]) -> TotalStats:
    values = _total(None, tiles).as_dict()
    return TotalStats(
        **values | {"load_imbalance": None, "device_time_s": sum(layer.device_time_s for layer in layers)}
    )


def _place(tile: TileStats) -> tuple[int, int, str]:
    """Return what sorts tiles by layer and number, also where numbers have more digits than usual."""
    return tile.layer, len(tile.tile), tile.tile


def _resident_bytes(pid: int) -> int:
    """Return the resident memory of a process; 0 if there is none, or a zombie."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
