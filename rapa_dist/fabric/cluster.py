"""Finding a Ray cluster, or starting one for the run; whether it has room for the tiles."""

import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from rapa_dist.errors import ClusterError, UsageError
from rapa_dist.fabric.nodes import CUT_OFF_S, GONE, PROBE_TIMEOUT_S, check_capacity, find_rooms
from rapa_dist.fabric.placement import RESOURCE
from rapa_dist.fabric.scratch import Scratch, fresh_name
from rapa_dist.interrupts import uninterrupted

NAMESPACE = "rapa-dist"
_OBJECT_STORE_BYTES = 100_000_000  # rows never pass through it; Ray wants at least 75 MB
_CONNECT_TIMEOUT_S = 5.0
_RUNNING_HERE = "already running here"
_RAY = "r"  # Ray's own folder in the scratch directory: it opens the one it is given to everybody
_LONGEST_FOLDER = 107 - len("/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
_HEAD_TRIES, _HEAD_PAUSE_S = 3, 1.0  # a network may stutter
_LONGEST_COUNTED_S = 5.0  # between two tries: this process may have been stopped in between
_HTTP2_SETTINGS = 4  # the kind of frame with which either side of HTTP/2, and so of gRPC, begins
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, _HTTP2_SETTINGS, 0, 0, 0, 0, 0))


@dataclass(slots=True)
class Cluster:
    """A Ray cluster that this process is connected to."""

    description: str
    """How it was found, for people."""
    address: str
    """host:port of its head."""
    scratch: Scratch | None
    """Where its files are, if it was started for this run."""

    head_lost: bool = False
    """Whether the head was found to be gone."""
    _unheard_s: float = 0.0
    _asked: float | None = None  # when it was asked last and not heard

    def check_head(self, *, wait: bool = False) -> None:
        """Raise ClusterError if the cluster's head is gone: a minute later Ray would end this process.

        One that refuses is gone after a few tries. One that can't be reached may be behind a network that is cut:
        it is given up after `CUT_OFF_S`, and until then each call is over within two seconds.

        Args:
            wait: whether to return only when it answers.
        """
        refused = 0
        while (there := heard(self.address, PROBE_TIMEOUT_S)) is not True:
            now = time.monotonic()
            if self._asked is not None:
                self._unheard_s += min(now - self._asked, _LONGEST_COUNTED_S)
            self._asked = now
            if there is False:
                refused += 1
                if refused == _HEAD_TRIES:
                    self._lost("is gone")
            elif self._unheard_s > CUT_OFF_S:
                self._lost(f"can't be reached for {self._unheard_s:.0f} s")
            elif not wait:
                return
            time.sleep(_HEAD_PAUSE_S)
        self._unheard_s, self._asked = 0.0, None

    def _lost(self, how: str) -> NoReturn:
        self.head_lost = True
        raise ClusterError(
            f"The head of the Ray cluster at {self.address} {how}, and the cluster with it. Start another one, "
            "and go on there from the newest checkpoint."
        )

    def close(self) -> None:
        """Disconnect; stop the cluster if it was started for this run."""
        import ray

        with uninterrupted():
            if not self.head_lost:  # else there is nobody to take leave of, and Ray would wait for it
                ray.shutdown()
            if self.scratch is not None:
                self.scratch.remove()

    def keep_logs(self, folder: Path) -> None:
        """Copy Ray's logs of a cluster that was started for this run; for after a failure."""
        if self.scratch is not None:
            logs = self.scratch.path / _RAY / "session_latest" / "logs"
            shutil.copytree(logs, folder, dirs_exist_ok=True, ignore_dangling_symlinks=True)


def find_address(address: str | None) -> tuple[str, str] | None:
    """Return (address, how it was found) of the cluster to use, or None if there is none.

    In this order: `address`, RAY_ADDRESS, the cluster that `ray start` last left running on this machine.

    Raises:
        UsageError: the address is none that a coordinator can run behind.
        ClusterError: an address was asked for and nothing answers there.
    """
    for value, source in ((address, "--address"), (os.environ.get("RAY_ADDRESS"), "RAY_ADDRESS")):
        if value and value != "local":
            if value == "auto":
                if here := _running_here():
                    return here
                raise ClusterError(
                    f"{source} is auto, and no Ray cluster runs on this machine. Start one with `ray start --head "
                    f"--resources='{{\"{RESOURCE}\": 21}}'`, or leave it out to have one started for the run."
                )
            if "://" in value:
                raise UsageError(
                    f"{source} is {value}: the coordinator shares memory with its tiles, so it has to run on a "
                    "node of the cluster, not behind Ray Client. Give host:port, and run it there "
                    "(for instance with `ray job submit`)."
                )
            if _endpoint(value) is None:
                raise UsageError(
                    f"{source} needs host:port of a Ray cluster's head, like 10.0.0.1:6379, or “local” to have one "
                    f"started for the run; it is “{value}”."
                )
            if not answers(value):
                raise ClusterError(
                    f"No Ray cluster answers at {value} ({source}). Start one with `ray start --head "
                    f"--resources='{{\"{RESOURCE}\": 21}}'`, correct the address, or leave it out to have one "
                    "started for the run."
                )
            return value, source
        if value == "local":
            return None
    return _running_here()


def _running_here() -> tuple[str, str] | None:
    current = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        value = current.read_text().strip()
    except OSError:
        return None
    return (value, _RUNNING_HERE) if value and answers(value) else None


def connect(address: str | None, n_tiles: int) -> Cluster:
    """Connect to the cluster to use (see `find_address`), or start one that offers `n_tiles` tiles.

    Raises:
        UsageError, ClusterError: the cluster can't be used; nothing is left running.
    """
    return connect_to(find_address(address), n_tiles)


def connect_to(found: tuple[str, str] | None, n_tiles: int, *, gpus: int = 0) -> Cluster:
    """Connect to the cluster that `find_address` found, or start one where it found none.

    Args:
        found: what `find_address` returned.
        n_tiles: tiles that are needed; 0 for work of another kind.
        gpus: GPUs that a cluster which is started offers.
    """
    at_once = max(len(os.sched_getaffinity(0)), n_tiles // 4 + 1)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray reads it on import
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if found is None:
        # Processes that Ray starts at a time. By its default, one per core, 21 tiles take twice as long to
        # come up, and Ray warns, on stdout, of every four times as many processes.
        os.environ["RAY_worker_maximum_startup_concurrency"] = str(at_once)  # noqa: SIM112  Ray spells it so
    elif found[1] == _RUNNING_HERE and _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as Ray itself joins a cluster that it finds
    import ray

    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR"}
    if found is None:
        scratch = Scratch(_short_temporary_folder())
        try:
            with _apart():
                context: Any = ray.init(
                    address="local",
                    num_cpus=at_once,
                    num_gpus=gpus,
                    resources={RESOURCE: n_tiles} if n_tiles else {},
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    _temp_dir=str(scratch.path / _RAY),
                    **options,
                )
        except BaseException as error:
            with uninterrupted():
                ray.shutdown()
                scratch.remove()
            if isinstance(error, Exception):
                raise ClusterError(f"Can't start Ray on this machine: {error}") from error
            raise
        return Cluster("started for this run", context.address_info["address"], scratch)
    try:
        ray.init(address=found[0], **options)
    except Exception as error:
        raise ClusterError(
            f"Can't join the Ray cluster at {found[0]} ({found[1]}): {error}. If it wants a token, as one started by "
            "`ray start` does where there is a token, set RAY_AUTH_MODE=token; else see that versions agree."
        ) from error
    cluster = Cluster(found[1], found[0], None)
    try:
        if n_tiles:
            check_capacity(n_tiles, find_rooms())
    except BaseException:
        cluster.close()
        raise
    return cluster


@contextmanager
def _apart() -> Iterator[None]:
    """Have what Ray starts live in process groups of its own.

    Batch systems, `timeout` and a terminal that is closed send their signals to a whole group: the coordinator has to
    finish a step and save, for which it needs its tiles.
    """
    from ray._private import services

    before = services.ConsolePopen
    services.ConsolePopen = partial(before, process_group=0)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        services.ConsolePopen = before  # type: ignore[misc]


def attach(found: tuple[str, str], auth_mode: str | None = None) -> Cluster:
    """Connect to a cluster to look into it, as `find_address` found it; nothing is asked of it but answers.

    Args:
        found: its address, and how it was found.
        auth_mode: RAY_AUTH_MODE of a run that registered there; None where none did.

    Raises:
        ClusterError: it can't be joined.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if auth_mode is not None:
        os.environ["RAY_AUTH_MODE"] = auth_mode
    elif found[1] == _RUNNING_HERE and _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    try:
        ray.init(address=found[0], namespace=NAMESPACE, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:
        token = (
            "It wants the token that it was started with: give it in RAY_AUTH_TOKEN or ~/.ray/auth_token."
            if auth_mode == "token"
            else "If it wants a token, as one started by `ray start` does where there is a token, set "
            "RAY_AUTH_MODE=token; if this machine is no node of it, run this on one."
        )
        raise ClusterError(f"Can't join the Ray cluster at {found[0]} ({found[1]}): {error}. {token}") from error
    return Cluster(found[1], found[0], None)


def _endpoint(address: str) -> tuple[str, int] | None:
    """Return host and port of "host:port", or None where the address is something else."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        return None
    return host.strip("[]"), int(port)


def answers(address: str) -> bool:
    """Return whether a gRPC server, as the head of a Ray cluster is one, listens there.

    Ray itself would wait for minutes, also behind a port that something else listens on.
    """
    return heard(address, _CONNECT_TIMEOUT_S) is True


def heard(address: str, timeout_s: float) -> bool | None:
    """Return the same as `answers`; None if it can't be told, as where a network is cut."""
    endpoint = _endpoint(address)
    if endpoint is None:
        return False
    try:
        with socket.create_connection(endpoint, timeout=timeout_s) as connection:
            connection.sendall(_HTTP2_GREETING)
            frame = connection.recv(9)
    except UnicodeError:  # from a name that can't be one of a host
        return False
    except OSError as error:
        return False if error.errno in GONE else None
    return len(frame) == 9 and frame[3] == _HTTP2_SETTINGS


def _has_token() -> bool:
    """Return whether Ray would find a token of this user's."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path.home() / ".ray" / "auth_token").exists()


def _short_temporary_folder() -> Path:
    """Return a folder short enough for the socket names that Ray makes below it (107 bytes at most)."""
    folder = Path(tempfile.gettempdir())
    return folder if len(f"{folder}/{fresh_name()}/{_RAY}") <= _LONGEST_FOLDER else Path("/tmp")
