"""What `RayFabric.recover` does step by step, with stand-ins for Ray's actors; test_nodes.py kills real ones."""

from collections.abc import Sequence

import pytest
from factories import floats_of, tile_array

from rapa_dist.errors import CapacityError, NodeLostError
from rapa_dist.fabric import ray as ray_module
from rapa_dist.fabric.chip import Chip
from rapa_dist.fabric.placement import Room
from rapa_dist.fabric.ray import RayFabric
from rapa_dist.machine import Machine

MACHINE = Machine((tile_array(n_tiles=4),))
FLOATS = floats_of(MACHINE)
HERE, LOST = "a", "c"


def room(node: str, free: int) -> Room:
    return Room(node, f"address-{node}", free, 4, here=node == HERE)


class Far:
    """A chip on another node."""

    def __init__(self, node: str) -> None:
        self.node, self.adopted, self.watched = node, [], {}

    def adopt(self, tiles):
        self.adopted += tiles
        return dict.fromkeys(tiles, "a site")

    def watch(self, actors):
        self.watched |= actors

    def settle(self):
        pass

    kill = settle

    def clear_away(self):
        return []


class Actors(dict):
    """What `TileActors` is to a fabric."""

    def start(self, tile, name, site, node, deadline):
        self[tile] = f"new-actor-{tile}"

    def wait_until_up(self, tiles, check, advance):
        if self.lose:
            raise NodeLostError("lost", node := self.lose.pop(), node)

    def end(self, tile):
        self.pop(tile, None)


class Unreal(RayFabric):
    """A fabric with a tile on each of "b" and "d" and two on "c", whose actors are their names."""

    def __init__(self, chip: Chip) -> None:
        self._node_of = dict(enumerate("bccd"))
        self._actors = Actors({tile: f"actor-{tile}" for tile in self._node_of})
        self._run, self._actors.lose = "run", []
        self._far, self._leaving = [Far(node) for node in "bcd"], []
        self._added_up = {}
        self._chip, self._here, self._registration, self.machine = chip, HERE, None, MACHINE
        self.lend_anew = lambda: None

    @property
    def lose(self) -> list[str]:
        """Nodes that are lost one after the other while actors are waited for."""
        return self._actors.lose

    def far(self, node: str) -> Far:
        return next(far for far in self._far if far.node == node)

    def use(self, machine, kernels, step=0):
        pass

    def _empty_round(self):
        pass


@pytest.fixture
def fabric(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "kill", lambda actor: None)
    chip = Chip(MACHINE, FLOATS, tiles=())
    yield Unreal(chip)
    chip.close()


def recover(fabric: RayFabric, node: str, rooms) -> None:
    fabric.recover(NodeLostError("lost", node, node), [], 0, rooms)


def test_tiles_that_moved_before_a_second_node_was_lost_are_watched(fabric):
    fabric.lose.append("d")
    with pytest.raises(NodeLostError):
        recover(fabric, LOST, lambda: [room("b", 1), room("d", 1)])
    assert sorted(fabric.far("b").adopted) != []
    assert not fabric.far("b").watched
    recover(fabric, "d", lambda: [room("b", 2)])
    assert set(fabric._node_of.values()) == {"b"}
    assert fabric.far("b").watched == fabric._actors
    assert fabric._actors.keys() == {0, 1, 2, 3}


def test_rooms_are_counted_when_lost_tiles_have_been_ended(fabric):
    def rooms() -> Sequence[Room]:
        assert LOST not in fabric._node_of.values()
        return [room("b", 2)]

    recover(fabric, LOST, rooms)
    assert fabric._node_of == dict(enumerate("bbbd"))


def test_ray_is_given_time_to_count_as_free_what_lost_tiles_had(fabric, monkeypatch):
    monkeypatch.setattr(ray_module, "_RETRY_S", 0.01)
    answers = iter([0, 1, 2])
    recover(fabric, LOST, lambda: [room("b", next(answers))])
    assert fabric._node_of == dict(enumerate("bbbd"))


def test_that_time_is_given_once(fabric, monkeypatch):
    monkeypatch.setattr(ray_module, "_FREE_PATIENCE_S", 0.05)
    asked = []

    def rooms() -> Sequence[Room]:
        asked.append(True)
        return [room("b", 1)]

    with pytest.raises(CapacityError):
        recover(fabric, LOST, rooms)
    assert len(asked) > 1
    asked.clear()
    with pytest.raises(CapacityError):
        recover(fabric, LOST, rooms)
    assert len(asked) == 1
