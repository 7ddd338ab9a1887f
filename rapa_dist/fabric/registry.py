"""Runs register on their node, so that `rapa-dist stats` finds them without being told where they are.

A registration is a file in the scratch directory of the run's chip: it is there while the run is, and a run
that was killed is known by its lock, which nobody holds any more.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from rapa_dist.errors import ClusterError
from rapa_dist.fabric import access
from rapa_dist.fabric.scratch import LOCK, Scratch, open_file, own_folders
from rapa_dist.fields import TEXT, TRUTH, check, listing, optional, whole
from rapa_dist.files import parse_json

RAY = "ray"
"""The fabric whose tiles are processes of their own, which others can ask."""
_FILE, _MOST = "run.json", 1 << 20  # bytes
_FACTS = {
    "run": TEXT,
    "address": TEXT,
    "auth_mode": optional(TEXT),
    "token_path": optional(TEXT),
    "pid": whole(1),
    "run_dir": TEXT,
    "started": TEXT,
    "first": TRUTH,
    "fabric": TEXT,
    "options": listing(TEXT),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """A run that trains on this node now."""

    run: str
    """Its name, the first part of its actors' names."""
    address: str
    """host:port of its Ray cluster; empty where it has none."""
    auth_mode: str | None
    """RAY_AUTH_MODE as the coordinator had it when it joined or started the cluster."""
    token_path: str | None
    """The file with the cluster's token, if it is in one."""
    pid: int
    """The coordinator's process."""
    run_dir: str
    started: str
    """When, in UTC."""
    folder: Path
    """The scratch directory that the registration is in."""
    first: bool = True
    """False on the nodes that the coordinator is not on."""
    fabric: str = RAY
    """Where its tiles live; only those of `ray` can be asked."""
    options: tuple[str, ...] = ()
    """Of `rapa-dist train`, to resume it in the same way."""

    @classmethod
    def of_this_process(
        cls, *, run: str, address: str, run_dir: Path, folder: Path, fabric: str = RAY, options: Sequence[str] = ()
    ) -> Self:
        """Return the registration of a run that this process is about to train."""
        auth_mode, token_path = access.to_record()
        return cls(
            run=run,
            address=address,
            auth_mode=auth_mode,
            token_path=token_path,
            pid=os.getpid(),
            run_dir=str(run_dir.absolute()),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            folder=folder,
            fabric=fabric,
            options=tuple(options),
        )

    def within(self, folder: Path) -> Self:
        """Return the registration of the same run in the scratch directory of a chip on another node."""
        return replace(self, folder=folder, first=False)

    def write(self) -> None:
        """Register the run."""
        facts = {name: value for name, value in asdict(self).items() if name != "folder"}
        partial = self.folder / f".{_FILE}"
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w") as file:
            json.dump(facts, file)
        partial.replace(self.folder / _FILE)

    @property
    def alive(self) -> bool:
        """Whether the coordinator still has its run."""
        return (self.folder / _FILE).exists() and is_held(self.folder)

    @property
    def left_behind(self) -> bool:
        """Whether the coordinator was killed: a run that ends removes its registration."""
        return (self.folder / _FILE).exists() and not is_held(self.folder)


@contextlib.contextmanager
def registered(*, run: str, run_dir: Path, fabric: str, options: Sequence[str]) -> Iterator[None]:
    """Register a run whose tiles are in this process, so that it has no scratch directory for them."""
    with contextlib.ExitStack() as clean_up:
        with contextlib.suppress(ClusterError, OSError):  # it needs none to train
            scratch = Scratch()
            clean_up.callback(scratch.remove)
            Registration.of_this_process(
                run=run, address="", run_dir=run_dir, folder=scratch.path, fabric=fabric, options=options
            ).write()
        yield


def registrations(root: Path) -> list[Registration]:
    """Return the runs of this user that train on this node now and have their scratch below `root`, oldest first."""
    found = []
    for folder in own_folders(root):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # it may end while it is read
            with open(open_file(folder / _FILE, os.O_RDONLY), "rb") as file:
                facts = check(parse_json(file.read(_MOST)), _FACTS, exact=True)
            registration = Registration(**facts | {"options": tuple(facts["options"])}, folder=folder)
            if registration.alive:
                found.append(registration)
    found.sort(key=lambda entry: (entry.started, entry.run, entry.address, not entry.first))
    seen: dict[tuple[str, str, int], Registration] = {}  # nodes may share the machine, and so its memory
    for entry in found:
        seen.setdefault((entry.run, entry.address, entry.pid), entry)
    return list(seen.values())


def is_held(folder: Path) -> bool:
    """Whether a living process owns a scratch directory."""
    try:
        descriptor = open_file(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
