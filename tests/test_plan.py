import json
import math
from fractions import Fraction

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from rapa_dist import planning
from rapa_dist.cli import main
from rapa_dist.errors import UsageError
from rapa_dist.footprint import TILE_BYTES
from rapa_dist.hardware import CycleTimes
from rapa_dist.layout import arrays_of
from rapa_dist.machine import Machine
from rapa_dist.memory import Memory
from rapa_dist.planning import (
    Crossbar,
    balanced_tiles,
    describe,
    lay_out,
    parse_layers,
    tiles_for_acceleration,
)

PAPER, ALEXNET = arrays_of("rapa"), arrays_of("alexnet")
PAPER_PATCHES = (1024, 256, 64)
ALEXNET_PATCHES = (3025, 729, 169, 169, 169)


def plan(*arguments):
    """Return what `rapa-dist plan --json` prints."""
    done = CliRunner().invoke(main, ["plan", "--json", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def refused(*arguments):
    """Return the message with which `rapa-dist plan` refuses its arguments, on stderr and in its JSON."""
    done = CliRunner().invoke(main, ["plan", "--json", *map(str, arguments)])
    assert done.exit_code == 2, done.output
    message = json.loads(done.stdout)["error"]["message"]
    assert message in done.stderr
    return message


# --- tiles


@pytest.mark.parametrize(
    ("patches", "last_tiles", "tiles"),
    [
        (PAPER_PATCHES, 1, (16, 4, 1)),
        (PAPER_PATCHES, 8, (128, 32, 8)),
        (PAPER_PATCHES, 64, (1024, 256, 64)),
        (ALEXNET_PATCHES, 1, (17, 4, 1, 1, 1)),  # the shares are 17.9, 4.3, 1, 1, 1
        ((100,), 7, (7,)),
        ((190, 100), 1, (2, 1)),  # the share is 1.9
        ((140, 100), 1, (1, 1)),  # 1.4
        ((150, 100), 1, (2, 1)),  # 1.5
        ((10, 100), 1, (1, 1)),  # 0.1
        ((590, 149, 100), 1, (4, 1, 1)),  # 5.9, but layer 2 has 149 rows, and 590 / 4 are fewer
    ],
)
def test_tiles_are_balanced_as_in_the_paper(patches, last_tiles, tiles):
    assert balanced_tiles(patches, last_tiles) == tiles


@given(st.data(), st.lists(st.integers(1, 5000), min_size=1, max_size=6))
def test_balance_holds_whatever_the_shape(data, patches):
    last_tiles = data.draw(st.integers(1, patches[-1]))
    tiles = balanced_tiles(patches, last_tiles)
    assert tiles[-1] == last_tiles
    assert all(1 <= n_tiles <= n_patches for n_tiles, n_patches in zip(tiles, patches, strict=True))
    rows = [Fraction(n_patches, n_tiles) for n_patches, n_tiles in zip(patches, tiles, strict=True)]
    pace = max(rows)
    assert pace < Fraction(3, 2) * Fraction(patches[-1], last_tiles) + Fraction(1, 10**9)
    for n_patches, n_tiles in list(zip(patches, tiles, strict=True))[:-1]:
        assert n_tiles == 1 or Fraction(n_patches, n_tiles - 1) > pace  # with one tile less it would be the slowest


@pytest.mark.parametrize(
    ("patches", "acceleration", "tiles"),
    [
        (PAPER_PATCHES, 1, (1, 1, 1)),
        (PAPER_PATCHES, 16, (16, 4, 1)),
        (PAPER_PATCHES, 128, (128, 32, 8)),
        (PAPER_PATCHES, 1024, (1024, 256, 64)),
        (PAPER_PATCHES, 10, (10, 3, 1)),
        (PAPER_PATCHES, 16.1, (17, 5, 2)),
        (ALEXNET_PATCHES, 16.5, (17, 4, 1, 1, 1)),
        ((10, 30), 30, (10, 30)),
        ((100,), 80, (84,)),  # 80 tiles have 12.5 rows of ten images in the mean, so some have 13: 76.9 times
    ],
)
def test_a_wished_acceleration_gets_the_fewest_tiles_that_reach_it(patches, acceleration, tiles):
    assert tiles_for_acceleration(patches, acceleration, 10) == tiles


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=6), st.floats(0, 1), st.integers(1, 20))
def test_an_acceleration_is_reached_and_no_tile_could_be_spared(patches, place, images):
    wish = 1 + place * (max(patches) - 1)
    tiles = tiles_for_acceleration(patches, wish, images)
    enough = images * Fraction(max(patches)) / Fraction(str(wish))
    for n_patches, n_tiles in zip(patches, tiles, strict=True):
        assert 1 <= n_tiles <= n_patches
        assert math.ceil(Fraction(images * n_patches, n_tiles)) <= enough
        assert n_tiles == 1 or math.ceil(Fraction(images * n_patches, n_tiles - 1)) > enough


# --- what a plan says


@pytest.mark.parametrize(
    ("arguments", "tiles", "weights", "paper"),
    [
        (("--acceleration", 1), [1, 1, 1], 79_328, 1),
        ((), [16, 4, 1], 192_704, 16),
        (("--last-tiles", 8), [128, 32, 8], 1_541_632, 128),
        (("--acceleration", 128), [128, 32, 8], 1_541_632, 128),
    ],
)
def test_the_papers_network(arguments, tiles, weights, paper):
    got = plan(*arguments)
    assert got["tiles_per_layer"] == tiles
    assert got["tiles"] == sum(tiles)
    assert got["weights"] == sum(layer["weights"] for layer in got["layers"]) == weights
    assert got["weights_untiled"] == 79_328
    assert got["acceleration"]["paper"] == got["acceleration"]["inference_pipelined"] == paper
    assert [layer["rows_per_tile_and_image"] for layer in got["layers"]] == [
        patches / n_tiles for patches, n_tiles in zip(PAPER_PATCHES, tiles, strict=True)
    ]


def test_alexnet():
    got = plan("--network", "alexnet")
    assert [layer["patches_per_image"] for layer in got["layers"]] == list(ALEXNET_PATCHES)
    assert got["tiles_per_layer"] == [17, 4, 1, 1, 1]
    assert got["weights_untiled"] == 3_747_200  # torch's count of these five convolutions
    assert [layer["kernel_shape"] for layer in got["layers"]][:2] == [[364, 96], [2401, 256]]
    busy = [layer["busy_percent_inference"] for layer in got["layers"]]
    assert busy[1] == 100
    assert min(busy) > 90


def test_the_weights_of_alexnet_are_those_of_torch():
    torch = pytest.importorskip("torch")
    count = 0
    for array in ALEXNET:
        (geometry,) = array.passages
        convolution = torch.nn.Conv2d(array.k // geometry.places, array.c_out, geometry.kernel)
        count += sum(parameter.numel() for parameter in convolution.parameters())
    assert count == Machine(ALEXNET).n_weights


def test_layers_given_one_by_one_are_the_network_they_spell():
    geometries = [array.passages[0] for array in PAPER]
    spelt = [
        f"{geometry.out[0]},{array.k // geometry.places},{array.c_out},{geometry.kernel[0]}"
        for array, geometry in zip(PAPER, geometries, strict=True)
    ]
    assert parse_layers(spelt) == PAPER
    arguments = [part for layer in spelt for part in ("--layer", layer)]
    assert plan(*arguments, "--images", 10)["layers"] == plan("--images", 10)["layers"]


def test_device_time_follows_cycle_times():
    """16,4,1: every layer has 64 rows per image; two, three and three cycles; a digital pass in each direction."""
    got = plan(
        "--forward-ns", 100, "--backward-ns", 20, "--update-ns", 3, "--digital-ns", 1000, "--images", 7
    )["device_time"]  # fmt: skip
    first, other = 64 * 103 + 2000, 64 * 123 + 2000
    training, inference = got["training"], got["inference"]
    assert training["layer_by_layer_us_per_image"] == pytest.approx((first + 2 * other) / 1e3)
    assert training["pipelined_us_per_image"] == pytest.approx(other / 1e3)
    assert training["layer_by_layer_s_per_epoch"] == pytest.approx(7 * (first + 2 * other) / 1e9)
    assert inference["layer_by_layer_us_per_image"] == pytest.approx(3 * (6400 + 1000) / 1e3)
    assert inference["pipelined_s_per_epoch"] == pytest.approx(7 * (6400 + 1000) / 1e9)


@pytest.mark.parametrize(
    ("crossbar", "grids", "crossbars"),
    [
        ("512x512", [[1, 1], [2, 1], [2, 1]], 16 + 4 * 2 + 2),
        ("801x64", [[1, 1], [1, 1], [1, 1]], 21),
        ("800×63", [[1, 1], [2, 1], [2, 2]], 16 + 4 * 2 + 4),
        ("76x32", [[1, 1], [11, 1], [11, 2]], 16 + 4 * 11 + 22),
        ("1x1", [[76, 32], [801, 32], [801, 64]], 192_704),
    ],
)
def test_kernels_are_cut_to_crossbars(crossbar, grids, crossbars):
    got = plan("--crossbar", crossbar)
    assert [layer["crossbar_grid_per_tile"] for layer in got["layers"]] == grids
    assert got["crossbars"] == sum(layer["crossbars"] for layer in got["layers"]) == crossbars
    cells = got["crossbar"]["rows"] * got["crossbar"]["columns"]
    for layer in got["layers"]:
        used = layer["weights"] / (layer["crossbars"] * cells)
        assert layer["crossbar_utilisation_percent"] == pytest.approx(100 * used)


def test_the_emulation_has_a_process_for_every_tile_and_memory_for_each():
    few, many = plan("--fabric", "ray")["emulation"], plan("--fabric", "ray", "--last-tiles", 8)["emulation"]
    assert (few["actors"], many["actors"]) == (21, 168)
    assert many["processes"] - few["processes"] == 168 - 21
    own = many["memory_bytes"] - many["shared_memory_bytes"] - few["memory_bytes"] + few["shared_memory_bytes"]
    assert own == (168 - 21) * TILE_BYTES
    alone = plan("--fabric", "serial")["emulation"]
    assert (alone["processes"], alone["actors"], alone["tiles_that_fit"]) == (1, 0, None)


def test_a_dry_run_of_train_agrees():
    dry = CliRunner().invoke(main, ["train", "--dataset", "builtin", "--dry-run", "--json"])
    assert dry.exit_code == 0, dry.output
    theirs, ours = json.loads(dry.stdout), plan()
    assert theirs["memory_bytes"] == ours["emulation"]["memory_bytes"]
    assert theirs["weights"] == ours["weights"]
    assert theirs["device_time_training_us_per_image"] == pytest.approx(
        {
            "layer_by_layer": ours["device_time"]["training"]["layer_by_layer_us_per_image"],
            "pipelined": ours["device_time"]["training"]["pipelined_us_per_image"],
        }
    )


def test_more_tiles_than_there_is_memory_for_is_said_with_how_many_fit(monkeypatch):
    fitting = plan()["emulation"]["memory_bytes"]
    room = Memory(total=fitting, available=fitting - TILE_BYTES // 2, limited=False)
    monkeypatch.setattr(planning, "memory", lambda: room)
    emulation = plan()["emulation"]
    assert not emulation["fits"]
    assert emulation["tiles_that_fit"] == 20
    shown = CliRunner().invoke(main, ["plan"])
    assert shown.exit_code == 0
    assert "too little: about 20 tiles would fit" in shown.stdout
    nothing = Memory(total=fitting, available=1_000_000, limited=True)
    monkeypatch.setattr(planning, "memory", lambda: nothing)
    assert "smaller --batch-size" in CliRunner().invoke(main, ["plan"]).stdout


def test_the_text_shows_the_figures_in_80_columns():
    shown = CliRunner().invoke(main, ["plan", "--network", "alexnet"])
    assert shown.exit_code == 0
    for figure in ("17,4,1,1,1", "6,150,272", "3,457×384", "512 × 512", "16.59 times faster"):
        assert figure in shown.stdout
    assert "…" not in shown.stdout


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--network", "alexnt"), ("--network", "rapa, lenet, alexnet", "“alexnt”", "Did you mean alexnet?")),
        (("--network", "rapa", "--layer", "8,3,4,5"), ("--network and --layer exclude each other",)),
        (("--last-tiles", 8, "--acceleration", 16), ("--last-tiles and --acceleration exclude each other",)),
        (("--last-tiles", 0), ("--last-tiles", "1 to 64", "it is 0.")),
        (("--last-tiles", -4), ("--last-tiles", "it is -4.")),
        (("--last-tiles", 65), ("--last-tiles", "1 to 64", "it is 65.")),
        (("--acceleration", 0), ("--acceleration", "1 to 1,024", "it is 0.")),
        (("--acceleration", 0.5), ("--acceleration", "it is 0.5.")),
        (("--acceleration", 1025), ("--acceleration", "1 to 1,024", "it is 1025.")),
        (("--acceleration", "nan"), ("--acceleration", "it is nan.")),
        (("--acceleration", "inf"), ("--acceleration", "it is inf.")),
        (("--crossbar", "512"), ("--crossbar", "512x512", "“512”")),
        (("--crossbar", "0x512"), ("--crossbar", "above 0", "“0x512”")),
        (("--crossbar", "512x-1"), ("--crossbar", "“512x-1”")),
        (("--crossbar", "²x2"), ("--crossbar", "“²x2”")),
        (("--crossbar", "9" * 5000 + "x1"), ("--crossbar",)),
        (("--forward-ns", 0), ("--forward-ns", "above 0", "it is 0.0.")),
        (("--backward-ns", -80), ("--backward-ns", "it is -80.0.")),
        (("--update-ns", "nan"), ("--update-ns", "it is nan.")),
        (("--digital-ns", "inf"), ("--digital-ns", "or 0 to neglect it", "it is inf.")),
        (("--images", 0), ("--images", "at least 1", "it is 0.")),
        (("--batch-size", -1), ("--batch-size", "at least 1", "it is -1.")),
        (("--fabric", "rey"), ("--fabric", "Did you mean ray?")),
        (("--layer", "8,3,4"), ("--layer", "OUT_SIZE,CHANNELS_IN,CHANNELS_OUT,KERNEL", "“8,3,4”")),
        (("--layer", "8,3,4,x"), ("--layer", "four numbers", "“8,3,4,x”")),
        (("--layer", ""), ("--layer", "four numbers")),
        (("--layer", "0,3,4,5"), ("--layer 0,3,4,5", "OUT_SIZE", "from 1 to 10,000", "it is 0.")),
        (("--layer", "8,3,4,0"), ("KERNEL", "from 1 to 1,000", "it is 0.")),
        (("--layer", "8,3,200000,5"), ("CHANNELS_OUT", "it is 200,000.")),
        (("--layer", "10000,3,4,5", "--acceleration", 1e8), ("100,000,000 tiles", "up to 1,000,000", "smaller")),
    ],
)
def test_what_cannot_work_is_refused_with_the_value_and_a_way_out(arguments, parts):
    message = refused(*arguments)
    for part in parts:
        assert part in message


def test_a_machine_knows_its_plan_without_the_command_line():
    got = describe(
        lay_out(PAPER, last_tiles=8, images=10),
        crossbar=Crossbar(),
        cycles=CycleTimes(),
        images=50_000,
        batch_size=10,
        fabric="ray",
    )
    assert got["acceleration"]["training_pipelined"] == pytest.approx(128 * 2 / 3)
    assert math.isfinite(got["device_time"]["training"]["pipelined_s_per_epoch"])
    with pytest.raises(UsageError, match="--last-tiles"):
        lay_out(PAPER, last_tiles=65, images=10)
