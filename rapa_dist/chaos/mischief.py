"""What is done to a run, and when: drawn from a seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from rapa_dist.errors import UsageError

TILE_KILL, TILE_STOP, ALL_TILES = "tile-kill", "tile-stop", "all-tiles"
COORDINATOR_KILL, COORDINATOR_TERM = "coordinator-kill", "coordinator-term"
NODE_KILL, NODE_CUT, CHIP_KILL = "node-kill", "node-cut", "chip-kill"
KINDS = {
    TILE_KILL: "SIGKILL to the process of one tile",
    TILE_STOP: "SIGSTOP to the process of one tile, which so hangs",
    ALL_TILES: "SIGKILL to all tiles at once",
    COORDINATOR_KILL: "SIGKILL to the coordinator, while it starts, trains or saves; then the run is resumed",
    COORDINATOR_TERM: "SIGTERM to the coordinator, as batch systems send it; then the run is resumed",
    NODE_KILL: "SIGKILL to every process of a node that has tiles; it comes back, empty",
    NODE_CUT: "the network of a node that has tiles is cut for ten seconds",
    CHIP_KILL: "SIGKILL to the process of another node's chip, and to nothing else there",
}
"""Kinds of mischief, and what they are."""
ON_NODES = (NODE_KILL, NODE_CUT, CHIP_KILL)
"""Those that need several nodes."""
CUT_S = 10.0
STARTING, TRAINING, SAVING = "starting", "training", "saving"
_MOMENTS = {STARTING: 0.2, TRAINING: 0.4, SAVING: 0.4}  # of a kill of the coordinator, and how likely


@dataclass(frozen=True, slots=True, kw_only=True)
class Mischief:
    """One deed."""

    kind: str
    """One of `KINDS`."""
    moment: str
    """While the coordinator is `STARTING`, `TRAINING` or `SAVING` a checkpoint."""
    step: int
    """Training steps after which it is done; at the end of an epoch where it has to do with saving."""
    delay_s: float
    """How long after that."""
    victim: int
    """Number of the tile it is done to, in the order of the layers, or what a node is chosen by. Others have none."""


def draw(seed: str, kinds: Sequence[str], number: int, *, tiles: int, epochs: int, steps: int) -> list[Mischief]:
    """Draw what is done to one run, in the order of the moments.

    Args:
        seed: the same seed draws the same.
        kinds: which, all equally likely.
        number: how many deeds.
        tiles: of the run.
        epochs: of the run.
        steps: of an epoch.
    """
    rng = random.Random(seed)
    deeds = []
    for _ in range(number):
        kind, moment = rng.choice(list(kinds)), TRAINING
        if kind == COORDINATOR_KILL:
            moment = rng.choices(list(_MOMENTS), list(_MOMENTS.values()))[0]
        step = {
            STARTING: 0,
            TRAINING: rng.randrange(epochs * steps - 1),
            SAVING: steps * rng.randint(1, max(1, epochs - 1)),  # behind the last one there is nothing to disturb
        }[moment]
        delay_s = rng.uniform(0, 0.004 if moment == SAVING else 0.03)
        deeds.append(Mischief(kind=kind, moment=moment, step=step, delay_s=delay_s, victim=rng.randrange(tiles)))
    return sorted(deeds, key=lambda deed: deed.step)


def check_kinds(kinds: Sequence[str], *, several_nodes: bool = False) -> None:
    """Raise UsageError unless all of these are kinds of mischief that can be done here."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise UsageError(f"--kinds is a list of {', '.join(KINDS)}; not “{', '.join(unknown)}”.")
    if not several_nodes and (on_nodes := [kind for kind in kinds if kind in ON_NODES]):
        raise UsageError(
            f"{', '.join(on_nodes)} needs several nodes. Start some with cluster/local.sh --state DIR start --nodes 3, "
            "and name them with --local-cluster DIR."
        )
