"""Main memory as this process may use it."""

from dataclasses import dataclass
from pathlib import Path

from rapa_dist.cgroup import memory_limit


@dataclass(frozen=True, slots=True)
class Memory:
    """Main memory as this process may use it."""

    total: int
    """Bytes in all."""
    available: int
    """Bytes that can still be had."""
    limited: bool
    """Whether a control group (a container, a batch system) sets the limit."""


def memory() -> Memory:
    """Return what memory this machine, or the control group around this process, has."""
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(facts[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit = memory_limit()
    if limit is None:
        return Memory(total, available, False)
    return Memory(min(total, limit[0]), min(available, limit[1]), True)
