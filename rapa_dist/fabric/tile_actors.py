"""The actors of a run's tiles: started under their names on their nodes, waited for, looked at, and asked to leave."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from rapa_dist.console import Advance
from rapa_dist.errors import ClusterError
from rapa_dist.fabric.cluster import NAMESPACE
from rapa_dist.fabric.placement import RESOURCE
from rapa_dist.fabric.running_code import RunningCode, installed_code
from rapa_dist.fabric.site import Site

_START_TIMEOUT_S = 60.0  # for the next tile to come up, not for all of them
_ASK_TIMEOUT_S = 5.0
_LOOK_S = 1.0
_RETRY_S = 0.1
_OURS = f"{ClusterError.__module__}.{ClusterError.__name__}: "
_Made = TypeVar("_Made")


class TileActors(Mapping[int, Any]):
    """Actor handles by number of the tile."""

    def __init__(self, run: str) -> None:
        """Have none yet; `run` is the first part of their names."""
        self._run = run
        self._handles: dict[int, Any] = {}

    def __getitem__(self, tile: int) -> Any:
        return self._handles[tile]

    def __iter__(self) -> Iterator[int]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)

    def start(self, tile: int, name: str, site: Site, node: str, deadline: float) -> None:
        """Start the actor of a tile; does not wait for it.

        Args:
            tile: its number.
            name: its name within the run, like "L0/T003".
            site: where it finds its memory.
            node: the node that it has to live on.
            deadline: see `named`.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from rapa_dist.fabric.actor import Tile

        as_actor: Any = ray.remote(concurrency_groups={"inspect": 1})  # type: ignore[call-overload]
        made = as_actor(Tile).options(
            name=f"{self._run}/{name}",
            namespace=NAMESPACE,
            num_cpus=0,
            resources={RESOURCE: 1},
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            max_restarts=-1,  # it is the lookout that gives a tile up
        )
        self._handles[tile] = named(lambda: made.remote(site, installed_code()), self._run, deadline)

    def wait_until_up(self, tiles: Sequence[int], check: Callable[[int | None], None], advance: Advance) -> None:
        """Wait until the actors of some tiles are up.

        Args:
            tiles: by number.
            check: called again and again while none comes up, with None, and with a tile that died; raises if a node
                is lost.
            advance: told how many are up.

        Raises:
            ClusterError: one of them is dead or runs other code, or none comes up.
        """
        import ray

        total = len(tiles)
        tile_of = {self._handles[tile].ready.remote(): tile for tile in tiles}
        waiting = list(tile_of)
        last_start = time.monotonic()
        while waiting:
            advance(total - len(waiting), total)
            up, waiting = ray.wait(waiting, num_returns=1, timeout=_LOOK_S)
            silent_s = time.monotonic() - last_start
            if not up:
                check(None)
                if silent_s > _START_TIMEOUT_S:
                    raise ClusterError(
                        f"{len(waiting)} of {total} tiles did not start; none came up in the last {silent_s:.0f} s. "
                        f"Look whether the node has memory left and its {RESOURCE} resources are free "
                        "(`ray status`)."
                    )
                continue
            last_start = time.monotonic()
            if (death := death_of(up[0], _ASK_TIMEOUT_S)) is not None:
                check(tile_of[up[0]])
                raise ClusterError(f"A tile {how_it_ended(death)}") from death
            check_code(up[0])
        advance(total, total)

    def end(self, tile: int) -> None:
        """Kill the actor of a tile for good, if there is one and it can be reached."""
        import ray

        if tile in self._handles:
            with suppress(Exception):  # it has gone already
                ray.kill(self._handles.pop(tile))

    def ask_to_leave(self) -> list[Any]:
        """Ask all to end by themselves; return references that are done when they have."""
        return [actor.__ray_terminate__.remote() for actor in self._handles.values()]

    def end_all(self) -> None:
        """Kill all that are still there for good, and forget them: one that is being restarted comes no more."""
        for tile in list(self._handles):
            self.end(tile)


def named(make: Callable[[], _Made], run: str, deadline: float) -> _Made:
    """Make a named actor; until the deadline its name may still belong to one that was lost.

    Raises:
        ClusterError: after that.
    """
    import ray

    while True:
        try:
            return make()
        except ray.exceptions.ActorAlreadyExistsError as error:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"A run named {run} has its tiles on this cluster already. Give the run directory another name."
                ) from error
            time.sleep(_RETRY_S)


def check_code(answer: Any) -> None:
    """Raise ClusterError unless a tile that is up, given a reference to what it runs, runs the coordinator's code."""
    import ray

    try:
        code = ray.get(answer, timeout=_ASK_TIMEOUT_S)
    except ray.exceptions.RayError:  # it is being restarted, and then looks for itself
        return
    if not isinstance(code, RunningCode):
        raise ClusterError(
            "A tile runs another version of rapa-dist than the coordinator. Install the same on all nodes."
        )
    installed_code().check(code)


def how_it_ended(death: Exception, log: Callable[[], str] = str) -> str:
    """Say of an actor why it will answer no more.

    Args:
        death: what Ray says.
        log: returns what its process said last, for where that is not what Ray says anyway.
    """
    text = str(death).strip()
    if getattr(death, "actor_init_failed", False):  # it raised something itself, whose traceback comes first
        return f"does not start: {text.splitlines()[-1].removeprefix(_OURS)}"
    return f"is dead and Ray does not restart it: {text}{log()}"


def death_of(answer: Any, timeout_s: float) -> Exception | None:
    """Return why an actor will answer no more, given a reference to an answer of its; None if it may yet."""
    import ray

    try:
        ray.get(answer, timeout=timeout_s)
    except ray.exceptions.ActorUnavailableError:
        return None  # being restarted
    except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
        found: Exception = error
        return found
    return None
