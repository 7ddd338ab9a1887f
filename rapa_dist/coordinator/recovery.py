"""What a run got over: a tile's process or a node that was lost, and what its return took."""

from dataclasses import asdict, dataclass
from typing import Any

TILE, HUNG, NODE = "tile", "hung tile", "node"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """One recovery from one failure. It changes no bit of the result, so it is part of what is wall time alone."""

    kind: str
    """What failed: `TILE`, a tile's process that died, `HUNG`, one that hung and was killed, or `NODE`, a node with all
    its tiles."""
    what: str
    """Which one, for people: "L0/T003", or a node's address."""
    step: int
    """Mini-batches trained since the start of the run when it was noticed."""
    lost_steps: int
    """Mini-batches that were trained again; 0 where the cells survived."""
    seconds: float
    """Wall time from when it was noticed to when training went on."""
    at: str
    """When it was noticed, in UTC, ISO 8601."""

    def as_dict(self) -> dict[str, Any]:
        """Return the recovery as plain values, as they stand in metrics.jsonl under wall["recoveries"]."""
        return asdict(self)
