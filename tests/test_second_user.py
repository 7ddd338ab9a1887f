"""A second user of the machine: can read nothing of a run, join nothing, and hand nothing over to one."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import second_user
from listeners import abstract_sockets, listening, outer_addresses, processes, services
from second_user import METHODS, OTHER

from rapa_dist import folders
from rapa_dist.config import resolve
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.data import cache
from rapa_dist.data.sets import ImageSet
from rapa_dist.doctor.cluster import check_cluster, check_token
from rapa_dist.errors import ClusterError, DataError
from rapa_dist.fabric import address, ownership
from rapa_dist.fabric.address import RUNNING_HERE, find_address
from rapa_dist.fabric.cluster import connect
from rapa_dist.fabric.ray import RayFabric
from rapa_dist.initial import initial_kernels
from rapa_dist.layout import machine_of

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as a second user")
CONFIG = resolve(
    tiles=(1, 1, 1),
    channels=(4, 4, 4),
    pooling="max",
    dataset="builtin",
    limit_train=None,
    limit_test=20,
    epochs=5,
    batch_size=10,
    lr_decay_every=25,
    warmup_epochs=1,
    weight_decay=1e-4,
    augment=True,
    seed=0,
)
SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # with which a server of HTTP/2 begins


# --- what the second user leaves for others to take


class Server:
    """Greets as the head of a Ray cluster does, and counts who comes."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.callers = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self.callers += 1
                connection.sendall(SETTINGS)
                connection.recv(1000)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def server() -> Iterator[Server]:
    with closing(Server()) as server:
        yield server


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """Where Ray leaves the address of the cluster that was started last."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(address, "_told", set())
    folder = tmp_path / "ray"
    folder.mkdir(mode=0o777)
    return folder / "ray_current_cluster"


def become_another(monkeypatch) -> None:
    """Have everything that is there be another user's."""
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)


def test_a_cluster_of_ones_own_is_joined(file, server):
    file.write_text(server.address)
    assert find_address(None) == find_address("auto") == (server.address, RUNNING_HERE)


def test_a_cluster_of_another_user_is_not_joined_and_said_whose_once(file, server, monkeypatch, capsys):
    file.write_text(server.address)
    become_another(monkeypatch)
    assert find_address(None) is None
    assert find_address(None) is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    owner = ownership.user_name(file.stat().st_uid)
    for part in (f"at {server.address}", "not used unasked", f"belongs to {owner}", f"--address {server.address}"):
        assert part in said
    with pytest.raises(ClusterError, match=rf"RAY_ADDRESS is auto\. The Ray cluster at .* belongs to {owner}"):
        monkeypatch.setenv("RAY_ADDRESS", "auto") or find_address(None)
    assert server.callers == 0
    assert find_address(server.address) == (server.address, "--address")


def test_doctor_says_whose_it_is(file, server, monkeypatch):
    file.write_text(server.address)
    become_another(monkeypatch)
    check = check_cluster()
    assert check.quantities == {"address": None, "not_used": server.address}
    assert f"{server.address} is not used unasked" in check.value


@pytest.mark.parametrize(("mode", "status"), [(0o644, "warning"), (0o600, "ok"), (None, "ok")])
def test_doctor_says_if_others_can_read_the_users_token(tmp_path, monkeypatch, mode, status):
    token = tmp_path / "auth token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    if mode is not None:
        token.touch()
        token.chmod(mode)
    check = check_token()
    assert (check.status, check.fix) == (status, f"chmod 600 '{token}'" if status == "warning" else "")


@as_root
@pytest.mark.parametrize("whose", ["the file", "the process"])
def test_file_and_process_have_to_be_ones_own_both(file, server, monkeypatch, capsys, whose):
    file.write_text(server.address)
    if whose == "the file":
        os.chown(file, OTHER, OTHER)
    else:
        monkeypatch.setattr(ownership, "_listeners", lambda host, port: [OTHER])
    assert find_address(None) is None
    assert f"It belongs to user {OTHER}" in capsys.readouterr().err
    assert server.callers == 0


@as_root
def test_who_listens_is_the_user_of_the_listening_process():
    make = "import os, socket, sys; os.setuid(int(sys.argv[1])); s = socket.create_server(('127.0.0.1', 0)); "
    code = make + "print(s.getsockname()[1], flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(OTHER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert ownership.owners("127.0.0.1", int(process.stdout.readline())) == {OTHER}
        process.stdin.close()


@pytest.mark.parametrize("listens_at", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_who_listens_is_found_whatever_the_address(listens_at):
    family = socket.AF_INET6 if ":" in listens_at else socket.AF_INET
    try:
        listening = socket.create_server((listens_at, 0), family=family, dualstack_ipv6=listens_at == "::")
    except OSError:
        pytest.skip("this machine has no IPv6")
    with listening:
        host = "::1" if listens_at == "::1" else "127.0.0.1"
        port = listening.getsockname()[1]
        assert ownership.owners(host, port) == {os.getuid()}
    assert ownership.owners(host, port) == set()


@pytest.mark.parametrize("joined", [True, False])
def test_a_cluster_on_another_machine_is_ones_own_if_a_node_of_it_here_is(file, monkeypatch, capsys, joined):
    head = f"203.0.113.1:{10_000 + os.getpid() % 50_000}"  # of a network for examples; its own in each process
    file.write_text(head)
    monkeypatch.setattr(address, "answers", lambda value: True)
    of = head if joined else "203.0.113.2:6379"
    node = ["raylet", "-c", "import sys; print(flush=True); sys.stdin.read()", f"--gcs-address={of}"]
    with subprocess.Popen(node, executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as raylet:
        raylet.stdout.readline()  # now its command line can be seen
        found = find_address(None)
        raylet.stdin.close()
    assert found == ((head, RUNNING_HERE) if joined else None)
    assert joined or "No node of it on this machine is yours" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\x1b]0;codes for a terminal\x07:6379", b"h" * 10**6])
def test_what_is_no_address_is_taken_for_none(file, capsys, content):
    file.write_bytes(content)
    assert find_address(None) is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("what", ["a pipe", "a link to a file of one's own", "a folder"])
def test_what_is_no_regular_file_is_taken_for_none(file, server, what):
    elsewhere = file.with_name("elsewhere")
    elsewhere.write_text(server.address)
    plant = {"a pipe": os.mkfifo, "a folder": os.mkdir}.get(what, lambda file: file.symlink_to(elsewhere))
    plant(file)
    assert find_address(None) is None
    assert server.callers == 0


def test_what_another_users_cluster_left_behind_is_not_worth_a_word(file, server, monkeypatch, capsys):
    file.write_text("127.0.0.1:1")
    become_another(monkeypatch)
    assert find_address(None) is None
    assert capsys.readouterr().err == ""


@pytest.fixture
def cached(tmp_path) -> tuple[Path, Path]:
    """A folder of images, and its cache."""
    source = tmp_path / "images"
    source.mkdir()
    few = ImageSet(images=np.zeros((2, 32, 32, 3), np.uint8), labels=np.array([0, 1]))
    cache.save("images", source, "as it is", cache.Decoded(classes=("a", "b"), train=few, test=few))
    return source, source / cache.BESIDE / "images.npz"


def test_ones_own_cache_of_images_is_read(cached):
    assert cache.load("images", cached[0], "as it is").classes == ("a", "b")


@as_root
@pytest.mark.parametrize(("images", "file", "read"), [(0, OTHER, False), (OTHER, OTHER, True), (OTHER, 0, True)])
def test_a_cache_is_read_if_its_owner_may_say_what_the_images_are(cached, images, file, read):
    os.chown(cached[0], images, images)
    os.chown(cached[1], file, file)
    assert bool(cache.load("images", cached[0], "as it is")) is read


def test_a_cache_that_everybody_may_write_to_is_not_read(cached):
    cached[1].chmod(0o666)
    assert cache.load("images", cached[0], "as it is") is None


@pytest.mark.parametrize("what", ["open to all", "a link"])
def test_a_folder_in_the_place_of_a_home_directory_has_to_be_ones_own(tmp_path, monkeypatch, what):
    monkeypatch.setattr(folders, "home", lambda: None)
    monkeypatch.setattr(folders, "temporary", lambda: tmp_path)
    folder = cache.home_cache()
    assert not folder.exists()
    folder.mkdir(mode=0o700)
    assert cache.home_cache() == folder
    if what == "open to all":
        folder.chmod(0o777)
    else:
        folder.symlink_to(folder.rename(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match=rf"{folder}, which would stand in for it, is not yours alone\. .* set HOME"):
        cache.home_cache()


# --- what the second user finds of a run


class Run(SimpleNamespace):
    """A run on real tiles, made as carelessly as can be: everybody may write where its folders lie, with umask 0."""


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    patch = pytest.MonkeyPatch()
    umask = os.umask(0)
    root = Path(tempfile.mkdtemp(prefix="r2", dir="/tmp"))
    folders = {name: root / name for name in ("shm", "tmp", "runs", "home")}
    try:
        root.chmod(0o755)
        for folder in folders.values():
            folder.mkdir()
            folder.chmod(0o1777)
        for name, folder in (("RAPA_DIST_SHM", "shm"), ("TMPDIR", "tmp"), ("HOME", "home")):
            patch.setenv(name, str(folders[folder]))
        patch.setattr(tempfile, "tempdir", str(folders["tmp"]))
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        directory = RunDirectory.create(folders["runs"] / "r", CONFIG, None)
        directory.log("a line")
        cluster = connect("local", len(machine_of(CONFIG).tiles))
        with RayFabric(
            machine_of(CONFIG), 10**6, initial_kernels(machine_of(CONFIG), 0), run="r", cluster=cluster
        ) as fabric:
            fabric.register("r", directory.path)
            yield Run(root=root, cluster=cluster, fabric=fabric, directory=directory.path, **folders)
        directory.release()
    finally:
        os.umask(umask)
        patch.undo()
        subprocess.run(["rm", "-rf", str(root)], check=True)


@as_root
@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_second_user_reads_joins_and_hands_over_nothing(run, capsys):
    ray_folder, chip = run.cluster.scratch.path, run.fabric._chip.scratch.path
    session = ray_folder / "r" / "session_latest"
    token = ray_folder / "token"
    mine = processes(os.getpid())
    by_name = {name: pid for pid, name in mine.items()}
    at = listening(mine)
    found = services(at, token.read_text())
    assert {name.partition(" (")[0] for name, *_ in found} == set(METHODS)
    assert {port for _, port, _ in found} == set(at)
    given = {
        "folders": {"the run's shared memory": chip, "Ray's folder": ray_folder, "the run directory": run.directory},
        "files": {
            "the token": token,
            "Ray's log": session / "logs" / "raylet.out",
            "the arena": chip / "arena",
            "a kernel": chip / "cells-0",
            "the board": chip / "board",
            "the registration": chip / "run.json",
            "the configuration": run.directory / "config.toml",
            "the run's log": run.directory / "log",
            "the environment": run.directory / "environment.json",
        },
        "sockets": {
            "a tile's doorbell": ("SOCK_DGRAM", chip / "bell-0"),
            "the chip's answers": ("SOCK_DGRAM", chip / "answers"),
            "the raylet": ("SOCK_STREAM", session / "sockets" / "raylet"),
            "the object store": ("SOCK_STREAM", session / "sockets" / "plasma_store"),
        },
        "processes": {
            "the coordinator": os.getpid(),
            **{name: pid for name, pid in by_name.items() if name in ("gcs_server", "raylet") or "Tile" in name},
        },
        "ports": found,
        "addresses": outer_addresses(),
        "shared": run.shm,
        "address": run.cluster.address,
    }
    assert len(given["processes"]) == 4
    for path in [
        *given["files"].values(),
        *given["folders"].values(),
        *(path for _, path in given["sockets"].values()),
    ]:
        assert path.exists()
    tried = subprocess.run(
        [sys.executable, second_user.__file__],
        input=json.dumps(given, default=str),
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [json.loads(line) for line in tried.stdout.splitlines()]
    table = "\n".join(f"| {row['subject']} | {row['deed']} | {row['outcome']} |" for row in rows)
    with capsys.disabled():
        if os.environ.get("RAPA_DIST_TEST_TABLE"):
            sys.stdout.write(f"\n| what | tried | came of it |\n|---|---|---|\n{table}\n")
    assert [row for row in rows if not row["refused"]] == []
    assert len(rows) > 80
    # what a second user sees without asking
    assert set(at.values()) <= {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1
    secret = token.read_bytes()
    assert not [name for pid, name in mine.items() if secret in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert not [name for name in abstract_sockets() if str(run.root) in name]
    # what stays when the run has ended
    assert not list(run.home.iterdir())
    assert not [path for path in run.directory.rglob("*") if path.is_file() and secret in path.read_bytes()]
