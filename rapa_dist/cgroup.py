"""The limits that a container or batch system puts on this process: Linux control groups, v1 and v2."""

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_NO_LIMIT_BYTES = 1 << 60  # version 1 says "none" with a number near 2^63


def cpu_limit(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> float | None:
    """Return how many cores' time this process may use, or None where nothing limits it."""
    limits = []
    for group in _groups("cpu", root, membership):
        quota, _, period = (_read(group / "cpu.max") or "").partition(" ")
        if not period:
            quota = _read(group / "cpu.cfs_quota_us") or ""
            period = _read(group / "cpu.cfs_period_us") or ""
        if quota.isdigit() and period.isdigit():  # otherwise "max" or -1
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def memory_limit(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> tuple[int, int] | None:
    """Return (limit, available) in bytes of the tightest group, or None where nothing limits the memory."""
    limits = []
    for group in _groups("memory", root, membership):
        for limit_name, used_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = _read(group / limit_name) or ""
            if not limit.isdigit() or int(limit) >= _NO_LIMIT_BYTES:
                continue
            lines = (_read(group / "memory.stat") or "").splitlines()
            statistics = dict(line.split(maxsplit=1) for line in lines if " " in line)
            # pages of files that nobody uses at present count as used, and give way
            used = int(_read(group / used_name) or 0) - int(statistics.get(cache_name, 0))
            limits.append((int(limit), int(limit) - used))
    return min(limits, key=lambda limit: limit[1], default=None)


def processes_left(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int | None:
    """Return how many processes and threads may still be started, or None where no group limits them."""
    left = []
    for group in _groups("pids", root, membership):
        limit, used = _read(group / "pids.max") or "", _read(group / "pids.current") or ""
        if limit.isdigit() and used.isdigit():  # otherwise "max"
            left.append(int(limit) - int(used))
    return min(left, default=None)


def _groups(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups and of those around them."""
    for line in (_read(membership) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = root
        elif controller in controllers.split(","):
            top = root / controller
        else:
            continue
        group = top / path.lstrip("/")
        while True:  # inside a container the path may be the host's: what isn't there has no limit
            yield group
            if group == top:
                break
            group = group.parent


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
