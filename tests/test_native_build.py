"""How the library in C is built and found: every way in which that can fail, and what is said of it then."""

import ctypes
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from rapa_dist.assignment import assign_random
from rapa_dist.doctor import software
from rapa_dist.geometry import Geometry
from rapa_dist.native import Lack, Native, build, load
from rapa_dist.native import native as whole
from rapa_dist.native import stage as native_stage
from rapa_dist.native.im2col import NativeIm2col
from rapa_dist.native.tile import NativeTile
from rapa_dist.tile import Cells, Update

ROOT = Path(__file__).parents[1]
OLD = 'const char *rapa_sources(void) { return "0123"; }'
WITHOUT_VECTORS = """
const char *rapa_sources(void) { return RAPA_SOURCES; }
const char *rapa_compiler(void) { return ""; }
const char *rapa_choose(const char *kind) { (void)kind; return 0; }
"""


@pytest.fixture
def compiler():
    """The command of the first one here."""
    found = build.compilers()
    if not found:
        pytest.skip("no C compiler")
    return found[0]


@pytest.fixture
def folder(tmp_path):
    """A copy of the library's sources, without a library."""
    for path in build.sources(build.FOLDER):
        shutil.copy(path, tmp_path)
    return tmp_path


def fake(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


# --- what a library is known by


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a.c": "x"}, {"b.c": "x"}),
        ({"a.c": "xy", "b.c": ""}, {"a.c": "x", "b.c": "y"}),
        ({"a.c": "x"}, {"a.c": "x", "b.inc": ""}),
        ({"a.c": "xb.cy"}, {"a.c": "x", "b.c": "y"}),
    ],
)
def test_other_names_lengths_and_contents_have_other_digests(tmp_path, one, other):
    digests = set()
    for name, files in (("one", one), ("other", other)):
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
        digests.add(build.digest(tmp_path / name))
    assert len(digests) == 2


def test_other_flags_have_another_digest(folder, monkeypatch):
    before = build.digest(folder)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-ffast-math"))
    assert build.digest(folder) != before


def test_files_of_editors_are_not_compiled(folder):
    before = build.digest(folder), build.sources(folder)
    (folder / ".#tile.c").symlink_to("somebody@somewhere.4711")
    (folder / ".tile.c").write_text("half a fil")
    (folder / "tile.c~").write_text("before")
    assert (build.digest(folder), build.sources(folder)) == before


# --- compilers


def test_compilers_are_tried_in_order_and_each_once(tmp_path, monkeypatch):
    fake(tmp_path / "gcc", "true")
    (tmp_path / "cc").symlink_to("gcc")
    fake(tmp_path / "clang", "true")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "zig", lambda: [["zig", "cc"]])
    assert build.compilers() == [["cc"], ["clang"], ["zig", "cc"]]
    monkeypatch.setenv("CC", "clang -m64")
    assert build.compilers() == [["clang", "-m64"], ["cc"], ["clang"], ["zig", "cc"]]


@pytest.mark.parametrize("script", [None, "echo 'math.h: No such file' >&2; exit 1"], ids=["none", "without headers"])
def test_where_no_compiler_works_zig_has_to_be_installed(tmp_path, monkeypatch, script):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "zig", list)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    if script is not None:
        fake(tmp_path / "cc", script)
    assert build.needed_to_build() == [build.ZIG]
    monkeypatch.setattr(build, "zig", lambda: [["zig", "cc"]])  # as it is
    assert not build.needed_to_build()
    monkeypatch.setattr(build, "zig", list)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")  # which the library doesn't know
    assert not build.needed_to_build()


def test_where_a_compiler_works_nothing_has_to_be_installed(compiler):
    assert not build.needed_to_build()


def test_pip_is_told_what_a_build_needs(tmp_path):
    program = "import build_backend as b; print(b.get_requires_for_build_wheel(), b.get_requires_for_build_editable())"
    clone = tmp_path / "clone"
    (clone / "rapa_dist/native").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "setup.py", "rapa_dist/native/build.py"):
        shutil.copy(ROOT / name, clone / name)
    shutil.copytree(ROOT / "scripts", clone / "scripts")
    surroundings = {"PATH": str(tmp_path), "PYTHONPATH": str(clone / "scripts")}
    command = [sys.executable, "-c", f"import sys; sys.modules['ziglang'] = None\n{program}"]
    done = subprocess.run(command, cwd=clone, env=surroundings, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{[build.ZIG]} {[build.ZIG]}"


# --- building


def test_a_failed_build_leaves_no_library_but_why(tmp_path):
    (tmp_path / build.LIBRARY).write_text("an old one")
    broken = fake(tmp_path / "broken", "echo 'tile.c:7: this is not C' >&2; exit 3")
    with pytest.raises(build.BuildError, match=r"broken failed with exit code 3:\ntile\.c:7: this is not C"):
        build.build(tmp_path, [[str(broken)]])
    assert not (tmp_path / build.LIBRARY).exists()
    assert "this is not C" in (tmp_path / build.FAILURE).read_text()
    assert load(tmp_path).lack is Lack.NOT_BUILT
    assert not list(tmp_path.glob("_library*/"))


def test_a_build_without_a_compiler_says_so(tmp_path):
    with pytest.raises(build.BuildError, match=build.NO_COMPILER):
        build.build(tmp_path, [])
    with pytest.raises(build.BuildError, match="nowhere can't be run: No such file"):
        build.build(tmp_path, [["nowhere"]])


def test_the_next_compiler_is_tried_and_nothing_of_a_failure_stays(tmp_path):
    (tmp_path / build.FAILURE).write_text("of the last time")
    good = fake(tmp_path / "good", 'while [ "$1" != -o ]; do shift; done; echo built >"$2"')
    build.build(tmp_path, [["false"], [str(good)]])
    assert (tmp_path / build.LIBRARY).read_text() == "built\n"
    assert not (tmp_path / build.FAILURE).exists()


def every_compiler():
    """Return all that are here, and the first one again with other optimisations than the recipe's."""
    found = build.compilers()
    return [(command, "-O3") for command in found] + [(command, "-O1") for command in found[:1]]


@pytest.mark.parametrize(
    ("command", "level"), every_compiler(), ids=lambda value: Path(value[0]).name if isinstance(value, list) else value
)
def test_bits_do_not_depend_on_the_compiler_and_none_warns(command, level, tmp_path, monkeypatch):
    if whole().library is None:
        pytest.skip(str(whole()))
    build.compile_with(command, tmp_path / build.LIBRARY, level, "-Werror")
    found = load_from(tmp_path)
    for one, other in zip(results(whole(), monkeypatch), results(found, monkeypatch), strict=True):
        assert_array_equal(one, other)


@pytest.mark.parametrize("target", ["aarch64-linux-gnu", "x86_64-linux-musl"])
def test_zig_compiles_for_other_machines_without_warnings(target, tmp_path):
    if not build.zig():
        pytest.skip("no ziglang")
    build.compile_with([*build.zig()[0], "-target", target], tmp_path / build.LIBRARY, "-Werror")


def load_from(folder):
    for path in build.sources(build.FOLDER):
        shutil.copy(path, folder)
    found = load(folder)
    assert found.lack is None, str(found)
    return found


def results(native: Native, monkeypatch):
    """Return what a library makes of random numbers: cycles of a tile, planes to rows and back, a stage and back."""
    rng = np.random.default_rng(1)

    def floats(*shape):
        return rng.normal(size=shape).astype(np.float32)

    for kind in (b"avx512", b"avx2", b"neon"):
        if native.library.rapa_choose(kind) is None:
            continue
        cells = Cells.volatile((131, 37))
        cells.program(floats(131, 37))
        tile, patches, outputs = NativeTile(native.library, cells), floats(50, 130), np.empty((50, 37), np.float32)
        tile.forward(patches, outputs)
        tile.backward(patches, floats(50, 37), cycle=1, update=Update(0.1, 0.02), input_error=True)
        yield from (outputs, patches, cells.kernel.copy())

    geometry = Geometry(size=(9, 11), kernel=(3, 2), stride=(1, 2), before=(1, 1), after=(1, 0))
    assignment = assign_random(5, geometry.n_patches, 3, np.random.default_rng(2))
    im2col = NativeIm2col(native.library, geometry, 21)
    planes, rows = floats(3, 9, 11, 21), np.empty((assignment.rows, 6 * 21), np.float32)
    im2col.gather(planes, assignment, rows, 0, assignment.rows)
    errors = floats(assignment.rows, 6 * 21)
    yield rows
    n_tiles = len(assignment.offsets) - 1
    yield im2col.scatter(errors, assignment, im2col.rows_of_patches(assignment), (0, n_tiles))

    library = native.library
    library.rapa_stage_forward.restype = None
    library.rapa_stage_forward.argtypes = [ctypes.c_void_p] * 7
    library.rapa_stage_backward.argtypes = [ctypes.c_void_p] * 8
    functions = library.rapa_stage_forward, library.rapa_stage_backward
    for average in (False, True):
        with monkeypatch.context() as patched:
            patched.setattr(native_stage, "_functions", lambda: functions)
            smaller, left = native_stage.forward(
                torch.from_numpy(floats(2, 9, 7, 45)),
                (4, 3),
                average=average,
                relu_first=average,
                alpha=5e-5,
                beta=0.75,
            )
            yield smaller.numpy()
            yield native_stage.backward(left, torch.from_numpy(floats(2, 4, 3, 45))).numpy()


# --- loading


def put(folder, text, compiler):
    """Compile something else to where the library is looked for."""
    source = folder / "other.txt"
    source.write_text(text)
    command = [*compiler, "-shared", "-fPIC", f'-DRAPA_SOURCES="{build.digest(folder)}"', "-o", folder / build.LIBRARY]
    subprocess.run([*command, "-x", "c", source], check=True, timeout=60)


def test_a_library_that_was_not_built(tmp_path):
    assert load(tmp_path) == Native(None, "the library was not built", Lack.NOT_BUILT)


def test_a_library_that_is_damaged(tmp_path):
    (tmp_path / build.LIBRARY).write_bytes(b"\x7fELF and no more")
    found = load(tmp_path)
    assert found.lack is Lack.UNLOADABLE
    assert str(tmp_path / build.LIBRARY) in str(found)


def test_a_library_that_is_another_one(tmp_path, compiler):
    put(tmp_path, "int other;", compiler)
    found = load(tmp_path)
    assert found.lack is Lack.UNLOADABLE
    assert str(found).endswith(f"{build.LIBRARY} is another one)")


def test_a_library_that_is_older_than_its_sources(tmp_path, compiler):
    put(tmp_path, OLD, compiler)
    assert load(tmp_path).lack is Lack.OUTDATED


def test_a_processor_that_the_library_is_not_for(tmp_path, compiler):
    put(tmp_path, WITHOUT_VECTORS, compiler)
    found = load(tmp_path)
    assert found.lack is Lack.NO_VECTORS
    assert str(found) == "NumPy (the processor has no avx512 or avx2 or neon)"


# --- what doctor says


@pytest.mark.parametrize("lack", [Lack.OUTDATED, Lack.UNLOADABLE, Lack.NOT_BUILT])
def test_what_can_be_built_again_is(tmp_path, lack):
    assert f"{sys.executable} -m rapa_dist.native`" in software.advice(lack, tmp_path)
    assert "apt-get" not in software.advice(lack, tmp_path)


def test_without_a_compiler_one_has_to_be_installed_first(tmp_path):
    (tmp_path / build.FAILURE).write_text(f"{build.NO_COMPILER}\n")
    said = software.advice(Lack.NOT_BUILT, tmp_path)
    assert "apt-get install gcc libc6-dev" in said
    assert f"pip install '{build.ZIG}'" in said
    assert "-m rapa_dist.native`" in said


def test_what_a_compiler_said_is_repeated(tmp_path):
    (tmp_path / build.FAILURE).write_text("cc failed with exit code 1:\ntile.c:7: no such thing\n")
    said = software.advice(Lack.NOT_BUILT, tmp_path)
    assert "tile.c:7: no such thing" in said
    assert "apt-get" not in said


def test_a_processor_can_not_be_mended(tmp_path):
    assert "-m rapa_dist.native" not in software.advice(Lack.NO_VECTORS, tmp_path)


def test_the_compiler_is_named(monkeypatch):
    monkeypatch.setattr(software, "native", lambda: Native(object(), "avx2", compiler="GCC 12.2.0"))
    check = software.check_products()
    assert (check.status, check.value) == ("ok", "native (avx2), compiled by GCC 12.2.0")


def test_a_setting_that_can_not_be_fulfilled_is_a_failed_check(monkeypatch):
    monkeypatch.setenv("RAPA_DIST_NATIVE", "sse")
    whole.cache_clear()
    check = software.check_products()
    whole.cache_clear()
    assert check.status == "failed"
    assert "is “sse”; expected" in check.fix
