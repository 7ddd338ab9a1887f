"""Fetching a file: quick to say that it can't be done, and never half a file under a whole one's name."""

import http.client
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from pathlib import Path

from rapa_dist.console import work
from rapa_dist.data import vision

REACH_S = 4.0
"""How long a server may take to answer at all."""
STALL_S = 20.0
"""How long a download may stand still."""
PIECE = 1 << 18  # bytes
MB = 1_000_000


class Unreachable(Exception):  # noqa: N818 (what happened, not what went wrong in here)
    """A file can't be fetched; the message says why."""


def reach(url: str) -> None:
    """Return if the server answers, whatever it answers.

    Raises:
        Unreachable: it doesn't within a few seconds.
    """
    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=REACH_S).close()
        except urllib.error.HTTPError as error:
            error.close()
            answer.append(None)
        except (OSError, http.client.HTTPException, ValueError) as error:
            answer.append(error)
        else:
            answer.append(None)

    # In a thread, because looking up a name heeds no time-out; it ends with the process.
    thread = threading.Thread(target=ask, daemon=True, name="reach")
    thread.start()
    thread.join(2 * REACH_S)
    host = urllib.parse.urlsplit(url).hostname
    if not answer:
        raise Unreachable(f"{host} doesn't answer")
    if answer[0] is not None:
        raise Unreachable(f"no connection to {host} ({_reason(answer[0])})") from None


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
                with urllib.request.urlopen(url, timeout=STALL_S) as answer:
                    total, done = int(answer.headers.get("Content-Length", 0)), 0
                    while piece := answer.read(PIECE):
                        file.write(piece)
                        done += len(piece)
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
    return str(reason) or type(reason).__name__
