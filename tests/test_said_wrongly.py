"""What the program says of a run, of its tiles, of time and of the user's own words is so."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from rapa_dist.cli import COMMANDS, main, types
from rapa_dist.config import TrainConfig, resolve
from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.coordinator import trainer as trainers
from rapa_dist.coordinator.recoveries import Recoveries
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.session import one_digital_thread
from rapa_dist.coordinator.sessions import options_of, resume_command
from rapa_dist.coordinator.tiles_table import tiles_table
from rapa_dist.coordinator.trainer import Trainer, initial_checkpoint
from rapa_dist.data import DataSet, load_dataset
from rapa_dist.errors import ClusterError
from rapa_dist.fabric import watcher
from rapa_dist.fabric.lookout import Restart
from rapa_dist.fabric.registry import Registration, registered, registrations
from rapa_dist.fabric.scratch import LOCK, Scratch, fresh_name, shared_memory_root
from rapa_dist.fabric.serial import SerialFabric
from rapa_dist.initial import initial_kernels
from rapa_dist.inspection import RunStats, TileStats
from rapa_dist.layout import machine_of

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--dataset", "builtin", "--limit-train", 20, "--limit-test", 10, "--channels", "2,2,2", "--tiles", "4,1,1"]
TRAIN = ["train", *SMALL, "--fabric", "serial"]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refusal(*arguments: object, code: int = 2) -> str:
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, and a home; Ray is not started."""
    monkeypatch.setattr("ray.init", lambda **options: pytest.fail("Ray was started"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def options_of_all_commands() -> list[tuple[str, click.Parameter]]:
    found: list[tuple[str, click.Parameter]] = []

    def look(name: str, command: click.Command) -> None:
        found.extend((name, parameter) for parameter in command.params)
        for sub, below in getattr(command, "commands", {}).items():
            look(f"{name} {sub}", below)

    for name, place in COMMANDS.items():
        module, _, attribute = place.partition(":")
        look(name, getattr(import_module(module), attribute))
    return found


# --- paths


def test_a_tilde_is_the_home_directory(here, tmp_path):
    result = invoke(*TRAIN, "--epochs", 1, "--run-dir=~/x")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "home" / "x" / "config.toml").exists()
    assert not any(here.iterdir())


@pytest.mark.parametrize("option", ["--run-dir", "--resume", "--data-dir", "--address"])
def test_an_empty_path_or_address_is_refused(option, here):
    assert f"'{option}': it is empty" in refusal(*TRAIN, f"{option}=")
    assert not any(here.iterdir())


def test_every_path_of_every_command_is_read_alike():
    parameters = options_of_all_commands()
    assert not [(name, p.name) for name, p in parameters if isinstance(p.type, click.Path | click.File)]
    paths = [(name, p) for name, p in parameters if getattr(p.type, "func", None) is types.path]
    assert {name for name, _ in paths} >= {"train", "evaluate", "report", "analyze reduce", "reproduce", "scale"}


# --- a folder that merely exists


def test_a_folder_with_files_is_not_called_a_run_in_use(here):
    (here / "thesis").mkdir()
    (here / "thesis" / "thesis.tex").write_text("mine")
    said = refusal(*TRAIN, "--run-dir", "thesis", code=1)
    assert "The folder thesis is not empty, and there is no run in it: it has thesis.tex." in said
    assert "--resume" not in said
    assert "in use" not in said


# --- what is to be installed


@pytest.mark.parametrize("command", [["report"], ["analyze", "similarity", "--plot", "x.svg"]])
def test_a_hint_installs_matplotlib_itself_and_here(command, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = invoke(*command, run)
    assert f"Install it with: {sys.executable} -m pip install 'matplotlib<4" in result.stderr


def test_nowhere_is_this_project_to_be_fetched_from_an_index():
    folders = ("rapa_dist", "scripts", "cluster")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix not in (".pyc", ".so")]
    texts = {path: path.read_text(errors="replace") for path in [*files, ROOT / "README.md"] if path.is_file()}
    wrong = re.compile(r"install [^\n]*['\" ]rapa-dist(?!\[…\])['\"\[ ]")
    assert not [str(path) for path, content in texts.items() if wrong.search(content)]


# --- a run to look at


@pytest.fixture(scope="module")
def first_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("said")
    result = invoke(*TRAIN, "--epochs", 2, "--run-dir", folder / "run")
    assert result.exit_code == 0, result.output
    return folder / "run"


@pytest.fixture
def run(first_run, tmp_path) -> Path:
    """A copy of a run of two epochs on `serial`."""
    return shutil.copytree(first_run, tmp_path / "run")


# --- errors name what was given


@pytest.mark.parametrize(
    ("given", "named", "unnamed"),
    [
        (
            ["train", "--lr", "1e6"],
            "--lr needs a number below 10000 where the weight decay is 0.0001",
            "--weight-decay",
        ),
        (["train", "--weight-decay", "1e6"], "--weight-decay needs a number from 0 to below 1 / λ, here 20", "--lr"),
        (
            ["train", "--lr", "30", "--weight-decay", "0.1"],
            "--lr 30 and --weight-decay 0.1 need a product below 1; it is 3",
            "default",
        ),
        (["train", "--channels", "32,32"], "--channels 32,32 has another number of layers (2)", "--tiles needs"),
        (["chaos", "--channels", "32,32"], "--channels 32,32 has another number of layers", "--tiles needs"),
        (["train", "--scheme", "enlarged", "--tiles", "16,4,1"], "--scheme enlarged is an untiled", "--scheme none"),
        (["train", "--device", "cpu"], "--device is for the fabric batched", "--fabric ray"),
        (["chaos", "--runs", "0"], "--runs needs at least 1; it is 0", "--kills"),
        (["chaos", "--kills", "-1"], "--kills needs at least 1; it is -1", "--runs"),
        (["plan", "--layer", "10000,1,1,1", "--layer", "1,1,1,1"], "100,000,001 tiles", "--last-tiles"),
        (["plan", "--layer", "10000,1,1,1", "--acceleration", "1e8"], "Use a smaller --acceleration", "--last-tiles"),
    ],
)
def test_an_error_names_what_was_given(given, named, unnamed):
    said = refusal(*given).split("Add ")[0]
    assert named in said
    assert unnamed not in said


def test_an_attack_names_the_assignments_that_were_given(run):
    said = refusal("analyze", "attack", run, "--same-assignment", "--judge-assignments", 3)
    assert "Leave --judge-assignments out" in said
    assert "--gradient" not in said


def test_in_a_file_settings_go_by_their_fields(run):
    (run / "config.toml").write_text(
        (run / "config.toml").read_text().replace("lr_decay_every = 25", "lr_decay_every = 0")
    )
    said = refusal("evaluate", run, code=1)
    assert "config.toml" in said
    assert "lr_decay_every needs at least 1; it is 0" in said
    assert "--lr" not in said


# --- wall time and device time of an epoch


CONFIG = resolve(
    tiles=(4, 1, 1),
    channels=(2, 2, 2),
    pooling="max",
    dataset="builtin",
    limit_train=40,
    limit_test=10,
    epochs=1,
    batch_size=10,
    lr_decay_every=10,
    warmup_epochs=1,
    weight_decay=1e-4,
    augment=True,
    seed=0,
)
CYCLE_S = 80e-9


class Sessions:
    """A run in sessions, each of which is asked to stop at its n-th look; a look is all that takes time, 10 s."""

    def __init__(self, folder: Path, config: TrainConfig, data: DataSet, clock: SimpleNamespace) -> None:
        self.data, self.clock = data, clock
        self.directory = RunDirectory.create(folder, config, None)
        self.state = initial_checkpoint(config, data)
        checkpoints.write(self.directory.checkpoint_folder, checkpoints.name_of(0, 0), self.state)

    def train(self, looks: int) -> None:
        asked = 0

        def stop() -> bool:
            nonlocal asked
            asked += 1
            self.clock.now += 10
            return asked >= looks

        with one_digital_thread(), SerialFabric(machine_of(self.state.config), 10**7, self.state.kernels) as fabric:
            recoveries = Recoveries(self.directory)
            recoveries.restarted(Restart(f"L0/T{looks:03}", False, 1.0))
            Trainer(self.state, self.data, fabric, self.directory, Silent(), recoveries).run(stop)
        self.state = checkpoints.read(checkpoints.latest(self.directory.checkpoint_folder))


class Silent:
    def trained(self, *arguments: Any) -> None: ...
    def tested(self, *arguments: Any) -> None: ...
    def finished_epoch(self, *arguments: Any) -> None: ...


@pytest.fixture
def sessions(tmp_path, monkeypatch) -> Iterator[Sessions]:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(trainers, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    made = Sessions(tmp_path / "sessions", CONFIG, load_dataset("builtin", limit_train=40, limit_test=10), clock)
    yield made
    made.directory.release()


def test_an_epoch_in_three_sessions_has_the_wall_time_of_all(sessions):
    """It stops in front of the third of four steps, then in the test, which is at last made in a session of its own."""
    sessions.train(looks=3)
    assert (sessions.state.progress.step, sessions.state.progress.train_s) == (2, 30)
    sessions.train(looks=4)
    assert (sessions.state.progress.step, sessions.state.progress.train_s) == (4, 50)
    sessions.train(looks=99)
    (line,) = sessions.directory.metrics()
    wall = line["wall"]
    assert (wall["train_s"], wall["steps"], wall["step_ms"]) == (50, 4, 12_500)
    assert wall["train_s"] + wall["test_s"] == sessions.clock.now
    assert [recovery["what"] for recovery in wall["recoveries"]] == ["L0/T003", "L0/T004", "L0/T099"]
    assert line["device_time_s"] == pytest.approx(40 * (256 * 2 + 256 * 3 + 64 * 3) * CYCLE_S)
    assert line["test_device_time_s"] == pytest.approx(10 * (256 + 256 + 64) * CYCLE_S)
    state = sessions.state.progress
    assert (state.train_s, state.test_s, state.recoveries) == (0, 0, [])


# --- what tiles and layers do


def tile_stats(name: str, layer: int) -> TileStats:
    counts = dict.fromkeys(("rows_forward", "rows_backward", "rows_update", "updates", "bytes_in", "bytes_out"), 7)
    times = dict.fromkeys(("busy_s", "waiting_s", "device_time_s", "utilisation", "kernel_norm"), 0.5)
    return TileStats(
        tile=name,
        layer=layer,
        name=f"conv{layer}",
        node="",
        pid=1,
        state="idle",
        restarts=0,
        last_step=1,
        resident_bytes=1,
        **counts,
        **times,
    )


def stats_of_a_run(silent: tuple[str, ...] = ()) -> RunStats:
    names = [(f"L{layer}/T{tile:03}", layer) for layer, n in enumerate((16, 4, 1)) for tile in range(n)]
    return RunStats.of("r", [tile_stats(*name) for name in names if name[0] not in silent], silent)


def test_the_heading_of_one_layer_says_how_many_tiles_the_run_has():
    headings = [
        str(tiles_table(stats_of_a_run().only(layer))).partition("\n")[0] for layer in (None, "0", "L1", "conv2")
    ]
    assert headings == [
        "r: 21 tiles on 1 node",
        "r: conv0, 16 of 21 tiles on 1 node",
        "r: conv1, 4 of 21 tiles on 1 node",
        "r: conv2, 1 of 21 tiles on 1 node",
    ]
    assert stats_of_a_run().only("1").as_dict()["tiles_of_run"] == 21


def test_tiles_that_do_not_answer_are_tiles_of_the_run_and_of_their_layer():
    stats = stats_of_a_run(silent=("L0/T003", "L1/T002"))
    assert str(tiles_table(stats)).startswith("r: 19 of 21 tiles on 1 node")
    one = str(tiles_table(stats.only("1")))
    assert one.startswith("r: conv1, 3 of 21 tiles on 1 node")
    assert "no answer for L1/T002" in one
    assert "L0/T003" not in one


def test_a_layer_is_as_busy_as_its_device_time_says():
    result = invoke("plan", "--json")
    layers = json.loads(result.stdout)["layers"]
    for busy, time in (
        ("busy_percent_training", "device_time_training_us_per_image"),
        ("busy_percent_inference", "device_time_inference_us_per_image"),
    ):
        times = [layer[time] for layer in layers]
        assert [layer[busy] for layer in layers] == pytest.approx([100 * value / max(times) for value in times])
    assert [round(layer["busy_percent_training"]) for layer in layers] == [67, 100, 100]
    assert re.search(r"^L0 .* 10\.24 µs +67 %$", invoke("plan").stdout, re.MULTILINE)


# --- the report


def facts_of(page: str) -> dict[str, str]:
    return dict(re.findall(r'<tr><th scope="row">([^<]*)</th><td>([^<]*)</td></tr>', page))


def seconds(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


def test_device_times_of_the_report_add_up(run):
    """Those of training and tests to that of both, and this to that of the tiles, which count the rows of both."""
    assert invoke("report", run).exit_code == 0
    page = (run / "report.html").read_text()
    facts = facts_of(page)
    trained, tested, both = (seconds(facts[f"Device time of {what}"]) for what in ("all training", "all tests", "both"))
    assert trained == pytest.approx(2 * 20 * (256 * 2 + 256 * 3 + 64 * 3) * CYCLE_S, rel=1e-2)
    assert tested == pytest.approx(2 * 10 * (256 + 256 + 64) * CYCLE_S, rel=1e-2)
    assert both == pytest.approx(trained + tested, rel=1e-2)
    (of_tiles,) = re.findall(r'<th scope="row">all</th><td>6</td>(?:<td>[^<]*</td>){3}<td>([^<]*)</td>', page)
    assert float(of_tiles) == pytest.approx(both, rel=1e-2)
    assert "Training and tests together" in page


def test_the_report_tells_the_similarity_of_what_was_learnt_from_that_of_the_start(run):
    """Tiles that have learnt the very same thing, on top of their starts."""
    path = checkpoints.latest(run / "checkpoints")
    state = checkpoints.read(path)
    start = initial_kernels(machine_of(state.config), state.config.seed)
    common = np.random.default_rng(0).normal(size=start[0].shape[1:]).astype(np.float32)
    kernels = [start[0] + 0.02 * common, *start[1:]]
    checkpoints.write(path.parent, path.stem, replace(state, kernels=kernels))
    assert invoke("report", run).exit_code == 0
    page = (run / "report.html").read_text()
    section = page[page.index('<section id="similarity"') :]
    (row,) = re.findall(r'<th scope="row">conv0</th>' + 4 * "<td>([^<]*)</td>" + "</tr>", section)
    raw, along, decay_leaves, learnt = float(row[0]), row[1], row[2], float(row[3])
    assert raw < 0.2
    assert (along, decay_leaves) == ("100 %", "100 %")
    assert learnt > 0.99
    assert "nothing in common" not in page


# --- how to resume, and with what a run was trained


def stopped_after(steps: int, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Result:
    """Train until Ctrl-C comes after so many steps."""
    take, left = Trainer.take, iter(range(steps))

    def press(self: Trainer, result: Any) -> None:
        take(self, result)
        if next(left, None) == steps - 1:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take", press)
        result = invoke(*arguments)
    assert result.exit_code == 130, result.output
    return result


def resume_hint(said: str) -> list[str]:
    (line,) = re.findall(r"Resume with: (.*)$", said, re.MULTILINE)
    return shlex.split(line)


def test_the_resume_hint_can_be_typed_and_resumes_in_the_same_way(here, monkeypatch):
    folder = "it's a run; $HOME"
    given = ["--fabric", "batched", "--save-patience", "5", "--data-dir", "a b"]
    done = stopped_after(3, monkeypatch, "train", *SMALL, "--epochs", 3, "--run-dir", folder, *given)
    program, *hint = resume_hint(done.stderr)
    assert program == "rapa-dist"
    assert hint == ["train", "--resume", folder, "--fabric", "batched", "--save-patience", "5.0"]
    assert RunDirectory(here / folder).data_dir == here / "a b"
    again = stopped_after(1, monkeypatch, *hint, "--live")
    assert resume_hint(again.stderr) == [program, *hint[:5], "--live", *hint[5:]]
    assert invoke(*hint).exit_code == 0


@pytest.mark.parametrize(
    ("where", "options"),
    [
        ({"fabric": "ray", "device": "cpu"}, []),
        ({"fabric": "serial", "device": "cpu"}, ["--fabric", "serial"]),
        ({"fabric": "batched", "device": "cuda"}, ["--fabric", "batched", "--device", "cuda"]),
        ({"fabric": "ray", "device": "cpu", "address": "h:1", "nodes": 2}, ["--address", "h:1", "--nodes", "2"]),
    ],
)
def test_the_resume_hint_has_what_is_not_the_default(where, options):
    assert options_of(where, {"fabric": "ray", "device": "cpu"}) == options


@pytest.mark.parametrize("environment", ["", "[]", '{"sessions": 7}', '{"sessions": [{"options": 7}, []]}', None])
def test_without_a_record_the_resume_hint_has_the_directory_alone(tmp_path, environment):
    if environment is not None:
        (tmp_path / "environment.json").write_text(environment)
    assert shlex.split(resume_command(tmp_path)) == ["rapa-dist", "train", "--resume", str(tmp_path)]


def test_a_finished_run_that_is_resumed_says_so_and_starts_nothing(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "log"}
    left = shared_memory_root() / fresh_name()  # by a coordinator that was killed while it saved its last epoch
    left.mkdir(mode=0o700)
    (left / LOCK).touch(mode=0o600)
    result = invoke("train", "--resume", run)  # on ray
    assert not left.exists()
    assert result.exit_code == 0, result.output
    assert f"The run in {run} is finished: 2 epochs of 2 trained. Nothing was started." in result.stderr
    assert f"To train it longer: rapa-dist train --resume {run} --fabric serial --epochs 4" in result.stderr
    assert "test error" in result.stdout
    assert "Starting" not in result.stderr
    assert {path: path.read_bytes() for path in before} == before


def test_every_command_line_of_a_run_is_recorded(run, monkeypatch):
    lines = [sys.argv]
    for epochs in ("3", "4"):
        lines.append(["rapa-dist", "train", "--resume", "there", "--epochs", epochs])
        monkeypatch.setattr(sys, "argv", lines[-1])
        assert invoke("train", "--resume", run, "--epochs", epochs, "--fabric", "serial").exit_code == 0
    sessions = json.loads((run / "environment.json").read_text())["sessions"]
    assert [session["argv"] for session in sessions] == lines
    assert all(session["packages"]["torch"] and session["started"] for session in sessions)
    assert invoke("report", run).exit_code == 0
    assert "rapa-dist train --resume there --epochs 3" in (run / "report.html").read_text()


# --- stats of a run whose tiles are no processes


@pytest.mark.parametrize("fabric", ["serial", "batched"])
def test_stats_says_that_a_run_trains_here_whose_tiles_can_not_be_asked(fabric, tmp_path, monkeypatch):
    said: list[Result] = []
    look = Trainer.take

    def take(self: Trainer, result: Any) -> None:
        look(self, result)
        if not said:
            said.extend([invoke("stats"), invoke("stats", "--run", "its name")])

    monkeypatch.setattr(Trainer, "take", take)
    arguments = [*SMALL, "--fabric", fabric, "--epochs", 1, "--run-dir", tmp_path / "its name"]
    assert invoke("train", *arguments).exit_code == 0
    for result in said:
        assert result.exit_code == 1
        assert f"The run its name trains here on the fabric {fabric}, in process {os.getpid()}" in result.stderr
        assert f"'{tmp_path / 'its name'}'" in result.stderr
        assert "no tile processes to ask" in result.stderr
        assert "metrics.jsonl" in result.stderr
    assert len(said) == 2
    assert "No run trains on this node" in invoke("stats").stderr
    assert not registrations(shared_memory_root())


def test_tiles_that_can_be_asked_come_before_those_that_can_not(tmp_path, monkeypatch):
    monkeypatch.setattr(watcher, "attach", lambda found, mode: SimpleNamespace(address=found[0]))
    scratch = Scratch()
    where = {"address": "h:1", "run_dir": tmp_path, "folder": scratch.path}
    Registration.of_this_process(run="asked", **where).write()
    with registered(run="mute", run_dir=tmp_path, fabric="serial", options=[]):
        assert watcher.find_run(None, None, pytest.fail).run == "asked"
        with pytest.raises(ClusterError, match="The run mute trains here"):
            watcher.find_run("mute", None, pytest.fail)
    scratch.remove()


def test_where_no_run_can_be_registered_it_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("RAPA_DIST_SHM", str(tmp_path / "missing"))
    assert invoke(*TRAIN, "--epochs", 1, "--run-dir", tmp_path / "r").exit_code == 0
