"""What a user gets for bad input: an answer at once, and nothing written or started.

Every case goes through the command line as a user types it. Fabric `ray`, the default, is asked for wherever it
can be: a case that gets as far as starting Ray fails.
"""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from rapa_dist import footprint
from rapa_dist.cli import main
from rapa_dist.coordinator.checkpoint import FORMAT
from rapa_dist.data import builtin, cache, download, official
from rapa_dist.fabric import address as address_module
from rapa_dist.fabric import scratch
from rapa_dist.memory import Memory

CLASSES = ("cat", "dog", "newt")
SMALL = ["--limit-train", 20, "--limit-test", 10, "--channels", "2,2,2", "--tiles", "4,1,1"]
TRAIN = ["train", "--dataset", "builtin", *SMALL]
NEEDED = "images:FOLDER needs FOLDER/train/<class>/… and FOLDER/test/<class>/…"
ABSENT = "127.0.0.1:1"  # the port of tcpmux, where nobody has listened for decades


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def files_below(folder: Path) -> dict[str, bytes]:
    """Return all files and their contents, but for locks (empty), logs, and caches of decoded images."""
    unseen = {".lock", "log", cache.BESIDE}
    paths = [path for path in folder.rglob("*") if not unseen.intersection(path.relative_to(folder).parts)]
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in paths}


def make_images(folder: Path, classes: tuple[str, ...] = CLASSES) -> Path:
    for part, n in (("train", 4), ("test", 2)):
        for number, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                colour = (40 * i, 80 * number, 90 if part == "train" else 190)
                Image.new("RGB", (32, 32), colour).save(folder / part / name / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    """Fail if Ray is started, also where the command takes the failure for an error of Ray's."""
    started = []

    def start(**options):
        started.append(options)
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", start)
    yield
    assert not started


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in; no data, no network, no cluster."""

    def refuse(url: str) -> None:
        raise download.Unreachable("no connection to example.org (Name or service not known)")

    monkeypatch.setattr(official, "reach", refuse)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("RAPA_DIST_DATA", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refused(tmp_path):
    """Return a function that asserts that a command line is refused with a message that holds all parts."""

    def check(arguments: list, code: int, *parts: object) -> str:
        before = files_below(tmp_path)
        result = invoke(*arguments, "--json")
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.stderr
        (line,) = result.stdout.splitlines()
        message: str = json.loads(line)["error"]["message"]
        assert f"Error: {message}" in result.stderr
        for part in parts:
            assert str(part) in message
        assert files_below(tmp_path) == before
        return message

    return check


@pytest.fixture
def images(tmp_path) -> Path:
    return make_images(tmp_path / "images")


@pytest.fixture(scope="module")
def first_run(tmp_path_factory) -> tuple[Path, Result]:
    """A run of two epochs on all of twelve images, though more were asked for."""
    folder = tmp_path_factory.mktemp("first")
    images = make_images(folder / "images")
    arguments = ["--dataset", f"images:{images}", "--limit-train", 5000, "--limit-test", 1000, "--epochs", 2]
    options = ["--fabric", "serial", "--run-dir", folder / "run"]
    result = invoke("train", *SMALL, *arguments, *options)
    assert result.exit_code == 0, result.output
    return folder, result


@pytest.fixture
def run(first_run, tmp_path) -> Path:
    """A copy of that run, to do harm to."""
    return shutil.copytree(first_run[0] / "run", tmp_path / "run")


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("*.safetensors"))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


# --- tiles


@pytest.mark.parametrize(
    ("tiles", "parts"),
    [
        ("16,4", ("--tiles", "3 layers", "it has 2: 16,4", "16,4,1")),
        ("16,4,1,1", ("--tiles", "3 layers", "it has 4: 16,4,1,1")),
        ("16", ("3 layers", "it has 1: 16")),
        ("16,0,1", ("--tiles", "at least 1", "it has 0")),
        ("16,-4,1", ("--tiles", "at least 1", "it has -4")),
        ("16,4.5,1", ("--tiles", "integers", "“4.5”", "16,4,1")),
        ("16,four,1", ("integers", "“four”")),
        ("16,,1", ("integers", "“” in “16,,1”")),
        ("", ("integers", "16,4,1")),
        ("1e3,4,1", ("integers", "“1e3”")),
        ("1000000000000000000000,4,1", ("Layer conv0", "at most 1,024", "1,000,000,000,000,000,000,000")),
        ("1025,4,1", ("Layer conv0", "--tiles 1025,4,1", "1,024 patches", "at most 1,024", "is given 1,025")),
        ("16,257,1", ("Layer conv1", "at most 256", "is given 257")),
        ("16,4,65", ("Layer conv2", "at most 64", "is given 65")),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_tiles_that_can_not_work(refused, tiles, parts, more):
    refused(["train", "--tiles", tiles, *more], 2, *parts)


@pytest.mark.parametrize(
    ("scheme", "tiles", "parts"),
    [
        (
            "alternate",
            "12,4,1",
            ("alternate needs a square number", "conv0", "here are 12", "9 or 16", "scheme random"),
        ),
        ("image-overlap", "16,4,2", ("image-overlap needs a square number", "Layer conv2", "here are 2", "1 or 4")),
        ("none", "16,4,1", ("one tile per layer", "Layer conv0", "here are 16", "Use 1")),
    ],
)
def test_tiles_that_do_not_fit_the_scheme(refused, scheme, tiles, parts):
    refused(["train", "--tiles", tiles, "--scheme", scheme], 2, *parts)


def test_more_tiles_than_memory_has_room_for(refused, monkeypatch):
    """Any machine may have more memory than that, so it is no wrong usage."""
    monkeypatch.setattr(footprint, "memory", lambda: Memory(8 * 10**9, 4 * 10**9, False))
    parts = ("1344 tiles", "4,000 MB are available", "tiles would fit", "fewer --tiles")
    refused([*TRAIN, "--tiles", "1024,256,64"], 1, *parts)


# --- other options


@pytest.mark.parametrize(
    ("option", "value", "parts"),
    [
        ("--scheme", "randm", ("one of none, random", "“randm”", "Did you mean random?")),
        ("--pooling", "avrage", ("one of max, average", "“avrage”", "Did you mean average?")),
        ("--fabric", "seriel", ("one of ray, serial, batched", "“seriel”", "Did you mean serial?")),
        ("--epochs", 0, ("--epochs needs at least 1; it is 0",)),
        ("--epochs", -1, ("--epochs needs at least 1; it is -1",)),
        ("--epochs", "ten", ("--epochs", "'ten' is not a valid integer")),
        ("--batch-size", 0, ("--batch-size needs at least 1",)),
        ("--limit-train", 0, ("--limit-train needs at least 1",)),
        ("--limit-test", -5, ("--limit-test needs at least 1; it is -5",)),
        ("--limit-test", 1.5, ("--limit-test", "'1.5' is not a valid integer")),
        ("--lr", "nan", ("--lr needs a number above 0", "it is nan", "0.05")),
        ("--lr", "1e300", ("--lr needs a number above 0 that fits into float32", "1e+300")),
        ("--seed", -1, ("--seed needs at least 0",)),
        ("--channels", "32,0,64", ("--channels", "at least 1")),
        ("--tile", "16,4,1", ("No such option", "--tile", "--tiles")),
    ],
)
def test_options_that_can_not_work(refused, option, value, parts):
    refused(["train", option, value], 2, *parts)


def test_without_json_the_message_is_on_stderr_alone(here):
    result = invoke("train", "--tiles", "16,0,1")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: --tiles needs numbers of at least 1")
    assert not list(here.iterdir())


# --- data


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("cifra10", "'cifar10'?"), ("CIFAR-100", "'cifar100'?"), ("svnh", "'svhn'?"), ("built-in", "'builtin'?")],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_misspelt_data_set_gets_a_suggestion(refused, name, suggestion, more):
    parts = (f"no data set '{name}'", f"Did you mean {suggestion}", "There are: builtin, cifar10, cifar100, svhn")
    refused(["train", "--dataset", name, *more], 2, *parts)


def test_an_unknown_data_set_gets_the_list(refused):
    message = refused(["train", "--dataset", "imagenet"], 2, "'imagenet'", "builtin", "images:FOLDER")
    assert "Did you mean" not in message


def test_a_folder_lacks_the_prefix(refused, images):
    refused(["train", "--dataset", images], 2, f"Did you mean 'images:{images}'?")


@pytest.mark.parametrize(
    ("name", "title", "archive"),
    [
        ("cifar10", "CIFAR-10", "cifar-10-python.tar.gz"),
        ("cifar100", "CIFAR-100", "cifar-100-python.tar.gz"),
        ("svhn", "SVHN", "test_32x32.mat"),
    ],
)
def test_a_named_data_set_that_is_missing_has_no_substitute(refused, tmp_path, name, title, archive):
    parts = (f"{title} is not in {tmp_path / 'data'}", "no connection", archive)
    refused(["train", *SMALL, "--dataset", name, "--data-dir", tmp_path / "data"], 1, *parts)


def test_without_a_name_the_builtin_set_takes_its_place_and_is_recorded(here):
    result = invoke("train", *SMALL, "--epochs", 1, "--fabric", "serial", "--run-dir", "r", "--json")
    assert result.exit_code == 0, result.output
    assert "warning: CIFAR-10 is not in" in result.stderr
    assert json.loads(result.stdout)["finished"]
    assert 'dataset = "builtin"' in (here / "r" / "config.toml").read_text()


def test_no_folder_of_images(refused, tmp_path, images):
    nowhere = tmp_path / "nowhere"
    refused(["train", "--dataset", f"images:{nowhere}"], 1, f"there is no folder {nowhere}", NEEDED)
    refused(["train", "--dataset", "images:"], 2, "lacks the folder", NEEDED)
    shutil.rmtree(images / "test")
    refused(["train", "--dataset", f"images:{images}"], 1, f"{images} has no folder 'test'", NEEDED)


def test_an_empty_class_folder_is_named(refused, images):
    folder = images / "test" / "dog"
    for path in folder.iterdir():
        path.unlink()
    refused(["train", "--dataset", f"images:{images}"], 1, f"no images in {folder}", "at least one file", ".png")


def test_an_undecodable_image_is_named(refused, images):
    path = images / "train" / "newt" / "2.png"
    path.write_bytes(path.read_bytes()[:40])
    refused(["train", "--dataset", f"images:{images}"], 1, "can't be decoded", path, "Replace or delete")


def test_train_and_test_have_different_classes(refused, images):
    (images / "test" / "cat").rename(images / "test" / "kat")
    parts = (str(images), "different classes", "only in train: cat", "only in test: kat", "same classes in both")
    refused(["train", "--dataset", f"images:{images}"], 1, *parts)


def test_a_limit_beyond_the_data_set_takes_all_and_says_so(first_run):
    stderr = first_run[1].stderr
    assert "5,000 train images are wanted, and there are 12; all are used" in stderr
    assert "1,000 test images are wanted, and there are 6; all are used" in stderr
    assert "12 training and 6 test images in 3 classes" in stderr
    assert "test error" in first_run[1].stdout


# --- the run directory


def test_a_run_directory_that_has_a_run(refused, run):
    refused([*TRAIN, "--run-dir", run], 1, f"There is a run in {run} already", "another --run-dir", f"--resume {run}")


def test_a_run_directory_with_somebodys_files(refused, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    parts = ("is not empty, and there is no run in it: it has thesis.tex", "another --run-dir")
    refused([*TRAIN, "--run-dir", tmp_path / "thesis"], 1, *parts)


@pytest.mark.parametrize("where", ["file", "file/run"])
def test_a_run_directory_that_can_not_be_made(refused, tmp_path, where):
    (tmp_path / "file").write_text("mine")
    refused([*TRAIN, "--run-dir", tmp_path / where], 1, tmp_path / where, "Not a directory", "another --run-dir")


def test_a_run_directory_is_looked_at_before_the_data(refused, run, monkeypatch):
    monkeypatch.setattr(builtin, "draw", lambda *arguments: pytest.fail("it may take minutes to load data"))
    refused([*TRAIN, "--run-dir", run], 1, "There is a run in")


def test_a_run_that_another_process_trains(refused, run):
    program = (
        "import fcntl, sys\n"
        "lock = open(sys.argv[1], 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(run / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        refused(["train", "--resume", run], 1, f"{run} is in use by another process", "Wait for it, or stop it")


def test_a_new_run_in_a_directory_that_another_process_has_just_taken(refused, tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        parts = ("in use by another process", "Wait for it, or stop it")
        refused([*TRAIN, "--run-dir", tmp_path / "run", "--fabric", "serial"], 1, *parts)


# --- resuming


def test_a_directory_for_a_run_that_has_one(refused, run):
    refused(["train", "--resume", run, "--run-dir", "r"], 2, "--run-dir and --resume exclude each other")


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_resuming_what_is_no_run(refused, tmp_path, images, more):
    for path in (tmp_path / "nowhere", images, images / "train" / "cat" / "0.png"):
        refused(["train", "--resume", path, *more], 1, f"{path} is no run directory", "config.toml", "rapa-dist train")


@pytest.mark.parametrize(
    ("options", "differences"),
    [
        (["--tiles", "16,4,1"], ["tiles: (4, 1, 1) → (16, 4, 1)"]),
        (["--scheme", "none"], ["scheme: random → none"]),
        (["--lr", 0.5, "--no-augment"], ["lr: 0.05 → 0.5", "augment: True → False"]),
        (["--limit-train", 10], ["limit_train: 5000 → 10"]),
        (["--seed", 7, "--epochs", 9], ["seed: 0 → 7"]),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_options_that_contradict_the_run(refused, run, options, differences, more):
    parts = (str(run), *differences, "Leave these options out", "without --resume")
    message = refused(["train", "--resume", run, *options, *more], 2, *parts)
    assert "epochs" not in message


def test_options_that_repeat_the_run_are_no_contradiction(first_run, run, monkeypatch):
    monkeypatch.chdir(first_run[0])
    options = ["--dataset", "images:images", "--limit-train", 5000, "--epochs", 2]
    result = invoke("train", "--resume", run, *options, "--tiles", "4,1,1", "--fabric", "serial")
    assert result.exit_code == 0, result.output


def test_a_configuration_that_was_edited(refused, run):
    edit(run / "config.toml", "lr = 0.05", "lr = 0.1")
    edit(run / "config.toml", "random", "alternate")
    parts = (newest(run), run / "config.toml", "scheme: alternate → random", "lr: 0.1 → 0.05", "Restore")
    refused(["train", "--resume", run], 1, *parts)
    refused(["evaluate", run], 1, *parts)


@pytest.mark.parametrize(
    ("old", "new"),
    [("lr = ", "lr == "), ("lr = 0.05", "lr = 'fast'"), ("lr = ", "rl = "), ("epochs = 2", "epochs = 0")],
)
def test_a_configuration_that_makes_no_sense(refused, run, old, new):
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace(f"\n{old}", f"\n{new}"))
    for command in (["train", "--resume"], ["evaluate"]):
        refused([*command, run], 1, "config.toml", str(run), "can't be understood", "Restore it")


def test_fewer_epochs_than_the_run_has_behind_it(refused, run):
    parts = (str(run), "has begun 2 epochs", "can't end after 1", "--epochs 2 or more", "without --resume")
    refused(["train", "--resume", run, "--epochs", 1], 2, *parts)
    edit(run / "config.toml", "\nepochs = 2", "\nepochs = 1")
    refused(["train", "--resume", run], 2, *parts)
    refused(["train", "--resume", run, "--epochs", 0], 2, "--epochs needs at least 1")


def test_metrics_that_were_cut_off(refused, run):
    os.truncate(run / "metrics.jsonl", 10)
    refused(["train", "--resume", run], 1, run / "metrics.jsonl", "10 bytes", "restore it, or start a new run")


def test_data_that_changed_since(refused, images, here):
    trained = invoke(
        "train", *SMALL, "--dataset", f"images:{images}", "--epochs", 1, "--fabric", "serial", "--run-dir", "r"
    )
    assert trained.exit_code == 0, trained.output
    Image.new("RGB", (32, 32), (1, 2, 3)).save(images / "train" / "dog" / "more.png")
    parts = (f"images:{images} is not the one", "r was trained on", "Restore it", "--data-dir", "without --resume")
    refused(["train", "--resume", "r", "--epochs", 2], 1, *parts)
    refused(["evaluate", "r"], 1, *parts[:-1], "evaluate --dataset")


# --- checkpoints


def test_a_run_whose_checkpoints_are_gone(refused, run):
    """It is not begun anew: that would take its metrics with it."""
    shutil.rmtree(run / "checkpoints")
    parts = (f"{run} has trained at least one epoch", "checkpoints are gone", "Restore one", "new run without --resume")
    refused(["train", "--resume", run], 1, *parts)


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _nothing_left(path: Path) -> None:
    path.write_bytes(b"")


def _one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _gone(path: Path) -> None:
    path.unlink()


def _sidecar_cut_short(path: Path) -> None:
    _cut_short(path.with_suffix(".json"))


def _other_progress(path: Path) -> None:
    edit(path.with_suffix(".json"), '"epoch": 2', '"epoch": 1')


def _other_digest(path: Path) -> None:
    sidecar = path.with_suffix(".json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"sha256": 64 * "0"}))


def _older_weights(path: Path) -> None:
    shutil.copy(min(path.parent.glob("*.safetensors")), path)


HARM = [
    _cut_short,
    _nothing_left,
    _one_bit,
    _gone,
    _sidecar_cut_short,
    _other_progress,
    _other_digest,
    _older_weights,
]


@pytest.mark.parametrize("harm", HARM, ids=lambda harm: harm.__name__.strip("_"))
def test_a_damaged_checkpoint_and_its_way_out(refused, run, harm):
    path = newest(run)
    harm(path)
    for command in (["train", "--resume"], ["evaluate"]):
        refused([*command, run], 1, path, "Delete it with its other file to go on from the checkpoint before")
    for file in (path, path.with_suffix(".json")):
        file.unlink(missing_ok=True)
    assert invoke("evaluate", run).exit_code == 0
    again = invoke("train", "--resume", run, "--fabric", "serial")
    assert again.exit_code == 0, again.output
    assert newest(run) == path


def test_a_checkpoint_of_another_format(refused, run):
    edit(newest(run).with_suffix(".json"), f'"format": {FORMAT}', '"format": 77')
    refused(["train", "--resume", run], 1, newest(run), "format 77, expected", "Use the rapa-dist that wrote it")


def test_a_checkpoint_of_another_run(refused, run):
    other = invoke(*TRAIN, "--epochs", 1, "--tiles", "1,1,1", "--fabric", "serial", "--run-dir", "other")
    assert other.exit_code == 0, other.output
    for path in Path("other/checkpoints").iterdir():
        shutil.copy(path, run / "checkpoints" / path.name.replace("step-0", "step-9"))
    differences = ("tiles: (4, 1, 1) → (1, 1, 1)", "scheme: random → none")
    for command in (["train", "--resume"], ["evaluate"]):
        refused([*command, run], 1, newest(run), "another configuration", *differences)


# --- the machine


def test_too_little_shared_memory(refused, monkeypatch):
    monkeypatch.setattr(scratch, "free_bytes", lambda root: 1_000_000)
    root = os.environ["RAPA_DIST_SHM"]
    parts = ("Too little shared memory", f"MB in {root}, 1 MB are free", "--batch-size", "--shm-size", "RAPA_DIST_SHM")
    refused(TRAIN, 1, *parts)


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_shared_memory_that_is_no_folder(refused, monkeypatch, tmp_path, kind):
    place = tmp_path / "shm"
    if kind == "a file":
        place.write_text("")
        place.chmod(0o700)
    monkeypatch.setenv("RAPA_DIST_SHM", str(place))
    refused(TRAIN, 1, f"RAPA_DIST_SHM is {place}", "no folder", "Correct or unset it")


def test_shared_memory_with_too_long_a_name_for_sockets(refused, monkeypatch, tmp_path):
    place = tmp_path / ("long" * 20)
    place.mkdir()
    monkeypatch.setenv("RAPA_DIST_SHM", str(place))
    refused(TRAIN, 1, place, "too long", "107 are allowed", "Set RAPA_DIST_SHM to a folder with a shorter name")


@pytest.fixture
def running_cluster(monkeypatch):
    """Pretend that a cluster with two nodes, of three tiles each, runs at 10.0.0.1:6379; one tile is taken."""

    class Context:
        def get_node_id(self) -> str:
            return "a"

    nodes = [
        {"NodeID": name, "Alive": True, "NodeManagerAddress": address, "Resources": {"CPU": 2.0, "analog_tile": tiles}}
        for name, address, tiles in (("a", "10.0.0.1", 3.0), ("b", "10.0.0.2", 3.0))
    ]
    left = []
    monkeypatch.setattr(address_module, "answers", lambda address: address == "10.0.0.1:6379")
    monkeypatch.setattr("ray.init", lambda **options: None)
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    free = {"a": {"analog_tile": 2.0}, "b": {"analog_tile": 3.0}}
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: free)
    monkeypatch.setattr("ray.get_runtime_context", Context)
    monkeypatch.setattr("ray.shutdown", lambda: left.append(True))
    yield nodes
    assert left, "still connected"


def test_too_few_tiles_on_the_cluster(refused, running_cluster):
    offer = "5 are free on the nodes that can be used (10.0.0.1 (this node): 3, 2 free; 10.0.0.2: 3)"
    ways_out = ("--resources", '"analog_tile": 1', "fewer --tiles", "--address local")
    refused([*TRAIN, "--address", "10.0.0.1:6379"], 1, "needs 6 analog_tile", offer, *ways_out)


def test_too_few_tiles_that_are_free(refused, running_cluster):
    running_cluster[0]["Resources"]["analog_tile"] = 8.0
    parts = ("needs 6 analog_tile", "(this node): 8, 2 free", "5 are free", "wait for other runs to end")
    refused([*TRAIN, "--address", "10.0.0.1:6379"], 1, *parts)


def test_a_cluster_without_any_tiles(refused, running_cluster):
    for node in running_cluster:
        del node["Resources"]["analog_tile"]
    refused([*TRAIN, "--address", "10.0.0.1:6379"], 1, "10.0.0.1 (this node): 0; 10.0.0.2: 0")


# --- the address


def asked_for(address: str, source: str, monkeypatch: pytest.MonkeyPatch) -> list:
    """Return a command line that asks for a cluster, by option or from the environment."""
    if source == "RAY_ADDRESS":
        monkeypatch.setenv(source, address)
        return TRAIN
    return [*TRAIN, source, address]


SOURCES = pytest.mark.parametrize("source", ["--address", "RAY_ADDRESS"])


@SOURCES
def test_an_address_where_nobody_listens(refused, monkeypatch, source):
    arguments = asked_for(ABSENT, source, monkeypatch)
    start = time.monotonic()
    refused(arguments, 1, f"answers at {ABSENT} ({source})", "ray start --head", "correct the address", "leave it out")
    assert time.monotonic() - start < 5


@SOURCES
@pytest.mark.parametrize("address", ["foo", "6379", ":6379", "localhost:", "localhost:http", "host:0", "host:65536"])
def test_an_address_that_is_none(refused, monkeypatch, source, address):
    arguments = asked_for(address, source, monkeypatch)
    refused(arguments, 2, f"{source} needs host:port", "10.0.0.1:6379", "“local”", f"“{address}”")


@SOURCES
def test_ray_client_is_no_address(refused, monkeypatch, source):
    arguments = asked_for("ray://127.0.0.1:10001", source, monkeypatch)
    refused(arguments, 2, f"{source} is ray://127.0.0.1:10001", "on a node of the cluster", "host:port")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n"])
def test_an_address_where_something_else_answers(refused, answer):
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(answer)
                connection.recv(1000)

        thread = threading.Thread(target=serve)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        refused([*TRAIN, "--address", address], 1, f"No Ray cluster answers at {address}")
        thread.join()


def test_an_address_where_somebody_listens_and_is_silent(refused):
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        start = time.monotonic()
        refused([*TRAIN, "--address", address], 1, f"No Ray cluster answers at {address}")
        assert time.monotonic() - start < 10


# --- evaluate


def test_evaluating_what_is_no_run(refused, tmp_path, images):
    for path in (tmp_path / "nowhere", images):
        refused(["evaluate", path], 1, f"{path} is no run directory", "config.toml", "rapa-dist train")
    refused(["evaluate"], 2, "RUN_DIR")


def test_a_run_without_checkpoints(refused, run):
    shutil.rmtree(run / "checkpoints")
    parts = (f"no checkpoint in {run / 'checkpoints'}", "another run directory", "start a new run")
    refused(["evaluate", run], 1, *parts)


def test_a_checkpoint_that_is_not_there(refused, run):
    names = [path.stem for path in (run / "checkpoints").glob("*.json")]
    assert len(names) == 3
    for name in ("newst", "step-5", "../../other"):
        refused(["evaluate", run, "--checkpoint", name], 1, f"no checkpoint “{name}”", *names)


@pytest.mark.parametrize("votes", [0, -3])
def test_no_votes(refused, run, votes):
    refused(["evaluate", run, "--votes", votes], 2, f"--votes needs at least 1; it is {votes}")


@pytest.mark.parametrize("options", [["--tiles", "1,1,1"], ["--scheme", "alternate"], ["--scheme", "random-fixed"]])
def test_votes_that_would_all_agree(refused, options):
    trained = invoke(*TRAIN, "--epochs", 1, *options, "--fabric", "serial", "--run-dir", "r")
    assert trained.exit_code == 0, trained.output
    parts = (f"scheme {'none' if options[0] == '--tiles' else options[1]}", "would agree", "Leave --votes out")
    refused(["evaluate", "r", "--votes", 5], 2, *parts)


def test_a_data_set_with_other_classes(refused, run, tmp_path):
    refused(["evaluate", run, "--dataset", "builtin"], 1, "knows 3 classes, builtin has 10", "the same classes")
    pair = make_images(tmp_path / "pair", ("cat", "dog"))
    refused(["evaluate", run, "--dataset", f"images:{pair}"], 1, f"knows 3 classes, images:{pair} has 2")


def test_data_to_evaluate_on_that_can_not_be_had(refused, run, tmp_path):
    refused(["evaluate", run, "--dataset", "cifra10"], 2, "Did you mean 'cifar10'?")
    refused(["evaluate", run, "--dataset", f"images:{tmp_path / 'nowhere'}"], 1, "there is no folder", NEEDED)
    refused(["evaluate", run, "--dataset", "svhn", "--data-dir", tmp_path], 1, f"SVHN is not in {tmp_path}")
    refused(["evaluate", run, "--limit-test", 0], 2, "--limit-test", "at least 1; got 0")
    refused(["evaluate", run, "--seed", -1], 2, "--seed needs at least 0; it is -1")


# --- in a process of its own, as it is started


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "part"),
    [
        (["--tiles", "16,0,1"], {}, 2, "--tiles needs numbers of at least 1"),
        ([], {"RAPA_DIST_SHM": "/nowhere"}, 1, "RAPA_DIST_SHM is /nowhere"),
        ([], {"RAY_ADDRESS": ABSENT}, 1, f"No Ray cluster answers at {ABSENT} (RAY_ADDRESS)"),
    ],
)
def test_a_process_ends_with_one_object_a_message_and_nothing_else(here, arguments, environment, code, part):
    command = [sys.executable, "-m", "rapa_dist", *map(str, TRAIN), *arguments, "--json"]
    around = os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, env=around, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    (line,) = done.stdout.splitlines()
    assert part in json.loads(line)["error"]["message"]
    assert f"Error: {part}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(here.iterdir())


def test_a_cluster_for_a_fabric_that_uses_none(refused):
    parts = ("--address is for the fabric ray", "--fabric serial", "Leave one of them out")
    refused([*TRAIN, "--fabric", "serial", "--address", "10.0.0.1:6379"], 2, *parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--fabric", "batched", "--device", "cuda"), ("--device cuda needs a GPU", "Use --device cpu")),
        (("--fabric", "batched", "--device", "gpu"), ("--device is cpu or cuda", "“gpu”")),
        (("--fabric", "serial", "--device", "cpu"), ("--device is for the fabric batched", "fabric is serial")),
        (("--device", "cuda"), ("--device is for the fabric batched", "fabric is ray", "Add --fabric batched")),
    ],
)
def test_a_device_that_is_not_there_or_not_used(refused, monkeypatch, options, parts):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused([*TRAIN, *options], 2, *parts)


def test_the_enlarged_network_with_other_channels(refused):
    parts = ("--scheme enlarged is the untiled network with --channels 54,64,64", "not 8,8,8")
    refused(["train", "--dataset", "builtin", "--scheme", "enlarged", "--channels", "8,8,8"], 2, *parts)
