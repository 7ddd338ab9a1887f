"""The baton: only who has it computes, in an order that no timing can change."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from rapa_dist.nn.turns import Turns


def log_of(count, turns, rests=(), give_ways=3):
    """Run parts that write down what they do, and take their time here and there; return what they wrote."""
    log = []

    def part(number):
        for place in range(give_ways):
            log.append((number, place))
            time.sleep(1e-3 * ((number, place) in rests))
            turns.give_way(number)
        log.append((number, "ends"))

    turns.run([lambda number=number: part(number) for number in range(count)])
    return log


@pytest.mark.parametrize("rests", [(), ((0, 0), (0, 2)), ((1, 1), (2, 0)), ((2, 2),)])
def test_the_order_is_the_same_whatever_takes_how_long(rests):
    expected = [(number, place) for place in (0, 1, 2, "ends") for number in range(3)]
    assert log_of(3, Turns(3), rests) == expected


def test_one_part_has_nobody_to_give_way_to():
    assert log_of(1, Turns(1)) == [(0, 0), (0, 1), (0, 2), (0, "ends")]


def test_parts_of_different_length_end_one_after_the_other():
    turns, log = Turns(3), []

    def part(number, give_ways):
        for place in range(give_ways):
            log.append((number, place))
            turns.give_way(number)
        log.append((number, "ends"))

    turns.run([lambda: part(0, 0), lambda: part(1, 3), lambda: part(2, 1)])
    assert log == [(0, "ends"), (1, 0), (2, 0), (1, 1), (2, "ends"), (1, 2), (1, "ends")]


def test_the_first_part_runs_in_the_callers_thread_the_others_each_in_one_of_its_own_again_and_again():
    turns = Turns(3)

    def threads():
        found = {}
        turns.run([lambda n=n: found.setdefault(n, threading.get_ident()) for n in range(3)])
        return found

    first = threads()
    assert first[0] == threading.get_ident()
    assert len(set(first.values())) == 3
    assert threads() == first


def test_fewer_parts_than_turns_and_then_as_many_again():
    turns = Turns(3)
    for count in (2, 3, 1, 3):
        assert log_of(count, turns, give_ways=1) == [(n, place) for place in (0, "ends") for n in range(count)]


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_one_part_raises_ends_the_others_and_reaches_the_caller(failing, error):
    turns, ended, reached = Turns(3), [], []

    def part(number):
        try:
            turns.give_way(number)
            if number == failing:
                raise error("mine")
            turns.give_way(number)
            reached.append(number)
        finally:
            ended.append(number)

    with pytest.raises(error, match="mine"):
        turns.run([lambda number=number: part(number) for number in range(3)])
    assert sorted(ended) == [0, 1, 2]
    assert not reached
    assert log_of(3, turns, give_ways=1) == [(n, place) for place in (0, "ends") for n in range(3)]


def test_of_several_errors_the_first_is_raised_and_parts_that_have_not_begun_never_begin():
    turns, begun = Turns(3), []

    def fail(number):
        begun.append(number)
        raise ValueError(number)

    with pytest.raises(ValueError, match="0"):
        turns.run([lambda number=number: fail(number) for number in range(3)])
    assert begun == [0]


def test_threads_and_file_descriptors_end_with_the_object():
    def pipes():
        links = Path("/proc/self/fd").iterdir()
        return {os.readlink(link) for link in links if link.is_fifo()}

    pipes_before, threads_before = pipes(), set(threading.enumerate())
    turns = Turns(4)
    log_of(4, turns)
    own_pipes, own_threads = pipes() - pipes_before, set(threading.enumerate()) - threads_before
    assert len(own_threads) == 3
    assert own_pipes
    del turns
    for thread in own_threads:
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert not own_pipes & pipes()


def test_a_signal_is_seen_to_while_the_caller_waits_for_its_turn():
    """Ctrl-C must not have to wait for tiles that hang."""
    seen, when = [], []

    def second_part():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        deadline = time.monotonic() + 5
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
        when.append(bool(seen))

    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(True))
    try:
        turns = Turns(2)
        turns.run([lambda: turns.give_way(0), second_part])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert when == [True]
