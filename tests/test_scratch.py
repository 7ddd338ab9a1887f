import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from rapa_dist.errors import ClusterError
from rapa_dist.fabric.cluster import connect_to
from rapa_dist.fabric.scratch import (
    PREFIX,
    Scratch,
    check_shared_memory,
    fresh_name,
    map_existing,
    shared_memory_root,
    sweep,
)


@pytest.fixture
def scratch(tmp_path):
    made = Scratch(tmp_path)
    yield made
    made.remove()


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def everything_below(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def abandon(root):
    """Make a scratch directory with a file in it, in a process that is killed. Return its path."""
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from rapa_dist.fabric.scratch import Scratch\n"
        "scratch = Scratch(Path(sys.argv[1]))\n"
        "scratch.map_file('arena', 100_000)\n"
        "print(scratch.path, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(root)], stdout=subprocess.PIPE, text=True, check=False)
    assert killed.returncode == -9
    path = Path(killed.stdout.strip())
    assert (path / "arena").stat().st_size == 100_000
    return path


# --- private


def test_directory_and_files_are_for_their_owner_alone(scratch):
    before = os.umask(0)  # whatever the user's umask is
    try:
        scratch.map_file("arena", 5000)
    finally:
        os.umask(before)
    assert mode(scratch.path) == 0o700
    assert [mode(path) for path in scratch.path.iterdir()] == [0o600, 0o600]  # the file and the lock


def test_ray_does_not_open_the_directory_that_it_is_given_a_place_in(monkeypatch):
    import ray

    def init(_temp_dir, **options):
        ray._common.utils.try_to_create_directory(_temp_dir)  # as Ray does
        return SimpleNamespace(address_info={"address": "127.0.0.1:1"})

    monkeypatch.setattr(ray, "init", init)
    for name in ("RAY_worker_maximum_startup_concurrency", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    scratch = connect_to(None, 3).scratch
    try:
        assert mode(scratch.path) == 0o700
        os.close(scratch._lock)  # as when it is killed
        sweep(scratch.root)
        assert not scratch.path.exists()
    finally:
        scratch.remove()


def test_directories_of_two_runs_are_two(tmp_path, scratch):
    other = Scratch(tmp_path)
    assert other.path != scratch.path
    assert scratch.path.is_dir()
    other.remove()


# --- files


def test_a_file_is_shared_with_whoever_maps_it(scratch):
    mine = scratch.map_file("arena", 10_000)
    theirs = map_existing(scratch.path / "arena", 10_000)
    assert len(mine) == len(theirs) == 10_000
    mine[9_999] = 7
    assert theirs[9_999] == 7
    theirs[0] = 3
    assert mine[0] == 3


def test_all_of_a_file_is_reserved_when_it_is_made(scratch):
    scratch.map_file("arena", 1_000_000)
    assert (scratch.path / "arena").stat().st_blocks * 512 >= 1_000_000


def test_a_file_is_made_once(scratch):
    scratch.map_file("arena", 5000)
    with pytest.raises(FileExistsError):
        scratch.map_file("arena", 5000)


# --- too little memory


def with_free_memory(monkeypatch, n_bytes):
    """Pretend that so many bytes are free."""
    status = SimpleNamespace(f_bavail=n_bytes // 4096, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: status)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_file_that_does_not_fit_is_refused_with_numbers_and_a_way_out(scratch, monkeypatch, number):
    def full(descriptor, offset, size):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with_free_memory(monkeypatch, 64 * 2**20)
    with pytest.raises(ClusterError) as caught:
        scratch.map_file("arena", 250_000_000)
    message = str(caught.value)
    for part in ("250 MB", "67 MB are free", str(scratch.root), "--batch-size", "--tiles", "RAPA_DIST_SHM"):
        assert part in message


def test_another_fault_of_the_system_is_not_taken_for_too_little_memory(scratch, monkeypatch):
    def broken(descriptor, offset, size):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "posix_fallocate", broken)
    with pytest.raises(OSError, match="Input/output error"):
        scratch.map_file("arena", 5000)


def test_too_little_memory_is_seen_before_anything_is_made(tmp_path, monkeypatch):
    with_free_memory(monkeypatch, 10**6)
    check_shared_memory(900_000, tmp_path)
    with pytest.raises(ClusterError, match=r"needs 2 MB in .*, 1 MB are free"):
        check_shared_memory(2_000_000, tmp_path)
    assert everything_below(tmp_path) == []


def test_memory_of_abandoned_runs_counts_as_free(tmp_path):
    abandoned = abandon(tmp_path)
    check_shared_memory(1, tmp_path)
    assert not abandoned.exists()


# --- what is left of runs that are over


def test_nothing_is_left_after_removal(tmp_path):
    scratch = Scratch(tmp_path)
    scratch.map_file("arena", 5000)
    (scratch.path / "deeper").mkdir()
    scratch.remove()
    assert everything_below(tmp_path) == []
    scratch.remove()


def test_the_directory_of_a_killed_run_is_swept_up_by_the_next(tmp_path):
    abandoned = abandon(tmp_path)
    assert abandoned.is_dir()
    scratch = Scratch(tmp_path)
    assert not abandoned.exists()
    scratch.remove()
    assert everything_below(tmp_path) == []


def test_the_directory_of_a_run_that_lives_is_not_swept_up(tmp_path, scratch):
    scratch.map_file("arena", 5000)
    sweep(tmp_path)
    Scratch(tmp_path).remove()
    program = (
        "import sys; from pathlib import Path; from rapa_dist.fabric.scratch import sweep; sweep(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert (scratch.path / "arena").exists()


def test_other_directories_are_not_swept_up(tmp_path):
    others = [
        tmp_path / f"{PREFIX}{os.getuid() + 1}-0123",  # another user's
        tmp_path / f"{PREFIX}something",
        tmp_path / "ray",
    ]
    for path in others:
        path.mkdir()
    sweep(tmp_path)
    assert all(path.is_dir() for path in others)


@pytest.fixture
def planted(tmp_path):
    """A directory that looks like an abandoned one of this user, made long ago, for others to change."""

    def plant(before="", mode=0o700):
        path = tmp_path / "root" / f"{before}{PREFIX}{os.getuid()}-0123"
        path.mkdir(parents=True)
        (path / "arena").touch()
        path.chmod(mode)
        os.utime(path, (0, 0))
        return path

    return plant


def to_another(monkeypatch, path):
    """Give a directory to another user, or, where only root may, become another one."""
    if os.getuid() == 0:
        os.chown(path, 65534, 65534)
        os.utime(path, (0, 0))
    else:
        real = os.lstat
        owner = os.getuid() + 1

        def lstat(which):
            values = list(real(which))
            values[stat.ST_UID] = owner
            return os.stat_result(values)

        monkeypatch.setattr(os, "lstat", lstat)


@pytest.mark.parametrize("before", ["", "."])
@pytest.mark.parametrize("flaw", ["none", "open to all", "open to the group", "of another user"])
def test_only_directories_that_are_ones_own_and_closed_are_swept_up(planted, monkeypatch, before, flaw):
    path = planted(before, {"open to all": 0o755, "open to the group": 0o710}.get(flaw, 0o700))
    if flaw == "of another user":
        to_another(monkeypatch, path)
    sweep(path.parent)
    monkeypatch.undo()
    assert path.exists() == (flaw != "none")
    if path.exists():
        assert [file.name for file in path.iterdir()] == ["arena"]  # and no lock was made there


@pytest.mark.parametrize("before", ["", "."])
def test_a_link_is_not_swept_up(planted, tmp_path, before):
    path = planted(before)
    target = path.rename(tmp_path / "elsewhere")
    path.symlink_to(target)
    sweep(path.parent)
    assert path.is_symlink()
    assert [file.name for file in target.iterdir()] == ["arena"]


def test_a_lock_that_is_a_link_is_not_followed(planted, tmp_path):
    path = planted()
    (path / "lock").symlink_to(tmp_path / "new")
    sweep(path.parent)
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").touch()
    sweep(path.parent)
    assert path.exists()


@pytest.mark.parametrize("name", ["lock", "cells-1"])
def test_nobody_waits_at_a_pipe(planted, name):
    path = planted()
    os.mkfifo(path / name)
    program = "import sys, pathlib, rapa_dist.fabric.scratch as s; s.sweep(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, str(path.parent)], check=True, timeout=30)
    assert path.exists() == (name == "lock")


def test_only_regular_files_are_mapped(tmp_path):
    (tmp_path / "file").write_bytes(b"rows")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    assert map_existing(tmp_path / "file", 4)[:] == b"rows"
    for name in ("link", "pipe"):
        with pytest.raises(OSError, match=r"symbolic links|Not a regular file"):
            map_existing(tmp_path / name, 4)


@pytest.mark.parametrize("operation", ["mkdir", "rename"])
def test_a_directory_that_can_not_be_made_leaves_nothing(tmp_path, monkeypatch, operation):
    def full(path, *arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, operation, full)
        with pytest.raises(ClusterError) as caught:
            Scratch(tmp_path)
    for part in (str(tmp_path), "No space left", "RAPA_DIST_SHM"):
        assert part in str(caught.value)
    assert everything_below(tmp_path) == []


def test_a_directory_whose_maker_was_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(path, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Scratch(tmp_path)
    assert everything_below(tmp_path) == []


def test_a_directory_whose_maker_was_killed_half_way_is_swept_up_after_a_while(tmp_path):
    half_made = tmp_path / f".{PREFIX}{os.getuid()}-0123"
    half_made.mkdir(mode=0o700)
    (half_made / "lock").touch()
    sweep(tmp_path)
    assert half_made.is_dir()  # its maker may be about to lock it
    an_hour_ago = time.time() - 3600
    os.utime(half_made, (an_hour_ago, an_hour_ago))
    sweep(tmp_path)
    assert not half_made.exists()


# --- where


def test_the_place_can_be_set(tmp_path, monkeypatch):
    monkeypatch.setenv("RAPA_DIST_SHM", str(tmp_path))
    assert shared_memory_root() == tmp_path
    scratch = Scratch()
    assert scratch.path.parent == tmp_path
    scratch.remove()


@pytest.mark.parametrize("variable", ["RAPA_DIST_SHM", "TMPDIR"])
def test_a_link_to_the_place_is_resolved(tmp_path, monkeypatch, variable):
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to("place")
    monkeypatch.delenv("RAPA_DIST_SHM")
    monkeypatch.setenv(variable, str(tmp_path / "link"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    if variable == "TMPDIR":
        monkeypatch.setattr(os, "access", lambda path, how: False)
    assert shared_memory_root() == tmp_path / "place"


def test_without_shared_memory_it_is_the_temporary_folder(monkeypatch):
    monkeypatch.delenv("RAPA_DIST_SHM")
    monkeypatch.setattr(os, "access", lambda path, how: False)
    assert shared_memory_root() == Path(tempfile.gettempdir())


def test_a_folder_that_is_still_written_to_is_swept_all_the_same(tmp_path, monkeypatch):
    left = tmp_path / fresh_name()
    left.mkdir(mode=0o700)
    (left / "log").write_text("")
    remove, failures = shutil.rmtree, [1, 2]

    def rmtree(path, ignore_errors=False):
        if failures:  # a file was made between the look and the removal
            failures.pop()
        else:
            remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    sweep(tmp_path)
    assert not left.exists()
