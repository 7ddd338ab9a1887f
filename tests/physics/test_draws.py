"""Random numbers by their place: against the generator's published answers, and by their statistics."""

import numpy as np
import pytest
from scipy import stats

from rapa_dist.physics.draws import BACKWARD, Draws, Kind, cycle_of, key_of, normal_pairs, philox

ROWS = np.arange(3000)


# Salmon et al. 2011, Random123: kat_vectors of philox4x32 with 10 rounds
@pytest.mark.parametrize(
    ("counter", "key", "found"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_generator_gives_its_published_answers(counter, key, found):
    assert (
        tuple(int(words[0]) for words in philox(tuple(np.array([word], np.uint32) for word in counter), key)) == found
    )


def test_normal_numbers_are_normal_and_independent():
    numbers = Draws(key_of(1, 2, 3)).normal(Kind.OUTPUT_NOISE, cycle_of(0, 1, (5,), 0), ROWS, 320).astype(float)
    flat, count = numbers.ravel(), numbers.size
    assert abs(flat.mean()) < 4 / count**0.5
    assert abs(flat.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((flat**4).mean() - 3) < 4 * (96 / count) ** 0.5
    assert stats.kstest(flat, "norm").pvalue > 1e-4
    for lag in (1, 8, 32, 320):
        assert abs(np.mean(flat[lag:] * flat[:-lag])) < 4.5 / count**0.5


def test_the_transformation_is_that_of_box_and_muller():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 2**32, (2, 50_000)).astype(np.uint32)
    radius = np.sqrt(-2 * np.log(((first >> 8) + 0.5) / 2**24))
    angle = (second >> 30) * np.pi / 2 + (((second & 0x3FFFFFFF) >> 6) / 2**24 - 0.5) * np.pi / 2
    x, y = normal_pairs(first, second)
    np.testing.assert_allclose(x, radius * np.cos(angle), atol=1e-5)  # numbers near 1 lose the half in float32
    np.testing.assert_allclose(y, radius * np.sin(angle), atol=1e-5)


def test_uniform_numbers_are_uniform():
    numbers = Draws(key_of(1, 2, 3)).uniform(Kind.INPUT_ROUNDING, cycle_of(0, 1, (5,), 0), ROWS, 64).ravel()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers.astype(float), "uniform").pvalue > 1e-4


def test_every_place_has_numbers_of_its_own():
    cycle = cycle_of(0, 1, (5,), 0)
    places = [
        (key_of(seed, layer, tile), kind, of_cycle, number)
        for seed, layer, tile in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
        for kind in (Kind.OUTPUT_NOISE, Kind.OUTPUT_NOISE + BACKWARD, Kind.PULSES)
        for of_cycle in (cycle, cycle_of(1, 1, (5,), 0), cycle_of(0, 2, (5,), 0), cycle_of(0, 1, (5,), 1))
        for number in (0, 1)
    ]
    seen = {Draws(key).words(kind, cycle, ROWS[:5], 70, number).tobytes() for key, kind, cycle, number in places}
    assert len(seen) == len(places)
    words = Draws(key_of(0, 0, 0)).words(Kind.OUTPUT_NOISE, cycle, ROWS, 70)
    assert len(np.unique(words)) > 0.9999 * words.size


def test_numbers_do_not_depend_on_how_many_are_drawn_or_in_which_company():
    draws, cycle = Draws(key_of(7, 0, 0)), cycle_of(0, 1, (5,), 0)
    many = draws.normal(Kind.OUTPUT_NOISE, cycle, ROWS, 200)
    np.testing.assert_array_equal(draws.normal(Kind.OUTPUT_NOISE, cycle, ROWS[5:7], 33), many[5:7, :33])
    lines = np.array([3, 500, 17])
    of_lines = draws.words_of_lines(Kind.PATCH_PULSES, cycle, 4, lines)
    np.testing.assert_array_equal(draws.words_of_lines(Kind.PATCH_PULSES, cycle, 4, lines[1:]), of_lines[1:])
