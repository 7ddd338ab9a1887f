"""CIFAR-10, CIFAR-100, SVHN and MNIST, on small archives in their official formats; nothing here needs a network."""

import gc
import hashlib
import http.server
import pickle
import socket
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.io

from rapa_dist.data import cache, download, find_datasets, load_dataset, official, vision
from rapa_dist.errors import DataError

datasets = vision.torchvision().datasets
NAMES_10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
NAMES_100 = [f"thing{i:02}" for i in range(100)]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the user's own data and caches out of sight."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAPA_DIST_DATA", raising=False)
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Be without a network; return what was asked for."""
    asked: list[str] = []

    def refuse(url: str) -> None:
        asked.append(url)
        raise download.Unreachable("no connection to example.org (Name or service not known)")

    monkeypatch.setattr(official, "reach", refuse)
    return asked


# Makers of the official formats


class _OldType:
    """Pickles as a uint8 dtype did when the official archives were made, for which NumPy warns."""

    def __reduce__(self) -> tuple[object, ...]:
        return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)


class _OldArray:
    """Pickles as an array of them."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __reduce__(self) -> tuple[object, ...]:
        make = np.zeros(0).__reduce__()[0]
        return make, (np.ndarray, (0,), b"b"), (1, self.array.shape, _OldType(), False, self.array.tobytes())


def _random(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    labels[0] = 0
    return rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), labels


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _cifar_file(path: Path, images: np.ndarray, labels: np.ndarray, key: str) -> None:
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
    path.write_bytes(pickle.dumps({"data": _OldArray(rows), key: labels.tolist(), "batch_label": "x"}, protocol=2))


class Truth:
    """What was put into an archive."""

    def __init__(self, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> None:
        self.train, self.test = train, test


def _make_cifar10(place: Path, monkeypatch: pytest.MonkeyPatch) -> Truth:
    folder = place / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    batches = [_random(8, 10, seed) for seed in range(6)]
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, (images, labels) in zip(names, batches, strict=True):
        _cifar_file(folder / name, images, labels, "labels")
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES_10}, protocol=2))
    sums = [[name, _md5(folder / name)] for name in names]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": _md5(folder / "batches.meta")})
    train = [np.concatenate(parts) for parts in zip(*batches[:5], strict=True)]
    return Truth((train[0], train[1]), batches[5])


def _make_cifar100(place: Path, monkeypatch: pytest.MonkeyPatch) -> Truth:
    folder = place / "cifar-100-python"
    folder.mkdir(parents=True)
    train, test = _random(30, 100, 0), _random(12, 100, 1)
    _cifar_file(folder / "train", *train, "fine_labels")
    _cifar_file(folder / "test", *test, "fine_labels")
    meta = {"fine_label_names": NAMES_100, "coarse_label_names": ["x"]}
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", _md5(folder / "train")]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", _md5(folder / "test")]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", datasets.CIFAR100.meta | {"md5": _md5(folder / "meta")})
    return Truth(train, test)


def _make_svhn(place: Path, monkeypatch: pytest.MonkeyPatch) -> Truth:
    place.mkdir(parents=True, exist_ok=True)
    parts = {"train": _random(20, 10, 0), "test": _random(10, 10, 1)}
    split_list = dict(datasets.SVHN.split_list)
    for part, (images, labels) in parts.items():
        path = place / f"{part}_32x32.mat"
        digits = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]  # SVHN writes a zero as 10
        scipy.io.savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": digits})
        split_list[part] = [split_list[part][0], path.name, _md5(path)]
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    return Truth(parts["train"], parts["test"])


def _pack(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace CIFAR-10's folder by its archive."""
    archive = place / "cifar-10-python.tar.gz"
    folder = place / "cifar-10-batches-py"
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, folder.name)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", _md5(archive))
    return archive


MAKERS = {"cifar10": _make_cifar10, "cifar100": _make_cifar100, "svhn": _make_svhn}


@pytest.mark.parametrize("name", MAKERS)
def test_official_formats(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = MAKERS[name](tmp_path / "data", monkeypatch)
    for _ in range(2):  # read, then cached
        data = load_dataset(name, data_dir=tmp_path / "data")
        gc.collect()  # a file left open would be seen here
        assert data.name == name
        expected = {"cifar10": NAMES_10, "cifar100": NAMES_100, "svhn": [str(i) for i in range(10)]}[name]
        assert list(data.classes) == expected
        for part, (images, labels) in ((data.train, truth.train), (data.test, truth.test)):
            np.testing.assert_array_equal(part.images, images)
            np.testing.assert_array_equal(part.labels, labels)
            assert part.images.flags.c_contiguous
        monkeypatch.setattr(vision, "read_official", lambda *_: pytest.fail("it was read again"))
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "data" / cache.BESIDE / f"{name}.npz").is_file()


def test_a_change_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_cifar10(tmp_path, monkeypatch)
    load_dataset("cifar10", data_dir=tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"CIFAR-10 in .* is incomplete or damaged"):
        load_dataset("cifar10", data_dir=tmp_path)


def test_an_archive_is_unpacked_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: list[str]
) -> None:
    truth = _make_cifar10(tmp_path, monkeypatch)
    _pack(tmp_path, monkeypatch)
    data = load_dataset("cifar10", data_dir=tmp_path)
    np.testing.assert_array_equal(data.train.images, truth.train[0])
    assert offline == []


def test_without_a_name_cifar10_is_taken_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_cifar10(tmp_path, monkeypatch)
    assert load_dataset(None, data_dir=tmp_path).name == "cifar10"


def test_where_data_sets_are_looked_for(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_cifar10(home / "data", monkeypatch)
    assert load_dataset("cifar10").name == "cifar10"
    monkeypatch.setenv("RAPA_DIST_DATA", str(tmp_path / "named"))
    with pytest.raises(DataError, match=r"CIFAR-10 is not in .*/named, and it can't be fetched"):
        load_dataset("cifar10")
    _make_cifar10(tmp_path / "named", monkeypatch)
    assert load_dataset("cifar10").name == "cifar10"
    with pytest.raises(DataError, match=r"not in .*/given"):
        load_dataset("cifar10", data_dir=tmp_path / "given")


# What is missing or damaged


@pytest.mark.parametrize("name", MAKERS)
def test_a_missing_data_set_is_an_error_that_says_what_to_do(name: str, tmp_path: Path, offline: list[str]) -> None:
    with pytest.raises(DataError) as error:
        load_dataset(name, data_dir=tmp_path / "none")
    message = str(error.value)
    data = official.OFFICIAL[name]
    assert f"{data.title} is not in {tmp_path / 'none'}, and it can't be fetched: no connection to" in message
    assert all(archive in message for archive in data.archives)
    assert len(offline) == 1
    assert not (tmp_path / "none").exists()


def _cut_short(place: Path) -> None:
    path = place / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes()[:100])


def _one_file_missing(place: Path) -> None:
    (place / "cifar-10-batches-py" / "test_batch").unlink()


def _no_names(place: Path) -> None:
    (place / "cifar-10-batches-py" / "batches.meta").write_bytes(b"x")


@pytest.mark.parametrize("harm", [_cut_short, _one_file_missing, _no_names])
def test_a_damaged_data_set_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], None]
) -> None:
    _make_cifar10(tmp_path, monkeypatch)
    harm(tmp_path)
    with pytest.raises(
        DataError, match=r"CIFAR-10 in .* is incomplete or damaged: .*, and it can't be fetched: no conn"
    ):
        load_dataset("cifar10", data_dir=tmp_path)
    assert not list(tmp_path.rglob("*.npz"))


def test_a_damaged_archive_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_cifar10(tmp_path, monkeypatch)
    archive = _pack(tmp_path, monkeypatch)
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(DataError, match="incomplete or damaged"):
        load_dataset("cifar10", data_dir=tmp_path)


def test_a_whole_data_set_is_preferred_to_a_damaged_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".cache" / "rapa-dist" / "cifar-10-batches-py").mkdir(parents=True)
    _make_cifar10(home / "data", monkeypatch)
    assert len(load_dataset("cifar10").train) == 40


def test_half_of_svhn_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_svhn(tmp_path, monkeypatch)
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(DataError, match=r"SVHN in .* is incomplete or damaged"):
        load_dataset("svhn", data_dir=tmp_path)


def test_a_data_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="CIFAR-10 is not in"):
        load_dataset("cifar10", data_dir=tmp_path / "file")


# Fetching, from a server of our own


class Server:
    """Serves files of a folder; counts what was asked for."""

    def __init__(self, folder: Path) -> None:
        asked = self.asked = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args: object) -> None:
                super().__init__(*args, directory=str(folder))

            def log_message(self, format: str, *args: object) -> None:
                asked.append(f"{self.command} {self.path}")

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Be on a network, on which only this server is."""
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(official, "reach", download.reach)
    for name, data in official.OFFICIAL.items():
        monkeypatch.setitem(official.OFFICIAL, name, replace(data, url=server.url))
    yield server
    server.close()


@pytest.mark.parametrize("name", ["cifar10", "svhn", None])
def test_what_is_missing_is_fetched(
    name: str | None, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = name or "cifar10"
    truth = MAKERS[kind](tmp_path / "served", monkeypatch)
    if kind == "cifar10":
        _pack(tmp_path / "served", monkeypatch)
    data = load_dataset(name, data_dir=tmp_path / "new" / "folder")
    assert data.name == kind
    np.testing.assert_array_equal(data.test.images, truth.test[0])
    assert not list((tmp_path / "new" / "folder").glob(".*.part"))
    asked = len(server.asked)
    load_dataset(name, data_dir=tmp_path / "new" / "folder")
    assert len(server.asked) == asked


def test_what_is_damaged_is_fetched_again(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_svhn(tmp_path / "served", monkeypatch)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train_32x32.mat").write_bytes((tmp_path / "served" / "train_32x32.mat").read_bytes())
    (tmp_path / "data" / "test_32x32.mat").write_bytes(b"half of it")
    assert len(load_dataset("svhn", data_dir=tmp_path / "data").test) == 10
    assert [line for line in server.asked if line.startswith("GET")] == ["GET /test_32x32.mat"]


def test_a_file_that_comes_damaged_is_not_kept(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_cifar10(tmp_path / "served", monkeypatch)
    archive = _pack(tmp_path / "served", monkeypatch)
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"it can't be fetched: .*tar.gz: what came doesn't have the checksum"):
        load_dataset("cifar10", data_dir=tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_file_that_is_gone_from_the_server(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"it can't be fetched: .*tar.gz: File not found"):
        load_dataset("cifar10", data_dir=tmp_path / "data")


def test_an_interrupted_download_leaves_no_file(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make_cifar10(tmp_path / "served", monkeypatch)
    _pack(tmp_path / "served", monkeypatch)

    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(download.vision, "is_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download.download(f"{server.url}/cifar-10-python.tar.gz", tmp_path / "x.tar.gz", "0")
    assert not list(tmp_path.glob("*x.tar.gz*"))


def test_a_folder_that_cannot_be_written_to(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"CIFAR-10 is not in .*, and it can't be fetched: .*File exists"):
        load_dataset("cifar10", data_dir=tmp_path / "file")


def test_reaching_nobody_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "REACH_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        with pytest.raises(download.Unreachable, match=r"no connection to 127\.0\.0\.1 \(Connection refused\)"):
            download.reach(f"http://127.0.0.1:{port}/x")
        silent.listen()
        with pytest.raises(download.Unreachable, match=r"127\.0\.0\.1"):
            download.reach(f"http://127.0.0.1:{port}/x")


def test_a_name_that_is_never_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up a name has no time-out of its own, and may take long without a network."""
    release = threading.Event()

    def urlopen(*_: object, **__: object) -> None:
        release.wait(10)
        raise OSError("too late")

    monkeypatch.setattr(download, "REACH_S", 0.05)
    monkeypatch.setattr(download.urllib.request, "urlopen", urlopen)
    with pytest.raises(download.Unreachable, match=r"host.invalid doesn't answer"):
        download.reach("http://host.invalid/x")
    release.set()


# torchvision itself


def test_the_catalogue_is_torchvisions() -> None:
    for kind, loader in (("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)):
        data = official.OFFICIAL[kind]
        assert data.folder == loader.base_folder
        assert [f"{data.url}/{name}" for name in data.archives] == [loader.url]
        files = [*(name for name, _ in loader.train_list + loader.test_list), loader.meta["filename"]]
        assert list(data.files) == files
    svhn = [datasets.SVHN.split_list[part] for part in ("train", "test")]
    data = official.OFFICIAL["svhn"]
    assert [f"{data.url}/{name}" for name in data.archives] == [url for url, _, _ in svhn]
    assert [*data.files] == [*data.archives] == [name for _, name, _ in svhn]
    assert set(vision.checksums("svhn")) == set(data.archives)
    for kind, loader in (("mnist", datasets.MNIST), ("fashion-mnist", datasets.FashionMNIST)):
        data = official.OFFICIAL[kind]
        assert any(f"{data.url}/" == mirror for mirror in loader.mirrors)
        assert data.folder == f"{loader.__name__}/raw"
        assert set(vision.checksums(kind)) == set(data.archives)
    assert list(official.OFFICIAL["fashion-mnist"].classes) == datasets.FashionMNIST.classes


def test_status_of_torchvision() -> None:
    status = vision.vision_status()
    assert status.version is not None
    assert status.operators == (status.problem is None)


class _Imports:
    """Stands in for `importlib`: raises in turn, then returns a module."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.empty: list[bool] = []

    def import_module(self, name: str) -> ModuleType:
        module = sys.modules.get(vision.META_REGISTRATIONS)
        self.empty.append(module is not None and not hasattr(module, "register_meta"))
        if self.errors:
            raise self.errors.pop(0)
        return ModuleType(name)


@pytest.fixture
def unimported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, vision.META_REGISTRATIONS, ModuleType("kept"))
    monkeypatch.delitem(sys.modules, vision.META_REGISTRATIONS)


@pytest.mark.usefixtures("unimported")
@pytest.mark.parametrize("missing", [False, True])
def test_fake_kernels_are_left_out_only_where_they_fail(missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    imports = _Imports(*[RuntimeError(vision.MISSING_OPERATORS)] * missing)
    monkeypatch.setattr(vision, "importlib", imports)
    assert vision.torchvision.__wrapped__().__name__ == "torchvision"
    assert imports.empty == ([False, True] if missing else [False])
    assert (vision.META_REGISTRATIONS in sys.modules) == missing


@pytest.mark.usefixtures("unimported")
@pytest.mark.parametrize(
    "error", [RuntimeError("something else"), ModuleNotFoundError("No module named 'torchvision'")]
)
def test_another_failure_is_told(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "importlib", _Imports(error))
    with pytest.raises(DataError, match=f"can't be imported: {error}"):
        vision.torchvision.__wrapped__()
    assert vision.META_REGISTRATIONS not in sys.modules

    def fail() -> ModuleType:
        raise DataError(str(error))

    monkeypatch.setattr(vision, "torchvision", fail)
    assert vision.vision_status() == vision.VisionStatus(version=None, operators=False, problem=str(error))


# What is there


def test_find_datasets(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: list[str]) -> None:
    found = {data.name: data for data in find_datasets()}
    assert list(found) == ["builtin", "cifar10", "cifar100", "svhn", "mnist", "fashion-mnist", "images:FOLDER"]
    assert [data.found for data in found.values()] == [True, False, False, False, False, False, False]
    assert all(data.where is None for data in found.values())
    assert "cifar-10-python.tar.gz into" in found["cifar10"].how

    _make_cifar10(home / "data", monkeypatch)
    _make_svhn(home / ".cache" / "rapa-dist", monkeypatch)
    for part in ("train", "test"):
        (home / "data" / part / "cat").mkdir(parents=True)
    found = {data.name: data for data in find_datasets()}
    assert found["cifar10"].where == home / "data"
    assert found["svhn"].where == home / ".cache" / "rapa-dist"
    assert found[f"images:{home / 'data'}"].found
    assert not found["cifar100"].found
    assert not any(data.found for data in find_datasets(tmp_path / "none") if data.name != "builtin")
    assert offline == []
