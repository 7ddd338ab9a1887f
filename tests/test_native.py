"""The library in C against NumPy: in double precision, and bit by bit where two ways are meant to give the same."""

import ctypes
import ctypes.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import rapa_dist.native
from rapa_dist.cells import Cells, State, Word
from rapa_dist.errors import UsageError
from rapa_dist.fabric.doorbell import Cycle
from rapa_dist.native import KINDS, build, native, tile_on
from rapa_dist.native.tile import NativeTile
from rapa_dist.tile import AnalogTile, Update

needs_library = pytest.mark.skipif(native().library is None, reason=str(native()))
HERE = Path(__file__).parent
SIZES = st.tuples(st.integers(0, 60), st.integers(1, 140), st.integers(1, 70), st.booleans(), st.integers(0, 9))
"""Rows, k, c_out, bias, seed: blocks of 12, 6 and 4 rows, vectors of 16 and 8, and what is left over of each."""


def choose(vectors):
    return native().library.rapa_choose(vectors)


@pytest.fixture(params=["avx512", "avx2", "neon"])
def vectors(request):
    """One kind of vectors after the other, as far as the processor has them."""
    if native().library is None:
        pytest.skip(str(native()))
    if choose(request.param.encode()) is None:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    choose(None)


def work(tile, size):
    """Return what a tile makes of some cycles: outputs, input errors, and the kernel after two parts of an update."""
    rows, k, c_out, _, seed = size
    rng = np.random.default_rng(seed)
    patches, errors = (rng.normal(size=(rows, columns)).astype(np.float32) for columns in (k, c_out))
    outputs = np.full((rows, c_out), np.nan, np.float32)
    tile.forward(patches, outputs)
    again = patches.copy()
    update = Update(0.1, 0.02)
    tile.backward(patches, errors, cycle=1, update=update, input_error=True, commit=False)
    tile.backward(again, errors, cycle=2, update=update, input_error=False)
    return outputs, patches, tile.cells.kernel.copy()


def cells_of(size):
    _, k, c_out, bias, seed = size
    cells = Cells.volatile((k + bias, c_out))
    cells.program(np.random.default_rng(seed + 100).normal(size=(k + bias, c_out)).astype(np.float32))
    return cells


def expected(size):
    """Return the same in double precision."""
    rows, k, c_out, bias, seed = size
    rng = np.random.default_rng(seed)
    patches, errors = (rng.normal(size=(rows, columns)).astype(np.float32).astype(float) for columns in (k, c_out))
    kernel = cells_of(size).kernel.astype(float)
    inputs = np.hstack((patches, np.ones((rows, int(bias)))))
    return inputs @ kernel, errors @ kernel[:k].T, kernel * (1 - 0.1 * 0.02) - 2 * 0.1 * inputs.T @ errors


@needs_library
@settings(deadline=None)
@given(size=SIZES)
def test_cycles_are_those_of_double_precision(size):
    with_vectors = {}
    for kind in ("avx512", "avx2", "neon"):
        if choose(kind.encode()) is not None:
            with_vectors[kind] = work(NativeTile(native().library, cells_of(size), bias=size[3]), size)
    choose(None)
    for found in with_vectors.values():
        for one, other in zip(found, expected(size), strict=True):
            assert_allclose(one, other, rtol=1e-4, atol=1e-4)
        for one, other in zip(found, next(iter(with_vectors.values())), strict=True):
            assert_array_equal(one, other)  # the width of vectors shows in no bit


def test_every_step_of_a_sum_is_fused_and_an_update_is_not(vectors):
    """Bit by bit what C's fmaf gives: no compiler and no flag of the user's decides how a run rounds."""
    fma = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fma.restype, fma.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    size = rows, k, c_out, _, seed = (5, 7, 35, True, 2)
    rng = np.random.default_rng(seed)
    patches, errors = (rng.normal(size=(rows, columns)).astype(np.float32) for columns in (k, c_out))
    kernel = cells_of(size).kernel.copy()
    tile, outputs = NativeTile(native().library, cells_of(size)), np.empty((rows, c_out), np.float32)
    tile.forward(patches, outputs)
    tile.backward(patches, errors, cycle=1, update=Update(0.1, 0.02), input_error=False)
    for column in range(c_out):
        for row in range(rows):
            total = kernel[k, column]
            for i in range(k):
                total = fma(patches[row, i], kernel[i, column], total)
            assert outputs[row, column] == np.float32(total)
        for i in range(k):
            total = 0.0
            for row in range(rows):
                total = fma(patches[row, i], errors[row, column], total)
            kept = np.float32(1 - 0.1 * 0.02) * kernel[i, column]
            assert tile.cells.kernel[i, column] == kept - np.float32(0.1) * np.float32(total)


def test_it_writes_nowhere_else(vectors):
    size = (13, 37, 21, True, 1)
    memory = np.full(3000, 7, np.float32)
    outputs = memory[1000 : 1000 + 13 * 21].reshape(13, 21)
    patches = np.random.default_rng(0).normal(size=(13, 37)).astype(np.float32)
    NativeTile(native().library, cells_of(size)).forward(patches, outputs)
    assert (np.delete(memory, np.s_[1000 : 1000 + 13 * 21]) == 7).all()
    assert not (outputs == 7).any()


def test_sums_go_in_one_order_however_many_rows_there_are(vectors):
    """A patch has the same output beside any others: what perforation and parts of a mini-batch rest on."""
    size = (31, 200, 48, True, 3)
    patches = np.random.default_rng(4).normal(size=(31, 200)).astype(np.float32)
    tile = NativeTile(native().library, cells_of(size))
    outputs, alone = np.empty((31, 48), np.float32), np.empty((1, 48), np.float32)
    tile.forward(patches, outputs)
    for patch, output in zip(patches, outputs, strict=True):
        tile.forward(patch[None], alone)
        assert_array_equal(alone[0], output)


def test_infinity_and_nan_stay_what_they_are(vectors):
    tile = NativeTile(native().library, cells_of((2, 20, 20, True, 0)))
    patches, outputs = np.zeros((2, 20), np.float32), np.empty((2, 20), np.float32)
    patches[0, 3], patches[1, 4] = np.inf, np.nan
    tile.forward(patches, outputs)
    assert np.isinf(outputs[0]).all()
    assert np.isnan(outputs[1]).all()


FOLDER = Path(rapa_dist.native.__file__).parent
COMMON = ["-std=gnu11", "-g", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", f"-I{FOLDER}"]
SANITIZERS = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compile_library(folder, flags):
    """Return the library's object files, every warning an error."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    flags = [*COMMON, *flags, '-DRAPA_SOURCES="test"']
    subprocess.run([compiler, *flags, "-c", *sorted(FOLDER.glob("*.c"))], cwd=folder, check=True, timeout=120)
    return sorted(folder.glob("*.o"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The library with sanitizers, of addresses and of undefined behaviour."""
    return compile_library(tmp_path_factory.mktemp("sanitized"), SANITIZERS)


def linked(program, objects, *flags):
    """Return a program of tests/native, compiled, with the library in it."""
    source = HERE / "native" / f"{program.name}.c"
    command = ["cc", *COMMON, *flags, "-o", program, source, *objects, "-lm", "-pthread"]
    subprocess.run(command, check=True, timeout=120)
    return program


@pytest.mark.parametrize("name", ["sizes", "planes"])
def test_sanitizers_find_nothing_whatever_the_size(tmp_path, sanitized, name):
    program = linked(tmp_path / name, sanitized, *SANITIZERS)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("00 cycles\n" if name == "sizes" else "00 passages\n")


@pytest.mark.parametrize("seed", range(4))
def test_no_message_makes_a_tile_write_where_it_may_not(tmp_path, sanitized, seed):
    program = linked(tmp_path / "messages", sanitized, *SANITIZERS)
    command = [program, "50000", str(seed)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    obeyed, rows = map(int, re.fullmatch(r"(\d+) of 50000 messages obeyed, (\d+) rows done\n", done.stdout).groups())
    assert obeyed > 20_000
    assert rows > 100_000


def test_a_cycle_that_is_killed_at_any_instruction_and_repeated_has_the_same_bits(tmp_path):
    program = linked(tmp_path / "stops", compile_library(tmp_path, ["-O3"]), "-O3")
    done = subprocess.run([program], capture_output=True, text=True, timeout=170, check=False)
    if done.returncode == 77:
        pytest.skip("no process may trace another here")
    assert done.returncode == 0, done.stdout
    moments, word = done.stdout.split()
    assert word == "moments"
    assert int(moments) > 500


def test_python_and_c_call_the_words_of_a_tile_alike():
    text = (Path(rapa_dist.native.__file__).parent / "cells.h").read_text()
    for name, ours in (("word", Word), ("state", State), ("cycle", Cycle)):
        listed = re.search(rf"enum {name} {{(.*?)}}", text, re.DOTALL)[1]
        names = [each.partition("=") for each in re.sub(r"/\*.*?\*/", "", listed).split(",") if each.strip()]
        theirs = {each.strip().removeprefix("DO_"): int(value or at) for at, (each, _, value) in enumerate(names)}
        known = {key: value for key, value in vars(ours).items() if key.isupper() and key != "EMPTY"}
        assert theirs == known


# --- which one is used


@pytest.fixture
def look_again():
    """Forget what was found."""
    native.cache_clear()
    yield
    native.cache_clear()


def test_it_can_be_switched_off(look_again, monkeypatch):
    monkeypatch.setenv("RAPA_DIST_NATIVE", "off")
    assert str(native()) == "NumPy (RAPA_DIST_NATIVE=off)"
    assert type(tile_on(Cells.volatile((3, 2)))) is AnalogTile


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("sse", "RAPA_DIST_NATIVE is “sse”; expected off, avx512, avx2, neon, or nothing for the best there is."),
        ("\udcff", r"RAPA_DIST_NATIVE is “\udcff”; expected"),  # as Python reads a byte that is no UTF-8
    ],
)
def test_an_unknown_word_is_refused(look_again, monkeypatch, value, said):
    monkeypatch.setenv("RAPA_DIST_NATIVE", value)
    with pytest.raises(UsageError, match=re.escape(said)) as raised:
        native()
    str(raised.value).encode()  # can be printed


def test_vectors_without_a_library_are_refused_with_the_reason(look_again, monkeypatch, tmp_path):
    monkeypatch.setenv("RAPA_DIST_NATIVE", "avx2")
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    with pytest.raises(UsageError, match=r"=avx2 needs the library, but the library was not built\. Unset it"):
        native()


@needs_library
def test_vectors_that_the_processor_lacks_are_refused_with_those_that_it_has(look_again, monkeypatch):
    there = [kind for kind in KINDS if choose(kind.encode())]
    lacking = next(kind for kind in KINDS if kind not in there)
    native.cache_clear()
    monkeypatch.setenv("RAPA_DIST_NATIVE", lacking)
    with pytest.raises(UsageError, match=rf"={lacking}, but this processor has only {' and '.join(there)}\."):
        native()


@needs_library
@pytest.mark.skipif(platform.machine() != "x86_64", reason="no such list of flags")
def test_the_processor_has_the_vectors_that_the_kernel_lists():
    flags = re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split()
    found = {kind: choose(kind.encode()) is not None for kind in KINDS}
    choose(None)
    avx2 = {"avx2", "fma"} <= set(flags)
    assert found == {"avx512": avx2 and "avx512f" in flags, "avx2": avx2, "neon": False}


def test_a_wrong_choice_is_refused_before_work_starts():
    command = [sys.executable, "-m", "rapa_dist", "train", "--fabric", "serial"]
    env = os.environ | {"RAPA_DIST_NATIVE": "sse"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "RAPA_DIST_NATIVE is “sse”; expected off, avx512, avx2, neon" in done.stderr
