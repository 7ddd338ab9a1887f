"""A run depends on its configuration and seed: not on the folder it is started in, nor on the environment."""

import json
import os
import pwd
import secrets
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import rapa_dist
from rapa_dist import folders
from rapa_dist.chaos import campaign
from rapa_dist.cli import main
from rapa_dist.console import home_as_tilde
from rapa_dist.coordinator.run import start_run
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.data import builtin, load
from rapa_dist.data.load import find_datasets, places
from rapa_dist.errors import ClusterError, UsageError
from rapa_dist.experiments.jobs import do_as_here
from rapa_dist.fabric import access, cluster, surroundings, tile_actors
from rapa_dist.fabric.actor import Tile
from rapa_dist.fabric.cluster import connect
from rapa_dist.fabric.ray import RayFabric
from rapa_dist.fabric.remote import RemoteChip
from rapa_dist.fabric.running_code import RunningCode, installed_code, loaded_code
from rapa_dist.fabric.scratch import shared_memory_root
from rapa_dist.initial import initial_kernels
from rapa_dist.interpreter import same_modules
from rapa_dist.machine import Machine

PACKAGE = Path(rapa_dist.__file__).parent
COMMAND = Path(sys.executable).with_name("rapa-dist")
TINY = ["--dataset=builtin", "--limit-train=20", "--limit-test=10", "--epochs=1", "--tiles=2,1,1", "--channels=4,4,4"]
NAMESAKES = ("numpy", "random", "torch", "ray", "click", "rich", "threadpoolctl", "sitecustomize", "usercustomize")


def plant(folder: Path) -> Path:
    """Fill a folder with another rapa_dist and with namesakes of modules; return the file that tells who was run."""
    marks = folder.with_name("marks")
    mark = f"open({str(marks)!r}, 'a').write(__file__ + chr(10))\n"
    other = folder / "rapa_dist"
    for path in PACKAGE.rglob("*.py"):
        copy = other / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    text = (other / "tile.py").read_text()
    changed = text.replace("rate = update.learning_rate", "rate = 1.5 * update.learning_rate")
    assert changed != text
    (other / "tile.py").write_text(changed + mark)
    for name in NAMESAKES:
        (folder / f"{name}.py").write_text(f"{mark}raise ImportError('the namesake {name} was run')\n")
    return marks


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    found = tmp_path / "here"
    found.mkdir()
    return found


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_run_started_among_namesakes_and_foreign_settings_has_the_weights_of_serial(tmp_path, folder):
    marks = plant(folder)
    foreign = {
        "RAY_RUNTIME_ENV_HOOK": "rapa_dist.tile.hook",
        "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": {"PYTHONPATH": str(folder)}}}),
        "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "rapa_dist.tile.hook",
        "RAY_OVERRIDE_RESOURCES": '{"analog_tile": 1}',
        "RAY_NAMESPACE": "elsewhere",
    }
    ray = run(COMMAND, "train", *TINY, "--address", "local", "--run-dir", tmp_path / "ray", cwd=folder, **foreign)
    assert ray.returncode == 0, ray.stderr
    for name in foreign:
        assert name in ray.stderr, "not said"
    assert not marks.exists(), marks.read_text()
    config = RunDirectory(tmp_path / "ray").config
    start_run(config, fabric="serial", address=None, data_dir=None, run_dir=tmp_path / "serial")
    assert not campaign.differences(tmp_path / "ray", tmp_path / "serial")


@pytest.mark.ray
def test_a_run_is_refused_before_its_first_step_where_tiles_run_other_code(monkeypatch):
    machine = Machine.build(channels=(4, 4, 4), tiles=(1, 1, 1))
    three = connect("local", 3)
    try:
        other = other_code()  # as if the tiles' was another: they themselves see it first
        monkeypatch.setattr(tile_actors, "installed_code", lambda: other)
        with pytest.raises(ClusterError, match=r"A tile does not start: .*These differ: rapa_dist\.cells\."):
            RayFabric(machine, 10**6, initial_kernels(machine, 0), run="some-run", cluster=three)
    finally:
        three.close()


def other_code() -> RunningCode:
    """Return what a process runs that has another tile.py."""
    mine = installed_code()
    return replace(mine, modules=dict(mine.modules) | {"rapa_dist.cells": "other"}, host="far", folder="/other")


class TestRunningCode:
    def test_a_process_may_have_loaded_less_than_the_coordinator(self):
        installed_code().check(loaded_code())

    def test_all_modules_are_known_by_the_names_that_they_are_loaded_by(self):
        loaded = {name for name in sys.modules if name.partition(".")[0] == "rapa_dist"}
        assert loaded <= installed_code().modules.keys()

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"modules": {"rapa_dist.cells": "other"}}, "These differ: rapa_dist.cells."),
            ({"modules": {"rapa_dist.unknown": "0"}}, "These differ: rapa_dist.unknown."),
            ({"others": {"NumPy": "1.0"}}, "NumPy (1.0 there, "),
            ({"others": {"Ray": "2.0"}}, "Ray (2.0 there, "),
            ({"others": {"OPENBLAS_CORETYPE": "Haswell"}}, "OPENBLAS_CORETYPE (Haswell there, not set here)"),
            ({"blas": frozenset({"mkl 2024.1"})}, "BLAS (mkl 2024.1 there, "),
        ],
    )
    def test_what_differs_is_named_with_both_places(self, changes, said, monkeypatch):
        monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
        mine = installed_code.__wrapped__()  # not what was found before the setting was gone
        theirs = replace(loaded_code(), host="far", folder="/other/rapa_dist", **changes)
        with pytest.raises(ClusterError) as raised:
            mine.check(theirs)
        for part in (said, "far", "/other/rapa_dist", installed_code().host, str(PACKAGE), "Install the same"):
            assert part in str(raised.value)

    def test_other_products_are_refused_with_their_reason_and_the_setting(self):
        mine = replace(installed_code(), products="of the native library, 12ab", products_detail="native (avx2)")
        theirs = replace(mine, products="NumPy's", products_detail="NumPy (the library was not built)", host="far")
        with pytest.raises(ClusterError) as raised:
            mine.check(theirs)
        said = str(raised.value)
        assert "These differ: the tiles' products (NumPy's there, of the native library, 12ab here)." in said
        assert "NumPy (the library was not built) there, and with native (avx2) here: set RAPA_DIST_NATIVE" in said

    def test_other_vectors_have_the_same_products(self):
        mine = replace(installed_code(), products="of the native library, 12ab", products_detail="native (avx2)")
        mine.check(replace(mine, products_detail="native (avx512)"))

    def test_every_process_that_computes_looks_for_itself(self):
        for begin in (
            lambda: Tile(None, other_code()),
            lambda: RemoteChip("node").start(None, 1, 1, other_code()),
            lambda: do_as_here(other_code(), "train", [], None, "serial", "cpu"),
        ):
            with pytest.raises(ClusterError, match=r"rapa_dist\.cells"):
                begin()

    def test_a_tile_of_a_version_that_does_not_look_is_refused(self, monkeypatch):
        monkeypatch.setattr("ray.get", lambda answer, timeout: 4711)  # a process id, as it was once
        with pytest.raises(ClusterError, match="another version of rapa-dist"):
            tile_actors.check_code(None)


class TestOwnProcesses:
    """Those that are started with `python -m`, which puts the current folder first on its path."""

    def test_find_the_modules_of_their_parent_and_no_others(self, folder):
        marks = plant(folder)
        code = "import json, sys, rapa_dist, random; print(json.dumps([rapa_dist.__file__, sys.path]))"
        done = run(sys.executable, "-c", code, cwd=folder, **same_modules())
        file, path = json.loads(done.stdout)
        assert file == rapa_dist.__file__
        assert [entry for entry in path if Path(entry).exists()] == [
            *dict.fromkeys(entry for entry in sys.path if Path(entry).exists())
        ]
        assert not marks.exists()

    def test_have_no_variables_of_pythons_where_their_parent_heeds_none(self):
        code = "from rapa_dist.interpreter import same_modules; import json; print(json.dumps(same_modules()))"
        for flag, ignored in (("-E", True), ("-s", False)):
            done = run(sys.executable, flag, "-c", code, cwd=PACKAGE.parent, PYTHONHASHSEED="5")
            variables = json.loads(done.stdout)
            assert ("PYTHONHASHSEED" in variables) == ignored
            assert ("PYTHONNOUSERSITE" in variables) != ignored

    def test_chaos_starts_its_runs_like_that(self, monkeypatch):
        seen = []

        def look(plan, directory, surroundings):
            seen.append(surroundings)
            raise ClusterError("seen enough")

        monkeypatch.setattr(campaign, "_train_reference", look)
        with pytest.raises(ClusterError, match="enough"):
            campaign.campaign(campaign.Plan(options=(), kinds=("kill",), kills=0, runs=1, seed=0), print)
        assert same_modules().items() <= seen[0].items()

    def test_the_module_as_a_command_leaves_the_current_folder_out(self, folder):
        for name in ("click", "rich", "torch"):
            (folder / f"{name}.py").write_text("raise SystemExit('a namesake was run')\n")
        done = run(sys.executable, "-m", "rapa_dist", "--version", cwd=folder, PYTHONSAFEPATH="")
        assert done.stdout.startswith("rapa-dist"), done.stderr


class TestSettings:
    """What Ray would take over from the environment."""

    @pytest.fixture(autouse=True)
    def environment(self, monkeypatch):
        for name in list(os.environ):
            if name.startswith("RAY_"):
                monkeypatch.delenv(name)

    def test_a_cluster_that_is_started_has_none_but_those_that_are_known(self, monkeypatch, capsys):
        monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "1")
        monkeypatch.setenv("RAY_RUNTIME_ENV_HOOK", "os.nothing")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "of-the-user")
        surroundings.settle(joins=False)
        assert "RAY_RUNTIME_ENV_HOOK" not in os.environ
        assert os.environ["RAY_AUTH_TOKEN"] == "of-the-user"
        assert os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"
        said = capsys.readouterr().err
        assert "left out: RAY_RUNTIME_ENV_HOOK, RAY_gcs_rpc_server_reconnect_timeout_s" in said
        assert "of-the-user" not in said

    def test_where_one_is_joined_only_what_brings_code_is_left_out(self, monkeypatch, capsys):
        monkeypatch.setenv("RAY_gcs_server_request_timeout_seconds", "9")
        monkeypatch.setenv("RAY_RUNTIME_ENV_HOOK", "os.nothing")
        monkeypatch.setenv("__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR", "os.nothing")
        job = {"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip", "env_vars": {"SECRET": "word"}}}
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
        surroundings.settle(joins=True)
        assert "RAY_gcs_server_request_timeout_seconds" in os.environ
        assert "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ, "a job's own environment is what it was submitted with"
        said = capsys.readouterr().err
        assert "left out: RAY_RUNTIME_ENV_HOOK, __RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR\n" in said
        assert "runtime environment of this Ray job (env_vars, working_dir)" in said
        assert "word" not in said

    def test_nothing_is_said_where_nothing_is_left_out(self, capsys):
        surroundings.settle(joins=False)
        surroundings.settle(joins=False)
        assert capsys.readouterr().err == ""


class TestFolders:
    """Those that the surroundings should give, where they don't."""

    @pytest.fixture
    def homeless(self, monkeypatch):
        """A user without a home directory, as an arbitrary one in a container."""

        def unknown(uid):
            raise KeyError(uid)

        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(pwd, "getpwuid", unknown)

    @pytest.fixture
    def no_temporary(self, monkeypatch):
        """No folder for temporary files that can be written to."""
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr(tempfile, "_get_default_tempdir", raises(FileNotFoundError))
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "/tmp" and access(path, mode))

    def test_without_a_home_directory_images_are_looked_for_in_the_temporary_folder(self, homeless, monkeypatch):
        monkeypatch.delenv("RAPA_DIST_DATA", raising=False)
        assert places(None) == [Path(tempfile.gettempdir()) / f"rapa-dist-{os.getuid()}"]
        assert home_as_tilde("/data/x") == "/data/x"
        assert find_datasets()[0].found

    @pytest.mark.parametrize("home", ["", "relative"])
    def test_a_home_directory_that_is_no_full_path_is_none(self, home, monkeypatch):
        monkeypatch.setenv("HOME", home)
        assert folders.home() is None

    def test_a_home_directory_that_is_not_there_stops_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path / "none"))
        assert not find_datasets()[1].found
        assert access.with_users_token().get("RAY_AUTH_MODE") is None

    def test_a_path_below_a_home_directory_that_is_missing_is_refused(self, homeless, monkeypatch):
        for arguments in (["train", "--run-dir=~/run"], ["train", "--dataset", "images:~/photos"]):
            result = CliRunner().invoke(main, arguments)
            assert result.exit_code == 2
            assert "begins with ~, and this user has no such home directory" in result.stderr
        monkeypatch.setenv("RAPA_DIST_DATA", "~/data")
        with pytest.raises(UsageError, match="~/data begins with ~"):
            places(None)

    def test_rays_files_go_to_memory_where_there_is_no_temporary_folder(self, no_temporary, monkeypatch, tmp_path):
        short = Path("/dev/shm") / f"r{secrets.token_hex(2)}"
        short.mkdir(0o700)
        monkeypatch.setenv("RAPA_DIST_SHM", str(short))
        assert cluster.folder_for_ray() == short
        short.rmdir()

    def test_neither_memory_nor_a_temporary_folder_is_an_error_with_a_way_out(self, no_temporary, monkeypatch):
        monkeypatch.delenv("RAPA_DIST_SHM")
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        for use in (cluster.folder_for_ray, shared_memory_root):
            with pytest.raises(ClusterError, match=r"there is neither\. Name one in RAPA_DIST_SHM, or in TMPDIR"):
                use()

    def test_the_current_folder_is_none_for_temporary_files(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        assert folders.temporary() is None
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        assert folders.temporary() == tmp_path

    def test_a_current_folder_that_was_deleted_is_said_first(self, folder, monkeypatch):
        monkeypatch.chdir(folder)
        folder.rmdir()
        for line in ("train", "evaluate x", "analyze similarity x", "reproduce table1", "scale", "chaos", "doctor"):
            result = CliRunner().invoke(main, line.split())
            assert result.exit_code == 2
            assert "does not exist any more. Go to one that does" in result.stderr
        for line in ("plan", "stats", "train --help"):
            assert "does not exist any more" not in CliRunner().invoke(main, line.split()).stderr


class TestStaleAddress:
    """An address at which nothing answers is said before images are read, or anything else that takes its time."""

    @pytest.fixture(autouse=True)
    def nothing_is_read(self, monkeypatch):
        monkeypatch.setattr(builtin, "draw", raises(AssertionError))
        monkeypatch.setattr(load, "read_official", raises(AssertionError))
        monkeypatch.setattr(campaign, "_train_reference", raises(AssertionError))

    @pytest.mark.parametrize(
        "arguments",
        [
            ["train", *TINY],
            ["train"],
            ["reproduce", "table1"],
            ["reproduce", "table1", "--device=cuda"],
            ["chaos", "--kills=1"],
        ],
    )
    @pytest.mark.parametrize("named", ["--address", "RAY_ADDRESS"])
    def test_is_refused_first(self, arguments, named, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))  # taken, and nobody listens
            address = f"127.0.0.1:{closed.getsockname()[1]}"
            if named == "--address":
                arguments = [*arguments, f"--address={address}"]
            else:
                monkeypatch.setenv("RAY_ADDRESS", address)
            result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 1
        assert f"No Ray cluster answers at {address} ({named})" in result.stderr
        assert not list(tmp_path.iterdir())


def raises(kind):
    """Return a function that raises, whatever it is given."""

    def fail(*_, **__):
        raise kind("must not be called")

    return fail
