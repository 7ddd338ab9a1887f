"""Processes of tiles as the kernel shows them: whether they run, what time they took; and ending them for good."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


class Look(NamedTuple):
    """A living process at one moment."""

    stopped: bool
    """Whether a signal has stopped it."""
    cpu_ns: int
    """Processor time that it has taken, or one of its threads."""


def look(pid: int, thread: int = 0) -> Look | None:
    """Return what a process is doing, and how long it, or one of its threads, has worked; None if it is dead."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if not pid or state in "ZX":  # a zombie
            return None
        cpu_ns = _TICK_NS * (int(fields[10]) + int(fields[11]))
    except (OSError, ValueError):
        return None
    if thread:
        with suppress(OSError, ValueError):  # a kernel without these statistics, or a thread that has ended
            cpu_ns = int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0])
    return Look(state in "Tt", cpu_ns)


def end(pid: int, file: Path) -> bool:
    """Kill a process outright, if it has a file mapped into its memory; return whether it had.

    So nobody else is hit, although the process may have ended and its number have been given away.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except (OSError, OverflowError):
        return False
    try:
        if not _has_mapped(pid, file):
            return False
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)  # it is the process that was looked at, or none
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def end_users_of(folder: Path) -> None:
    """Kill this user's processes of Ray that have a file below a folder open; not who merely looks into its cluster."""
    inside = f"{folder}/"
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):  # it has gone, is another user's, or no process
            if (pid := int(entry.name)) == os.getpid() or entry.stat().st_uid != os.getuid():
                continue
            descriptor = os.pidfd_open(pid)
            try:
                if _is_rays(entry) and any(os.readlink(file).startswith(inside) for file in (entry / "fd").iterdir()):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            finally:
                os.close(descriptor)


def _is_rays(entry: Path) -> bool:
    """Return whether a process is one of Ray's: its daemons and workers are files of the package, or named "ray::…"."""
    command = (entry / "cmdline").read_bytes()
    return command.startswith(b"ray::") or b"/ray/" in command


def _has_mapped(pid: int, file: Path) -> bool:
    mapped = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return any("/" + line.partition("/")[2] == str(file) for line in mapped)
