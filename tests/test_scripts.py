"""The scripts' set-up, with a Python that only pretends: it makes no environment and installs nothing."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NATIVE = ("build.py", "products.c", "products.h", "products.inc")
SCRIPTS = ["scripts/setup.sh", "scripts/rapa-dist", "scripts/test", ".ci/run"]

PYTHON = """#!/usr/bin/env bash
# Stands for python3.11, and for the python of the environment that it "makes".
case $1 in -[IP]) shift ;; *) echo "a module in the current folder would be run" >&2; exit 9 ;; esac
echo "python $*" >>"$CALLS"
case "$1 $2" in
"-c import"*) echo "${FAKE_VERSION:-3.11}"; exit "${FAKE_WITHOUT_ENSUREPIP:-0}" ;;
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip")
    [[ $3 == --version ]] && exit
    touch "$TMPDIR/of-pip" || exit
    if [[ $* == *"${FAKE_SLOW:-nothing}"* ]]; then
        echo $$ >"$CALLS.new" && mv "$CALLS.new" "$CALLS.slow"
        exec sleep 30
    fi
    if [[ $* == *"${FAKE_FAILING:-nothing}"* ]]; then echo "no such wheel" >&2; exit 1; fi
    failed=${0%/.venv/bin/python}/rapa_dist/native/_library.failed
    [[ $* == *--editable* && ${FAKE_WITHOUT_COMPILER:-} ]] && touch "$failed"
    for name in rapa-dist pytest; do
        printf '#!/bin/sh\\necho "%s in $PWD: $*"\\nexit 7\\n' "$name" >"${0%/*}/$name" && chmod +x "${0%/*}/$name"
    done
    echo "chatter of pip" ;;
*/build.py*)
    [[ ${FAKE_FAILING:-} == build.py ]] && exit 1
    [[ $PYTHONPATH == */.venv/set-up.tmp/zig ]] && rm "${1%/*}/_library.failed" ;;
esac
"""


class Clone:
    """A clone with the real scripts, a stand-in for Python, and a record of what that was called for."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone"
        self.calls_file = folder / "calls"
        (self.root / "scripts").mkdir(parents=True)
        for name in (*SCRIPTS[:3], "scripts/build_backend.py", "pyproject.toml", "requirements.lock", "setup.py"):
            shutil.copy(ROOT / name, self.root / name)
        built = shutil.ignore_patterns("_library*", "__pycache__")
        shutil.copytree(ROOT / "rapa_dist" / "native", self.root / "rapa_dist" / "native", ignore=built)
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.add_python("python3.11")

    def add_python(self, name: str) -> None:
        (self.bin / name).write_text(PYTHON)
        (self.bin / name).chmod(0o755)

    def start(self, script="rapa-dist", *arguments, path=None, **environment):
        return subprocess.Popen(
            [path or self.root / "scripts" / script, *arguments],
            cwd=self.bin,
            env={"PATH": f"{self.bin}:{self.tools}", "CALLS": str(self.calls_file), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def tools(self) -> Path:
        """A folder with what the scripts need but a Python."""
        folder = self.bin.parent / "tools"
        if not folder.exists():
            folder.mkdir()
            needed = "bash sh cat cp env find flock grep mkdir mv chmod readlink dirname rm sha256sum sleep tail touch"
            for tool in needed.split():
                (folder / tool).symlink_to(shutil.which(tool))
        return folder

    def run(self, *arguments, **options):
        self.calls_file.write_text("")
        process = self.start(*arguments, **options)
        process.out, process.err = process.communicate(timeout=30)
        return process

    @property
    def installed(self) -> list[str]:
        """What pip was asked to install, an entry for each call."""
        calls = self.calls_file.read_text().splitlines()
        return [call.rpartition("requirements.lock ")[2] for call in calls if "pip install" in call]


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)


def test_the_first_call_sets_up_and_the_second_does_not(clone):
    first = clone.run("rapa-dist", "train", "--tiles", "16,4,1")
    assert first.returncode == 7  # the command's own
    assert first.out == f"rapa-dist in {clone.bin}: train --tiles 16,4,1\n"  # nothing of the set-up
    assert "setting up .venv (first run only):" in first.err
    assert "installing torch … " in first.err
    assert "chatter" not in first.err
    torch, setuptools, package = clone.installed
    assert torch.startswith("torch==")
    assert setuptools == "setuptools"
    assert package == f"--no-build-isolation --editable {clone.root}[plots]"

    assert not (clone.root / ".venv/set-up.tmp").exists()
    second = clone.run("rapa-dist")
    assert (second.out, second.err) == (f"rapa-dist in {clone.bin}: \n", "")
    assert not clone.calls_file.read_text()


def test_through_a_symbolic_link(clone, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(clone.root / "scripts/rapa-dist")
    assert clone.run(path=link).out.startswith("rapa-dist in ")


def test_the_tests_need_more_than_the_command(clone):
    clone.run("rapa-dist")
    tests = clone.run("test", "-k", "tile")
    assert tests.returncode == 7
    assert tests.out.startswith(f"pytest in {clone.root}: -n 2 ")
    assert tests.out.endswith(" -k tile\n")
    assert clone.installed[-1].endswith("a clone[plots,dev]")
    assert "bringing .venv up to date" in tests.err
    for script in ("rapa-dist", "test"):
        assert not clone.run(script).err


APT = """#!/bin/sh
# Stands for apt-get, which has a browser or fails.
echo "apt-get $*" >>"$CALLS"
case "$*" in
*install*)
    echo "chatter of apt"
    [ "$FAKE_APT" = fails ] && exit 100
    printf '#!/bin/sh\\n' >"${0%/*}/chromium" && chmod +x "${0%/*}/chromium" ;;
esac
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may install packages")
def test_the_tests_get_a_browser_once_and_the_command_none(clone):
    (clone.bin / "apt-get").write_text(APT)
    (clone.bin / "apt-get").chmod(0o755)
    clone.run("rapa-dist")
    assert "apt-get" not in clone.calls_file.read_text()
    first = clone.run("test")
    assert first.returncode == 7
    assert "installing chromium" in first.err
    assert "chatter" not in first.err
    assert "install -y --no-install-recommends chromium" in clone.calls_file.read_text()
    assert not clone.run("test").err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may install packages")
def test_where_no_browser_can_be_had_the_tests_run_nevertheless(clone):
    (clone.bin / "apt-get").write_text(APT)
    (clone.bin / "apt-get").chmod(0o755)
    failed = clone.run("test", FAKE_APT="fails")
    assert failed.returncode == 7  # of pytest, which was started
    assert "chatter of apt" in failed.err
    assert "browser.log" in failed.err


def test_without_a_compiler_one_is_installed_for_as_long_as_the_set_up_takes(clone):
    first = clone.run("rapa-dist", FAKE_WITHOUT_COMPILER="1")
    assert first.returncode == 7
    assert "installing a C compiler, for now … " in first.err
    assert "building the library … " in first.err
    assert "NumPy" not in first.err
    assert clone.installed[-1] == f"--target {clone.root}/.venv/set-up.tmp/zig ziglang"
    assert "build.py" in clone.calls_file.read_text()
    assert not (clone.root / ".venv/set-up.tmp").exists()
    assert not clone.run("rapa-dist").err


@pytest.mark.parametrize("failing", ["ziglang", "build.py"])
def test_where_no_library_can_be_built_the_set_up_ends_well(clone, failing):
    first = clone.run("rapa-dist", FAKE_WITHOUT_COMPILER="1", FAKE_FAILING=failing)
    assert first.returncode == 7
    assert "failed after" in first.err
    assert "multiply with NumPy" in first.err
    assert not clone.run("rapa-dist").err


@pytest.mark.parametrize(
    "name",
    ["pyproject.toml", "requirements.lock", "setup.py", "scripts/build_backend.py"]
    + [f"rapa_dist/native/{file}" for file in NATIVE],
)
def test_other_requirements_are_installed(clone, name):
    clone.run("rapa-dist")
    with open(clone.root / name, "a") as file:
        file.write("# changed\n")
    assert "bringing .venv up to date" in clone.run("rapa-dist").err
    assert len(clone.installed) == 3
    assert not clone.run("rapa-dist").err


def test_a_moved_clone_is_set_up_anew(clone):
    clone.run("rapa-dist")
    clone.root = clone.root.rename(clone.root.with_name("moved"))
    assert "setting up .venv" in clone.run("rapa-dist").err
    assert clone.installed[-1].endswith(f"{clone.root}[plots]")


def test_an_environment_whose_python_has_gone_is_set_up_anew(clone):
    clone.run("rapa-dist")
    (clone.root / ".venv/bin/python").unlink()
    (clone.root / ".venv/bin/python").symlink_to("uninstalled")
    assert "setting up .venv" in clone.run("rapa-dist").err
    assert not clone.run("rapa-dist").err


def test_a_failed_set_up_shows_the_log_and_is_not_taken_for_whole(clone):
    failed = clone.run("rapa-dist", FAKE_FAILING="editable")
    assert failed.returncode == 1
    assert "no such wheel" in failed.err
    assert "set-up.log" in failed.err
    assert not failed.out
    (clone.root / ".venv/half-installed").touch()

    again = clone.run("rapa-dist")
    assert again.returncode == 7
    assert "setting up .venv" in again.err
    assert len(clone.installed) == 3
    assert not (clone.root / ".venv/half-installed").exists()


@pytest.mark.parametrize("with_signal", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_set_up_is_not_taken_for_whole(clone, with_signal):
    process = clone.start("rapa-dist", FAKE_SLOW="editable")
    pip = slow_pip(clone)
    process.send_signal(with_signal)
    out, err = process.communicate(timeout=10)  # not the 30 s that pip would have taken
    assert process.returncode == 130
    assert "Interrupted." in err
    assert not out
    assert not Path(f"/proc/{pip}").exists()
    assert "setting up .venv" in clone.run("rapa-dist").err
    assert len(clone.installed) == 3


def test_a_killed_set_up_is_not_taken_for_whole(clone):
    process = clone.start("rapa-dist", FAKE_SLOW="torch==")
    pip = slow_pip(clone)
    process.kill()
    process.wait()
    again = clone.start("rapa-dist")
    time.sleep(0.3)
    assert again.poll() is None  # as the pip of the first is still writing
    os.kill(pip, signal.SIGKILL)
    process.communicate(timeout=10)
    _, err = again.communicate(timeout=10)
    assert again.returncode == 7
    assert "waiting for another set-up" in err
    assert "setting up .venv" in err


def test_several_at_once_set_up_once(clone):
    for process in [clone.start("rapa-dist") for _ in range(4)]:
        process.communicate(timeout=30)
        assert process.returncode == 7
    assert len(clone.installed) == 3


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FAKE_VERSION": "3.9"}, ["needs Python 3.11, 3.12 or 3.13", "python3.11 is 3.9"]),
        ({"FAKE_WITHOUT_ENSUREPIP": "1"}, ["ensurepip", "python3.11-venv"]),
    ],
)
def test_a_python_that_does_not_fit(clone, environment, words):
    process = clone.run("rapa-dist", **environment)
    assert process.returncode == 1
    for word in words:
        assert word in process.err
    assert not process.out


def test_no_python_at_all(clone):
    (clone.bin / "python3.11").unlink()
    assert "no python3" in clone.run("rapa-dist").err


def test_another_python_that_fits(clone):
    (clone.bin / "python3.11").unlink()
    clone.add_python("python3")
    assert clone.run("rapa-dist", FAKE_VERSION="3.13").returncode == 7


def slow_pip(clone) -> int:
    """Wait until the pip that dawdles is there; return its process id."""
    path = Path(f"{clone.calls_file}.slow")
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline, "pip was not called"
        time.sleep(0.02)
    return int(path.read_text())
