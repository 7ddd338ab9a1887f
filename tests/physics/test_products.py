"""Products on arrays that are not ideal: aihwkit's own values, and the formulas of ANALOG.md for what is drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiles import WAYS, backward, backward_of, floats, forward, quiet, tile_with

from rapa_dist.cells import Word
from rapa_dist.physics.parameters import PERFECT, IOParameters, Physics

REFERENCE = json.loads((Path(__file__).parent / "aihwkit-1.2.0.json").read_text())
PRODUCTS = {case["name"]: case for case in REFERENCE["products"]}
N, M, REPEATS = 20, 30, 200_000


def relative(found, expected):
    return np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_forward_cycle_has_the_values_of_aihwkit(way, name):
    case = PRODUCTS[name]
    tile = tile_with(way, Physics(forward=quiet(**case["io"])), floats(case["weights"]).T.copy())
    assert relative(forward(tile, floats(case["x"])), floats(case["forward"])) < 1e-6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name, case in PRODUCTS.items() if "backward" in case])
def test_a_backward_cycle_has_the_values_of_aihwkit(way, name):
    case = PRODUCTS[name]
    kernel = floats(case["weights"]).T.copy()
    tile = tile_with(way, Physics(backward=backward_of(quiet(**case["io"]))), kernel)
    assert relative(backward(tile, floats(case["d"]), len(kernel)), floats(case["backward"])) < 1e-6


def repeated(way, physics, rng, *, backwards=False):
    """Return a vector, a kernel, and the results of the same product many times, in one passage."""
    kernel, vector = rng.normal(0, 0.2, (N, M)).astype(np.float32), rng.normal(size=M if backwards else N)
    vectors = np.tile(vector.astype(np.float32), (REPEATS // 20, 1))
    tile = tile_with(way, physics, kernel)
    found = [backward(tile, vectors, N, draw) if backwards else forward(tile, vectors, draw) for draw in range(20)]
    return vectors[0].astype(float), kernel.astype(float), np.concatenate(found).astype(float)


def check_moments(found, mean, variance):
    count = len(found)
    assert np.all(np.abs(found.mean(axis=0) - mean) < 5 * np.sqrt(variance / count))
    assert np.all(np.abs(found.var(axis=0) - variance) < 5 * variance * np.sqrt(2 / count) + 1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backwards", [False, True])
def test_the_noise_of_outputs_and_the_converter_s_step_add_up(way, backwards):
    io = IOParameters(inp_res=0.0, out_noise=0.1, out_bound=12.0, bound_management="NONE")
    physics = Physics(backward=io) if backwards else Physics(forward=io)
    vector, kernel, found = repeated(way, physics, np.random.default_rng(1), backwards=backwards)
    alpha, step = np.abs(vector).max(), 24 / 510
    mean = vector @ (kernel.T if backwards else kernel)
    check_moments(found, mean, np.full(len(mean), alpha**2 * (0.1**2 + step**2 / 12)))
    correlations = np.corrcoef(found.T) - np.eye(len(mean))
    assert np.abs(correlations).max() < 5 / np.sqrt(len(found))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["inp_noise", "ADDITIVE_CONSTANT", "PCM_READ", "inp_sto_round", "out_sto_round"])
def test_every_noise_alone_has_its_mean_and_variance(way, kind):
    off = {"inp_res": 0.0, "out_res": 0.0, "out_noise": 0.0, "bound_management": "NONE"}
    fields = {
        "inp_noise": {"inp_noise": 0.03},
        "ADDITIVE_CONSTANT": {"w_noise": 0.05, "w_noise_type": "ADDITIVE_CONSTANT"},
        "PCM_READ": {"w_noise": 0.05, "w_noise_type": "PCM_READ"},
        "inp_sto_round": {"inp_res": 1 / 126, "inp_sto_round": True},
        "out_sto_round": {"out_res": 1 / 60, "out_sto_round": True},
    }[kind]
    vector, kernel, found = repeated(way, Physics(forward=IOParameters(**off | fields)), np.random.default_rng(2))
    alpha = np.abs(vector).max()
    u = vector / alpha
    mean = vector @ kernel
    if kind == "inp_noise":
        variance = alpha**2 * 0.03**2 * (kernel**2).sum(axis=0)
    elif kind == "ADDITIVE_CONSTANT":
        variance = np.full(M, alpha**2 * 0.05**2 * (u @ u))
    elif kind == "PCM_READ":
        variance = alpha**2 * 0.05**2 * (u**2 @ np.abs(kernel))
    elif kind == "inp_sto_round":
        share = u / (1 / 63) % 1  # of the way to the next step: it is rounded up so often
        variance = alpha**2 * (1 / 63) ** 2 * ((share * (1 - share)) @ kernel**2)
    else:
        step = 24 / 60
        share = (u @ kernel) / step % 1
        variance = alpha**2 * step**2 * share * (1 - share)
    check_moments(found, mean, variance)


@pytest.mark.parametrize("way", WAYS)
def test_bound_management_repeats_with_new_noise_until_nothing_is_beyond_the_bound(way):
    kernel = np.full((4, 3), 0.9, np.float32)
    io = IOParameters(inp_res=0.0, out_res=0.0, out_bound=1.0, out_noise=0.0)
    tile = tile_with(way, Physics(forward=io), kernel)
    vectors = floats([[1, 1, 1, 1], [0.2, 0.2, 0, 0], [1, 0, 0, 0]])  # 3.6, 1.8, 0.9 at first: 2, 1, 0 times more
    np.testing.assert_allclose(forward(tile, vectors), vectors @ kernel, rtol=1e-6)
    assert tile.cells.words[Word.REPEATED] == 3
    io = IOParameters(inp_res=0.0, out_res=0.0, out_bound=1.0, out_noise=0.0, max_bm_factor=1)
    np.testing.assert_allclose(
        forward(tile_with(way, Physics(forward=io), kernel), vectors[:1]), np.full((1, 3), 2.0), rtol=1e-6
    )  # it gives up at r = 2 > 1: 1.8 is clipped to 1, and times 2


@pytest.mark.parametrize("way", WAYS)
def test_a_vector_of_zeros_gives_zeros_without_noise_and_is_noisy_where_inputs_are(way):
    kernel, zeros = np.ones((4, 3), np.float32), np.zeros((2, 4), np.float32)
    assert not forward(tile_with(way, Physics(forward=IOParameters(out_noise=0.5)), kernel), zeros).any()
    noisy = Physics(forward=IOParameters(inp_noise=0.5, out_res=0.0))
    assert forward(tile_with(way, noisy, kernel), zeros).all()


@pytest.mark.parametrize("way", WAYS)
def test_the_bias_is_a_row_whose_input_is_1_and_takes_part_in_the_scale(way):
    kernel = floats([[0.5], [0.25]])  # one input, and the bias
    io = quiet(inp_res=0.1, out_res=0.0, out_bound=0.0)  # a step of 0.2
    found = forward(tile_with(way, Physics(forward=io), kernel, bias=True), floats([[0.33], [3.0]]))
    np.testing.assert_allclose(found[:, 0], [0.4 * 0.5 + 0.25, 3 * 0.5 + 3 * 0.4 * 0.25], rtol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_an_exact_product_beside_a_noisy_one_stays_exact(way):
    rng = np.random.default_rng(0)
    kernel, vectors = rng.normal(size=(9, 5)).astype(np.float32), rng.normal(size=(7, 9)).astype(np.float32)
    tile = tile_with(way, Physics(forward=PERFECT, backward=IOParameters(bound_management="NONE")), kernel)
    np.testing.assert_allclose(forward(tile, vectors), vectors @ kernel, rtol=1e-5, atol=1e-6)
