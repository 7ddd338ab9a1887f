"""Placement: which tile lives on which node. Arithmetic only.

Every node gets an equal share of every layer, as far as its capacity goes, and the tiles of one layer on one node
follow each other, so that their rows are one block. After the loss of a node the tiles on the others stay where
they are, and the lost ones are shared out among them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from rapa_dist.machine import Machine

RESOURCE = "analog_tile"
"""The Ray resource of which a node offers as many as it can take tiles."""
NOWHERE: Mapping[int, str] = {}


@dataclass(frozen=True, slots=True)
class Room:
    """What a node offers."""

    node: str
    """Ray's id of the node."""
    address: str
    """Its IP address, for people and for probing."""
    free: int
    """Tiles that it can still take."""
    total: int
    """Tiles that it can take when nothing runs on it."""
    port: int = 0
    """Where its raylet listens; 0: unknown."""
    here: bool = False
    """Whether this process is on it."""


def place(machine: Machine, rooms: Sequence[Room], settled: Mapping[int, str] = NOWHERE) -> tuple[str, ...] | None:
    """Place the tiles of a machine.

    Tile by tile, the node is chosen that has least of the layer for its capacity, and among equals the one with
    fewest rows so far, so that layers with fewer tiles than there are nodes go to different ones.

    Args:
        machine: which tiles.
        rooms: the nodes, in the order in which they get the tiles of a layer; how many tiles they can take besides
            those that are settled.
        settled: tiles, by their number in the machine, that have their node already.

    Returns:
        The node of every tile of `machine.tiles`; None if there is too little room.
    """
    free = {room.node: room.free for room in rooms}
    if sum(free.values()) < len(machine.tiles) - len(settled):
        return None
    nodes = list(dict.fromkeys([*free, *settled.values()]))
    weight = _quotas(nodes, free, Counter(settled.values()), len(machine.tiles))
    rows = dict.fromkeys(nodes, 0.0)  # of an image
    placed: dict[int, str] = {}
    number = 0
    for layer in machine.arrays:
        tiles = range(number, number + layer.n_tiles)
        number += layer.n_tiles
        rows_of_tile = layer.n_patches / layer.perforation / layer.n_tiles
        of_layer = Counter(settled[tile] for tile in tiles if tile in settled)
        for node, n_tiles in of_layer.items():
            rows[node] += n_tiles * rows_of_tile
        new: Counter[str] = Counter()
        for _ in range(layer.n_tiles - of_layer.total()):
            able = (node for node in nodes if free.get(node, 0) > 0)
            node = min(able, key=lambda name: ((of_layer[name] + 1) / weight[name], rows[name] / weight[name]))
            free[node] -= 1
            of_layer[node] += 1
            new[node] += 1
            rows[node] += rows_of_tile
        one_after_the_other = (node for node in nodes for _ in range(new[node]))
        placed |= {tile: settled.get(tile) or next(one_after_the_other) for tile in tiles}
    return tuple(placed[tile] for tile in range(number))


def _quotas(
    nodes: Sequence[str], free: Mapping[str, int], settled: Mapping[str, int], n_tiles: int
) -> dict[str, float]:
    """Return how many of all tiles every node would have if they were spread as equally as capacities allow."""
    capacity = {node: free.get(node, 0) + settled.get(node, 0) for node in nodes}
    level, left, quotas = 0.0, float(n_tiles), dict.fromkeys(nodes, 0.0)
    for low, high in pairwise([0, *sorted(set(capacity.values()))]):
        open_nodes = [node for node in nodes if capacity[node] > low]
        level = min(float(high), low + left / len(open_nodes))
        for node in open_nodes:
            quotas[node] = level
        left -= (level - low) * len(open_nodes)
        if left <= 0:
            break
    return {node: max(quota, 1e-9) for node, quota in quotas.items()}


def runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Return the runs (first, one past the last) of numbers in a row among sorted ones."""
    found: list[tuple[int, int]] = []
    for position in positions:
        if found and found[-1][1] == position:
            found[-1] = found[-1][0], position + 1
        else:
            found.append((position, position + 1))
    return found


def choose(started: Machine, machine: Machine, node_of: Mapping[int, str]) -> list[list[int]]:
    """Return, for every layer, which of the tiles that were started a smaller machine uses, every node its share."""
    nodes = list(dict.fromkeys(node_of.values()))
    chosen, first = [], 0
    for layer, ours in zip(machine.arrays, started.arrays, strict=True):
        tiles = range(first, first + ours.n_tiles)
        first += ours.n_tiles
        if layer.n_tiles == ours.n_tiles:
            chosen.append(list(tiles))
            continue
        at = {node: [tile for tile in tiles if node_of[tile] == node] for node in nodes}
        turns = (of_node[turn] for turn in range(ours.n_tiles) for of_node in at.values() if turn < len(of_node))
        chosen.append(sorted(islice(turns, layer.n_tiles)))
    return chosen
