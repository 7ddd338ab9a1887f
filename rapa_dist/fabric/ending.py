"""The end of a run's tiles on a cluster that stays: asked to leave, killed for good, and watched until they are gone.

As a rule, all leave when they are asked to. But one may be killed meanwhile, so that Ray restarts it, or be stopped, so
that it hears nothing. Whatever happens, all of them are gone within a limited time.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from rapa_dist.fabric.far import FarChip
from rapa_dist.fabric.lookout import Lookout
from rapa_dist.fabric.patience import ADVICE, bounded
from rapa_dist.fabric.tile_actors import TileActors

_LEAVE_S = 5.0  # for tiles to leave by themselves, and for chips to remove their files
_GONE_S = 10.0  # for Ray to know them dead, and their processes to be gone
_KILL_AFTER_S = 1.0  # of that, a process that is still there is killed outright
_LIMIT_S = 45.0
_LOOK_S = 0.1


def end_tiles(
    run: str,
    actors: TileActors,
    lookout: Lookout,
    chips: Sequence[FarChip],
    leaving: Sequence[Any],
) -> None:
    """End the actors of a run's tiles and chips.

    Args:
        run: its name.
        actors: of its tiles.
        lookout: of the tiles on this node.
        chips: on other nodes.
        leaving: references to what is being ended already.
    """
    import ray

    with bounded(f"Ending the tiles of {run}", ADVICE, limit_s=_LIMIT_S, needed=False):
        asked = [*leaving, *actors.ask_to_leave()]
        deadline = time.monotonic() + _LEAVE_S
        while asked and time.monotonic() < deadline:
            lookout.end_tiles(only_stopped=True)
            _, asked = ray.wait(asked, num_returns=len(asked), timeout=_LOOK_S)
        actors.end_all()  # in vain for those that left
        closing = [chip.close() for chip in chips]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_LEAVE_S)
        for chip in chips:
            chip.kill()
        _watch(run, lookout)


def _watch(run: str, lookout: Lookout) -> None:
    """Return when Ray knows of no living tile of a run, and those here have no process; or after a while."""
    began = time.monotonic()
    while (waited_s := time.monotonic() - began) < _GONE_S:
        gone = lookout.end_tiles(only_stopped=waited_s < _KILL_AFTER_S)
        if not living(run) and gone:
            return
        time.sleep(_LOOK_S)


def living(run: str) -> list[str]:
    """Return the names of the actors of a run that this process started and that Ray has, or restarts."""
    import ray

    with suppress(ray.exceptions.RayError, RuntimeError):
        job = ray._private.worker.global_worker.current_job_id
        found = ray._private.state.actors(job_id=job)
        names = [str(actor["Name"]) for actor in found.values() if actor["State"] != "DEAD"]
        return [name for name in names if name.startswith(f"{run}/")]
    return []
