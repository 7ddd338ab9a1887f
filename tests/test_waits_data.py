"""Nothing waits without an end: for servers that are slow, and files that are none."""

import os
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from rapa_dist.chaos.nodes import LocalNodes
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.data import download, load_dataset
from rapa_dist.data.cache import BESIDE
from rapa_dist.errors import DataError, RunDirectoryError, UsageError

# --- servers that are slow


@pytest.fixture
def server():
    """Serve one file over and over, as a function of the connection says; return its address."""
    over, threads = threading.Event(), []

    def start(send: Callable[[socket.socket, threading.Event], None]) -> str:
        listener = socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            with listener, listener.accept()[0] as connection, suppress(OSError):
                connection.recv(4096)
                send(connection, over)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/images.tar.gz"

    yield start
    over.set()
    for thread in threads:
        thread.join()


def drip(head: bytes, piece: bytes, pause_s: float) -> Callable[[socket.socket, threading.Event], None]:
    def send(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(head)
        while not over.wait(pause_s):
            connection.sendall(piece)

    return send


@pytest.mark.parametrize(
    ("send", "said"),
    [
        (
            drip(b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n", b"x", 0.02),
            "comes too slowly, .* 20,000 a second",
        ),
        (drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 50_000, 0.01), "more than 0 MB come"),
        (drip(b"HTTP/1.1 200 OK\r\nX: ", b"x", 0.02), "does not answer in time"),
    ],
    ids=["body", "without an end", "headers"],
)
def test_a_download_that_drips_or_has_no_end_is_given_up(server, tmp_path, monkeypatch, send, said):
    monkeypatch.setattr(download, "PACE_S", 0.3)
    monkeypatch.setattr(download, "STALL_S", 0.4)
    monkeypatch.setattr(download, "LARGEST", 500_000)
    began = time.monotonic()
    with pytest.raises(download.Unreachable, match=said):
        download.download(server(send), tmp_path / "images.tar.gz", "0" * 32)
    assert time.monotonic() - began < 5
    assert not list(tmp_path.iterdir())


# --- files that are none


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def a_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero: it has no end
    except PermissionError:
        pytest.skip("devices can't be made here")


def a_link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


SPECIAL = (a_pipe, a_socket, a_device, a_link_to_a_device, Path.mkdir)


@pytest.fixture
def short_path():
    """A folder with a short name, as sockets need."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", SPECIAL, ids=lambda make: make.__name__)
def test_an_image_that_is_no_file_is_refused_at_once(short_path, make):
    for number, part in enumerate(("train", "test")):
        for name in ("a", "b"):
            (short_path / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (number, 0, 0)).save(short_path / part / name / "good.png")
    make(short_path / "train" / "b" / "bad.png")
    if make is Path.mkdir:  # an ordinary folder, whatever its name
        assert len(load_dataset(f"images:{short_path}").train) == 2
        return
    with pytest.raises(DataError, match=r"bad\.png \(it is a (pipe|socket|device), not a file\)"):
        load_dataset(f"images:{short_path}")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", SPECIAL, ids=lambda make: make.__name__)
def test_a_cache_that_is_no_file_is_not_waited_for(short_path, make, monkeypatch):
    monkeypatch.setenv("HOME", str(short_path))
    for part in ("train", "test"):
        for name in ("a", "b"):
            (short_path / "images" / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(short_path / "images" / part / name / "good.png")
    (short_path / "images" / BESIDE).mkdir()
    make(short_path / "images" / BESIDE / "images.npz")
    assert len(load_dataset(f"images:{short_path}/images").train) == 2


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", SPECIAL[:-1], ids=lambda make: make.__name__)
def test_a_run_directory_that_is_none_is_refused_at_once(short_path, make):
    make(short_path / "run")
    with pytest.raises(RunDirectoryError, match="run"):
        RunDirectory.check_new(short_path / "run")
    with pytest.raises(RunDirectoryError, match="run"):
        _ = RunDirectory(short_path / "run").config


@pytest.mark.timeout(20)
def test_the_description_of_a_local_cluster_is_read_from_files_alone(tmp_path):
    os.mkfifo(tmp_path / "nodes")
    with pytest.raises(UsageError, match="it is a pipe, not a file"):
        LocalNodes(tmp_path)
