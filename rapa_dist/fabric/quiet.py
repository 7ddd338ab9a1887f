"""What the processes of a run ask of Linux, so that many of them share a few cores well.

Everything here is a matter of speed alone: where the system offers something else, it is left as it is.
"""

import contextlib
import ctypes
import gc
import os
import signal
import struct
import threading
import time
from itertools import pairwise
from pathlib import Path

_PR_SET_TIMERSLACK = 29
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 1 << 25  # bytes; the GNU C library takes no more
_NEVER = 1 << 30
_TIMER = struct.Struct("@llll")  # struct itimerspec: interval and time left, in s and ns each
_PERIOD_NS = 10_000_000  # of Ray's timer
_TRIES = 20
_LOOKS = 8
_PASSING_NS = 250_000_000_000
_LATE_NS = "4000000000"


def keep_memory() -> None:
    """Have this process keep memory that it frees, for the next time it asks for some.

    A step frees and asks for the same tens of megabytes every time; handing them back to the system, and
    finding them zeroed page by page, takes a tenth of its time.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT):  # of the GNU C library
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)


def give_memory_back() -> None:
    """Hand what this process needed to start, and needs no more, back to the system."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # of the GNU C library
        libc.malloc_trim(0)


def sharp_sleep() -> None:
    """Have the calling thread's sleeps end within a microsecond or so of their time, not within 50."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


def wait_for_a_core() -> None:
    """Have the calling thread, when it is woken, wait until a core is free, and not push another from its own.

    So the coordinator rings all tiles in one go, and a tile that works is not interrupted by one that is rung.
    """
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def die_at_once() -> None:
    """Have SIGTERM end the process without asking Python, which `stop_polling` keeps from noticing it.

    Call it on the main thread. A tile may be killed at any moment anyway.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def stop_polling() -> bool:
    """Keep Ray from waking this process a hundred times a second; call it on another than the main thread.

    The main thread of a Ray worker (2.60) wakes every 10 ms to look for Python's signals. With nothing else
    to do, one process takes 0.7 % of a core for it; 168 of them take a core and more. It does so by a
    timer of its event loop, which is disarmed here: the loop then sleeps until Ray has something for it.
    Nothing is done unless that loop has one timer, and that goes off every 10 ms.

    Returns:
        Whether the process is quiet now.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "timerfd_settime"):
        return False
    for _ in range(_TRIES):
        timer = _timer_of_main_thread()
        if timer is not None and _has_the_period(libc, timer):
            libc.timerfd_settime(timer, 0, _TIMER.pack(0, 0, 0, 0), None)
            time.sleep(2 * _PERIOD_NS * 1e-9)  # had it just gone off, the loop would have set it again by then
            if _time_left_ns(libc, timer) == 0:
                return True
        time.sleep(0.3e-9 * _PERIOD_NS)  # the main thread is busy, or the timer is just being set
    return False


def _has_the_period(libc: ctypes.CDLL, timer: int) -> bool:
    """Return whether a timer, looked at over three of Ray's periods, never has more than one of them left."""
    left = []
    for _ in range(_LOOKS):
        left.append(_time_left_ns(libc, timer))
        time.sleep(3e-9 * _PERIOD_NS / _LOOKS)
    usual = [ns for ns in left if 0 <= ns <= _PERIOD_NS]  # 0 when it has gone off and the loop has no core yet
    passing = [ns for ns in left if ns > _PASSING_NS]  # while the loop sets it anew
    was_set_anew = any(later > earlier for earlier, later in pairwise(usual))
    return len(usual) + len(passing) == _LOOKS and was_set_anew


def relax_others() -> None:
    """Let the timers of this process's other threads be late by seconds, where this user may decide that.

    Ray's threads wait for events of their own, and look around every quarter of a second besides, for which
    168 processes take a quarter of a core. Events still wake them at once.
    """
    mine = threading.get_native_id()
    for thread in Path("/proc/self/task").iterdir():
        if int(thread.name) != mine:
            with contextlib.suppress(OSError):
                Path(f"/proc/{thread.name}/timerslack_ns").write_text(_LATE_NS)


def _timer_of_main_thread() -> int | None:
    """Return the only timer of the event loop that the main thread sleeps in, as a file descriptor."""
    try:
        call = Path(f"/proc/self/task/{os.getpid()}/syscall").read_text().split()
        loop = int(call[1], 16)
        if os.readlink(f"/proc/self/fd/{loop}") != "anon_inode:[eventpoll]":
            return None
        lines = Path(f"/proc/self/fdinfo/{loop}").read_text().splitlines()
        watched = [int(line.split()[1]) for line in lines if line.startswith("tfd:")]
        timers = [fd for fd in watched if os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[timerfd]"]
    except (OSError, ValueError, IndexError):  # it runs, sleeps elsewhere, or this is no Linux
        return None
    return timers[0] if len(timers) == 1 else None


def _time_left_ns(libc: ctypes.CDLL, timer: int) -> int:
    buffer = ctypes.create_string_buffer(_TIMER.size)
    if libc.timerfd_gettime(timer, buffer):
        return -1
    *_, seconds, nanoseconds = _TIMER.unpack(buffer.raw)
    return int(seconds * 1_000_000_000 + nanoseconds)
