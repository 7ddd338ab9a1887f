"""Quick tests first; a world of its own for the session; and nothing may be left behind in it."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from rapa_dist.fabric.address import answers

_PATIENCE_S = 60.0  # for Ray's processes to end after their driver has; its agents look for it only now and then
_LONG = (
    "test_nodes",
    "test_cluster_files",
    "test_runs",
    "test_stats_runs",
    "test_chaos",
    "test_networks_ray",
    "test_noisy_runs",
)  # first, so that both halves end together
_MARK = "RAPA_DIST_TEST_SESSION"
_world = pytest.StashKey[tuple[str, list[Path]]]()


def pytest_configure(config: pytest.Config) -> None:
    """Give the session folders of its own, so that it meets no other run or cluster on this machine.

    What tests start inherits all of this from the environment.
    """
    token = secrets.token_hex(3)
    temporary = Path("/tmp") / f"r{token}"  # short: the names of Ray's sockets below it have 107 bytes in all
    shared = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else temporary) / f"rapa-tests-{token}"
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # tmp_path stays where it always is
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait leave the cores to the other half
    for folder in (temporary, shared):
        folder.mkdir(mode=0o700)
    os.environ |= {
        _MARK: token,
        "TMPDIR": str(temporary),
        "RAY_TMPDIR": str(temporary),
        "RAPA_DIST_SHM": str(shared),
    }
    os.environ.pop("RAY_ADDRESS", None)
    # started in the background of a shell, a process ignores Ctrl-C, and so would all that the tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the same behind nohup
    tempfile.tempdir = None  # read TMPDIR again
    config.stash[_world] = token, [temporary, shared]


def pytest_unconfigure(config: pytest.Config) -> None:
    for folder in config.stash[_world][1]:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run unmarked tests first, then those that are slow or start Ray, the longest modules first.

    Where several run side by side, the marked ones of a module stay together, as they share clusters and runs.
    """
    for item in items:
        if _marked(item) and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=_turn)


def _marked(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("slow", "ray"))


def _turn(item: pytest.Item) -> int:
    if not _marked(item):
        return -1
    return _LONG.index(item.path.stem) if item.path.stem in _LONG else len(_LONG)


class Head(NamedTuple):
    """A Ray cluster of one node that `ray start` started."""

    address: str
    process: subprocess.Popen[bytes]
    token: dict[str, str]
    """Environment with the token that it wants, without saying that it wants one."""


@pytest.fixture
def start_head():
    """A function that starts a cluster, as a user would by hand, with room for so many tiles.

    At the end it is killed: asked to leave, it would wait half a minute for its agents; `ray stop` would stop every
    cluster on the machine.
    """
    heads: list[subprocess.Popen[bytes]] = []

    def start(tiles: int) -> Head:
        token = os.environ | {"RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        place = [f"--port={address.rpartition(':')[2]}", "--node-ip-address=127.0.0.1"]
        offers = ["--num-cpus=2", "--object-store-memory=100000000", "--resources", f'{{"analog_tile": {tiles}}}']
        process = subprocess.Popen(
            [*ray, *place, "--temp-dir", os.environ["TMPDIR"], *offers, "--include-dashboard=false"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=token | {"RAY_AUTH_MODE": "token"},
            start_new_session=True,
        )
        heads.append(process)
        deadline = time.monotonic() + _PATIENCE_S
        while not answers(address):
            assert process.poll() is None, "the head ended"
            assert time.monotonic() < deadline, "no head"
            time.sleep(0.05)
        return Head(address, process, token)

    yield start
    for process in heads:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=_PATIENCE_S)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "rapa-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system can't be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest):
    """Fail at the end of the session if processes, sockets or files of a run are still there."""
    yield
    token, folders = request.config.stash[_world]
    deadline = time.monotonic() + _PATIENCE_S
    while (processes := _descendants(token, folders)) and time.monotonic() < deadline:
        time.sleep(0.2)
    files = [str(path) for folder in folders for path in folder.glob("rapa-dist-*")]
    for pid in processes:
        os.kill(pid, signal.SIGKILL)
    assert not processes and not files, f"tests left behind: {processes}, {files}"  # noqa: PT018


def _descendants(token: str, folders: list[Path]) -> dict[int, str]:
    """Return this session's processes but the session itself, as {pid: command line}.

    One of: its environment has the session's mark; a parent of it does; it has a file of the session open
    (Ray's workers write their title over their environment, and outlive their parent).
    """
    me, parents, found = os.getpid(), {}, set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        try:
            state, parent, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
            if state in "ZX":
                continue
            parents[pid] = int(parent)
            marked = f"{_MARK}={token}".encode() in (entry / "environ").read_bytes()
            files = [os.readlink(link) for link in (entry / "fd").iterdir()]
        except OSError:  # it has gone, or belongs to somebody else
            continue
        if marked or any(file.startswith(f"{folder}/") for file in files for folder in folders):
            found.add(pid)
    for pid in parents:
        line = [pid]
        while line[-1] in parents and line[-1] != me:
            line.append(parents[line[-1]])
        if line[-1] == me or found.intersection(line):
            found.add(pid)
    return {pid: _command_line(pid) for pid in found - {me}}


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:200]
    except OSError:
        return "?"


@pytest.fixture(autouse=True)
def _no_images_of_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have tests find no images but their own, whatever packages of data sets this machine has."""
    monkeypatch.setattr("rapa_dist.data.load.SYSTEM", Path("/no/such/folder"))
