import hashlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from factories import initial_digital
from safetensors.numpy import load_file, save_file

from rapa_dist.config import resolve
from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.coordinator.checkpoint import Checkpoint, Progress, latest, name_of, prune, read, write
from rapa_dist.errors import CheckpointError
from rapa_dist.files import write_whole
from rapa_dist.initial import initial_kernels
from rapa_dist.layout import machine_of

CONFIG = resolve(
    classes=10,
    tiles=(4, 2, 1),
    channels=(2, 3, 2),
    pooling="max",
    dataset="builtin",
    limit_train=None,
    limit_test=20,
    epochs=10,
    batch_size=10,
    lr_decay_every=25,
    warmup_epochs=1,
    weight_decay=1e-4,
    augment=True,
    seed=0,
)
CLASSES = 10


def a_checkpoint(step=7, seed=0):
    return Checkpoint(
        config=CONFIG,
        arrays=tuple(array.name for array in machine_of(CONFIG).arrays),
        data_fingerprint="0123abcd",
        data_mean=[0.1, 1 / 3, 0.7],
        classes=tuple(f"class {i}" for i in range(CLASSES)),
        progress=Progress(epoch=1, step=step, step_in_epoch=2, loss_sum=0.1 + 0.2, wrong=3, seen=20, metrics_bytes=99),
        kernels=initial_kernels(machine_of(CONFIG), seed),
        digital=initial_digital(machine_of(CONFIG), CLASSES, seed),
    )


def assert_same(one, other):
    assert one.config == other.config
    assert one.progress == other.progress
    assert (one.data_fingerprint, one.data_mean, one.classes) == (
        other.data_fingerprint,
        other.data_mean,
        other.classes,
    )
    assert [k.tobytes() for k in one.kernels] == [k.tobytes() for k in other.kernels]
    assert [k.shape for k in one.kernels] == [k.shape for k in other.kernels]
    assert {n: v.tobytes() for n, v in one.digital.items()} == {n: v.tobytes() for n, v in other.digital.items()}


def refused(path, *parts):
    """Assert that a checkpoint is refused with a message that names it and holds all parts."""
    with pytest.raises(CheckpointError) as caught:
        read(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)


# --- round trip


def test_a_checkpoint_comes_back_bit_by_bit(tmp_path):
    written = a_checkpoint()
    written.kernels[0][0, 0, 0] = np.float32(-0.0)
    written.kernels[1][1, 2, 1] = np.nextafter(np.float32(1), np.float32(2))
    path = write(tmp_path, name_of(7, 1), written)
    assert path == tmp_path / "step-000000007-epoch-00001.safetensors"
    assert_same(read(path), written)


def test_the_tensors_have_the_names_and_shapes_that_others_rely_on(tmp_path):
    tensors = load_file(write(tmp_path, name_of(7, 1), a_checkpoint()))
    assert {name: value.shape for name, value in tensors.items()} == {
        "conv0.kernels": (4, 76, 2),
        "conv1.kernels": (2, 51, 3),
        "conv2.kernels": (1, 76, 2),
        "head.weight": (10, 32),
        "head.bias": (10,),
    }


def test_a_checkpoint_leaves_nothing_but_its_two_files(tmp_path):
    write(tmp_path, name_of(7, 1), a_checkpoint())
    assert sorted(os.listdir(tmp_path)) == ["step-000000007-epoch-00001.json", "step-000000007-epoch-00001.safetensors"]


def test_the_same_checkpoint_has_the_same_bytes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = (write(tmp_path / folder, name_of(7, 1), a_checkpoint()) for folder in ("a", "b"))
    assert one.read_bytes() == other.read_bytes()
    assert one.with_suffix(".json").read_bytes() == other.with_suffix(".json").read_bytes()


# --- damage


@pytest.fixture
def path(tmp_path):
    return write(tmp_path, name_of(7, 1), a_checkpoint())


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.99, 0.9999])
def test_truncated_tensors_are_refused(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(path, "damaged", "Delete it")


def test_tensors_that_lack_the_last_byte_are_refused(path):
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, "damaged")


def test_tensors_with_a_byte_too_many_are_refused(path):
    path.write_bytes(path.read_bytes() + b"\0")
    refused(path, "damaged")


def test_one_wrong_bit_anywhere_in_the_tensors_is_refused(path):
    data = path.read_bytes()
    generator = np.random.default_rng(0)
    for place in [0, 7, 8, len(data) - 1, *generator.integers(0, len(data), 60)]:
        wrong = bytearray(data)
        wrong[place] ^= 1 << int(generator.integers(0, 8))
        path.write_bytes(wrong)
        refused(path, "damaged")


def test_one_wrong_bit_anywhere_in_the_sidecar_is_refused_or_changes_nothing(path):
    wanted, sidecar = read(path), path.with_suffix(".json")
    data = sidecar.read_bytes()
    refusals, places = [], range(0, len(data), 4)
    for place in places:
        wrong = bytearray(data)
        wrong[place] ^= 1
        sidecar.write_bytes(wrong)
        try:
            assert_same(read(path), wanted)  # white space, say
        except CheckpointError as error:
            refusals.append(str(error))
    assert len(refusals) > 0.9 * len(places)
    assert all(str(path) in refusal for refusal in refusals)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_sidecar_is_refused(path, share):
    sidecar = path.with_suffix(".json")
    data = sidecar.read_bytes()
    sidecar.write_bytes(data[: int(share * len(data))])
    refused(path, "sidecar")


@pytest.mark.parametrize("text", ["null", "[]", "3", '"step"', "{}", "\xff"])
def test_a_sidecar_that_is_something_else_is_refused(path, text):
    path.with_suffix(".json").write_text(text, encoding="latin-1")
    refused(path)


def seal(about):
    """Return a sidecar's contents with a checksum that fits."""
    plain = {name: value for name, value in about.items() if name != "sidecar_sha256"}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return json.dumps(plain | {"sidecar_sha256": digest})


def tamper(path, **changes):
    sidecar = path.with_suffix(".json")
    sidecar.write_text(seal(json.loads(sidecar.read_text()) | changes))


@pytest.mark.parametrize(
    "changes", [{"classes": list("abcdefghij")}, {"data_fingerprint": "ffff"}, {"data_mean": [0, 0, 0]}]
)
def test_a_sidecar_that_tells_something_else_than_the_tensors_is_refused(path, changes):
    tamper(path, **changes)
    refused(path, "sidecar and tensors tell different things")


def test_a_sidecar_that_was_changed_is_refused(path):
    sidecar = path.with_suffix(".json")
    sidecar.write_text(sidecar.read_text().replace('"step": 7', '"step": 8'))
    refused(path, "The sidecar of checkpoint", "is damaged", "Delete it")


def test_another_format_is_refused_by_its_number(path):
    tamper(path, format=7)
    refused(path, f"format 7, expected {checkpoints.FORMAT}")


def test_a_missing_sidecar_is_named(path):
    sidecar = path.with_suffix(".json")
    sidecar.unlink()
    refused(path, str(sidecar))


def test_missing_tensors_are_named(path):
    path.unlink()
    refused(path)


def test_tensors_that_are_a_folder_are_refused(path):
    path.unlink()
    path.mkdir()
    refused(path)


def forge(path, change):
    """Write changed tensors with a sidecar that vouches for them, as somebody with bad intentions would."""
    sidecar = path.with_suffix(".json")
    about = json.loads(sidecar.read_text())
    tensors = change(load_file(path), about)
    of_tensors = {name: about[name] for name in about.keys() - {"progress", "sha256", "sidecar_sha256"}}
    save_file(tensors, path, metadata={"rapa_dist": json.dumps(of_tensors, sort_keys=True)})
    sidecar.write_text(seal(about | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}))


def test_forging_without_a_change_is_accepted(path):
    """So that the refusals below are for what was changed."""
    forge(path, lambda tensors, about: tensors)
    assert_same(read(path), a_checkpoint())


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, about: tensors | {"conv0.kernels": tensors["conv0.kernels"][:3]},
        lambda tensors, about: tensors | {"conv2.kernels": tensors["conv2.kernels"][:, :-1]},
        lambda tensors, about: tensors | {"conv1.kernels": tensors["conv1.kernels"].astype(np.float64)},
        lambda tensors, about: tensors | {"head.weight": tensors["head.weight"].T.copy()},
        lambda tensors, about: tensors | {"head.extra": np.zeros(3, np.float32)},
        lambda tensors, about: {name: value for name, value in tensors.items() if name != "head.bias"},
        lambda tensors, about: {name: value for name, value in tensors.items() if name != "conv1.kernels"},
    ],
)
def test_tensors_of_another_shape_than_the_sidecar_says_are_refused(path, change):
    forge(path, change)
    refused(path, "holds other tensors than its sidecar")


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.update(classes=["cat"]),
        lambda about: about["config"].update(tiles=[4, 4, 1]),
        lambda about: about.update(arrays=["conv0", "conv1", "conv3"]),
        lambda about: about["tensors"].update({"head.bias": ["float32", -1]}),
        lambda about: about["tensors"].update({"head.bias": ["object", 10]}),
    ],
)
def test_a_sidecar_of_another_network_than_its_configuration_is_refused(path, change):
    forge(path, lambda tensors, about: [change(about), tensors][1])
    refused(path, "can't be understood")


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about["config"].update(scheme="sideways"),
        lambda about: about["config"].update(momentum=1),
        lambda about: about["config"].pop("epochs"),
        lambda about: about["config"].update(tiles="16,4,1"),
        lambda about: about["progress"].update(steps=1),
        lambda about: about.update(progress=None),
        lambda about: about.pop("classes"),
        lambda about: about.pop("data_mean"),
    ],
)
def test_a_sidecar_that_makes_no_sense_is_refused(path, change):
    forge(path, lambda tensors, about: [change(about), tensors][1])
    refused(path, "can't be understood")


def test_tensors_without_our_metadata_are_refused(path):
    save_file(load_file(path), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    tamper(path, sha256=digest)
    refused(path, "can't be understood")


# --- the newest one


def test_the_latest_checkpoint_is_the_one_with_most_steps(tmp_path):
    for step, epoch in ((9, 1), (10, 1), (10, 2), (2, 0)):
        write(tmp_path, name_of(step, epoch), a_checkpoint(step))
    assert latest(tmp_path).stem == name_of(10, 2)


def test_without_a_checkpoint_the_error_names_the_folder(tmp_path):
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}"):
        latest(tmp_path)


def test_names_sort_in_time_however_long_a_run_is():
    steps = [0, 9, 10, 99_999, 100_000, 999_999_999]
    assert sorted(name_of(step, 1) for step in steps) == [name_of(step, 1) for step in steps]


# --- a writer that is killed


class Killed(BaseException):
    """Stands for SIGKILL."""


class Killer:
    """Stands between the checkpoint writer and the file system, and kills it at its n-th operation.

    Dead means dead: whatever the writer tries afterwards, in a `finally`, say, does not happen either.
    A write that is killed has written half.
    """

    def __init__(self, monkeypatch, at):
        self._at, self._count = at, 0
        for owner, name in ((Path, "replace"), (Path, "unlink"), (os, "open"), (os, "fsync")):
            monkeypatch.setattr(owner, name, self.killable(getattr(owner, name)))
        plain_open = self.killable(Path.open)

        def open_killable(path, mode="r"):
            file = plain_open(path, mode)
            return KillableFile(file, self) if "w" in mode else file

        monkeypatch.setattr(Path, "open", open_killable)

    @property
    def has_killed(self):
        return self._count >= self._at

    def tick(self):
        self._count += 1
        if self.has_killed:
            raise Killed

    def killable(self, operation):
        def guarded(*arguments, **options):
            self.tick()
            return operation(*arguments, **options)

        return guarded


class KillableFile:
    """A file open for writing."""

    def __init__(self, file, killer):
        self._file, self._killer = file, killer
        self.fileno = file.fileno

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, data):
        half = len(data) // 2
        self._file.write(data[:half])
        self._killer.tick()
        self._file.write(data[half:])

    def flush(self):
        self._killer.tick()
        self._file.flush()


def killed_at_every_operation(monkeypatch, work):
    """Call `work(n)` once for every n at which it can be killed, then undisturbed; yield after each."""
    for n in range(1, 1000):
        with monkeypatch.context() as patch:
            killer = Killer(patch, n)
            try:
                work(n)
            except Killed:
                pass
            else:
                assert not killer.has_killed, "the writer survived being killed"
                assert n > 5, "there was hardly anything to kill"
                return
        yield n


def test_a_writer_killed_between_any_two_operations_leaves_the_checkpoint_before_or_the_new_one(tmp_path, monkeypatch):
    first, second = a_checkpoint(step=7, seed=1), a_checkpoint(step=8, seed=2)
    folder = None

    def work(n):
        write(folder, name_of(8, 1), second)

    outcomes = []
    folder = tmp_path / "0"
    folder.mkdir()
    write(folder, name_of(7, 1), first)
    for n in killed_at_every_operation(monkeypatch, work):
        newest = read(latest(folder))
        assert_same(newest, second if newest.progress.step == 8 else first)
        outcomes.append(newest.progress.step)
        folder = tmp_path / str(n)
        folder.mkdir()
        write(folder, name_of(7, 1), first)
    assert_same(read(latest(folder)), second)
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {7, 8}


def test_what_a_killed_writer_left_does_not_hinder_the_next_one(tmp_path, monkeypatch):
    first, second = a_checkpoint(step=7, seed=1), a_checkpoint(step=8, seed=2)
    write(tmp_path, name_of(7, 1), first)
    for _ in killed_at_every_operation(monkeypatch, lambda n: write(tmp_path, name_of(8, 1), second)):
        read(latest(tmp_path))  # always one or the other
    assert_same(read(latest(tmp_path)), second)
    prune(tmp_path, best=None)
    assert sorted(os.listdir(tmp_path)) == sorted(
        f"{name_of(step, 1)}.{suffix}" for step in (7, 8) for suffix in ("json", "safetensors")
    )


def test_a_write_that_fails_leaves_what_was_there_and_no_debris(tmp_path, monkeypatch):
    path = write(tmp_path, name_of(7, 1), a_checkpoint())

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, name_of(8, 1), a_checkpoint(step=8))
    assert latest(tmp_path) == path
    assert sorted(os.listdir(tmp_path)) == [f"{path.stem}.json", path.name]


def test_two_who_write_the_same_file_do_not_tear_it(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    flush, first, second = os.fsync, b"1" * 1000, b"2" * 10

    def overtaken(descriptor):
        monkeypatch.setattr(os, "fsync", flush)
        write_whole(path, second)
        assert path.read_bytes() == second
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", overtaken)
    write_whole(path, first)
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == [path.name]


def test_what_killed_writers_of_a_file_left_is_cleared_by_the_next_one(tmp_path):
    writer = subprocess.Popen(["true"])
    writer.wait()
    dead, alive = f"{writer.pid}-0123abcd.partial", f"{os.getpid()}-0123abcd.partial"
    kept = {f".report.html.{alive}", f".other.html.{dead}", f".html.{dead}", ".report.html.mine.partial"}
    for name in {f".report.html.{dead}", *kept}:
        (tmp_path / name).write_text("half")
    write_whole(tmp_path / "report.html", b"whole")
    assert set(os.listdir(tmp_path)) == kept | {"report.html"}


# --- pruning


def stems(folder):
    return [path.stem for path in checkpoints.checkpoints(folder)]


def test_pruning_keeps_the_newest_three_and_the_best(tmp_path):
    for epoch in range(6):
        write(tmp_path, name_of(10 * epoch, epoch), a_checkpoint(10 * epoch))
    prune(tmp_path, best=name_of(10, 1))
    assert stems(tmp_path) == [name_of(10 * epoch, epoch) for epoch in (1, 3, 4, 5)]
    for path in checkpoints.checkpoints(tmp_path):
        read(path)
    assert len(os.listdir(tmp_path)) == 8


@pytest.mark.parametrize("best", [None, "step-000000050-epoch-00005", "step-000000077-epoch-00009"])
def test_pruning_without_a_best_one_of_old_keeps_three(tmp_path, best):
    for epoch in range(6):
        write(tmp_path, name_of(10 * epoch, epoch), a_checkpoint(10 * epoch))
    prune(tmp_path, best=best)
    assert stems(tmp_path) == [name_of(10 * epoch, epoch) for epoch in (3, 4, 5)]


def test_pruning_few_checkpoints_removes_none(tmp_path):
    for epoch in range(3):
        write(tmp_path, name_of(10 * epoch, epoch), a_checkpoint(10 * epoch))
    prune(tmp_path, best=None)
    assert len(stems(tmp_path)) == 3


def test_pruning_leaves_files_of_others_alone(tmp_path):
    write(tmp_path, name_of(7, 1), a_checkpoint())
    for name in ("notes.txt", "mine.safetensors"):
        (tmp_path / name).write_text("mine")
    prune(tmp_path, best=None)
    assert {"notes.txt", "mine.safetensors"} < set(os.listdir(tmp_path))


def test_a_pruner_killed_between_any_two_operations_leaves_readable_checkpoints(tmp_path, monkeypatch):
    for epoch in range(6):
        write(tmp_path, name_of(10 * epoch, epoch), a_checkpoint(10 * epoch))

    kills = 0
    while kills < 100:  # it removes one file and is killed, again and again
        with monkeypatch.context() as patch:
            Killer(patch, at=2)
            try:
                prune(tmp_path, best=name_of(10, 1))
            except Killed:
                kills += 1
            else:
                break
        for path in checkpoints.checkpoints(tmp_path):
            read(path)
        assert latest(tmp_path).stem == name_of(50, 5)
    assert kills > 1
    prune(tmp_path, best=name_of(10, 1))
    assert stems(tmp_path) == [name_of(10 * epoch, epoch) for epoch in (1, 3, 4, 5)]
    assert len(os.listdir(tmp_path)) == 8
