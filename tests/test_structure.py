"""What the code may import as it is loaded: no circles, neither of modules nor of rooms (packages)."""

import ast
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import rapa_dist

PACKAGE = Path(rapa_dist.__file__).parent


def loaded(nodes: Iterable[ast.stmt]) -> Iterator[str]:
    """Yield the names that statements import when a module is loaded, not those that functions import when called."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from loaded(node.orelse)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from loaded(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """By module the modules of this package that it imports."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts).removesuffix(".__init__")] = path
    found = {}
    for name, path in names.items():
        wanted = set(loaded(ast.parse(path.read_text()).body))
        ours = {each if each in names else each.rpartition(".")[0] for each in wanted}
        found[name] = (ours & names.keys()) - {name}
    return found


def in_order(graph: dict[str, set[str]]) -> list[str]:
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' → '.join(reversed(error.args[1]))}")


def test_no_modules_import_each_other_in_a_circle(imports):
    order = in_order(imports)
    assert order.index("rapa_dist.errors") < order.index("rapa_dist.coordinator.trainer")


def test_no_rooms_import_each_other_in_a_circle(imports):
    room = {name: name.split(".")[1] for name in imports if name.count(".") > 1}
    rooms = {each: set() for each in room.values()}
    for name, wanted in imports.items():
        if name in room:
            rooms[room[name]] |= {room[each] for each in wanted if each in room} - {room[name]}
    order = in_order(rooms)
    assert order.index("fabric") < order.index("nn") < order.index("coordinator")
