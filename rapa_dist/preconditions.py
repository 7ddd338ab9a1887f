"""What this machine has to give before Ray can be started: a loopback interface, open files, processes.

Where one of them is missing, Ray tries for minutes, deaf to Ctrl-C, or its processes end without a word. So a start
looks at them first, as `rapa-dist doctor` does.
"""

import os
import resource
import socket
from contextlib import suppress
from pathlib import Path

from rapa_dist import cgroup
from rapa_dist.check import Check
from rapa_dist.errors import ClusterError

_LOOPBACK = "127.0.0.1"
_LOOPBACK_TIMEOUT_S = 2.0
# Measured with Ray 2.60: with 3 tiles one process has at most 60 files open, with 21 tiles 112, with 64 and 112
# allowed a run still ends well. All processes together have 229 and 684 threads. Twice as much is comfortable.
_FILES_OF_RAY, _FILES_PER_TILE = 48, 3
_THREADS_OF_RAY, _THREADS_PER_TILE = 120, 20
_COMFORT = 2


def check_before_start(n_tiles: int) -> None:
    """Look at all of it before Ray is started with room for so many tiles.

    Raises:
        ClusterError: something is missing; what, and what to do.
    """
    checks = (check_loopback(), check_open_files(n_tiles), check_processes(n_tiles))
    if failed := [check for check in checks if check.status == "failed"]:
        raise ClusterError(
            "Ray can't be started on this machine. "
            + " ".join(f"{check.name.capitalize()}: {check.value}. {check.fix}" for check in failed)
        )


def check_loopback() -> Check:
    """Send something to this machine itself: Ray's processes reach each other so."""
    name = "loopback"
    try:
        with socket.create_server((_LOOPBACK, 0)) as server:
            server.settimeout(_LOOPBACK_TIMEOUT_S)
            with socket.create_connection(server.getsockname()[:2], timeout=_LOOPBACK_TIMEOUT_S):
                server.accept()[0].close()
    except OSError as error:
        value = f"{_LOOPBACK} can't be reached ({error.strerror or error})"
        fix = (
            "Ray's processes on one machine talk over it. Turn it on with `ip link set lo up` (as root), let firewall "
            "and sandbox allow it, or use --fabric serial or batched."
        )
        return Check(name, "failed", value, fix, {"reached": False})
    return Check(name, "ok", f"{_LOOPBACK} is reached", quantities={"reached": True})


def check_open_files(n_tiles: int) -> Check:
    """Look how many files a process may open; Ray raises the soft limit to the hard one by itself."""
    return judge_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE), n_tiles)


def judge_open_files(soft: int, hard: int, n_tiles: int) -> Check:
    """Say whether the limits suffice for so many tiles."""
    name = "open files"
    needed = _FILES_OF_RAY + _FILES_PER_TILE * n_tiles
    found = {"soft_limit": soft, "hard_limit": hard, "needed": needed}
    unlimited = hard == resource.RLIM_INFINITY
    value = f"{soft:,}, may be raised to {'any number' if unlimited else f'{hard:,}'}"
    if unlimited or hard >= _COMFORT * needed:
        return Check(name, "ok", value, quantities=found)
    fix = (
        f"With {n_tiles} tiles, Ray opens {needed:,} files in one process. Raise the limit with "
        f"`ulimit -Hn {_COMFORT * needed}` (as root), or use fewer --tiles."
    )
    return Check(name, "failed" if hard < needed else "warning", value, fix, found)


def check_processes(n_tiles: int) -> Check:
    """Look how many processes and threads this user, and this control group, may still start."""
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    unlimited = limit == resource.RLIM_INFINITY or os.geteuid() == 0  # the limit is not for root
    of_user = None if unlimited else limit - _threads_of(os.getuid())
    return judge_processes(of_user, cgroup.processes_left(), n_tiles)


def judge_processes(of_user: int | None, of_group: int | None, n_tiles: int) -> Check:
    """Say whether so many more processes and threads suffice for a number of tiles; None: there is no limit."""
    name = "processes"
    needed = _THREADS_OF_RAY + _THREADS_PER_TILE * n_tiles
    left = min((number for number in (of_user, of_group) if number is not None), default=None)
    found = {"left": left, "needed": needed}
    if left is None:
        return Check(name, "ok", "this user may start any number", quantities=found)
    value = f"{max(left, 0):,} more may be started, threads included"
    if left >= _COMFORT * needed:
        return Check(name, "ok", value, quantities=found)
    how = "`ulimit -u`" if left == of_user else "the limit of the container or batch job (docker: --pids-limit)"
    fix = f"With {n_tiles} tiles, Ray starts at least {needed:,}. Raise {how}, or use fewer --tiles."
    return Check(name, "failed" if left < needed else "warning", value, fix, found)


def _threads_of(user: int) -> int:
    """Return how many threads a user's processes have: that is what the limit of processes counts."""
    count = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError, IndexError):  # it has gone
                if entry.stat().st_uid == user:
                    count += int((entry / "stat").read_text().rpartition(")")[2].split()[17])
    return count
