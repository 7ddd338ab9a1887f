"""`rapa-dist scale`: its arithmetic, tables and files, on fabrics whose times are known."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from factories import floats_of
from hypothesis import given
from hypothesis import strategies as st

from rapa_dist.cli import scale as command
from rapa_dist.config import resolve
from rapa_dist.errors import RunDirectoryError
from rapa_dist.fabric.doorbell import Cycle
from rapa_dist.fabric.serial import SerialFabric
from rapa_dist.hardware import CycleTimes, Pace
from rapa_dist.initial import initial_kernels
from rapa_dist.layout import machine_of
from rapa_dist.nn.schedule import Whole
from rapa_dist.scaling import measure as measuring
from rapa_dist.scaling import run as running
from rapa_dist.scaling import stopwatch
from rapa_dist.scaling.measure import Block, Contender, Effort, Factors, Step, dilation, find_factors, smallest
from rapa_dist.scaling.plot import digest, draw
from rapa_dist.scaling.report import describe_block, describe_factors, split
from rapa_dist.scaling.stopwatch import BACKWARD_UPDATE, FORWARD, UPDATE, CycleTime

CYCLES = CycleTimes(forward_ns=80, backward_ns=100, update_ns=60)
DIGITAL_NS = 7_000_000  # the coordinator's, of every step
IMAGES = 4


class Clock:
    """Time that passes only when somebody says so."""

    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns


class KnownFabric(SerialFabric):
    """Tiles that compute nothing, truly at once: every row takes `row_ns`, every cycle `overhead_ns` besides."""

    def __init__(self, machine, clock, *, row_ns=0, overhead_ns=0):
        super().__init__(machine, floats_of(machine, IMAGES), initial_kernels(machine, 0))
        self.pace = None
        self.network_ns = 0
        self.clock, self.row_takes_ns, self.overhead_ns = clock, row_ns, overhead_ns
        self.busy: dict[tuple[int, int], int] = Counter()

    def use(self, machine, kernels, step=0):
        self.machine = machine

    def row_ns(self, cycle):
        kinds = {"forward": Cycle.FORWARD, "backward": Cycle.INPUT_ERROR, "update": Cycle.UPDATE}
        return self.pace.row_ns(**{name: bool(cycle & flag) for name, flag in kinds.items()}) if self.pace else 0

    def busy_ns(self, array):
        return [self.busy[array, tile] for tile in range(self.machine.arrays[array].n_tiles)]

    def begin(self, layer, cycle, place, offsets, update=None, way=None, draw=0):
        rows = [last - first for first, last in pairwise(offsets.tolist())]
        assert len(rows) == layer.n_tiles
        for tile, own in enumerate(rows):
            self.busy[layer.index, tile] += own * self.row_takes_ns
        self.works_ns = self.overhead_ns + max(max(rows) * self.row_takes_ns, int(max(rows) * self.row_ns(cycle)))
        self._cycle += 1
        return self._cycle

    def finish(self, cycle):
        self.clock.ns += self.works_ns


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()

    class TakesTime(Whole):
        def train(self, *arguments):
            clock.ns += DIGITAL_NS
            return super().train(*arguments)

    monkeypatch.setattr(measuring, "Whole", TakesTime)
    for module in (stopwatch, measuring):
        monkeypatch.setattr(module, "now_ns", clock)
    return clock


def configuration(*tiles):
    rest = {"pooling": "max", "dataset": None, "limit_train": None, "limit_test": None, "epochs": 1, "seed": 0}
    rest |= {"lr_decay_every": 1, "warmup_epochs": 0, "weight_decay": 1e-4, "augment": False}
    return resolve(tiles=tiles, channels=(2, 2, 2), batch_size=IMAGES, classes=10, **rest)


def contenders(clock, *lists, stop=lambda: False, **times):
    configurations = [configuration(*tiles) for tiles in lists]
    fabric = KnownFabric(machine_of(configuration(*map(max, zip(*lists, strict=True)))), clock, **times)
    return [Contender(config, fabric, stop) for config in configurations]


# --- a step's cycles


def test_a_step_is_taken_apart_into_its_cycles(clock):
    (contender,) = contenders(clock, (4, 2, 1), row_ns=1000, overhead_ns=50_000)
    contender.take_over(Pace(CYCLES, 100))
    step = contender.step()
    assert [(time.layer, time.kind) for time in step.cycles] == [
        (0, FORWARD),
        (1, FORWARD),
        (2, FORWARD),
        (2, BACKWARD_UPDATE),
        (1, BACKWARD_UPDATE),
        (0, UPDATE),
    ]
    rows = {0: IMAGES * 1024 // 4, 1: IMAGES * 256 // 2, 2: IMAGES * 64}
    ns = {FORWARD: 8_000, BACKWARD_UPDATE: 16_000, UPDATE: 6_000}
    for cycle in step.cycles:
        assert cycle.hold_ns == rows[cycle.layer] * ns[cycle.kind]
        assert cycle.wall_ns == cycle.hold_ns + 50_000
        assert cycle.longest_busy_ns == rows[cycle.layer] * 1000
        assert cycle.total_busy_ns == rows[cycle.layer] * 1000 * (4, 2, 1)[cycle.layer]


def test_the_slowest_tile_sets_the_ideal(clock):
    """4,096 rows on three tiles: one of them has 1,366."""
    (contender,) = contenders(clock, (3, 1, 1))
    contender.take_over(Pace(CYCLES, 100))
    assert contender.step().cycles[0].hold_ns == 1366 * 8_000


def test_without_a_pace_nothing_is_held(clock):
    (contender,) = contenders(clock, (4, 2, 1), row_ns=1000)
    contender.take_over(None)
    assert {cycle.hold_ns for cycle in contender.step().cycles} == {0}


def a_cycle(**given) -> CycleTime:
    values = {"layer": 0, "kind": FORWARD, "wall_ns": 100, "longest_busy_ns": 0, "total_busy_ns": 0, "hold_ns": 0}
    return CycleTime(**(values | given))


@pytest.mark.parametrize(
    ("paced", "cycle", "expected"),
    [
        (False, a_cycle(longest_busy_ns=60, total_busy_ns=100), (900, 40, 60)),  # one tile does most of it
        (False, a_cycle(longest_busy_ns=30, total_busy_ns=160), (900, 20, 80)),  # two cores share it
        (False, a_cycle(longest_busy_ns=120, total_busy_ns=120), (900, 0, 100)),  # two clocks disagree a little
        (True, a_cycle(longest_busy_ns=99, total_busy_ns=198, hold_ns=70), (900, 30, 70)),
    ],
)
def test_who_has_the_time_of_a_step(paced, cycle, expected):
    assert split(Step(1000, (cycle,)), paced, cores=2) == expected


times = st.integers(0, 10**12)


@given(
    st.lists(st.builds(a_cycle, wall_ns=times, longest_busy_ns=times, total_busy_ns=times, hold_ns=times), max_size=6),
    times,
    st.booleans(),
    st.integers(1, 64),
)
def test_the_shares_add_up(cycles, outside_ns, paced, cores):
    step = Step(sum(cycle.wall_ns for cycle in cycles) + outside_ns, tuple(cycles))
    parts = split(step, paced, cores)
    assert sum(parts) == step.wall_ns
    assert min(parts) >= 0
    assert parts[0] == outside_ns


# --- the report


def measured(clock, pace, *lists, turns=3, **times):
    block = Block(pace)
    racers = contenders(clock, *lists, **times)
    measuring.measure(block, racers, Effort(turns=turns, steps=4, budget_s=60.0))
    return describe_block(block, [racer.machine for racer in racers], 2), block


def test_compute_against_the_untiled_machine(clock):
    """Layer 1 forward: 4,096 rows of 1 µs and 100 µs besides, against 256 rows and as much besides."""
    report, _ = measured(clock, None, (1, 1, 1), (16, 4, 1), row_ns=1000, overhead_ns=100_000)
    assert (report["mode"], report["time_dilation"], report["turns"]) == ("compute", None, 3)
    untiled, tiled = report["configurations"]
    update = tiled["layers"][0]["cycles"]["update"]
    assert update["wall_ms"] == {"q25": 0.356, "median": 0.356, "q75": 0.356, "n": 12}
    assert update["untiled_wall_ms"]["median"] == 4.196
    assert update["speed_up"] == pytest.approx(4.196 / 0.356, abs=1e-4)
    assert update["efficiency"] == pytest.approx(4.196 / 0.356 / 16, abs=1e-4)
    assert update["ideal_ms"] == pytest.approx(4.196 / 16, abs=1e-4)
    assert update["busy_ms"]["longest"]["median"] == 0.256
    assert update["busy_ms"]["total"]["median"] == 4.096
    assert update["data_plane_ms"]["median"] == 0  # two cores would take 2.048 ms; these fabrics' are more
    assert untiled["layers"][0]["cycles"]["update"]["data_plane_ms"]["median"] == 0.1
    assert {cycle["speed_up"] for layer in untiled["layers"] for cycle in layer["cycles"].values()} == {1.0}
    both = tiled["layers"][1]["cycles"]["all"]
    assert both["wall_ms"]["median"] == 2 * (0.256 + 0.1)
    assert both["efficiency"] == pytest.approx(1.124 / 0.356 / 4, abs=1e-4)


def test_paced_against_the_untiled_machine(clock):
    report, _ = measured(clock, Pace(CYCLES, 1000), (1, 1, 1), (16, 4, 1), overhead_ns=1_000_000)
    tiled = report["configurations"][1]
    update = tiled["layers"][0]["cycles"]["update"]
    assert update["ideal_ms"] == 256 * 0.06
    assert update["wall_ms"]["median"] == 256 * 0.06 + 1
    assert update["data_plane_ms"]["median"] == 1
    assert update["speed_up"] == pytest.approx((4096 * 0.06 + 1) / (256 * 0.06 + 1), abs=1e-4)


@pytest.mark.parametrize("pace", [None, Pace(CYCLES, 1000)])
def test_a_steps_time_and_its_parts(clock, pace):
    report, block = measured(clock, pace, (1, 1, 1), (4, 2, 1), row_ns=1000, overhead_ns=100_000)
    for configuration in report["configurations"]:
        shares, parts, step = configuration["shares_percent"], configuration["parts_ms"], configuration["step"]
        assert sum(shares.values()) == pytest.approx(100)
        assert sum(part["median"] for part in parts.values()) == pytest.approx(step["wall_ms"]["median"], abs=1e-3)
    steps = [turn[4, 2, 1][0].wall_ns / 1e6 for turn in block.turns]
    untiled = [turn[1, 1, 1][0].wall_ns / 1e6 for turn in block.turns]
    assert step["speed_up"] == pytest.approx(untiled[0] / steps[0], abs=1e-3)
    cycles = [
        (layer["n_tiles"], layer["cycles"]["all"]["untiled_wall_ms"]["median"]) for layer in configuration["layers"]
    ]
    assert step["efficiency"] == pytest.approx(sum(ms / n for n, ms in cycles) / steps[0], abs=1e-3)


def test_turns_that_disagree_show_in_the_range():
    def turn(tiles, ms):
        cycles = [
            a_cycle(layer=layer, kind=kind, wall_ns=ms * 1_000_000)
            for layer in range(3)
            for kind in (FORWARD, BACKWARD_UPDATE if layer else UPDATE)
        ]
        return {tiles: [Step(6 * ms * 1_000_000, tuple(cycles))]}

    turns = [turn((1, 1, 1), 8) | turn((4, 1, 1), 2), turn((1, 1, 1), 10) | turn((4, 1, 1), 5)]
    machines = [machine_of(configuration(1, 1, 1)), machine_of(configuration(4, 1, 1))]
    report = describe_block(Block(None, turns), machines, 2)
    both = report["configurations"][1]["layers"][0]["cycles"]["all"]
    assert both["speed_up"] == pytest.approx(9 / 3.5, abs=1e-4)
    assert both["speed_up_range"] == [2, 4]


def test_a_turn_that_was_cut_short_counts_for_those_who_had_it():
    whole = [Step(10, (a_cycle(wall_ns=1),))]
    machines = [machine_of(configuration(1, 1, 1)), machine_of(configuration(4, 1, 1))]
    assert describe_block(Block(None, [{(4, 1, 1): whole}]), machines, 2) is None
    assert describe_block(Block(None), machines, 2) is None


# --- turns


def test_configurations_take_turns(clock, monkeypatch):
    racers = contenders(clock, (1, 1, 1), (2, 1, 1), (4, 2, 1))
    order = []
    for racer in racers:
        monkeypatch.setattr(racer, "take_over", lambda pace, tiles=racer.tiles: order.append(tiles))
    measuring.measure(Block(None), racers, Effort(turns=3, steps=1, budget_s=1.0))
    forth = [racer.tiles for racer in racers]
    assert order == [*forth, *reversed(forth), *forth]


@pytest.mark.parametrize(("budget_s", "steps"), [(0.0, 1), (0.03, 5), (60.0, 8)])
def test_a_turn_ends_with_its_time_but_not_without_a_step(clock, budget_s, steps):
    block = Block(None)
    measuring.measure(block, contenders(clock, (1, 1, 1)), Effort(turns=2, steps=8, budget_s=budget_s))
    assert [len(turn[1, 1, 1]) for turn in block.turns] == [steps, steps]  # of 7 ms each


def test_stopping_keeps_the_steps_that_are_whole(clock):
    asked = []
    block = Block(None)
    racers = contenders(
        clock, (1, 1, 1), (2, 1, 1), row_ns=1000, stop=lambda: len(asked.append(1) or asked) > 6 * (3 + 4 + 3 + 2) + 3
    )
    with pytest.raises(KeyboardInterrupt):
        measuring.measure(block, racers, Effort(turns=2, steps=4, budget_s=60.0))
    assert {tiles: len(steps) for tiles, steps in block.turns[0].items()} == {(1, 1, 1): 4, (2, 1, 1): 2}
    assert len(block.turns) == 1
    assert describe_block(block, [racer.machine for racer in racers], 2)["turns"] == 1


# --- the real-time factor


@given(st.integers(0, 100), st.integers(0, 100))
def test_the_search_finds_the_first_that_is_enough(first, last):
    looked_at = []

    def efficiency(index):
        assert 0 <= index <= last
        looked_at.append(index)
        return 0.95 if index >= first else 0.5

    assert smallest(efficiency, last) == (first if first <= last else None)
    assert max(looked_at) <= first + 5  # what is large takes long


@pytest.mark.parametrize("overhead_us", [1, 30, 2_000, 100_000])
@pytest.mark.parametrize("tiles", [(1, 1, 1), (16, 4, 1)])
def test_the_factor_is_where_the_overhead_is_a_tenth(clock, tiles, overhead_us):
    (contender,) = contenders(clock, tiles, overhead_ns=overhead_us * 1000)
    found = find_factors(contender, CYCLES)
    layer_ns = 4096 / tiles[0] * (80 + 60) / 2  # of a cycle, in the mean
    all_ns = (2 * layer_ns + 1024 / tiles[1] * (80 + 160) + 256 * (80 + 160)) / 6
    grid = [dilation(index) for index in range(101)]
    for factor, ns in ((found.first_layer, layer_ns), (found.machine, all_ns)):
        expected = 9 * overhead_us * 1000 / ns
        assert factor == min((f for f in grid if f >= expected), default=None)
    assert all(probe.machine < 0.9 for probe in found.probes if probe.dilation < (found.machine or 0))


def test_a_machine_that_is_fast_enough_has_the_factor_one(clock):
    (contender,) = contenders(clock, (4, 2, 1))
    found = find_factors(contender, CYCLES)
    assert (found.first_layer, found.machine) == (1, 1)


def test_a_factor_that_is_out_of_reach_is_said_to_be(clock):
    (contender,) = contenders(clock, (16, 4, 1), overhead_ns=10**10)
    described = describe_factors(find_factors(contender, CYCLES))
    assert described["first_layer"]["time_dilation"] is None
    assert "not reached at F = " in described["first_layer"]["reason"]
    largest = max(probe["time_dilation"] for probe in described["probes"])
    assert f"{largest:,g}" in described["first_layer"]["reason"]
    ideal_s = contender.ideal_ns(Pace(CYCLES, largest)) * 1e-9
    assert largest == 100_000 or ideal_s < 30 < 1.13 * ideal_s


# --- files


@pytest.fixture
def report(clock) -> dict:
    paces = (None, Pace(CYCLES, 2000.0))
    lists = ((1, 1, 1), (2, 1, 1), (4, 2, 1))
    blocks = [measured(clock, pace, *lists, row_ns=1000, overhead_ns=100_000)[0] for pace in paces]
    factor = describe_factors(Factors((4, 2, 1), 100.0, None, 1000.0, ()))
    return {"blocks": blocks, "real_time_factors": [factor]}


def test_the_plot_is_a_function_of_the_numbers(report):
    pytest.importorskip("matplotlib")
    image = draw(report)
    assert image == draw(json.loads(json.dumps(report)))
    assert digest(report).encode() in image
    assert ElementTree.fromstring(image).tag.endswith("svg")
    report["blocks"][0]["configurations"][1]["layers"][0]["cycles"]["all"]["speed_up"] *= 1.5
    assert draw(report) != image


def test_without_matplotlib_there_is_a_warning_and_no_plot(report, tmp_path, monkeypatch, capsys):
    (tmp_path / "scaling.json").write_text(json.dumps(report))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    running.write_plot(tmp_path)
    assert not (tmp_path / "scaling.svg").exists()
    assert "matplotlib is missing" in capsys.readouterr().err


def test_results_are_not_replaced(tmp_path):
    (tmp_path / "scaling.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match=r"scaling\.json in .* already.*--out"):
        running.check_new(tmp_path)
    running.check_new(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


def test_the_tables_have_every_configuration_whole(report, capsys):
    start = {"actors": 7, "actors_up_s": 3.21, "own_memory_per_actor_mb": {"median": 48.0, "max": 49.3}}
    command._show(report | {"start": start, "cores": 2, "batch_size": IMAGES, "out": Path("there")}, details=True)
    out = capsys.readouterr().out
    assert "…" not in out
    lines = [line.split() for line in out.splitlines()]
    for block, title in zip(report["blocks"], ("compute", "paced, F = 2,000"), strict=True):
        assert title in out
        for configuration in block["configurations"]:
            name = ",".join(map(str, configuration["tiles"]))
            assert sum(line[:1] == [name] for line in lines) == 2 * (1 + 6)
            speed_up = configuration["layers"][0]["cycles"]["all"]["speed_up"]
            assert any(line[:1] == [name] and f"{speed_up:.2f}" in line for line in lines)
    assert any(line[:1] == ["4,2,1"] and line[-3:] == ["100", "not", "reached"] for line in lines)
    assert "up after 3.2 s" in out
    assert "49.3 MB" in out


def test_the_memory_of_a_process_and_its_children():
    code = "x = bytearray(b'x') * 50_000_000; print('ready', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        own, proportional = running.memory_of(child.pid)
        assert 50e6 < own <= proportional < 100e6
        assert child.pid in running.descendants(os.getpid())
        assert os.getpid() in running.descendants(os.getppid())
        child.communicate(b"\n")
    assert child.pid not in running.descendants(os.getpid())
    assert running.memory_of(child.pid) == (0, 0)
