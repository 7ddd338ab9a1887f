"""Fetching a file: quick to say that it can't be done, and never half a file under a whole one's name."""

import http.client
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from rapa_dist.console import work
from rapa_dist.data import vision

REACH_S = 4.0
"""How long a server may take to answer at all."""
STALL_S = 20.0
"""How long a download may stand still."""
SLOWEST = 20_000
"""Bytes a second that it has to bring, at least: 170 MB take more than two hours then."""
PACE_S = 30.0
"""Over which that is measured."""
LARGEST = 1_000_000_000  # bytes; the largest file of a data set has 182 MB
PIECE = 1 << 18  # bytes
MB = 1_000_000


_Returned = TypeVar("_Returned")


class Unreachable(Exception):  # noqa: N818 (what happened, not what went wrong in here)
    """A file can't be fetched; the message says why."""


def reach(url: str) -> None:
    """Return if the server answers, whatever it answers.

    Raises:
        Unreachable: it doesn't within a few seconds.
    """

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=REACH_S).close()
        except urllib.error.HTTPError as error:
            error.close()

    host = urllib.parse.urlsplit(url).hostname
    try:
        _in_time(ask, 2 * REACH_S)
    except TimeoutError:
        raise Unreachable(f"{host} doesn't answer") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unreachable(f"no connection to {host} ({_reason(error)})") from None


def _in_time(call: Callable[[], _Returned], limit_s: float) -> _Returned:
    """Return what a call returns.

    In a thread, which ends with the process: looking up a name heeds no time-out, nor does an answer that drips.

    Raises:
        TimeoutError: it doesn't return in time.
    """
    future: Future[_Returned] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:  # noqa: BLE001 (whatever it is, it is raised there)
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="fetch").start()
    return future.result(limit_s)


class _Pace:
    """Sees to it that a download gets on."""

    def __init__(self, url: str) -> None:
        self._url, self._total = url, 0
        self._begin()

    def _begin(self) -> None:
        self._since, self._bytes = time.monotonic(), 0

    def count(self, n_bytes: int) -> int:
        """Count what has come, and return how much there is in all.

        Raises:
            Unreachable: it comes too slowly, or without an end.
        """
        self._total, self._bytes = self._total + n_bytes, self._bytes + n_bytes
        if self._total > LARGEST:
            raise Unreachable(f"{self._url}: more than {LARGEST // MB:,} MB come, which no data set here has")
        if (seconds := time.monotonic() - self._since) > PACE_S:
            if self._bytes < SLOWEST * seconds:
                raise Unreachable(
                    f"{self._url}: it comes too slowly, {self._bytes:,} bytes in the last {seconds:.0f} s, "
                    f"where {SLOWEST:,} a second are the least"
                )
            self._begin()
        return self._total


def download(url: str, path: Path, md5: str) -> None:
    """Fetch a file, showing progress in MB; it appears under its name once it is whole.

    Raises:
        Unreachable: it can't be fetched, or came damaged.
        OSError: it can't be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file, work(f"fetching {path.name}", "MB") as advance:
            try:
                with _in_time(lambda: urllib.request.urlopen(url, timeout=STALL_S), 2 * STALL_S) as answer:
                    total, pace = int(answer.headers.get("Content-Length", 0)), _Pace(url)
                    while piece := answer.read1(PIECE):
                        file.write(piece)
                        done = pace.count(len(piece))
                        advance(done // MB, max(total, done) // MB)
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
                if isinstance(error, urllib.error.HTTPError):
                    error.close()
                raise Unreachable(f"{url}: {_reason(error)}") from error
        if not vision.is_whole(beside, md5):
            raise Unreachable(f"{url}: what came doesn't have the checksum of the published file")
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    if isinstance(reason, TimeoutError):
        return "it does not answer in time"
    return str(reason) or type(reason).__name__
