"""Placement: shares of layers, capacities, and what happens to the tiles of a node that is lost."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rapa_dist.fabric.placement import Room, place, runs
from rapa_dist.machine import Machine

PAPER = Machine.build(channels=(32, 32, 64), tiles=(16, 4, 1))


def rooms(*free: int) -> list[Room]:
    return [Room(f"n{i}", f"10.0.0.{i}", n, n) for i, n in enumerate(free)]


def of_layers(machine: Machine, placed: tuple[str, ...]) -> list[list[str]]:
    """Return the nodes of every layer's tiles, in the order of the tiles."""
    return [[node for node, (of, _) in zip(placed, machine.tiles, strict=True) if of == i] for i in range(3)]


def rows_of(machine: Machine, placed: tuple[str, ...]) -> Counter:
    rows = Counter()
    for node, (layer, _) in zip(placed, machine.tiles, strict=True):
        rows[node] += machine.arrays[layer].n_patches / machine.arrays[layer].n_tiles
    return rows


def test_one_node_gets_everything():
    assert set(place(PAPER, rooms(21))) == {"n0"}


def test_layers_are_shared_equally_and_each_nodes_tiles_follow_each_other():
    first, second, third = of_layers(PAPER, place(PAPER, rooms(21, 21, 21)))
    assert first == 6 * ["n0"] + 5 * ["n1"] + 5 * ["n2"]
    assert sorted(Counter(second).values()) == [1, 1, 2]
    assert second == sorted(second)
    loads = rows_of(PAPER, place(PAPER, rooms(21, 21, 21)))
    assert max(loads.values()) - min(loads.values()) <= 64  # a tile's rows
    assert len(third) == 1


def test_layers_with_fewer_tiles_than_nodes_go_to_different_nodes():
    machine = Machine.build(channels=(2, 2, 2), tiles=(1, 1, 1))
    assert place(machine, rooms(9, 9, 9)) == ("n0", "n1", "n2")


def test_too_little_room_is_no_placement():
    assert place(PAPER, rooms(16, 4)) is None
    assert place(PAPER, []) is None


def test_a_small_node_takes_what_it_can_and_small_shares_of_every_layer():
    placed = Counter(place(PAPER, rooms(21, 3, 3)))
    assert placed["n1"] in (2, 3)
    assert placed["n2"] in (2, 3)
    assert Counter(place(PAPER, rooms(10, 0, 11))) == {"n0": 10, "n2": 11}


def test_tiles_of_a_lost_node_are_shared_among_the_others_which_keep_theirs():
    before = place(PAPER, rooms(21, 21, 21))
    kept = {tile: node for tile, node in enumerate(before) if node != "n1"}
    counts = Counter(kept.values())
    after = place(PAPER, [Room(n, "", 21 - counts[n], 21) for n in ("n0", "n2")], kept)
    assert all(after[tile] == node for tile, node in kept.items())
    assert set(after) == {"n0", "n2"}
    first = Counter(of_layers(PAPER, after)[0])
    assert abs(first["n0"] - first["n2"]) <= 1


tiles = st.tuples(*(st.integers(1, 12) for _ in range(3)))


@given(tiles, st.lists(st.integers(0, 20), min_size=1, max_size=5))
def test_capacities_are_respected_and_rows_are_blocks(n_tiles, free):
    machine = Machine.build(channels=(2, 2, 2), tiles=n_tiles)
    placed = place(machine, rooms(*free))
    if sum(free) < sum(n_tiles):
        assert placed is None
        return
    assert all(count <= free[int(node[1:])] for node, count in Counter(placed).items())
    for layer in of_layers(machine, placed):
        assert layer == sorted(layer)


@given(tiles, st.integers(1, 5))
def test_with_room_enough_shares_of_a_layer_differ_by_one_tile_at_most(n_tiles, n_nodes):
    machine = Machine.build(channels=(2, 2, 2), tiles=n_tiles)
    for layer in of_layers(machine, place(machine, rooms(*n_nodes * [40]))):
        counts = [layer.count(f"n{i}") for i in range(n_nodes)]
        assert max(counts) - min(counts) <= 1


@given(tiles, st.integers(2, 4), st.data())
def test_whatever_node_is_lost_all_its_tiles_find_a_place(n_tiles, n_nodes, data):
    machine = Machine.build(channels=(2, 2, 2), tiles=n_tiles)
    before = place(machine, rooms(*n_nodes * [40]))
    lost = f"n{data.draw(st.integers(0, n_nodes - 1))}"
    kept = {tile: node for tile, node in enumerate(before) if node != lost}
    counts = Counter(kept.values())
    left = [Room(f"n{i}", "", 40 - counts[f"n{i}"], 40) for i in range(n_nodes) if f"n{i}" != lost]
    after = place(machine, left, kept)
    assert lost not in after
    assert all(after[tile] == node for tile, node in kept.items())


@pytest.mark.parametrize(
    ("positions", "found"),
    [([], []), ([3], [(3, 4)]), ([0, 1, 2], [(0, 3)]), ([0, 2, 3, 7], [(0, 1), (2, 4), (7, 8)])],
)
def test_runs_of_numbers_in_a_row(positions, found):
    assert runs(positions) == found
