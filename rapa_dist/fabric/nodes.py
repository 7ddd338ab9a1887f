"""The nodes of the cluster that this process has joined: what they offer, and whether they can be reached."""

import errno
import socket
from collections.abc import Mapping, Sequence

from rapa_dist.errors import CapacityError
from rapa_dist.fabric.patience import ADVICE, bounded
from rapa_dist.fabric.placement import NOWHERE, RESOURCE, Room, place
from rapa_dist.machine import Machine

CUT_OFF_S = 30.0
"""Without any sign of life, after which a node or the head is given up; a network may heal before."""
PROBE_TIMEOUT_S = 1.0
GONE = (errno.ECONNREFUSED, errno.ECONNRESET)
"""What a machine answers on which nobody listens; any other error may be that of a network which is cut."""


def node_here() -> str:
    """Return Ray's id of the node that this process is on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def find_rooms() -> list[Room]:
    """Return the living nodes of the cluster, this one first, with the tiles that they offer."""
    import ray

    with bounded("Asking the Ray cluster for its nodes", ADVICE):
        here = node_here()
        per_node = ray._private.state.available_resources_per_node()  # type: ignore[no-untyped-call]
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
    found = []
    for node in nodes:
        total = int(node["Resources"].get(RESOURCE, 0))
        if node["Alive"]:
            room = Room(
                node=node["NodeID"],
                address=node["NodeManagerAddress"],
                free=min(total, int(per_node.get(node["NodeID"], {}).get(RESOURCE, 0))),
                total=total,
                port=int(node.get("NodeManagerPort", 0)),
                here=node["NodeID"] == here,
            )
            found.append(room)
    return sorted(found, key=lambda room: (not room.here, room.address, room.port, room.node))


def reachable(rooms: Sequence[Room], most: int | None = None) -> list[Room]:
    """Return the nodes that offer tiles and can be reached, at most so many."""
    offering = (room for room in rooms if room.total > 0)
    return [room for room in offering if room.here or listens(room.address, room.port)][:most]


def listens(address: str, port: int) -> bool | None:
    """Return whether somebody listens at an address; None if it can't be told, as where a network is cut."""
    try:
        with socket.create_connection((address, port), timeout=PROBE_TIMEOUT_S):
            return True
    except OSError as error:
        return False if error.errno in GONE else None


def room_here(tiles: int) -> Room:
    """Return this node as one that has room for so many tiles."""
    return Room(node_here(), "", tiles, tiles, here=True)


def placed(machine: Machine, rooms: Sequence[Room], settled: Mapping[int, str] = NOWHERE) -> tuple[str, ...]:
    """Place the tiles of a machine; see `place`.

    Raises:
        CapacityError: there is too little room.
    """
    found = place(machine, rooms, settled)
    if found is None:
        raise _too_few(len(machine.tiles) - len(settled), rooms)
    return found


def check_capacity(n_tiles: int, rooms: Sequence[Room]) -> None:
    """Raise CapacityError unless nodes have room for `n_tiles` tiles together."""
    if sum(room.free for room in rooms) < n_tiles:
        raise _too_few(n_tiles, rooms)


def _too_few(n_tiles: int, rooms: Sequence[Room]) -> CapacityError:
    free = sum(room.free for room in rooms)
    offers = "; ".join(
        f"{room.address}{' (this node)' if room.here else ''}: {room.total}"
        + (f", {room.free} free" if room.free != room.total else "")
        for room in rooms
    )
    return CapacityError(
        f"The run needs {n_tiles} {RESOURCE}, one for each tile, and {free} are free on the nodes that can be used "
        f"({offers or 'none offers any'}). Start further nodes with `ray start --address=… "
        f"--resources='{{\"{RESOURCE}\": {n_tiles - free}}}'`, use fewer --tiles, more --nodes if they are limited, "
        "wait for other runs to end, "
        "or pass --address local to have a cluster started for this run."
    )
