"""Devices as they are drawn: their distributions, and that everybody draws the same."""

import numpy as np
import pytest

from rapa_dist.physics.devices import draw_devices
from rapa_dist.physics.draws import Draws, key_of
from rapa_dist.physics.parameters import (
    ConstantStepDevice,
    ExpStepDevice,
    LinearStepDevice,
    PowStepDevice,
    SoftBoundsDevice,
)

SHAPE = (500, 400)
COUNT = SHAPE[0] * SHAPE[1]


def drawn(device, seed=0, shape=SHAPE, *, bias=False):
    return draw_devices(device, shape, Draws(key_of(seed, 0, 0)), bias=bias)


def check(values, mean, deviation):
    values = values.astype(float)
    assert abs(values.mean() - mean) < 5 * deviation / COUNT**0.5
    assert abs(values.std() - deviation) < 5 * deviation / (2 * COUNT) ** 0.5


def test_bounds_and_steps_are_spread_as_their_parameters_say():
    device = ConstantStepDevice(dw_min=0.002, dw_min_dtod=0.1, up_down=0.2, up_down_dtod=0.05, w_max=0.7, w_min=-0.5,
                                w_max_dtod=0.1, w_min_dtod=0.05)  # fmt: skip
    found = drawn(device)
    check(found.b_max, 0.7, 0.07)
    check(found.b_min, -0.5, 0.025)
    deviation = 0.002 * np.hypot(0.1, 0.05)
    check(found.step_up, 0.002, deviation)
    check(found.step_down, 0.002 * (1 - 0.2), deviation)
    check(found.step_up - found.step_down, 0.002 * 0.2, 0.002 * 2 * 0.05)  # what they have in common is gone
    assert abs(np.corrcoef(found.b_max.ravel(), found.step_up.ravel())[0, 1]) < 5 / COUNT**0.5
    assert found.decay is found.diffusion is found.reset is found.shape_up is None


def test_wide_spreads_are_folded_so_that_bounds_lie_around_0():
    found = drawn(ConstantStepDevice(w_max_dtod=0.8, w_min_dtod=0.8, dw_min_dtod=0.8))
    assert found.b_min.max() <= 0 <= found.b_max.min()
    assert min(found.step_up.min(), found.step_down.min()) >= 0


def test_corrupt_devices_are_stuck_within_their_range():
    found = drawn(ConstantStepDevice(corrupt_devices_prob=0.2, corrupt_devices_range=0.1))
    stuck = found.b_max == found.b_min
    assert abs(stuck.mean() - 0.2) < 5 * (0.2 * 0.8 / COUNT) ** 0.5
    assert not found.step_up[stuck].any()
    assert not found.step_down[stuck].any()
    assert np.abs(found.b_max[stuck]).max() <= 0.1
    assert abs(found.b_max[stuck].mean()) < 0.005


def test_a_perfect_bias_has_steps_all_alike_and_hardly_bounds():
    found = drawn(ConstantStepDevice(perfect_bias=True), shape=(9, 7), bias=True)
    assert set(found.step_up[-1]) == set(found.step_down[-1]) == {np.float32(0.001)}
    assert found.b_max[-1].min() == pytest.approx(60)
    assert found.b_max[:-1].max() < 3


def test_slopes_and_powers_are_drawn_too():
    found = drawn(LinearStepDevice(gamma_up=0.3, gamma_down=0.6, dw_min_dtod=0.0, up_down_dtod=0.0))
    check(-found.shape_up * 0.6 / 0.001, 0.3, 0.05)
    check(found.shape_down * 0.6 / 0.001, 0.6, 0.05)
    soft = drawn(SoftBoundsDevice())
    np.testing.assert_allclose(soft.shape_up * soft.b_max, -soft.step_up, rtol=1e-5)  # nothing is left at the bound
    power = drawn(PowStepDevice(pow_gamma=1.5, pow_gamma_dtod=0.1))
    check(power.shape_up, 1.5, 0.15)


def test_lifetimes_diffusion_and_reset():
    found = drawn(ConstantStepDevice(lifetime=1000.0, lifetime_dtod=0.1, diffusion=0.01, diffusion_dtod=0.2, reset=0.1,
                                     reset_dtod=0.02))  # fmt: skip
    check(1 / (1 - found.decay.astype(float)), 1000, 100)
    check(found.diffusion, 0.01, 0.002)
    check(found.reset, 0.1, 0.02)
    weights = np.full(SHAPE, 0.5, np.float32)
    still = draw_devices(ConstantStepDevice(lifetime=100.0, w_max_dtod=0.0), SHAPE, Draws(1), bias=False)
    np.testing.assert_allclose(still.end_batch(weights, Draws(1), 3), 0.5 * (1 - 1 / 100), rtol=1e-5)
    moving = draw_devices(ConstantStepDevice(diffusion=0.01, w_max=9.0, w_max_dtod=0.0), SHAPE, Draws(1), bias=False)
    change = moving.end_batch(weights, Draws(1), 3) - weights
    check(change, 0, 0.01)
    assert np.any(change != moving.end_batch(weights, Draws(1), 4) - weights)


def test_tiles_differ_and_the_same_tile_is_always_the_same():
    device = ExpStepDevice()
    one, again, other = drawn(device), drawn(device), drawn(device, seed=1)
    np.testing.assert_array_equal(one.b_max, again.b_max)
    assert np.mean(one.b_max == other.b_max) < 0.01


# aihwkit 1.2.0: getWeightGranularity
@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (ConstantStepDevice(dw_min=0.002), 0.002),
        (PowStepDevice(dw_min=0.002, pow_gamma=2.0), 0.0005),
        (ExpStepDevice(dw_min=0.002, A_down=0.5, gamma_down=1.0, b=0.0, up_down=0.1), 0.002 * 0.9 * 0.5),
        (ExpStepDevice(dw_min=0.002, A_down=5.0, gamma_down=1.0, b=0.0), 0.002),
    ],
)
def test_the_step_that_trains_are_computed_with(device, expected):
    assert device.granularity == pytest.approx(expected)
