"""What one examination found, and what to do about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `rapa-dist doctor`.

    Raises:
        ValueError: something is wrong and no fix is given.
    """

    name: str
    """What was looked at."""
    status: Status
    """"failed": no run will work. "warning": runs work, with less speed, room or choice."""
    value: str
    """What was found, for people."""
    fix: str = ""
    """What to do; not empty unless the status is ok."""
    quantities: Mapping[str, object] = field(default_factory=dict)
    """What was found, for programs; units in the keys."""

    def __post_init__(self) -> None:
        if self.status != "ok" and not self.fix:
            raise ValueError(f"{self.name} is {self.status}, and no fix is given")


def size(n_bytes: float) -> str:
    """Return a number of bytes as people read it, in decimal units: "16.8 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"
