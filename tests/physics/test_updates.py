"""Updates by pulses: aihwkit's own values where nothing is drawn, and the formulas of ANALOG.md for what is."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiles import WAYS, floats, tile_with, updated

from rapa_dist.cells import Word
from rapa_dist.native import native
from rapa_dist.physics.devices import Devices
from rapa_dist.physics.parameters import DEVICES, PULSE_TYPES, ConstantStepDevice, Physics, UpdateParameters
from rapa_dist.physics.pulses import bernoulli, train_of
from rapa_dist.tile import Update

REFERENCE = json.loads((Path(__file__).parent / "aihwkit-1.2.0.json").read_text())
IDENTICAL = {"dw_min_dtod": 0.0, "up_down_dtod": 0.0, "w_max_dtod": 0.0, "w_min_dtod": 0.0}
K, C_OUT, REPEATS = 20, 30, 200_000


def with_devices_of(tile, case, way):
    """Give a tile the very devices that aihwkit drew."""
    hidden = {name: floats(values).T.copy() for name, values in case["hidden"].items()}
    tile.devices = Devices(
        parameters=tile.physics.device,
        b_max=hidden["max_bound"],
        b_min=hidden["min_bound"],
        step_up=hidden["dwmin_up"],
        step_down=hidden["dwmin_down"],
        shape_up=hidden.get("slope_up", hidden.get("gamma_up")),
        shape_down=hidden.get("slope_down", hidden.get("gamma_down")),
        decay=None,
        diffusion=None,
        reset=None,
    )
    if way != "NumPy":
        from rapa_dist.native.physics import _device

        tile._device = _device(tile.devices)
    return tile


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "case",
    [case for case in REFERENCE["updates"] if case["pulse_type"] in PULSE_TYPES],  # one type is an exact update
    ids=lambda case: f"{case['name']} {case['pulse_type']} {case['learning_rate']}",
)
def test_an_update_that_draws_nothing_has_the_weights_of_aihwkit(way, case):
    kind = case["name"].split(",")[0]
    physics = Physics(
        device=DEVICES[kind](dw_min_std=0.0, **case["fields"]), update=UpdateParameters(pulse_type=case["pulse_type"])
    )
    tile = with_devices_of(tile_with(way, physics, floats(case["weights_before"]).T.copy()), case, way)
    found = updated(tile, floats(case["x"]), floats(case["d"]), Update(case["learning_rate"], 0.0))
    np.testing.assert_allclose(found, floats(case["weights_after"]).T, rtol=0, atol=1e-6)


def changes(device, patch, error, rate, repeats=REPEATS):
    """Yield (1,000, k, c_out) changes by the update of one row, from 0, again and again."""
    tile = tile_with(
        "native" if native().library else "NumPy", Physics(device=device), np.zeros((K, C_OUT), np.float32)
    )
    rows = floats([patch]), floats([error])
    for first in range(0, repeats, 1000):
        found = np.zeros((1000, len(patch), len(error)), np.float32)
        for number, weights in enumerate(found):
            tile._shape, tile._cycle = (len(patch), len(error), 0), first + number
            tile._pulse((weights, weights), rows, rate)  # a whole cycle would take ten times as long
        yield found


@pytest.mark.parametrize("case", REFERENCE["moments"], ids=lambda case: f"{case['dw_min_std']} {case['learning_rate']}")
def test_stochastic_updates_have_the_moments_of_aihwkit(case):
    device = ConstantStepDevice(dw_min=case["dw_min"], dw_min_std=case["dw_min_std"], **IDENTICAL)
    repeats = 20_000
    found = np.concatenate([*changes(device, case["x"][0], case["d"][0], case["learning_rate"], repeats)])
    found = found.transpose(0, 2, 1).reshape(repeats, -1).astype(float)  # theirs are (out, in)
    expected, covariance = np.array(case["mean"]), np.array(case["covariance"])
    variance = np.diag(covariance)
    error = np.sqrt(variance * (1 / repeats + 1 / case["repeats"]))
    assert np.all(np.abs(found.mean(axis=0) - expected) <= 4 * error + 1e-9)
    ours = np.cov(found.T, bias=True)
    spread = np.sqrt(np.outer(variance, variance) + covariance**2) * np.sqrt(1 / repeats + 1 / case["repeats"])
    assert np.all(np.abs(ours - covariance) <= 5 * spread + 1e-12)


@pytest.mark.skipif(native().library is None, reason="200,000 draws need the library")
def test_pulse_counts_have_their_mean_variance_and_both_covariances():
    rng, rate, dw_min = np.random.default_rng(3), 0.5, 0.001
    x, d = rng.normal(size=K).astype(np.float32), (rng.normal(size=C_OUT) * 0.02).astype(np.float32)
    device = ConstantStepDevice(dw_min=dw_min, dw_min_std=0.0, w_max=1e6, w_min=-1e6, **IDENTICAL)
    train = train_of(UpdateParameters(), (np.abs(x).max(), np.abs(d).max()), rate, dw_min)
    length = train.length
    p, q = np.minimum(np.abs(x) * train.of_patch, 1.0), np.minimum(np.abs(d) * train.of_error, 1.0)
    down = -np.sign(np.outer(x, d)) / dw_min
    n = np.concatenate([np.rint(found * down).astype(np.int8) for found in changes(device, x, d, rate)])
    pq = np.outer(p, q)
    error = np.sqrt(length * pq * (1 - pq) / REPEATS)
    assert np.all(np.abs(n.mean(axis=0) - length * pq) < 5 * error + 1e-6)
    variance = length * pq * (1 - pq)
    fourth = variance * (1 + 3 * variance)  # a bound of a binomial's fourth moment around its mean
    spread = np.square(n - (length * pq).astype(np.float32)).mean(axis=0)
    assert np.all(np.abs(spread - variance) < 5 * np.sqrt(fourth / REPEATS) + 1e-6)

    def centred(line, column):
        return n[:, line, column] - length * pq[line, column]

    for pairs in range(200):
        j, i, other = rng.integers(K), rng.integers(C_OUT), rng.integers(C_OUT if pairs % 2 else K)
        if other == (i if pairs % 2 else j):
            continue
        if pairs % 2:  # the same line of the patch
            ours = np.mean(centred(j, i) * centred(j, other))
            theirs = length * p[j] * q[i] * q[other] * (1 - p[j])
            second = variance[j, i] * variance[j, other]
        else:  # the same column
            ours = np.mean(centred(j, i) * centred(other, i))
            theirs = length * q[i] * p[j] * p[other] * (1 - q[i])
            second = variance[j, i] * variance[other, i]
        assert abs(ours - theirs) <= 6 * np.sqrt((second + theirs**2 + np.sqrt(second)) / REPEATS)


@pytest.mark.parametrize("way", WAYS)
def test_counters_say_what_was_sent(way):
    device = ConstantStepDevice(dw_min_std=0.0, w_max=1e6, w_min=-1e6, **IDENTICAL)
    kernel = np.zeros((3, 2), np.float32)
    tile = tile_with(way, Physics(device=device), kernel)
    x, d = floats([[0.9, -0.35, 0.1], [0, 0, 0]]), floats([[0.02, -0.007], [1, 1]])
    change = updated(tile, x, d, Update(1.0, 0.0)) - kernel
    words = tile.cells.words
    assert words[Word.TRAINS] == 1  # the other row is all zero
    assert words[Word.SLOTS] == 18  # ⌈λ X D / g⌉ = ⌈0.9 · 0.02 / 0.001⌉
    assert words[Word.PULSES_SENT] == round(float(np.abs(change).sum() / 0.001))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", sorted(DEVICES))
def test_weights_stay_within_their_devices_bounds(way, kind):
    rng = np.random.default_rng(5)
    tile = tile_with(way, Physics(device=DEVICES[kind](dw_min=0.05)), np.zeros((6, 4), np.float32))
    for cycle in range(1, 30):
        rows = rng.normal(size=(8, 6)).astype(np.float32), rng.normal(size=(8, 4)).astype(np.float32)
        kernel = updated(tile, *rows, Update(1.0, 0.0), cycle=cycle, draw=cycle)
        assert np.all(kernel <= tile.devices.b_max)
        assert np.all(kernel >= tile.devices.b_min)
    assert np.any(kernel == tile.devices.b_max) or kind != "ConstantStep"  # some have come to their bound


@pytest.mark.parametrize("write_noise_std", [0.0, 20.0])
@pytest.mark.parametrize("kind", sorted(DEVICES))
def test_both_tiles_draw_the_same(kind, write_noise_std):
    if native().library is None:
        pytest.skip(str(native()))
    extra = {"write_noise_std": write_noise_std} if kind != "ConstantStep" else {"lifetime": 50.0, "diffusion": 0.001}
    rng = np.random.default_rng(5)
    kernel = (rng.normal(size=(9, 40)) * 0.1).astype(np.float32)
    rows = rng.normal(size=(30, 8)).astype(np.float32), (rng.normal(size=(30, 40)) * 0.05).astype(np.float32)
    found = []
    for way in ("NumPy", "native"):
        tile = tile_with(way, Physics(device=DEVICES[kind](**extra)), kernel, bias=True)
        tile.program(kernel, 4)
        for cycle in (1, 2):
            updated(tile, *rows, Update(0.3, 0.0), cycle=cycle, draw=cycle)
        stored = tile.stored
        found.append((tile.cells.kernel, stored if stored is not None else tile.cells.kernel))
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-6)


def test_trials_have_their_probability_and_are_independent():
    rng = np.random.default_rng(8)
    p = floats([0, 1e-4, 0.1, 0.5, 0.9, 1, 1.7])
    count = 40_000
    words = rng.integers(0, 2**32, (count * len(p), 24), np.uint32)
    masks = bernoulli(np.tile(p, count), words).reshape(count, len(p), 1)
    bits = masks >> np.arange(32, dtype=np.uint32) & np.uint32(1)
    mean, expected = bits.mean(axis=(0, 2)), np.minimum(p, 1)
    assert np.all(np.abs(mean - expected) <= 5 * np.sqrt(expected * (1 - expected) / (32 * count)) + 1e-7)
    both = np.mean(bits[:, :, 3].astype(float) * bits[:, :, 20], axis=0)
    assert np.all(np.abs(both - expected**2) < 5 / np.sqrt(count))


def test_a_train_is_as_long_as_a_row_needs_and_no_longer():
    update = UpdateParameters()
    short = train_of(update, (0.5, 0.01), 1.0, 0.001)
    assert short.length == 5
    assert np.isclose(short.of_patch * 0.5, 1)  # the largest element is sure of every slot
    assert np.isclose(short.of_error * 0.01, 1)
    long = train_of(update, (0.5, 0.2), 1.0, 0.001)  # 100 pulses would be needed
    assert long.length == 31
    assert np.isclose(long.of_patch * 0.5, 1)
    assert long.of_error * 0.2 > 3
    assert train_of(UpdateParameters(update_bl_management=False), (0.5, 0.01), 1.0, 0.001).length == 31
    assert train_of(update, (0.0, 0.01), 1.0, 0.001).length == 0
