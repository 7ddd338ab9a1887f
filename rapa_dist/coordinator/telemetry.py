"""The tiles' numbers as Ray metrics, for those who scrape a cluster with Prometheus.

They are set in the coordinator, so that a tile's process neither carries nor pays for them. Ray exports them
on a node whose Ray was installed with its dashboard's parts (`pip install 'ray[default]'`), at the port of
`ray start --metrics-export-port`; elsewhere they are set and nobody hears of it.
"""

from dataclasses import dataclass, field
from typing import Any

from rapa_dist.inspection import RunStats

PREFIX = "rapa_dist_tile_"
_TAGS = ("run", "layer", "tile")
_COUNTERS = {
    "restarts": "Processes of the tile that were replaced",
    "hangs": "Those of them that were killed because they hung",
    "rows_forward": "Rows of forward cycles",
    "rows_backward": "Rows of backward cycles",
    "rows_update": "Rows of update cycles",
    "updates": "Updates of the kernel",
    "busy_s": "Processor time in cycles, in seconds",
    "waiting_s": "Wall time between cycles, in seconds",
    "device_time_s": "Device time of these rows, in seconds",
    "bytes_in": "Bytes read",
    "bytes_out": "Bytes written",
    "repeated": "Rows that bound management sent through the array again",
    "trains": "Pulse trains",
    "slots": "Lengths of these, added up",
    "pulses": "Pulses that devices got",
}
_GAUGES = {
    "utilisation": "busy / (busy + waiting)",
    "kernel_norm": "Frobenius norm of the kernel",
    "last_step": "Last training step committed",
    "saturated": "Share of weights at a bound of their device",
    "resident_bytes": "Resident memory of the process",
}


@dataclass(slots=True)
class RayMetrics:
    """Counters and gauges of every tile of a run, with the tags run, layer and tile ("L0", "T003")."""

    _counters: dict[str, Any] = field(init=False)
    _gauges: dict[str, Any] = field(init=False)
    _told: dict[tuple[str, str], float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        from ray.util.metrics import Counter, Gauge

        self._counters = {name: Counter(PREFIX + name, text, tag_keys=_TAGS) for name, text in _COUNTERS.items()}
        self._gauges = {name: Gauge(PREFIX + name, text, tag_keys=_TAGS) for name, text in _GAUGES.items()}

    def record(self, stats: RunStats) -> None:
        """Bring the metrics to what the tiles have done by now."""
        for entry in stats.tiles:
            layer, _, number = entry.tile.partition("/")
            tags = {"run": stats.run, "layer": layer, "tile": number}
            for name, counter in self._counters.items():
                value, told = getattr(entry, name), self._told.get((entry.tile, name), 0)
                if value > told:  # waiting may shrink by a hair when a tile's process is replaced
                    counter.inc(value - told, tags)
                    self._told[entry.tile, name] = value
            for name, gauge in self._gauges.items():
                gauge.set(getattr(entry, name), tags)
