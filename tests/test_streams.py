import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest

from rapa_dist.streams import Purpose, stream


def numbers(seed, purpose, *index):
    return stream(seed, purpose, *index).integers(0, 2**63, 8).tolist()


def test_a_stream_is_a_function_of_its_place():
    assert numbers(3, Purpose.SHUFFLE, 5) == numbers(3, Purpose.SHUFFLE, 5)


def test_a_stream_does_not_depend_on_what_was_drawn_before():
    wanted = numbers(3, Purpose.SHUFFLE, 5)
    numbers(3, Purpose.SHUFFLE, 4)
    stream(3, Purpose.SHUFFLE, 5).normal(size=1000)
    assert numbers(3, Purpose.SHUFFLE, 5) == wanted


def test_a_stream_is_the_same_in_another_process():
    program = "from rapa_dist.streams import *; print(stream(3, Purpose.AUGMENT, 5, 7).integers(0, 2**63, 8).tolist())"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == str(numbers(3, Purpose.AUGMENT, 5, 7))


PLACES = [
    (0, Purpose.ASSIGN_TRAIN, 0, 0),
    (0, Purpose.ASSIGN_TRAIN, 0, 1),
    (0, Purpose.ASSIGN_TRAIN, 1, 0),
    (0, Purpose.ASSIGN_TRAIN, 1),
    (0, Purpose.ASSIGN_TRAIN, 0),
    (0, Purpose.ASSIGN_TRAIN),
    (0, Purpose.ASSIGN_TRAIN, 0, 0, 0),
    (0, Purpose.ASSIGN_TEST, 0, 0),
    (0, Purpose.INIT, 0),
    (0, Purpose.INIT, 0, 0),
    (0, Purpose.INIT, 3),
    (0, Purpose.INIT, 3, 0),
    (1, Purpose.ASSIGN_TRAIN, 0, 0),
    (2**40, Purpose.ASSIGN_TRAIN, 0, 0),
]


def test_streams_of_different_places_have_no_number_in_common():
    for one, other in combinations(PLACES, 2):
        assert not set(numbers(*one)) & set(numbers(*other)), (one, other)


def test_streams_of_neighbouring_places_are_uncorrelated():
    drawn = np.array([stream(0, Purpose.AUGMENT, step).normal(size=2000) for step in range(30)])
    correlation = np.corrcoef(drawn)[~np.eye(30, dtype=bool)]
    assert np.abs(correlation).max() < 5 / np.sqrt(2000)


def test_purposes_keep_their_numbers():
    """They are part of what a seed means: a run of last year has to come out the same."""
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "INIT": 0,
        "ASSIGN_TRAIN": 1,
        "ASSIGN_TEST": 2,
        "ASSIGN_FIXED": 3,
        "SHUFFLE": 4,
        "AUGMENT": 5,
        "SUBSET": 6,
        "BUILTIN": 7,
        "POOL_TRAIN": 8,
        "INIT_DIGITAL": 9,
        "DIGITAL": 10,
    }


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="non-negative"):
        stream(-1, Purpose.INIT)
