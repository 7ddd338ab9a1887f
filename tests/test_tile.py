import sys
from array import array
from itertools import pairwise

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import rapa_dist.tile
from rapa_dist.cells import Cells, Word
from rapa_dist.fabric.blas import one_blas_thread
from rapa_dist.native import native
from rapa_dist.native.tile import NativeTile
from rapa_dist.tile import AnalogTile, Update

K, C_OUT, ROWS = 12, 5, 9
SHAPE = (K + 1, C_OUT)
UPDATE = Update(learning_rate=0.1, weight_decay=0.02)
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _one_thread():
    limits = one_blas_thread()
    yield
    limits.restore_original_limits()


@pytest.fixture(autouse=True, params=["NumPy", "native"])
def _either_tile(request, monkeypatch):
    if request.param == "native":
        library = native().library
        if library is None:
            pytest.skip(str(native()))
        monkeypatch.setattr(sys.modules[__name__], "AnalogTile", lambda cells: NativeTile(library, cells))


def rng():
    return np.random.default_rng(7)


def matrix(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def a_tile(kernel=None):
    cells = Cells.volatile(SHAPE)
    cells.program(matrix(*SHAPE) if kernel is None else kernel)
    return AnalogTile(cells)


def wide(values):
    return values.astype(np.float64)


# --- the three cycles against the same in double precision


def test_forward_multiplies_the_patches_with_the_kernel_and_adds_the_bias():
    kernel, patches, outputs = matrix(*SHAPE), matrix(ROWS, K, seed=1), matrix(ROWS, C_OUT, seed=2)
    a_tile(kernel).forward(patches, outputs)
    expected = [[sum(wide(kernel)[:K, j] * wide(row)) + wide(kernel)[K, j] for j in range(C_OUT)] for row in patches]
    assert_allclose(outputs, expected, **FLOAT32)


def test_backward_passes_the_errors_through_the_kernel_before_its_update():
    kernel, patches, errors = matrix(*SHAPE), matrix(ROWS, K, seed=1), matrix(ROWS, C_OUT, seed=2)
    a_tile(kernel).backward(patches, errors, cycle=1, update=UPDATE, input_error=True)
    expected = [[sum(wide(kernel)[i] * wide(row)) for i in range(K)] for row in errors]
    assert_allclose(patches, expected, **FLOAT32)


@pytest.mark.parametrize("input_error", [True, False])
def test_update_is_a_sum_of_rank_one_updates_with_bias_and_decay(input_error):
    kernel, patches, errors = matrix(*SHAPE), matrix(ROWS, K, seed=1), matrix(ROWS, C_OUT, seed=2)
    expected = wide(kernel) * (1 - 0.1 * 0.02)
    for patch, error in zip(wide(patches), wide(errors), strict=True):
        expected -= 0.1 * np.outer(np.append(patch, 1), error)
    tile = a_tile(kernel)
    tile.backward(patches, errors, cycle=1, update=UPDATE, input_error=input_error)
    assert_allclose(tile.cells.kernel, expected, **FLOAT32)


def test_weight_decay_shrinks_every_row_of_the_kernel_the_bias_too():
    kernel = np.ones(SHAPE, np.float32)
    tile, nothing = a_tile(kernel), np.zeros((ROWS, C_OUT), np.float32)
    tile.backward(matrix(ROWS, K), nothing, cycle=1, update=Update(0.5, 0.1), input_error=False)
    assert_allclose(tile.cells.kernel, np.full(SHAPE, 0.95), rtol=1e-6)


def test_without_an_update_the_kernel_keeps_its_bits():
    kernel, patches, errors = matrix(*SHAPE), matrix(ROWS, K, seed=1), matrix(ROWS, C_OUT, seed=2)
    tile = a_tile(kernel)
    tile.backward(patches, errors, cycle=1, update=None, input_error=True)
    assert_array_equal(tile.cells.kernel, kernel)
    assert_allclose(patches, wide(errors) @ wide(kernel)[:K].T, **FLOAT32)


def test_without_an_input_error_the_patches_stay():
    patches = matrix(ROWS, K, seed=1)
    before = patches.copy()
    a_tile().backward(patches, matrix(ROWS, C_OUT, seed=2), cycle=1, update=UPDATE, input_error=False)
    assert_array_equal(patches, before)


def test_many_updates_follow_the_recursion():
    tile, expected = a_tile(), wide(matrix(*SHAPE))
    for cycle in range(1, 21):
        patches, errors = matrix(ROWS, K, seed=cycle), matrix(ROWS, C_OUT, seed=100 + cycle)
        with_bias = np.hstack([wide(patches), np.ones((ROWS, 1))])
        expected = (1 - 0.01 * 0.02) * expected - 0.01 * with_bias.T @ wide(errors)
        tile.backward(patches, errors, cycle=cycle, update=Update(0.01, 0.02), input_error=True)
    assert_allclose(tile.cells.kernel, expected, rtol=1e-4, atol=1e-5)


def test_a_tile_without_rows_only_decays():
    tile, none_in, none_out = a_tile(), np.empty((0, K), np.float32), np.empty((0, C_OUT), np.float32)
    tile.forward(none_in, none_out)
    tile.backward(none_in, none_out, cycle=1, update=UPDATE, input_error=True)
    assert_allclose(tile.cells.kernel, matrix(*SHAPE) * (1 - 0.1 * 0.02), rtol=1e-6)


def test_a_tile_writes_to_no_rows_but_its_own():
    patches, outputs = matrix(ROWS, K, seed=1), matrix(ROWS, C_OUT, seed=2)
    patches_before, outputs_before = patches.copy(), outputs.copy()
    tile, mine = a_tile(), slice(2, 5)
    tile.forward(patches[mine], outputs[mine])
    tile.backward(patches[mine], outputs[mine], cycle=1, update=UPDATE, input_error=True)
    for others in (slice(0, 2), slice(5, ROWS)):
        assert_array_equal(patches[others], patches_before[others])
        assert_array_equal(outputs[others], outputs_before[others])


# --- a mini-batch in parts


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_parts_of_a_mini_batch_add_up_to_one_update(parts):
    kernel, patches, errors = matrix(*SHAPE), matrix(ROWS, K, seed=1), matrix(ROWS, C_OUT, seed=2)
    with_bias = np.hstack([wide(patches), np.ones((ROWS, 1))])
    expected = (1 - 0.1 * 0.02) * wide(kernel) - 0.1 * with_bias.T @ wide(errors)
    input_errors = wide(errors) @ wide(kernel)[:K].T
    tile, edges = a_tile(kernel), np.linspace(0, ROWS, parts + 1).astype(int)
    for number, (first, last) in enumerate(pairwise(edges), 1):
        assert_array_equal(tile.cells.kernel, kernel)  # the old one is in force to the end
        mine = slice(first, last)
        tile.backward(
            patches[mine], errors[mine], cycle=number, update=UPDATE, input_error=True, commit=number == parts
        )
    assert_allclose(tile.cells.kernel, expected, **FLOAT32)
    assert_allclose(patches, input_errors, **FLOAT32)
    words = tile.cells.words
    assert (words[Word.UPDATES], words[Word.STEP], words[Word.ROWS_UPDATE]) == (1, 1, ROWS)


def test_the_step_goes_on_from_where_the_kernel_was_programmed():
    cells = Cells.volatile(SHAPE)
    cells.program(matrix(*SHAPE), step=17)
    tile = AnalogTile(cells)
    tile.backward(matrix(ROWS, K), matrix(ROWS, C_OUT), cycle=1, update=UPDATE, input_error=False, commit=False)
    assert cells.words[Word.STEP] == 17
    tile.backward(matrix(ROWS, K), matrix(ROWS, C_OUT), cycle=2, update=UPDATE, input_error=False)
    assert cells.words[Word.STEP] == 18


# --- counters


def test_counters_count_rows_and_updates():
    tile = a_tile()
    patches, outputs = matrix(ROWS, K), matrix(ROWS, C_OUT)
    tile.forward(patches, outputs)
    tile.backward(patches, outputs, cycle=1, update=UPDATE, input_error=True)
    tile.forward(patches[:4], outputs[:4])
    tile.backward(patches[:4], outputs[:4], cycle=2, update=UPDATE, input_error=False)
    tile.backward(patches[:4], outputs[:4], cycle=3, update=None, input_error=True)
    words = tile.cells.words
    assert words[Word.ROWS_FORWARD] == ROWS + 4
    assert words[Word.ROWS_BACKWARD] == ROWS + 4  # the second one needed no input error
    assert words[Word.ROWS_UPDATE] == ROWS + 4
    assert words[Word.UPDATES] == 2
    assert words[Word.BUSY_NS] > 0


# --- cells


def test_programming_forgets_earlier_cycles():
    tile, patches, errors = a_tile(), matrix(ROWS, K), matrix(ROWS, C_OUT)
    tile.backward(patches.copy(), errors, cycle=5, update=UPDATE, input_error=False)
    updated = tile.cells.kernel.copy()
    tile.cells.program(matrix(*SHAPE))
    assert_array_equal(tile.cells.kernel, matrix(*SHAPE))
    tile.backward(patches.copy(), errors, cycle=5, update=UPDATE, input_error=False)
    assert_array_equal(tile.cells.kernel, updated)


@pytest.mark.parametrize("shape", [(76, 32), (801, 64), (2, 1), (13, 5)])
def test_words_and_all_kernels_have_memory_of_their_own(shape):
    size = Cells.size(shape)
    assert size % 4096 == 0
    buffer = memoryview(bytearray(size))
    cells = Cells(buffer, shape)
    cells.words[:] = memoryview(array("Q", [7] * len(cells.words)))
    for number, kernel in enumerate(cells.kernels):
        kernel[:] = number + 1
    assert set(cells.words) == {7}
    assert [set(kernel.ravel().tolist()) for kernel in cells.kernels] == [{1}, {2}, {3}]
    assert np.count_nonzero(np.frombuffer(buffer, np.uint8)) <= 4096 + 3 * 4 * shape[0] * shape[1]


# --- a kill at any instruction, and the cycle rung again


numpy_only = pytest.mark.parametrize("_either_tile", ["NumPy"], indirect=True)
"""tests/native/stops.c stops the library between its own instructions."""


class Body:
    """What outlives a tile's process: its cells, and its rows in the arena."""

    def __init__(self):
        self.memory = memoryview(bytearray(Cells.size(SHAPE)))
        self.patches, self.errors = matrix(ROWS, K, seed=1), matrix(ROWS, C_OUT, seed=2)
        cells = Cells(self.memory, SHAPE)
        cells.program(matrix(*SHAPE))
        AnalogTile(cells).backward(self.patches.copy(), self.errors, cycle=3, update=UPDATE, input_error=False)

    def after_a_part(self):
        """Let the mini-batch have had a first part already, which the next cycle adds to."""
        tile = AnalogTile(Cells(self.memory, SHAPE))
        first, errors = matrix(ROWS, K, seed=3), matrix(ROWS, C_OUT, seed=4)
        tile.backward(first, errors, cycle=4, update=UPDATE, input_error=True, commit=False)
        return self

    def state(self):
        return bytes(self.memory), self.patches.copy(), self.errors.copy()

    def restore(self, state):
        self.memory[:], self.patches[:], self.errors[:] = state

    def ring(self, *, cycle=5, update=UPDATE, input_error, commit=True):
        """Run a backward cycle on a tile in a process that has just come up."""
        tile = AnalogTile(Cells(self.memory, SHAPE))
        tile.backward(self.patches, self.errors, cycle=cycle, update=update, input_error=input_error, commit=commit)

    def result(self):
        """Return the bits that count: the kernel, that after one more part of the mini-batch, rows and step."""
        step = Cells(self.memory, SHAPE).words[Word.STEP]
        kernel, patches, errors = Cells(self.memory, SHAPE).kernel.tobytes(), self.patches.copy(), self.errors.copy()
        self.ring(cycle=6, input_error=False)
        return kernel, Cells(self.memory, SHAPE).kernel.tobytes(), patches.tobytes(), errors.tobytes(), step


def states_between_instructions(body, **cycle):
    """Run a cycle and return what the memory holds before every bytecode instruction of a tile."""
    states = []

    def trace(frame, event, argument):
        if frame.f_code.co_filename != rapa_dist.tile.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            states.append(body.state())
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        body.ring(**cycle)
    finally:
        sys.settrace(outer)
    return [*states, body.state()]


def torn(before, after, generator):
    """A state from inside an instruction: of the floats it writes some are old, some new, some neither.

    The 64-bit words are stored whole: they are still the old ones.
    """
    halves = []
    kernels = [np.frombuffer(memory[4096:], np.float32) for memory, *_ in (before, after)]
    for old, new in (kernels, (before[1], after[1])):
        writes = old.view(np.uint32) != new.view(np.uint32)
        fate = generator.integers(0, 3, old.shape)
        halves.append(np.where(writes & (fate > 0), np.where(fate == 1, new, np.float32(np.nan)), old))
    return before[0][:4096] + halves[0].tobytes(), halves[1], before[2]


def moments(body, generator, **cycle):
    """Every state in which a kill may leave the memory: between two instructions, or inside one."""
    states = states_between_instructions(body, **cycle)
    inside = [
        torn(before, after, generator)
        for before, after in pairwise(states)
        if before[0][4096:] != after[0][4096:] or before[1].tobytes() != after[1].tobytes()
        for _ in range(5)
    ]
    return states + inside


PARTS = [
    pytest.param(lambda: (Body(), True), id="the whole mini-batch"),
    pytest.param(lambda: (Body(), False), id="its first part"),
    pytest.param(lambda: (Body().after_a_part(), False), id="a part between"),
    pytest.param(lambda: (Body().after_a_part(), True), id="its last part"),
]


@numpy_only
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("input_error", [True, False])
def test_a_cycle_that_is_killed_at_any_instruction_and_repeated_has_the_same_bits(input_error, part):
    body, commit = part()
    start = body.state()
    body.ring(input_error=input_error, commit=commit)
    undisturbed = body.result()

    body.restore(start)
    killed = moments(body, rng(), input_error=input_error, commit=commit)
    assert len(killed) > 100
    for number, state in enumerate(killed):
        body.restore(state)
        body.ring(input_error=input_error, commit=commit)
        assert body.result() == undisturbed, f"killed at moment {number} of {len(killed)}"


@numpy_only
@pytest.mark.parametrize("input_error", [True, False])
def test_a_cycle_that_is_killed_twice_has_the_same_bits(input_error):
    body, generator = Body(), rng()
    start = body.state()
    body.ring(input_error=input_error)
    undisturbed = body.result()

    body.restore(start)
    first_kills = moments(body, generator, input_error=input_error)
    for first in generator.choice(len(first_kills), 40, replace=False):
        body.restore(first_kills[first])
        second_kills = moments(body, generator, input_error=input_error)
        for second in generator.choice(len(second_kills), 15):
            body.restore(second_kills[second])
            body.ring(input_error=input_error)
            assert body.result() == undisturbed, f"killed at moments {first} and {second}"


@numpy_only
def test_an_input_error_without_update_that_is_killed_and_repeated_has_the_same_bits():
    body = Body()
    start = body.state()
    body.ring(update=None, input_error=True)
    undisturbed = body.result()
    body.restore(start)
    for state in moments(body, rng(), update=None, input_error=True):
        body.restore(state)
        body.ring(update=None, input_error=True)
        assert body.result() == undisturbed


def test_a_forward_cycle_that_is_killed_and_repeated_has_the_same_bits():
    kernel, patches = matrix(*SHAPE), matrix(ROWS, K, seed=1)
    whole, repeated = np.empty((2, ROWS, C_OUT), np.float32)
    a_tile(kernel).forward(patches, whole)
    repeated[:] = np.nan
    repeated[:3] = whole[:3]
    a_tile(kernel).forward(patches, repeated)
    assert_array_equal(repeated, whole)


@pytest.mark.parametrize("input_error", [True, False])
def test_a_cycle_that_was_committed_changes_nothing_when_it_is_repeated(input_error):
    body = Body()
    body.ring(input_error=input_error)
    before = body.state()
    body.ring(input_error=input_error)
    after = body.state()
    assert after[0] == before[0]  # counters, too
    assert_array_equal(after[1], before[1])


def test_the_next_cycle_is_not_mistaken_for_a_repetition():
    body = Body()
    body.ring(cycle=5, input_error=False)
    once = Cells(body.memory, SHAPE).kernel.copy()
    body.ring(cycle=6, input_error=False)
    assert not np.array_equal(Cells(body.memory, SHAPE).kernel, once)


@numpy_only
def test_while_an_update_is_under_way_the_kernel_in_force_is_the_old_one_or_the_new_one():
    body = Body()
    old = Cells(body.memory, SHAPE).kernel.tobytes()
    states = states_between_instructions(body, input_error=True)
    new = Cells(body.memory, SHAPE).kernel.tobytes()
    seen = [Cells(memoryview(bytearray(memory)), SHAPE).kernel.tobytes() for memory, *_ in states]
    switched = seen.index(new)
    assert set(seen[:switched]) == {old}
    assert set(seen[switched:]) == {new}
