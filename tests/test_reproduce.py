"""`rapa-dist reproduce`: nothing is done twice, the same results give the same tables, claims are judged rightly."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from rapa_dist.cli import main
from rapa_dist.config import PAPER_TILES
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.errors import RunDirectoryError, UsageError
from rapa_dist.experiments import figures, paper, tables
from rapa_dist.experiments.cells import EXPERIMENTS, LARGE, POOLINGS, Protocol, analyses_of, cells_of
from rapa_dist.experiments.claims import claims
from rapa_dist.experiments.jobs import do
from rapa_dist.experiments.runner import Job, Slots, _Round, jobs_of, missing, progress_of
from rapa_dist.experiments.store import Store

COMMAND = [sys.executable, "-m", "rapa_dist", "reproduce"]
TINY = ["--dataset", "builtin", "--limit-train", "100", "--limit-test", "40", "--address", "local"]
_TIMEOUT_S = 200
_PLAN = ["--dry-run", "--json"]


def protocol(**other):
    return Protocol(**({"dataset": "builtin", "limit_train": 60, "epochs": 4, "lr_decay_every": 1} | other))


@pytest.fixture
def store(tmp_path):
    here = Store(tmp_path / "store", protocol())
    here.take()
    yield here
    here.release()


def keep_training(store, name, test, train=10.0, seed=0, experiment="table1"):
    (cell,) = cells_of(experiment, [name])
    result = {
        "best_test_error_percent": test,
        "best_train_error_percent": train,
        "test_error_percent": test + 1,
        "epochs": [1, 2],
        "test_errors_percent": [90.0, test],
        "train_images": 60,
        "test_images": 10_000,
        "chance_percent": 10.0,
    }
    store.keep(cell, seed, "train", result)
    return cell


# --- what an experiment consists of


def test_table_1_has_the_papers_schemes_with_its_learning_rates():
    for cell in cells_of("table1"):
        config = cell.config(protocol(), seed=3)
        assert (config.seed, config.epochs, config.pooling) == (3, 4, "max")
        untiled = cell.scheme in ("none", "enlarged")
        assert config.tiles == ((1, 1, 1) if untiled else PAPER_TILES)
        if cell.name in paper.TABLE_1:
            assert (config.lr, config.lr_decay) == ((0.005, 0.5) if untiled else (0.05, 0.75))
    assert set(paper.TABLE_1) < {cell.name for cell in cells_of("table1")}


def test_table_2_has_four_poolings_of_three_networks_and_analyses_of_random():
    cells = cells_of("table2")
    assert {(cell.pooling, cell.scheme) for cell in cells} == {
        (pooling, scheme) for pooling in POOLINGS for scheme in ("none", "enlarged", "random")
    }
    for cell in cells:
        assert ("votes5" in analyses_of("table2", cell)) == (cell.scheme == "random")
    assert LARGE.config(protocol(), 0).tiles == (128, 32, 8)


def test_experiments_share_the_runs_of_cells_that_are_the_same():
    shared = {cell.name: cell for experiment in EXPERIMENTS for cell in cells_of(experiment)}
    for experiment in EXPERIMENTS:
        for cell in cells_of(experiment):
            assert cell == shared[cell.name]


@pytest.mark.parametrize(("epochs", "every"), [(400, 25), (200, 12), (100, 6), (16, 1), (1, 1)])
def test_the_decay_schedule_is_scaled_to_the_number_of_epochs(epochs, every):
    assert Protocol.scaled(epochs=epochs, dataset="builtin").lr_decay_every == every


@pytest.fixture
def carried_out_with(monkeypatch):
    """Return what carries jobs out in this process: the task that was begun first is done first."""

    def carry_out(store, jobs, slots, results=lambda job: {"best_test_error_percent": 1.0}):
        begun, most = [], [0]

        class Task:
            def __init__(self, job):
                self.result = results(job)
                begun.append(job.name)

        def wait(tasks, **_):
            most[0] = max(most[0], len(tasks))
            return tasks[:1], tasks[1:]

        monkeypatch.setattr("ray.wait", wait)
        monkeypatch.setattr("ray.get", lambda task: task.result)
        outcome = _Round(store, jobs, Task, lambda: slots).run(lambda: False)
        return outcome, begun, most[0]

    return carry_out


def test_jobs_begin_in_their_order_and_analyses_as_soon_as_they_can(store, carried_out_with):
    jobs = jobs_of("table1", cells_of("table1", ["none", "random", "alternate"]), seeds=2)
    outcome, begun, most = carried_out_with(store, jobs, Slots(1, 2))
    assert (outcome.finished, outcome.failed, most) == (True, {}, 2)
    assert begun == [
        "none-0 train",
        "random-0 train",
        "random-0 similarity",
        "alternate-0 train",
        "none-1 train",
        "random-1 train",
        "random-1 similarity",
        "alternate-1 train",
    ]
    assert missing(store, jobs) == []


def test_what_is_left_after_a_failure_is_done(store, carried_out_with):
    jobs = jobs_of("table1", cells_of("table1", ["none", "random"]), seeds=1)
    failing = {"random-0 train": {"error": "no luck"}}
    outcome, begun, most = carried_out_with(
        store, jobs, Slots(1, 1), lambda job: failing.get(job.name, {"best_test_error_percent": 1.0})
    )
    assert (begun, most) == (["none-0 train", "random-0 train"], 1)
    assert outcome.finished
    assert outcome.failed == {
        "random-0 train": "no luck",
        "random-0 similarity": "its network could not be trained",
    }


# --- the store


def test_a_result_is_never_asked_for_again(store):
    cells = cells_of("table1", ["none", "random"])
    jobs = jobs_of("table1", cells, seeds=2)
    assert [job.name for job in jobs] == [
        "none-0 train",
        "random-0 train",
        "none-1 train",
        "random-1 train",
        "random-0 similarity",
        "random-1 similarity",
    ]
    keep_training(store, "random", 20.0, seed=1)
    assert [job.name for job in missing(store, jobs) if job.what == "train"] == [
        "none-0 train",
        "random-0 train",
        "none-1 train",
    ]


def test_a_folder_has_one_protocol(store):
    keep_training(store, "none", 20.0)
    store.release()
    with pytest.raises(UsageError, match="results of another protocol: epochs: 4 → 5"):
        Store(store.path, protocol(epochs=5))
    Store(store.path, protocol())
    unbound = Store(store.path, protocol(epochs=5), binding=False)
    unbound.take()
    unbound.release()
    Store(store.path, protocol())


def test_a_folder_that_nothing_came_of_is_bound_to_no_protocol(store):
    with pytest.raises(RunDirectoryError, match="in use by another process"):
        Store(store.path, protocol()).take()
    late = Store(store.path, protocol())
    store.release()
    other = Store(store.path, protocol(epochs=5))
    other.take()
    keep_training(other, "none", 20.0)
    other.release()
    with pytest.raises(UsageError, match="results of another protocol"):
        late.take()


def test_a_run_that_was_trained_elsewhere_is_adopted_if_it_fits(store, tmp_path):
    (cell,) = cells_of("table1", ["alternate"])
    config = cell.config(protocol(), 1)
    for name, seed in (("fits", 1), ("does-not", 7)):
        RunDirectory.create(tmp_path / name, replace(config, micro_batches=1, seed=seed), None).release()
    for _ in range(2):  # twice is once
        place = store.place_for(tmp_path / "fits", cells_of("table1"), range(2))
        assert place == store.run_dir(cell, 1)
        store.adopt(tmp_path / "fits", place)
        assert place.resolve() == (tmp_path / "fits").resolve()
    with pytest.raises(UsageError, match="belongs to no cell of these tables; the nearest differs in seed: 7 →"):
        store.place_for(tmp_path / "does-not", cells_of("table1"), range(2))
    (tmp_path / "fits").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="alternate-1 is there already"):  # a link to nothing, now
        store.place_for(tmp_path / "moved", cells_of("table1"), range(2))
    place.unlink()
    keep_training(store, "alternate", 20.0, seed=1)
    with pytest.raises(UsageError, match=r"alternate-1\.train\.json is there already"):
        store.place_for(tmp_path / "moved", cells_of("table1"), range(2))


def test_a_run_that_is_trained_in_another_way_is_not_taken_for_a_cells(tmp_path):
    (cell,) = cells_of("table1", ["none"])
    config = cell.config(protocol(), 0)
    longer = replace(config, micro_batches=1, epochs=8)
    RunDirectory.create(tmp_path / "run", longer, None).release()
    for what in ("train", "similarity"):
        result = do(what, (str(tmp_path / "run"), config.as_dict()), None, "serial", "cpu")
        assert "in another way than it should be here: epochs: 8 → 4. Move it away" in result["error"]


# --- tables and claims


def test_tables_show_mean_and_spread_beside_the_paper(store):
    keep_training(store, "none", 20.0, seed=0)
    keep_training(store, "none", 22.0, seed=1)
    text = tables.table1(tables.Results(store))
    assert "| `none` | 21.00 ± 1.41 | 10.00 ± 0.00 | 22.00 ± 1.41 | 2 | 18.85 | 2.37 |" in text
    assert "| `random` | – | – | – | 0 | 17.67 | 5.81 |" in text
    assert "60 training and all test images, 4 epochs, λ decays every 1" in text
    assert text == tables.table1(tables.Results(store))


def test_claims_hold_or_do_not_or_are_not_measured(store):
    assert "holds" not in claims(tables.Results(store))
    keep_training(store, "random", 20.0, train=8.0)
    keep_training(store, "alternate", 21.5)
    keep_training(store, "image-pad", 18.5)
    keep_training(store, "none", 20.5, train=50.0)
    lines = claims(tables.Results(store)).splitlines()
    said = {row[0]: row[2:] for line in lines if len(row := line.strip("| ").split(" | ")) == 5}
    assert said["random beats alternate"] == ["+1.50 (1.15)", "holds", "1, 1"]
    assert said["random beats image-pad"] == ["-1.50 (1.12)", "does not hold", "1, 1"]
    assert said["random beats perforated"] == ["–", "not measured", "1, 0"]
    assert said["random is at or below none"] == ["+0.50 (1.14)", "undecided", "1, 1"]
    assert said["random’s train error is higher than that of none"][1:] == ["does not hold", "1, 1"]
    keep_training(store, "random", 22.0, seed=1)
    row = "| random beats alternate | 21.00 ± 1.41 against 21.50 | +0.50 (3.65) | undecided | 2, 1 |"
    assert row in claims(tables.Results(store))


def test_claims_of_votes_reduction_similarity_and_attack(store):
    random = keep_training(store, "random", 20.0)
    none = keep_training(store, "none", 20.0)
    large = keep_training(store, LARGE.name, 20.0, experiment="figure4")
    votes = {"test_error_percent": [20, 19], "mean_single_test_error_percent": 20.5, "images": 10_000}
    store.keep(random, 0, "votes5", votes | {"changed_percent": 9.0})
    store.keep(random, 0, "reduced", {"by_norm": {"test_error_percent": 23.8}})
    store.keep(random, 0, "similarity", {"similarity": [0.2, 0.3, None]})
    keep_training(store, "random", 20.0, seed=1)
    store.keep(random, 1, "similarity", {"similarity": [0.22, 0.3, None]})
    for cell, accuracy in ((none, 50.0), (random, 70.0), (large, 60.0)):
        attacked = {
            "snr_db": [33.0],
            "accuracy_percent": [accuracy],
            "clean_accuracy_percent": 19.5,
            "images": 10_000,
            "chance_percent": 10.0,
        }
        store.keep(cell, 0, "attack", attacked)
    text = claims(tables.Results(store))
    assert "| 20.50 with 1 vote, 19.00 with 5 | +1.25 (0.60) | holds | 1 |" in text
    assert "| 23.80 against 21.00 | -2.05 (1.18) | does not hold | 1, 1 |" in text, "both are of the end of training"
    assert "| S > 0.1 with max pooling (conv0) | 0.210 ± 0.014 | +0.110 (0.020) | holds | 2 |" in text
    assert "| S > 0.1 with mixed pooling (conv0) | – | – | not measured | 0 |" in text
    assert "learnt" not in text, "a version that did not tell the start apart has kept this"
    assert "| 40.0 % closed | +20.00 (3.07) | holds | 1, 1 |" in text
    assert "| 20.0 % against 40.0 % | -10.00 (3.04) | does not hold | 1, 1, 1 |" in text
    shown = tables.figure4(tables.Results(store))
    assert "| 33 | 50.00 | 70.00 | 60.00 | 40.0 | 20.0 |" in shown
    store.keep(large, 0, "votes9", {"test_error_percent": [21, 19.5]})
    assert "guessing" not in shown
    store.keep(none, 0, "attack", attacked | {"clean_accuracy_percent": 18.5})
    assert "says nothing: `none`" in tables.figure4(tables.Results(store))
    assert "% closed" not in claims(tables.Results(store))
    assert "128,32,8: 21.00 %, 19.50 % by 9 votes (the paper: 16.83)" in tables.figure4(tables.Results(store))


def test_the_projection_on_the_start_stands_beside_the_similarity(store):
    (random,) = cells_of("figure3", ["random"])
    store.keep(random, 0, "similarity", {"similarity": [0.2, 0.3, None]})
    learnt = {
        "start_projection": [0.5, 0.25, None],
        "decay_leaves": [0.3, 0.3, None],
        "similarity_of_rest": [0.4, 0.6, None],
    }
    store.keep(random, 1, "similarity", {"similarity": [0.2, 0.3, None]} | learnt)
    assert "| S, conv0 | S, conv1 | along start, conv0 |" in tables.figure3(tables.Results(store))
    row = "0.200 ± 0.000 | 0.300 ± 0.000 | 0.500 (n = 1) | 0.250 (n = 1) | 0.300 (n = 1) | 0.400 (n = 1) |"
    assert f"| `random` | max | {row}" in tables.figure3(tables.Results(store))
    text = claims(tables.Results(store))
    row = "| S > 0.1 of what the tiles have learnt with max pooling (conv0) | 0.400 | +0.300 (not known) | undecided"
    assert row in text
    assert "of what the tiles have learnt for other schemes" not in text, "nothing is known of them"


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name != "regularizer"])
def test_every_experiment_has_a_table_before_anything_is_measured(store, experiment, tmp_path):
    assert "builtin" in getattr(tables, experiment)(tables.Results(store))
    assert not figures.draw(experiment, tables.Results(store), tmp_path / "figure.svg")


def test_progress_says_how_far_how_good_and_how_long():
    line = {"epoch": 40, "test_error_percent": 37.125, "wall": {"train_s": 20.0, "test_s": 10.0}}
    assert progress_of(line, 100) == "epoch 40/100  test error 37.12 %  about 30 min left"
    assert progress_of(line, 40) == "epoch 40/40  test error 37.12 %"


def test_where_a_run_stands_is_told_at_first_and_after_every_tenth(store, capsys):
    (cell,) = cells_of("table1", ["none"])
    store.protocol = protocol(epochs=40)
    a_round = _Round(store, [], lambda job: None, lambda: Slots(1, 1))
    a_round._under_way = {"reference": Job(cell, 0, "train")}
    a_round._show()
    assert capsys.readouterr().err == "", "there is nothing yet"
    directory = store.run_dir(cell, 0)
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("{}\n")
    a_round._show()
    assert capsys.readouterr().err == "", "it is damaged"
    told = {}
    with (directory / "metrics.jsonl").open("w") as metrics:
        for epoch in range(1, 10):
            wall = {"train_s": 20.0, "test_s": 10.0}
            numbers = dict.fromkeys(("learning_rate", "train_loss", "train_error_percent", "test_loss"), 1.0)
            metrics.write(json.dumps({"epoch": epoch, "test_error_percent": 50.0, "wall": wall} | numbers) + "\n")
            metrics.flush()
            for _ in range(2):
                a_round._show()
            if said := capsys.readouterr().err.split():
                told[epoch] = said
    assert list(told) == [1, 4, 8]
    assert told[1] == ["none-0", "epoch", "1/40", "test", "error", "50.00", "%", "about", "20", "min", "left"]


# --- the command line


def run(*arguments, **options):
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, **options)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_what_was_stopped_goes_on_repeats_nothing_and_gives_the_same_table(tmp_path):
    # one job at a time: with the first one trained something is left to do
    cells = ["none", "random", "alternate"]
    arguments = ["table1", *TINY, "--epochs", "3", "--cells", ",".join(cells)]
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    process = subprocess.Popen(
        [*COMMAND, *arguments, "--jobs", "1", "--output", str(stopped)],
        stderr=subprocess.PIPE,
        text=True,
        stdout=subprocess.PIPE,
    )
    deadline = time.monotonic() + _TIMEOUT_S
    while not (trained := [path.name.partition(".")[0] for path in stopped.glob("results/*.train.json")]):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=_TIMEOUT_S)
    assert process.returncode == 130, stderr
    kept = {path: path.stat().st_mtime_ns for path in (stopped / "results").iterdir()}
    found = re.search(r"Stopped with (\d+) of (\d+) jobs done", stdout)
    assert found, stdout
    assert int(found[1]) == len(kept) < int(found[2])
    done = run(*arguments, "--output", stopped)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for name in (f"{cell}-0" for cell in cells):
        log = (stopped / "runs" / name / "log").read_text()
        assert log.count("new run") == 1
        metrics = stopped / "runs" / name / "metrics.jsonl"
        epochs = [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()]
        assert epochs == [1, 2, 3]
    assert "resumed" not in (stopped / "runs" / trained[0] / "log").read_text()

    done = run(*arguments, "--output", straight, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["failed"] == {}
    for name in ("table1.md", "claims.md", "table1.svg"):
        assert (stopped / name).read_bytes() == (straight / name).read_bytes(), name
    planned = json.loads(CliRunner().invoke(main, ["reproduce", *arguments, *_PLAN, "--output", str(straight)]).stdout)
    assert planned["to_do"] == []


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_run_that_fails_is_told_of_and_the_others_go_on(tmp_path):
    output = tmp_path / "out"
    options = [*TINY, "--epochs", "1", "--cells", "none,random", "--output", str(output)]
    (cell,) = cells_of("table1", ["random"])
    settings = Protocol.scaled(epochs=1, dataset="builtin", limit_train=100, limit_test=40)
    config = cell.config(settings, 0)
    broken = output / "runs" / "random-0"
    broken.parent.mkdir(parents=True)
    RunDirectory.create(broken, config, None).release()
    (broken / "metrics.jsonl").write_text("{}\n")  # an epoch was trained, and its checkpoints are gone
    done = run("table1", *options)
    assert done.returncode == 1, done.stderr
    assert "random-0 train failed: The run in" in done.stderr
    assert "- random-0 similarity: its network could not be trained" in done.stdout
    assert (output / "results" / "none-0.train.json").exists()


def test_the_regularizer_is_a_table_and_a_figure(tmp_path):
    arguments = ["reproduce", "regularizer", "--dataset", "builtin", "--limit-train", "300", "--output", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "| 20 |" in (tmp_path / "regularizer.md").read_text()
    assert (tmp_path / "regularizer.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("table3",), ("no experiment “table3”", "Did you mean table")),
        (("table1", "--cells", "randon"), ("table1 has no cell “randon”", "Did you mean random?")),
        (("table1", "--seeds", "0"), ("--seeds needs at least 1",)),
        (("table1", "--lr-decay-every", "0"), ("--lr-decay-every needs at least 1",)),
        (("table1", "--epochs", "0"), ("--epochs needs at least 1",)),
        (("table1", "--paper", "--epochs", "3"), ("--paper sets epochs and images itself", "--epochs")),
        (("table1", "--jobs", "0"), ("--jobs needs at least 1",)),
        (("table1", "--device", "cuda"), ("--device cuda needs a GPU", "--device cpu")),
        (("table1", "--device", "cuda", "--fabric", "serial"), ("--device is for the fabric batched",)),
        (("table1", "--fabric", "ray"), ("--fabric ray has a process per tile",)),
        (("table1", "--fabric", "bached"), ("Did you mean batched?",)),
        (("table1", "--dataset", "imagenet"), ("imagenet",)),
        (("table1", "--output", "file"), ("--output is a folder, and file is none",)),
        (("table1", "--output", "file/below"), ("--output is file/below", "file can't be written to")),
        (("regularizer", "--cells", "none"), ("regularizer has no cells", "Leave --cells out")),
        (("table1", "--adopt", "nowhere", "--output", "out"), ("nowhere is no run directory",)),
    ],
)
def test_bad_input_is_refused_before_anything_starts(tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("rapa_dist.experiments.command.carry_out", lambda *a, **k: pytest.fail("started"))
    if "--adopt" not in arguments:  # a run is adopted under a protocol, which counts the images
        monkeypatch.setattr("rapa_dist.experiments.command.load_dataset", lambda *a, **k: pytest.fail("images read"))
    Path("file").write_text("not a folder")
    dataset = () if "--dataset" in arguments else ("--dataset", "builtin")
    result = CliRunner().invoke(main, ["reproduce", *arguments, *dataset])
    assert result.exit_code in (1, 2), result.output
    for part in parts:
        assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing was made"
