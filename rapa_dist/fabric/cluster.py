"""Joining a Ray cluster, or starting one for the run; whether it has room for the tiles."""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from rapa_dist import folders
from rapa_dist.errors import ClusterError
from rapa_dist.fabric import access
from rapa_dist.fabric.address import RUNNING_HERE, answers, find_address, heard
from rapa_dist.fabric.nodes import CUT_OFF_S, PROBE_TIMEOUT_S, check_capacity, find_rooms
from rapa_dist.fabric.patience import ADVICE, bounded
from rapa_dist.fabric.placement import RESOURCE
from rapa_dist.fabric.scratch import RAY, Scratch, fresh_name, shared_memory_root, sweep
from rapa_dist.fabric.surroundings import apart, job_config, settle
from rapa_dist.interrupts import uninterrupted
from rapa_dist.leaving import will_end_at_once
from rapa_dist.preconditions import check_before_start

NAMESPACE = "rapa-dist"
_OBJECT_STORE_BYTES = 100_000_000  # rows never pass through it; Ray wants at least 75 MB
_LONGEST_FOLDER = 107 - len("/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
_HEAD_TRIES, _HEAD_PAUSE_S = 3, 1.0  # a network may stutter
_LEAVE_S = 30.0  # Ray gives each of its processes two seconds
_LONGEST_COUNTED_S = 5.0  # between two tries: this process may have been stopped in between


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
    _access_before: dict[str, str] = field(default_factory=access.current)  # of the process, to be put back
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

    def is_there(self) -> bool:
        """Return whether the head answers. If not it is taken for lost: Ray would wait for it."""
        self.head_lost = self.head_lost or not answers(self.address)
        return not self.head_lost

    def _lost(self, how: str) -> NoReturn:
        self.head_lost = True
        raise ClusterError(
            f"The head of the Ray cluster at {self.address} {how}, and the cluster with it. Start another one, "
            "and go on there from the newest checkpoint."
        )

    def close(self) -> None:
        """Disconnect; stop the cluster if it was started for this run."""
        with uninterrupted():
            if self.is_there():
                _leave(f"Leaving the Ray cluster at {self.address}", partial(_end_all, self.scratch))
            else:
                will_end_at_once()  # when this process ends, Ray would take leave by itself
            _end_all(self.scratch)
            access.use(self._access_before)

    def keep_logs(self, folder: Path) -> None:
        """Copy Ray's logs of a cluster that was started for this run; for after a failure."""
        if self.scratch is not None:
            logs = self.scratch.path / RAY / "session_latest" / "logs"
            shutil.copytree(logs, folder, dirs_exist_ok=True, ignore_dangling_symlinks=True)


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
    settle(joins=found is not None)
    if found is None:
        check_before_start(n_tiles)
        # Processes that Ray starts at a time. By its default, one per core, 21 tiles take twice as long to
        # come up, and Ray warns, on stdout, of every four times as many processes.
        os.environ["RAY_worker_maximum_startup_concurrency"] = str(at_once)  # noqa: SIM112  Ray spells it so
    import ray

    before = access.current()
    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR"}
    if found is None:
        scratch = Scratch(folder_for_ray())
        end = partial(_end_all, scratch)
        try:
            access.use(access.with_own_token(scratch.path))
            with bounded("Starting Ray", ADVICE, end=end), apart(scratch.path), access.on_loopback():
                context: Any = ray.init(
                    address="local",
                    _node_ip_address=access.LOOPBACK,
                    num_cpus=at_once,
                    num_gpus=gpus,
                    resources={RESOURCE: n_tiles} if n_tiles else {},
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    _temp_dir=str(scratch.path / RAY),
                    job_config=job_config(),
                    **options,
                )
        except BaseException as error:
            with uninterrupted():
                _leave("Ending Ray, which did not start,", end)
                end()
                access.use(before)
            if isinstance(error, Exception) and not isinstance(error, ClusterError):
                raise ClusterError(f"Can't start Ray on this machine: {error}") from error
            raise
        return Cluster("started for this run", context.address_info["address"], scratch, _access_before=before)
    try:
        _join(found, access.with_users_token() if found[1] == RUNNING_HERE else before, **options)
    except Exception as error:
        access.use(before)
        if isinstance(error, ClusterError):  # which says what to do
            raise
        raise ClusterError(
            f"Can't join the Ray cluster at {found[0]} ({found[1]}): {error}. If it wants a token, as one started by "
            "`ray start` does where there is a token, set RAY_AUTH_MODE=token; else see that versions agree."
        ) from error
    cluster = Cluster(found[1], found[0], None, _access_before=before)
    try:
        if n_tiles:
            check_capacity(n_tiles, find_rooms())
    except BaseException:
        cluster.close()
        raise
    return cluster


def attach(found: tuple[str, str], environment: dict[str, str] | None = None) -> Cluster:
    """Connect to a cluster to look into it, as `find_address` found it; nothing is asked of it but answers.

    Args:
        found: its address, and how it was found.
        environment: `access.recorded` of a run that registered there; None where none did.

    Raises:
        ClusterError: it can't be joined.
    """
    settle(joins=True)
    before = access.current()
    wanted = environment or (access.with_users_token() if found[1] == RUNNING_HERE else before)
    try:
        _join(found, wanted, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:
        access.use(before)
        if isinstance(error, ClusterError):
            raise
        token = (
            "It wants the token that it was started with: give it in RAY_AUTH_TOKEN or ~/.ray/auth_token."
            if wanted.get("RAY_AUTH_MODE") == "token"
            else "If it wants a token, as one started by `ray start` does where there is a token, set "
            "RAY_AUTH_MODE=token; if this machine is no node of it, run this on one."
        )
        raise ClusterError(f"Can't join the Ray cluster at {found[0]} ({found[1]}): {error}. {token}") from error
    return Cluster(found[1], found[0], None, _access_before=before)


def _join(found: tuple[str, str], environment: dict[str, str], **options: Any) -> None:
    access.use(environment)
    import ray

    with bounded(f"Joining the Ray cluster at {found[0]}", ADVICE), access.as_it_listens(found[0]), _daemon_heard():
        ray.init(address=found[0], job_config=job_config(), **options)


@contextmanager
def _daemon_heard() -> Iterator[None]:
    """Have Ray look, before it joins a cluster, whether its daemon on this node answers.

    Else it would wait half a minute, with no thread of this process able to do anything, and end it by itself.
    """
    from ray._private import services

    choose = services.get_node_to_connect_for_driver

    def choose_and_look(*arguments: Any, **options: Any) -> Any:
        chosen = choose(*arguments, **options)
        address = f"{chosen.node_manager_address}:{chosen.node_manager_port}"
        if not answers(address):
            raise ClusterError(f"Ray's daemon on this node, the raylet at {address}, does not answer. {ADVICE}")
        return chosen

    services.get_node_to_connect_for_driver = choose_and_look
    try:
        yield
    finally:
        services.get_node_to_connect_for_driver = choose


def _leave(what: str, end: Callable[[], None]) -> None:
    import ray

    with bounded(what, ADVICE, limit_s=_LEAVE_S, end=end, needed=False):
        ray.shutdown()


def _end_all(scratch: Scratch | None) -> None:
    """End what is left of a cluster that was started for this run, stopped or not, and remove its files."""
    if scratch is not None:
        scratch.abandon()


def clear_away_abandoned() -> None:
    """Remove what this user's runs that were killed have left on this machine, in memory and among temporary files.

    Every run does so when it starts its own.

    Raises:
        ClusterError: there is no such folder.
    """
    for folder in {shared_memory_root(), folder_for_ray()}:
        sweep(folder)


def folder_for_ray() -> Path:
    """Return a folder for Ray's files, short enough for the names of the sockets that it makes there (107 bytes).

    That is one for temporary files, or one in memory where none can be written to.

    Raises:
        ClusterError: there is neither.
    """
    usual = Path("/tmp")
    for folder in (folders.temporary(), usual if os.access(usual, os.W_OK | os.X_OK) else None, shared_memory_root()):
        if folder is not None and len(os.fsencode(f"{folder}/{fresh_name()}/{RAY}")) <= _LONGEST_FOLDER:
            return folder
    raise ClusterError(
        "Ray needs a folder for its files whose name is short, and that can be written to; /tmp can't be. "
        "Name one in TMPDIR."
    )
