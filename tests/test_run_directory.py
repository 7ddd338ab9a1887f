import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rapa_dist.config import resolve
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.errors import RunDirectoryError

CONFIG = resolve(
    pooling="max",
    dataset="images:some/where",
    limit_train=100,
    limit_test=None,
    epochs=10,
    batch_size=10,
    lr_decay_every=25,
    warmup_epochs=1,
    weight_decay=1e-4,
    augment=True,
    seed=0,
)


@pytest.fixture
def directory(tmp_path):
    made = RunDirectory.create(tmp_path / "run", CONFIG, data_dir=tmp_path / "data")
    yield made
    made.release()


def take_elsewhere(path):
    """Take a run directory in another process; it holds it until its stdin closes."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from rapa_dist.coordinator.run_directory import RunDirectory\n"
        "from rapa_dist.errors import RunDirectoryError\n"
        "directory = RunDirectory(Path(sys.argv[1]))\n"
        "try:\n"
        "    directory.take()\n"
        "except RunDirectoryError as error:\n"
        "    print(error, flush=True)\n"
        "else:\n"
        "    print('taken', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


# --- a new run


def test_a_new_run_has_what_is_needed_to_repeat_it(directory, tmp_path):
    assert directory.config == CONFIG
    assert directory.checkpoint_folder.is_dir()
    assert directory.data_dir == tmp_path / "data"
    (about,) = json.loads((directory.path / "environment.json").read_text())["sessions"]
    assert {"argv", "python", "packages", "processor", "cores", "memory_bytes", "git"} <= about.keys()
    assert {"torch", "numpy", "ray", "rapa-dist"} <= about["packages"].keys()


def test_a_run_without_a_name_gets_one_of_time_data_and_tiles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):  # within one second, as a script would
        made = RunDirectory.create(None, CONFIG, data_dir=None)
        made.release()
        names.append(made.path)
    assert len(set(names)) == 3
    for name in names:
        assert name.parent == Path("runs")
        assert "Z-images-16x4x1" in name.name
    assert RunDirectory(names[0]).data_dir is None


def test_an_empty_folder_may_become_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    made = RunDirectory.create(tmp_path / "run", CONFIG, data_dir=None)
    made.release()
    assert made.config == CONFIG


def test_folders_above_a_run_are_made(tmp_path):
    made = RunDirectory.create(tmp_path / "a" / "b" / "run", CONFIG, data_dir=None)
    made.release()
    assert made.name == "run"


# --- what is refused


def test_a_directory_of_another_run_is_not_written_to(directory):
    directory.release()
    before = sorted(os.listdir(directory.path))
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory.create(directory.path, replace(CONFIG, seed=1), data_dir=None)
    for part in (str(directory.path), "a run in", "--run-dir", "--resume"):
        assert part in str(caught.value)
    assert sorted(os.listdir(directory.path)) == before
    assert directory.config == CONFIG


def test_where_there_is_no_room_for_a_directory_nothing_is_left(tmp_path, monkeypatch):
    def full(self, config):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunDirectory, "write_config", full)
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        RunDirectory.create(tmp_path / "run", CONFIG, data_dir=None)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_somebodys_files_is_not_written_to(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunDirectoryError, match="--run-dir"):
        RunDirectory.create(tmp_path, CONFIG, data_dir=None)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("where", ["file", "file/run"])
def test_a_file_in_the_way_is_named(tmp_path, where):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory.create(tmp_path / where, CONFIG, data_dir=None)
    assert str(tmp_path / where) in str(caught.value)
    assert "Give another --run-dir" in str(caught.value)


def test_a_place_that_can_not_be_written_to_is_named(tmp_path, monkeypatch):
    def denied(path, *arguments, **options):  # the tests may run as root, who may write anywhere
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(RunDirectoryError, match=r"Permission denied.*--run-dir") as caught:
        RunDirectory.create(tmp_path / "run", CONFIG, data_dir=None)
    assert str(tmp_path / "run") in str(caught.value)


# --- in use


def test_a_run_that_another_process_trains_can_not_be_taken(directory):
    process = take_elsewhere(directory.path)
    output, _ = process.communicate(timeout=60)
    assert str(directory.path) in output
    assert "in use by another process" in output
    assert "Wait for it" in output


def test_a_run_can_be_taken_after_its_process_was_killed(directory):
    directory.release()
    process = take_elsewhere(directory.path)
    assert process.stdout.readline() == "taken\n"
    with pytest.raises(RunDirectoryError, match="in use by another process"):
        directory.take()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    directory.take()


def test_a_run_that_could_not_be_taken_can_be_taken_later(directory):
    other = RunDirectory(directory.path)
    with pytest.raises(RunDirectoryError):
        other.take()
    directory.release()
    other.take()
    other.release()
    other.release()


# --- what is no run directory


def test_a_missing_directory_is_no_run(tmp_path):
    with pytest.raises(RunDirectoryError, match=r"is no run directory.*config\.toml.*No such file") as caught:
        _ = RunDirectory(tmp_path / "nowhere").config
    assert str(tmp_path / "nowhere") in str(caught.value)


@pytest.mark.parametrize("text", ["tiles = [16,", "", "momentum = 1\n", "\0"])
def test_a_configuration_that_makes_no_sense_is_named(directory, text):
    (directory.path / "config.toml").write_text(text)
    with pytest.raises(RunDirectoryError, match=r"config\.toml.*can't be understood") as caught:
        _ = directory.config
    assert str(directory.path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("tiles", '"16,4,1"'), ("tiles", "[16.5, 4, 1]"), ("epochs", '"ten"'), ("scheme", "3"), ("lr", "[]")],
)
def test_a_value_of_the_wrong_kind_in_the_configuration_is_named(directory, name, value):
    path = directory.path / "config.toml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith(f"{name} ")]
    kept = "\n".join(lines)
    if name == "tiles":  # tomli_w writes lists on several lines
        kept = kept.replace("    16,\n    4,\n    1,\n]\n", "")
    path.write_text(f"{name} = {value}\n{kept}")
    with pytest.raises(RunDirectoryError, match=r"config\.toml.*can't be understood"):
        _ = directory.config


def test_a_configuration_that_is_not_text_is_named(directory):
    (directory.path / "config.toml").write_bytes(b"scheme = '\xff\xfe'\n")
    with pytest.raises(RunDirectoryError, match=r"config\.toml"):
        _ = directory.config


def test_more_epochs_are_recorded(directory):
    directory.write_config(replace(CONFIG, epochs=20))
    assert directory.config == replace(CONFIG, epochs=20)


# --- metrics and log


def epoch(number):
    """Return a line of metrics."""
    numbers = dict.fromkeys(
        ("learning_rate", "train_loss", "train_error_percent", "test_loss", "test_error_percent"), 0.5
    )
    return {"epoch": number} | numbers | {"wall": {"train_s": 1.0, "test_s": 1.0}}


def test_metrics_are_lines_appended_one_after_the_other(directory):
    lines = [epoch(1) | {"test_error_percent": 33.25}, epoch(2) | {"test_error_percent": 1 / 3}]
    lengths = [directory.append_metrics(line) for line in lines]
    assert directory.metrics() == lines
    assert lengths[1] == (directory.path / "metrics.jsonl").stat().st_size


def test_a_run_without_metrics_has_none(directory):
    assert directory.metrics() == []
    directory.cut_metrics(0)
    assert directory.metrics() == []


def test_metrics_after_a_checkpoint_are_cut_off(directory):
    length = directory.append_metrics(epoch(1))
    directory.append_metrics(epoch(2))
    with (directory.path / "metrics.jsonl").open("a") as file:
        file.write('{"epo')  # a line of which a killed process wrote half
    assert directory.metrics() == [epoch(1), epoch(2)]
    directory.cut_metrics(length)
    assert directory.metrics() == [epoch(1)]
    assert directory.append_metrics(epoch(2)) == 2 * length
    assert directory.metrics() == [epoch(1), epoch(2)]


def test_metrics_that_are_shorter_than_they_were_are_damaged(directory):
    length = directory.append_metrics({"epoch": 1})
    os.truncate(directory.path / "metrics.jsonl", length - 1)
    with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl has 12 bytes, but had 13"):
        directory.cut_metrics(length)
    (directory.path / "metrics.jsonl").unlink()
    with pytest.raises(RunDirectoryError, match="has 0 bytes"):
        directory.cut_metrics(length)


def test_a_log_that_can_not_be_written_stops_nothing(directory):
    directory.log("first")
    assert (directory.path / "log").read_text().endswith(" first\n")
    (directory.path / "log").unlink()
    (directory.path / "log").mkdir()
    directory.log("second")
