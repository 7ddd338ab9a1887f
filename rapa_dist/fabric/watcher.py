"""Looking into a run from outside: finding it, joining its cluster, asking one tile per node for all of them."""

import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rapa_dist.command_lines import resume
from rapa_dist.errors import ClusterError, UsageError
from rapa_dist.fabric import access
from rapa_dist.fabric.address import answers, find_address
from rapa_dist.fabric.cluster import NAMESPACE, Cluster, attach
from rapa_dist.fabric.registry import RAY, Registration, registrations
from rapa_dist.fabric.scratch import shared_memory_root
from rapa_dist.inspection import RunStats, TileStats

_TILE = re.compile(r"(?P<run>.+)/(?P<tile>L(?P<layer>\d+)/T\d+)")
_NEXT_S = 0.5  # after which another tile is asked beside one that does not answer
_PATIENCE_S = 15.0  # for tiles to answer at all
_PAUSE_S = 0.1
_STUCK_S = 3.0  # in which Ray has answered, where there is somebody to ask


class RunEndedError(Exception):
    """The run that is watched has ended."""


Leave = Callable[[ClusterError | RunEndedError], None]
"""Told, from a thread of its own, that Ray waits in vain for a cluster that is gone; ends the process."""


class Watcher:
    """One run on the cluster that this process has joined. Costs the run one call per node and reading."""

    def __init__(self, run: str, cluster: Cluster, registration: Registration | None, leave: Leave) -> None:
        self.run = run
        self.leave = leave
        self._cluster = cluster
        self._registration = registration
        self._actors: dict[str, Any] = {}
        self._leaders: list[str] = []  # tiles that answered last time, one per node

    def read(self) -> RunStats:
        """Return the stats of all tiles.

        Raises:
            RunEndedError: the run has ended.
            ClusterError: the cluster went away, or no tile answers.
        """
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            if (error := self._gone()) is not None:
                raise error
            with _unless_gone(self._gone, self.leave):
                if not self._actors:
                    self._actors = dict.fromkeys(tiles_of(self.run))
                found = self._ask() if self._actors else {}
            if found:
                return RunStats.of(self.run, found.values(), silent=sorted(self._actors.keys() - found.keys()))
            if not self._actors and self._registration is None:
                raise RunEndedError(f"The run {self.run} has ended.")
            self._leaders, self._actors = [], {}
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"No tile of the run {self.run} answers for {_PATIENCE_S:.0f} s, though it has not ended. "
                    "Look at its log, and at its node."
                )
            time.sleep(_PAUSE_S)

    def close(self) -> None:
        """Leave the cluster."""
        with _unless_gone(self._gone, self.leave):
            self._cluster.close()

    def _ask(self) -> dict[str, TileStats]:
        """Return stats by tile, asking further tiles until all are covered or nobody is left to ask."""
        import ray

        found: dict[str, TileStats] = {}
        asked: dict[Any, str] = {}
        untried = dict.fromkeys([*self._leaders, *self._actors])
        leaders, self._leaders = self._leaders, []
        for tile in leaders:
            self._ask_tile(tile, asked, untried)
        while missing := [tile for tile in self._actors if tile not in found]:
            done = ray.wait(list(asked), timeout=_NEXT_S)[0] if asked else []
            if not done:
                ask_next = next((tile for tile in missing if tile in untried), None)
                if ask_next is not None:
                    self._ask_tile(ask_next, asked, untried)
                    continue
                if not asked or not self._wait_long(asked):
                    break
                continue
            tile = asked.pop(done[0])
            try:
                stats = [TileStats.from_dict(values) for values in ray.get(done[0])]
            except (ray.exceptions.RayError, OSError):
                continue  # it is being restarted, or leaves
            self._leaders.append(tile)
            found |= {entry.tile: entry for entry in stats}
        return found

    def _ask_tile(self, tile: str, asked: dict[Any, str], untried: dict[str, None]) -> None:
        import ray

        untried.pop(tile, None)
        try:
            if self._actors[tile] is None:
                self._actors[tile] = ray.get_actor(f"{self.run}/{tile}", namespace=NAMESPACE)
            asked[self._actors[tile].chip_stats.remote()] = tile
        except (ValueError, ray.exceptions.RayError):  # it has gone
            return

    @staticmethod
    def _wait_long(asked: Iterable[Any]) -> bool:
        import ray

        return bool(ray.wait(list(asked), timeout=2 * _NEXT_S)[0])

    def _gone(self) -> ClusterError | RunEndedError | None:
        return _what_is_gone(self.run, self._cluster.address, self._registration)


def _what_is_gone(
    run: str | None, address: str, registration: Registration | None
) -> ClusterError | RunEndedError | None:
    """Return what explains it if a run or its cluster is there no more."""
    if registration is not None and not registration.alive:  # the last that a run does is to remove it
        if registration.left_behind:
            return ClusterError(
                f"The run {run} was killed: its coordinator (process {registration.pid}) is gone. "
                f"Resume with: {resume(registration.run_dir, registration.options)}"
            )
        return RunEndedError(f"The run {run} has ended.")
    if answers(address):
        return None
    whose = f"the run {run}" if run else "its runs"
    how = resume(registration.run_dir, registration.options) if registration else "rapa-dist train --resume RUN_DIR"
    return ClusterError(
        f"The Ray cluster at {address} went away, and with it the tiles of {whose}. "
        f"Its newest checkpoint is in its run directory; resume with: {how}"
    )


@contextmanager
def _unless_gone(gone: Callable[[], ClusterError | RunEndedError | None], leave: Leave) -> Iterator[None]:
    """Leave if there is nobody left to answer what Ray is asked in here.

    Ray would wait for a lost cluster for a minute, deaf to Ctrl-C, and then end the process without a word of ours.
    """
    done = threading.Event()

    def look() -> None:
        while not done.wait(_STUCK_S):
            error = gone()
            if error is not None and not done.is_set():
                leave(error)

    threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def find_run(run: str | None, address: str | None, leave: Leave) -> Watcher:
    """Find a run that trains now, and join its cluster.

    Without an address these are the runs that registered on this node; where none fits, those on the cluster that
    `find_address` finds.

    Args:
        run: its name, or its directory: two runs in different folders may have one name; None for the only one.
        address: the cluster; None to look around.
        leave: what to do if the cluster goes away while Ray is asked.

    Raises:
        UsageError: there are several runs and none is named, or none has this name; those that there are are listed.
        ClusterError: there is no run, or no cluster.
    """
    here = registrations(shared_memory_root())
    if run is not None and os.sep in run:
        place = Path(run).resolve()
        here, run = _in_directory(place, here), place.name
    if address is None:
        chosen = _choose_registered(run, here)
        if chosen is not None:
            if chosen.fabric != RAY:
                raise ClusterError(_no_tiles_to_ask(chosen))
            with _unless_gone(lambda: _what_is_gone(chosen.run, chosen.address, chosen), leave):
                cluster = attach((chosen.address, f"of the run {chosen.run}"), _access(chosen))
            return Watcher(chosen.run, cluster, chosen, leave)
    found = _find_cluster(address)
    if found is None:
        if here:
            raise _unknown(run, [entry.run for entry in here], "on this node")
        raise ClusterError(
            "No run trains on this node, and no Ray cluster runs here. Start one with rapa-dist train; for a run on "
            "another machine, give --address on a node of its cluster."
        )
    registered = [entry for entry in here if _is_at(entry, found[0])]
    with _unless_gone(lambda: _what_is_gone(run, found[0], None), leave):
        cluster = attach(found, _access(registered[0]) if registered else None)
        try:
            names = runs_here()
            if run is None and len(names) == 1:
                run = names[0]
            if run is None or run not in names:
                raise _unknown(run, names, f"on the cluster at {found[0]} ({found[1]})")
        except BaseException:
            cluster.close()
            raise
    return Watcher(run, cluster, next((entry for entry in registered if entry.run == run), None), leave)


def _is_at(registration: Registration, address: str) -> bool:
    """Return whether a run is on the cluster at an address as a user wrote it; Ray has another one for 127.0.0.1."""
    host, _, port = address.rpartition(":")
    return registration.address == address or (
        host.strip("[]") in access.LOOPBACK_NAMES and registration.address.rpartition(":")[2] == port
    )


def _find_cluster(address: str | None) -> tuple[str, str] | None:
    try:
        return find_address(address)
    except ClusterError:
        where = f"{address} (--address)" if address else f"{os.environ.get('RAY_ADDRESS')} (RAY_ADDRESS)"
        raise ClusterError(
            f"No Ray cluster answers at {where}. Correct it, or leave it out to look into runs that train on this node."
        ) from None


def _in_directory(path: Path, here: list[Registration]) -> list[Registration]:
    """Return the runs on this node that can be meant by a directory: the one in it, and those of other names.

    Raises:
        UsageError: none trains in it, but one of the same name elsewhere.
    """
    namesakes = [entry for entry in here if entry.run == path.name]
    inside = [entry for entry in namesakes if Path(entry.run_dir).resolve() == path]
    if namesakes and not inside:
        places = ", ".join(entry.run_dir for entry in namesakes)
        raise UsageError(f"No run trains in {path}. One with the same name trains in {places}: give that directory.")
    return [entry for entry in here if entry not in namesakes or entry in inside]


def _choose_registered(run: str | None, here: list[Registration]) -> Registration | None:
    """Return the run that is meant among those that registered on this node; None if it must be elsewhere."""
    fitting = [entry for entry in here if run in (None, entry.run)]
    if any(entry.fabric == RAY for entry in fitting):  # the others have no tiles to ask
        fitting = [entry for entry in fitting if entry.fabric == RAY]
    if len(fitting) < 2:
        return fitting[0] if fitting else None
    if run is None:
        raise _unknown(None, [entry.run for entry in fitting], "on this node")
    places = "; ".join(f"{entry.run_dir} on {entry.address or entry.fabric}" for entry in fitting)
    raise UsageError(f"Several runs are named {run}: {places}. Name the cluster with --address.")


def _no_tiles_to_ask(registration: Registration) -> str:
    where = shlex.quote(registration.run_dir)
    return (
        f"The run {registration.run} trains here on the fabric {registration.fabric}, in process {registration.pid}, "
        f"and has no tile processes to ask. Its figures are in {where}: metrics.jsonl has a line for each epoch, "
        f"tiles.json what its tiles did, once it ends; `rapa-dist report {where}` draws them. Started with --live, a "
        "run shows its tiles itself."
    )


def _unknown(run: str | None, names: list[str], where: str) -> ClusterError | UsageError:
    listed = "".join(f"\n  {name}" for name in names)
    if not names:
        wanted = "No run trains" if run is None else f"There is no run {run}, nor any other,"
        return ClusterError(f"{wanted} {where}. Start one with rapa-dist train, or name its cluster with --address.")
    if run is None:
        return UsageError(f"{len(names)} runs train {where}. Name one with --run:{listed}")
    return UsageError(f"No run named {run} trains {where}, but:{listed}")


def _access(registration: Registration) -> dict[str, str]:
    return access.recorded(registration.auth_mode, registration.token_path)


def runs_here() -> list[str]:
    """Return the names of the runs on the cluster that this process has joined."""
    return sorted({match["run"] for match in _tile_names()})


def tiles_of(run: str) -> list[str]:
    """Return the tiles of a run on the cluster that this process has joined, by their names within the run."""
    return sorted((match["tile"] for match in _tile_names() if match["run"] == run), key=lambda name: (len(name), name))


def _tile_names() -> list[re.Match[str]]:
    import ray.util

    named: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    matches = (_TILE.fullmatch(actor["name"]) for actor in named if actor["namespace"] == NAMESPACE)
    return [match for match in matches if match is not None]
